"""What ``vlmdist bench`` asks of the loop: the same steps as in training, with nothing kept of them but figures."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlmdist.data.order import Cursor
from vlmdist.data.stream import Step, TrainStream
from vlmdist.model.peaks import device_peak
from vlmdist.model.precision import resolve_dtype
from vlmdist.train.start import Training

_STEPS_TRACED = 3


class Measurement:
    """Of one start of a run; no checkpoint is written.

    repeat_after: from this step on the micro-batches of the steps up to it come again and again, so that no sample is
    read, decoded or tokenized; None: never. trace_dir: folder for a trace of the last steps by torch's profiler.
    """

    def __init__(self, repeat_after: int | None = None, trace_dir: Path | None = None):
        self._repeat_after, self._trace_dir = repeat_after, trace_dir
        self._profiler: Any = None
        self._first_traced = self._total_steps = 0
        self._rank = 0
        self.facts: dict[str, Any] = {}
        """Of this rank's device and model, for the result."""

    def begin(self, t: Training) -> None:
        """Before the first step (all ranks)."""
        if self._repeat_after is not None:
            t.stream = _Repeated(t.stream, max(1, self._repeat_after))  # type: ignore[assignment]
        self._rank, self._total_steps = t.world.rank, t.stream.total_steps
        self._first_traced = max(1, self._total_steps - _STEPS_TRACED + 1)
        peak = device_peak(t.world.device, resolve_dtype(t.config.model.precision, t.world.device))
        t.peak_flops_per_s = peak.flops_per_s
        on_gpu = t.world.device.type == "cuda"
        if on_gpu:
            # the peak is to be the steps': weights drawn at random are there in 16 bits before they are quantized
            torch.cuda.reset_peak_memory_stats(t.world.device)
        self.facts = {
            "device": torch.cuda.get_device_name(t.world.device) if on_gpu else "CPU",
            "peak_tflops": round(peak.flops_per_s / 1e12, 4),
            "peak_source": peak.source,
            "samples_per_step": t.state.global_batch_size,
            "weights_gb": round(_num_bytes(t.engine.module.parameters()) / 1e9, 4),
        }

    def step_done(self, t: Training) -> None:
        """After every step."""
        number = t.state.step
        if number == self._total_steps:
            self.facts["optimizer_gb"] = round(_optimizer_bytes(t.engine.optimizer) / 1e9, 4)
        if self._trace_dir is None:
            return
        if number == self._first_traced - 1 or (number == 1 and self._first_traced == 1):
            from torch.profiler import profile

            self._profiler = profile()  # CPU, and the GPU where there is one
            self._profiler.start()
        elif number == self._total_steps and self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._trace_dir / f"trace-rank-{self._rank:04d}.json"))


class _Repeated:
    """A stream whose first steps come again and again. All else is the stream's."""

    def __init__(self, stream: TrainStream, num_kept: int):
        self._stream, self._num_kept = stream, num_kept

    def steps(self, cursor: Cursor, steps_done: int) -> Iterator[Step]:
        kept: list[Step] = []
        for step in self._stream.steps(cursor, steps_done):
            kept.append(step)
            yield step
            if len(kept) == self._num_kept:
                break  # the loader's workers end here
        place = (kept[-1].next_cursor, kept[-1].number)
        for i, plan in enumerate(self._stream.plans(*place)):
            again = kept[i % len(kept)]
            yield replace(again, number=plan.number, cursor=plan.cursor, next_cursor=plan.next_cursor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _num_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer_bytes(optimizer: Any) -> int:
    """Adam's moments on this rank, and the fp32 copy of its part of the weights where DeepSpeed keeps one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    moments = [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    masters = getattr(optimizer, "single_partition_of_fp32_groups", [])
    return _num_bytes([*moments, *masters])
