"""FLOPs of a step against torch's own counter around a real forward and backward, to the last one; peaks of devices."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import CPU, Made
from tiny_families import TINY, TinyFamily, make_llava_onevision, make_vipllava
from torch.utils.flop_counter import FlopCounterMode

from vlmdist.check.gpus import GPUS
from vlmdist.config import AdaptConfig
from vlmdist.data.collate import MicroBatch, pack, pad_right
from vlmdist.model.adapters import adapt
from vlmdist.model.families import Family, family_of
from vlmdist.model.flops import Flops, ImageRows, StepFlops
from vlmdist.model.memory import model_on_meta
from vlmdist.model.peaks import device_peak, gpu_peak
from vlmdist.train.loss import token_loss_sum

FAMILIES = {
    **TINY,
    # counted by the usual rules
    "LLaVA-OneVision": TinyFamily(make_llava_onevision, 2),
    "VipLLaVA": TinyFamily(make_vipllava, 2),
}
ADAPTS = {
    "everything": {"vision_tower": "full", "projector": "full", "language_model": "full", "head": "full"},
    "LoRA": {"language_model": "lora"},
    "LoRA and projector": {"language_model": "lora", "projector": "full"},
    "LoRA everywhere": {"vision_tower": "lora", "projector": "lora", "language_model": "lora"},
    "tower below a frozen projector": {"vision_tower": "full", "language_model": "lora"},
    "projector alone": {"projector": "full", "language_model": "frozen"},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    tiny = FAMILIES[request.param]
    return Made(request.param, tiny.make(tmp_path_factory.mktemp("family")), tiny)


def load(made: Made, adapt: dict[str, Any]) -> tuple[Any, Family]:
    # eager attention is made of products that the counter knows
    return made.load(adapt, attn_implementation="eager", gradient_checkpointing=False)


def counted(compute: Callable[[], torch.Tensor]) -> FlopCounterMode:
    """torch's count of a forward and its backward."""
    with FlopCounterMode(display=False) as counter:
        compute().backward()
    return counter


# -- against the counter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ADAPTS)
def test_flops_are_those_of_a_real_step(made: Made, how: str) -> None:
    if not made.tiny.max_images and how in ("LoRA and projector", "projector alone"):
        pytest.skip("takes text only")
    model, family = load(made, ADAPTS[how])
    batch = made.padded
    num_rows, length = batch.labels.shape
    counter = counted(lambda: token_loss_sum(model, batch))
    flops = StepFlops.of(model, family)
    images = flops.image_rows(batch.inputs)
    found = flops.evaluate([length] * num_rows, batch.num_loss_tokens, images)  # padding, as torch computes it
    assert (found.vision > 0) == bool(made.tiny.max_images)
    assert (found.lora > 0) == ("LoRA" in how or "tower" in how)
    expected = counter.get_total_flops() - for_nothing(made, counter) - behind_windows(flops, num_rows, length)
    assert found.total == expected


def for_nothing(made: Made, counter: FlopCounterMode) -> int:
    """What the vision tower computes and nobody takes: LLaVA's last block, SigLIP's pooling head."""
    name = {
        "LLaVA-1.5": "vision_tower.encoder.layers.1",
        "LLaVA-NeXT": "vision_tower.encoder.layers.1",
        "Gemma-3": "vision_tower.head",
    }.get(made.name)
    if name is None:
        return 0
    (found,) = (sum(c.values()) for module, c in counter.get_flop_counts().items() if module.endswith(name))
    return found


def behind_windows(flops: StepFlops, num_rows: int, length: int) -> float:
    """Eager attention computes what a sliding window then masks."""
    return sum(
        per_pair * num_rows * length * max(0, length - window)
        for window, per_pair in flops.text_per_pair.items()
        if window is not None
    )


def test_keys_that_get_no_gradient_are_counted_as_if(tmp_path: Path) -> None:
    """With LoRA on queries and values alone, the first layer's backward needs three products of attention, not four."""
    made = Made("Llama-3", TINY["Llama-3"].make(tmp_path), TINY["Llama-3"])
    how = {"language_model": "lora", "lora": {"target_modules": ["q_proj", "v_proj"]}}
    model, family = load(made, how)
    batch = made.padded
    num_rows, length = batch.labels.shape
    counter = counted(lambda: token_loss_sum(model, batch))
    found = StepFlops.of(model, family).evaluate([length] * num_rows, batch.num_loss_tokens, ImageRows())
    product = 2 * model.config.hidden_size * length * length * num_rows
    assert found.total == counter.get_total_flops() + product


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


