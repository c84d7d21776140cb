"""A TensorBoard event file that is whole after every call.

torch's SummaryWriter writes in a thread: it ends with a traceback where the disk is full, and what it had not written
yet is lost where the process is killed. Here a full disk is the OSError of the call, as for metrics.jsonl.
Half a second to import, most of it tensorboard's: only rank 0 does, and only when it begins to write.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary


class EventFile:
    """A file of its own for each start of a run."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_scalars(self, step: int, values: dict[str, int | float]) -> None:
        self._add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def add_text(self, step: int, tag: str, markdown: str) -> None:
        self._add(step, summary.text(tag, markdown))  # type: ignore[no-untyped-call]

    def add_image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """uint8 [height, width, 3]."""
        self._add(step, summary.image(tag, pixels, dataformats="HWC"))  # type: ignore[no-untyped-call]

    def add_hyperparameters(self, values: Mapping[str, bool | int | float | str]) -> None:
        """What the HParams page compares runs by, beside their newest scalars; of a run's starts it takes the first.

        No ``Experiment``, which would fix the columns for all runs of the page: they are found from the runs.
        """
        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            setattr(start.hparams[name], f"{kind}_value", value)
        self._add_session(hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))

    def add_hyperparameters_end(self) -> None:
        """The run is done."""
        end = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=time.time())
        self._add_session(hparams.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))

    def _add_session(self, tag: str, data: HParamsPluginData) -> None:
        data.version = hparams.PLUGIN_DATA_VERSION
        of_plugin = SummaryMetadata.PluginData(plugin_name=hparams.PLUGIN_NAME, content=data.SerializeToString())
        self._add(0, Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=of_plugin))]))

    def _add(self, step: int, values: Summary) -> None:
        self._append(Event(wall_time=time.time(), step=step, summary=values))

    def _append(self, event: Event) -> None:
        """In one write, so that a kill leaves at most the last record cut."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())  # type: ignore[no-untyped-call]
        with open(self._path, "ab") as f:
            f.write(record.getbuffer())
