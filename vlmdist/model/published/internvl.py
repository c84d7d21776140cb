"""InternVL-Chat-V1-5's published weights, Mini-InternVL-Chat-2B-V1-5 among them, as transformers' own InternVL.

The decoder is InternLM2: a Llama whose q, k and v lie in one matrix, a group for each key-value head: the queries that
share it, the key, the value. Names and arithmetic:
https://huggingface.co/OpenGVLab/Mini-InternVL-Chat-2B-V1-5 (modeling_intern_vit.py, modeling_internlm2.py)
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmdist.errors import UserError
from vlmdist.model.published.sentencepiece_tokenizer import load_fast_tokenizer
from vlmdist.model.published.weights import Rule, fill, read_config, read_weights

IMAGE_TOKENS = {"start": "<img>", "context": "<IMG_CONTEXT>", "end": "</img>"}
_OURS_VISION = "model.vision_tower."
_OURS_TEXT = "model.language_model."


def split_grouped(
    tensor: torch.Tensor, num_key_value_heads: int, queries_per_group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """InternLM2's wqkv [(groups * (queries + 2)) * head width, width] -> q, k, v."""
    groups = tensor.unflatten(0, (num_key_value_heads, queries_per_group + 2, -1))  # [G, Q + 2, D, width]
    q, k, v = groups.split([queries_per_group, 1, 1], dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


def _rules(text: Mapping[str, Any]) -> list[Rule]:
    block, layer = r"vision_model\.encoder\.layers\.(\d+)\.", r"language_model\.model\.layers\.(\d+)\."
    ours_block, ours_layer = rf"{_OURS_VISION}encoder.layer.\1.", rf"{_OURS_TEXT}layers.\1."
    of_vision = lambda kind: tuple(f"{ours_block}attention.{p}_proj.{kind}" for p in "qkv")  # noqa: E731
    grouped = functools.partial(
        split_grouped,
        num_key_value_heads=text["num_key_value_heads"],
        queries_per_group=text["num_attention_heads"] // text["num_key_value_heads"],
    )
    rules = [
        Rule(f"{block}attn\\.qkv\\.weight", of_vision("weight"), lambda t: t.chunk(3)),
        Rule(f"{block}attn\\.qkv\\.bias", of_vision("bias"), lambda t: t.chunk(3)),
        Rule(
            rf"{layer}attention\.wqkv\.weight", tuple(f"{ours_layer}self_attn.{p}_proj.weight" for p in "qkv"), grouped
        ),
        Rule(rf"{layer}attention\.rotary_emb\.inv_freq"),  # computed, not learnt
        Rule(rf"{block}ls(1|2)", (rf"{ours_block}lambda_\2",)),
    ]
    for published, ours in {
        r"vision_model\.embeddings\.class_embedding": f"{_OURS_VISION}embeddings.cls_token",
        r"vision_model\.embeddings\.position_embedding": f"{_OURS_VISION}embeddings.position_embeddings",
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)": (
            rf"{_OURS_VISION}embeddings.patch_embeddings.projection.\1"
        ),
        rf"{block}attn\.proj\.(weight|bias)": rf"{ours_block}attention.projection_layer.\2",
        rf"{block}attn\.(q|k)_norm\.weight": rf"{ours_block}attention.\2_norm.weight",
        rf"{block}norm1\.(weight|bias)": rf"{ours_block}layernorm_before.\2",
        rf"{block}norm2\.(weight|bias)": rf"{ours_block}layernorm_after.\2",
        rf"{block}mlp\.fc(1|2)\.(weight|bias)": rf"{ours_block}mlp.fc\2.\3",
        r"mlp1\.0\.(weight|bias)": r"model.multi_modal_projector.layer_norm.\1",
        r"mlp1\.1\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
        r"mlp1\.3\.(weight|bias)": r"model.multi_modal_projector.linear_2.\1",
        r"language_model\.model\.tok_embeddings\.weight": f"{_OURS_TEXT}embed_tokens.weight",
        r"language_model\.model\.norm\.weight": f"{_OURS_TEXT}norm.weight",
        r"language_model\.output\.weight": "lm_head.weight",
        rf"{layer}attention\.wo\.weight": f"{ours_layer}self_attn.o_proj.weight",
        rf"{layer}attention_norm\.weight": f"{ours_layer}input_layernorm.weight",
        rf"{layer}ffn_norm\.weight": f"{ours_layer}post_attention_layernorm.weight",
        rf"{layer}feed_forward\.w1\.weight": f"{ours_layer}mlp.gate_proj.weight",
        rf"{layer}feed_forward\.w3\.weight": f"{ours_layer}mlp.up_proj.weight",
        rf"{layer}feed_forward\.w2\.weight": f"{ours_layer}mlp.down_proj.weight",
    }.items():
        rules.append(Rule(published, (ours,)))
    return rules


