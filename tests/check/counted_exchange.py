"""One rank of a run whose collectives are counted: what DeepSpeed really moves in a step.

    torchrun ... counted_exchange.py RUN.yaml COUNTED.json

Rank 0 writes [{"step": N, "collective": NAME, "bytes": bytes of the whole tensor, "calls": N}, ...], by the step in
which they were called; step 1 also has what is called before it.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm.torch import TorchBackend

from vlmdist.config import load_run
from vlmdist.train.loop import train
from vlmdist.train.measure import Measurement
from vlmdist.train.signals import StopSignal
from vlmdist.train.start import Training

COUNTED = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter", "reduce")
SMALL_BYTES = 256
"""Norms and flags are no gradients."""


class Counting(Measurement):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.num_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        for name in COUNTED:
            setattr(TorchBackend, name, self._counted(name, getattr(TorchBackend, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(backend: Any, *arguments: Any, **keywords: Any) -> Any:
            whole = max(_num_bytes(a) for a in (*arguments, *keywords.values()))
            if whole > SMALL_BYTES:
                self.num_bytes[name] += whole
                self.calls[name] += 1
            return call(backend, *arguments, **keywords)

        return counted

    def step_done(self, t: Training) -> None:
        super().step_done(t)
        for name, num_bytes in self.num_bytes.items():
            self.rows.append({"step": t.state.step, "collective": name, "bytes": num_bytes, "calls": self.calls[name]})
        self.num_bytes.clear()
        self.calls.clear()


def _num_bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_num_bytes, argument)) if isinstance(argument, list | tuple) else 0


def main(run_file: str, out: str) -> None:
    counting = Counting()
    with StopSignal() as stop:
        train(load_run(run_file), stop, counting)
    if counting._rank == 0:
        Path(out).write_text(json.dumps(counting.rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
