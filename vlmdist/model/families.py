"""Where the parts of each model family are: one row a family.

Module names are those of transformers 5, seen from the model that AutoModelForImageTextToText (or ForCausalLM) gives.
A family that is not listed is a text model: language model ``model``, head ``lm_head``, nothing else.
"""

from dataclasses import dataclass

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

FAMILIES = {
    # model_type: its parts
    "llava": _LLAVA,
    "internvl": _LLAVA,
}


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type, TEXT)
