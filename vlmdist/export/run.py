"""``vlmdist export``, from the run folder to the folder that others load.

1. Verify the checkpoint, and that its weights are those of the run file. With --push-to-hub, try the login.
2. In a hidden folder beside --out write the processor, then the adapter or the whole model, then the model card.
3. Rename it to --out: it is there as a whole or not at all. Then upload it.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlmdist.errors import RunFailed, UserError
from vlmdist.export.adapter import adapter_config, save_adapter
from vlmdist.export.card import base_name, model_card
from vlmdist.export.hub import Hub
from vlmdist.export.model import model_bytes, refuse_what_cannot_be_merged, save_model
from vlmdist.export.prompting import generation_settings, prompter_of, save_processor
from vlmdist.export.source import Source, open_source

_OTHER_FILES_BYTES = 64 << 20  # tokenizer, processor and card, generously


def export_run(
    run_dir: Path,
    out: Path,
    *,
    merge: bool = False,
    checkpoint: str | Path | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Write ``out``: the run's adapter, or with ``merge`` (and for runs without LoRA) the whole model.

    checkpoint: a checkpoint folder; None: the newest whole one. push_to_hub: name of a repository, made if need be.
    Returns what was written and where it went. Raises UserError for what the user can mend, RunFailed where writing or
    uploading failed; then ``out`` is whole or not there.
    """
    if private and push_to_hub is None:
        raise UserError("--private: is for a repository; name one with --push-to-hub")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: is there already; move it away or choose another folder")
    source, notes = open_source(run_dir, checkpoint)
    merged = merge or not source.has_lora
    peft_config = None if merged else adapter_config(source)
    num_bytes = model_bytes(source) if merged else source.weights_file.stat().st_size
    if merged:
        refuse_what_cannot_be_merged(source, num_bytes)
    hub = Hub(push_to_hub, private=private) if push_to_hub is not None else None
    what = "the whole model" if merged else "the adapter"
    _say(*notes, f"{what} of {source.checkpoint.name} on {base_name(source.config)}, {num_bytes / 1e9:.2f} GB")
    files = _write_whole(source, out, peft_config, num_bytes=num_bytes, title=push_to_hub or out.name)
    facts = {
        "out": str(out),
        "kind": "model" if merged else "adapter",
        "base": base_name(source.config),
        "checkpoint": source.checkpoint.name,
        "dtype": str(source.dtype).removeprefix("torch."),
        "bytes": sum(files.values()),
        "files": sorted(files),
        "commit_url": None,
    }
    if hub is not None:
        _say(f"uploading to {hub.repo} at {hub.endpoint}")
        facts["commit_url"] = hub.upload(out)
    return facts


def format_export(facts: dict[str, Any]) -> str:
    """For people: what was written, file by file, and where it was uploaded."""
    lines = [f"{facts['out']}: {facts['kind']} of {facts['base']}, {facts['dtype']}, {facts['bytes'] / 1e6:,.1f} MB"]
    lines += [f"  {name}" for name in facts["files"]]
    if facts["commit_url"]:
        lines.append(f"uploaded: {facts['commit_url']}")
    return "\n".join(lines)


def _write_whole(source: Source, out: Path, peft_config: Any, *, num_bytes: int, title: str) -> dict[str, int]:
    """Write beside ``out`` and rename; bytes of each file. Nothing is left where it fails.

    peft_config: of the adapter; None for the whole model.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: {out.parent} can't be made: {e.strerror or e}") from None
    try:
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes + _OTHER_FILES_BYTES:
            raise UserError(f"--out {out}: takes {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            staging = Path(work) / "export"
            staging.mkdir()
            _write_files(source, staging, peft_config, title)
            files = {p.relative_to(staging).as_posix(): p for p in staging.rglob("*") if p.is_file()}
            for file in files.values():
                file.chmod(0o644)  # safetensors are made readable by their owner alone
            sizes = {name: file.stat().st_size for name, file in files.items()}
            staging.rename(out)
    except PermissionError as e:
        raise UserError(f"--out {out}: {e.filename or out.parent} can't be written: {e.strerror or e}") from None
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise RunFailed(f"--out {out}: could not be written: {reason}; nothing of it is left") from None
    return sizes


def _write_files(source: Source, folder: Path, peft_config: Any, title: str) -> None:
    prompter = prompter_of(source.processor, source.config)
    generation = generation_settings(prompter, source.config)
    doubt = save_processor(prompter, folder)
    if doubt is not None:
        _say(f"the prompt of plain transformers is not shown to be the run's: {doubt} The model card says so")
    if peft_config is None:
        save_model(source, generation, folder)
    else:
        save_adapter(source, peft_config, generation, folder)
    card = model_card(source, merged=peft_config is None, title=title, doubt=doubt)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _say(*lines: str) -> None:
    print(*[f"export: {line}" for line in lines], sep="\n", file=sys.stderr, flush=True)
