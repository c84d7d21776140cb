"""The job scripts as shipped: accepted by Slurm, from any folder, with sbatch's own options, and what each does."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ENVIRONMENT, REPOSITORY, SCRIPTS, SETTINGS, assert_audit_is_clean, places, stand_in
from testbed import SlurmTestbed
from tiny_run import tiny_run, write_run

pytestmark = pytest.mark.slurm
JOB_SCRIPTS = sorted(f.name for f in SCRIPTS.glob("*.sh") if "#SBATCH" in f.read_text())
SMALL = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1")
SHOW = 'echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS sees ${CUDA_VISIBLE_DEVICES:-none}: $*"'


def test_every_directive_is_explained_and_the_common_part_is_common() -> None:
    assert len(JOB_SCRIPTS) == 8
    heads = set()
    for name in JOB_SCRIPTS:
        lines = (SCRIPTS / name).read_text().splitlines()
        for before, line in zip(lines, lines[1:], strict=False):
            if line.startswith("#SBATCH"):
                assert re.match(r"# \w", before), f"{name}: {line}"
        first, last = (
            next(i for i, line in enumerate(lines) if line.startswith(s)) for s in ("# Slurm runs", "source ")
        )
        heads.add("\n".join(lines[first : last + 1]))
    assert len(heads) == 1


@pytest.mark.parametrize("name", JOB_SCRIPTS)
def test_slurm_would_run_it(slurm: SlurmTestbed, tmp_path: Path, name: str) -> None:
    eight = ("--gres=gpu:2", "--ntasks-per-node=2") if "llava" in name else ()  # the testbed's nodes have two GPUs
    slurm.run("sbatch", "--test-only", *eight, SCRIPTS / name, cwd=tmp_path)


def run_stand_in(
    slurm: SlurmTestbed, tmp_path: Path, *options: str, script: str = SHOW, env: dict[str, str] | None = None
) -> str:
    """Submit the training script with a shell script in the place of training; returns the log."""
    env = {**ENVIRONMENT, **stand_in(tmp_path / "venv", "train", script), **(env or {})}
    job = slurm.sbatch(*options, SCRIPTS / "train_llama3_receipts.sh", cwd=tmp_path, env=env)
    slurm.wait(job, 60)
    return slurm.log(job)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--ntasks-per-node=2"], {"0,1"}),
        (["--ntasks-per-node=1", "--gres=gpu:v100:1"], {"0"}),
        (["--ntasks-per-node=2", "--gres=none", "--gpus-per-node=2"], {"0,1"}),
        (["--ntasks-per-node=2", "--gres=none", "--gpus-per-task=1"], {"0", "1"}),
        (["--ntasks-per-node=2", "--gres=none"], {"none"}),
    ],
)
def test_gpus_may_be_asked_for_in_every_way(
    slurm: SlurmTestbed, tmp_path: Path, options: list[str], seen: set[str]
) -> None:
    log = run_stand_in(slurm, tmp_path, "--cpus-per-task=1", "--nodes=2", *options)
    assert set(re.findall(r"rank \d of \d sees (\S+):", log)) == seen, log
    tasks = 2 * int(options[0][-1])
    assert sorted(re.findall(r"rank (\d) of", log)) == [str(rank) for rank in range(tasks)], log


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ntasks-per-node=4"], "4 ranks a node but 2 GPUs: one rank a GPU, --ntasks-per-node=2"),
        (["--ntasks-per-node=1"], "1 ranks a node and 2 GPUs; --ntasks-per-node=2 uses them all"),
        (["--gpus-per-node=1"], "add --gres=none|--gres=none beside"),
    ],
)
def test_a_request_that_does_not_add_up_is_told(
    slurm: SlurmTestbed, tmp_path: Path, options: list[str], said: str
) -> None:
    log = run_stand_in(slurm, tmp_path, "--cpus-per-task=1", *options)
    assert re.search(said, log), log


def test_ranks_get_the_job_s_environment_after_export_none(slurm: SlurmTestbed, tmp_path: Path) -> None:
    """sbatch --export=NONE leaves SLURM_EXPORT_ENV=NONE in the job, which srun would take for its ranks."""
    clone = clone_scripts(tmp_path / "clone")
    (clone / "slurm" / "cluster.env").write_text("export SLURM_EXPORT_ENV=NONE\n")
    env = {**ENVIRONMENT, **stand_in(tmp_path / "venv", "train", 'echo "rank 0 is at $MASTER_ADDR"')}
    job = slurm.sbatch(*SMALL, clone / "slurm" / "train_llama3_receipts.sh", cwd=tmp_path, env=env)
    assert slurm.wait(job, 60) == "COMPLETED", slurm.log(job)
    assert "rank 0 is at 127.0.0.1" in slurm.log(job)


def clone_scripts(folder: Path) -> Path:
    """A second checkout, with facts of its own."""
    for name in ("slurm", "launch"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("cluster.env"))
    for name in ("shards", "dsconfigs", "vlmdist"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def test_ranks_run_in_a_container_where_the_cluster_s_facts_say_so(
    slurm: SlurmTestbed, receipts: Path, tmp_path: Path
) -> None:
    """A stand-in for apptainer on the PATH: it takes the real one's words, and marks what it starts."""
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(
        "#!/usr/bin/env bash\n"
        '[[ $1 == exec && $2 == --nv && $3 == */image.sif ]] || { echo "wrong use: $*"; exit 3; }\n'
        f'export PATH="{Path(sys.executable).parent}:$PATH"\n'
        f'echo "$SLURM_PROCID" >>{tmp_path}/contained\n'
        'exec "${@:4}"\n'
    )
    apptainer.chmod(0o755)
    clone = clone_scripts(tmp_path / "clone")
    (clone / "slurm" / "cluster.env").write_text(
        f'PATH="{apptainer.parent}:$PATH"\nVLMDIST_CONTAINER=(apptainer exec --nv {tmp_path}/image.sif)\n'
    )
    run = tmp_path / "run"
    options = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")
    script = clone / "slurm" / "train_llama3_receipts.sh"
    env = {"OMP_NUM_THREADS": "1", **places(receipts, run)}
    job = slurm.sbatch(*options, script, *SETTINGS, "train.max_steps=2", cwd=tmp_path, env=env)
    assert slurm.wait(job, 240) == "COMPLETED", slurm.log(job)
    assert sorted((tmp_path / "contained").read_text().split()) == ["0", "1"]
    assert "python3 in:  apptainer exec --nv" in slurm.log(job)
    assert_audit_is_clean(run)


