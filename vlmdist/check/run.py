"""``vlmdist check``: all that can be known before the queue, in one report."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlmdist.check.disk import checkpoint_bytes, folder_problems, most_checkpoints, space_problems
from vlmdist.check.estimate import Estimate, estimate
from vlmdist.check.estimate_machines import Nodes, machines, named
from vlmdist.check.estimate_work import RunWork
from vlmdist.check.features import feature_facts
from vlmdist.check.gpus import CPU, GPUS, Gpu, find_gpu, gpu_of_this_machine
from vlmdist.check.kernels import Installed, attention_kernel, cpu_problems, gpu_problems, kernel_notes, step_dtype
from vlmdist.check.memory import Change, Estimator, Settings, Table, changes_that_fit
from vlmdist.check.samples import Seen, look_at_samples, made_up
from vlmdist.check.shown import gibibytes
from vlmdist.check.slurm import Request, cluster_problems, time_seconds
from vlmdist.check.weights import weight_problems
from vlmdist.config import RunConfig, load_run
from vlmdist.data.order import Cursor
from vlmdist.data.prompt import Prompter
from vlmdist.data.questions import open_questions
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.stream import Mixture
from vlmdist.distributed import World
from vlmdist.errors import UserError
from vlmdist.evaluate.metrics import METRICS
from vlmdist.model.families import family_of
from vlmdist.model.load import load_config, load_processor
from vlmdist.model.precision import FLASH_ATTENTION_2_CAPABILITY
from vlmdist.run_folder import RunFolder
from vlmdist.train.ds_config import offloads_optimizer
from vlmdist.train.init_from import find_init_source
from vlmdist.train.inputs import OpenedInputs, differences_from, global_batch_size, open_inputs
from vlmdist.train.optim import num_warmup_steps
from vlmdist.train.state import TrainState


@dataclass
class Report:
    """What was found. facts: for ``--json`` and the text, section by section; what couldn't be found is left out."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, "problems": self.problems, "warnings": self.warnings, **self.facts}


@dataclass(frozen=True)
class Target:
    """What the run is to run on."""

    gpu: Gpu | None
    """None: a CPU where ``on_cpu``, else not known."""
    on_cpu: bool
    gpus_per_node: int
    num_nodes: int

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.num_nodes

    @property
    def text(self) -> str:
        name = "CPU" if self.on_cpu else self.gpu.name if self.gpu else "GPU of any kind"
        return f"{self.num_nodes} node{'s' * (self.num_nodes > 1)} x {self.gpus_per_node} x {name}"


def check_run(
    run_file: str,
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    gpus_per_node: int | None = None,
    num_nodes: int | None = None,
    on: Sequence[str] = (),
    request: Request | None = None,
    installed: Installed | None = None,
) -> Report:
    """Check a run file against data, model, machines and cluster. Nothing is written, no weights are loaded.

    gpus_per_node, num_nodes: by default the request's, else 1. on: other machines to estimate the time for, as
    ``vlmdist.check.estimate_machines.parse_nodes`` reads them. request: a Slurm job to compare with the cluster.
    installed: packages of the environment that will train; by default this one's.
    """
    report = Report()
    target = _target(gpu, gpus_per_node, num_nodes, request, report)
    others, problems = named(on)
    report.problems += problems
    if request is not None:
        _check_slurm(request, target, report)
    try:
        config = load_run(run_file, overrides)
    except UserError as e:
        report.problems += e.problems
        return report
    installed = installed or Installed.here()
    _check_kernels(config, target, installed, report)
    dtype = step_dtype(config.model.precision, target.gpu)
    opened, problems = open_inputs(config, target.world_size, dtype)
    report.problems += problems
    report.problems += _sections_at_odds(config, opened)
    _check_test_corpus(config, report)
    _check_steps(config, target, opened, report)
    _check_folder(config, opened, report)
    report.problems += [] if request is None else _time_problems(config, request)
    _check_model(config, target, opened, dtype, others, request, report)
    return report


