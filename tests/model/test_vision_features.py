"""Kept features in place of pictures: the same bits of loss and gradient, no work of the tower, or refused by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import CPU, Made, gradient_of
from tiny_families import TINY
from torch.utils.flop_counter import FlopCounterMode

from vlmdist.data.collate import MicroBatch, pad_right
from vlmdist.data.features import FEATURES, ToKeep, vision_rows
from vlmdist.data.prompt import Encoded
from vlmdist.errors import UserError
from vlmdist.model.families import Family, family_of
from vlmdist.model.flops import StepFlops
from vlmdist.model.load import load_config
from vlmdist.model.vision_features import FrozenTower, family_problem, features_per_tile, tower_digest
from vlmdist.sample import VISION_ROWS
from vlmdist.train.features import _probes
from vlmdist.train.loss import token_loss_sum

KEEPS = ("LLaVA-1.5", "InternVL", "SmolVLM", "Idefics3", "Gemma-3", "PaliGemma", "Moondream2")
HAVE_NO_PLACE = ("LLaVA-NeXT", "Qwen2.5-VL", "Fuyu", "SmolLM2")


class Kept:
    """Takes what a ``FrozenTower`` hands out."""

    def __init__(self) -> None:
        self.features: dict[int, torch.Tensor] = {}

    def __call__(self, to_keep: Sequence[ToKeep], tiles: torch.Tensor) -> None:
        start = 0
        for sample in to_keep:
            self.features[sample.sample] = tiles[start : start + sample.num_tiles].clone()
            start += sample.num_tiles


@pytest.fixture(scope="module", params=KEEPS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    tiny = TINY[request.param]
    return Made(request.param, tiny.make(tmp_path_factory.mktemp("family")), tiny)


def attached(made: Made, adapt: dict[str, Any], **model: Any) -> tuple[Any, Family, Kept]:
    loaded, family = made.load({"projector": "full", "language_model": "lora", **adapt}, **model)
    kept = Kept()
    FrozenTower(loaded, family, kept, _probes(made.prompter, CPU))
    return loaded, family, kept


def batch_of(made: Made, features: dict[int, torch.Tensor]) -> MicroBatch:
    """The rows of the family's samples; those with ``features`` come with them in place of their pixels."""
    rows = [
        Encoded(r.input_ids, r.in_loss, r.per_token, {FEATURES: features[i]}) if i in features else r
        for i, r in enumerate(made.rows)
    ]
    inputs, labels = pad_right(rows, made.prompter.pad_token_id)
    owners = [(Path("corpus"), i) for i in range(len(rows))]
    inputs[VISION_ROWS] = vision_rows(rows, owners, inputs.pop(FEATURES, None))
    return MicroBatch(inputs, labels).to(CPU)


