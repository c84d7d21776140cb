"""An answer on standard output as it grows, and its JSON below it. Nothing in it can act on a terminal."""

import json
import sys
from typing import Any

from vlmdist.predict.answer import Answer
from vlmdist.report.shown_text import visible


class Printer:
    """Prints what an answer has grown by, at once; characters that can't be seen are written out (⟨U+001B⟩)."""

    def __init__(self) -> None:
        self._printed = ""

    def print_growth(self, text: str) -> None:
        """text: all of the answer so far."""
        if not text.startswith(self._printed):  # the tokenizer took something back
            print("\n", end="")
            self._printed = ""
        print(visible(text[len(self._printed) :]), end="", flush=True)
        self._printed = text

    def end(self, answer: Answer) -> None:
        """The line's end; on a terminal a JSON answer follows once more, in lines."""
        print(flush=True)
        if answer.json is not None and sys.stdout.isatty():
            print(f"\n{pretty(answer.json)}", flush=True)


def pretty(value: dict[str, Any]) -> str:
    return visible(json.dumps(value, indent=2, ensure_ascii=False))
