#!/usr/bin/env python3
"""Everything that must be measured on a GPU, in one script: rows are written as they are found, the tables at the end.

    python tests/benchmarks/gpu.py --out FOLDER                         all that fits in 540 s, most valuable first
    python tests/benchmarks/gpu.py --out FOLDER --only peers tests      these parts
    python tests/benchmarks/gpu.py --out FOLDER --tiny                  the same script on a CPU, with tiny models

FOLDER gets rows.jsonl, tables.md and log.txt (the output of what failed). Rows that are in rows.jsonl, of the same
device, are not measured again: the next call goes on. A row is begun when its time, as estimated for an H100, is left;
a cut-off call loses the row it was at. Nothing is downloaded: models come from their configuration, with random weights
and a tokenizer made here. What isn't installed is left out with a sentence.

- memory: what `vlmdist check` predicts, and torch.cuda.max_memory_allocated over the steps of `vlmdist bench`.
- speed: `vlmdist bench --synthetic`, and the loss of the head alone beside Liger's kernel.
- peers: TRL's SFTTrainer on the same base model, adapters and tokens.
- tests: the tests that are marked gpu.
- evaluation: `vlmdist evaluate` with each cache, and with vLLM.
- precision: fp16 and bf16 steps, with the optimizer on the GPU and on the host.

Every row is a process of its own. Of the peaks, neither counts the CUDA context.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_sides import REPOSITORY, Setting, hide_torchvision, make_evaluation_world, make_world, write_run

PARTS = ("memory", "speed", "peers", "tests", "evaluation", "precision")
PUBLISHED_TOKENS_PER_S = 12_473  # NeMo Automodel, Llama-3-8B, LoRA, 4,096 tokens, one H100
_SLOWEST = 3  # times its estimate: then a row has failed
_ENOUGH_S = 20  # of the time that is left, for the tables
_SIDES = Path(__file__).with_name("gpu_sides.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for rows and tables")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=540, help="begin no row that ends later (default: 540)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, also without a GPU")
    options = parser.parse_args()
    started = time.monotonic()
    hide_torchvision()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        bench = Bench(options.out, Path(folder), tiny=options.tiny, ends_at=started + options.seconds)
        if not bench.on_gpu and not options.tiny:
            parser.error("torch sees no GPU here; --tiny runs the same script on a CPU")
        for row in rows(options.only):
            bench.take(row)
    print((options.out / "tables.md").read_text(encoding="utf-8"))
    return 0


# --- rows: what is measured, in the order of its value ----------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    part: str
    name: str
    seconds: float
    """On an H100, the start of the process included; a guess on the careful side."""
    measure: Callable[["Bench"], dict[str, Any]]
    needs: tuple[str, ...] = ()
    """Modules that must be there; "cuda"; "c++" for a compiler."""


def rows(parts: Sequence[str]) -> Iterator[Row]:
    """240 s of memory, 380 s of speed, 345 s of peers: two calls. FlashAttention's rows are 185 s more."""
    makers = {
        "memory": _memory_rows,
        "speed": _speed_rows,
        "peers": _peer_rows,
        "tests": _test_rows,
        "evaluation": _evaluation_rows,
        "precision": _precision_rows,
    }
    for part in PARTS:
        if part in parts:
            yield from makers[part]()


LLAMA = Setting("llama3_8b", 4096)
QLORA = replace(LLAMA, quantization="nf4")
LLAVA = Setting("llava_7b", 1024, rows=4, full_projector=True)
INTERNVL = Setting("internvl_2b", 4096)
PACKED = replace(LLAMA, packed_samples=32)


def _memory_rows() -> Iterator[Row]:
    # start 15 s, weights 3 s (16 GB drawn on the GPU; 2 s more to quantize them), three steps of two micro-steps
    for setting in (
        QLORA,
        replace(LLAMA, checkpointing=False),
        LLAVA,
        replace(INTERNVL, quantization="nf4", checkpointing=False),
        replace(QLORA, tokens=1024, checkpointing=False),
        replace(INTERNVL, tokens=1536, max_tiles=2),
        replace(LLAMA, tokens=1024),
        replace(LLAVA, checkpointing=False),
    ):
        yield _training_row("memory", replace(setting, micro_steps=2), 30, num_steps=2, num_warmup=1)