def _target(
    gpu: str | None, gpus_per_node: int | None, num_nodes: int | None, request: Request | None, report: Report
) -> Target:
    found = None
    try:
        found = gpu_of_this_machine() if gpu is None else find_gpu(gpu)
    except UserError as e:
        report.problems += e.problems
    for name, count in (("--gpus", gpus_per_node), ("--nodes", num_nodes)):
        if count is not None and count < 1:
            report.problems.append(f"{name}: {count}; at least 1")
    if gpu is None and found is None:
        report.warnings.append(
            "no --gpu given and none here: precision, kernels and memory were not compared with one "
            f"({', '.join(GPUS)}, {CPU})"
        )
    by_request = (request.gpus_per_node or 1, request.num_nodes) if request else (1, 1)
    return Target(
        found,
        on_cpu=gpu is not None and gpu.lower() == CPU,
        gpus_per_node=max(1, gpus_per_node or by_request[0]),
        num_nodes=max(1, num_nodes or by_request[1]),
    )


# -- Slurm -------------------------------------------------------------------------------------------------------------


def _check_slurm(request: Request, target: Target, report: Report) -> None:
    problems, warnings = cluster_problems(request)
    report.problems += problems
    report.warnings += warnings
    tasks, gpus = request.tasks_per_node, request.gpus_per_node
    if tasks is not None and gpus is not None and tasks != gpus:
        report.problems.append(
            f"Slurm: {tasks} tasks a node (--ntasks-per-node) and {gpus} GPUs: a rank has one GPU, so ask for as many "
            "of each"
        )
    if request.script is not None and gpus is None and not target.on_cpu:
        report.warnings.append(f"Slurm: {request.script} asks for no GPU (--gres=gpu:2 or --gpus-per-node=2)")
    kind = request.gpu_type
    if kind is not None and target.gpu is not None and kind.lower() not in target.gpu.name.lower().replace(" ", ""):
        report.warnings.append(
            f"Slurm: GPUs of type {kind} are asked for, the memory was compared with {target.gpu.name}"
        )
    report.facts["slurm"] = dict(request.options)


def _time_problems(config: RunConfig, request: Request) -> list[str]:
    seconds = time_seconds(request.options.get("time", ""))
    if seconds is None or seconds > config.train.stop_margin_s:
        return []
    return [
        f"Slurm: --time: {request.options['time']} is no longer than train.stop_margin_s "
        f"({config.train.stop_margin_s:.0f} s): the run would stop before its first step; ask for more time"
    ]


# -- run file, data, folder --------------------------------------------------------------------------------------------


def _check_kernels(config: RunConfig, target: Target, installed: Installed, report: Report) -> None:
    if target.on_cpu:
        report.problems += cpu_problems(config)
    elif target.gpu is not None:
        report.problems += gpu_problems(config, target.gpu, installed)
        report.warnings += kernel_notes(config, target.gpu, installed)
    report.facts["kernels"] = {
        "target": target.text,
        "precision": str(step_dtype(config.model.precision, target.gpu)).removeprefix("torch."),
        "attention": attention_kernel(config, target.gpu, installed),
        "quantization": config.model.quantization,
        "torch": installed.torch,
        "bitsandbytes": installed.bitsandbytes,
    }


def _sections_at_odds(config: RunConfig, opened: OpenedInputs) -> list[str]:
    """What training finds only when it has loaded the model."""
    problems = []
    kept = [part for part in config.model.new_parts if getattr(config.adapt, part) != "full"]
    if kept:
        problems.append(
            f"model.new_parts: {', '.join(kept)} must be full in the adapt section, to be saved with the run"
        )
    optim = config.train.optim
    if opened.ds_config is not None and offloads_optimizer(opened.ds_config) and optim != "adamw":
        problems.append(f"train.optim: {optim} can't be offloaded to the host; use adamw with offload, or zero2")
    return problems


