"""Answers while training: the training doesn't notice, the evaluator gives the same ones, and what is wrong is told."""

import html
import io
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import START_TIMEOUT_S, differences
from nursery import Nursery, Patch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tiny_models import make_tiny_llama, make_tiny_llava
from tiny_run import tiny_run, write_lines, write_run

from vlmdist.config import RunConfig
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.distributed import World
from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate.scores import read_predictions, score_each, score_file
from vlmdist.model.load import load_for_training, load_processor
from vlmdist.run_folder import RunFolder, read_jsonl, read_manifest
from vlmdist.train.ds_config import load_ds_config
from vlmdist.train.exchange import StopAgreed
from vlmdist.train.generate import Answered, Generation, _table, chosen_samples, generation_problems
from vlmdist.train.signals import StopSignal
from vlmdist.train.watch.heartbeat import Heartbeat

CPU = torch.device("cpu")
PRECISIONS = {
    "fp32": {"precision": "fp32", "gradient_checkpointing": False},
    "nf4": {"precision": "bf16", "quantization": "nf4", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("ranks")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines that a model learns to answer within some ten steps, so that its answers change."""
    folder = tmp_path_factory.mktemp("world")
    texts = write_lines(folder / "train", 53, seed=1, max_words=2)
    write_lines(folder / "validation", 10, seed=2, max_words=2)
    make_tiny_llama(folder / "model", texts, initializer_range=0.2)
    return folder


def run_tree(world: Path, folder: Path, precision: str = "fp32", **train: Any) -> dict[str, Any]:
    return tiny_run(
        world,
        folder,
        model=PRECISIONS[precision],
        adapt={"lora": {"r": 8, "alpha": 16, "dropout": 0.1}},
        train={"num_train_epochs": 4, "eval_steps": 6, "save_steps": 10, "save_total_limit": 9, **train},
        # answers that end early and late, and batches that are not full
        evaluate={"max_new_tokens": 16, "per_device_eval_batch_size": 3},
    )


def start_and_wait(nursery: Nursery, ranks: int, *arguments: str | Path) -> str:
    run = nursery.start(ranks, arguments)
    assert set(run.wait(START_TIMEOUT_S).values()) == {0}, run.all_output()
    return run.output(0)


@pytest.fixture(scope="module", params=PRECISIONS)
def pair(request: pytest.FixtureRequest, nursery: Nursery, world: Path, tmp_path_factory: Any) -> tuple[Path, Path]:
    """Run folders of the same training on two ranks, without and with all of the validation corpus answered."""
    folder = tmp_path_factory.mktemp(f"pair-{request.param}")
    asks = {"generate_samples": 10, "metric_for_best_model": "validation_score"}
    for name, train in (("without", {}), ("with", asks)):
        tree = run_tree(world, folder / name, request.param, **train)
        start_and_wait(nursery, 2, "train", write_run(tree, folder / f"{name}.yaml"))
    return folder / "without", folder / "with"


def test_the_training_goes_on_to_the_same_bits(pair: tuple[Path, Path]) -> None:
    without, asked = pair
    assert differences(without, asked) == []


def test_the_answers_are_those_of_the_evaluator(nursery: Nursery, pair: tuple[Path, Path]) -> None:
    _, asked = pair
    generated = RunFolder(asked).generated_file(28)
    start_and_wait(nursery, 1, "evaluate", asked, "--split", "validation", "--name", "end")
    assert generated.read_bytes() == (asked / "eval" / "end" / "predictions.jsonl").read_bytes()
    scores = json.loads((asked / "eval" / "end" / "scores.json").read_text())
    (row,) = [r for r in read_jsonl(asked / "metrics.jsonl") if r["step"] == 28 and "validation_score" in r]
    assert row["validation_score"] == scores["score"]
    assert {
        n.removeprefix("validation_"): row[n] for n in row if n.removeprefix("validation_") in scores["figures"]
    } == (scores["figures"])
    assert row["generate_errors"] == 0


def test_the_answers_of_every_step_are_kept_and_the_best_checkpoint_is_known_by_them(pair: tuple[Path, Path]) -> None:
    _, asked = pair
    rows = {r["step"]: r for r in read_jsonl(asked / "metrics.jsonl") if "validation_score" in r}
    assert sorted(rows) == [6, 12, 18, 24, 28]
    files = sorted((asked / "generated").iterdir())
    assert [f.name for f in files] == [f"step-{step:06d}.jsonl" for step in sorted(rows)]
    assert len({f.read_bytes() for f in files}) > 2  # the model has learnt, or this would show nothing
    for step, file in zip(sorted(rows), files, strict=True):
        assert score_file(file, "fuzzy_fields")["score"] == rows[step]["validation_score"]
    run = RunFolder(asked)
    best = run.checkpoints_dir / run.best_file.read_text().strip()
    metrics = read_manifest(best)["metrics"]
    assert metrics["validation_score"] == max(row["validation_score"] for row in rows.values())
    assert metrics["validation_loss"] == rows[int(best.name.removeprefix("step-"))]["validation_loss"]


def test_steps_of_its_own_and_ranks_without_a_batch(nursery: Nursery, world: Path, tmp_path: Path) -> None:
    """Two answers, one batch: the second of three ranks and the third only agree to go on."""
    tree = run_tree(world, tmp_path / "run", generate_samples=2, generate_steps=4, max_steps=9)
    start_and_wait(nursery, 3, "train", write_run(tree, tmp_path / "run.yaml"))
    rows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" not in r]
    assert [(r["step"], "validation_loss" in r, "validation_score" in r) for r in rows] == [
        (4, False, True), (6, True, False), (8, False, True), (9, True, True)]  # fmt: skip
    found = read_predictions(RunFolder(tmp_path / "run").generated_file(9))
    assert [row["id"] for row in found] == ["line2-00000", "line2-00005"]


def test_a_rank_that_hangs_is_named(nursery: Nursery, world: Path, tmp_path: Path) -> None:
    tree = run_tree(world, tmp_path / "run", generate_samples=10, generate_steps=2, hang_floor_s=3)
    hang = Patch(1, "hooks:hang", {"point": "generation", "passage": 4, "under": "/"})
    run = nursery.start(2, ["train", write_run(tree, tmp_path / "run.yaml")], [hang])
    codes = run.wait(120)
    assert 0 not in codes.values(), run.all_output()
    (said,) = re.findall(r"rank 1 is late: .* in generation of step \d+.*\n.*samples: (.*)\n", run.all_output())
    assert said.count("line2-0") in (1, 3)


# -- images and bad samples --------------------------------------------------------------------------------------------


def jpeg(rng: random.Random, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def image_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten validation samples with an image each; that of the third is cut off, the fifth is too long."""
    folder = tmp_path_factory.mktemp("image-world")
    rng = random.Random(0)
    for name, number in (("train", 8), ("validation", 10)):
        with ShardWriter(folder / name) as writer:
            for i in range(number):
                image = jpeg(rng, 600, 400) if i == 0 else jpeg(rng, 50, 40)
                bad = name == "validation"
                image = image[: len(image) * 2 // 3] if bad and i == 2 else image
                text = "what is it" * (400 if bad and i == 4 else 1)
                asked = [{"type": "image", "index": 0}, {"type": "text", "text": text}]
                writer.write(
                    f"{name}-{i}", [{"role": "user", "content": asked}, {"role": "assistant", "content": "a"}], [image]
                )
    make_tiny_llava(folder / "model", ["what is it", "a receipt"])
    return folder


def test_bad_samples_are_rows_and_images_are_shown(nursery: Nursery, image_world: Path, tmp_path: Path) -> None:
    tree = run_tree(image_world, tmp_path / "run", generate_samples=10, max_steps=2, eval_steps=1, global_batch_size=4)
    tree["evaluate"]["metric"] = "exact"
    del tree["data"]["test"]
    output = start_and_wait(nursery, 2, "train", write_run(tree, tmp_path / "run.yaml"))
    found = {row["id"]: row for row in read_predictions(RunFolder(tmp_path / "run").generated_file(2))}
    assert len(found) == 10
    assert {key for key in found if "error" in found[key]} == {"validation-2", "validation-4"}
    assert "data.max_length allows" in found["validation-4"]["error"]
    assert re.search(r"step 2: validation score [\d.]+ on 10 answers; 2 failed: validation-2: ", output)

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("validation/validation_score")] == [1, 2]
    assert [e.value for e in events.Scalars("validation/generate_errors")] == [2, 2]
    tables = events.Tensors("validation/answers/text_summary")
    assert [e.step for e in tables] == [1, 2]
    shown = table_shown(tables[1].tensor_proto.string_val[0])
    assert [cells[0] for cells in shown] == [f"validation-{i}" for i in range(10)]
    assert [cells[3] for cells in shown] == [
        f"failed: {row['error']}"[:300] if "error" in row else row["prediction"] for row in found.values()
    ]
    # of the first eight samples, but for the image that can't be decoded; only once, for the sample is fixed
    images = events.Tags()["images"]
    assert sorted(images) == [f"validation_images/validation-{i}/0" for i in (0, 1, 3, 4, 5, 6, 7)]
    (first,) = events.Images("validation_images/validation-0/0")
    assert Image.open(io.BytesIO(first.encoded_image_string)).size == (256, 171)


def table_shown(markdown: bytes | str) -> list[list[str]]:
    """Cells of the table's body as TensorBoard shows them; nothing but a table may be there."""
    page = markdown_to_safe_html(markdown)
    assert set(re.findall(r"</?(\w+)[^>]*>", page)) <= {"table", "thead", "tbody", "tr", "th", "td"}, page
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    return [[html.unescape(cell) for cell in row] for row in rows[1:]]


def test_what_the_model_wrote_can_do_nothing_in_tensorboard() -> None:
    hostile = [
        "<script>alert(1)</script><img src=x onerror=alert(1)>",
        "a | b || c \\| d",
        "`code` **bold** [link](javascript:alert(1)) ![image](http://127.0.0.1/x.png) http://127.0.0.1/",
        "&lt;b&gt; &#60;i&#62;",
        "| --- | --: |",
    ]
    rows = [
        {"number": i, "id": f"{i}{text}", "truth": text, "prediction": text[::-1]} for i, text in enumerate(hostile)
    ]
    rows.append(
        {"number": 5, "id": "control", "truth": None, "prediction": "", "error": "\x1b[31m\n\n# x\t\u202e\ud800"}
    )
    rows.append({"number": 6, "id": "long", "truth": "é" * 400, "prediction": "x"})
    scores = score_each(rows, "exact")
    questions = {0: "<b>" + "q" * 400 + "end", 1: hostile[1]}
    shown = table_shown(_table(Answered(rows, scores, {}), questions))
    for cells, row in zip(shown[:5], rows[:5], strict=True):
        assert (cells[0], cells[2], cells[3]) == (row["id"], row["truth"], row["prediction"])
    assert shown[0][1] == "…" + "q" * 297 + "end"
    assert shown[1][1] == hostile[1]
    assert shown[5][3] == r"failed: \x1b[31m\n\n# x\t\u202e\ud800"
    assert shown[6][2] == "é" * 300 + "…"
    assert [cells[4] for cells in shown] == ["0.0"] * 7


# -- one process: what the model is afterwards, and how an answer ends early -------------------------------------------


def generation_of(tree: dict[str, Any]) -> tuple[Generation, torch.nn.Module, Prompter]:
    config = RunConfig.model_validate(tree)
    model, _ = load_for_training(config, CPU)
    prompter = Prompter.for_run(load_processor(config.model), config)
    corpus = Corpus.open(tree["data"]["validation"])
    return Generation(config, corpus, model, prompter, World(0, 1, 0, CPU), Heartbeat()), model, prompter


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(4, 34).reshape(1, 30)
    torch.manual_seed(1)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def held_by(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that hangs on any module, by identity, and the bits of every parameter and buffer."""
    things = {
        f"{name}.{key}": (type(value).__name__, value if isinstance(value, bool | int | float | str) else id(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bits = {n: (id(t), t.requires_grad, t.detach().clone().view(torch.uint8).tolist()) for n, t in tensors}
    hooks = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    return {"things": things, "bits": bits, "hooks": hooks}


@pytest.mark.parametrize("rope", ["default", "dynamic"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_comes_back_as_it_was(world: Path, tmp_path: Path, precision: str, rope: str) -> None:
    """dynamic: the model's table of positions grows with the text (transformers' dynamic NTK scaling)."""
    tree = run_tree(world, tmp_path / "run", precision, generate_samples=4)
    if rope == "dynamic":
        config = json.loads((world / "model" / "config.json").read_text())
        config |= {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        }
        tree["model"]["name_or_path"] = str(tmp_path / "model")
        tree["evaluate"]["max_new_tokens"] = 40
        (tmp_path / "model").mkdir()
        for file in (world / "model").iterdir():
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    generation, model, _ = generation_of(tree)
    expected = gradients(model)
    assert expected
    before, random_state = held_by(model), torch.get_rng_state()
    answered = generation.answer(StopSignal())
    assert any(row["prediction"] for row in answered.rows)
    assert not any("error" in row for row in answered.rows)
    assert held_by(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_stop_is_seen_at_the_next_token(world: Path, tmp_path: Path) -> None:
    generation, model, _ = generation_of(run_tree(world, tmp_path / "run", generate_samples=10))
    stop, tokens = StopSignal(), 0

    def count(*_: Any) -> None:
        nonlocal tokens
        tokens += 1
        if tokens == 3:
            stop.received = signal.SIGUSR1

    model.get_base_model().register_forward_hook(count)  # type: ignore[operator]
    with pytest.raises(StopAgreed):
        generation.answer(stop)
    assert tokens == 3
    assert model.training


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_no_memory_for_the_answers(world: Path, tmp_path: Path, error: type[Exception]) -> None:
    generation, model, _ = generation_of(run_tree(world, tmp_path / "run", generate_samples=10))

    def fail(*_: Any) -> None:
        raise error("no. more")

    model.get_base_model().register_forward_hook(fail)  # type: ignore[operator]
    with pytest.raises(RunFailed, match=r"answering for the validation, with the samples line2-\d+.*per_device_eval_b"):
        generation.answer(StopSignal())


def test_a_sample_that_the_model_refuses_is_a_row(world: Path, tmp_path: Path) -> None:
    generation, model, _ = generation_of(run_tree(world, tmp_path / "run", generate_samples=10))
    refused = Corpus.open(world / "validation").read(7).question[-1].text

    def refuse(_: Any, __: Any, options: dict[str, Any]) -> None:
        asked = [generation._answerer.engine.prompter.tokenizer.decode(row) for row in options["input_ids"]]
        if any(refused in text for text in asked):
            raise ValueError("not this one")

    model.get_base_model().register_forward_pre_hook(refuse, with_kwargs=True)  # type: ignore[operator]
    answered = generation.answer(StopSignal())
    failed = [row["id"] for row in answered.rows if "error" in row]
    assert "line2-00007" in failed
    assert answered.figures["generate_errors"] == len(failed) < 10
    assert f"{len(failed)} failed: " in answered.summary


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted", "numbers"),
    [(10, 3, [0, 3, 6]), (10, 10, list(range(10))), (10, 99, list(range(10))), (7, 2, [0, 3]), (5, 1, [0])],
)
def test_the_sample_is_spread_over_the_corpus(size: int, wanted: int, numbers: list[int]) -> None:
    assert chosen_samples(size, wanted) == numbers


def no_validation(tree: dict[str, Any]) -> None:
    tree["data"]["validation"] = None


def another_metric(tree: dict[str, Any]) -> None:
    tree["evaluate"]["metric"] = "accuracy"


def json_metric(tree: dict[str, Any]) -> None:
    tree["evaluate"]["metric"] = "fuzzy"  # the truths are no JSON


REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None], str]] = {
    "steps alone": ({"generate_samples": None, "generate_steps": 5}, dict.copy, "train.generate_steps: without effect"),
    "no corpus": ({}, no_validation, "train.generate_samples: data.validation names no corpus"),
    "no such metric": ({}, another_metric, "evaluate.metric: no metric is called 'accuracy'"),
    "another truth": ({}, json_metric, "data.validation: sample line2-00000 in "),
    "no such figure": (
        {"metric_for_best_model": "validation_f1"},
        dict.copy,
        "'validation_f1' will never be measured: validation measures validation_loss, validation_score, "
        "validation_exact, validation_valid_form",
    ),
    "a score without answers": (
        {"generate_samples": None, "metric_for_best_model": "validation_score"},
        dict.copy,
        "'validation_score' will never be measured: validation measures validation_loss "
        "(and scores of answers where train.generate_samples is set)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_the_training(world: Path, tmp_path: Path, name: str) -> None:
    train, change, said = REFUSED[name]
    tree = run_tree(world, tmp_path / "run", **{"generate_samples": 3, **train})
    change(tree)
    validation = tree["data"]["validation"]
    problems = generation_problems(RunConfig.model_validate(tree), Corpus.open(validation) if validation else None)
    assert any(said in p for p in problems), problems
    assert len(problems) == (3 if name == "another truth" else 1)


def test_questions_asked_in_several_passes_need_them_all(world: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "passes") as writer:
        for i in range(4):
            truth = json.dumps({"answer": "AB"[i % 2], "options": ["a cat", "a dog"], "question": str(i // 2)})
            messages = [{"role": "user", "content": "which"}, {"role": "assistant", "content": "A"}]
            writer.write(f"pass-{i}", messages, answer=truth)
    tree = run_tree(world, tmp_path / "run")
    tree["evaluate"]["metric"] = "choice_circular"
    for number, expected in ((3, 1), (4, 0)):
        tree["train"]["generate_samples"] = number
        problems = generation_problems(RunConfig.model_validate(tree), Corpus.open(tmp_path / "passes"))
        assert len(problems) == expected, problems
        assert all("set it to all 4" in p for p in problems)


@pytest.mark.parametrize("figure", ["validation_loss", "validation_score", "validation_exact"])
def test_figures_that_will_be_measured_are_accepted(world: Path, tmp_path: Path, figure: str) -> None:
    config = RunConfig.model_validate(
        run_tree(world, tmp_path / "run", generate_samples=3, metric_for_best_model=figure)
    )
    assert generation_problems(config, Corpus.open(world / "validation")) == []
    assert config.train.best_is_greater == (figure != "validation_loss")


def test_errors_are_better_where_they_are_lower(world: Path, tmp_path: Path) -> None:
    tree = run_tree(world, tmp_path / "run", metric_for_best_model="validation_mean_absolute_error")
    assert not RunConfig.model_validate(tree).train.best_is_greater


def test_zero_3_is_refused_with_what_to_do(world: Path, tmp_path: Path) -> None:
    tree = run_tree(world, tmp_path / "run", generate_samples=3, deepspeed="zero3")
    with pytest.raises(
        UserError, match=r"train.generate_samples: zero3.json is ZeRO-3, .* use zero2 .*vlmdist evaluate"
    ):
        load_ds_config(RunConfig.model_validate(tree), 2, torch.float32)
    load_ds_config(
        RunConfig.model_validate({**tree, "train": {**tree["train"], "deepspeed": "zero1"}}), 2, torch.float32
    )


def test_train_and_check_tell_all_of_it_before_a_model_is_loaded(nursery: Nursery, world: Path, tmp_path: Path) -> None:
    tree = run_tree(
        world, tmp_path / "run", generate_samples=3, deepspeed="zero3", metric_for_best_model="validation_f1"
    )
    file = write_run(tree, tmp_path / "run.yaml")
    for command in ("train", "check"):
        run = nursery.start(1, [command, file])
        assert run.wait(START_TIMEOUT_S) == {0: 2}
        output = run.output(0)
        assert "'validation_f1' will never be measured" in output
        assert "zero3.json is ZeRO-3, where every token" in output
        assert "loading" not in output
