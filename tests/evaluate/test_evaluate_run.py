"""The evaluator as a program: the same bytes on any number of ranks and after a kill; what a user meets."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from ranks import REPOSITORY, rank_environment, run_vlmdist

from vlmdist.config import load_run
from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate import run as evaluate_module
from vlmdist.evaluate.parts import EvaluationFolder
from vlmdist.evaluate.run import evaluate_run
from vlmdist.evaluate.scores import read_predictions, score_file

RESULTS = ("predictions.jsonl", "scores.json")


def _bytes(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


def _with_output(run_file, name):
    tree = yaml.safe_load(run_file.read_text())
    tree["output_dir"] = str(run_file.parent / name)
    file = run_file.parent / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file, run_file.parent / name / "eval" / "base"


def _no_model(*_):
    raise AssertionError("nothing was to be generated, yet the model is loaded")


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_one_two_and_three_ranks_write_the_same_bytes(run_file):
    # bf16 and long answers: another cut into batches, and with it other padding, gives other answers
    tree = yaml.safe_load(run_file.read_text())
    tree["evaluate"]["max_new_tokens"] = 60
    run_file.write_text(yaml.safe_dump(tree))
    found = {}
    for ranks, launcher in ((1, "none"), (2, "accelerate"), (3, "torchrun")):
        file, folder = _with_output(run_file, f"ranks{ranks}")
        if launcher == "accelerate":
            start = ["accelerate", "launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no"]
            start += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1", f"--num_processes={ranks}"]
            command = [sys.executable, REPOSITORY / "launch" / "start_ranks.py", *start, "-m", "vlmdist"]
            done = subprocess.run([*command, "evaluate", file, "--base"], env=rank_environment(), timeout=200)
            assert done.returncode == 0
        elif launcher == "torchrun":
            run_vlmdist(ranks, "evaluate", file, "--base")
        else:
            evaluate_run(load_run(file), base=True)
        timing = json.loads((folder / "timing.json").read_text())
        assert timing["num_ranks"] == ranks
        assert sorted(r["rank"] for r in timing["ranks"]) == list(range(ranks))
        assert sum(r["samples"] for r in timing["ranks"]) == 23
        found[ranks] = _bytes(folder)
    assert found[1] == found[2] == found[3]
    rows = [json.loads(line) for line in found[1]["predictions.jsonl"].decode().splitlines()]
    assert [row["id"] for row in rows] == [f"line-{i:03d}" for i in range(23)]
    assert not (folder / "parts").exists()
    other_cut = evaluate_run(load_run(run_file, ["evaluate.per_device_eval_batch_size=5"]), base=True)
    other = [row["prediction"] for row in read_predictions(other_cut["folder"])]
    assert other != [row["prediction"] for row in rows], "the answers don't depend on the batches: this proves nothing"


def test_killed_and_gone_on_at_another_number_of_ranks(run_file):
    tree = yaml.safe_load(run_file.read_text())
    tree["evaluate"].update(max_new_tokens=80, per_device_eval_batch_size=2)
    run_file.write_text(yaml.safe_dump(tree))
    killed, killed_folder = _with_output(run_file, "killed")
    whole, whole_folder = _with_output(run_file, "whole")
    evaluate_run(load_run(whole), base=True)

    parts = EvaluationFolder(killed_folder)
    command = [sys.executable, "-m", "vlmdist", "evaluate", str(killed), "--base"]
    process = subprocess.Popen(command, env=rank_environment(), stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 100
    while len(parts.present_batches()) < 2 and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {n: parts.part_file(n).stat().st_ino for n in parts.present_batches()}
    assert 2 <= len(before) < 12, "the kill came too early or too late"
    assert not any((killed_folder / name).exists() for name in RESULTS)
    num_before = sum(len(json.loads(parts.part_file(n).read_text())) for n in before)
    cut = parts.part_file(max(before) + 1)
    cut.write_text('[{"number": 3, "id"')  # of a disk that lost the end of a file: must be done again

    done = run_vlmdist(2, "evaluate", killed, "--base", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["num_generated"] == 23 - num_before
    assert f"{len(before)} of 12 batches were finished before" in done.stderr
    assert _bytes(killed_folder) == _bytes(whole_folder)


# -- one start after another -------------------------------------------------------------------------------------------


def test_a_finished_evaluation_is_scored_again_without_the_model(run_file, monkeypatch):
    first = evaluate_run(load_run(run_file), base=True)
    folder = run_file.parent / "run" / "eval" / "base"
    before = _bytes(folder)
    assert first["num_generated"] == 23
    assert first["num_errors"] == 1
    monkeypatch.setattr(evaluate_module, "open_engine", _no_model)
    again = evaluate_run(load_run(run_file), base=True)
    assert again["num_generated"] == 0
    assert _bytes(folder) == before
    other = evaluate_run(load_run(run_file, ["evaluate.metric=exact"]), base=True)
    assert (other["metric"], other["num_generated"]) == ("exact", 0)
    assert evaluate_run(load_run(run_file), base=True)["score"] == first["score"]
    assert _bytes(folder) == before


def test_scores_are_those_of_vlmdist_score(run_file):
    scores = evaluate_run(load_run(run_file), base=True)
    again = score_file(scores["folder"], "fuzzy_fields")
    assert {name: scores[name] for name in again} == again


@pytest.mark.parametrize("change", ["evaluate.max_new_tokens=3", "evaluate.max_samples=9", "model.precision=fp32"])
def test_other_settings_replace_what_is_there(run_file, change, capsys):
    evaluate_run(load_run(run_file), base=True)
    other = evaluate_run(load_run(run_file, [change]), base=True)
    assert other["num_generated"] == other["num_samples"] == (9 if "samples" in change else 23)
    assert "held another evaluation" in capsys.readouterr().err


def test_a_failed_sample_is_a_row_with_its_error(run_file):
    scores = evaluate_run(load_run(run_file), base=True, name="mine", split="validation")
    assert scores["folder"].endswith("eval/mine")
    failed = [row for row in read_predictions(scores["folder"]) if "error" in row]
    assert [row["id"] for row in failed] == ["line-005"]
    assert failed[0]["prediction"] == ""
    assert failed[0]["score"] == 0
    assert "##" in failed[0]["truth"]
    assert "special token" in failed[0]["error"]


def test_a_sample_that_the_model_refuses_is_found_and_named(run_file, monkeypatch):
    from vlmdist.evaluate import generate

    real = generate.generate_batch
    whole = evaluate_run(load_run(run_file), base=True)

    def refusing(model, prompter, questions, *settings, **options):
        if any(len(q.input_ids) == refused for q in questions):
            raise ValueError("image features and image tokens do not match")
        return real(model, prompter, questions, *settings, **options)

    lengths = []
    monkeypatch.setattr(
        generate,
        "generate_batch",
        lambda m, p, qs, *s, **o: lengths.extend(map(_length, qs)) or real(m, p, qs, *s, **o),
    )
    evaluate_run(load_run(run_file), base=True, name="lengths")
    refused = max(lengths)
    monkeypatch.setattr(generate, "generate_batch", refusing)
    scores = evaluate_run(load_run(run_file), base=True, name="refusing")
    assert scores["num_errors"] == whole["num_errors"] + lengths.count(refused)
    errors = [r["error"] for r in read_predictions(scores["folder"]) if "error" in r]
    assert any("do not match" in e for e in errors)


def _length(question):
    return len(question.input_ids)


# -- what the user did wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({}, [], "no whole checkpoint"),
        ({"base": True, "few_shot": 2}, [], "has only 0 samples with an answer that ask about nothing"),
        ({"base": True, "split": "train"}, [], "test, validation"),
        ({"base": True, "name": "../x"}, [], "without slashes"),
        ({"base": True}, ["data.test=null"], "data.test: not set"),
        ({"base": True}, ["data.test=/no/such/folder"], "/no/such/folder"),
        ({"base": True}, ["evaluate.metric=fuzy"], "no metric is called 'fuzy'"),
        (
            {"base": True},
            ["evaluate.metric=fuzzy"],
            "sample line-000 in shard-000000.tar: the truth is not a JSON object",
        ),
        ({"base": True}, ["model.name_or_path=/no/such/model"], "/no/such/model"),
        ({"base": True}, ["output_dir=/proc/nowhere"], "can't be written"),
        ({"base": True}, ["data.max_length=8"], "not one of 23 samples could be answered: line-000: too long"),
    ],
)
def test_a_mistake_gets_one_clear_message(run_file, options, overrides, message):
    with pytest.raises((UserError, RunFailed)) as e:
        evaluate_run(load_run(run_file, overrides), **options)
    assert message in str(e.value)


def test_on_two_ranks_a_mistake_is_told_once_and_ends_both(run_file):
    done = run_vlmdist(2, "evaluate", run_file, "--base", "evaluate.metric=fuzzy", expect=2)
    assert done.stderr.count("sample line-000 in") == 1
    assert done.stderr.count("not a JSON object") == 20
    assert "... and 3 more" in done.stderr


def test_a_rank_that_waits_learns_of_one_that_failed(tmp_path):
    folder = EvaluationFolder(tmp_path / "eval")
    folder.open_for({"a": 1})
    folder.write_part(0, [])
    folder.mark_failed("old", 3, "of an earlier start")
    folder.mark_failed("now", 1, "MemoryError: no memory")
    assert folder.wait_for_parts([0], "now", 60, lambda _: None) == set()
    with pytest.raises(RunFailed, match="rank 1 failed: MemoryError"):
        folder.wait_for_parts([0, 1], "now", 60, lambda _: None)
    assert folder.wait_for_parts([0, 1], "later", 0, lambda _: None) == {1}


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _write_checkpoint(config, folder, scale):
    import torch
    from safetensors.torch import save_file

    from vlmdist.config import dump_run
    from vlmdist.model.adapters import trainable_names
    from vlmdist.model.load import load_for_training
    from vlmdist.run_folder import TRAINABLE_WEIGHTS, write_manifest

    model, _ = load_for_training(config, torch.device("cpu"))
    torch.manual_seed(11)
    names = set(trainable_names(model))
    weights = {n: scale * torch.randn_like(p) for n, p in model.named_parameters() if n in names}
    folder.mkdir(parents=True)
    save_file(weights, folder / TRAINABLE_WEIGHTS)
    (folder / "run.yaml").write_text(dump_run(config), encoding="utf-8")
    write_manifest(folder, {})


def test_the_newest_whole_checkpoint_is_evaluated(run_file, capsys):
    config = load_run(run_file)
    checkpoints = run_file.parent / "run" / "checkpoints"
    _write_checkpoint(config, checkpoints / "step-000010", scale=0.3)
    base = evaluate_run(config, base=True)
    trained = evaluate_run(config)
    assert trained["folder"].endswith("eval/step-000010")
    answers = [[r["prediction"] for r in read_predictions(s["folder"])] for s in (base, trained)]
    assert answers[0] != answers[1]

    _write_checkpoint(config, checkpoints / "step-000020", scale=0.5)
    newest = evaluate_run(config, split="validation")
    assert newest["folder"].endswith("eval/step-000020-validation")
    named = evaluate_run(config, checkpoint=checkpoints / "step-000010", name="named")
    assert [r["prediction"] for r in read_predictions(named["folder"])] == answers[1]

    weights = next((checkpoints / "step-000020").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert evaluate_run(config)["folder"].endswith("eval/step-000010")
    assert "passed over step-000020" in capsys.readouterr().err
    with pytest.raises(UserError, match="step-000020: is no whole checkpoint"):
        evaluate_run(config, checkpoint=checkpoints / "step-000020")


def test_the_best_checkpoint_is_evaluated_by_that_name(run_file):
    config = load_run(run_file)
    checkpoints = run_file.parent / "run" / "checkpoints"
    for step in (10, 20):
        _write_checkpoint(config, checkpoints / f"step-0000{step}", scale=0.3)
    (checkpoints / "best").write_text("step-000010\n")
    done = run_vlmdist(1, "evaluate", run_file, "--checkpoint", "best", "--json", "evaluate.max_samples=2")
    assert json.loads(done.stdout.splitlines()[-1])["folder"].endswith("eval/step-000010")


def test_adapters_that_would_mean_something_else_are_refused(run_file):
    _write_checkpoint(load_run(run_file), run_file.parent / "run" / "checkpoints" / "step-000010", scale=0.3)
    with pytest.raises(UserError, match=r"made with another adapt section \(lora differ\)"):
        evaluate_run(load_run(run_file, ["adapt.lora.alpha=64"]))
    evaluate_run(load_run(run_file, ["adapt.lora.dropout=0.5", "evaluate.max_samples=2"]))