# --- bench ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_bench_sweeps_over_the_nodes_of_its_job(slurm: SlurmTestbed, receipts: Path, tmp_path: Path) -> None:
    """The batch grows with the ranks, so that it is weak scaling."""
    batch = {"global_batch_size": None, "gradient_accumulation_steps": 2}
    tree = tiny_run(receipts, tmp_path / "run", train={**batch, "num_train_epochs": 3})
    run_file = write_run(tree, tmp_path / "run.yaml")
    options = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
    words = (run_file, "--steps", "3", "--warmup", "1")
    job = slurm.sbatch(*options, SCRIPTS / "bench.sh", *words, cwd=tmp_path, env=ENVIRONMENT)
    assert slurm.wait(job, 400) == "COMPLETED", slurm.log(job)
    name = f"vlmdist-bench-{job}"
    facts = ("num_ranks", "num_nodes", "samples_per_step")
    found = {f.name: json.loads(f.read_text()) for f in tmp_path.glob(f"{name}-nodes-*.json")}
    assert {file: tuple(result[fact] for fact in facts) for file, result in found.items()} == {
        f"{name}-nodes-001.json": (1, 1, 4),
        f"{name}-nodes-002.json": (2, 2, 8),
    }
    rows = json.loads((tmp_path / f"{name}-sweep.json").read_text())
    assert [row["num_ranks"] for row in rows] == [1, 2]
    assert rows[0]["weak_efficiency"] == 1.0
    assert rows[1]["weak_efficiency"] == pytest.approx(rows[1]["speed_up"] / 2, abs=1e-3)
    assert rows[1]["strong_efficiency"] is None
    table = (tmp_path / f"{name}-sweep.md").read_text()
    assert len(table.splitlines()) == 4
    assert table in slurm.log(job)
    assert (tmp_path / f"{name}-sweep.png").stat().st_size > 0


# --- shards -----------------------------------------------------------------------------------------------------------


def test_each_task_of_an_array_prepares_a_corpus(slurm: SlurmTestbed, tmp_path: Path) -> None:
    words = ("synthetic_receipts", "--kind", "lines", "--train", "20", "--validation", "5", "--test", "5")
    script = SCRIPTS / "prepare_shards.sh"
    options = ("--array=0-1", "--cpus-per-task=1", "--output=%x-%A_%a.out")
    job = slurm.sbatch(*options, script, *words, "--seed", "%a", "--out", "out-%a", cwd=tmp_path, env=ENVIRONMENT)
    for task in range(2):
        assert slurm.wait(f"{job}_{task}", 60) == "COMPLETED", slurm.log(f"{job}_{task}")
        assert json.loads((tmp_path / f"out-{task}" / "corpus.json").read_text())
    first, second = ((tmp_path / f"out-{task}" / "train" / "shard-000000.tar").read_bytes() for task in range(2))
    assert first != second


