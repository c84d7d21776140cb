"""Moondream2 (revision 2024-04-02) as a model of transformers' own parts: a SigLIP tower, a projector, a Phi decoder.

The wiring is LLaVA's (image features take the places of the image tokens); only what differs is here. Weights come from
the published ones by ``vlmdist.model.published.moondream``. The file imports transformers and torch alone, so that
``save_pretrained`` can put it beside the weights: an exported folder loads without vlmdist.

Architecture: https://huggingface.co/vikhyatk/moondream2/tree/2024-04-02
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel


@strict
class MoondreamConfig(LlavaConfig):
    """LLaVA's configuration with the width of the projector's hidden layer."""

    model_type = "vlmdist_moondream"

    projector_hidden_size: int = 8192


class MoondreamProjector(nn.Module):
    """[N, P, vision width] -> [N, P, text width] through a wider layer."""

    def __init__(self, config: MoondreamConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.projector_hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class MoondreamModel(LlavaModel):
    """Moondream2 of 2024-04-02: SigLIP tower, two-layer projector, Phi decoder."""

    config_class = MoondreamConfig

    def __init__(self, config: MoondreamConfig):
        super().__init__(config)
        self.multi_modal_projector = MoondreamProjector(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """Projected features of every image, [P, text width] each, in ``pooler_output``.

        All patches of the tower's last layer behind its final norm; LLaVA takes a layer before it.
        """
        outputs = self.vision_tower(pixel_values)
        outputs.pooler_output = list(self.multi_modal_projector(outputs.last_hidden_state))
        return outputs


class MoondreamForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA's forward and generation over ``MoondreamModel``; the head has a bias."""

    config_class = MoondreamConfig
    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: MoondreamConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MoondreamModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()


AutoConfig.register(MoondreamConfig.model_type, MoondreamConfig)
AutoModelForImageTextToText.register(MoondreamConfig, MoondreamForConditionalGeneration)
