"""From the scores of samples to the figures of a corpus: each is a sum over samples divided by a sum.

A mean over samples has 1 of each below the line, an F1 the fields that it counts. Which samples depend on each other
(the same image, the same raw line, passes of one question) is told by their cluster.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmdist.evaluate.metrics import Pass, SampleScore
from vlmdist.sample import Sample

CLUSTER_LETTERS = 16

Key = tuple[str, str]
"""(field, figure); the field is "" for figures of whole answers."""


@dataclass
class Figure:
    """The terms of one figure, a sample each; [n] lists of equal length."""

    samples: list[int] = field(default_factory=list)
    """Place of the sample in the list of scores."""
    numerators: list[float] = field(default_factory=list)
    denominators: list[int] = field(default_factory=list)

    def add(self, sample: int, numerator: float, denominator: int = 1) -> None:
        """One sample's part of the figure; a mean is a ratio of denominator 1."""
        self.samples.append(sample)
        self.numerators.append(numerator)
        self.denominators.append(denominator)

    def value(self) -> float:
        """Sum / sum, correctly rounded whatever the order of the samples; 0 where nothing is below the line."""
        below = sum(self.denominators)
        return math.fsum(self.numerators) / below if below else 0.0


def gather_figures(scores: Sequence[SampleScore]) -> dict[Key, Figure]:
    """All figures of a corpus: of whole answers under ("", name); a field's "score" and "exact" under its name."""
    figures: dict[Key, Figure] = {("", "score"): Figure()}
    for i, score in enumerate(scores):
        by_question = ("score", "exact") if score.circular else ()
        for name, value in score.figures.items():
            if name not in score.ratios and name not in by_question:
                figures.setdefault(("", name), Figure()).add(i, value)
        for name, (above, below) in score.ratios.items():
            figures.setdefault(("", name), Figure()).add(i, above, below)
        for name, one in score.fields.items():
            figures.setdefault((name, "score"), Figure()).add(i, one.score)
            figures.setdefault((name, "exact"), Figure()).add(i, 100.0 if one.exact else 0.0)
    _add_questions(figures, scores)
    return figures


def cluster_of(sample: Sample) -> str:
    """What a sample shares with others that ask about the same thing: kept in its row, for the statistics.

    Its meta's "cluster" where the corpus names one (copies of one picture, say); else a digest of its images' bytes;
    without an image, of the question's text (the raw line).
    """
    named = sample.meta.get("cluster")
    if isinstance(named, str | int):
        return str(named)
    digest = hashlib.sha256()
    parts = sample.images or [m.text.encode() for m in sample.question]
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:CLUSTER_LETTERS]


def number_clusters(rows: Sequence[dict[str, Any]], scores: Sequence[SampleScore]) -> list[int]:
    """The number of each row's cluster [N], counted from 0 in the order of the clusters' names.

    Passes of one question are in one cluster, that of the first of them by id. A row without a "cluster" (in a file
    from elsewhere) stands alone.
    """
    names = [_name_of(row) for row in rows]
    of_question: dict[str, tuple[str, str]] = {}
    for i in sorted(range(len(rows)), key=lambda i: str(rows[i]["id"])):
        if (asked := scores[i].circular) is not None:
            names[i] = of_question.setdefault(asked.question, names[i])
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return [numbers[name] for name in names]


def _name_of(row: dict[str, Any]) -> tuple[str, str]:
    if (cluster := row.get("cluster")) is not None:
        return "cluster", str(cluster)
    return type(row["id"]).__name__, str(row["id"])  # 1 and "1" are two samples


def _add_questions(figures: dict[Key, Figure], scores: Sequence[SampleScore]) -> None:
    """A question that is asked in several passes counts once, and only where they are all there."""
    questions: dict[str, list[int]] = {}
    for i, score in enumerate(scores):
        if score.circular:
            questions.setdefault(score.circular.question, []).append(i)
    for passes in questions.values():
        is_complete = _are_all_passes([asked for i in passes if (asked := scores[i].circular)])
        figures.setdefault(("", "complete"), Figure()).add(passes[0], 100.0 if is_complete else 0.0)
        for name in ("score", "exact") if is_complete else ():
            worst = min(scores[i].figures[name] for i in passes)
            figures.setdefault(("", name), Figure()).add(passes[0], worst)


def _are_all_passes(passes: list[Pass]) -> bool:
    """Moving N options on N times puts the right one at each letter once."""
    counts = Counter(p.answer for p in passes)
    return {p.num_options for p in passes} == {len(counts)} and set(counts.values()) == {1}
