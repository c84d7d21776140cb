"""A step of ours never waits for the device: what a GPU computes is read for a row of metrics, not for a step.

There is no GPU here, so a tensor counts as being on the device where it is one of the model's, came out of
``MicroBatch.to``, or was computed from such a one. To read one on the host is to wait for all that is queued. What
DeepSpeed and transformers read is theirs.
"""

import json
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import rank_environment
from tiny_run import make_tiny_world, tiny_run, write_run
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vlmdist.config import load_run
from vlmdist.data.collate import MicroBatch
from vlmdist.data.images.raw_pixels import Normalisation
from vlmdist.train.loop import train
from vlmdist.train.measure import Measurement
from vlmdist.train.signals import StopSignal

STEPS, LOGGING_STEPS = 6, 3
OURS = str(Path(sys.modules["vlmdist"].__file__ or "").parent)
READS = {"tolist", "cpu", "numpy", "__array__"}


class Device:
    """Which tensors are on it, and who reads them: of vlmdist, "file: line of code"."""

    def __init__(self) -> None:
        self._tensors = WeakIdKeyDictionary()
        self.reads: list[str] = []

    def add(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                self._tensors[leaf] = True

    def has(self, tree: Any) -> bool:
        return any(isinstance(leaf, torch.Tensor) and leaf in self._tensors for leaf in tree_leaves(tree))

    def note_read(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        if frames[-1].filename.startswith(OURS):
            self.reads.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")


class Reads(TorchFunctionMode):
    """Reads that are no operation of their own where all is in the host's memory anyway."""

    def __init__(self, device: Device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS and self._device.has(args):
            self._device.note_read()
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Follows the device's tensors through what is computed, and notes operations whose result the host must know."""

    def __init__(self, device: Device):
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = self._device.has((args, kwargs))
        if on_device and _is_read(func, args):
            self._device.note_read()
        result = func(*args, **(kwargs or {}))
        if on_device:
            self._device.add(result)
        return result


def _is_read(func: Any, args: Any) -> bool:
    aten = torch.ops.aten
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # a mask: how many it chooses is asked
        return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
    return func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)


class Watched(Measurement):
    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.of_steps: list[list[str]] = []

    def begin(self, t: Any) -> None:
        super().begin(t)
        self.device.add(list(t.engine.module.parameters()))
        to = MicroBatch.to

        def noted(batch: MicroBatch, device: torch.device) -> MicroBatch:
            # copies, as between memories: the batch itself stays on the host
            moved = to(batch, device)
            inputs = {name: value.clone() for name, value in moved.inputs.items()}
            positions = None if moved.positions_in_loss is None else moved.positions_in_loss.clone()
            moved = replace(moved, inputs=inputs, labels=moved.labels.clone(), positions_in_loss=positions)
            self.device.add([inputs, moved.labels, positions])
            return moved

        MicroBatch.to = noted  # type: ignore[method-assign]
        Reads(self.device).__enter__()
        Operations(self.device).__enter__()

    def step_done(self, t: Any) -> None:
        self.of_steps.append(self.device.reads)
        self.device.reads = []


@pytest.mark.parametrize("changes", [{}, {"global_batch_size": 3}], ids=["micro-steps", "placeholders"])
def test_steps_wait_for_no_device(tmp_path: Path, changes: dict[str, Any]) -> None:
    world = make_tiny_world(tmp_path / "world", num_train=60)
    options = {"logging_steps": LOGGING_STEPS, "max_steps": STEPS, **changes}
    file = write_run(tiny_run(world, tmp_path / "run", train=options), tmp_path / "run.yaml")
    out = tmp_path / "reads.json"
    command = [sys.executable, __file__, str(file), str(out)]
    env = rank_environment(PYTHONPATH=str(Path(ranks.__file__).parent))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    of_steps: list[list[str]] = json.loads(out.read_text())
    assert len(of_steps) == STEPS
    without_row = [reads for number, reads in enumerate(of_steps, 1) if number % LOGGING_STEPS]
    with_row = [reads for number, reads in enumerate(of_steps, 1) if number % LOGGING_STEPS == 0]
    assert without_row == [[]] * len(without_row)
    # the loss of the row: that the test sees what is read, too
    assert all(any("loss_sum" in read for read in reads) and len(reads) <= 2 for reads in with_row), with_row


def test_normalisation_copies_its_numbers_once() -> None:
    """They come from memory that is not pinned, for which a GPU finishes all that is queued."""
    mean = torch.tensor([[[0.5]], [[0.25]], [[0.125]]]).numpy()
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (pixels / torch.tensor(255.0) - torch.from_numpy(mean)) / torch.from_numpy(mean)
    assert torch.equal(Normalisation(255.0, mean, mean)(pixels), expected)
    copies = Copies()
    with copies:  # as unpickled from a loader worker: other objects, the same numbers
        again = Normalisation(255.0, mean.copy(), mean.copy())(pixels)
    assert torch.equal(again, expected)
    assert copies.names == []


class Copies(TorchFunctionMode):
    names: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.from_numpy, torch.as_tensor):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def main(run_file: str, out: str) -> None:
    watched = Watched()
    with StopSignal() as stop:
        train(load_run(run_file, []), stop, watched)
    Path(out).write_text(json.dumps(watched.of_steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