def loss_and_gradient(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    loss = token_loss_sum(model, batch)
    loss.backward()
    return loss.detach(), gradient_of(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_which_features_are_kept_changes_no_bit(made: Made, precision: str) -> None:
    model, _, kept = attached(made, {}, precision=precision)
    loss, gradient = loss_and_gradient(model, batch_of(made, {}))
    features = dict(kept.features)
    with_images = [i for i, row in enumerate(made.rows) if row.features]
    assert sorted(features) == with_images
    for there in (with_images, with_images[:1], with_images[1:]):
        kept.features.clear()
        batch = batch_of(made, {i: features[i] for i in there})
        assert ("pixel_values" in batch.inputs) == (there != with_images)
        found, its_gradient = loss_and_gradient(model, batch)
        assert torch.equal(found, loss)
        assert torch.equal(its_gradient, gradient)
        assert all(torch.equal(kept.features[i], features[i]) for i in kept.features)
        assert set(kept.features) == set(with_images) - set(there)
    # as without the setting, but for kernels that round otherwise with more rows
    plain, plain_gradient = loss_and_gradient(model, made.padded)
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert float(plain) == pytest.approx(float(loss), rel=tolerance)
    assert float((plain_gradient - gradient).norm() / gradient.norm()) <= 10 * tolerance


def test_flops_are_those_of_a_step_without_the_tower(made: Made) -> None:
    model, family, kept = attached(made, {}, attn_implementation="eager", gradient_checkpointing=False)
    loss_and_gradient(model, batch_of(made, {}))
    batch = batch_of(made, kept.features)
    num_rows, length = batch.labels.shape
    with FlopCounterMode(display=False) as counter:
        token_loss_sum(model, batch).backward()
    flops = StepFlops.of(model, family)
    images = flops.image_rows(batch.inputs)
    assert (images.patches, images.positions, images.pairs) == (0, 0, 0)
    assert images.kept_patches == flops.image_rows(made.padded.inputs).patches > 0
    found = flops.evaluate([length] * num_rows, batch.num_loss_tokens, images)  # padding, as torch computes it
    windows = sum(  # eager attention computes what a sliding window then masks
        per_pair * num_rows * length * max(0, length - window)
        for window, per_pair in flops.text_per_pair.items()
        if window is not None
    )
    assert found.total == counter.get_total_flops() - windows


def test_size_is_told_by_the_configuration(made: Made) -> None:
    model, _, kept = attached(made, {})
    loss_and_gradient(model, batch_of(made, {}))
    config = load_config(made.config().model)
    for i, features in kept.features.items():
        height, width = made.rows[i].features["pixel_values"].shape[-2:]
        assert features[0].numel() == features_per_tile(config, height, width)


@pytest.mark.parametrize("name", HAVE_NO_PLACE)
def test_a_family_without_such_a_place_is_named(name: str, tmp_path: Path) -> None:
    config = load_config(Made(name, TINY[name].make(tmp_path), TINY[name]).config().model)
    problem = family_problem(family_of(config), config.model_type)
    assert problem is not None
    assert problem.startswith(f"train.cache_vision_features: not known how to keep features for {config.model_type}")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("LLaVA-1.5", TINY["LLaVA-1.5"].make(tmp_path_factory.mktemp("llava")), TINY["LLaVA-1.5"])


@pytest.mark.parametrize("adapt", [{"vision_tower": "lora"}, {"vision_tower": "full"}, {"lora": {"bias": "all"}}])
def test_a_tower_that_trains_is_refused(llava: Made, adapt: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"weights of the vision tower train \(first: .*vision_tower"):
        attached(llava, adapt)


def test_a_tower_that_drops_out_is_refused(llava: Made) -> None:
    model, family = llava.load({"projector": "full", "language_model": "frozen"})
    for module in model.modules():
        if type(module).__name__ == "CLIPAttention":
            module.dropout = 0.5
    with pytest.raises(UserError, match=r"features of llava can't be kept: its tower draws random numbers"):
        FrozenTower(model, family, Kept(), _probes(llava.prompter, CPU))


def test_a_model_that_does_more_to_features_is_refused(llava: Made) -> None:
    model, family = llava.load({"projector": "full", "language_model": "frozen"})
    own = model.model.get_image_features

    def scaled(*inputs: Any, **options: Any) -> Any:
        outputs = own(*inputs, **options)
        outputs.pooler_output = [features / 8 for features in outputs.pooler_output]
        return outputs

    model.model.get_image_features = scaled
    with pytest.raises(UserError, match="what its projector makes of them isn't what it makes of the pictures"):
        FrozenTower(model, family, Kept(), _probes(llava.prompter, CPU))


def test_an_adapter_of_the_projector_may_drop_out(llava: Made) -> None:
    model, _, _ = attached(llava, {"projector": "lora", "lora": {"dropout": 0.5}})
    assert all(module.training for module in model.modules())


def test_the_digest_is_of_the_towers_weights(llava: Made) -> None:
    model, family = llava.load({"projector": "full", "language_model": "frozen"})
    before = tower_digest(model, family)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.add_(1)
    assert tower_digest(model, family) == before
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).view(-1)[0] += 1
    assert tower_digest(model, family) != before
