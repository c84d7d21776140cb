"""Words of others and tables in Markdown."""

import re


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def escaped(text: str) -> str:
    """Words of others inside Markdown: no markup, no line break."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def in_code(text: str) -> str:
    """Words of others in code type; a table's cells must not break on them."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "¦")
    return f"`{plain}`"


def fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = text if text.endswith("\n") else text + "\n"
    return f"{fence}{language}\n{body}{fence}"
