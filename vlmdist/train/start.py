"""From checked inputs to a running engine: processor, model, adapters, optimizer, DeepSpeed, checkpoint."""

import json
import os
import platform
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from vlmdist.config import RunConfig, dump_run
from vlmdist.data.collate import MicroBatch
from vlmdist.data.costs import NUM_MEASURED, CostRule, SampleCosts, apply_rule, measure_rule
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.stream import TrainStream
from vlmdist.distributed import World, barrier, gather_objects
from vlmdist.model.adapters import num_elements, part_sizes, trains_vision
from vlmdist.model.compile_later import compiled_when_called
from vlmdist.model.families import Family
from vlmdist.model.flops import Flops, StepFlops
from vlmdist.model.load import load_for_training, load_processor
from vlmdist.model.peaks import gpu_peak
from vlmdist.run_folder import RunFolder, replace_file_text
from vlmdist.train.checkpoint.load import load_checkpoint, universal_if_needed
from vlmdist.train.checkpoint.save import Saver
from vlmdist.train.ds_config import offloads_optimizer
from vlmdist.train.exchange import log_start
from vlmdist.train.features import KeptFeatures, keep_features
from vlmdist.train.generate import Generation
from vlmdist.train.gradients import GradientWatch
from vlmdist.train.init_from import apply_init_from, restore_inherited
from vlmdist.train.inputs import Inputs
from vlmdist.train.metrics import log
from vlmdist.train.optim import make_optimizer
from vlmdist.train.packing import prove_packing
from vlmdist.train.state import TrainState
from vlmdist.train.watch.heartbeat import Heartbeat

