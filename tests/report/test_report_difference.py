"""The difference that is marked: it joins to both texts and marks as much as the fuzzy score counts."""

import json
import random

import pytest
from made_up_run import add_evaluation, make_run, receipt_rows
from rapidfuzz.distance import Indel

from vlmdist.report.page import write_report


@pytest.fixture
def page(tmp_path, browser):
    run = make_run(tmp_path / "run", steps=3)
    add_evaluation(run, "step-000003", receipt_rows(3))
    browser.open(write_report([run]))
    return browser


def differences(page, pairs):
    return page.ask(f"{json.dumps(pairs)}.map(([a, b]) => difference(a, b))")


def marked(pieces):
    return [text for text, differs in pieces if differs]


def test_pieces_join_to_both_texts_and_what_is_not_marked_is_common(page):
    rng = random.Random(0)
    texts = [("".join(rng.choices("ab 1.,#é\n", k=rng.randint(0, 40)))) for _ in range(800)]
    pairs = list(zip(texts, [*texts[1:], ""], strict=True)) + [(t, t) for t in texts[:20]]
    for (a, b), (left, right) in zip(pairs, differences(page, pairs), strict=True):
        assert "".join(text for text, _ in left) == a
        assert "".join(text for text, _ in right) == b
        assert "".join(t for t, differs in left if not differs) == "".join(t for t, differs in right if not differs)
        assert (a == b) == (not marked(left + right))


def test_inside_a_word_as_much_is_marked_as_the_score_counts(page):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcd", k=rng.randint(4, 20))) for _ in range(400)]
    pairs = [(a, b) for a, b in zip(words, words[1:], strict=False) if Indel.normalized_similarity(a, b) >= 0.5]
    assert len(pairs) > 50
    for (a, b), (left, right) in zip(pairs, differences(page, pairs), strict=True):
        assert sum(map(len, marked(left) + marked(right))) == Indel.distance(a, b)


def test_letters_inside_like_words_and_whole_words_otherwise(page):
    pairs = [("total 12.90 EUR", "total 12.40 EUR"), ("milk and bread", "milk and xyzzy"), ("नमस्ते 👩‍🚀", "नमस्ते 👩‍🚀 é")]
    (left, right), (truth, answer), (_, writing) = differences(page, pairs)
    assert (marked(left), marked(right)) == (["9"], ["4"])
    assert (marked(truth), marked(answer)) == (["bread"], ["xyzzy"])
    assert marked(writing) == [" é"]


def test_a_patchwork_is_marked_as_a_whole_and_long_texts_are_no_trouble(page):
    long = [("&a" * 1000, "&'" * 1000), ("a b " * 1000, "b a " * 1000), ("a" * 4000, "b" * 4000)]
    for (a, b), (left, right) in zip(long, differences(page, long), strict=True):
        assert "".join(text for text, _ in left) == a
        assert "".join(text for text, _ in right) == b
        assert len(left) < 200
