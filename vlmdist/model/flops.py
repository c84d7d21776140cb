"""Model FLOPs of a training step, from the model's matrices and the lengths of its inputs: what MFU is computed from.

Model FLOPs are what the mathematics needs (PaLM, https://arxiv.org/abs/2204.02311, appendix B), not what a GPU happens
to do: padding, placeholders, recomputation by gradient checkpointing, and layers whose output nobody takes don't count.
A multiply-add is 2 FLOPs. Norms, activations, rotations and embedding look-ups are left out, as in the literature.

1. A matrix of E elements that is applied to R rows: 2 E R forward; 2 E R for the gradient of its input where something
   that trains lies before it; 2 E R for its own gradient where it trains. So 6 per weight and token where everything
   trains (PaLM's 6 N), and with LoRA 4 per frozen weight and 6 per weight of an adapter; where nothing before it trains
   (queries, keys and values of the first layer), 2 per frozen weight and 4 per weight of an adapter's A.
2. Rows: tokens for the language model; tokens in the loss for the head, since no other logits are needed; patches and
   class tokens for the vision tower; what pooling or merging leaves of the patches for the projector.
3. Attention of width W (heads x size of a head): 4 W a pair of query and key forward, and twice that backward where
   something that trains lies before the scores. A sample of T tokens has T x T pairs: the causal half is not taken
   off, as in PaLM (12 L H Q a pair) and Megatron (https://arxiv.org/abs/2104.04473, section 5.1), so that figures
   compare with theirs. Samples of a packed row don't see each other; a window of w keys leaves T x min(T, w) pairs.

Of a mixture of experts those count that a token takes. The rules for images hold for the families of
vlmdist/model/families.py; others are counted by the same ones, and where they merge image features in a way of their
own, the projector's share is an estimate.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from vlmdist.model.adapters import PEFT_PREFIX
from vlmdist.model.families import PARTS, Family
from vlmdist.sample import VISION_ROWS

_VISION = ("vision_tower", "projector")
_CLASS_TOKENS = ("class_embedding", "cls_token")
"""Parameters of a vision tower that are one more position of each tile."""
_POOLING_HEAD = "head"
"""SigLIP's: makes one vector of an image, which no language model asks for."""
_CONVOLUTION = nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and its backward, by what they are spent on."""

    text: float = 0.0
    """Language model and head, without adapters."""
    vision: float = 0.0
    """Vision tower and projector, without adapters."""
    lora: float = 0.0
    """Adapters of all parts."""

    @property
    def total(self) -> float:
        return self.text + self.vision + self.lora

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.text + other.text, self.vision + other.vision, self.lora + other.lora)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.text * times, self.vision * times, self.lora * times)


@dataclass(frozen=True)
class ImageRows:
    """What the images of a micro-batch are for the vision tower."""

    patches: int = 0
    positions: int = 0
    """Patches and class tokens."""
    pairs: int = 0
    """Of query and key, where a position sees all of its tile or frame."""
    window_pairs: int = 0
    """Where it sees its window alone (Qwen2.5-VL)."""
    kept_patches: int = 0
    """Those whose features are kept: for the projector alone."""


@dataclass
class StepFlops:
    """FLOPs of an adapted model per row and per pair: made once, evaluated for every micro-batch, on the host alone."""

    per_row: dict[str, Flops] = field(default_factory=lambda: defaultdict(Flops))
    """By the kind of row: token, loss_token, patch, position, projected (patches, kept ones too)."""
    text_per_pair: dict[int | None, float] = field(default_factory=lambda: defaultdict(float))
    """By the window of the layers, in keys; None for those that see everything."""
    vision_per_pair: float = 0.0
    vision_per_window_pair: float = 0.0
    patch_size: tuple[int, int] = (1, 1)
    """(height, width) in pixels."""
    class_tokens: int = 0
    """Of each tile."""
    merge_size: int = 1
    """Patches along the side of what Qwen-VL merges into one token."""
    window_size: int = 1
    """Merged patches along the side of a window."""
    patch_width: int = 1
    """Numbers of a patch that leave the tower."""

    @classmethod
    def of(cls, model: Any, family: Family) -> "StepFlops":
        """model: adapted, as it trains, before DeepSpeed takes it; on any device, meta included."""
        return _count(model, family)

    def of_micro_batch(
        self, inputs: Mapping[str, Any], num_loss_tokens: int, num_samples: int, packed_lengths: Sequence[int] = ()
    ) -> Flops:
        """From the fields of a ``MicroBatch`` as the loader gives it, before it moves to a device: none is asked.

        num_samples: its real ones. A placeholder, behind them, counts nothing; where there is one, no other row has
        images.
        """
        num_rows = len(packed_lengths) or len(inputs["input_ids"])
        lengths = packed_lengths or inputs["attention_mask"].sum(1).tolist()
        images = self.image_rows(inputs) if num_rows == num_samples else ImageRows()
        return self.evaluate(lengths[:num_samples], num_loss_tokens, images)

    def evaluate(self, text_lengths: Sequence[int], num_loss_tokens: int, images: ImageRows) -> Flops:
        """text_lengths: tokens of each sample, those of its images included."""
        num_rows = {
            "token": sum(text_lengths),
            "loss_token": num_loss_tokens,
            "patch": images.patches,
            "position": images.positions,
            "projected": images.patches + images.kept_patches,
        }
        of_attention = Flops(
            text=sum(
                flops * sum(t * (t if window is None else min(t, window)) for t in text_lengths)
                for window, flops in self.text_per_pair.items()
            ),
            vision=self.vision_per_pair * images.pairs + self.vision_per_window_pair * images.window_pairs,
        )
        return sum((flops * num_rows[kind] for kind, flops in self.per_row.items()), of_attention)

    def image_rows(self, inputs: Mapping[str, Any]) -> ImageRows:
        """From the shape of ``pixel_values``, tiles [..., C, H, W] or patches [P, D], and from ``image_grid_thw``;
        and from the kept features among VISION_ROWS."""
        rows = inputs.get(VISION_ROWS)
        kept = 0 if rows is None or rows.kept is None else rows.kept.numel() // self.patch_width
        return replace(self._rows_of_pixels(inputs), kept_patches=kept)

    def _rows_of_pixels(self, inputs: Mapping[str, Any]) -> ImageRows:
        pixels, grids = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if pixels is None:
            return ImageRows()
        if grids is not None:
            frames = [(h, w) for t, h, w in grids.tolist() for _ in range(t)]
            patches = sum(h * w for h, w in frames)
            pairs = sum((h * w) ** 2 for h, w in frames)
            window_pairs = sum(self._window_pairs(h) * self._window_pairs(w) for h, w in frames)
            return ImageRows(patches, patches, pairs, window_pairs)
        if len(pixels.shape) == 2:  # Fuyu: no tower
            return ImageRows(patches=pixels.shape[0])
        tiles = math.prod(pixels.shape[:-3])
        height, width = pixels.shape[-2:]
        patches = (height // self.patch_size[0]) * (width // self.patch_size[1])
        positions = patches + self.class_tokens
        return ImageRows(tiles * patches, tiles * positions, tiles * positions**2)

    def _window_pairs(self, side: int) -> int:
        """Pairs along one side of a frame of so many patches; the last window is what is left."""
        whole, left = divmod(side // self.merge_size, self.window_size)
        return (whole * self.window_size**2 + left**2) * self.merge_size**2


# -- the model's layers, in the order of the forward -------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A module with parameters of its own; a linear layer together with its adapter."""

    name: str
    """In the base model."""
    module: nn.Module
    part: str
    elements: float
    """Multiply-adds a row; 0 for what is no matrix."""
    weight_trains: bool
    anything_trains: bool
    """Weight, bias or adapter."""
    adapter: tuple[int, int]
    """Elements of LoRA's A and B; 0 where there is none."""

    @property
    def owner(self) -> str:
        """Name of the module that it is a piece of."""
        return self.name.rpartition(".")[0]

    @property
    def block(self) -> int:
        """Number of the block of the decoder or of the tower that it lies in; -1 for none."""
        return next((int(piece) for piece in self.name.split(".") if piece.isdigit()), -1)

    @property
    def width_in(self) -> int:
        """Numbers in a row of a matrix's input. A bare parameter lies the other way round than a linear layer's."""
        if isinstance(self.module, nn.Linear):
            return self.module.in_features
        return len(_weights(self.module)[0])

    def flops(self, input_trains: bool) -> Flops:
        """Of a row, forward and backward. input_trains: something before this layer does."""
        base = 2 * self.elements * (1 + input_trains + self.weight_trains)
        a, b = self.adapter
        lora = 2.0 * a * (2 + input_trains) + 2.0 * b * 3
        return Flops(vision=base, lora=lora) if self.part in _VISION else Flops(text=base, lora=lora)


