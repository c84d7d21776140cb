"""mosaicml-streaming, litdata and megatron-energon for loaders.py, each used as its documentation shows."""

import functools
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loader_sides import (
    BATCH,
    SEED,
    SHUFFLE_BUFFER,
    Batch,
    HuggingFaceArrow,
    HuggingFaceStreaming,
    Loader,
    Vlmdist,
    VlmdistParsed,
    Webdataset,
    collate_rows,
    read_tars,
)


class MosaicStreaming(Loader):
    name = "mosaicml-streaming"

    def load(self) -> None:
        import torch

        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            _stand_in_for_torchvision()
        import streaming  # noqa: F401

        torch.set_num_threads(1)

    def prepare(self, tars: Path, folder: Path) -> None:
        import streaming

        columns = {"number": "int", "image": "bytes", "record": "bytes"}
        with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
            for number, jpeg, record in read_tars(tars):
                writer.write({"number": number, "image": jpeg, "record": record})

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        import streaming

        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)
        self.loader = streaming.StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=workers, collate_fn=functools.partial(collate_rows, decoded=decoded)
        )
        if state:
            self.loader.load_state_dict(state)
        return self.loader

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()


def _stand_in_for_torchvision() -> None:
    """streaming takes two names from it for its vision datasets; its wheels don't load beside a torch for CPUs."""
    import importlib.machinery
    import types

    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


class Litdata(Loader):
    name = "litdata"

    def load(self) -> None:
        import litdata  # noqa: F401
        import torch

        torch.set_num_threads(1)

    def prepare(self, tars: Path, folder: Path) -> None:
        import litdata

        litdata.optimize(
            _to_litdata, sorted(map(str, tars.glob("*.tar"))), str(folder), chunk_bytes="64MB", num_workers=1
        )

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        import litdata

        dataset = litdata.StreamingDataset(str(folder), shuffle=True, seed=SEED, drop_last=False)
        self.loader = litdata.StreamingDataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=workers,
            collate_fn=functools.partial(_collate_views, decoded=decoded),
        )
        if state:
            self.loader.load_state_dict(state)
        return self.loader

    def state(self, taken: int) -> Any:
        return self.loader.state_dict()


def _collate_views(rows: Iterable[dict[str, Any]], decoded: bool) -> Batch:
    """Its bytes are views into a chunk, which neither pickle nor json takes."""
    return collate_rows(({name: bytes(v) if name != "number" else v for name, v in r.items()} for r in rows), decoded)


def _to_litdata(tar: str) -> Iterator[dict[str, Any]]:
    with tarfile.open(tar) as opened:
        members = {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr]
    for key in sorted({name.partition(".")[0] for name in members}):
        yield {"number": int(key), "image": members[f"{key}.jpg"], "record": members[f"{key}.json"]}


class Energon(Loader):
    name = "megatron-energon"

    def load(self) -> None:
        import loader_energon  # noqa: F401
        import torch

        torch.set_num_threads(1)

    def prepare(self, tars: Path, folder: Path) -> None:
        folder.mkdir()
        for tar in tars.glob("*.tar"):
            os.link(tar, folder / tar.name)
        command = [str(Path(sys.executable).with_name("energon")), "prepare", str(folder), "--non-interactive"]
        options = ["--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        from loader_energon import Task
        from megatron import energon

        config = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
        dataset = energon.get_train_dataset(
            folder,
            worker_config=config,
            batch_size=BATCH,
            shuffle_buffer_size=SHUFFLE_BUFFER,
            max_samples_per_sequence=100,
            task_encoder=Task(decoded),
        )
        self.loader = energon.get_savable_loader(dataset)
        if state:
            self.loader.restore_state_rank(state)
        return (batch.content for batch in self.loader)

    def state(self, taken: int) -> Any:
        return self.loader.save_state_rank()


LOADERS: tuple[Loader, ...] = (
    Vlmdist(),
    VlmdistParsed(),
    Webdataset(),
    HuggingFaceStreaming(),
    HuggingFaceArrow(),
    MosaicStreaming(),
    Litdata(),
    Energon(),
)