def _speed_rows() -> Iterator[Row]:
    # as above, and 7 steps of 16,384 tokens: 16 s at 8,000 tokens/s without checkpointing, 21 s with it
    fast = {"num_steps": 5, "num_warmup": 2}
    yield _training_row("speed", replace(LLAMA, checkpointing=False, micro_steps=4), 40, **fast)
    yield _training_row("speed", replace(LLAMA, micro_steps=4), 45, **fast)
    yield _training_row("speed", replace(QLORA, micro_steps=4), 50, **fast)
    yield Row("speed", "the head's loss", 40, lambda bench: bench.side({"side": "losses"}, 40))
    yield _training_row("speed", replace(LLAVA, micro_steps=2), 40, **fast)
    yield _training_row("speed", replace(INTERNVL, micro_steps=4, checkpointing=False), 35, **fast)
    quick = replace(LLAMA, checkpointing=False, micro_steps=4)
    yield _training_row("speed", replace(quick, ligers_loss=True), 40, ("liger_kernel",), **fast)
    yield _training_row("speed", replace(quick, attention="flash_attention_2"), 40, ("flash_attn",), **fast)
    yield _training_row("speed", replace(quick, attention="flex_attention"), 90, ("cuda",), **fast)


def _peer_rows() -> Iterator[Row]:
    # the same steps as in speed, whose rows of the same shape they are compared with
    with_checkpointing = replace(LLAMA, micro_steps=4)
    without = replace(with_checkpointing, checkpointing=False)
    yield _trl_row(with_checkpointing)
    yield _trl_row(without)
    yield _training_row("peers", PACKED, 45, num_steps=5, num_warmup=2)
    yield _trl_row(PACKED)
    yield _trl_row(with_checkpointing, liger=True)
    yield _trl_row(without, liger=True)
    yield _trl_row(replace(PACKED, attention="flash_attention_2"), ("flash_attn",), liger=True)
    yield _training_row(
        "peers", replace(PACKED, attention="flash_attention_2"), 45, ("flash_attn",), num_steps=5, num_warmup=2
    )
    yield _trl_row(replace(without, attention="flash_attention_2"), ("flash_attn",), liger=True)
    yield _trl_row(replace(with_checkpointing, quantization="nf4"))


def _test_rows() -> Iterator[Row]:
    yield Row("tests", "pytest -m gpu", 60, _run_gpu_tests)


def _evaluation_rows() -> Iterator[Row]:
    # 128 questions of 128 new tokens in batches of 32: 512 decoding steps of some 15 ms
    yield _evaluation_row("dynamic cache", {"cache": "dynamic"}, 45)
    yield _evaluation_row("static cache, the decoding step compiled", {"cache": "static"}, 120)
    yield _evaluation_row("vLLM", {"engine": "vllm"}, 120, ("vllm",))


def _precision_rows() -> Iterator[Row]:
    # the first offloaded row builds DeepSpeed's CPU Adam
    for precision in ("bf16", "fp16"):
        setting = replace(INTERNVL, tokens=1536, max_tiles=2, precision=precision)
        yield _training_row("precision", setting, 30, ("cuda",), num_steps=6, num_warmup=0)
        offloaded = replace(setting, deepspeed="zero2_offload")
        yield _training_row("precision", offloaded, 90, ("cuda", "c++"), num_steps=6, num_warmup=0)


def _training_row(
    part: str, setting: Setting, seconds: float, needs: tuple[str, ...] = (), *, num_steps: int, num_warmup: int
) -> Row:
    name = setting.name if part != "precision" else f"{setting.precision}, {setting.deepspeed}"
    return Row(part, name, seconds, lambda bench: bench.train(setting, num_steps, num_warmup, seconds), needs)