@dataclass(frozen=True)
class _Stage:
    """The matrices of one module (attention, feed-forward, projector, ...). All take the module's input, but for the
    last, which takes what the others made of it."""

    matrices: list[_Layer]
    is_attention: bool
    input_trains: bool
    last_input_trains: bool

    @property
    def last(self) -> _Layer:
        return self.matrices[-1]

    def flops(self) -> Flops:
        """Of a row through all of them."""
        before_last = (layer.flops(self.input_trains) for layer in self.matrices[:-1])
        return sum(before_last, self.last.flops(self.last_input_trains))


def _count(model: Any, family: Family) -> StepFlops:
    config = model.config
    layers = [layer for layer in _layers(model, family) if _is_used(layer, config)]
    found = _of_images(layers, config)
    features_per_patch = _features_per_patch(layers, config)
    for stage in _stages(layers, model):
        kind, rows = _rows(stage.matrices[0], features_per_patch)
        found.per_row[kind] += stage.flops() * rows
        if stage.is_attention:
            _add_pairs(found, stage.last, stage.last_input_trains, config)
    return found


def _stages(layers: Sequence[_Layer], model: nn.Module) -> Iterator[_Stage]:
    modules = {name.removeprefix(PEFT_PREFIX): module for name, module in model.named_modules()}
    trained_before = False
    before_attention: dict[str, bool] = {}  # by block: whether something before it trains
    for (_, owner), members in groupby(layers, lambda layer: (layer.part, layer.owner)):
        inside = list(members)
        matrices = [layer for layer in inside if layer.elements]
        if matrices:
            in_front = inside[: inside.index(matrices[0])]  # a norm
            input_trains = trained_before or _any_trains(in_front)
            block = owner.rpartition(".")[0]
            is_attention = "attention" in type(modules[owner]).__name__.lower()
            if is_attention:
                before_attention[block] = input_trains
            elif block in before_attention and _num_norms(modules[block]) == 1:
                input_trains = before_attention[block]  # beside attention, not behind it (Phi)
            yield _Stage(matrices, is_attention, input_trains, input_trains or _any_trains(matrices[:-1]))
        trained_before |= _any_trains(inside)


