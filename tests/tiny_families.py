"""A tiny model of each family: real configuration, model and processor classes of transformers, random weights.

``TINY[name].make(folder)`` writes a folder that loads as a published one does: model, tokenizer or processor, chat
template. Images are few tokens: 28 or 56 pixels a side, 1 to 25 tokens.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmdist.data.templates import MOONDREAM, VICUNA
from vlmdist.sample import ImagePart, Message, Sample, TextPart

WORDS = (
    "what is the total",
    "a receipt of milk, bread and tea",
    "14.10 RM, paid in cash",
    "name the shop and its town",
)

# -- chat templates in each family's own style -------------------------------------------------------------------------

# https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct: turns are trimmed
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _chatml(system: str, image: str = "") -> str:
    """ChatML with a system text where the conversation has none; ``image`` is what stands in an image's place."""
    return (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        f"{{{{ '<|im_start|>system\n{system}<|im_end|>\n' }}}}{{% endif %}}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
        f"{{{{ '{image}' }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


SMOLLM2_TEMPLATE = _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN_TEMPLATE = _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN_VL_TEMPLATE = _chatml("You are a helpful assistant.", "<|vision_start|><|image_pad|><|vision_end|>")
# https://huggingface.co/OpenGVLab/InternVL3-1B-hf: the image's place ends with a new line
INTERNVL_TEMPLATE = _chatml("You are a helpful assistant.", "<IMG_CONTEXT>\n")
# https://huggingface.co/llava-hf/llava-v1.6-mistral-7b-hf: images before the text
LLAVA_NEXT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ' ' }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ '[INST] ' }}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{{ ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
# https://huggingface.co/HuggingFaceM4/Idefics3-8B-Llama3 and HuggingFaceTB/SmolVLM-Instruct
IDEFICS3_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# https://huggingface.co/google/gemma-3-4b-it: the assistant is called model, texts are trimmed
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ p.text | trim }}{% endif %}"
    "{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# image, bos, question, new line, answer: https://github.com/google-research/big_vision, configs/proj/paligemma
PALIGEMMA_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ image_token }}{% endif %}{% endfor %}{{ bos_token }}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)
# image (it ends with bos), question, the mark of the answer: https://huggingface.co/adept/fuyu-8b
FUYU_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}{% else %}"
    "{% if m.content[0].type == 'text' %}{{ bos_token }}{% endif %}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ image_token }}{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{{ '<0x04>' }}{% endif %}{% endfor %}"
)

# -- tokenizers --------------------------------------------------------------------------------------------------------


