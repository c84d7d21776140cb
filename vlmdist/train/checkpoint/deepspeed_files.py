"""DeepSpeed's reading and writing of files, taken over: what it would write is handed out, what it reads is safe.

``FileExchange`` is the CheckpointEngine of a DeepSpeed engine (deepspeed/runtime/checkpoint_engine). It writes nothing
itself, so DeepSpeed's save has no disk in it and no rank can be left waiting in its barriers by another's full disk.
It unpickles tensors, plain values and three classes of DeepSpeed's, nothing else.
"""

import functools
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from vlmdist.errors import RunFailed

_torch_load = torch.load
_WEIGHTS_ELSEWHERE = "vlmdist_in_trainable_safetensors"
_MASTERS = "single_partition_of_fp32_groups"
_MASTERS_ELSEWHERE = "vlmdist_masters_are_the_weights"


class FileExchange(CheckpointEngine):  # type: ignore[misc]
    """Between DeepSpeed and our files."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self._engine = engine
        self.collected: dict[str, Any] = {}
        """Path -> tree, of the save in progress; the trained weights, which have a file of their own, are left out."""
        self.weights: Mapping[str, torch.Tensor] = {}
        """Trained weights by name: what is left out on saving."""
        self.weights_file: Path | None = None
        """Where they are when DeepSpeed loads; None: nothing is missing in what it loads."""

    def create(self, info: Any) -> None:
        self.collected = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made by rank 0 alone."""

    def save(self, state_dict: Any, path: str) -> None:
        self.collected[path] = self._without_masters(self._without_weights(state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        """DeepSpeed's state with the tensors that are stored once put back where it expects them."""
        tree = load_safely(path)
        names = tree.pop(_WEIGHTS_ELSEWHERE, [])
        if names and self.weights_file is not None:
            from safetensors import safe_open

            with safe_open(self.weights_file, "pt") as f:
                tree["module"].update((name, f.get_tensor(name)) for name in names)
        optimizer_state = tree.get("optimizer_state_dict") or {}
        if optimizer_state.pop(_MASTERS_ELSEWHERE, False):
            optimizer_state[_MASTERS] = self._masters_from_weights()
        return tree

    def commit(self, info: Any) -> bool:
        return True

    def _without_weights(self, state: dict[str, Any]) -> dict[str, Any]:
        module = state.get("module")
        if not module:
            return state
        # under ZeRO-3 the module holds empty placeholders, which DeepSpeed wants back as they are
        left_out = [n for n, w in module.items() if n in self.weights and w.shape == self.weights[n].shape]
        kept = type(module)((n, w) for n, w in module.items() if n not in set(left_out))
        return {**state, "module": kept, _WEIGHTS_ELSEWHERE: left_out}

    def _without_masters(self, state: dict[str, Any]) -> dict[str, Any]:
        """In fp32 the optimizer's own copy of the weights (stages 1 and 2) is the weights."""
        optimizer_state = state.get("optimizer_state_dict") or {}
        if _MASTERS not in optimizer_state or any(w.dtype != torch.float32 for w in self.weights.values()):
            return state
        return {**state, "optimizer_state_dict": {**optimizer_state, _MASTERS: [], _MASTERS_ELSEWHERE: True}}

    def _masters_from_weights(self) -> list[torch.Tensor]:
        """This rank's, from the weights that DeepSpeed has loaded just before."""
        optimizer = self._engine.optimizer
        optimizer._restore_from_bit16_weights()
        masters = optimizer._get_groups_without_padding(optimizer.single_partition_of_fp32_groups)
        return [m.detach().cpu().clone() for m in masters]


def lacks_masters(state: dict[str, Any]) -> bool:
    """Whether a rank's file was saved without its fp32 copies of the weights."""
    return bool(state["optimizer_state_dict"].get(_MASTERS_ELSEWHERE))


def restore_masters(states: Sequence[dict[str, Any]], weights: Mapping[str, torch.Tensor]) -> None:
    """Put the fp32 copies that were left out back into the optimizer states of all ranks, given in rank order.

    A rank's part of a group is a run of fragments of parameters; what one rank begins, the next ones go on with.
    """
    used = dict.fromkeys(weights, 0)
    for state in states:
        optimizer_state = state["optimizer_state_dict"]
        optimizer_state.pop(_MASTERS_ELSEWHERE)
        masters = []
        for fragments in optimizer_state["param_slice_mappings"]:
            master = torch.zeros(max((f.start + f.numel for f in fragments.values()), default=0))
            for name, fragment in fragments.items():
                piece = weights[name].reshape(-1)[used[name] : used[name] + fragment.numel]
                master[fragment.start : fragment.start + fragment.numel] = piece
                used[name] += fragment.numel
            masters.append(master)
        optimizer_state[_MASTERS] = masters


def load_safely(path: str | os.PathLike[str], **ignored: Any) -> Any:
    """torch.load for DeepSpeed's files that runs no code of theirs; RunFailed where one holds some."""
    try:
        with torch.serialization.safe_globals(_known_classes()):
            return _torch_load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise RunFailed(
            f"{path} holds more than DeepSpeed's state and is not opened: {str(e).splitlines()[0]}"
        ) from None


@functools.cache
def _known_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