def _any_trains(layers: Sequence[_Layer]) -> bool:
    return any(layer.anything_trains for layer in layers)


def _num_norms(block: nn.Module) -> int:
    return sum("norm" in type(child).__name__.lower() for child in block.children())


def _layers(model: Any, family: Family) -> Iterator[_Layer]:
    """Part by part; in each as they were registered, but parameters of a module itself behind those of its children."""
    adapters: dict[str, list[nn.Parameter]] = defaultdict(list)  # by linear layer: A, then B
    owners: dict[str, nn.Module] = {}
    for name, module in _children_first(model):
        linear, _, adapter = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        parameters = list(module.parameters(recurse=False))
        if adapter:
            adapters[linear] += parameters
        elif parameters:
            owners[linear.removesuffix(".base_layer")] = module
    experts_per_token = getattr(model.config.get_text_config(), "num_experts_per_tok", 0)
    for part in PARTS:
        for name, module in owners.items():
            if family.part_of(name) != part:
                continue
            weights, a_and_b = _weights(module), adapters[name]
            yield _Layer(
                name,
                module,
                part,
                elements=sum(_elements(module, weight, experts_per_token) for weight in weights),
                weight_trains=any(weight.requires_grad for weight in weights),
                anything_trains=any(p.requires_grad for p in [*module.parameters(recurse=False), *a_and_b]),
                adapter=(a_and_b[0].numel(), a_and_b[1].numel()) if a_and_b else (0, 0),
            )


