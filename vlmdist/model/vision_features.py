"""A frozen vision tower that is asked once for each picture: its features are handed out, and taken in its place.

The features are what the projector is given. All else is the family's own code: ``get_image_features`` runs with a
projector that notes its input, one tile at a time; then the projector runs on the tiles of the whole micro-batch, those
noted and those kept from before in their order, as it would behind the tower.

One tile at a time, since kernels may round otherwise in a larger batch: so the features of a tile are a property of the
tile and the tower, and which ones were kept changes no bit.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from vlmdist.errors import UserError
from vlmdist.model.adapters import PEFT_PREFIX
from vlmdist.model.families import Family
from vlmdist.sample import VISION_ROWS

_REFUSED = "train.cache_vision_features: {}; set it to false"


class Rows(Protocol):
    """Of a micro-batch with N tiles (``vlmdist.data.features.VisionRows``)."""

    @property
    def is_kept(self) -> tuple[bool, ...]: ...  # [N]

    @property
    def kept(self) -> torch.Tensor | None: ...  # [K, P, D]

    @property
    def to_keep(self) -> tuple[Any, ...]: ...


Keep = Callable[[tuple[Any, ...], torch.Tensor], None]
"""Is given ``Rows.to_keep``, and the features of all tiles that came as pixels, [N - K, P, D]."""


def family_problem(family: Family, model_type: str) -> str | None:
    """Why features can't be kept for models of a family; None where they can, as far as its parts tell."""
    inside = any(p.startswith(t + ".") for p in family.projector for t in family.vision_tower)
    if family.vision_tower and len(family.projector) == 1 and not inside:
        return None
    what = "has no vision tower" if not family.vision_tower else "does not end its tower where one projector begins"
    return _REFUSED.format(f"not known how to keep features for {model_type}, which {what}")