def test_a_shard_script_that_is_not_there_is_named(slurm: SlurmTestbed, tmp_path: Path) -> None:
    job = slurm.sbatch("--cpus-per-task=1", SCRIPTS / "prepare_shards.sh", "srioe", cwd=tmp_path, env=ENVIRONMENT)
    assert slurm.wait(job, 60) == "FAILED"
    assert "sroie" in slurm.log(job)
    assert slurm.facts(job)["ExitCode"] == "2:0"


def test_preparation_stopped_by_preemption_goes_on(slurm: SlurmTestbed, tmp_path: Path) -> None:
    """A stand-in for a long script: it ends with 85 as llava_instruct does, and begins with what it has."""
    clone = clone_scripts(tmp_path / "clone")
    (clone / "shards").unlink()
    (clone / "shards").mkdir()
    (clone / "shards" / "long.py").write_text(
        "import pathlib, signal, sys, time\n"
        "done = pathlib.Path('out.txt')\n"
        "signal.signal(signal.SIGTERM, lambda *_: (done.write_text('half'), sys.exit(85)))\n"
        "if done.exists():\n    done.write_text('whole')\n    sys.exit(0)\n"
        "print('at work', flush=True)\n"
        "time.sleep(1000)\n"
    )
    options = ("--cpus-per-task=1", "--partition=low")
    job = slurm.sbatch(*options, clone / "slurm" / "prepare_shards.sh", "long", cwd=tmp_path, env=ENVIRONMENT)
    slurm.wait_until(lambda: "at work" in slurm.log(job), job, 60)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job))
    assert slurm.wait(job, 60) == "COMPLETED", slurm.log(job)
    assert (tmp_path / "out.txt").read_text() == "whole"
    assert slurm.facts(job)["Restarts"] == "1"


# --- the chain --------------------------------------------------------------------------------------------------------


def submit_chain(slurm: SlurmTestbed, cwd: Path, *words: str | Path, env: dict[str, str]) -> dict[str, int]:
    """bash slurm/submit.sh WORDS: the job id of each step."""
    done = subprocess.run(
        ["bash", SCRIPTS / "submit.sh", *words],
        cwd=cwd,
        env={**slurm.environment, **ENVIRONMENT, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {step.strip(): int(job) for step, job in re.findall(r"^(\w[\w, ]+?) +job (\d+)$", done.stdout, re.MULTILINE)}


def test_a_chain_ends_where_a_job_of_it_fails(slurm: SlurmTestbed, tmp_path: Path) -> None:
    env = {"VLMDIST_DATA": str(tmp_path / "data"), "VLMDIST_OUT": str(tmp_path / "run")}
    jobs = submit_chain(slurm, tmp_path, "llama3_receipts", "--source", tmp_path / "missing.jsonl", env=env)
    assert list(jobs) == ["shards", "training", "evaluation, base model", "evaluation, trained model", "report"]
    assert slurm.wait(jobs["shards"], 60) == "FAILED"
    assert slurm.facts(jobs["shards"])["ExitCode"] == "2:0", slurm.log(jobs["shards"])
    for step in list(jobs)[1:]:
        assert slurm.wait(jobs[step], 60) == "CANCELLED", step


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_chain_from_raw_lines_to_the_report(slurm: SlurmTestbed, receipts: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"МОЛ {i} ШТ", "answer": "Молоко##Молоко##-##Продукты"}) for i in range(64)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    env = {**places(receipts, run), "VLMDIST_DATA": str(tmp_path / "data")}
    words = ("--source", tmp_path / "lines.jsonl", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", *SETTINGS)
    jobs = submit_chain(slurm, tmp_path, "llama3_receipts", *words, "evaluate.max_new_tokens=8", env=env)
    for job in jobs.values():
        assert slurm.wait(job, 300) == "COMPLETED", slurm.log(job)
    assert_audit_is_clean(run)
    assert (run / "eval" / "base" / "scores.json").exists()
    assert len(list((run / "eval").glob("*/scores.json"))) == 2
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RECIPE is llama3_receipts"),
        (["llama3"], "RECIPE is llama3_receipts"),
        (["llama3_receipts", "--partition", "gpu"], "--name=value"),
        (["llama3_receipts", "--source"], "--source needs"),
    ],
)
def test_wrong_use_of_submit_is_told(tmp_path: Path, words: list[str], said: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        ["bash", SCRIPTS / "submit.sh", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
