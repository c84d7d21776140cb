"""What answers: MODEL_OR_RUN of the command, as settings and the weights they go with.

    run folder, run file   its newest whole checkpoint, or --checkpoint; prompt and answers as ``vlmdist evaluate`` has
                           them
    checkpoint folder      the same, with the settings it was made with
    adapter folder         of ``vlmdist export`` or peft: its base model, the prompt of the processor beside it
    model folder           of ``vlmdist export`` or transformers: its own prompt, weights as they are stored
    name on the hub        a model or an adapter

An exported folder's model card holds the run file. Of it are taken what the base was held in, the precision and the
longest answer, nothing else: a card from elsewhere could say anything.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlmdist.config import ModelConfig, RunConfig, load_run
from vlmdist.errors import UserError
from vlmdist.evaluate.subject import Subject, choose_subject
from vlmdist.predict.hub import fetch_adapter, use_cache_where_hub_is_silent
from vlmdist.run_folder import ADAPTER_WEIGHTS, MANIFEST

if TYPE_CHECKING:
    import torch

ALLOWED = (
    "a run folder, a run file, a checkpoint folder, an adapter folder of peft, a model folder of transformers, or a "
    "name on the hub"
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_CARDS_RUN_FILE = re.compile(r"^## Run file\n\n(`{3,})yaml\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Source:
    config: RunConfig
    subject: Subject
    name: str
    """As the user is told it."""
    prompt_folder: Path | None = None
    """With the processor that makes the prompts; None: the model's own."""
    is_run: bool = True
    """Whether data and prompt of ``config`` are a run's."""


def find_source(
    asked: str, overrides: Sequence[str], checkpoint: str | None, device: "torch.device"
) -> tuple[Source, list[str]]:
    """The source and what the user should know about the choice. No weights are loaded.

    overrides: section.field=value, of the run file or in place of one. checkpoint: of a run, as for ``choose_subject``.
    Raises UserError where nothing of that name is there, or nothing that answers.
    """
    path = Path(asked).expanduser()
    if path.is_file() or (path / "run.yaml").is_file():
        return _find_in_run(path, overrides, checkpoint)
    if checkpoint is not None:
        raise UserError(f"--checkpoint: is for a run, and {asked} is none; give the checkpoint or adapter itself")
    if path.is_dir():
        if _holds_adapter(path):
            return _adapter(path, path.resolve().name, overrides, device)
        if (path / "config.json").is_file():
            return _model(str(path), overrides, device), []
        raise UserError(f"{asked}: holds nothing that answers; give {ALLOWED}")
    if path.exists() or _HUB_NAME.fullmatch(asked) is None:
        raise UserError(f"{asked}: no such file or folder; give {ALLOWED}")
    return _find_on_hub(asked, overrides, device)


# -- runs --------------------------------------------------------------------------------------------------------------


def _find_in_run(path: Path, overrides: Sequence[str], checkpoint: str | None) -> tuple[Source, list[str]]:
    config = load_run(path, overrides)
    if (path / MANIFEST).is_file():
        if checkpoint is not None:
            raise UserError(f"--checkpoint: {path} is a checkpoint already; give one of both")
        subject, notes = choose_subject(config, path)
    else:
        if path.is_dir():  # it may have been moved, or named from another folder
            config = config.model_copy(update={"output_dir": str(path)})
        subject, notes = choose_subject(config, checkpoint)
    if config.evaluate.engine != "transformers":
        notes.append(f"evaluate.engine: {config.evaluate.engine} is for many questions; transformers answers here")
    notes += _fetched_only(config)
    run = Path(config.output_dir)
    return Source(config, subject, f"{subject.name} of {run.resolve().name}"), notes


# -- adapters and models -----------------------------------------------------------------------------------------------


def _holds_adapter(folder: Path) -> bool:
    weights = any((folder / name).exists() for name in (ADAPTER_WEIGHTS, "adapter_model.bin"))
    if not weights and (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: is an adapter folder without its {ADAPTER_WEIGHTS}")
    return weights


def _adapter(folder: Path, name: str, overrides: Sequence[str], device: "torch.device") -> tuple[Source, list[str]]:
    base, revision = _base_of(folder)
    tree = _settings(base, folder)
    tree["model"] |= {"revision": revision, **_as_trained(folder)}
    config = _checked(tree, overrides)
    subject, _ = choose_subject(config, folder)  # refuses a pickle
    notes = _fetched_only(config)
    try:
        config = _in_stored_precision(config, device, _precision_of_adapter(folder) if _card(folder) else None)
    except UserError as e:
        raise UserError(f"{folder}: its base model: {e}. If it lies elsewhere: model.name_or_path=FOLDER") from None
    has_prompt = (folder / "tokenizer_config.json").is_file()
    return Source(config, subject, name, folder if has_prompt else None, is_run=False), notes


def _base_of(folder: Path) -> tuple[str, str | None]:
    """Name or folder of the base model, and its revision."""
    facts = _read_json(folder / "adapter_config.json")
    base, revision = facts.get("base_model_name_or_path"), facts.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder}: its adapter_config.json names no base_model_name_or_path")
    return base, revision if isinstance(revision, str) else None