def _children_first(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield from _children_first(child, f"{name}.{child_name}" if name else child_name)
    yield name, module


def _weights(module: nn.Module) -> list[torch.Tensor]:
    """What rows are multiplied with: a matrix, a convolution, or a mixture's experts (3-D parameters)."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    if isinstance(module, nn.Embedding):
        return []
    has_experts = hasattr(module, "num_experts")
    return [
        parameter
        for name, parameter in module.named_parameters(recurse=False)
        if (name.endswith("weight") and parameter.dim() > 1) or (has_experts and parameter.dim() == 3)
    ]


def _elements(module: nn.Module, weight: torch.Tensor, experts_per_token: int) -> float:
    if isinstance(module, nn.Linear):  # its weight may be packed to 4 bits
        return module.in_features * module.out_features
    if hasattr(module, "num_experts") and weight.dim() == 3:
        return weight.numel() * experts_per_token / len(weight)
    return weight.numel()


# -- rows and pairs ----------------------------------------------------------------------------------------------------


def _is_used(layer: _Layer, config: Any) -> bool:
    """Whether the loss depends on it: LLaVA takes the features of the last block but one."""
    if layer.part != "vision_tower":
        return True
    num_blocks = getattr(config.vision_config, "num_hidden_layers", math.inf)
    taken = max(index if index >= 0 else num_blocks + 1 + index for index in _feature_layers(config))
    return layer.block < taken and _POOLING_HEAD not in layer.name.split(".")


def _feature_layers(config: Any) -> list[int]:
    """Of the tower's hidden states, the first of which is what the first block is given."""
    found = getattr(config, "vision_feature_layer", -1)
    return [found] if isinstance(found, int) else list(found)


def _patch_embedding(layers: Sequence[_Layer]) -> Any:
    """The tower's convolution; None for a family without tower."""
    of_tower = (layer.module for layer in layers if layer.part == "vision_tower")
    return next((module for module in of_tower if isinstance(module, _CONVOLUTION)), None)


def _of_images(layers: Sequence[_Layer], config: Any) -> StepFlops:
    """Sizes, and no FLOPs yet."""
    patches = _patch_embedding(layers)
    if patches is None:
        return StepFlops()
    height, width = patches.kernel_size[-2:]
    merge_size = getattr(config.vision_config, "spatial_merge_size", 1)
    has_windows = hasattr(config.vision_config, "fullatt_block_indexes")
    of_tower = [layer.module for layer in layers if layer.part == "vision_tower"]
    return StepFlops(
        patch_size=(height, width),
        class_tokens=sum(hasattr(module, name) for module in of_tower for name in _CLASS_TOKENS),
        merge_size=merge_size,
        window_size=config.vision_config.window_size // merge_size // height if has_windows else 1,
        patch_width=patches.out_channels * len(_feature_layers(config)),
    )


def _features_per_patch(layers: Sequence[_Layer], config: Any) -> float | None:
    """Numbers of each patch that reach the projector; None for a family without tower."""
    patches = _patch_embedding(layers)
    if patches is None:
        return None
    kept = 1.0
    if hasattr(config, "mm_tokens_per_image"):  # Gemma-3 takes means of patches
        kept = config.mm_tokens_per_image / (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return float(patches.out_channels * len(_feature_layers(config)) * kept)


def _rows(first: _Layer, features_per_patch: float | None) -> tuple[str, float]:
    """Kind of the rows of a module whose first matrix this is, and how many there are for one of that kind."""
    if first.part == "language_model":
        return "token", 1.0
    if first.part == "head":
        return "loss_token", 1.0
    if first.part == "vision_tower":
        return "patch" if isinstance(first.module, _CONVOLUTION) else "position", 1.0
    # what is merged lies side by side in a row of the projector's input
    return "projected", 1.0 if features_per_patch is None else features_per_patch / first.width_in


def _add_pairs(found: StepFlops, output: _Layer, scores_train: bool, config: Any) -> None:
    """output: the matrix behind the attention, which takes what its heads give, side by side."""
    flops = 4.0 * output.width_in * (3 if scores_train else 1)
    whole = getattr(getattr(config, "vision_config", None), "fullatt_block_indexes", None)
    if output.part == "language_model":
        found.text_per_pair[_text_window(output.block, config.get_text_config())] += flops
    elif whole is None or output.block in whole:
        found.vision_per_pair += flops
    else:
        found.vision_per_window_pair += flops


def _text_window(block: int, text_config: Any) -> int | None:
    """Keys that a query of this block sees at most; None for no limit."""
    kinds = getattr(text_config, "layer_types", None)
    slides = kinds is None or kinds[block] == "sliding_attention"
    return getattr(text_config, "sliding_window", None) if slides else None