def features_per_tile(transformers_config: Any, height: int, width: int) -> int:
    """Numbers that the projector is given for a tile of so many pixels."""
    vision = transformers_config.vision_config
    patch = vision.patch_size
    high, wide = patch if isinstance(patch, Sequence) else (patch, patch)
    layers = getattr(transformers_config, "vision_feature_layer", -1)
    num_layers = 1 if isinstance(layers, int) else len(layers)
    return (height // high) * (width // wide) * int(vision.hidden_size) * num_layers


def tower_digest(model: nn.Module, family: Family) -> str:
    """SHA-256 of the vision tower's weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        plain = name.removeprefix(PEFT_PREFIX)
        if family.part_of(plain) == "vision_tower":
            digest.update(f"{plain} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FrozenTower:
    """Stands before the tower of ``model`` from now on, for inputs that have VISION_ROWS; all others pass as before.

    model: adapted, in training mode, not yet DeepSpeed's. probes: image inputs of two pictures, on the model's device.
    Raises UserError where the tower is not frozen, or what comes of kept features isn't what comes of the pixels.
    """

    def __init__(self, model: Any, family: Family, keep: Keep, probes: Sequence[Mapping[str, torch.Tensor]]):
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model_type = whole.config.model_type
        problem = family_problem(family, self._model_type)
        if problem:
            raise UserError(problem)
        _refuse_trained(model, family)
        self._owner = whole.model
        self._projector = whole.get_submodule(family.projector[0])
        self._own: Callable[..., Any] = self._owner.get_image_features
        self._keep = keep
        self._rows: Rows | None = None
        self._strides: tuple[int, ...] = ()
        self._projector.eval()  # its adapters may drop out
        self._prove([_in_dtype(probe, whole.dtype) for probe in probes])
        self._projector.train()
        whole.register_forward_pre_hook(self._take_rows, with_kwargs=True)
        self._owner.get_image_features = self._get_image_features

    def _take_rows(self, _: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._rows = options.pop(VISION_ROWS, None)
        if self._rows is not None and "pixel_values" not in options:
            options["pixel_values"] = self._rows.kept  # models ask whether there are images before they ask the tower
        return inputs, options

    def _get_image_features(self, pixel_values: Any, *inputs: Any, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        rows, self._rows = self._rows, None
        if rows is None:
            return self._own(pixel_values, *inputs, **options)
        noted: list[torch.Tensor] = []
        if not all(rows.is_kept):
            noted = self._features(pixel_values, *inputs, **options)
            if rows.to_keep:
                self._keep(rows.to_keep, torch.cat(noted))
        return BaseModelOutputWithPooling(pooler_output=self._project(rows, noted))

    @torch.no_grad()
    def _features(self, pixel_values: torch.Tensor, *inputs: Any, **options: Any) -> list[torch.Tensor]:
        """What the projector is given for each of n tiles, [1, P, D] each."""
        num_tiles = len(pixel_values)

        def of_tile(i: int, value: Any) -> Any:
            has_tiles = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == num_tiles
            return value[i : i + 1] if has_tiles else value

        with _noting(self._projector) as noted:
            for i in range(num_tiles):
                named = {name: of_tile(i, value) for name, value in options.items()}
                self._own(of_tile(i, pixel_values), *(of_tile(i, value) for value in inputs), **named)
        return noted

    def _project(self, rows: Rows, noted: Sequence[torch.Tensor]) -> Any:
        """What models take of the answer of get_image_features."""
        came, kept = iter(noted), iter(() if rows.kept is None else rows.kept.split(1))
        tiles = [next(kept if is_kept else came) for is_kept in rows.is_kept]
        shape = (len(tiles), *tiles[0].shape[1:])
        # as behind the tower, where the place of a class token is a gap: kernels are chosen by that
        features = torch.empty_strided(shape, self._strides, dtype=tiles[0].dtype, device=tiles[0].device)
        for i, tile in enumerate(tiles):
            features[i : i + 1] = tile
        projected = self._projector(features)
        return list(projected) if self._gives_list else projected

    @torch.no_grad()
    def _prove(self, probes: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """On pictures that are one tile each, so that the family's own way is one at a time as well."""
        ones = [{name: value[:1] for name, value in probe.items()} for probe in probes]
        if any(one["pixel_values"].dim() < 4 for one in ones):
            self._refuse("its pixels don't come as tiles")
        expected = [self._own(**one, return_dict=True).pooler_output for one in ones]
        self._gives_list = isinstance(expected[0], list | tuple)
        before = _random_state(ones[0]["pixel_values"].device)
        features = [noted for one in ones for noted in self._features(**one)]
        again = [noted for one in ones for noted in self._features(**one)]
        if len(features) != len(ones) or any(f.dim() != 3 for f in features):
            self._refuse("its projector isn't asked once for each tile")
        drew = not torch.equal(before, _random_state(ones[0]["pixel_values"].device))
        if drew or not all(map(torch.equal, features, again)):
            self._refuse("its tower draws random numbers (dropout)")
        self._strides = features[0].stride()
        if self._strides[0] < features[0][0].numel():
            self._strides = torch.empty(features[0].shape, device="meta").stride()
        both = {name: torch.cat([one[name] for one in ones]) for name in ones[0]}
        ways: list[tuple[Any, list[torch.Tensor], Any]] = [
            *((_Probe((False,)), [f], e) for f, e in zip(features, expected, strict=True)),
            *((_Probe((True,), f), [], e) for f, e in zip(features, expected, strict=True)),
        ]
        together = self._project(_Probe((False, False)), self._features(**both))
        ways.append((_Probe((True, False), features[0]), features[1:], together))
        if not all(_equal(self._project(rows, noted), wanted) for rows, noted, wanted in ways):
            self._refuse("what its projector makes of them isn't what it makes of the pictures")

    def _refuse(self, why: str) -> None:
        raise UserError(_REFUSED.format(f"features of {self._model_type} can't be kept: {why}"))


@dataclass(frozen=True)
class _Probe:
    is_kept: tuple[bool, ...]
    kept: torch.Tensor | None = None
    to_keep: tuple[Any, ...] = ()


def _refuse_trained(model: nn.Module, family: Family) -> None:
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    of_tower = [n for n in trained if family.part_of(n.removeprefix(PEFT_PREFIX)) == "vision_tower"]
    if of_tower:
        raise UserError(
            _REFUSED.format(
                f"{len(of_tower)} weights of the vision tower train (first: {of_tower[0]}), so its "
                "features change with every step"
            )
        )


@contextmanager
def _noting(projector: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While this lasts the projector notes its input, and gives it back."""
    noted: list[torch.Tensor] = []

    def note(features: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        noted.append(features)
        return features

    projector.forward = note  # type: ignore[method-assign, assignment]
    try:
        yield noted
    finally:
        del projector.forward


def _in_dtype(inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _equal(found: Any, wanted: Any) -> bool:
    return len(found) == len(wanted) and all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
