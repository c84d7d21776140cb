"""What a resume may change: every field of the run file belongs to one of three classes.

identity  decides what the weights, the optimizer state or the cursor of a checkpoint mean: refused
told      the run goes on with it, on another curve than a run that had it from its start: said in a line
harmless  changes no number of the training: silent
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig, load_run
from vlmdist.errors import UserError
from vlmdist.run_folder import read_manifest
from vlmdist.train.ds_config import find_ds_config, zero_stage

IDENTITY = (
    "seed",  # the order of the samples, and with it what the cursor means
    "model.name_or_path",  # may move: see _moved_model
    "model.revision",
    "model.trust_remote_code",  # decides whose code the model is
    "model.quantization",
    "model.quantized_parts",
    "model.random_weights",
    "model.new_parts",  # drawn before the first step only: a later change would do nothing, unsaid
    "model.precision",  # the dtype of the weights, and whether there is a loss scaler
    "adapt.vision_tower",
    "adapt.projector",
    "adapt.language_model",
    "adapt.head",
    "adapt.init_from",  # as new_parts
    "adapt.lora.r",
    "adapt.lora.alpha",  # scales what the trained weights do
    "adapt.lora.bias",
    "adapt.lora.target_modules",
    "data.train.*.weight",  # the order
    "data.shuffle_block_size",  # the order
    "data.max_length",  # which samples there are: those left out before would take part now
    "prompt.template",
    "prompt.train_on",
    "prompt.max_image_tiles",
    "train.optim",  # the form of the optimizer's state
)

TOLD = {
    # field: what it means for the steps from here on
    "threads_per_rank": "sums are rounded differently",
    "model.attn_implementation": "sums are rounded differently",
    "model.gradient_checkpointing": "time and memory change, at most rounding besides",
    "adapt.lora.dropout": "the later steps drop out so",
    "data.validation": "validation losses may be of other samples than before",
    # what trained already fits either way: a run that "refuse" ended can go on with "drop"
    "data.too_long": "it counts for the samples to come",
    "train.num_train_epochs": "the run ends elsewhere, and the schedule is stretched to it",
    "train.max_steps": "the run ends elsewhere, and the schedule is stretched to it",
    "train.global_batch_size": "the later steps take so many samples",
    # the first start turned it into a global batch, which the checkpoint keeps
    "train.gradient_accumulation_steps": "without effect: set train.global_batch_size for another global batch",
    "train.per_device_train_batch_size": "sums are rounded differently",
    "train.max_tokens_per_micro_batch": "sums are rounded differently",
    "train.packing": "sums are rounded differently",
    "train.cache_vision_features": "the vision tower may round differently",
    "train.learning_rate": "the later steps follow the new schedule",
    "train.lr_scheduler_type": "the later steps follow the new schedule",
    "train.warmup_ratio": "the later steps follow the new schedule",
    "train.warmup_steps": "the later steps follow the new schedule",
    "train.adam_beta1": "it counts from here on",
    "train.adam_beta2": "it counts from here on",
    "train.adam_epsilon": "it counts from here on",
    "train.weight_decay": "it counts from here on",
    "train.max_grad_norm": "it counts from here on",
    "train.deepspeed": "sums may be rounded differently",
    "train.max_eval_samples": "validation losses are of other samples than before",
    "train.generate_samples": "validation scores are of other samples than before",
    "train.metric_for_best_model": "it decides from here on which checkpoint is the best",
    "train.greater_is_better": "it decides from here on which checkpoint is the best",
    "evaluate.metric": "validation scores while training don't compare with those before",
    "evaluate.max_new_tokens": "validation scores while training don't compare with those before",
    "evaluate.max_image_tiles": "validation scores while training don't compare with those before",
    "evaluate.stop_when_answered": "validation scores while training don't compare with those before",
}

HARMLESS = (
    "output_dir",  # a run folder may be moved as a whole
    "data.train.*.shards",  # shards may move: the fingerprints of their indexes are compared elsewhere
    "data.test",
    "data.cache_dir",
    "data.cache_bytes",
    "data.run_pipe_commands",
    "data.num_workers",
    "data.max_bad_fraction",
    "train.logging_steps",
    "train.report_to",
    "train.eval_steps",
    "train.generate_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.max_nonfinite_steps",
    "train.stop_margin_s",
    "train.hang_floor_s",
    "train.start_limit_s",
    # the evaluator is another program, and compares its own settings itself; what training uses of them is above
    "evaluate.per_device_eval_batch_size",  # answers are rounded differently
    "evaluate.max_samples",
    "evaluate.engine",
    "evaluate.merged",
    "evaluate.cache",
    "evaluate.instruction",
    "evaluate.few_shot_template",
)


@dataclass(frozen=True)
class Changes:
    """A sentence for each field: its path, the old value, the new one."""

    refused: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def changes(before: RunConfig, now: RunConfig, base_digest: str | None = None) -> Changes:
    """What differs between the run file of a checkpoint and the one that is to go on from it.

    base_digest: ``base_model_digest`` of the checkpoint's base model as its manifest keeps it; None: it keeps none.
    """
    found = Changes()
    if len(before.data.train) != len(now.data.train):
        found.refused.append(_made_with("data.train", f"{len(before.data.train)} corpora", len(now.data.train)))
    for path in IDENTITY:
        for place, old, new in _differing(before, now, path):
            if path == "model.name_or_path":
                _moved_model(old, new, base_digest, found)
            else:
                found.refused.append(_made_with(place, repr(old), repr(new)))
    for path, meaning in TOLD.items():
        for place, old, new in _differing(before, now, path):
            if path == "train.deepspeed" and _is_zero3(old) != _is_zero3(new):
                why = "ZeRO-3 and the other stages can't read each other's optimizer state"
                found.refused.append(f"{_made_with(place, repr(old), repr(new))}; {why}")
            else:
                found.told.append(f"{place}: was {old!r} up to the checkpoint, is now {new!r}: {meaning}")
    return found


def changes_since(checkpoint: Path, now: RunConfig) -> Changes:
    """``changes`` since a verified checkpoint. UserError where its run file can't be read."""
    return changes(load_run(checkpoint), now, read_manifest(checkpoint).get("base_model"))


