"""Every tiny family exported, and asked in one fresh process by the code of its own model card."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made import Answer, Question, evaluators_answers, fresh_answers, make_run, run_config
from safetensors.torch import load_file, save_file
from tiny_families import TINY, picture

from vlmdist.errors import UserError
from vlmdist.export.run import export_run

# their processors write around any chat template, so plain transformers asks something else
WRITES_AROUND = {"PaliGemma": "writes around the chat template", "Fuyu": "FuyuProcessor"}
# transformers' own AutoProcessor can't load a processor that also takes videos where torchvision is missing
TAKES_VIDEOS = ("InternVL", "Qwen2.5-VL", "SmolVLM") if importlib.util.find_spec("torchvision") is None else ()
# LLaVA-NeXT: image_newline is a weight of no layer; Moondream2: a class of vlmdist's own
NO_ADAPTER = {"LLaVA-NeXT": "image_newline|peft", "Moondream2": "can't load this base model without vlmdist"}


@dataclass(frozen=True)
class Exported:
    run_dir: Path
    merged: Path
    adapter: Path | None
    base_answers: list[Answer]
    answers: list[Answer]
    """The evaluator's, of the trained model."""


def adapt_of(name: str) -> dict[str, Any]:
    """As the family's recipe trains: Moondream2 in full, the others by LoRA with the projector in full."""
    if name == "Moondream2":
        return {"language_model": "full", "head": "full"}
    lora = {"language_model": "lora", "lora": {"r": 4, "alpha": 8}}
    return lora if TINY[name].max_images == 0 else {**lora, "projector": "full"}


def questions_for(name: str, folder: Path) -> list[Question]:
    if TINY[name].max_images == 0:
        return [Question("what is the total"), Question("name the shop and its town")]
    for number in (0, 1):
        (folder / f"{number}.png").write_bytes(picture(number, 60 - 20 * number, 44 + 20 * number))
    return [Question("Read it.", folder / "0.png"), Question("what is the total", folder / "1.png")]


def louder_layers(model: Path) -> None:
    """Gemma norms what a layer adds to the stream. By its random weights the stream stays the embedding, which is the
    head too: every token would follow itself, trained or not."""
    weights = load_file(model / "model.safetensors")
    save_file(
        {n: w + 4 if "post_" in n else w for n, w in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )


# tied embeddings; a weight of no layer; layers inside a layer that trained in full; a prompt of its own; own code
BY_DEFAULT = ("SmolLM2", "LLaVA-NeXT", "Gemma-3", "PaliGemma", "Moondream2")
THE_REST = tuple(name for name in TINY if name not in BY_DEFAULT)


@pytest.fixture(
    scope="module", params=[BY_DEFAULT, pytest.param(THE_REST, marks=pytest.mark.slow)], ids=["some", "rest"]
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    made = {}
    for name in request.param:
        folder = tmp_path_factory.mktemp("family")
        base = TINY[name].make(folder / "model")
        if name == "Gemma-3":
            louder_layers(base)
        config = run_config(base, folder / "run", adapt_of(name))
        run_dir, questions = make_run(config), questions_for(name, folder)
        export_run(run_dir, folder / "merged", merge=True)
        if name not in NO_ADAPTER:
            export_run(run_dir, folder / "adapter")
        made[name] = Exported(
            run_dir,
            folder / "merged",
            None if name in NO_ADAPTER else folder / "adapter",
            evaluators_answers(config, None, questions),
            evaluators_answers(config, run_dir / "checkpoints" / "step-000003", questions),
        )
    return made


def test_a_fresh_process_gives_the_evaluators_answers(exported: dict[str, Exported], tmp_path: Path) -> None:
    asked, expected = [], []
    for name, one in exported.items():
        if name not in (*WRITES_AROUND, *TAKES_VIDEOS):
            assert one.answers != one.base_answers, name
            folders = [folder for folder in (one.merged, one.adapter) if folder is not None]
            asked += [(folder, questions_for(name, one.merged.parent)) for folder in folders]
            expected += [one.answers] * len(folders)
    found = fresh_answers(asked, tmp_path / "cache")
    for (folder, _), answers, right in zip(asked, found, expected, strict=True):
        assert answers == right, folder


def test_what_an_adapter_cannot_say_is_refused_with_the_way_out(exported: dict[str, Exported], tmp_path: Path) -> None:
    for name in exported.keys() & NO_ADAPTER.keys():
        run_dir = exported[name].run_dir
        if name == "Moondream2":  # trained in full it is exported whole; with LoRA it would need the base
            base = run_dir.parent / "model"
            run_dir = make_run(run_config(base, tmp_path / "lora-run", {"language_model": "lora"}))
        with pytest.raises(UserError, match=NO_ADAPTER[name]) as e:
            export_run(run_dir, tmp_path / "outs" / "out")
        assert "--merge" in str(e.value)
        assert not (tmp_path / "outs").exists()


def test_the_card_says_where_the_prompt_is_not_shown_to_be_the_runs(exported: dict[str, Exported]) -> None:
    doubts = {**WRITES_AROUND, **({"SmolVLM": "could not be tried"} if TAKES_VIDEOS else {})}
    for name, one in exported.items():
        card = (one.merged / "README.md").read_text()
        assert ("not shown to be that of training" in card) == (name in doubts), name
        assert doubts.get(name, "") in card