def tiny_tokenizer(
    template: str, bos: str, eos: str, pad: str, special: Sequence[str] = (), named: dict[str, str] | None = None
) -> Any:
    """Byte-level BPE of at most 512 entries. special: more special tokens; named: those that a processor asks for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    named = named or {}
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(dict.fromkeys([pad, eos, bos, *special, *named.values()])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named,
    )
    tokenizer.chat_template = template
    return tokenizer


def _chatml_tokenizer(template: str, special: Sequence[str] = (), named: dict[str, str] | None = None) -> Any:
    return tiny_tokenizer(template, "<|im_start|>", "<|im_end|>", "<|endoftext|>", special, named)


def _llama_tokenizer(template: str) -> Any:
    return tiny_tokenizer(template, "<s>", "</s>", "<unk>", ["<image>"])


# -- models ------------------------------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**_TEXT, "vocab_size": len(tokenizer), **ids, **more}


def _save(folder: Path, model_class: Any, config: Any, processor: Any, seed: int) -> Path:
    """Weights drawn so wide that every token, image and position moves the logits."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    # a tied head with large embeddings would say each token again
                    narrower = 4 if "embed_tokens" in name else 1
                    parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()) / narrower)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_llama3(folder: Path, seed: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = tiny_tokenizer(
        LLAMA3_TEMPLATE, "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", special
    )
    config = LlamaConfig(**_text(tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    return _save(folder, LlamaForCausalLM, config, tokenizer, seed)


def make_smollm2(folder: Path, seed: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _chatml_tokenizer(SMOLLM2_TEMPLATE)
    return _save(folder, LlamaForCausalLM, LlamaConfig(**_text(tokenizer), tie_word_embeddings=True), tokenizer, seed)


def make_qwen2_5(folder: Path, seed: int = 0) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _chatml_tokenizer(QWEN_TEMPLATE)
    return _save(folder, Qwen2ForCausalLM, Qwen2Config(**_text(tokenizer)), tokenizer, seed)


def llava_processor(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def make_llava(folder: Path, seed: int = 0) -> Path:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = _llama_tokenizer(VICUNA)
    processor = llava_processor(tokenizer)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": 28},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_index=processor.image_token_id,
        image_seq_length=4,
    )
    return _save(folder, LlavaForConditionalGeneration, config, processor, seed)


def make_vipllava(folder: Path, seed: int = 0) -> Path:
    """A family without a row of its own in vlmdist/model/families.py."""
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    tokenizer = _llama_tokenizer(VICUNA)
    processor = llava_processor(tokenizer)
    config = VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": 28},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_index=processor.image_token_id,
        vision_feature_layer=[-2, -1],
        image_seq_length=4,
    )
    return _save(folder, VipLlavaForConditionalGeneration, config, processor, seed)


def make_llava_onevision(folder: Path, seed: int = 0) -> Path:
    """A family without a row of its own, in tiles of unlike number."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
    )

    from vlmdist.model.processors import without_videos

    tokenizer = _chatml_tokenizer(_chatml("You are a helpful assistant.", "<image>\n"), ["<image>", "<video>"])
    grids = [[28, 56], [56, 28], [56, 56]]
    processor = without_videos(LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": 28, "vision_use_head": False},
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=grids,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return _save(folder, LlavaOnevisionForConditionalGeneration, config, processor, seed)


def make_llava_next(folder: Path, seed: int = 0) -> Path:
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = tiny_tokenizer(LLAVA_NEXT_TEMPLATE, "<s>", "</s>", "<unk>", ["<image>", "[INST]", "[/INST]"])
    grids = [[28, 56], [56, 28], [56, 56]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grids
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": 28},
        text_config={"model_type": "mistral", **_text(tokenizer), "sliding_window": None},
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=grids,
        image_seq_length=4,
    )
    return _save(folder, LlavaNextForConditionalGeneration, config, processor, seed)


INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "context_image_token": "<IMG_CONTEXT>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}


def internvl_processor(tokenizer: Any) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor

    from vlmdist.model.processors import without_videos

    return without_videos(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=3
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )


def make_internvl(folder: Path, seed: int = 0) -> Path:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    tokenizer = _chatml_tokenizer(INTERNVL_TEMPLATE, named=INTERNVL_TOKENS)
    processor = internvl_processor(tokenizer)
    config = InternVLConfig(
        vision_config={**_VISION, "image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True},
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return _save(folder, InternVLForConditionalGeneration, config, processor, seed)


QWEN_VL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen2_5_vl_processor(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor

    from vlmdist.model.processors import without_videos

    return without_videos(Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 84),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def make_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _chatml_tokenizer(QWEN_VL_TEMPLATE, QWEN_VL_TOKENS)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(QWEN_VL_TOKENS))
    processor = qwen2_5_vl_processor(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]}  # of 8 frequencies a head
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": _TEXT["hidden_size"],
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        text_config={**_text(tokenizer), "rope_parameters": rope},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor, seed)


IDEFICS3_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def idefics3_processor(tokenizer: Any) -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )


def make_idefics3(folder: Path, seed: int = 0) -> Path:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    tokenizer = _chatml_tokenizer(IDEFICS3_TEMPLATE, IDEFICS3_TOKENS)
    processor = idefics3_processor(tokenizer)
    config = Idefics3Config(
        vision_config={**_VISION, "image_size": 56},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return _save(folder, Idefics3ForConditionalGeneration, config, processor, seed)


def make_smolvlm(folder: Path, seed: int = 0) -> Path:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor, SmolVLMProcessor

    from vlmdist.model.processors import without_videos

    tokenizer = _chatml_tokenizer(IDEFICS3_TEMPLATE, IDEFICS3_TOKENS)
    processor = without_videos(SmolVLMProcessor)(
        image_processor=SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer=tokenizer,
        video_processor=None,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    config = SmolVLMConfig(
        vision_config={**_VISION, "image_size": 56},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    return _save(folder, SmolVLMForConditionalGeneration, config, processor, seed)


def make_gemma3(folder: Path, seed: int = 0) -> Path:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    places = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tiny_tokenizer(
        GEMMA3_TEMPLATE, "<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"], named=places
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": 28, "patch_size": 7},
        text_config={
            **_text(tokenizer),
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return _save(folder, Gemma3ForConditionalGeneration, config, processor, seed)


def make_paligemma(folder: Path, seed: int = 0, text_kind: str = "gemma", **text: Any) -> Path:
    """text_kind: gemma2 for PaliGemma 2."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tokenizer = tiny_tokenizer(PALIGEMMA_TEMPLATE, "<bos>", "<eos>", "<pad>")
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28}, image_seq_length=4)
    image_processor.image_seq_length = 4
    # puts its image token, places and segments into the vocabulary
    processor = PaliGemmaProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": 28, "vision_use_head": False},
        text_config={"model_type": text_kind, **_text(tokenizer), "head_dim": 16, **text},
        image_token_index=processor.image_token_id,
        projection_dim=_TEXT["hidden_size"],
        hidden_size=_TEXT["hidden_size"],
    )
    return _save(folder, PaliGemmaForConditionalGeneration, config, processor, seed)