def assert_counted(model: Any, inputs: dict[str, torch.Tensor]) -> StepFlops:
    """One sample, all of whose tokens are in the loss."""
    length = inputs["input_ids"].shape[1]
    counter = counted(lambda: model(**inputs, use_cache=False).logits.sum())
    flops = StepFlops.of(model, family_of(model.config))
    found = flops.evaluate([length], length, flops.image_rows(inputs))
    assert found.total == counter.get_total_flops() - behind_windows(flops, 1, length)
    return flops


@pytest.mark.parametrize("trains", ["everything", "vision_tower", "projector", "language_model"])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_families_of_the_table_without_a_tiny_model(kind: str, trains: str) -> None:
    """Two images of unlike grids; Qwen3-VL's has a merger more for each of two blocks."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {
        "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        "qwen3_vl": {
            **{"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14},
            **{"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        },
    }[kind]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind,
        vision_config=vision,
        text_config={**TEXT, **special, "head_dim": 16, "rope_parameters": rope},
        image_token_id=300,
        video_token_id=301,
        vision_start_token_id=302,
        vision_end_token_id=303,
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    family = family_of(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains in ("everything", family.part_of(name)))
    ids = torch.tensor([[5, *[300] * 8, 6, *[300] * 9, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 300).int(),
        "image_grid_thw": torch.tensor([[1, 4, 8], [1, 6, 6]]),
        "pixel_values": torch.randn(68, 3 * 2 * 14 * 14),
    }
    flops = assert_counted(model, inputs)
    assert flops.per_row["patch"].vision > 0


def test_a_window_leaves_so_many_keys() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**TEXT, sliding_window=8)
    model = MistralForCausalLM._from_config(config, attn_implementation="eager")
    flops = assert_counted(model, {"input_ids": torch.arange(30)[None]})
    assert set(flops.text_per_pair) == {8}
    shorter, longer = (flops.evaluate([length], 0, ImageRows()).total for length in (8, 9))
    per_token = flops.per_row["token"].total
    assert shorter == 8 * per_token + 8 * 8 * flops.text_per_pair[8]
    assert longer == 9 * per_token + 9 * 8 * flops.text_per_pair[8]


def test_a_mixture_counts_the_experts_of_a_token() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    model = MixtralForCausalLM._from_config(config, attn_implementation="eager")
    assert_counted(model, {"input_ids": torch.arange(30)[None]})


# -- micro-batches -----------------------------------------------------------------------------------------------------


def of_batch(flops: StepFlops, batch: MicroBatch) -> Flops:
    return flops.of_micro_batch(batch.inputs, batch.num_loss_tokens, len(batch.sample_numbers), batch.packed_lengths)


def test_padding_and_packing_change_nothing(made: Made) -> None:
    """Neither padding nor other samples of the row are work; what a micro-batch costs is the sum over its samples."""
    flops = StepFlops.of(*made.load({"vision_tower": "lora", "language_model": "lora"}))
    rows, pad = made.rows, made.prompter.pad_token_id
    numbers = [(0, i) for i in range(len(rows))]
    padded = of_batch(flops, MicroBatch(*pad_right(rows, pad), numbers))
    lengths = tuple(len(row.input_ids) for row in rows)
    assert of_batch(flops, MicroBatch(*pack(rows), numbers, packed_lengths=lengths)) == padded
    one_by_one = sum((of_batch(flops, MicroBatch(*pad_right([row], pad), [(0, 0)])) for row in rows), Flops())
    assert one_by_one.total == pytest.approx(padded.total, rel=1e-12)
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("packing", [False, True])
def test_a_placeholder_counts_nothing(tmp_path: Path, packing: bool) -> None:
    made = Made("LLaVA-1.5", TINY["LLaVA-1.5"].make(tmp_path), TINY["LLaVA-1.5"])
    flops = StepFlops.of(*made.load(ADAPTS["everything"]))
    text = made.rows[0]
    assert not text.features
    placeholder = made.prompter.placeholder(with_image=True)
    placeholder = replace(placeholder, in_loss=[False] * len(placeholder.input_ids))

    def batch(rows: list[Any], num_samples: int) -> MicroBatch:
        numbers = [(0, i) for i in range(num_samples)]
        if packing:
            return MicroBatch(*pack(rows), numbers, packed_lengths=tuple(len(r.input_ids) for r in rows))
        return MicroBatch(*pad_right(rows, made.prompter.pad_token_id), numbers)

    alone = of_batch(flops, batch([text], 1))
    assert alone.text > 0
    assert alone.vision == 0
    assert of_batch(flops, batch([text, placeholder], 1)) == alone
    assert of_batch(flops, batch([placeholder], 0)) == Flops()


def test_recomputation_and_4_bits_change_nothing(tmp_path: Path) -> None:
    made = Made("Qwen2.5", TINY["Qwen2.5"].make(tmp_path), TINY["Qwen2.5"])
    plain = StepFlops.of(*made.load(ADAPTS["LoRA"], gradient_checkpointing=False))
    assert StepFlops.of(*made.load(ADAPTS["LoRA"], gradient_checkpointing=True)) == plain
    assert StepFlops.of(*made.load(ADAPTS["LoRA"], quantization="nf4", precision="auto")) == plain


# -- the textbook ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama3_8b() -> Any:
    """https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json, without weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return model_on_meta(config, family_of(config))