def convert(source: Path) -> tuple[Any, Any]:
    """The model, in the dtype of the published weights, and its processor. Raises UserError."""
    from accelerate import init_empty_weights
    from transformers import InternVLForConditionalGeneration

    published = read_config(source)
    _refuse_other_models(source, published)
    weights = read_weights(source)
    tokenizer = _tokenizer(source)
    config = _config(published, tokenizer, next(iter(weights.values())).dtype)
    with init_empty_weights():
        model = InternVLForConditionalGeneration(config)
    fill(model, weights, _rules(published["llm_config"]))
    return model, _processor(published, tokenizer, config)


def _refuse_other_models(source: Path, published: Mapping[str, Any]) -> None:
    vision, text = published.get("vision_config"), published.get("llm_config")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UserError(f"{source / 'config.json'}: is no InternVL-Chat-V1-5: it has no vision_config and llm_config")
    expected = {
        "ps_version": (published.get("ps_version"), "v2"),
        "select_layer": (published.get("select_layer"), -1),
        "llm_config.architectures": ((text.get("architectures") or [None])[0], "InternLM2ForCausalLM"),
        "llm_config.bias": (text.get("bias", False), False),
        "llm_config.hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "vision_config.hidden_act": (vision.get("hidden_act", "gelu"), "gelu"),
    }
    problems = [
        f"{source / 'config.json'}: {name} is {found!r}; the converter is for {wanted!r}"
        for name, (found, wanted) in expected.items()
        if found != wanted
    ]
    if problems:
        raise UserError(problems)


def _config(published: Mapping[str, Any], tokenizer: Any, dtype: torch.dtype) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig

    vision, text = published["vision_config"], published["llm_config"]
    try:
        vision_config = InternVLVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"],
            attention_bias=vision.get("qkv_bias", True),
            use_qk_norm=vision.get("qk_normalization", False),
            norm_type=vision.get("norm_type", "layer_norm"),
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
            image_size=published.get("force_image_size") or vision["image_size"],
            patch_size=vision["patch_size"],
            use_mean_pooling=True,  # no norm behind the last layer, as published
        )
        scaling = dict(text.get("rope_scaling") or {})
        rope = {"rope_type": scaling.pop("type", "default"), "rope_theta": text["rope_theta"], **scaling}
        text_config = LlamaConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text["num_key_value_heads"],
            rms_norm_eps=text["rms_norm_eps"],
            max_position_embeddings=text["max_position_embeddings"],
            rope_parameters=rope,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    except KeyError as e:
        raise UserError(f"config.json: {e.args[0]} is missing in vision_config or llm_config") from None
    ratio = published.get("downsample_ratio", 0.5)
    patches = vision_config.image_size[0] // vision_config.patch_size[0]
    return InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["context"]),
        image_seq_length=int(patches**2 * ratio**2),
        downsample_ratio=ratio,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _tokenizer(source: Path) -> Any:
    """InternLM2's vocabulary with the image tokens under the names by which transformers' processor asks for them."""
    names = {f"{place}_image_token": token for place, token in IMAGE_TOKENS.items()}
    # V1-5 takes no videos; the processor wants a token for them all the same, one that no prompt has
    tokenizer = load_fast_tokenizer(source, {**names, "video_token": "<unk>"})
    missing = [token for token in IMAGE_TOKENS.values() if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(f"{source}: its tokenizer has no {', '.join(missing)}")
    return tokenizer


def _processor(published: Mapping[str, Any], tokenizer: Any, config: Any) -> Any:
    from PIL.Image import Resampling
    from transformers import GotOcr2ImageProcessor, InternVLProcessor

    from vlmdist.model.processors import without_videos

    side = config.vision_config.image_size[0]
    image_processor = GotOcr2ImageProcessor(
        size={"height": side, "width": side},
        crop_to_patches=bool(published.get("dynamic_image_size", True)),
        min_patches=int(published.get("min_dynamic_patch", 1)),
        max_patches=int(published.get("max_dynamic_patch", 12)),
        use_thumbnail=bool(published.get("use_thumbnail", True)),
        resample=Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return without_videos(InternVLProcessor)(
        image_processor=image_processor, tokenizer=tokenizer, image_seq_length=config.image_seq_length
    )
