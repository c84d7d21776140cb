"""The run file as others see it: without the secrets of its URLs, or as flat values that compare between runs."""

from collections.abc import Iterator
from typing import Any

import yaml

from vlmdist.config import RunConfig
from vlmdist.data.remote.store import redact
from vlmdist.train.changes import HARMLESS

Value = bool | int | float | str


def public_run_file(config: RunConfig) -> str:
    """The run file in full, URLs without user, password and query, commands without arguments."""
    return yaml.safe_dump(_public(config.model_dump()), sort_keys=False, allow_unicode=True)


def settings(config: RunConfig) -> dict[str, Value]:
    """Every field by its dotted path; one that is null is left out, a list of names is one text."""
    return dict(_flat("", _public(config.model_dump())))


def hyperparameters(config: RunConfig, world_size: int) -> dict[str, Value]:
    """The fields that change a number of the training, and the number of ranks."""
    found = {path: value for path, value in settings(config).items() if path not in HARMLESS}
    return {**found, "world_size": world_size}


def _public(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _public(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_public(v) for v in node]
    return redact(node) if isinstance(node, str) else node


def _flat(path: str, node: Any) -> Iterator[tuple[str, Value]]:
    if isinstance(node, list) and all(isinstance(v, str) for v in node):
        node = ", ".join(node)
    if isinstance(node, dict | list):
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        for name, value in inner:
            yield from _flat(f"{path}.{name}" if path else str(name), value)
    elif node is not None:
        yield path, node
