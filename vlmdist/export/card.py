"""README.md of an exported folder: the model card, from what the run folder says."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlmdist.config import RunConfig
from vlmdist.data.order import mixture_length
from vlmdist.data.remote.store import redact
from vlmdist.export.markdown import escaped, fenced, in_code, table
from vlmdist.export.source import Source
from vlmdist.export.usage import usage
from vlmdist.model.adapters import PEFT_PREFIX
from vlmdist.model.families import PARTS
from vlmdist.run_folder import MANIFEST, RunFolder, read_jsonl, read_manifest
from vlmdist.train.hyperparameters import public_run_file
from vlmdist.train.state import TrainState

_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE")


def model_card(source: Source, *, merged: bool, title: str, doubt: str | None = None) -> str:
    """Markdown with the hub's front matter. doubt: why plain use isn't shown to give the run's prompts."""
    sections = [
        _front_matter(source, merged),
        f"# {escaped(title)}",
        _summary(source, merged),
        "## Use\n\n" + usage(source, merged, doubt),
        "## Data\n\n" + _data(source),
        "## What trained\n\n" + _trained(source),
        "## Scores\n\n" + _scores(source),
        "## Software\n\n" + _software(source.run),
        "## Licence\n\n" + _licence_note(source),
        "## Run file\n\n" + fenced("yaml", public_run_file(source.config)),
    ]
    return "\n\n".join(sections) + "\n"


def base_name(config: RunConfig) -> str:
    """The base model as others may read it: its name on the hub, or of its folder."""
    name = config.model.name_or_path
    return Path(name).resolve().name if Path(name).is_dir() else redact(name)


def _front_matter(source: Source, merged: bool) -> str:
    facts: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text" if source.family.sees else "text-generation",
        "tags": ["vlmdist", *(["lora"] if source.has_lora else [])],
    }
    config = source.config.model
    if not Path(config.name_or_path).is_dir():  # the hub knows no folders of this machine
        facts |= {"base_model": config.name_or_path}
        facts |= {"base_model_relation": "finetune" if merged else "adapter"}
    licence = _base_licence(source.config)
    if licence:
        facts["license"] = licence
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _summary(source: Source, merged: bool) -> str:
    config, state = source.config, TrainState.read(source.checkpoint)
    revision = f", revision {in_code(config.model.revision)}" if config.model.revision else ""
    base = in_code(base_name(config)) + revision
    kind = {
        (True, True): f"{base} with its LoRA adapters merged in",
        (True, False): f"A full fine-tune of {base}",
        (False, True): f"LoRA adapters for {base}",
    }[merged, source.has_lora]
    lines = [
        f"{kind}, made with vlmdist. Weights are {_dtype(source)}.",
        "",
        f"Trained for {state.step:,} optimizer steps of {state.global_batch_size:,} samples: "
        f"{_epochs(source, state)}{state.tokens:,} tokens, padding not counted.",
    ]
    if config.model.quantization != "none":
        held = f"{'4-bit NF4' if config.model.quantization == 'nf4' else '8-bit'} weights"
        lines += [
            "",
            f"The adapters were trained on {held} and are merged into {_dtype(source)} weights; scores of the run were "
            "made with the quantised base, so answers may differ slightly."
            if merged
            else f"The adapters were trained on {held}; load the base so, as below, for the answers of the run.",
        ]
    return "\n".join(lines)


def _epochs(source: Source, state: TrainState) -> str:
    corpora = _corpora_of_log(source.run)
    if not corpora:
        return ""
    sizes, weights = [c["samples"] for c in corpora], [c["weight"] for c in corpora]
    length = mixture_length(sizes, weights, state.cursor.epoch)
    return f"{state.cursor.epoch + state.cursor.taken / max(1, length):.2f} epochs, "


def _data(source: Source) -> str:
    fingerprints = read_manifest(source.checkpoint)["corpora"]
    known = {c["fingerprint"]: c for c in _corpora_of_log(source.run)}
    rows = []
    for corpus, fingerprint in zip(source.config.data.train, fingerprints, strict=False):
        samples = known.get(fingerprint, {}).get("samples")
        count = "?" if samples is None else f"{samples:,}"
        rows.append([in_code(redact(corpus.shards)), count, f"{corpus.weight:g}", in_code(fingerprint)])
    listed = table(["corpus", "samples", "passes an epoch", "fingerprint (SHA-256 of the index)"], rows)
    bad = len(TrainState.read(source.checkpoint).bad)
    return listed + (f"\n\n{bad:,} samples could not be used and were left out." if bad else "")


