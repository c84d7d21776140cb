"""What can be evaluated: a checkpoint beside its 4-bit base or merged, an adapter folder, a merged model, the base."""

import fcntl
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import rank_environment
from tiny_run import make_tiny_world, tiny_run, write_run
from transformers import AutoTokenizer

from vlmdist.config import load_run
from vlmdist.data.prompt import Prompter
from vlmdist.errors import UserError
from vlmdist.evaluate.generate import _Answered
from vlmdist.evaluate.metrics import ANSWERED, METRICS
from vlmdist.evaluate.run import evaluate_run
from vlmdist.evaluate.scores import read_predictions
from vlmdist.export.run import export_run

ADAPT = {"lora": {"r": 4, "alpha": 8}, "language_model": "lora"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A QLoRA run of a few steps: (run file, its adapter as exported, its merged model)."""
    world = make_tiny_world(tmp_path_factory.mktemp("world"))
    model = {"quantization": "nf4"}
    tree = tiny_run(world, world / "run", model={**model, "precision": "fp32"}, train={"max_steps": 6}, adapt=ADAPT)
    file = write_run(tree, world / "run.yaml")
    command = [sys.executable, "-m", "vlmdist", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=rank_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    export_run(world / "run", world / "adapter")
    export_run(world / "run", world / "merged", merge=True)
    return file, world / "adapter", world / "merged"


def _answers(file, *overrides, **options):
    scores = evaluate_run(load_run(file, overrides), **options)
    assert scores["num_errors"] == 0
    return [row["prediction"] for row in read_predictions(scores["folder"])]


def test_an_adapter_folder_answers_as_the_checkpoint_it_was_exported_from(trained):
    file, adapter, _ = trained
    assert _answers(file, checkpoint=str(adapter)) == _answers(file) != _answers(file, base=True)


def test_merged_answers_are_those_of_the_exported_model(trained):
    file, adapter, merged = trained
    whole = (f"model.name_or_path={merged}", "model.quantization=none")
    expected = _answers(file, *whole, base=True, name="exported")
    assert _answers(file, "evaluate.merged=true", name="merged") == expected
    assert _answers(file, "evaluate.merged=true", checkpoint=str(adapter), name="merged-adapter") == expected


def test_merged_base_is_the_base_in_16_or_32_bit(trained):
    file, _, _ = trained
    plain = _answers(file, "model.quantization=none", base=True, name="unquantized")
    assert _answers(file, "evaluate.merged=true", base=True, name="merged-base") == plain


def test_other_weights_in_one_folder_replace_what_is_there(trained, capsys):
    file, adapter, _ = trained
    _answers(file, checkpoint=str(adapter), name="one")
    _answers(file, checkpoint=str(adapter), name="one")
    assert "nothing is generated" in capsys.readouterr().err
    _answers(file, "evaluate.merged=true", checkpoint=str(adapter), name="one")
    assert "held another evaluation (other merged)" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused_by_name(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    file, adapter, merged = trained
    with pytest.raises(UserError, match=r"is a whole model, not a checkpoint.*--base model.name_or_path="):
        evaluate_run(load_run(file), checkpoint=str(merged))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.9."): w for name, w in weights.items()}
    save_file(renamed, foreign / "adapter_model.safetensors")
    with pytest.raises(UserError, match="14 of its 28 weights have no place .* 14 are missing"):
        evaluate_run(load_run(file), checkpoint=str(foreign))
    (foreign / "adapter_model.safetensors").unlink()
    (foreign / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="is a pickle, which is not loaded"):
        evaluate_run(load_run(file), checkpoint=str(foreign))


# -- a run of several ranks --------------------------------------------------------------------------------------------


def _two_ranks_of_which_one_sleeps(file, tmp_path, rank, sleep_s, *arguments):
    """The real command on two ranks; one sleeps before each of its batches."""
    script = tmp_path / "one_sleeps.py"
    script.write_text(
        "import os, sys, time\n"
        "from vlmdist.evaluate.answer import Answerer\n"
        "real = Answerer.answer\n"
        "def slow(self, samples):\n"
        f"    time.sleep({sleep_s} if os.environ['RANK'] == '{rank}' else 0)\n"
        "    return real(self, samples)\n"
        "Answerer.answer = slow\n"
        "from vlmdist.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += ["evaluate", str(file), "evaluate.per_device_eval_batch_size=1", "--base", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=rank_environment())


def test_a_slow_rank_takes_fewer_batches_and_the_bytes_stay(trained, tmp_path):
    file, _, _ = trained
    done = _two_ranks_of_which_one_sleeps(file, tmp_path, 0, 1.5, "--name", "slow")
    assert done.returncode == 0, done.stderr[-3000:]
    evaluate_run(load_run(file, ["evaluate.per_device_eval_batch_size=1"]), base=True, name="even")
    folder = Path(yaml.safe_load(file.read_text())["output_dir"]) / "eval"
    for name in ("predictions.jsonl", "scores.json"):
        assert (folder / "slow" / name).read_bytes() == (folder / "even" / name).read_bytes()
    ranks = json.loads((folder / "slow/timing.json").read_text())["ranks"]
    assert ranks[0]["samples"] < ranks[1]["samples"]
    assert ranks[0]["samples"] + ranks[1]["samples"] == 12


def test_a_rank_that_hangs_is_named_with_its_samples_and_the_rest_is_kept(trained, tmp_path):
    file, _, _ = trained
    done = _two_ranks_of_which_one_sleeps(file, tmp_path, 1, 10_000, "--name", "hung", "train.hang_floor_s=2")
    assert done.returncode == 1
    assert re.search(r"rank 1 is late: no batch was finished for \d+ s, and it has that of line3-\d+\.", done.stderr)
    assert "11 of 12 batches are kept" in done.stderr
    again = evaluate_run(load_run(file, ["evaluate.per_device_eval_batch_size=1"]), base=True, name="hung")
    assert again["num_generated"] == 1


def test_a_second_evaluation_in_the_same_folder_is_refused(trained, monkeypatch):
    file, _, _ = trained
    folder = Path(yaml.safe_load(file.read_text())["output_dir"]) / "eval" / "locked"
    folder.mkdir(parents=True)
    code = (
        "import fcntl, sys, time\n"
        "f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        ticks = itertools.count(0, 100)  # no need to really wait for the other to end
        monkeypatch.setattr("vlmdist.run_folder.time.monotonic", lambda: next(ticks))
        with pytest.raises(UserError, match=r"another evaluation is writing it.*--name"):
            evaluate_run(load_run(file), base=True, name="locked")
    finally:
        other.kill()
        other.wait()
    monkeypatch.undo()
    evaluate_run(load_run(file), base=True, name="locked")
    with open(folder / ".lock", "w") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- settings of generation --------------------------------------------------------------------------------------------


def test_a_static_cache_gives_the_same_answers(trained):
    file, _, _ = trained
    assert _answers(file, "evaluate.cache=static", name="static") == _answers(file, name="dynamic")


@pytest.mark.parametrize("metric", ["fuzzy", "fuzzy_fields"])
def test_an_answer_that_is_complete_ends_there(trained, metric):
    """A model whose answers are written down: what it would go on with is not generated, and scores stay."""
    file, _, merged = trained
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompter = Prompter(tokenizer, None, "assistant", 512)
    rng = random.Random(3)
    truth = {"fuzzy": '{"a": {"b": "}"}, "c": "x"}', "fuzzy_fields": "Milk##milk##-##Dairy"}[metric]
    chatter = {"fuzzy": '```json\n{"a": {"b": "}"}, "c": "x"}\n```', "fuzzy_fields": "Sure:\nMilk##milk##-##Dairy\n"}
    for rest in ("", "\nI hope that helps.", "\nTea##tea##-\n", " {}", "".join(rng.choices("ab{}\n#", k=20))):
        said = chatter[metric] + rest
        ids = tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
        stop = _Answered(prompter, ANSWERED[metric], 0, 1)
        ends = [bool(stop(ids[:, : i + 1], None)[0]) for i in range(ids.shape[1])]
        assert stop.ends[0] == ends.index(True) + 1
        kept = prompter.decode_answer(ids[0, : stop.ends[0]].tolist())
        assert len(kept) <= len(chatter[metric])
        assert METRICS[metric](truth, kept).figures["score"] == 100
        if metric == "fuzzy_fields":  # the line scored is the same with all that follows
            assert METRICS[metric](truth, kept) == METRICS[metric](truth, said)