def test_llama_3_8b_takes_6_n_a_token(llama3_8b: Any) -> None:
    """8,030,261,248 parameters; those of the embedding are looked up. Attention: 12 L H Q T a token."""
    num_parameters = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # norms are no matrices
    length = 8192
    llama3_8b.requires_grad_(True)
    found = StepFlops.of(llama3_8b, Family()).evaluate([length], length, ImageRows())
    assert found == Flops(text=(6 * num_parameters + 12 * 32 * 32 * 128 * length) * length)
    assert found.text / length == pytest.approx(57.9e9, rel=1e-3)


def test_llama_3_8b_with_lora(llama3_8b: Any) -> None:
    """4 per frozen weight and 6 per adapter weight, but in front of the first adapters nothing trains."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = adapt(llama3_8b, AdaptConfig(), Family())
    rank, width, keys, inner = 16, 4096, 1024, 14336
    found = StepFlops.of(model, Family()).evaluate([1000], 100, ImageRows())
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner
    frozen = 32 * 4 * layer - 2 * (width * width + 2 * width * keys)
    adapters = 32 * rank * (2 * (width + width) + 2 * (width + keys) + 3 * (width + inner))
    attention = 12 * 32 * 4096 * 1000
    assert found.text == (frozen + attention) * 1000 + 4 * width * 128256 * 100
    assert found.lora == (6 * adapters - 2 * 3 * width * rank) * 1000


def test_an_image_of_llava_1_5_7b() -> None:
    """A frozen CLIP-L/336 up to its last block but one, and a projector that trains in full, in front of LoRA."""
    from accelerate import init_empty_weights
    from transformers import LlavaConfig

    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vicuna = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **clip, "image_size": 336, "patch_size": 14},
        text_config=vicuna,
    )
    family = family_of(config)
    with init_empty_weights():
        model = adapt(model_on_meta(config, family), AdaptConfig(projector="full"), family)
    flops = StepFlops.of(model, family)
    images = flops.image_rows({"pixel_values": torch.empty(2, 3, 336, 336, device="meta")})
    assert images == ImageRows(patches=2 * 576, positions=2 * 577, pairs=2 * 577**2)
    patches = 2 * 576 * 1024 * 3 * 14**2
    blocks = 23 * (2 * 577 * 12 * 1024**2 + 4 * 577**2 * 1024)
    projector = 576 * (4 * 1024 * 4096 + 6 * 4096**2)
    assert flops.evaluate([0], 0, images) == Flops(vision=2 * (patches + blocks + projector))
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    text = 32 * 4 * layer + 12 * 32 * 4096 * 1000  # the projector trains, so all of them pass a gradient on
    assert flops.evaluate([1000], 0, ImageRows()).text == 1000 * text


# -- peaks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3080", 59.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_by_the_name_that_cuda_gives(name: str, teraflops: float) -> None:
    peak = gpu_peak(name)
    assert peak is not None
    assert peak.flops_per_s == teraflops * 1e12
    assert peak.source.startswith("https://")


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 3080 Ti", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA A10", "NVIDIA"]
)
def test_no_peak_by_a_part_of_a_name(name: str) -> None:
    assert gpu_peak(name) is None


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_that_check_knows_has_a_peak(name: str) -> None:
    assert gpu_peak(GPUS[name].name) == gpu_peak(name)
    assert gpu_peak(name) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_is_measured(dtype: torch.dtype) -> None:
    peak = device_peak(CPU, dtype)
    assert peak.source == "measured"
    assert peak.flops_per_s > 0
