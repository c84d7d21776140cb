"""The loaders that loaders.py compares, each used as its documentation shows, behind one interface.

Here the frame, vlmdist, and what its environment has; loader_peers.py has the others. A sample is (number, image,
conversation). Raw: JPEG and JSON as bytes. Decoded: 336 x 336 uint8, and the conversation as Python objects. All
shuffle, in batches of BATCH.
"""

import functools
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BATCH = 16
SHUFFLE_BUFFER = 1000
SIDE = 336
SEED = 7

Sample = tuple[int, Any, Any]
Batch = tuple[list[int], Any, list[Any]]  # numbers, images, conversations


class Loader:
    """One loader over one epoch. ``load`` imports; ``open`` and ``state`` belong together, in one process."""

    name = ""
    is_peer = True
    """Runs in the environment of the peers."""
    how_to_resume = "state"

    def load(self) -> None:
        raise NotImplementedError

    def load_decoder(self) -> None:
        import numpy  # noqa: F401
        import PIL.Image  # noqa: F401

    def prepare(self, tars: Path, folder: Path) -> None:
        """Write the source in the loader's own form; nothing where it reads tars."""

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        raise NotImplementedError

    def state(self, taken: int) -> Any:
        """What a checkpoint keeps after ``taken`` samples."""
        return taken


def decode_by_pil(jpeg: bytes) -> Any:
    import numpy as np
    from PIL import Image

    return np.array(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def finish(number: int, jpeg: bytes, record: bytes | str, decoded: bool) -> Sample:
    return (number, decode_by_pil(jpeg), json.loads(record)) if decoded else (number, jpeg, record)


def collate(samples: Iterable[Sample]) -> Batch:
    numbers, images, conversations = map(list, zip(*samples, strict=True))
    if not isinstance(images[0], bytes):
        import numpy as np
        import torch

        images = torch.from_numpy(np.stack(images))
    return numbers, images, conversations


def collate_rows(rows: Iterable[dict[str, Any]], decoded: bool) -> Batch:
    return collate(finish(int(row["number"]), row["image"], row["record"], decoded) for row in rows)


def torch_loader(dataset: Any, workers: int, collate_fn: Callable[..., Batch] = collate, **options: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate_fn, **options)


def read_tars(tars: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, JPEG, record) of the source."""
    for file in sorted(tars.glob("*.tar")):
        with tarfile.open(file) as tar:
            members: dict[str, bytes] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                members[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
                if len(members) == 2:
                    yield int(key), members["jpg"], members["json"]
                    members = {}


# --- vlmdist ----------------------------------------------------------------------------------------------------------


class OurSamples:
    """Raw by ``Corpus.read_bytes``, which checks the checksums; decoded by ``Corpus.read``, as training reads."""

    def __init__(self, tars: Path, decoded: bool):
        from vlmdist.data.shards.corpus import Corpus

        self.corpus = Corpus.open(tars)
        self.decoded = decoded

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, i: int) -> Sample:
        if self.decoded:
            sample = self.corpus.read(i)
            return int(sample.key), _decode(sample.images[0]), sample.messages
        record, (jpeg,) = self.corpus.read_bytes(i)
        return int(self.corpus.key(i)), jpeg, record


class OurParsedSamples(OurSamples):
    """Raw by ``Corpus.read`` too: the conversation parsed and checked, which no other loader does."""

    def __getitem__(self, i: int) -> Sample:
        if self.decoded:
            return super().__getitem__(i)
        sample = self.corpus.read(i)
        return int(sample.key), sample.images[0], sample.messages


def _decode(jpeg: bytes) -> Any:
    from vlmdist.data.images.decode import decode_image
    from vlmdist.data.images.torch_resize import resize

    return resize(decode_image(jpeg).transpose(2, 0, 1), SIDE, SIDE, "bicubic").transpose(1, 2, 0)  # as it lies


class Vlmdist(Loader):
    name = "vlmdist"
    is_peer = False
    samples: type[OurSamples] = OurSamples

    def load(self) -> None:
        import torch
        import torch.utils.data

        import vlmdist.data.order
        import vlmdist.data.shards.corpus  # noqa: F401

        torch.set_num_threads(1)

    def load_decoder(self) -> None:
        import vlmdist.data.images.decode
        import vlmdist.data.images.torch_resize  # noqa: F401

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        from vlmdist.data.order import epoch_order

        dataset = self.samples(tars, decoded)
        return torch_loader(dataset, workers, sampler=epoch_order(len(dataset), SEED, 0)[state or 0 :].tolist())


class VlmdistParsed(Vlmdist):
    name = "vlmdist, conversation checked"
    samples = OurParsedSamples


# --- webdataset and datasets ------------------------------------------------------------------------------------------


class Webdataset(Loader):
    name = "webdataset"
    is_peer = False
    how_to_resume = "read again up to there, all seeds by hand"

    def load(self) -> None:
        import torch
        import webdataset  # noqa: F401

        torch.set_num_threads(1)

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        import webdataset

        samples = self.shuffled(tars, webdataset.single_node_only)
        if state:
            samples = samples.slice(state, None)
        dataset = samples.map(functools.partial(_from_webdataset, decoded=decoded))
        return torch_loader(dataset, workers)

    def shuffled(self, tars: Path, nodesplitter: Callable[..., Any]) -> Any:
        import webdataset

        urls = sorted(map(str, tars.glob("*.tar")))
        options = {"shardshuffle": len(urls), "detshuffle": True, "seed": SEED, "nodesplitter": nodesplitter}
        dataset = webdataset.WebDataset(urls, empty_check=False, **options)
        return dataset.shuffle(SHUFFLE_BUFFER, rng=random.Random(SEED))


def _from_webdataset(sample: dict[str, Any], decoded: bool) -> Sample:
    return finish(int(sample["__key__"]), sample["jpg"], sample["json"], decoded)


class HuggingFaceStreaming(Loader):
    name = "datasets, parquet, streaming"
    is_peer = False

    def load(self) -> None:
        import datasets
        import torch

        datasets.disable_progress_bars()
        torch.set_num_threads(1)

    def prepare(self, tars: Path, folder: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        rows = [{"number": n, "image": jpeg, "record": record.decode()} for n, jpeg, record in read_tars(tars)]
        folder.mkdir(exist_ok=True)
        for part in range(8):
            table = pyarrow.Table.from_pylist(rows[part::8])
            parquet.write_table(table, folder / f"{part}.parquet", row_group_size=100)

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        import datasets

        files = sorted(map(str, folder.glob("*.parquet")))
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        self.dataset = rows.shuffle(seed=SEED, buffer_size=SHUFFLE_BUFFER)
        if state:
            self.dataset.load_state_dict(state)
        return torch_loader(self.dataset, workers, functools.partial(collate_rows, decoded=decoded))

    def state(self, taken: int) -> Any:
        return self.dataset.state_dict()


class HuggingFaceArrow(HuggingFaceStreaming):
    name = "datasets, Arrow, map style"

    def prepare(self, tars: Path, folder: Path) -> None:
        import datasets

        rows = ({"number": n, "image": jpeg, "record": record.decode()} for n, jpeg, record in read_tars(tars))
        datasets.Dataset.from_list(list(rows)).save_to_disk(folder)

    def open(self, tars: Path, folder: Path, decoded: bool, workers: int, state: Any = None) -> Iterable[Batch]:
        import datasets

        rows = datasets.load_from_disk(folder).shuffle(seed=SEED)
        rows = rows.select(range(state or 0, len(rows)))
        return torch_loader(rows, workers, functools.partial(collate_rows, decoded=decoded))

    def state(self, taken: int) -> Any:
        return taken