def _check_test_corpus(config: RunConfig, report: Report) -> None:
    """What training does not open: a mistake here would show when the run is to be scored."""
    if config.data.test is not None:
        try:
            open_questions(config.data.test, RemoteAccess.for_run(config.data))
        except UserError as e:
            report.problems += [f"data.test: {p}" for p in e.problems]
    if config.evaluate.metric not in METRICS and config.train.generate_samples is None:  # else told with that
        report.problems.append(
            f"evaluate.metric: no metric is called {config.evaluate.metric!r}; there are: {', '.join(METRICS)}"
        )


def _check_steps(config: RunConfig, target: Target, opened: OpenedInputs, report: Report) -> None:
    t, world_size = config.train, target.world_size
    samples = global_batch_size(config, world_size, TrainState())
    if samples < world_size:
        report.warnings.append(
            f"train.global_batch_size: {samples} samples a step on {world_size} GPUs: {world_size - samples} of them "
            "compute nothing; use fewer, or a larger batch"
        )
    per_rank = math.ceil(samples / world_size)
    if t.per_device_train_batch_size > per_rank and t.max_tokens_per_micro_batch is None and not t.packing:
        report.warnings.append(
            f"train.per_device_train_batch_size: {t.per_device_train_batch_size} is never filled: {samples} samples a "
            f"step are {per_rank} a GPU"
        )
    if len(opened.corpora) != len(config.data.train) or not all(len(c) for c in opened.corpora):
        return
    mixture = _mixture(config, opened)
    left = mixture.steps_left(Cursor(), samples, t.num_train_epochs)
    total = t.max_steps or left
    if num_warmup_steps(total, t) >= total:
        report.warnings.append(
            f"train.warmup_steps: {num_warmup_steps(total, t)} of {total} steps: the learning rate only rises"
        )
    report.facts["run"] = {
        "samples_per_epoch": mixture.epoch_length(0),
        "samples_per_step": samples,
        "steps": total,
        "epochs": round(total / max(1, left) * t.num_train_epochs, 3),
        "warmup_steps": num_warmup_steps(total, t),
        "checkpoints": math.ceil(total / t.save_steps),
    }


def _mixture(config: RunConfig, opened: OpenedInputs) -> Mixture:
    weights = [c.weight for c in config.data.train]
    return Mixture(opened.corpora, weights, config.seed, config.data.shuffle_block_size)


def _check_folder(config: RunConfig, opened: OpenedInputs, report: Report) -> None:
    problems = folder_problems(config)
    report.problems += problems
    if problems:
        return
    checkpoint, skipped = RunFolder(Path(config.output_dir)).newest_whole_checkpoint()
    report.warnings += [f"output_dir: checkpoint passed over: {reason}" for reason in skipped]
    try:
        if checkpoint is None:
            find_init_source(config, World(0, 1, 0, torch.device("cpu")))
            return
        refused, told = differences_from(checkpoint, config, [c.fingerprint for c in opened.corpora])
    except UserError as e:
        report.problems += e.problems
        return
    report.problems += refused
    report.warnings += [f"changed since {checkpoint.name}: {sentence}" for sentence in told]
    report.facts["goes_on_from"] = str(checkpoint)


# -- model -------------------------------------------------------------------------------------------------------------