def _trl_row(setting: Setting, needs: tuple[str, ...] = (), *, liger: bool = False) -> Row:
    name = f"TRL, {setting.name}{', Liger layers' if liger else ''}"
    needs = ("trl", *needs, *(["liger_kernel"] if liger else []))
    job = {"side": "TRL", "setting": asdict(setting), "liger": liger, "steps": 5, "warmup": 2}
    return Row("peers", name, 50, lambda bench: bench.train_with_trl(job, 50), needs)


def _evaluation_row(name: str, evaluate: dict[str, Any], seconds: float, needs: tuple[str, ...] = ()) -> Row:
    return Row("evaluation", name, seconds, lambda bench: bench.evaluate(name, evaluate, seconds), needs)


def _run_gpu_tests(bench: "Bench") -> dict[str, Any]:
    """Only the files that have such tests: others import what this machine may lack."""
    marked = [f for f in sorted((REPOSITORY / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *map(str, marked)]
    done = bench.finish(bench.begin(command), bench.limit_s(60), expect=(0, 1, 2, 5))
    summary = [line for line in done.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    failed = [line for line in done.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"summary": summary[-1].strip("= ") if summary else "no summary", "failed": failed[:10]}


# --- how a row is measured --------------------------------------------------------------------------------------------


class RowFailed(Exception):
    pass


class OutOfTime(Exception):
    """The call's time is over; the row is left to the next one."""


@dataclass
class Process:
    process: subprocess.Popen[str]
    output: Path
    errors: Path

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Bench:
    """Rows on this machine: what is known of them, how much time is left."""

    def __init__(self, out: Path, folder: Path, *, tiny: bool, ends_at: float):
        self.out, self.folder, self.tiny, self._ends_at = out, folder, tiny, ends_at
        self._num_processes = 0
        self._worlds: dict[str, Path] = {}
        self.about = self.side({"side": "device"}, 40)
        self.on_gpu: bool = self.about["cuda"]
        self.device = self.about["device"] + (", tiny models" if tiny else "")
        self._rows = read_rows(out / "rows.jsonl")

    # -- rows

    def take(self, row: Row) -> None:
        """Measure it, unless it is known, can't be had here, or there is no time."""
        known = self._rows.get((self.device, row.part, row.name))
        if known is not None and "figures" in known:
            return
        missing = [name for name in row.needs if not self._has(name)]
        left_s = self._left_s()
        if missing:
            self._write(row, {"left_out": f"needs {', '.join(missing)}, not here"})
        elif left_s < (_ENOUGH_S if self.tiny else row.seconds):
            tell(f"no time for {row.part}: {row.name} ({left_s:.0f} s left)")
        else:
            tell(f"{row.part}: {row.name} ({left_s:.0f} s left)")
            started = time.monotonic()
            try:
                found = {"figures": row.measure(self)}
            except RowFailed as e:
                found = {"left_out": f"failed: {e}"}
            except OutOfTime:
                tell("cut off: no time is left")
                return
            self._write(row, {**found, "seconds": round(time.monotonic() - started, 1)})

    def _write(self, row: Row, found: dict[str, Any]) -> None:
        written = {"device": self.device, "part": row.part, "name": row.name, **found}
        self._rows[self.device, row.part, row.name] = written
        with open(self.out / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**written, "versions": self.about["versions"]}) + "\n")
        self.write_tables()

    def write_tables(self) -> None:
        text = format_tables(list(self._rows.values()), self.device, self.about["versions"])
        (self.out / "tables.md").write_text(text, encoding="utf-8")

    def _has(self, name: str) -> bool:
        if name == "cuda":
            return self.on_gpu
        if name == "c++":
            return bool(shutil.which("c++") or shutil.which("g++"))
        return importlib.util.find_spec(name) is not None

    def _left_s(self) -> float:
        return self._ends_at - time.monotonic()

    def limit_s(self, estimate_s: float) -> float:
        """After which a row that was to take so long has failed."""
        return max(120.0, _SLOWEST * estimate_s)

    # -- what is measured

    def train(self, setting: Setting, num_steps: int, num_warmup: int, estimate_s: float) -> dict[str, Any]:
        """`vlmdist bench`; `vlmdist check` beside it, on the CPU while the model is loaded."""
        run_file = self._world(setting)
        result_file = self.folder / "bench.json"
        result_file.unlink(missing_ok=True)
        arguments = ["bench", str(run_file), "--synthetic", "--random-weights", "--json", str(result_file)]
        arguments += ["--steps", str(num_steps), "--warmup", str(num_warmup), "--name", "bench"]
        where = [] if self.on_gpu else ["--gpu", "h100"]
        running = self._vlmdist(arguments, ligers_loss=setting.ligers_loss)
        checking = self._vlmdist(["check", str(run_file), "--json", *where], ligers_loss=False)
        try:
            self.finish(running, self.limit_s(estimate_s))
            # 2: it tells what is wrong, a step that doesn't fit among it
            checked = last_object(self.finish(checking, 60, expect=(0, 2)))
        finally:
            running.kill()
            checking.kill()
        if "memory" not in checked:
            raise RowFailed(f"vlmdist check: {'; '.join(checked['problems'])}")
        result = json.loads(result_file.read_text(encoding="utf-8"))
        metrics = (run_file.parent / "run" / "bench" / "bench" / "metrics.jsonl").read_text(encoding="utf-8")
        return {
            **{name: result.get(name) for name in ("tokens_per_second", "mfu_percent", "split", "loss", "memory_gb")},
            "step_seconds": result["step_seconds_median"],
            "peak_gb": result["peak_memory_gb"] if self.on_gpu else None,
            "predicted_gb": checked["memory"]["allocated_bytes"] / 1e9,
            "predicted_rows": checked["memory"]["rows"],
            "skipped_steps": json.loads(metrics.splitlines()[-1])["skipped_steps"],
            "shape": setting.shape,
        }

    def train_with_trl(self, job: dict[str, Any], estimate_s: float) -> dict[str, Any]:
        setting = Setting(**job["setting"])
        run_file = self._world(setting)
        found = self.side({**job, "folder": str(run_file.parent), "run_file": str(run_file)}, estimate_s)
        return {**found, "shape": setting.shape}

    def evaluate(self, name: str, changes: dict[str, Any], estimate_s: float) -> dict[str, Any]:
        world = self.folder / "evaluation"
        if not world.exists():
            self._tree = make_evaluation_world(world, tiny=self.tiny)
        run_file = write_run(world, {**self._tree, "evaluate": {**self._tree["evaluate"], **changes}})
        own = re.sub(r"\W+", "-", name)
        begun = self._vlmdist(["evaluate", str(run_file), "--base", "--name", own], ligers_loss=False)
        self.finish(begun, self.limit_s(estimate_s))
        folder = world / "run" / "eval" / own
        timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
        answers = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        texts = {row["id"]: row["prediction"] for row in map(json.loads, answers)}
        digests = {key: hashlib.sha256(text.encode()).hexdigest()[:8] for key, text in texts.items()}
        return {"samples_per_second": timing["samples_per_s"], "answers": digests}

    # -- processes

    def side(self, job: dict[str, Any], estimate_s: float) -> dict[str, Any]:
        begun = self.begin([sys.executable, str(_SIDES), json.dumps({**job, "tiny": self.tiny})])
        return last_object(self.finish(begun, self.limit_s(estimate_s)))

    def _vlmdist(self, arguments: list[str], *, ligers_loss: bool) -> Process:
        job = {"side": "vlmdist", "arguments": arguments, "ligers_loss": ligers_loss}
        return self.begin([sys.executable, str(_SIDES), json.dumps(job)])

    def begin(self, command: list[str]) -> Process:
        self._num_processes += 1
        output, errors = (self.folder / f"{self._num_processes}.{kind}" for kind in ("out", "err"))
        left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        env = {k: v for k, v in os.environ.items() if k not in left_out}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = [str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
        with open(output, "w", encoding="utf-8") as out, open(errors, "w", encoding="utf-8") as err:
            process = subprocess.Popen(
                command, stdout=out, stderr=err, env=env, cwd=REPOSITORY, text=True, start_new_session=True
            )
        return Process(process, output, errors)

    def finish(self, begun: Process, limit_s: float, expect: tuple[int, ...] = (0,)) -> str:
        """Its standard output; RowFailed where it ends otherwise or takes too long, OutOfTime where the call ends."""
        left_s = max(1.0, self._left_s() - _ENOUGH_S / 2)
        try:
            begun.process.wait(min(limit_s, left_s))
        except subprocess.TimeoutExpired:
            begun.kill()
            if left_s < limit_s:
                raise OutOfTime from None
            self._log(begun)
            raise RowFailed(f"not done after {limit_s:.0f} s") from None
        except BaseException:
            begun.kill()
            raise
        if begun.process.returncode not in expect:
            self._log(begun)
            said = begun.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            telling = [line for line in said if re.match(r"[\w.]*(Error|Exception|vlmdist|error)\b", line)]
            raise RowFailed((telling or said or ["no word of why"])[-1][:300])
        return begun.output.read_text(encoding="utf-8", errors="replace")

    def _log(self, begun: Process) -> None:
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"\n=== {begun.process.args!r}: {begun.process.returncode}\n")
            for file in (begun.output, begun.errors):
                log.write(file.read_text(encoding="utf-8", errors="replace")[-20_000:])

    def _world(self, setting: Setting) -> Path:
        """Its run file. Settings that differ in the run file alone still have their own folder: they are small."""
        key = json.dumps(asdict(replace(setting, ligers_loss=False)))
        if key not in self._worlds:
            folder = self.folder / f"world-{len(self._worlds)}"
            self._worlds[key] = make_world(folder, setting, tiny=self.tiny)
        return self._worlds[key]


def read_rows(file: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By device, part and name; of rows written twice the last."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = map(json.loads, lines)
    return {(row["device"], row["part"], row["name"]): row for row in found}


def last_object(printed: str) -> dict[str, Any]:
    """Of lines of JSON; libraries print what they like before it."""
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if not lines:
        raise RowFailed(f"no result was printed: {printed[-200:]!r}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# --- tables -----------------------------------------------------------------------------------------------------------


def format_tables(all_rows: Sequence[dict[str, Any]], device: str, versions: dict[str, str]) -> str:
    """Markdown of the rows of one device."""
    mine = [row for row in all_rows if row["device"] == device]
    texts = [f"{device}; {', '.join(f'{name} {number}' for name, number in versions.items())}."]
    for part in PARTS:
        found = {row["name"]: row["figures"] for row in mine if row["part"] == part and "figures" in row}
        texts += _TABLES[part](found, mine)
        left_out = [f"- {row['name']}: {row['left_out']}" for row in mine if row["part"] == part and "left_out" in row]
        if left_out:
            texts.append(f"Left out of {part}:\n\n" + "\n".join(left_out))
    return "\n\n".join(texts) + "\n"


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return f"**{title}**\n\n" + "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def _memory_table(found: dict[str, Any], rows_: Sequence[dict[str, Any]]) -> list[str]:
    """Also of the rows that were taken for their speed, where they are of other settings."""
    of_others = {
        row["name"]: row["figures"]
        for row in rows_
        if row["part"] in ("speed", "peers") and "predicted_gb" in row.get("figures", {})
    }
    lines = [
        [
            name,
            f"{f['predicted_gb']:.2f}",
            _number(f["peak_gb"], 2, "needs CUDA"),
            "" if f["peak_gb"] is None else f"{f['predicted_gb'] / f['peak_gb']:.3f}",
        ]
        for name, f in {**of_others, **found}.items()
        if not name.endswith("Liger's loss")  # vlmdist check traces vlmdist's own
    ]
    if not lines:
        return []
    return [_table("Memory of a step", ["", "predicted GB", "measured GB", "predicted / measured"], lines)]


def _speed_table(found: dict[str, Any], rows_: Sequence[dict[str, Any]]) -> list[str]:
    losses = found.pop("the head's loss", None)
    tables = []
    if found:
        columns = ["", "tokens/s", "MFU", "peak GB", "step s", "forward, backward, optimizer, the rest", "of 12,473"]
        lines = [
            [
                name,
                f"{f['tokens_per_second']:,.0f}",
                "" if f["mfu_percent"] is None else f"{f['mfu_percent']:.1f} %",
                _number(f["peak_gb"], 2, "needs CUDA"),
                f"{f['step_seconds']:.2f}",
                _split(f["split"]),
                f"{f['tokens_per_second'] / PUBLISHED_TOKENS_PER_S:.2f}" if name.startswith("8B Llama, LoRA") else "",
            ]
            for name, f in found.items()
        ]
        tables.append(_table("Speed", columns, lines))
    if losses:
        lines = [
            [
                case["loss"],
                f"{case['tokens']:,}",
                case["head"],
                f"{case['ms']:.1f}",
                _number(case["peak_gb"], 2, "needs CUDA"),
                f"{case['apart']:.1e}",
            ]
            for case in losses["cases"]
        ]
        columns = ["", "tokens", "head", "ms, forward and backward", "GB", "gradient's relative error"]
        tables.append(_table("Head and loss alone, vocabulary 128,256", columns, lines))
    return tables


def _split(split: dict[str, float]) -> str:
    whole = sum(split.values())
    named = ("forward_seconds", "backward_seconds", "optimizer_seconds")
    shares = [100 * split[name] / whole for name in named]
    return ", ".join(f"{share:.0f} %" for share in (*shares, 100 - sum(shares)))


def _peer_table(found: dict[str, Any], rows_: Sequence[dict[str, Any]]) -> list[str]:
    """vlmdist's rows of the same shape come from the speed part too; ratios are of its best."""
    shapes = list(dict.fromkeys(f["shape"] for f in found.values()))
    trained = {
        row["name"]: row["figures"]
        for row in rows_
        if row["part"] in ("speed", "peers") and row.get("figures", {}).get("shape") in shapes
    }
    lines = []
    for shape in shapes:
        sides = {name: f for name, f in trained.items() if f["shape"] == shape}
        ours = [f["tokens_per_second"] for name, f in sides.items() if not name.startswith("TRL")]
        for name, f in sides.items():
            is_theirs = name.startswith("TRL")
            ratio = f"{max(ours) / f['tokens_per_second']:.2f}" if is_theirs and ours else ""
            side = name if is_theirs else f"vlmdist, {name}"
            peak = _number(f["peak_gb"], 2, "needs CUDA")
            lines.append([side, f"{f['tokens_per_second']:,.0f}", ratio, peak, _number(f["loss"], 3, "")])
    columns = ["", "tokens/s", "vlmdist's best / this", "peak GB", "last loss"]
    return [_table("Beside TRL's SFTTrainer", columns, lines)] if lines else []


def _test_table(found: dict[str, Any], rows_: Sequence[dict[str, Any]]) -> list[str]:
    lines = [[name, f["summary"], "; ".join(f["failed"])] for name, f in found.items()]
    return [_table("Tests", ["", "result", "failed"], lines)] if lines else []


def _evaluation_table(found: dict[str, Any], rows_: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    first = next(iter(found.values()))["answers"]
    lines = []
    for name, f in found.items():
        same = sum(f["answers"].get(key) == digest for key, digest in first.items())
        lines.append([name, f"{f['samples_per_second']:.2f}", f"{same} of {len(first)}"])
    return [_table("Evaluation", ["", "samples/s", "same answers as the first"], lines)]


def _precision_table(found: dict[str, Any], rows_: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        [name, f"{f['loss']:.3f}", str(f["skipped_steps"]), f"{f['step_seconds']:.2f}", _number(f["peak_gb"], 2, "")]
        for name, f in found.items()
    ]
    return [_table("Precision", ["", "loss", "steps skipped of 6", "step s", "peak GB"], lines)] if lines else []


_TABLES: dict[str, Callable[[dict[str, Any], Sequence[dict[str, Any]]], list[str]]] = {
    "memory": _memory_table,
    "speed": _speed_table,
    "peers": _peer_table,
    "tests": _test_table,
    "evaluation": _evaluation_table,
    "precision": _precision_table,
}


def _number(value: float | None, digits: int, otherwise: str) -> str:
    return otherwise if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
