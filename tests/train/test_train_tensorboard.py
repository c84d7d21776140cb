"""A run's TensorBoard files, read back by TensorBoard: its reader, and its server over HTTP."""

import io
import json
import os
import random
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ranks import run_vlmdist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import make_tiny_llava
from tiny_run import tiny_run, write_run

from vlmdist.config import RunConfig
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.run_folder import read_jsonl
from vlmdist.train.hyperparameters import hyperparameters, public_run_file, settings

RATES = {"slow": 0.001, "fast": 0.01}


def jpeg(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (50, 40), rng.randbytes(50 * 40 * 3)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings with pictures that differ in their learning rate; the second was started twice."""
    folder = tmp_path_factory.mktemp("tensorboard")
    rng = random.Random(0)
    for name, number in (("train", 8), ("validation", 4)):
        with ShardWriter(folder / name) as writer:
            for i in range(number):
                asked = [{"type": "image", "index": 0}, {"type": "text", "text": "what is it"}]
                said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a receipt"}]
                writer.write(f"{name}-{i}", said, [jpeg(rng)])
    make_tiny_llava(folder / "model", ["what is it", "a receipt"])
    for name, rate in RATES.items():
        train = {"learning_rate": rate, "global_batch_size": 4, "num_train_epochs": 2, "generate_samples": 4}
        tree = tiny_run(folder, folder / "runs" / name, train=train, evaluate={"metric": "exact"})
        del tree["data"]["test"]
        file = write_run(tree, folder / f"{name}.yaml")
        for max_steps in [2, 4] if name == "fast" else [4]:
            run_vlmdist(1, "train", file, f"train.max_steps={max_steps}")
    return folder / "runs"


def test_its_reader(runs: Path) -> None:
    events = EventAccumulator(str(runs / "slow" / "tensorboard"))
    events.Reload()
    rows = list(read_jsonl(runs / "slow" / "metrics.jsonl"))
    losses = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows if "loss" in row]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == losses
    assert len(losses) == 4
    assert [e.step for e in events.Scalars("validation/validation_score")] == [4]
    tags = events.Tags()
    assert {"run file/text_summary", "validation/answers/text_summary"} <= set(tags["tensors"])
    text = events.Tensors("run file/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "      learning_rate: 0.001" in text.splitlines()  # four blanks before it: a block of code
    assert sorted(tags["images"]) == [f"validation_images/validation-{i}/0" for i in range(4)]


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[str]:
    """Address of a real TensorBoard, for this machine alone."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--load_fast=false"], stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_PROXY": "*"}
    )
    try:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "it has ended without saying its address"
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
        yield found[0]
    finally:
        process.kill()
        process.wait()


def ask(server: str, path: str, body: Any = None, **query: Any) -> Any:
    address = f"{server}/data/{path}?{urllib.parse.urlencode(query)}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})  # noqa: S310 - ours
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        content = response.read()
    return json.loads(content) if "json" in response.headers["Content-Type"] else content


def test_its_server(server: str, runs: Path) -> None:
    names = {name: f"{name}/tensorboard" for name in RATES}
    assert set(ask(server, "runs")) == set(names.values())
    for name, run in names.items():
        scalars = ask(server, "plugin/scalars/scalars", run=run, tag="train/loss")
        rows = [row for row in read_jsonl(runs / name / "metrics.jsonl") if "loss" in row]
        assert [(step, value) for _, step, value in scalars] == [
            (row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows
        ]
        run_files = ask(server, "plugin/text/text", run=run, tag="run file/text_summary")
        assert [entry["step"] for entry in run_files] == ([0, 2] if name == "fast" else [0])
        assert f"learning_rate: {RATES[name]}" in run_files[-1]["text"]
        assert "<code>" in run_files[-1]["text"]
        answers = ask(server, "plugin/text/text", run=run, tag="validation/answers/text_summary")
        assert "validation&#45;0" in answers[-1]["text"] or "validation-0" in answers[-1]["text"]
        tag = "validation_images/validation-0/0"
        (image, *_) = ask(server, "plugin/images/images", run=run, tag=tag, sample=0)
        pixels = ask(server, f"plugin/images/individualImage?{image['query']}&x=")
        assert Image.open(io.BytesIO(pixels)).size == (50, 40)


def test_runs_side_by_side_by_what_differs(server: str) -> None:
    experiment = ask(server, "plugin/hparams/experiment", {"experimentName": "", "includeMetrics": True})
    columns = {info["name"]: info for info in experiment["hparamInfos"]}
    assert {name for name, info in columns.items() if info.get("differs")} == {"train.learning_rate", "train.max_steps"}
    assert "output_dir" not in columns
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": {"tag": "validation/validation_score", "group": ""}}],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = ask(server, "plugin/hparams/session_groups", asked)["sessionGroups"]
    shown = {group["sessions"][0]["name"]: group for group in groups}
    for name, rate in RATES.items():
        group = shown[f"{name}/tensorboard"]
        values = group["hparams"]
        assert values["train.learning_rate"] == rate
        assert values["adapt.lora.r"] == 4
        assert values["train.global_batch_size"] == 4
        assert values["world_size"] == 1
        steps = {metric["name"]["tag"]: metric["trainingStep"] for metric in group["metricValues"]}
        assert steps["validation/validation_score"] == steps["train/loss"] == 4
        assert group["sessions"][0]["status"] == "STATUS_SUCCESS"


def test_no_secret_of_the_run_file_leaves_it(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "output_dir": str(tmp_path),
            "model": {"name_or_path": "m"},
            "data": {"train": ["https://me:hunter2@host/a?X-Amz-Signature=abc", "pipe:curl -H 'X: hunter2' u"]},
            "train": {"global_batch_size": 1},
        }
    )
    for shown in (public_run_file(config), str(settings(config)), str(hyperparameters(config, 2))):
        assert "hunter2" not in shown
        assert "abc" not in shown
        assert "https://host/a" in shown
    flat = settings(config)
    assert flat["model.quantized_parts"] == "language_model"
    assert "train.max_steps" not in flat
    assert flat["model.random_weights"] is False
