"""Tiny random weights under the published names of Moondream2 and Mini-InternVL-Chat-V1-5, and their arithmetic written
down a second time from the authors' papers and code, in plain tensor operations: what the converters must reproduce."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

Weights = dict[str, torch.Tensor]

# -- Moondream2 --------------------------------------------------------------------------------------------------------

MOONDREAM = {"vision_width": 144, "vision_heads": 2, "text_width": 128, "text_heads": 2, "layers": 2, "side": 28}
_VISUAL = "vision_encoder.encoder.model.visual."
_TEXT = "text_model.transformer."


def moondream_weights(vocabulary_size: int, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    v, t, patches = MOONDREAM["vision_width"], MOONDREAM["text_width"], (MOONDREAM["side"] // 14) ** 2
    weights: Weights = {f"{_VISUAL}pos_embed": torch.randn(1, patches, v, generator=generator) * 0.1}

    def add(name: str, out: int, into: int | None = None) -> None:
        """A linear layer, or a norm where ``into`` is None."""
        shape = (out,) if into is None else (out, into)
        offset = 1.0 if into is None else 0.0
        weights[f"{name}.weight"] = offset + torch.randn(shape, generator=generator) * (into or 100) ** -0.5
        weights[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    add(f"{_VISUAL}patch_embed.linear", v, 3 * 14 * 14)
    for n in range(MOONDREAM["layers"]):
        for norm in ("norm1", "norm2"):
            add(f"{_VISUAL}blocks.{n}.{norm}", v)
        add(f"{_VISUAL}blocks.{n}.attn.qkv", 3 * v, v)
        add(f"{_VISUAL}blocks.{n}.attn.proj", v, v)
        add(f"{_VISUAL}blocks.{n}.mlp.fc1", 2 * v, v)
        add(f"{_VISUAL}blocks.{n}.mlp.fc2", v, 2 * v)
        add(f"{_TEXT}h.{n}.ln", t)
        add(f"{_TEXT}h.{n}.mixer.Wqkv", 3 * t, t)
        add(f"{_TEXT}h.{n}.mixer.out_proj", t, t)
        add(f"{_TEXT}h.{n}.mlp.fc1", 4 * t, t)
        add(f"{_TEXT}h.{n}.mlp.fc2", t, 4 * t)
    add(f"{_VISUAL}norm", v)
    add("vision_encoder.projection.mlp.fc1", 96, v)
    add("vision_encoder.projection.mlp.fc2", t, 96)
    weights[f"{_TEXT}embd.wte.weight"] = torch.randn(vocabulary_size, t, generator=generator)
    add("text_model.lm_head.ln", t)
    add("text_model.lm_head.linear", vocabulary_size, t)
    return weights


def moondream_logits(w: Weights, pixels: torch.Tensor, before: list[int], after: list[int]) -> torch.Tensor:
    """pixels: [3, H, W] normalised. Tokens before the image and after it; logits of all positions [T, V]."""
    embeddings = w[f"{_TEXT}embd.wte.weight"]
    x = torch.cat([embeddings[before], _moondream_image(w, pixels), embeddings[after]])
    heads = MOONDREAM["text_heads"]
    for n in range(MOONDREAM["layers"]):
        h = _norm(w, f"{_TEXT}h.{n}.ln", x, 1e-5)
        # fused: all queries, all keys, all values, one after the other
        q, k, v = (_heads(part, heads) for part in _dense(w, f"{_TEXT}h.{n}.mixer.Wqkv", h).chunk(3, dim=-1))
        rotary = q.shape[-1] // 2  # positions turn the first half of every head; the rest passes
        q = torch.cat([_rotate(q[..., :rotary], 10000.0), q[..., rotary:]], dim=-1)
        k = torch.cat([_rotate(k[..., :rotary], 10000.0), k[..., rotary:]], dim=-1)
        mixed = _joined(scaled_dot_product_attention(q, k, v, is_causal=True))
        mlp = _dense(w, f"{_TEXT}h.{n}.mlp.fc2", _gelu_tanh(_dense(w, f"{_TEXT}h.{n}.mlp.fc1", h)))
        x = x + _dense(w, f"{_TEXT}h.{n}.mixer.out_proj", mixed) + mlp  # in parallel
    return _dense(w, "text_model.lm_head.linear", _norm(w, "text_model.lm_head.ln", x, 1e-5))


def _moondream_image(w: Weights, pixels: torch.Tensor) -> torch.Tensor:
    rows = pixels.shape[1] // 14
    patches = torch.stack(
        [pixels[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14].flatten() for r in range(rows) for c in range(rows)]
    )  # [P, 3 * 14 * 14]: channel, row, column
    x = _dense(w, f"{_VISUAL}patch_embed.linear", patches) + w[f"{_VISUAL}pos_embed"][0]
    for n in range(MOONDREAM["layers"]):
        h = _norm(w, f"{_VISUAL}blocks.{n}.norm1", x, 1e-6)
        q, k, v = (
            _heads(p, MOONDREAM["vision_heads"]) for p in _dense(w, f"{_VISUAL}blocks.{n}.attn.qkv", h).chunk(3, -1)
        )
        x = x + _dense(w, f"{_VISUAL}blocks.{n}.attn.proj", _joined(scaled_dot_product_attention(q, k, v)))
        h = _norm(w, f"{_VISUAL}blocks.{n}.norm2", x, 1e-6)
        x = x + _dense(w, f"{_VISUAL}blocks.{n}.mlp.fc2", _gelu_tanh(_dense(w, f"{_VISUAL}blocks.{n}.mlp.fc1", h)))
    x = _norm(w, f"{_VISUAL}norm", x, 1e-6)
    hidden = _gelu_tanh(_dense(w, "vision_encoder.projection.mlp.fc1", x))
    return _dense(w, "vision_encoder.projection.mlp.fc2", hidden)


# -- InternVL-Chat-V1-5 ------------------------------------------------------------------------------------------------

INTERNVL: dict[str, Any] = {
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "force_image_size": 56,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "template": "internlm2-chat",
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "qkv_bias": True,
        "qk_normalization": False,
        "layer_norm_eps": 1e-6,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 512,
        "bias": False,
        "hidden_act": "silu",
    },
}


def internvl_weights(vocabulary_size: int, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    vision, text = INTERNVL["vision_config"], INTERNVL["llm_config"]
    v, t = vision["hidden_size"], text["hidden_size"]
    head = t // text["num_attention_heads"]

    def random(*shape: int, scale: float = 0.1) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    positions = (vision["image_size"] // 14) ** 2 + 1
    weights = {
        "vision_model.embeddings.class_embedding": random(1, 1, v),
        "vision_model.embeddings.position_embedding": random(1, positions, v),
        "vision_model.embeddings.patch_embedding.weight": random(v, 3, 14, 14, scale=0.05),
        "vision_model.embeddings.patch_embedding.bias": random(v),
        "mlp1.0.weight": 1 + random(4 * v),
        "mlp1.0.bias": random(4 * v),
        "mlp1.1.weight": random(t, 4 * v),
        "mlp1.1.bias": random(t),
        "mlp1.3.weight": random(t, t),
        "mlp1.3.bias": random(t),
        "language_model.model.tok_embeddings.weight": random(vocabulary_size, t, scale=1.0),
        "language_model.model.norm.weight": 1 + random(t),
        "language_model.output.weight": random(vocabulary_size, t),
    }
    for n in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{n}."
        weights |= {f"{at}ls1": 0.5 + random(v), f"{at}ls2": 0.5 + random(v)}
        for norm in ("norm1", "norm2"):
            weights |= {f"{at}{norm}.weight": 1 + random(v), f"{at}{norm}.bias": random(v)}
        wide = vision["intermediate_size"]
        for name, out, into in (
            ("attn.qkv", 3 * v, v),
            ("attn.proj", v, v),
            ("mlp.fc1", wide, v),
            ("mlp.fc2", v, wide),
        ):
            weights |= {f"{at}{name}.weight": random(out, into, scale=0.2), f"{at}{name}.bias": random(out)}
    groups, wide = text["num_key_value_heads"], text["intermediate_size"]
    for n in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{n}."
        fused = (text["num_attention_heads"] + 2 * groups) * head
        for name, out, into in (
            ("attention.wqkv", fused, t),
            ("attention.wo", t, t),
            ("feed_forward.w1", wide, t),
            ("feed_forward.w3", wide, t),
            ("feed_forward.w2", t, wide),
        ):
            weights[f"{at}{name}.weight"] = random(out, into, scale=0.2)
        weights |= {f"{at}attention_norm.weight": 1 + random(t), f"{at}ffn_norm.weight": 1 + random(t)}
    return weights


def internvl_logits(w: Weights, tiles: torch.Tensor, ids: list[int], image_token: int) -> torch.Tensor:
    """tiles: [N, 3, H, W] normalised; ids: with a run of image tokens for each tile. Logits [T, V]."""
    text = INTERNVL["llm_config"]
    features = torch.cat([_internvl_tile(w, tile) for tile in tiles])
    x = w["language_model.model.tok_embeddings.weight"][ids].clone()
    x[torch.tensor(ids) == image_token] = features
    heads, groups = text["num_attention_heads"], text["num_key_value_heads"]
    width = text["hidden_size"] // heads
    for n in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{n}."
        h = _rms_norm(w[f"{at}attention_norm.weight"], x)
        fused = linear(h, w[f"{at}attention.wqkv.weight"])  # [T, groups * (queries + 2) * width]
        q, k, v = [], [], []
        for group in range(groups):  # each group: its queries, then its key, then its value
            mine = fused[:, group * (heads // groups + 2) * width :][:, : (heads // groups + 2) * width]
            parts = mine.split(width, dim=1)
            q += parts[:-2]
            k += [parts[-2]] * (heads // groups)
            v += [parts[-1]] * (heads // groups)
        turned_q, turned_k = (_rotate(torch.stack(part), text["rope_theta"]) for part in (q, k))
        mixed = scaled_dot_product_attention(turned_q, turned_k, torch.stack(v), is_causal=True)
        x = x + linear(_joined(mixed), w[f"{at}attention.wo.weight"])
        h = _rms_norm(w[f"{at}ffn_norm.weight"], x)
        gated = silu(linear(h, w[f"{at}feed_forward.w1.weight"])) * linear(h, w[f"{at}feed_forward.w3.weight"])
        x = x + linear(gated, w[f"{at}feed_forward.w2.weight"])
    return linear(_rms_norm(w["language_model.model.norm.weight"], x), w["language_model.output.weight"])


def _internvl_tile(w: Weights, pixels: torch.Tensor) -> torch.Tensor:
    vision = INTERNVL["vision_config"]
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    side = pixels.shape[1] // 14
    patches = [
        linear(pixels[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14].flatten(), kernel.flatten(1))
        for r in range(side)
        for c in range(side)
    ]
    x = torch.stack(patches) + w["vision_model.embeddings.patch_embedding.bias"]
    x = torch.cat([w["vision_model.embeddings.class_embedding"][0], x])
    x = x + w["vision_model.embeddings.position_embedding"][0]
    for n in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{n}."
        h = _norm(w, f"{at}norm1", x, 1e-6)
        q, k, v = (_heads(p, vision["num_attention_heads"]) for p in _dense(w, f"{at}attn.qkv", h).chunk(3, -1))
        x = x + w[f"{at}ls1"] * _dense(w, f"{at}attn.proj", _joined(scaled_dot_product_attention(q, k, v)))
        h = _norm(w, f"{at}norm2", x, 1e-6)
        x = x + w[f"{at}ls2"] * _dense(w, f"{at}mlp.fc2", gelu(_dense(w, f"{at}mlp.fc1", h)))
    grid = x[1:].reshape(side, side, -1)  # without the class token
    # pixel shuffle by 0.5: two by two neighbours become one token, four times as wide; the order is that of "v2"
    tokens = [
        torch.cat([grid[r, c], grid[r, c + 1], grid[r + 1, c], grid[r + 1, c + 1]])
        for r in range(0, side, 2)
        for c in range(0, side, 2)
    ]
    h = _norm(w, "mlp1.0", torch.stack(tokens), 1e-5)
    return _dense(w, "mlp1.3", gelu(_dense(w, "mlp1.1", h)))


# -- shared ------------------------------------------------------------------------------------------------------------


def _dense(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w: Weights, name: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilon)


def _rms_norm(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[T, heads * D] -> [heads, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1)


def _rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions over [heads, T, D]: number i turns with number i + D / 2 (halves, not neighbours)."""
    length, half = x.shape[1], x.shape[2] // 2
    angle = torch.arange(length)[:, None] * theta ** (-torch.arange(half) / half)[None]  # [T, D / 2]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


