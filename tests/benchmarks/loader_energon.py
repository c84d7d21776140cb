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
def cook(sample: dict[str, Any]) -> Item:
    number = int(sample["__key__"].split("/")[-1])
    return Item(**basic_sample_keys(sample), number=number, image=sample["jpg"], conversation=sample["json"])


class Task(DefaultTaskEncoder):  # type: ignore[misc]
    decoder = None  # bytes stay bytes in the shuffle buffer
    cookers = [Cooker(cook)]  # noqa: RUF012 - as energon's documentation writes it

    def __init__(self, decoded: bool):
        super().__init__()
        self.decoded = decoded

    @stateless
    def encode_sample(self, sample: Item) -> Item:
        _, image, conversation = finish(sample.number, sample.image, sample.conversation, self.decoded)
        return Item.derive_from(sample, number=sample.number, image=image, conversation=conversation)

    @stateless
    def batch(self, samples: list[Item]) -> ItemBatch:
        return ItemBatch.from_samples(samples, content=collate((s.number, s.image, s.conversation) for s in samples))
