"""Which weights are evaluated: a run's checkpoint, an adapter folder of peft, or the run file's model as it is."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig, load_run
from vlmdist.errors import UserError
from vlmdist.run_folder import ADAPTER_WEIGHTS, RunFolder, choose_checkpoint

NO_MATTER_TO_ANSWERS = {"init_from": True, "lora": {"dropout"}}
"""Of the adapt section: how the weights came to be, which a checkpoint's own manifest stands for."""


@dataclass(frozen=True)
class Subject:
    """At most one is set; with none, the base model is evaluated."""

    checkpoint: Path | None = None
    """Verified checkpoint of a run."""
    adapter: Path | None = None
    """Folder of ``vlmdist export`` or peft."""

    @property
    def folder(self) -> Path | None:
        return self.checkpoint or self.adapter

    @property
    def name(self) -> str:
        return "base" if self.folder is None else self.folder.resolve().name


def choose_subject(
    config: RunConfig, checkpoint: str | os.PathLike[str] | None = None, base: bool = False
) -> tuple[Subject, list[str]]:
    """What to evaluate and what the user should know about the choice.

    checkpoint: "best", "latest", a checkpoint folder or an adapter folder; None: the run's newest whole
    checkpoint. UserError where there is none, or where it was made with another adapt section.
    """
    if base and checkpoint is not None:
        raise UserError("give either --base or --checkpoint, not both")
    if base:
        return Subject(), []
    if checkpoint is not None and _is_adapter(Path(checkpoint)):
        return Subject(adapter=Path(checkpoint).absolute()), []
    found, notes = choose_checkpoint(RunFolder(Path(config.output_dir)), checkpoint)
    _refuse_other_adapters(config, found)
    return Subject(checkpoint=found), notes


def adapters_of(config: RunConfig) -> dict[str, Any]:
    """The adapt section, as far as answers depend on it."""
    return config.adapt.model_dump(exclude=NO_MATTER_TO_ANSWERS)  # type: ignore[arg-type]


def _is_adapter(folder: Path) -> bool:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return True
    if (folder / "adapter_model.bin").exists():
        raise UserError(f"{folder}: its adapter_model.bin is a pickle, which is not loaded; save it as safetensors")
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder}: is a whole model, not a checkpoint; evaluate it with --base model.name_or_path={folder}"
        )
    return False


def _refuse_other_adapters(config: RunConfig, checkpoint: Path) -> None:
    """Under another alpha, say, the weights would load and give answers that nobody trained."""
    made, now = adapters_of(load_run(checkpoint)), adapters_of(config)
    changed = [name for name in now if made[name] != now[name]]
    if changed:
        raise UserError(
            f"{checkpoint}: was made with another adapt section ({', '.join(changed)} differ); evaluate it with the "
            "run.yaml of its own run folder"
        )
