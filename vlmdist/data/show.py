"""A sample as the model sees it: its tokens, the ones in the loss marked."""

import sys
from typing import Any

import numpy as np

from vlmdist.data.prompt import Encoded, Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample, UserError

_NUM_LENGTHS = 200  # samples tokenized for the distribution of lengths
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def as_seen(corpus: Corpus, prompter: Prompter, key: str | None) -> dict[str, Any]:
    """Token lengths of evenly spaced samples, and one sample's tokens in runs of (in the loss, text)."""
    number = _number_of(corpus, key)
    lengths, bad = [], []
    for i in np.linspace(0, len(corpus) - 1, min(len(corpus), _NUM_LENGTHS)).astype(int):
        try:
            lengths.append(len(prompter.encode_training(corpus.read(int(i))).input_ids))
        except BadSample as e:
            bad.append({"key": corpus.key(int(i)), "why": str(e)})
    facts: dict[str, Any] = {"samples_tokenized": len(lengths) + len(bad), "bad": bad[:20]}
    if lengths:
        quantiles = np.percentile(lengths, [0, 50, 95, 100])
        facts["tokens"] = dict(zip(("min", "median", "p95", "max"), (int(q) for q in quantiles), strict=True))
    try:
        facts["sample"] = {
            "key": corpus.key(number),
            "runs": _runs(prompter, prompter.encode_training(corpus.read(number))),
        }
    except BadSample as e:
        facts["sample"] = {"key": corpus.key(number), "bad": str(e)}
    return facts


def format_as_seen(facts: dict[str, Any]) -> str:
    """For a terminal: what is in the loss is green, or between ⟦ ⟧ where there are no colours."""
    colour = sys.stdout.isatty()
    lines = []
    if "tokens" in facts:
        t = facts["tokens"]
        lines.append(
            f"tokens of {facts['samples_tokenized']} samples: {t['min']} to {t['max']}, "
            f"median {t['median']}, p95 {t['p95']}"
        )
    lines += [f"bad: {b['key']}: {b['why']}" for b in facts["bad"]]
    sample = facts["sample"]
    lines.append(f"sample {sample['key']}, the tokens in the loss {'in green' if colour else 'between ⟦ and ⟧'}:")
    if "bad" in sample:
        return "\n".join([*lines, f"can't be used: {sample['bad']}"])
    opening, closing = (_GREEN, _PLAIN) if colour else ("⟦", "⟧")
    lines.append("".join(f"{opening}{r['text']}{closing}" if r["in_loss"] else r["text"] for r in sample["runs"]))
    return "\n".join(lines)


def _number_of(corpus: Corpus, key: str | None) -> int:
    if key is None:
        return 0
    number = corpus.find(key)
    if number is not None:
        return number
    raise UserError(f"--key: {key!r} is not in {corpus.name}")


def _runs(prompter: Prompter, encoded: Encoded) -> list[dict[str, Any]]:
    """Neighbouring tokens with the same mark as one text; a run of image tokens is told by its length."""
    runs: list[dict[str, Any]] = []
    start, ids, marks = 0, encoded.input_ids, encoded.in_loss
    for end in range(1, len(ids) + 1):
        if end == len(ids) or marks[end] != marks[start]:
            text = prompter.tokenizer.decode(ids[start:end], skip_special_tokens=False)
            runs.append(
                {"in_loss": marks[start], "num_tokens": end - start, "text": _fold_images(text, prompter.image_token)}
            )
            start = end
    return runs


def _fold_images(text: str, image_token: str | None) -> str:
    if not image_token or image_token * 2 not in text:
        return text
    count = text.count(image_token)
    first = text.index(image_token)
    last = text.rindex(image_token) + len(image_token)
    return text[:first] + f"{image_token} x {count}" + text[last:]
