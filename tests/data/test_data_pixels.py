"""Image inputs by the fast path against the image processors' own: geometry, decibels, whole numbers, and the proof."""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_tiny_llava
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vlmdist.data.collate import MicroBatch, pad_left, pad_right
from vlmdist.data.images import pixels as pixels_module
from vlmdist.data.images import torch_resize
from vlmdist.data.images.pixels import MIN_DECIBELS, Pixels, prove_pixels
from vlmdist.data.images.raw_pixels import RawPixels
from vlmdist.data.prompt import Prompter
from vlmdist.sample import ImagePart, Message, Sample, TextPart

needs_avx2 = pytest.mark.skipif(not torch_resize.is_fast_here(), reason="torch's uint8 resize is slow without AVX2")


def photograph(height: int, width: int, seed: int = 1) -> np.ndarray:
    """Octaves of smooth noise with some grain: other pictures than the probes."""
    rng = np.random.default_rng(seed)
    picture = rng.normal(0, 4, (height, width, 3))
    for cells in (3, 7, 17, 41):
        octave = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((width, height))
        picture += (np.asarray(octave, float) - 128) * 2 / math.sqrt(cells) + 128 / 4
    return np.clip(picture, 0, 255).astype(np.uint8)


def call(image_processor: Any, images: list[Any]) -> dict[str, Any]:
    return dict(image_processor(images=images, return_tensors="pt"))


def clip(**options: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **options)


SQUARE = {"height": 112, "width": 112}
CROPPED = {"size": {"shortest_edge": 112}, "crop_size": SQUARE}
TORCH, OWN, AS_IT_IS = "torch resize", "the image processor's own resize", "the image processor as it is"

# Processors of the families, small where the size is a setting, and how far each gets: name, class, settings, level,
# whether images of one sample may go together (LLaVA-NeXT and Pixtral pad with zeros after normalising)
FAMILIES: list[tuple[str, Callable[..., Any], dict[str, Any], str, bool]] = [
    ("CLIP, LLaVA-1.5", CLIPImageProcessorPil, CROPPED, TORCH, True),
    ("LLaVA, padded to squares", LlavaImageProcessorPil, {**CROPPED, "do_pad": True}, TORCH, True),
    (
        "LLaVA-NeXT",
        LlavaNextImageProcessorPil,
        {**CROPPED, "image_grid_pinpoints": [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]},
        TORCH,
        False,
    ),
    ("InternVL", GotOcr2ImageProcessorPil, {"size": SQUARE, "crop_to_patches": True, "max_patches": 6}, TORCH, True),
    ("Qwen2-VL", Qwen2VLImageProcessorPil, {"max_pixels": 200_000}, TORCH, True),
    ("Gemma 3", Gemma3ImageProcessorPil, {"size": {"height": 224, "width": 224}}, TORCH, True),
    (
        "Gemma 3, pan and scan",
        Gemma3ImageProcessorPil,
        {
            "size": SQUARE,
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 64,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
        TORCH,
        True,
    ),
    ("SigLIP, PaliGemma", SiglipImageProcessorPil, {"size": {"height": 224, "width": 224}}, TORCH, True),
    ("Pixtral", PixtralImageProcessorPil, {"size": {"longest_edge": 512}}, TORCH, False),
    # Lanczos, which torch has not
    ("Idefics3", Idefics3ImageProcessorPil, {"size": {"longest_edge": 728}}, OWN, True),
    (
        "SmolVLM",
        SmolVLMImageProcessorPil,
        {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 256}},
        OWN,
        True,
    ),
    # lists of pictures of several sizes instead of a tensor
    ("Fuyu", FuyuImageProcessorPil, {"size": {"height": 300, "width": 600}}, AS_IT_IS, False),
]