def _check_model(
    config: RunConfig,
    target: Target,
    opened: OpenedInputs,
    dtype: torch.dtype,
    others: Sequence[Nodes],
    request: Request | None,
    report: Report,
) -> None:
    try:
        transformers_config = load_config(config.model)
    except UserError as e:
        report.problems += e.problems
        return
    problems, warnings = weight_problems(config.model)
    report.problems += problems
    report.warnings += warnings
    try:
        processor = load_processor(config.model)
        prompter = Prompter.for_run(processor, config)
        if config.evaluate.max_image_tiles is not None and config.prompt.max_image_tiles is None:
            Prompter.for_run(processor, config, evaluation=True)
        if config.prompt.train_on == "assistant":
            prompter.prove()
    except UserError as e:
        report.problems += [p for p in e.problems if p not in report.problems]
        return
    seen = look_at_samples(config, [c for c in opened.corpora if len(c)], prompter)
    report.problems += seen.problems
    report.warnings += seen.warnings
    _tell_samples(prompter, seen, report)
    if config.train.cache_vision_features:
        corpora = [c for c in opened.corpora if len(c)]
        facts, problems, warnings = feature_facts(config, transformers_config, corpora, seen.even, dtype)
        report.facts["vision_features"] = facts
        report.problems += problems
        report.warnings += warnings
    most = getattr(transformers_config.get_text_config(), "max_position_embeddings", None)
    if most is not None and config.data.max_length > most:
        report.warnings.append(f"data.max_length: {config.data.max_length} tokens, the model was made for {most}")
    if opened.ds_config is None:
        return
    encoded = seen.longest or made_up(prompter, config.data.max_length)
    estimator = Estimator(
        config,
        transformers_config,
        family_of(transformers_config),
        encoded,
        prompter.pad_token_id,
        dtype,
        fused_attention_repeats_heads=target.gpu is None or target.gpu.capability >= FLASH_ATTENTION_2_CAPABILITY,
    )
    rows = _rows(config, target.world_size, len(encoded[0].input_ids))
    settings = Settings.of(config, opened.ds_config, rows, target.world_size)
    try:
        table = estimator.table(settings)
    except UserError as e:  # of the adapt section
        report.problems += e.problems
        return
    except Exception as e:  # a model that computes on the values of its activations; remote code may do anything
        report.warnings.append(f"memory: this model can't be traced without data ({type(e).__name__}: {str(e)[:200]})")
        return
    report.problems += space_problems(config, estimator.num_trained, dtype.itemsize)
    _tell_memory(config, target, estimator, settings, table, seen, request, report)
    report.facts["disk"] = {
        "checkpoint_bytes": checkpoint_bytes(estimator.num_trained, config, dtype.itemsize),
        "checkpoints_side_by_side": most_checkpoints(config),
    }
    own = [Nodes(target.gpu, target.gpus_per_node, target.num_nodes)] if target.gpu else []
    if seen.even and "run" in report.facts and (own or others):
        sizes = [len(c) * place.weight for c, place in zip(opened.corpora, config.data.train, strict=True)]
        family = family_of(transformers_config)
        work = RunWork(config, transformers_config, family, dtype, opened.ds_config, seen.even, sizes)
        _tell_time(config, [*own, *others], opened, work, estimator, settings, report)


def _rows(config: RunConfig, world_size: int, longest: int) -> int:
    """Samples in the largest micro-batch, were all as long as the longest."""
    t = config.train
    per_rank = math.ceil(global_batch_size(config, world_size, TrainState()) / world_size)
    most = min(t.per_device_train_batch_size, per_rank)
    if t.max_tokens_per_micro_batch is None:
        return most
    return max(1, min(most, math.ceil(t.max_tokens_per_micro_batch / longest)))