def _corpora_of_log(run: RunFolder) -> list[dict[str, Any]]:
    """fingerprint, samples and weight of each corpus, of the last start in steps.jsonl."""
    corpora: list[dict[str, Any]] = []
    for row in read_jsonl(run.steps_file):
        corpora = row["corpora"] if row.get("start") else corpora
    return corpora


def _trained(source: Source) -> str:
    adapt = source.config.adapt
    trained = dict.fromkeys(PARTS, 0)
    for name, shape in source.shapes.items():
        part = source.family.part_of(name.removeprefix(PEFT_PREFIX))
        if part is not None:
            trained[part] += math.prod(shape)
    there = [part for part in PARTS if getattr(source.family, part)]
    rows = [[part.replace("_", " "), str(getattr(adapt, part)), f"{trained[part]:,}"] for part in there]
    listed = table(["part", "training", "trained parameters"], rows)
    if not source.has_lora:
        return listed
    targets = adapt.lora.target_modules
    named = "all linear layers of these parts" if targets == "all-linear" else ", ".join(map(in_code, targets))
    return listed + (
        f"\n\nLoRA: rank {adapt.lora.r}, alpha {adapt.lora.alpha:g}, dropout {adapt.lora.dropout:g}, "
        f"bias {adapt.lora.bias}, on {named}."
    )


def _scores(source: Source) -> str:
    digest = hashlib.sha256((source.checkpoint / MANIFEST).read_bytes()).hexdigest()
    rows = []
    for name, scores, identity in _evaluations(source.run.eval_dir):
        checkpoint = identity.get("checkpoint")
        of = "another checkpoint"
        if checkpoint is None:
            of = "base model" if "checkpoint" in identity else "unknown"
        elif checkpoint.get("manifest_sha256") == digest:
            of = "**this model**"
        fields = ", ".join(f"{escaped(f)} {_figure(v.get('score'))}" for f, v in scores.get("by_field", {}).items())
        rows.append(
            [in_code(name), of, in_code(str(scores.get("metric"))), _figure(scores.get("score")), fields or "-"]
            + [str(scores.get("num_samples")), str(scores.get("num_errors"))]
        )
    if not rows:
        return "No evaluation was found in the run folder."
    return table(["evaluation", "of", "metric", "score", "by field", "samples", "failed"], rows)


def _evaluations(eval_dir: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, scores.json and evaluation.json ({} where missing) of every finished evaluation; odd files are left out."""
    for file in sorted(eval_dir.glob("*/scores.json")):
        scores, identity = _read_object(file), _read_object(file.with_name("evaluation.json"))
        if scores is not None:
            yield file.parent.name, scores, identity or {}


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _software(run: RunFolder) -> str:
    try:
        start = json.loads(run.environment_file.read_text(encoding="utf-8"))[-1]
        packages, python = dict(start["packages"]), str(start["python"])
    except (OSError, ValueError, LookupError, TypeError):
        return "Not recorded."
    return ", ".join([f"Python {python}", *(f"{name} {version}" for name, version in packages.items())])


def _licence_note(source: Source) -> str:
    config = source.config
    folder, base = Path(config.model.name_or_path), in_code(base_name(config))
    licence = _base_licence(config)
    said = f"Its model card names the licence {in_code(licence)}." if licence else "Its folder names no licence."
    if not folder.is_dir():
        said = f"See https://huggingface.co/{config.model.name_or_path}."
    files = [name for name in _LICENCE_FILES if (folder / name).is_file()]
    if files:
        said += f" Its folder holds {', '.join(map(in_code, files))}; pass them on with these weights."
    return (
        f"These weights are made from {base} and stay under its licence. {said} The licence of the training data comes "
        "on top."
    )


def _base_licence(config: RunConfig) -> str | None:
    """``license`` in the front matter of a base folder's own model card."""
    try:
        text = (Path(config.model.name_or_path) / "README.md").read_text(encoding="utf-8")
        found = re.match(r"---\n(.*?)\n---\s", text, re.DOTALL)
        facts = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return licence if isinstance(licence, str) else None


def _dtype(source: Source) -> str:
    return str(source.dtype).removeprefix("torch.")


def _figure(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"
