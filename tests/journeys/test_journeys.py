"""The README's journeys, block for block, on a real Slurm with tiny models: what a reader pastes must work."""

import csv
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from binaries import SlurmBinaries, SlurmMissing, find_slurm
from llava_source import picture, row, write_parquet
from ranks import REPOSITORY
from readme_blocks import JOURNEYS, README, copy_of_the_repository, reader_environment, travel, write_small_sbatch
from testbed import SlurmTestbed, remove
from tiny_models import make_tiny_llama, make_tiny_llava

from vlmdist.run_folder import RunFolder, read_jsonl

pytestmark = pytest.mark.timeout(900)  # half a minute to a minute each on two idle cores
Travel = Callable[..., list[str]]


@pytest.fixture(scope="module")
def binaries() -> SlurmBinaries:
    try:
        return find_slurm(Path(os.environ.get("VLMDIST_TEST_SLURM") or REPOSITORY / ".cache" / "slurm"))
    except SlurmMissing as e:
        pytest.skip(str(e))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_of_the_repository(tmp_path / "vlmdist")


@pytest.fixture
def travel_with_slurm(binaries: SlurmBinaries, checkout: Path) -> Iterator[Travel]:
    """``travel`` by the journey's name, with a real ``sbatch`` of two nodes that asks for no more than they have."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets, whose paths end at 108 characters
    try:
        with SlurmTestbed(binaries, folder, num_nodes=2) as slurm:

            def go(journey: str, environment: dict[str, str], *options: str, settings: Sequence[str] = ()) -> list[str]:
                small = write_small_sbatch(checkout.parent / "bin", folder / "bin" / "sbatch", options, settings)
                path = f"{small}:{slurm.environment['PATH']}"
                mine = {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
                return travel(JOURNEYS[journey], checkout, {**slurm.environment, **mine})

            yield go
    finally:
        remove(folder)


@pytest.mark.slurm
def test_llama_on_receipt_lines(travel_with_slurm: Travel, checkout: Path, tmp_path: Path) -> None:
    pairs = [(f"НАП МОЛ {n} Л ЛАВЕТ", f"Напиток молочный {n} литра##Молоко##Lavetti##Продукты") for n in range(90)]
    lines = [json.dumps({"dialogue": [{"human": line, "assistant": answer}]}) for line, answer in pairs]
    source = tmp_path / "receipts_dataset.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = make_tiny_llama(tmp_path / "model", [text for pair in pairs for text in pair])
    environment = {"SOURCE": str(source), "VLMDIST_MODEL": str(model), "GPU": "cpu"}
    # the shipped zero2_offload compiles DeepSpeed's CPU Adam, for minutes
    before, _, _, after = travel_with_slurm(
        "receipts", environment, "--cpus-per-task=1", settings=["train.deepspeed=zero2"]
    )
    run = RunFolder(checkout / "runs" / "llama3-receipts")
    assert "no problem found" in before
    assert "fuzzy_fields on the 4 samples that both have" in after
    assert "runs/llama3-receipts: clean" in after
    assert run.report_file.stat().st_size > 10_000
    assert {"base", "trained"} == {folder.name for folder in run.eval_dir.iterdir()}
    told = README.split("## What a run leaves behind")[1].split("```")[1]
    assert [p.name for p in run.path.iterdir() if p.name[0] != "." and f"\n{p.name}" not in told] == []


@pytest.mark.slurm
def test_llava_on_its_mix(travel_with_slurm: Travel, checkout: Path, tmp_path: Path) -> None:
    texts = [(f"What is picture {n}?", f"A square, number {n}.") for n in range(80)]
    for split, numbers in (("train", range(64)), ("test", range(64, 70))):
        rows = [row(picture(n), *texts[n]) for n in numbers]
        write_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet", rows)
    environment = {
        "SOURCE": str(tmp_path / "parquet"),
        "VALIDATION": "6",
        "VLMDIST_MODEL": str(make_tiny_llava(tmp_path / "model", [text for pair in texts for text in pair])),
        "GPU": "cpu",
    }
    small = ["--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1"]
    checked, _, after = travel_with_slurm("llava", environment, *small)
    run = RunFolder(checkout / "runs" / "llava-instruct")
    assert re.search(r"4 nodes of 8 x A100.*samples/s", checked), "no estimate of the time"
    assert [r["world_size"] for r in read_jsonl(run.steps_file) if r.get("start")] == [2]
    assert json.loads(next(run.eval_dir.glob("*/scores.json")).read_text())["num_samples"] == 6
    assert (checkout / "exports" / "llava-instruct" / "model.safetensors").exists(), after


@pytest.mark.slurm
def test_benchmark(travel_with_slurm: Travel, checkout: Path, tmp_path: Path) -> None:
    texts = ["Expand abbreviations for products (receipt items)", "milk 2 litres##Milk##-##Dairy"]
    model = make_tiny_llama(tmp_path / "model", texts)
    (model / "model.safetensors").unlink()  # nothing but its configuration is needed
    environment = {"VLMDIST_MODEL": str(model), "STEPS": "2", "BATCH": "8", "NODES": "2"}
    small = ["--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1"]
    here, cluster = travel_with_slurm("benchmark", environment, *small)
    assert "| strong scaling |" in here
    assert {"sweep.md", "sweep.json", "sweep.png"} <= {p.name for p in (checkout / "runs/bench/bench").iterdir()}
    (sweep,) = checkout.glob("vlmdist-bench-*-sweep.json")
    assert [r["num_ranks"] for r in json.loads(sweep.read_text())] == [1, 2], cluster
    assert sweep.with_suffix(".png").exists()


def test_own_data(checkout: Path, tmp_path: Path) -> None:
    photos = checkout / "photos"
    photos.mkdir()
    labels = [(f"{n:03d}.png", "What does it cost?", f"{n}.20") for n in range(40)]
    for n, (name, _, _) in enumerate(labels):
        (photos / name).write_bytes(picture(n))
    with (photos / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(labels)
    model = make_tiny_llava(tmp_path / "model", [text for _, *pair in labels for text in pair])
    _, trained, answered = travel(JOURNEYS["own-data"], checkout, reader_environment(VLMDIST_MODEL=str(model)))
    assert "no problem found" in trained
    run = RunFolder(checkout / "runs" / "mine")
    assert [r["step"] for r in read_jsonl(run.steps_file) if "step" in r][-1] == 2
    assert [p.name for p in run.checkpoints()] == ["step-000002"]
    assert "exact: 0.00" in answered