def _tell_samples(prompter: Prompter, seen: Seen, report: Report) -> None:
    if not seen.lengths:
        return
    ordered = sorted(seen.lengths)
    report.facts["samples"] = {
        "looked_at": seen.num_seen,
        "tokens_median": ordered[len(ordered) // 2],
        "tokens_longest": len(seen.longest[0].input_ids) if seen.longest else None,
        "longest_key": seen.longest_key,
        "loss_token_share": round(seen.num_loss_tokens / max(1, seen.num_tokens), 4),
        "images": prompter.pixels.describe() if prompter.has_images else None,
    }


def _tell_memory(
    config: RunConfig,
    target: Target,
    estimator: Estimator,
    settings: Settings,
    table: Table,
    seen: Seen,
    request: Request | None,
    report: Report,
) -> None:
    shape = estimator.micro_batch(settings.rows).labels.shape
    facts: dict[str, Any] = {
        "micro_batch": f"{settings.rows} samples, {shape[0]} x {shape[1]} tokens",
        "samples": "real" if seen.longest else "made up",
        "rows": dict(table.rows()),
        "saved_for_backward_bytes": table.activations.saved,
        "allocated_bytes": table.allocated,
        "total_bytes": table.total,
        "host_bytes_per_rank": table.host,
        "trained_parameters": estimator.num_trained,
    }
    report.facts["memory"] = facts
    if target.gpu is None:
        facts["fits"] = (
            [name for name, gpu in GPUS.items() if table.total <= gpu.memory_bytes] if not target.on_cpu else []
        )
    else:
        facts["gpu_bytes"] = target.gpu.memory_bytes
        if table.total > target.gpu.memory_bytes:
            changes = changes_that_fit(estimator, config, settings, target.gpu.memory_bytes)
            facts["changes_that_fit"] = [asdict(c) for c in changes]
            report.problems.append(_does_not_fit(table, target.gpu, changes))
    memory = request.memory_bytes_per_node if request is not None else None
    needed = table.host * target.gpus_per_node
    if memory is not None and needed > memory:
        report.problems.append(
            f"Slurm: --mem: {gibibytes(memory)} a node, what is offloaded alone takes {gibibytes(needed)} there; ask "
            "for more, or use train.deepspeed=zero2"
        )


def _tell_time(
    config: RunConfig,
    wanted: Sequence[Nodes],
    opened: OpenedInputs,
    work: RunWork,
    estimator: Estimator,
    settings: Settings,
    report: Report,
) -> None:
    """How long the whole run would take on each of the machines."""
    if work.dtype == torch.float32:
        report.warnings.append("time: not estimated in fp32, for which no rates of GPUs are known here")
        return
    found = []
    for nodes in wanted:
        rates = machines(nodes, offloads=settings.offloads)
        if rates is None:
            report.warnings.append(f"time: not estimated for a {nodes.gpu.text}, whose rates are not known here")
            continue
        samples = global_batch_size(config, nodes.world_size, TrainState())
        left = _mixture(config, opened).steps_left(Cursor(), samples, config.train.num_train_epochs)
        num_steps = config.train.max_steps or left
        run = estimate(work.on(nodes.world_size, samples), *rates, nodes.world_size, num_steps)
        there = replace(settings, world_size=nodes.world_size)
        found.append(
            {
                **_time_facts(nodes, run),
                "gpu_bytes_needed": estimator.table(there).total,
                "gpu_bytes": nodes.gpu.memory_bytes,
            }
        )
    report.facts["estimates"] = found


def _time_facts(nodes: Nodes, run: Estimate) -> dict[str, Any]:
    low, high = run.step_s
    ends = {"low": low, "middle": run.middle_step_s, "high": high}
    hours = {name: run.hours(step_s) for name, step_s in ends.items()}
    rates = {"low": high, "middle": run.middle_step_s, "high": low}
    return {
        "machines": nodes.text,
        "world_size": nodes.world_size,
        "steps": run.num_steps,
        "step_seconds": {name: round(step_s, 4) for name, step_s in ends.items()},
        "samples_per_second": {name: round(run.samples_per_step / step_s, 3) for name, step_s in rates.items()},
        "hours": {name: round(h, 4) for name, h in hours.items()},
        "gpu_hours": {name: round(h * nodes.world_size, 4) for name, h in hours.items()},
        "factor": round(run.factor, 2),
        "bound_by": run.bound_by,
        "parts_seconds": {part: round(seconds, 4) for part, seconds in run.parts_s.items()},
    }


def _does_not_fit(table: Table, gpu: Gpu, changes: Sequence[Change]) -> str:
    text = f"memory: a step needs {gibibytes(table.total)}, a {gpu.name} has {gibibytes(gpu.memory_bytes)}"
    if not changes:
        return f"{text}; no setting makes it fit: use a smaller model or a larger GPU"
    found = "; or ".join(f"{c.overrides} ({gibibytes(c.total)})" for c in changes)
    return f"{text}; it fits with {found}"