@needs_avx2
@pytest.mark.parametrize(
    ("make", "settings", "level", "together"), [f[1:] for f in FAMILIES], ids=[f[0] for f in FAMILIES]
)
def test_inputs_are_the_image_processors(
    make: Callable[..., Any], settings: dict[str, Any], level: str, together: bool
) -> None:
    processor = make(**settings)
    pixels = prove_pixels(processor, call)
    assert pixels.describe().startswith(level)
    assert pixels.several_at_once == together
    samples = [[photograph(h, w)] for h, w in ((427, 640), (640, 427), (90, 70), (700, 250), (60, 3))]
    for pictures in [*samples, [*samples[0], *samples[2]]]:
        found = pixels.process(pictures, call)
        expected = call(processor, [Image.fromarray(p) for p in pictures])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not isinstance(found[name], RawPixels):
                assert pixels_module._equal(found[name], value), name
                continue
            assert found[name].pixels.dtype == torch.uint8
            normalised = found[name].to("cpu")
            assert normalised.dtype == torch.float32
            assert normalised.shape == value.shape
            levels = (normalised - value) * torch.from_numpy(found[name].normalisation.std) * 255
            if level == OWN:
                assert (normalised - value).abs().max() <= 1e-6
            assert (levels**2).mean() <= 255**2 / 10 ** (MIN_DECIBELS / 10), name


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((480, 640), (336, 448)),
        ((97, 61), (896, 896)),
        # wider and lower: here the order of the two passes shows
        ((1100, 300), (448, 448)),
        ((600, 600), (300, 1200)),
        ((300, 1100), (448, 448)),
        ((400, 300), (200, 200)),  # both shrink, the height exactly twice as much
        ((400, 300), (199, 200)),
        ((5, 7), (3, 700)),
    ],
)
def test_torch_resizes_as_pil(mode: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    picture = photograph(*old)
    expected = np.asarray(Image.fromarray(picture).resize(new[::-1], getattr(Image.Resampling, mode.upper())))
    found = torch_resize.resize(np.moveaxis(picture, -1, 0), *new, mode)
    noise = np.mean((np.moveaxis(found, 0, -1).astype(float) - expected) ** 2)
    assert noise <= 255**2 / 10**6.5  # 65 dB


def test_resize_is_the_same_with_any_number_of_threads() -> None:
    picture = np.moveaxis(photograph(700, 930), -1, 0)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch_resize.resize(picture, 336, 448, "bicubic"))
    torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


# -- the proof ---------------------------------------------------------------------------------------------------------


class PadsLast(CLIPImageProcessorPil):
    """A frame of zeros around the normalised picture."""

    def normalize(self, *args: Any, **options: Any) -> np.ndarray:
        return self._frame(super().normalize(*args, **options))

    def center_crop(self, *args: Any, **options: Any) -> np.ndarray:
        image = super().center_crop(*args, **options)
        return image if self.do_normalize else self._frame(image)

    def _frame(self, image: np.ndarray) -> np.ndarray:
        return np.pad(image, ((0, 0), (2, 2), (2, 2)))


class ResizesItself(CLIPImageProcessorPil):
    def resize(self, image: np.ndarray, **options: Any) -> np.ndarray:
        return image[:, :60, :60]


class RefusesArrays(CLIPImageProcessorPil):
    def __call__(self, images: list[Any], **options: Any) -> Any:
        if not all(isinstance(i, Image.Image) for i in images):
            raise TypeError("pictures by PIL, please")
        return super().__call__(images, **options)


class HasOtherSettings:
    """As code that comes with a model may be: no class of transformers, no do_normalize."""

    def __init__(self, **settings: Any):
        pass

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Any]:
        pictures = [np.asarray(i.resize((28, 28)) if isinstance(i, Image.Image) else i[:28, :28]) for i in images]
        return {"pixel_values": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255}


@pytest.mark.parametrize(
    ("make", "level"),
    [(PadsLast, AS_IT_IS), (RefusesArrays, AS_IT_IS), (HasOtherSettings, AS_IT_IS), (ResizesItself, OWN)],
)
def test_what_is_not_proven_is_not_used(make: Callable[..., Any], level: str) -> None:
    processor = make(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    assert prove_pixels(processor, call).describe().startswith(level)


@needs_avx2
def test_a_resize_that_is_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_resize.resize
    assert prove_pixels(clip(), call).describe().startswith(TORCH)
    monkeypatch.setattr(torch_resize, "resize", lambda image, *to: np.roll(right(image, *to), 1, axis=2))
    assert prove_pixels(clip(), call).describe().startswith(OWN)
    monkeypatch.setattr(torch_resize, "resize", right)
    monkeypatch.setattr(torch_resize, "is_fast_here", lambda: False)
    assert prove_pixels(clip(), call).describe().startswith(OWN)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"image_std": [1, 2, 4]}],
)
def test_normalised_to_the_last_bit(options: dict[str, Any]) -> None:
    processor = clip(**options)
    pixels = prove_pixels(processor, call)
    assert pixels.raw_processor is not None
    picture = photograph(56, 56)  # nothing to resize
    found = pixels.process([picture], call)["pixel_values"].to("cpu")
    assert torch.equal(found, call(processor, [picture])["pixel_values"])


