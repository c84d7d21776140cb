"""lmms-eval itself runs a vlmdist checkpoint, on two processes, and gets the answers that vlmdist evaluate gives."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from ranks import rank_environment, run_vlmdist

from vlmdist.bridges.predictions import convert_predictions
from vlmdist.config import load_run
from vlmdist.evaluate.run import evaluate_run

pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed: pip install --no-deps -r tests/bridges/requirements.txt"
)

_TASK = """
task: price_tags
dataset_path: {dataset}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function price_tags.visual
doc_to_text: !function price_tags.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {max_new_tokens}, until: {until}}}
process_results: !function price_tags.results
metric_list:
  - {{metric: is_exact, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0.0}}
"""
_FUNCTIONS = """
def visual(doc):
    return [doc["image"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"is_exact": float(results[0] == doc["answer"])}
"""


@pytest.fixture
def task(tmp_path, tags):
    """Writes the price tags as a task of lmms-eval; returns the folder for --include_path."""
    from datasets import Dataset, DatasetDict, Features, Image, Value

    features = Features({n: Value("string") for n in ("key", "question", "answer")} | {"image": Image()})
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in tags]
    DatasetDict({"test": Dataset.from_list(rows, features=features)}).save_to_disk(tmp_path / "dataset")

    def write(max_new_tokens=20, until=()):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        yaml_text = _TASK.format(
            dataset=tmp_path / "dataset", max_new_tokens=max_new_tokens, until=json.dumps(list(until))
        )
        (folder / "price_tags.yaml").write_text(yaml_text)
        (folder / "price_tags.py").write_text(_FUNCTIONS)
        return folder

    return write


def _lmms_eval(run_file, task_folder, out, *arguments, processes=2, model_args="base=True"):
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no"] + (["--multi_gpu"] if processes > 1 else [])
    command = [*launch, "-m", "lmms_eval", "--model", "vlmdist", "--model_args", f"run={run_file},{model_args}"]
    command += ["--include_path", task_folder, "--tasks", "price_tags", "--output_path", out, "--log_samples"]
    home = out.parent / "home"
    environment = rank_environment(CUDA_VISIBLE_DEVICES="", HF_HOME=str(home), HF_DATASETS_OFFLINE="1")
    return subprocess.run(
        [*map(str, command), *arguments], capture_output=True, text=True, timeout=280, env=environment, cwd=out.parent
    )


def _answers(done, out: Path):
    """{document number: answer} of --log_samples."""
    files = list(out.rglob("*_samples_price_tags.jsonl"))
    assert len(files) == 1, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    return {row["doc_id"]: row["filtered_resps"] for row in rows}


@pytest.fixture(scope="module")
def own_answers(tag_run):
    """What ``vlmdist evaluate`` answers, document by document."""
    return _answers_of(evaluate_run(load_run(tag_run), base=True))


def _answers_of(scores):
    folder = Path(scores["folder"])
    return [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tag_run):
    """The model as lmms-eval makes it, one document at a time."""
    return _model(tag_run, batch_size=1)


@pytest.fixture
def warnings():
    """What lmms-eval's log got, as a list that grows."""
    from loguru import logger

    found: list[str] = []
    sink = logger.add(lambda message: found.append(str(message)), level="WARNING")
    yield found
    logger.remove(sink)


def _model(run_file, model_args="base=True", **arguments):
    from vlmdist.bridges.lmms_eval import Vlmdist

    return Vlmdist.create_from_arg_string(f"run={run_file},{model_args}", arguments)


def _requests(model, tags, to_messages=None, **settings):
    """A request for each price tag, as lmms-eval's chat tasks make them."""
    from lmms_eval.api.instance import Instance

    def messages_of(doc):
        image = {"type": "image", "url": Image.open(io.BytesIO(doc["image"]))}
        return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]

    model.task_dict["price_tags"] = {"test": tags}
    return [
        Instance(
            request_type="generate_until",
            arguments=(doc["question"], to_messages or messages_of, dict(settings), i, "price_tags", "test"),
            idx=0,
            metadata={"task": "price_tags", "doc_id": i, "repeats": 1},
        )
        for i, doc in enumerate(tags)
    ]


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_lmms_eval_on_two_processes_gets_the_answers_of_vlmdist_evaluate(tag_run, task, own_answers, tmp_path):
    assert len(set(own_answers)) > 3  # they tell the documents apart
    done = _lmms_eval(tag_run, task(), tmp_path / "out")
    assert done.returncode == 0, done.stderr[-4000:]
    answers = _answers(done, tmp_path / "out")
    assert [answers[i] for i in range(len(own_answers))] == own_answers
    _compare_with_our_log(tag_run, tmp_path)


