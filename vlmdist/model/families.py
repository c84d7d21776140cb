"""Where the parts of each model family are: one row a family.

Module names are those of transformers 5, seen from the model that AutoModelForImageTextToText (or ForCausalLM) gives.
A family that is not listed is taken for one with the usual names where its configuration has a vision tower, else for
a text model: language model ``model``, head ``lm_head``, nothing else.
"""

from dataclasses import dataclass
from typing import Any

PARTS = ("vision_tower", "projector", "language_model", "head")


@dataclass(frozen=True)
class Family:
    """Module name prefixes of each part; empty where the family has none."""

    vision_tower: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    language_model: tuple[str, ...] = ("model",)
    head: tuple[str, ...] = ("lm_head",)

    @property
    def sees(self) -> bool:
        return bool(self.vision_tower or self.projector)

    def part_of(self, name: str) -> str | None:
        """The part that a module or parameter belongs to; the longest matching prefix decides."""
        best, best_length = None, -1
        for part in PARTS:
            for prefix in getattr(self, part):
                if (name == prefix or name.startswith(prefix + ".")) and len(prefix) > best_length:
                    best, best_length = part, len(prefix)
        return best


TEXT = Family()

_LLAVA = Family(("model.vision_tower",), ("model.multi_modal_projector",), ("model.language_model",))
_IDEFICS3 = Family(("model.vision_model",), ("model.connector",), ("model.text_model",))
_QWEN_VL = Family(("model.visual",), ("model.visual.merger",), ("model.language_model",))
_USUAL = Family(
    ("model.vision_tower", "model.vision_model", "model.visual"),
    (
        "model.multi_modal_projector",
        "model.image_newline",
        "model.connector",
        "model.visual.merger",
        "model.visual.deepstack_merger_list",
    ),
    ("model.language_model", "model.text_model"),
)

FAMILIES = {
    # model_type: its parts
    "fuyu": Family((), ("model.vision_embed_tokens",), ("model.language_model",)),  # patches straight into the decoder
    "gemma3": _LLAVA,
    "idefics3": _IDEFICS3,
    "internvl": _LLAVA,
    "llava": _LLAVA,
    "llava_next": Family(
        ("model.vision_tower",), ("model.multi_modal_projector", "model.image_newline"), ("model.language_model",)
    ),
    "paligemma": _LLAVA,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": Family(
        ("model.visual",), ("model.visual.merger", "model.visual.deepstack_merger_list"), ("model.language_model",)
    ),
    "smolvlm": _IDEFICS3,
    "vlmdist_moondream": _LLAVA,
}


def auto_model(family: Family) -> Any:
    """transformers' class that makes or loads a model of the family."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if family.sees else AutoModelForCausalLM


def family_of(transformers_config: Any) -> Family:
    """By the model's configuration."""
    usual = _USUAL if hasattr(transformers_config, "vision_config") else TEXT
    return FAMILIES.get(transformers_config.model_type, usual)