def _model(name: str, overrides: Sequence[str], device: "torch.device") -> Source:
    folder = Path(name) if Path(name).is_dir() else None
    config = _in_stored_precision(_checked(_settings(name, folder), overrides), device)
    return Source(config, Subject(), name if folder is None else folder.resolve().name, is_run=False)


def _find_on_hub(name: str, overrides: Sequence[str], device: "torch.device") -> tuple[Source, list[str]]:
    config = _checked(_settings(name, None), overrides)
    notes = _fetched_only(config)
    try:
        folder = fetch_adapter(name, config.model.revision)
        if folder is None or not _holds_adapter(folder):
            return _model(name, overrides, device), notes
    except UserError as e:
        raise UserError(
            f"{name}: no such folder here, and no such name on the hub that can be had: {e} Give {ALLOWED}"
        ) from None
    # the revision was the adapter's; its base has its own
    source, more = _adapter(folder, name, [o for o in overrides if not o.startswith("model.revision=")], device)
    return source, [*notes, *more]


def _fetched_only(config: RunConfig) -> list[str]:
    """A note where the model must come from the hub, and the hub is silent."""
    note = None if Path(config.model.name_or_path).is_dir() else use_cache_where_hub_is_silent()
    return [] if note is None else [note]


# -- settings where there is no run ------------------------------------------------------------------------------------


def _settings(model: str, folder: Path | None) -> dict[str, Any]:
    """The tree of a run file that asks a model plainly. folder: with the generation settings; None: no such folder."""
    longest = _read_json(folder / "generation_config.json").get("max_new_tokens") if folder is not None else None
    return {
        "output_dir": model,
        "model": {"name_or_path": model},
        "data": {"train": "none"},
        "train": {"global_batch_size": 1},
        "evaluate": {"max_new_tokens": longest} if isinstance(longest, int) and longest > 0 else {},
    }


def _checked(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    with tempfile.TemporaryDirectory(prefix="vlmdist-") as folder:
        file = Path(folder) / "overrides.yaml"
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            return load_run(file, overrides)
        except UserError as e:
            raise UserError([problem.removeprefix(f"{file}: ") for problem in e.problems]) from None


def _in_stored_precision(config: RunConfig, device: "torch.device", stored: str | None = None) -> RunConfig:
    """model.precision: auto is what the weights are stored in, where the device can do that.

    stored: None for what the model's configuration says.
    """
    from vlmdist.model.load import load_config
    from vlmdist.model.precision import precision_problems

    found = load_config(config.model)
    if config.model.precision != "auto":
        return config
    dtype = str(getattr(found, "dtype", None)).removeprefix("torch.")
    model = config.model.model_copy(update={"precision": stored or _PRECISIONS.get(dtype, "auto")})
    return config if precision_problems(model, device) else config.model_copy(update={"model": model})


def _precision_of_adapter(folder: Path) -> str | None:
    """vlmdist keeps adapters in the precision of the run's step."""
    from vlmdist.model.adapters import stored_weights

    dtypes = {str(dtype).removeprefix("torch.") for _, dtype in stored_weights(folder / ADAPTER_WEIGHTS).values()}
    return _PRECISIONS.get(dtypes.pop()) if len(dtypes) == 1 else None


def _as_trained(folder: Path) -> dict[str, Any]:
    """How the run held its base model, by the model card of ``vlmdist export``; {} for other folders."""
    model = _card(folder).get("model")
    if not isinstance(model, dict):
        return {}
    names = ("quantization", "quantized_parts")
    return {name: model[name] for name in names if name in model and _is_allowed(name, model[name])}


def _is_allowed(name: str, value: Any) -> bool:
    from pydantic import ValidationError

    try:
        ModelConfig.model_validate({"name_or_path": "", name: value})
    except ValidationError:
        return False
    return True


def _card(folder: Path) -> dict[str, Any]:
    """The run file in the model card of ``vlmdist export``; {} where there is none."""
    try:
        found = _CARDS_RUN_FILE.search((folder / "README.md").read_text(encoding="utf-8"))
        tree = yaml.safe_load(found[2]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