def _compare_with_our_log(run_file, tmp_path):
    """What ``vlmdist predictions`` writes has the keys that lmms-eval itself wrote, and lmms-eval reads it."""
    from lmms_eval.baselines.loader import load_baseline
    from lmms_eval.utils import make_table

    evaluation = Path(load_run(run_file).output_dir) / "eval" / "base"
    shards = str(run_file.parent / "test")
    ours = convert_predictions(evaluation, "lmms-eval", tmp_path / "ours", shards)["files"]
    theirs = [next((tmp_path / "out").rglob(f"*{kind}")) for kind in ("_results.json", ".jsonl")]
    own_results, their_results = (json.loads(Path(files[0]).read_text()) for files in (ours, theirs))
    assert set(own_results) <= set(their_results)
    for section in ("config", "n-samples", "configs"):
        own, their = own_results[section], their_results[section]
        if section != "config":
            (own,), (their,) = own.values(), their.values()
        assert set(own) <= set(their), section
    own_sample, their_sample = (json.loads(Path(files[1]).read_text().splitlines()[0]) for files in (ours, theirs))
    assert set(own_sample) - {"id", "score"} == set(their_sample) - {"is_exact"}
    scores, results = load_baseline(ours[1], "test")
    rows = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text().splitlines()]
    assert scores == {i: pytest.approx(row["score"] / 100) for i, row in enumerate(rows)}
    assert results == own_results
    assert "f1" in make_table(own_results) or "score" in make_table(own_results)


@pytest.mark.slow
def test_a_wrong_run_file_ends_lmms_eval_by_a_sentence(task, tmp_path):
    done = _lmms_eval(tmp_path / "nope.yaml", task(), tmp_path / "out", processes=1)
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "nope.yaml: no such run file" in done.stderr


@pytest.mark.slow
def test_a_trained_checkpoint_answers_as_vlmdist_evaluate_does(tag_run, tags, own_answers, tmp_path):
    tree = yaml.safe_load(tag_run.read_text())
    tree |= {"output_dir": str(tmp_path / "run"), "adapt": {"lora": {"r": 4, "alpha": 8}}}
    tree["train"] |= {"learning_rate": 0.05, "num_train_epochs": 2}
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    run_vlmdist(1, "train", run_file)
    expected = _answers_of(evaluate_run(load_run(run_file)))
    assert expected != own_answers
    model = _model(run_file, "checkpoint=latest", batch_size=1)
    assert model.generate_until(_requests(model, tags)) == expected


# -- one process -------------------------------------------------------------------------------------------------------


def test_answers_one_by_one_are_those_of_vlmdist_evaluate(model, tags, own_answers):
    assert model.generate_until(_requests(model, tags)) == own_answers


def test_batches_answer_in_the_order_of_the_requests(tag_run, tags, own_answers):
    model = _model(tag_run, batch_size="4")
    answers = model.generate_until(_requests(model, tags))
    same = sum(answer == own for answer, own in zip(answers, own_answers, strict=True))
    assert same >= len(tags) - 2  # padding rounds: an answer or two may differ, mixed-up ones nearly all would


def test_the_tasks_own_length_and_stops_are_honoured(model, tags, own_answers):
    short = model.generate_until(_requests(model, tags, max_new_tokens=5))
    assert short != own_answers
    assert all(long.startswith(answer.rstrip("\ufffd")) for answer, long in zip(short, own_answers, strict=True))
    stop = own_answers[0][4]
    cut = model.generate_until(_requests(model, tags, until=[stop, ""], max_new_tokens=20))
    assert cut == [answer.split(stop)[0] for answer in own_answers]
    assert model.generate_until(_requests(model, tags, until=stop)) == cut


def test_an_image_by_its_path_and_one_that_is_missing(model, tags, own_answers, tmp_path, warnings):
    (tmp_path / "tag.png").write_bytes(tags[0]["image"])

    def by_path(doc):
        place = tmp_path / ("tag.png" if doc is tags[0] else "gone.png")
        image = {"type": "image", "url": str(place)}
        return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]

    assert model.generate_until(_requests(model, tags[:2], by_path)) == [own_answers[0], ""]
    (said,) = warnings
    assert "document 1 of price_tags (test): not answered: the image" in said


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "I;16", "F"])
def test_pictures_of_every_mode_reach_the_model(model, tags, mode):
    def picture(doc):
        image = Image.new(mode, (40, 30), 1 if mode in ("L", "P", "I;16", "F") else (1,) * len(mode))
        return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "What?"}]}]

    assert model.generate_until(_requests(model, tags[:1], picture)) != [""]


def test_text_without_an_image_is_answered(model, tags):
    def text(doc):
        return [{"role": "user", "content": [{"type": "text", "text": doc["question"]}]}]

    answers = model.generate_until(_requests(model, tags[:3], text))
    assert all(answers)


def test_sampling_is_told_and_not_done(model, tags, own_answers, warnings):
    assert model.generate_until(_requests(model, tags, temperature=0.7, do_sample=True)) == own_answers
    (said,) = warnings
    assert "task price_tags asks for sampling; vlmdist answers greedily" in said


def test_what_the_model_does_not_offer_ends_by_a_sentence(model, tags, capsys):
    def video(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    for ask, says in (
        (lambda: model.generate_until(_requests(model, tags, video)), "asks about video"),
        (lambda: model.loglikelihood(_requests(model, tags)), "take a task that generates"),
        (lambda: model.generate_until_multi_round(_requests(model, tags)), "several rounds"),
    ):
        with pytest.raises(SystemExit) as ended:
            ask()
        assert ended.value.code == 2
        assert says in capsys.readouterr().err


def test_all_wrong_arguments_are_told_at_once(capsys):
    from vlmdist.bridges.lmms_eval import Vlmdist

    with pytest.raises(SystemExit) as ended:
        Vlmdist.create_from_arg_string("colour=red", {"batch_size": "auto"})
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "run=RUN.yaml is missing" in said
    assert "unknown colour; there are run, checkpoint and base" in said
    assert "--batch_size auto: must be a whole number" in said