def make_fuyu(folder: Path, seed: int = 0) -> Path:
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor

    tokenizer = tiny_tokenizer(
        FUYU_TEMPLATE, "<s>", "|ENDOFTEXT|", "<unk>", ["|SPEAKER|", "|NEWLINE|", "<0x00>", "<0x04>"]
    )
    processor = FuyuProcessor(
        FuyuImageProcessor(size={"height": 42, "width": 42}, patch_size={"height": 14, "width": 14}), tokenizer
    )
    text = {k: v for k, v in _text(tokenizer).items() if k != "num_key_value_heads"}
    config = FuyuConfig(
        text_config={"model_type": "persimmon", **text},
        patch_size=14,
        image_size=42,
        image_token_id=processor.image_token_id,
    )
    return _save(folder, FuyuForCausalLM, config, processor, seed)


def make_moondream(folder: Path, seed: int = 0) -> Path:
    from transformers import LlavaProcessor, SiglipImageProcessor

    from vlmdist.model.moondream import MoondreamConfig, MoondreamForConditionalGeneration

    end = "<|endoftext|>"  # begins, ends and pads, as published
    tokenizer = tiny_tokenizer(MOONDREAM, end, end, end, ["<image>"])
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
    )
    text = {k: v for k, v in _text(tokenizer).items() if k not in ("num_key_value_heads", "pad_token_id")}
    config = MoondreamConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": 28, "vision_use_head": False},
        text_config={
            "model_type": "phi",
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        projector_hidden_size=128,
        projector_hidden_act="gelu_pytorch_tanh",
        image_token_index=processor.image_token_id,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _save(folder, MoondreamForConditionalGeneration, config, processor, seed)


@dataclass(frozen=True)
class TinyFamily:
    make: Callable[..., Path]
    """Writes a model of the family into the folder that it is given."""
    max_images: int
    """Most images that a sample of the tests has; 0: the family takes text only."""


# by the name in the table of the README
TINY = {
    "Llama-3": TinyFamily(make_llama3, 0),
    "SmolLM2": TinyFamily(make_smollm2, 0),
    "Qwen2.5": TinyFamily(make_qwen2_5, 0),
    "LLaVA-1.5": TinyFamily(make_llava, 2),
    "LLaVA-NeXT": TinyFamily(make_llava_next, 2),
    "InternVL": TinyFamily(make_internvl, 2),
    "Qwen2.5-VL": TinyFamily(make_qwen2_5_vl, 2),
    "SmolVLM": TinyFamily(make_smolvlm, 2),
    "Idefics3": TinyFamily(make_idefics3, 2),
    "Gemma-3": TinyFamily(make_gemma3, 2),
    "PaliGemma": TinyFamily(make_paligemma, 2),
    "Fuyu": TinyFamily(make_fuyu, 1),
    "Moondream2": TinyFamily(make_moondream, 1),
}

# -- samples -----------------------------------------------------------------------------------------------------------


def picture(number: int, width: int, height: int) -> bytes:
    """A PNG of random colours, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


_SIZES = ((60, 44), (30, 90))  # width, height: they differ in tiles, patches and tokens where the family allows it


def conversation(*turns: str | tuple[int | str, ...]) -> Sample:
    """Turns alternate user, assistant. A turn is a text, or texts and images, these by their number."""
    messages: list[Message] = []
    images: list[bytes] = []
    for i, turn in enumerate(turns):
        parts: list[TextPart | ImagePart] = []
        for part in (turn,) if isinstance(turn, str) else turn:
            if isinstance(part, str):
                parts.append(TextPart(part))
            else:
                parts.append(ImagePart(len(images)))
                images.append(picture(part, *_SIZES[part % 2]))
        messages.append(Message("assistant" if i % 2 else "user", tuple(parts)))
    return Sample(0, "sample", tuple(messages), tuple(images))
