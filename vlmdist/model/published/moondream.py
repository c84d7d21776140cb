"""Moondream2's published weights (vikhyatk/moondream2, revision 2024-04-02) as ``MoondreamForConditionalGeneration``.

Names and arithmetic: https://huggingface.co/vikhyatk/moondream2/tree/2024-04-02 (vision_encoder.py, modeling_phi.py).
The vision tower is a ViT whose patches are cut out and projected by a linear layer; the decoder is Phi-1.5, parallel
residual with one norm a layer, rotary positions over half of each head. Fused q, k, v lie one after the other in both.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmdist.errors import UserError
from vlmdist.model.moondream import MoondreamConfig, MoondreamForConditionalGeneration
from vlmdist.model.published.weights import Rule, fill, read_config, read_weights

IMAGE_TOKEN = "<image>"  # noqa: S105 - a token of the vocabulary
_PATCH_PIXELS = 14
_VISION_HEAD_WIDTH = 72  # SigLIP so400m: 1152 over 16 heads
_TEXT_HEAD_WIDTH = 64  # Phi-1.5: 2048 over 32 heads
_VISUAL = r"vision_encoder\.encoder\.model\.visual\."
_TEXT = r"text_model\.transformer\."
_OURS_VISION = "model.vision_tower."
_OURS_TEXT = "model.language_model."


def _thirds(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.chunk(3)


def _as_convolution(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """[width, 3 * p * p] over patches flattened as (channel, row, column) -> [width, 3, p, p]."""
    return (weight.reshape(weight.shape[0], 3, _PATCH_PIXELS, _PATCH_PIXELS),)


def _rules() -> list[Rule]:
    block, layer = rf"{_VISUAL}blocks\.(\d+)\.", rf"{_TEXT}h\.(\d+)\."
    ours_block, ours_layer = rf"{_OURS_VISION}encoder.layers.\1.", rf"{_OURS_TEXT}layers.\1."
    rules = [
        Rule(
            rf"{_VISUAL}patch_embed\.linear\.weight",
            (f"{_OURS_VISION}embeddings.patch_embedding.weight",),
            _as_convolution,
        ),
        Rule(rf"{_VISUAL}patch_embed\.linear\.bias", (f"{_OURS_VISION}embeddings.patch_embedding.bias",)),
        Rule(
            rf"{_VISUAL}pos_embed", (f"{_OURS_VISION}embeddings.position_embedding.weight",), lambda t: (t.squeeze(0),)
        ),
        Rule(rf"{_TEXT}embd\.wte\.weight", (f"{_OURS_TEXT}embed_tokens.weight",)),
        Rule(rf"{_TEXT}.*\.inv_freq"),  # computed, not learnt
    ]
    for kind in ("weight", "bias"):
        of_attention = [f"{ours_block}self_attn.{p}_proj.{kind}" for p in "qkv"]
        of_decoder = [f"{ours_layer}self_attn.{p}_proj.{kind}" for p in "qkv"]
        rules += [Rule(rf"{block}attn\.qkv\.{kind}", tuple(of_attention), _thirds)]
        rules += [Rule(rf"{layer}mixer\.Wqkv\.{kind}", tuple(of_decoder), _thirds)]
        for published, ours in {
            rf"{block}attn\.proj": f"{ours_block}self_attn.out_proj",
            rf"{block}norm1": f"{ours_block}layer_norm1",
            rf"{block}norm2": f"{ours_block}layer_norm2",
            rf"{block}mlp\.fc(1|2)": rf"{ours_block}mlp.fc\2",
            rf"{_VISUAL}norm": f"{_OURS_VISION}post_layernorm",
            r"vision_encoder\.projection\.mlp\.fc(1|2)": r"model.multi_modal_projector.linear_\1",
            rf"{layer}ln": f"{ours_layer}input_layernorm",
            rf"{layer}mixer\.out_proj": f"{ours_layer}self_attn.dense",
            rf"{layer}mlp\.fc(1|2)": rf"{ours_layer}mlp.fc\2",
            r"text_model\.lm_head\.ln": f"{_OURS_TEXT}final_layernorm",
            r"text_model\.lm_head\.linear": "lm_head",
        }.items():
            rules.append(Rule(rf"{published}\.{kind}", (f"{ours}.{kind}",)))
    return rules


def convert(source: Path) -> tuple[Any, Any]:
    """The model, in the dtype of the published weights, and its processor. Raises UserError."""
    from accelerate import init_empty_weights

    text_options = read_config(source).get("text_config") or {}
    weights = read_weights(source)
    tokenizer = _tokenizer(source)
    config = _config(weights, text_options, tokenizer)
    with init_empty_weights():
        model = MoondreamForConditionalGeneration(config)
    fill(model, weights, _rules())
    return model, _processor(tokenizer, config)


def _config(weights: Mapping[str, torch.Tensor], text_options: Mapping[str, Any], tokenizer: Any) -> MoondreamConfig:
    """Sizes are those of the tensors; what no tensor tells is the architecture's."""
    from transformers import PhiConfig, SiglipVisionConfig

    visual, text = "vision_encoder.encoder.model.visual.", "text_model.transformer."
    needed = [
        f"{visual}pos_embed",
        f"{visual}blocks.0.mlp.fc1.weight",
        "vision_encoder.projection.mlp.fc1.weight",
        f"{text}embd.wte.weight",
        f"{text}h.0.mlp.fc1.weight",
    ]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise UserError(f"these are no weights of Moondream2 of 2024-04-02: {', '.join(missing)} are missing")
    positions, vision_mlp, projector, embeddings, text_mlp = (weights[name].shape for name in needed)
    vision = SiglipVisionConfig(
        hidden_size=positions[2],
        intermediate_size=vision_mlp[0],
        num_hidden_layers=_count(weights, f"{visual}blocks."),
        num_attention_heads=positions[2] // _VISION_HEAD_WIDTH,
        image_size=math.isqrt(positions[1]) * _PATCH_PIXELS,
        patch_size=_PATCH_PIXELS,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )
    text_config = PhiConfig(
        vocab_size=embeddings[0],
        hidden_size=embeddings[1],
        intermediate_size=text_mlp[0],
        num_hidden_layers=_count(weights, f"{text}h."),
        num_attention_heads=embeddings[1] // _TEXT_HEAD_WIDTH,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        max_position_embeddings=text_options.get("max_position_embeddings", 2048),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": text_options.get("rope_theta", 10000.0),
            "partial_rotary_factor": text_options.get("partial_rotary_factor", 0.5),
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MoondreamConfig(
        vision_config=vision,
        text_config=text_config,
        projector_hidden_size=projector[0],
        projector_hidden_act="gelu_pytorch_tanh",
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=positions[1],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        dtype=weights[needed[3]].dtype,
    )


def _count(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def _tokenizer(source: Path) -> Any:
    """As published, with an image token in the first free place of the vocabulary, which has room."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, local_files_only=True)
    except (OSError, ValueError) as e:
        raise UserError(f"{source}: its tokenizer can't be loaded: {str(e).splitlines()[0]}") from None
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.padding_side = "left"
    return tokenizer


def _processor(tokenizer: Any, config: MoondreamConfig) -> Any:
    from PIL.Image import Resampling
    from transformers import LlavaProcessor, SiglipImageProcessor

    side = config.vision_config.image_size
    image_processor = SiglipImageProcessor(
        size={"height": side, "width": side},
        resample=Resampling.BICUBIC,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
    )