def base_model_digest(name_or_path: str) -> str | None:
    """Stands for the files of a model folder, wherever it lies; None for a model of the hub.

    Of each file its name, size and 32 blocks spread evenly over it: milliseconds for any size. Trainings of the same
    base, whose sizes and configurations are equal, differ in nearly every block.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES and p.is_file()):
        num_bytes = file.stat().st_size
        digest.update(repr((file.name, num_bytes)).encode())
        with open(file, "rb") as f:
            for i in range(_NUM_BLOCKS):
                f.seek(max(0, num_bytes - _BLOCK_BYTES) * i // (_NUM_BLOCKS - 1))
                digest.update(f.read(_BLOCK_BYTES))
    return digest.hexdigest()


_MODEL_FILES = (".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt")
_NUM_BLOCKS, _BLOCK_BYTES = 32, 4096


def _moved_model(old: str, new: str, recorded: str | None, found: Changes) -> None:
    """A scratch disk is cleared or another cluster has its own places: the same files may lie elsewhere."""
    path = "model.name_or_path"
    known, present = recorded or base_model_digest(old), base_model_digest(new)
    if known is not None and known == present:
        found.told.append(f"{path}: was {old!r} up to the checkpoint, is now {new!r}: the same files in another place")
    elif known is None or present is None:
        doubt = "whether that is the same model can't be seen; where it is, make the old name a link to it"
        found.refused.append(f"{_made_with(path, repr(old), repr(new))}; {doubt}")
    else:
        found.refused.append(f"{_made_with(path, repr(old), repr(new))}, which holds other files")


def _is_zero3(deepspeed: str) -> bool:
    """False also where the file is gone or can't be read, which is found out elsewhere."""
    try:
        tree = json.loads(find_ds_config(deepspeed).read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return False
    return isinstance(tree, dict) and zero_stage(tree) == 3


def _made_with(place: str, old: object, new: object) -> str:
    return f"{place}: the checkpoint was made with {old}, the run file now says {new}"


def _differing(before: RunConfig, now: RunConfig, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, old value, new value) where the field differs; ``*`` in the path: in each corpus that both have."""
    head, star, tail = path.partition(".*.")
    if star:
        for i, pair in enumerate(zip(_at(before, head), _at(now, head), strict=False)):
            old, new = (getattr(corpus, tail) for corpus in pair)
            if old != new:
                yield f"{head}.{i}.{tail}", old, new
        return
    old, new = _at(before, path), _at(now, path)
    if _ordered(old) != _ordered(new):
        yield path, old, new


def _at(config: RunConfig, path: str) -> Any:
    node: Any = config
    for name in path.split("."):
        node = getattr(node, name)
    return node


def _ordered(value: Any) -> Any:
    """Lists of the run file name layers and parts; their order means nothing."""
    return sorted(value) if isinstance(value, list) else value
