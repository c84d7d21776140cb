"""The models of the recipes in their published sizes, without weights: config.json and a processor with few words.

Sizes: https://huggingface.co/meta-llama/Meta-Llama-3-8B, .../llava-hf/llava-1.5-7b-hf,
.../OpenGVLab/Mini-InternVL-Chat-2B-V1-5, .../vikhyatk/moondream2 (2024-04-02), their config.json.
"""

from pathlib import Path
from typing import Any

from tiny_families import INTERNVL_TOKENS, tiny_tokenizer

from vlmdist.data.templates import INTERNLM2, MOONDREAM, RECEIPT_LINES, VICUNA

_LLAMA_3 = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_INTERNVIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
}
_INTERNLM2_1_8B = {
    "model_type": "llama",
    "vocab_size": 92553,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
_SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 378,
    "patch_size": 14,
    "vision_use_head": False,
}
_PHI_1_5 = {
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def llama3_8b(folder: Path) -> Path:
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer(RECEIPT_LINES, "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
    return _save(folder, LlamaConfig(**_LLAMA_3, **_ids(tokenizer)), tokenizer)


def llava_7b(folder: Path) -> Path:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    tokenizer = tiny_tokenizer(VICUNA, "<s>", "</s>", "<unk>", ["<image>"])
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    config = LlavaConfig(
        vision_config=_CLIP_L_336,
        text_config={**_VICUNA_7B, **_ids(tokenizer)},
        image_token_index=processor.image_token_id,
        image_seq_length=576,
    )
    return _save(folder, config, processor)


def internvl_2b(folder: Path) -> Path:
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor

    from vlmdist.model.processors import without_videos

    tokenizer = tiny_tokenizer(INTERNLM2, "<s>", "<|im_end|>", "</s>", ["<|im_start|>"], INTERNVL_TOKENS)
    processor = without_videos(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
        ),
        tokenizer=tokenizer,
        image_seq_length=256,
        chat_template=tokenizer.chat_template,
    )
    config = InternVLConfig(
        vision_config=_INTERNVIT_300M,
        text_config={**_INTERNLM2_1_8B, **_ids(tokenizer)},
        image_token_id=processor.image_token_id,
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    return _save(folder, config, processor)


def moondream2(folder: Path) -> Path:
    from transformers import LlavaProcessor, SiglipImageProcessor

    from vlmdist.model.moondream import MoondreamConfig

    end = "<|endoftext|>"
    tokenizer = tiny_tokenizer(MOONDREAM, end, end, end, ["<image>"])
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 378, "width": 378}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = MoondreamConfig(
        vision_config=_SIGLIP_SO400M,
        text_config={**_PHI_1_5, "rope_parameters": rope},
        projector_hidden_size=8192,
        projector_hidden_act="gelu_pytorch_tanh",
        image_token_index=processor.image_token_id,
        image_seq_length=729,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _save(folder, config, processor)


def _ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _save(folder: Path, config: Any, processor: Any) -> Path:
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
