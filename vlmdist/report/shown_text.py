"""Text of models and corpora as the page shows it: of bounded length, without invisible tricks.

Escaping is the template's work (autoescape), or the script's, which writes text and never HTML.
"""

import re
from typing import Any

# Control characters, direction overrides, half surrogate pairs and noncharacters: nothing a reader could see.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def visible(text: Any) -> str:
    """The text with characters that can't be seen written out, such as ⟨U+202E⟩."""
    return _INVISIBLE.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text if isinstance(text, str) else str(text))


def shorten(text: Any, limit: int) -> str:
    """Visible text of at most ``limit`` characters and an ellipsis."""
    text = text if isinstance(text, str) else str(text)
    return visible(text[:limit]) + ("…" if len(text) > limit else "")
