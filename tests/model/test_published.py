"""Converted models compute what the published ones do; anything that isn't the published form is refused by name."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published_models import (
    internvl_config,
    internvl_logits,
    internvl_weights,
    moondream_logits,
    moondream_weights,
    write_folder,
    write_internvl_tokenizer,
    write_moondream_tokenizer,
)

from vlmdist.config import RunConfig
from vlmdist.data.prompt import Prompter
from vlmdist.errors import UserError
from vlmdist.model.published import internvl, moondream
from vlmdist.model.published.sentencepiece_tokenizer import load_fast_tokenizer
from vlmdist.model.published.weights import read_weights
from vlmdist.sample import ImagePart, Message, Sample, TextPart

TEXTS = ["Question: How many dimes are there?", "Answer: 3", "Extract the company, date, address and total."] * 20
# fp32 on both sides; the orders of summation differ, over logits of a few units
TOLERANCE = 1e-4


def picture(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width * 1000 + height)
    return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture
def moondream_folder(tmp_path: Path) -> Path:
    write_moondream_tokenizer(tmp_path / "moondream", TEXTS)
    return tmp_path / "moondream"


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_moondream_gives_the_published_logits(moondream_folder: Path, form: str) -> None:
    weights = moondream_weights(vocabulary_size=600)
    write_folder(moondream_folder, weights, {"model_type": "moondream1", "text_config": {"model_type": "phi"}}, form)
    model, processor = moondream.convert(moondream_folder)
    text = f"<|endoftext|>{moondream.IMAGE_TOKEN}\n\nQuestion: How many dimes are there?\n\nAnswer: 3"
    inputs = processor(text=[text], images=[picture(40, 30)], add_special_tokens=False, return_tensors="pt")
    pixels = inputs["pixel_values"][0]
    ids = inputs["input_ids"][0].tolist()
    first = ids.index(processor.image_token_id)
    after = ids[first + 4 :]  # four image tokens at 28 pixels
    assert processor.image_token_id not in after
    expected = moondream_logits(weights, pixels, ids[:first], after)
    found = model(**inputs).logits[0]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_moondream_pixels_are_the_published_ones(moondream_folder: Path) -> None:
    """378 pixels (28 here) by bicubic resize without keeping the shape, then (x - 0.5) / 0.5."""
    write_folder(moondream_folder, moondream_weights(600), {}, "safetensors")
    _, processor = moondream.convert(moondream_folder)
    image = picture(90, 50)
    found = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    resized = image.resize((28, 28), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(resized.get_flattened_data())).reshape(28, 28, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, (expected - 0.5) / 0.5, atol=1e-6, rtol=0)


@pytest.fixture
def internvl_folder(tmp_path: Path) -> Path:
    write_internvl_tokenizer(tmp_path / "internvl", [*TEXTS, "The  total is RM 14.10", "Чай зелёный, 25 пак."])
    return tmp_path / "internvl"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_internvl_gives_the_published_logits(internvl_folder: Path, form: str) -> None:
    weights = internvl_weights(vocabulary_size=345)
    write_folder(internvl_folder, weights, internvl_config(), form)
    model, processor = internvl.convert(internvl_folder)
    text = f"<s><|im_start|>user\n{processor.image_token}\nThe  total?<|im_end|><|im_start|>assistant\n14.10<|im_end|>"
    inputs = processor(text=[text], images=[picture(130, 60)], add_special_tokens=False, return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 3  # two tiles side by side and a thumbnail
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 3 * 4
    expected = internvl_logits(weights, inputs["pixel_values"], ids, processor.image_token_id)
    found = model(**inputs).logits[0]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("most", [1, 2, 6, 12])
def test_internvl_tiles_are_the_authors(internvl_folder: Path, most: int) -> None:
    """The closest shape among all (columns, rows) with at most so many tiles, and a thumbnail behind several.

    Written down from the InternVL 1.5 paper, https://arxiv.org/abs/2404.16821, section 3.3, and the authors'
    rule for equally close shapes: the later, larger one where the picture has more than half of its pixels.
    """
    write_folder(internvl_folder, internvl_weights(345), internvl_config(), "safetensors")
    _, processor = internvl.convert(internvl_folder)
    shapes = sorted(
        {(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most}, key=lambda s: s[0] * s[1]
    )
    for width, height in ((50, 50), (300, 60), (60, 400), (130, 131), (200, 100), (23, 90), (500, 333)):
        best, nearest = (1, 1), float("inf")
        for columns, rows in shapes:
            distance = abs(width / height - columns / rows)
            if distance < nearest:
                best, nearest = (columns, rows), distance
            elif distance == nearest and width * height > 0.5 * 56 * 56 * columns * rows:
                best = (columns, rows)
        image = picture(width, height)
        whole = image.resize((56 * best[0], 56 * best[1]), Image.Resampling.BICUBIC)
        tiles = [whole.crop((56 * c, 56 * r, 56 * c + 56, 56 * r + 56)) for r in range(best[1]) for c in range(best[0])]
        tiles += [image.resize((56, 56), Image.Resampling.BICUBIC)] if len(tiles) > 1 else []
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = torch.stack(
            [((torch.tensor(list(t.get_flattened_data())).reshape(56, 56, 3) / 255 - mean) / std) for t in tiles]
        ).permute(0, 3, 1, 2)
        found = processor.image_processor(images=[image], max_patches=most, crop_to_patches=True, return_tensors="pt")
        torch.testing.assert_close(found["pixel_values"], expected, atol=1e-5, rtol=0)


def test_the_run_file_sets_the_tiles(internvl_folder: Path) -> None:
    """As the recipe does: 2 in training, 6 where answers are scored; a thumbnail on top."""
    write_folder(internvl_folder, internvl_weights(345), internvl_config(), "safetensors")
    _, processor = internvl.convert(internvl_folder)
    buffer = io.BytesIO()
    picture(300, 60).save(buffer, "PNG")
    messages = (
        Message("user", (ImagePart(0), TextPart("Total?"))),
        Message("assistant", (TextPart("14.10"),)),
    )
    sample = Sample(0, "key", messages, (buffer.getvalue(),))
    tree = {
        "output_dir": "unused",
        "model": {"name_or_path": "unused"},
        "data": {"train": "unused"},
        "prompt": {"template": "internlm2", "max_image_tiles": 2},
        "train": {"global_batch_size": 1},
        "evaluate": {"max_image_tiles": 6},
    }
    config = RunConfig.model_validate(tree)
    training, evaluation = (Prompter.for_run(processor, config, evaluation=e) for e in (False, True))
    assert len(training.encode_training(sample).features["pixel_values"].shape) == 4
    assert training.encode_training(sample).features["pixel_values"].shape[0] == 3
    assert evaluation.encode_question(sample).features["pixel_values"].shape[0] == 6  # five in a row
    assert processor.image_processor.max_patches == 12
    text = training.tokenizer.decode(training.encode_training(sample).input_ids)
    context = "<IMG_CONTEXT>" * 12
    assert text == (
        "<s><|im_start|>system\nYou are an AI assistant whose name is InternLM (书生·浦语).<|im_end|><|im_start|>user\n"
        f"<img>{context}</img>\nTotal?<|im_end|><|im_start|>assistant\n14.10<|im_end|>"
    )


def test_what_is_not_published_so_is_refused_by_name(moondream_folder: Path, internvl_folder: Path) -> None:
    weights = moondream_weights(600)
    changed = {name: w for name, w in weights.items() if "h.1.ln" not in name}
    changed["text_model.transformer.h.0.mixer.extra"] = torch.zeros(3)
    write_folder(moondream_folder, changed, {}, "safetensors")
    with pytest.raises(UserError) as e:
        moondream.convert(moondream_folder)
    assert "1 published weights are unknown: text_model.transformer.h.0.mixer.extra" in e.value.problems[0]
    assert "model.language_model.layers.1.input_layernorm.bias" in e.value.problems[1]
    short = dict(weights)
    short["text_model.lm_head.linear.bias"] = torch.zeros(7)
    write_folder(moondream_folder, short, {}, "safetensors")
    with pytest.raises(UserError, match=r"another shape: text_model\.lm_head\.linear\.bias \[7\], \[600\] expected"):
        moondream.convert(moondream_folder)

    write_folder(internvl_folder, internvl_weights(345), internvl_config(), "safetensors")
    config = internvl_config() | {"ps_version": "v1", "select_layer": -4}
    write_folder(internvl_folder, internvl_weights(345), config, "safetensors")
    with pytest.raises(UserError) as e:
        internvl.convert(internvl_folder)
    assert len(e.value.problems) == 2
    assert "ps_version is 'v1'; the converter is for 'v2'" in e.value.problems[0]


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_bin_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Evil()}, tmp_path / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(UserError, match="holds other things than tensors"):
        read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(UserError, match="is damaged"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="can't be read"):
        read_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", moondream_weights(600), {}, "shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: is missing"):
        read_weights(folder)


def test_the_fast_tokenizer_equals_sentencepiece(internvl_folder: Path) -> None:
    import sentencepiece

    slow = sentencepiece.SentencePieceProcessor(model_file=str(internvl_folder / "tokenizer.model"))
    fast = load_fast_tokenizer(internvl_folder, {})
    for text in (*TEXTS[:3], "  two  spaces ", "Чай зелёный №5", "RM 14.10\n\n", "汉字 \U0001f600", "\t", "a" * 50):
        assert fast(text, add_special_tokens=False)["input_ids"] == slow.encode(text), text
        assert fast.decode(slow.encode(text)) == text
    assert fast("x")["input_ids"][0] == slow.bos_id()
    both = fast("a<|im_end|>b", add_special_tokens=False)["input_ids"]
    assert both == [*slow.encode("a"), 341, *slow.encode("b")]
