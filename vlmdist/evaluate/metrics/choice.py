"""Metrics of multiple choice.

The truth (a sample's ``answer``) is the letter of the right option alone, or a JSON object with the options, which then
may be answered by their text as well:

    {"answer": "B", "options": ["a cat", "a dog"]}                        lettered A, B, ... in this order
    {"answer": "B", "options": ["a cat", "a dog"], "question": "17"}      one pass of question 17, for choice_circular
"""

import json
import string
from dataclasses import dataclass

from vlmdist.evaluate.metrics.score import Pass, SampleScore, UnreadableTruth, percent, whole
from vlmdist.evaluate.parse import find_choice

LETTERS_WITHOUT_OPTIONS = "ABCDE"
"""Those an answer may name where the truth is a letter alone, and those up to the truth's own."""


@dataclass(frozen=True)
class _Question:
    answer: str
    options: dict[str, str]
    """Text by letter; "" where it isn't known."""
    name: str | None


def choice(truth: str, prediction: str) -> SampleScore:
    """100 where the answer chooses the right option.

    Source: MMMU's ``parse_multi_choice_response``, https://github.com/MMMU-Benchmark/MMMU (eval/eval_utils.py), see
    ``find_choice``; an answer that names no option is wrong here, where MMMU guesses. "parsed": the answer names one.
    Raises UnreadableTruth for a truth in another form than the two above.
    """
    return _score(_read_truth(truth), prediction)


def choice_circular(truth: str, prediction: str) -> SampleScore:
    """CircularEval: a question of N options is asked N times, the options moved on by one; right where all passes are.

    Source: Liu et al., MMBench, ECCV 2024, https://arxiv.org/abs/2307.06281. "score" and "exact" of the
    corpus are over questions, "each_pass" is the plain share of right passes. A question whose passes are not all there
    (one for each letter as the right answer) is left out of the score; "complete" is the share that has them. Answers
    are read as in ``choice``: no language model is asked. Raises UnreadableTruth as ``choice`` does, and where the
    truth doesn't name its "question".
    """
    question = _read_truth(truth)
    if question.name is None:
        raise UnreadableTruth('the truth doesn\'t say which "question" it is a pass of')
    score = _score(question, prediction)
    return SampleScore(
        {**score.figures, "each_pass": score.figures["score"]},
        circular=Pass(question.name, question.answer, len(question.options)),
    )


def _score(question: _Question, prediction: str) -> SampleScore:
    chosen = find_choice(prediction, question.options)
    is_right = chosen == question.answer
    return SampleScore({**whole(percent(is_right), is_right), "parsed": percent(chosen is not None)})


def _read_truth(truth: str) -> _Question:
    bare = truth.strip()
    if len(bare) == 1 and bare in string.ascii_uppercase:
        letters = string.ascii_uppercase[: max(len(LETTERS_WITHOUT_OPTIONS), string.ascii_uppercase.index(bare) + 1)]
        return _Question(bare, dict.fromkeys(letters, ""), None)
    try:
        record = json.loads(bare)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UnreadableTruth('the truth is neither a letter nor {"answer": letter, "options": [text, ...]}')
    texts, name = record.get("options"), record.get("question")
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise UnreadableTruth('the truth\'s "options" must be a list of 2 to 26 texts')
    options = dict(zip(string.ascii_uppercase, map(str, texts), strict=False))
    if record.get("answer") not in list(options):
        raise UnreadableTruth(f'the truth\'s "answer" must be the letter of an option, A to {[*options][-1]}')
    if name is not None and not isinstance(name, str | int):
        raise UnreadableTruth('the truth\'s "question" must be a string or a whole number')
    return _Question(record["answer"], options, None if name is None else str(name))
