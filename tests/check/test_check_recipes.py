"""No false alarm on the recipes as shipped, with their models in full size and on their machines."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import rank_environment
from recipes import ON_THE_NODES, RECIPES, set_up

from vlmdist.check.disk import nearest_there
from vlmdist.check.run import check_run
from vlmdist.check.shown import gigabytes


@pytest.mark.parametrize("name", RECIPES)
def test_no_false_alarm(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    run_file, places = set_up(name, tmp_path)
    report = check_run(run_file, places, gpu=recipe.gpu, gpus_per_node=recipe.gpus, num_nodes=1, installed=ON_THE_NODES)
    weights = f"{tmp_path / 'model'} has no weights"  # which is true: they are not needed to check all else
    left = [p for p in report.problems if weights not in p and not is_true_of_this_disk(p, report.facts, tmp_path)]
    assert left == []
    assert any(weights in p for p in report.problems)
    memory = report.facts["memory"]
    assert memory["samples"] == "real"
    assert memory["total_bytes"] <= memory["gpu_bytes"]


def is_true_of_this_disk(problem: str, facts: dict[str, Any], folder: Path) -> bool:
    disk = facts["disk"]
    needed = disk["checkpoint_bytes"] * disk["checkpoints_side_by_side"]
    too_small = needed > shutil.disk_usage(nearest_there(folder)).free
    return too_small and problem.startswith("output_dir: ") and gigabytes(disk["checkpoint_bytes"]) in problem


def test_llama_3_8b_by_hand(tmp_path: Path) -> None:
    """Counts of parameters that are known: 8.03e9 weights; LoRA of rank 16 on all linear layers: 41.9e6."""
    run_file, places = set_up("llama3_receipts", tmp_path, num_samples=4)
    report = check_run(run_file, places, gpu="v100-32gb", gpus_per_node=2, installed=ON_THE_NODES)
    memory = report.facts["memory"]
    assert memory["trained_parameters"] == 41_943_040
    # layers in 4 bit with scales, embeddings and head of 128,256 x 4,096 in 16
    layers, vocabulary = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 2 * 128256 * 4096
    assert memory["rows"]["weights"] == pytest.approx(layers * 0.5159 + vocabulary * 2, rel=1e-3)
    assert memory["rows"]["adapters"] == 2 * 41_943_040
    assert memory["host_bytes_per_rank"] == pytest.approx(16 * 41_943_040 / 2)


def test_llava_7b_in_full_needs_more_than_two_gpus(tmp_path: Path) -> None:
    """It fits on the 8 x A100 40 GB on which it was published."""
    run_file, places = set_up("llava_instruct", tmp_path, num_samples=8)
    report = check_run(run_file, places, gpu="a100-40gb", gpus_per_node=2, installed=ON_THE_NODES)
    assert any(p.startswith("memory: a step needs") and "it fits with" in p for p in report.problems)


@pytest.mark.parametrize("name", ["llama3_receipts", "internvl_sroie"])
def test_the_command_on_a_recipe(name: str, tmp_path: Path) -> None:
    run_file, places = set_up(name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "vlmdist", "check", run_file, *places],
        capture_output=True,
        text=True,
        timeout=240,
        env=rank_environment(),
    )
    assert done.returncode == 2
    assert [e for e in done.stderr.splitlines() if e.startswith("error: ") and "has no weights" not in e] == []
    assert "in the loss" in done.stdout
    assert "together" in done.stdout
