"""What megatron-energon calls for each sample and batch of loaders.py; imported where it is installed."""

from typing import Any

from loader_sides import collate, finish
from megatron.energon import Batch, Cooker, DefaultTaskEncoder, Sample, basic_sample_keys, edataclass, stateless


@edataclass
class Item(Sample):
    number: int
    image: Any
    conversation: Any


@edataclass
class ItemBatch(Batch):
    content: Any


@stateless
def cook_raw(sample: dict[str, Any]) -> Item:
    return _cook(sample, decoded=False)


@stateless
def cook_decoded(sample: dict[str, Any]) -> Item:
    return _cook(sample, decoded=True)


def _cook(sample: dict[str, Any], decoded: bool) -> Item:
    number, image, conversation = finish(int(sample["__key__"].split("/")[-1]), sample["jpg"], sample["json"], decoded)
    return Item(**basic_sample_keys(sample), number=number, image=image, conversation=conversation)


class _Task(DefaultTaskEncoder):  # type: ignore[misc]
    decoder = None  # bytes stay bytes; cooks decode

    @stateless
    def batch(self, samples: list[Item]) -> ItemBatch:
        return ItemBatch.from_samples(samples, content=collate((s.number, s.image, s.conversation) for s in samples))


class RawTask(_Task):
    cookers = [Cooker(cook_raw)]  # noqa: RUF012 - as energon's documentation writes it


class DecodedTask(_Task):
    cookers = [Cooker(cook_decoded)]  # noqa: RUF012
