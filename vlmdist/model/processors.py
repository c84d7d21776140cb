"""A model's processor, as the loss mask and the micro-batches need it.

1. Text comes out as it went in, but for image places that become image tokens. PaliGemma's and Fuyu's own processors
   write around it (the image's place, bos, a new line, the mark of the answer); here the chat template writes all that.
2. The first dimension of every image input counts images, tiles or patches, so that those of several samples can be put
   one after the other. LLaVA-NeXT, Idefics3 and SmolVLM pad theirs to a rectangle of images by tiles.
3. No video processor where torchvision is missing: it can't be imported then, and there is no build of torchvision
   beside a torch for CPUs. vlmdist trains on images; the processors of families that take videos too (InternVL,
   Qwen-VL, SmolVLM) are made without, and their other code runs unchanged.
"""

import copy
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from typing import Any


class ImageTextProcessor:
    """transformers' AutoProcessor, with what this module's text says."""

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> Any:
        return adapted(plain_processor(source, **options))


def plain_processor(source: str | os.PathLike[str], **options: Any) -> Any:
    """As transformers itself loads it; without its video processor where that can't be had."""
    from transformers import AutoProcessor

    processor_class = None
    if importlib.util.find_spec("torchvision") is None:
        processor_class = _class_of(source, **options)
    if processor_class is not None and processor_class.get_attributes()[-1] == "video_processor":
        return without_videos(processor_class).from_pretrained(source, **options)
    return AutoProcessor.from_pretrained(source, **options)


def adapted(processor: Any) -> Any:
    """The same processor, changed where its family needs it."""
    change = _CHANGES.get(type(processor).__name__)
    if change is not None:
        processor.__class__ = _changed(change, type(processor))  # type: ignore[arg-type]
    return processor


class _TextAsItIs:
    """ProcessorMixin's own call and layout, in place of a processor's that adds to the text."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        from transformers.processing_utils import ProcessorMixin

        return ProcessorMixin.__call__(self, *inputs, **options)  # type: ignore[arg-type]

    def prepare_inputs_layout(self, *inputs: Any, **options: Any) -> Any:
        from transformers.processing_utils import ProcessorMixin

        return ProcessorMixin.prepare_inputs_layout(self, *inputs, **options)  # type: ignore[arg-type]


class _PaliGemma(_TextAsItIs):
    sees_question_both_ways = True
    """Every token of the question sees all of it; answers are causal. The model is told by token_type_ids 0 and 1; with
    zeros alone, as the processor gives them, answers would see what they have yet to say.
    https://arxiv.org/abs/2407.07726, figure 2"""


class _Fuyu(_TextAsItIs):
    def _process_images(self, images: Any, **options: Any) -> Any:
        """[P, patch pixels] as pixel_values, the name that stays."""
        options["return_legacy_image_output"] = False
        own = self.image_processor  # type: ignore[has-type]
        self.image_processor = _fuyu_patches_as_tensors(own)
        try:
            return super()._process_images(images, **options)  # type: ignore[misc]
        finally:
            self.image_processor = own

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[tuple[int, int]] = (), **options: Any) -> Any:
        """Tokens and patches of images of (height, width); Fuyu's own makes a picture of zeros for each."""
        from transformers.processing_utils import MultiModalData

        image_processor = self.image_processor
        largest, patch = image_processor.size, image_processor.patch_size
        tokens, patches = [], []
        for height, width in image_sizes:
            scale = min(1.0, largest["height"] / height, largest["width"] / width)
            rows = math.ceil(int(height * scale) / patch["height"])
            columns = math.ceil(int(width * scale) / patch["width"])
            tokens.append(rows * (columns + 1) + 1)  # a mark at the end of each row, bos behind the image
            patches.append(rows * columns)
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)


def _fuyu_patches_as_tensors(image_processor: Any) -> Any:
    """Without torchvision the image processor cuts patches from arrays, and Fuyu's processor gives it tensors."""
    import torch
    from transformers.image_processing_backends import PilBackend

    if not isinstance(image_processor, PilBackend):
        return image_processor

    def patchify_image(image: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.from_numpy(image_processor.patchify_image(image.numpy(), **options))  # type: ignore[attr-defined]

    changed = copy.copy(image_processor)
    changed.patchify_image = patchify_image  # type: ignore[attr-defined]
    return changed


class _LlavaNext:
    def _process_images(self, images: Any, **options: Any) -> Any:
        """Tiles of all images one after the other, [N, 3, H, W], not padded to the image with most."""
        import torch

        options |= {"do_pad": False, "return_tensors": None}
        found, replacements = super()._process_images(images, **options)  # type: ignore[misc]
        found["pixel_values"] = torch.cat([torch.as_tensor(tiles) for tiles in found["pixel_values"]])
        return found, replacements


class _Idefics3:
    def _process_images(self, images: Any, **options: Any) -> Any:
        """[N, 1, 3, H, W]: N rows of one tile, in place of one row of N tiles; the model flattens both the same way."""
        found, replacements = super()._process_images(images, **options)  # type: ignore[misc]
        for name in ("pixel_values", "pixel_attention_mask"):
            if name in found:
                found[name] = found[name].flatten(0, 1)[:, None]
        return found, replacements


class _SmolVLM(_Idefics3):
    def _get_num_multimodal_tokens(self, *inputs: Any, **options: Any) -> Any:
        """Idefics3's, of which it is a copy without this function."""
        from transformers import Idefics3Processor

        return Idefics3Processor._get_num_multimodal_tokens(self, *inputs, **options)  # type: ignore[arg-type]


_CHANGES: dict[str, type] = {
    # processor class: what comes before it
    "FuyuProcessor": _Fuyu,
    "Idefics3Processor": _Idefics3,
    "LlavaNextProcessor": _LlavaNext,
    "LlavaOnevisionProcessor": _LlavaNext,
    "PaliGemmaProcessor": _PaliGemma,
    "SmolVLMProcessor": _SmolVLM,
}


@functools.cache
def _changed(change: type, processor_class: type) -> type:
    return type(processor_class.__name__, (change, processor_class), {"__module__": processor_class.__module__})


@functools.cache
def without_videos(processor_class: Any) -> Any:
    """The class, of the same name, with None for its video processor; it saves as one that takes videos by default."""

    class WithoutVideos(processor_class):  # type: ignore[misc]
        video_processor = None

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *inputs: Any, **options: Any) -> list[Any]:
            return [*super()._get_arguments_from_pretrained(*inputs, **options), None]

    module = sys.modules[processor_class.__module__]
    if getattr(module, "num2words", str) is None:  # SmolVLM's, which asks for it to spell out a video's frames
        module.num2words = str  # type: ignore[attr-defined]
    WithoutVideos.__name__ = WithoutVideos.__qualname__ = processor_class.__name__
    return WithoutVideos


def _class_of(source: str | os.PathLike[str], **options: Any) -> Any:
    """The processor's class, by the name in its configuration, else by the kind of model; None where neither tells."""
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.processing_utils import ProcessorMixin

    found, _ = ProcessorMixin.get_processor_dict(source, **options)
    name = found.get("processor_class")
    if name is None:
        name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(source, **options).model_type)
    return getattr(transformers, name, None) if name else None