def test_proof_leaves_the_processor_as_it_was_and_can_be_sent_to_a_worker() -> None:
    processor = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True)
    before = processor.to_json_string()
    pixels = prove_pixels(processor, call)
    assert type(processor) is GotOcr2ImageProcessorPil
    assert processor.to_json_string() == before
    sent = pickle.loads(pickle.dumps(pixels))  # noqa: S301
    pictures = [photograph(200, 300)]
    here, there = pixels.process(pictures, call)["pixel_values"], sent.process(pictures, call)["pixel_values"]
    assert torch.equal(here.pixels, there.pixels)


# -- in the prompts and micro-batches ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Prompter]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = make_tiny_llava(tmp_path_factory.mktemp("llava"), ["What is the total? 14.10 RM"])
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Prompter(AutoProcessor.from_pretrained(folder), None, "assistant", 512)


def sample(*sizes: tuple[int, int]) -> Sample:
    images = []
    for height, width in sizes:
        file = io.BytesIO()
        Image.fromarray(photograph(height, width)).save(file, "JPEG", quality=95)
        images.append(file.getvalue())
    shown = tuple(ImagePart(i) for i in range(len(images)))
    messages = (Message("user", (*shown, TextPart("q"))), Message("assistant", (TextPart("a"),)))
    return Sample(0, "key", messages, tuple(images))


def test_micro_batch_on_the_device_is_what_the_processor_gives(llava: tuple[Any, Prompter]) -> None:
    model, prompter = llava
    samples = [sample((40, 60)), sample(), sample((90, 30), (3, 50))]
    rows = [prompter.encode_training(s) for s in samples]
    batch = MicroBatch(*pad_right(rows, prompter.pad_token_id))
    assert isinstance(batch.inputs["pixel_values"], RawPixels)
    (from_worker,) = DataLoader([batch], batch_size=None, num_workers=1)
    on_device = from_worker.to(torch.device("cpu"))
    images = [Image.open(io.BytesIO(data)) for s in samples for data in s.images]
    expected = prompter.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    found = on_device.inputs["pixel_values"]
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    assert ((found - expected) * 0.27 * 255).square().mean() < 255**2 / 10**6  # 60 dB
    with torch.inference_mode():
        here = model(**on_device.inputs).logits
        there = model(**{**on_device.inputs, "pixel_values": expected}).logits
    assert torch.allclose(here, there, atol=1e-3)


def test_questions_carry_the_same_pixels_and_are_answered(llava: tuple[Any, Prompter]) -> None:
    from vlmdist.evaluate.generate import generate_batch

    model, prompter = llava
    asked, trained = prompter.encode_question(sample((40, 60))), prompter.encode_training(sample((40, 60)))
    left = pad_left([asked], prompter.pad_token_id)["pixel_values"]
    assert torch.equal(left.pixels, trained.features["pixel_values"].pixels)
    assert len(generate_batch(model, prompter, [asked], 3)) == 1


def test_float_and_whole_rows_in_one_micro_batch(llava: tuple[Any, Prompter], monkeypatch: pytest.MonkeyPatch) -> None:
    _, prompter = llava
    whole = prompter.encode_training(sample((40, 60)))
    monkeypatch.setattr(prompter, "pixels", Pixels(prompter.processor.image_processor))
    floats = prompter.encode_training(sample((40, 60)))
    inputs, _ = pad_right([whole, floats], prompter.pad_token_id)
    first, second = inputs["pixel_values"]
    assert (first - second).abs().max() < 0.05
    assert torch.equal(second, floats.features["pixel_values"][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_normalises_to_the_last_bit(llava: tuple[Any, Prompter]) -> None:
    _, prompter = llava
    batch = MicroBatch(*pad_right([prompter.encode_training(sample((40, 60)))], prompter.pad_token_id))
    pinned = batch.pin_memory()
    assert pinned.inputs["pixel_values"].pixels.is_pinned()
    on_gpu = pinned.to(torch.device("cuda")).inputs["pixel_values"]
    assert torch.equal(on_gpu.cpu(), batch.to(torch.device("cpu")).inputs["pixel_values"])