_PACKAGES = ("vlmdist", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


@dataclass
class Training:
    """What the loop works with."""

    config: RunConfig
    world: World
    run: RunFolder
    engine: Any
    prompter: Prompter
    stream: TrainStream
    validation: Corpus | None
    kept_features: KeptFeatures | None
    """None: none are kept."""
    generation: Generation | None
    """None: no answers while training."""
    state: TrainState
    flops: StepFlops
    peak_flops_per_s: float | None
    """Of this rank's GPU, as its maker tells it; None where nobody does."""
    gradient_watch: GradientWatch
    saver: Saver
    heartbeat: Heartbeat

    @property
    def corpora(self) -> list[Corpus]:
        return list(self.stream.mixture.corpora)

    def flops_of(self, micro_batch: MicroBatch) -> Flops:
        """Model FLOPs of its forward and backward; of a micro-batch that is on the host."""
        mb = micro_batch
        return self.flops.of_micro_batch(mb.inputs, mb.num_loss_tokens, len(mb.sample_numbers), mb.packed_lengths)

    def keys_of(self, samples: Iterable[Sequence[int]]) -> list[str]:
        """Keys of training samples given as (corpus, sample)."""
        return [self.corpora[corpus].key(int(sample)) for corpus, sample in samples]

    def num_images(self, samples: np.ndarray) -> int:
        """Of training samples given as (corpus, sample) [n, 2]."""
        numbers = [samples[samples[:, 0] == corpus, 1] for corpus in range(len(self.corpora))]
        return sum(int(c.num_images[mine].sum()) for c, mine in zip(self.corpora, numbers, strict=True))


def prepare(config: RunConfig, world: World, run: RunFolder, inputs: Inputs, heartbeat: Heartbeat) -> Training:
    """Load the model, build the engine, go on from the checkpoint if there is one (all ranks)."""
    heartbeat.enter("loading the model")
    _seed(config.seed)
    processor = load_processor(config.model)
    prompter = Prompter.for_run(processor, config)
    asks = None if config.train.generate_samples is None else Prompter.for_run(processor, config, evaluation=True)
    if config.prompt.train_on == "assistant":
        prompter.prove()
    if prompter.has_images:
        log.info("images: %s", prompter.pixels.describe())
    log.info("loading %s (%s)", config.model.name_or_path, config.model.quantization)
    model, family = load_for_training(config, world.device)
    if inputs.checkpoint is not None:
        restore_inherited(model, inputs.checkpoint)
    elif inputs.init_source is not None:
        for line in (*inputs.init_source.notes, apply_init_from(model, inputs.init_source)):
            log.info("%s", line)
    _log_sizes(model)
    if config.train.packing:
        prove_packing(model, prompter)
    corpora = inputs.mixture.corpora
    kept = keep_features(config, corpora, inputs.validation, run, world, model, family, prompter)
    heartbeat.enter("planning")
    costs = _plan_costs(inputs, prompter, model, family, world)
    flops = StepFlops.of(model, family)
    peak = gpu_peak(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    heartbeat.enter("building the engine")
    engine = _start_engine(model, config, world, inputs)
    stream = TrainStream(
        inputs.mixture,
        prompter,
        costs,
        rank=world.rank,
        world_size=world.size,
        global_batch_size=inputs.state.global_batch_size,
        micro_batch_size=config.train.per_device_train_batch_size,
        max_tokens_per_micro_batch=config.train.max_tokens_per_micro_batch,
        total_steps=inputs.total_steps,
        num_workers=config.data.num_workers,
        needs_image=trains_vision(config.adapt, family),
        packing=config.train.packing,
        kept=None if kept is None else kept.train,
    )
    watch = GradientWatch(engine.module)
    fingerprints = [c.fingerprint for c in corpora]
    saver = Saver(engine, run, config, fingerprints, world, heartbeat.alive)
    saver.saved_step = None if inputs.checkpoint is None else inputs.state.step
    generation = None
    if asks is not None and inputs.validation is not None:
        generation = Generation(config, inputs.validation, engine.module, asks, world, heartbeat)
    training = Training(
        config=config,
        world=world,
        run=run,
        engine=engine,
        prompter=prompter,
        stream=stream,
        validation=inputs.validation,
        kept_features=kept,
        generation=generation,
        flops=flops,
        peak_flops_per_s=None if peak is None else peak.flops_per_s,
        state=inputs.state,
        gradient_watch=watch,
        saver=saver,
        heartbeat=heartbeat,
    )
    if world.is_main:
        _write_start(training)
    barrier()
    return training


def _start_engine(model: Any, config: RunConfig, world: World, inputs: Inputs) -> Any:
    """DeepSpeed's engine, with the checkpoint's weights, optimizer and scaler in it where there is one."""
    import deepspeed

    trainable = [p for p in model.parameters() if p.requires_grad]
    offload = offloads_optimizer(inputs.ds_config)
    optimizer = make_optimizer(trainable, config.train, offload=offload, device=world.device)
    universal = universal_if_needed(inputs.checkpoint, world) if inputs.checkpoint is not None else None
    ds_config = dict(inputs.ds_config)
    if universal is not None:
        ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    deepspeed.utils.logger.setLevel("ERROR")
    if world.device.type == "cpu":
        # DeepSpeed would compile its own shared-memory reduction, a minute and a C++ compiler; gloo's serves. The table
        # put here also saves its probing of all operations at every start: compiler runs, with stderr turned off
        vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    with compiled_when_called():  # its Muon, which it imports whatever the optimizer
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if inputs.checkpoint is not None:
        load_checkpoint(engine, inputs.checkpoint, universal, world)
        cursor = inputs.state.cursor
        log.info("going on from %s (epoch %d, %d samples taken)", inputs.checkpoint, cursor.epoch, cursor.taken)
    return engine


def _plan_costs(inputs: Inputs, prompter: Prompter, model: Any, family: Family, world: World) -> list[SampleCosts]:
    """Costs of all samples; rank 0 measures the rule on those that come first, which it reads anyway (all ranks).

    Once a run: a start that goes on takes the rule from the checkpoint, or it would cut the steps in another way.
    """
    mixture = inputs.mixture
    rule = None if inputs.state.cost_rule is None else CostRule(**inputs.state.cost_rule)
    if world.is_main and rule is None:
        sizes = part_sizes(model, family)
        patch_work = sizes["vision_tower"] / max(1, sizes["language_model"] + sizes["head"])
        samples = mixture.first_samples(inputs.state.cursor, NUM_MEASURED)
        rule = measure_rule(mixture.corpora, samples, prompter, patch_work)
    rule = gather_objects(rule)[0]
    inputs.state.cost_rule = asdict(rule)
    return [apply_rule(rule, corpus, prompter) for corpus in mixture.corpora]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _log_sizes(model: Any) -> None:
    total = sum(num_elements(p) for p in model.parameters())
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%.1f M parameters, %.2f M of them train (%.2f %%)", total / 1e6, trains / 1e6, 100 * trains / total)


def _write_start(training: Training) -> None:
    """Effective run file, environment, and the start row of steps.jsonl (rank 0)."""
    run, config, mixture = training.run, training.config, training.stream.mixture
    replace_file_text(run.run_file, dump_run(config))
    starts = json.loads(run.environment_file.read_text(encoding="utf-8")) if run.environment_file.exists() else []
    starts.append(_environment(training.world))
    replace_file_text(run.environment_file, json.dumps(starts, indent=1))
    log_start(run.steps_file, mixture, training.state.step, training.world.size, training.state.global_batch_size)


def _environment(world: World) -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    slurm = {k: os.environ[k] for k in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST") if k in os.environ}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": world.size,
        "host": platform.node(),
        "python": platform.python_version(),
        "devices": devices or [f"CPU, {torch.get_num_threads()} threads a rank"],
        "packages": {name: version(name) for name in _PACKAGES},
        **slurm,
    }
