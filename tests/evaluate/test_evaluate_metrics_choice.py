import json

import pytest

from vlmdist.evaluate.metrics import METRICS, UnreadableTruth
from vlmdist.evaluate.parse import find_choice
from vlmdist.evaluate.scores import score_rows

choice, choice_circular = METRICS["choice"], METRICS["choice_circular"]
OPTIONS = {"A": "a cat", "B": "a dog", "C": "two dogs", "D": "none of these"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B.\n", "B"),
        ("(C)", "C"),
        ("The answer is (C), not B", "C"),
        ("The answer is B", "B"),
        ("First I thought of B but it is D", "D"),
        ("(A) or (B)? (A)", "A"),
        ("B. a dog", "B"),
        ("B) a dog", "B"),
        ("Answer: B: a dog", "B"),
        ("BAD", None),
        ("b", None),
        ("E", None),
        ("", None),
        ("a dog", None),  # MMMU looks for an option's text in answers of more than five words only
        ("In this picture there is clearly a DOG", "B"),
        ("In this picture there is clearly A Dog", "A"),  # as MMMU reads it
        ("Here we see not a cat but two dogs", "C"),
        ("There is nothing at all in this picture", None),
    ],
)
def test_find_choice(answer, letter):
    assert find_choice(answer, OPTIONS) == letter


def test_choice_by_hand():
    truth = json.dumps({"answer": "B", "options": list(OPTIONS.values())})
    assert choice(truth, "B").figures == {"score": 100, "exact": 100, "parsed": 100}
    assert choice(truth, "(A)").figures == {"score": 0, "exact": 0, "parsed": 100}
    assert choice(truth, "no idea").figures == {"score": 0, "exact": 0, "parsed": 0}
    assert choice("B", "B.").figures["score"] == 100
    assert choice("G", "G").figures["score"] == 100


@pytest.mark.parametrize(
    "truth",
    [
        "",
        "b",
        "BC",
        "[]",
        '{"answer": "B"}',
        '{"answer": "B", "options": ["one"]}',
        '{"answer": "C", "options": ["one", "two"]}',
        '{"answer": ["A"], "options": ["one", "two"]}',
        '{"answer": "A", "options": ["one", "two"], "question": [1]}',
    ],
)
def test_a_truth_in_another_form_is_refused(truth):
    with pytest.raises(UnreadableTruth):
        choice(truth, "A")


def test_circular_needs_the_question():
    with pytest.raises(UnreadableTruth, match="question"):
        choice_circular('{"answer": "A", "options": ["one", "two"]}', "A")


def _passes(question, texts, right, answer):
    """Rows of all passes of a question: the options moved on by one place each time, as MMBench does."""
    rows = []
    for shift in range(len(texts)):
        options = texts[-shift:] + texts[:-shift] if shift else texts
        truth = {"answer": "ABCDEF"[options.index(right)], "options": options, "question": question}
        rows.append({"id": f"{question}-{shift}", "truth": json.dumps(truth), "prediction": answer(options)})
    return rows


def test_a_question_is_right_where_all_its_passes_are():
    knows = _passes("q1", ["cat", "dog", "cow"], "dog", lambda options: "ABC"[options.index("dog")])
    always_a = _passes("q2", ["cat", "dog", "cow", "pig"], "cow", lambda options: "A")
    scores = score_rows([*knows, *always_a], "choice_circular")
    assert scores["score"] == 50
    assert scores["figures"] == {"parsed": 100, "each_pass": pytest.approx(400 / 7), "complete": 100, "exact": 50}
    assert (scores["num_samples"], scores["num_clusters"]) == (7, 2)


def test_a_question_whose_passes_are_not_all_there_is_left_out():
    knows = _passes("q1", ["cat", "dog"], "dog", lambda options: "AB"[options.index("dog")])
    cut = _passes("q2", ["cat", "dog"], "cat", lambda options: "B")[:1]
    scores = score_rows([*knows, *cut], "choice_circular")
    assert (scores["score"], scores["figures"]["complete"]) == (100, 50)
    # the same pass twice is no whole question either
    twice = [{**row, "id": f"q3-{n}"} for n, row in enumerate([knows[0], knows[0]])]
    assert score_rows(twice, "choice_circular")["figures"]["complete"] == 0
    # a sample that couldn't be read counts as a question that is wrong
    failed = {"id": "x", "truth": None, "prediction": "", "error": "broken JSON"}
    assert score_rows([*knows, failed], "choice_circular")["score"] == 50