# -- folders -----------------------------------------------------------------------------------------------------------

ADDED_TOKENS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
_PIECES = 340


def internvl_config(**text: Any) -> dict[str, Any]:
    """For the vocabulary of ``write_internvl_tokenizer``; ``text`` changes the decoder's part."""
    return {**INTERNVL, "llm_config": {**INTERNVL["llm_config"], "vocab_size": INTERNVL_VOCABULARY, **text}}


INTERNVL_VOCABULARY = _PIECES + len(ADDED_TOKENS)


def write_internvl_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """As InternLM2's in kind: BPE, bytes for what it doesn't know, no space put before a text, special tokens added."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=_PIECES,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokens = {_PIECES + n: {"content": token, "special": True} for n, token in enumerate(ADDED_TOKENS)}
    config = {"added_tokens_decoder": tokens, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_moondream_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """As CodeGen's in kind: byte-level BPE, one special token for everything."""
    from tiny_models import train_tiny_tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = train_tiny_tokenizer(texts).backend_tokenizer
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end).save_pretrained(folder)


def write_folder(folder: Path, weights: Weights, config: dict[str, Any], form: str) -> Path:
    """A published folder without its tokenizer. form: "safetensors", "shards" (two, with an index) or "bin"."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = sorted(weights)
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    else:
        parts = (names[::2], names[1::2])
        files = [f"model-{n + 1:05d}-of-00002.safetensors" for n in range(2)]
        for file, part in zip(files, parts, strict=True):
            save_file({name: weights[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
