"""Metrics of whole texts."""

import json

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

from vlmdist.evaluate.metrics.score import FieldScore, SampleScore, UnreadableTruth, percent, whole

ANLS_THRESHOLD = 0.5


def similar(truth: str, prediction: str) -> FieldScore:
    """Rounded Indel similarity (rapidfuzz.fuzz.ratio) of two values: 200 x common subsequence / both lengths."""
    return FieldScore(float(round(fuzz.ratio(truth, prediction))), truth == prediction, truth, prediction)


def fuzzy_text(truth: str, prediction: str) -> SampleScore:
    """Rounded Indel similarity of the two whole texts, stripped (rapidfuzz.fuzz.ratio, as in ``fuzzy``)."""
    both = similar(truth.strip(), prediction.strip())
    return SampleScore(whole(both.score, both.exact))


def exact(truth: str, prediction: str) -> SampleScore:
    """100 where the two whole texts are equal once stripped, else 0."""
    equal = truth.strip() == prediction.strip()
    return SampleScore(whole(percent(equal), equal))


def anls(truth: str, prediction: str) -> SampleScore:
    """Normalised Levenshtein similarity to the nearest of the accepted answers; 0 from a distance of half on.

    The truth is one answer or a JSON list of several. Source: Biten et al., Scene Text Visual Question Answering, ICCV
    2019, https://arxiv.org/abs/1905.13648: 1 - NL where NL = distance / longer length < 0.5, else 0. As in the
    challenges that use it (ST-VQA, DocVQA) letter case and the number of spaces don't count.
    """
    given = _plain(prediction)
    accepted = [_plain(answer) for answer in _accepted(truth)]
    return SampleScore(whole(100.0 * max(_anls_of(answer, given) for answer in accepted), given in accepted))


def cer(truth: str, prediction: str) -> SampleScore:
    """Character errors (insertions, deletions, substitutions of code points) of the two whole texts, stripped.

    "character_error_rate" of a corpus: errors / characters of the truth, over all samples, in percent; over 100 where
    answers are long and wrong. "score" is character accuracy, 100 - errors / characters of the sample, no less than 0,
    and so is better where it is higher. Source: Rice, Measuring the Accuracy of Page-Reading Systems, 1996.
    """
    wanted, given = truth.strip(), prediction.strip()
    errors = Levenshtein.distance(wanted, given)
    rate = errors / len(wanted) if wanted else float(errors > 0)
    score = 100.0 * max(0.0, 1.0 - rate)
    return SampleScore(whole(score, errors == 0), ratios={"character_error_rate": (100.0 * errors, len(wanted))})


def _anls_of(truth: str, prediction: str) -> float:
    longer = max(len(truth), len(prediction))
    if longer == 0:
        return 1.0
    # beyond the threshold the distance needn't be known: two texts of a megabyte take minutes
    distance = Levenshtein.distance(truth, prediction, score_cutoff=longer // 2)
    return 1.0 - distance / longer if distance / longer < ANLS_THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _accepted(truth: str) -> list[str]:
    if not truth.lstrip().startswith("["):
        return [truth]
    try:
        answers = json.loads(truth)
    except (ValueError, RecursionError):
        return [truth]  # an answer that begins with a bracket
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UnreadableTruth("the truth is a JSON list, but not of one or more accepted answers (strings)")
    return list(answers)
