"""The difference that is marked: it joins to both texts and marks as much as the fuzzy score counts."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmdist.report.curves import smoothed, thin
from vlmdist.report.shown_text import difference, shorten, show_difference, visible

TEXTS = st.text(alphabet="ab 1.,#é\n", max_size=40)


@given(TEXTS, TEXTS)
def test_pieces_join_to_both_texts_and_what_is_not_marked_is_common(a, b):
    left, right = difference(a, b)
    assert "".join(p.text for p in left) == a
    assert "".join(p.text for p in right) == b
    assert "".join(p.text for p in left if not p.differs) == "".join(p.text for p in right if not p.differs)
    assert (a == b) == (not any(p.differs for p in left + right))


def marked(pieces):
    return [p.text for p in pieces if p.differs]


def test_letters_inside_like_words_and_whole_words_otherwise():
    left, right = difference("total 12.90 EUR", "total 12.40 EUR")
    assert (marked(left), marked(right)) == (["9"], ["4"])
    left, right = difference("milk and bread", "milk and xyzzy")
    assert (marked(left), marked(right)) == (["bread"], ["xyzzy"])


def test_a_patchwork_is_marked_as_a_whole():
    left, right = difference("&a" * 1000, "&'" * 1000)
    assert "".join(p.text for p in left) == "&a" * 1000
    assert len(left) < 200
    assert "".join(p.text for p in left if not p.differs) == "".join(p.text for p in right if not p.differs)


@pytest.mark.parametrize("a", ["a" * 2000, "a b " * 500, "a.b," * 500])
def test_repetitive_text_is_quick(a):
    started = time.perf_counter()
    show_difference(a, a[::-1] + "b a", 2000)
    assert time.perf_counter() - started < 1


def test_a_long_text_is_cut_and_says_so():
    truth, prediction = show_difference("short", "x" * 3000, 2000)
    assert truth.cut_from is None
    assert prediction.cut_from == 3000
    assert sum(len(p.text) for p in prediction.pieces) == 2000


def test_what_cannot_be_seen_is_written_out():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x00\x07\x7f\u200b\ud83d") == "⟨U+0000⟩⟨U+0007⟩⟨U+007F⟩⟨U+200B⟩⟨U+D83D⟩"
    assert visible("नमस्ते 👩‍🚀 é") == "नमस्ते 👩‍🚀 é"  # joiners that belong to writing stay
    assert shorten("abcdef", 3) == "abc…"


def test_thinning_keeps_spikes_and_ends():
    steps = list(range(10_000))
    values = [float(i % 7) for i in steps]
    values[4321] = 1e6
    xs, ys = thin(steps, values, 400)
    assert len(xs) <= 400
    assert max(ys) == 1e6
    assert xs == sorted(xs)


def test_smoothing_passes_over_missing_values_and_does_not_lag():
    nan = float("nan")
    assert smoothed([nan, 2.0, nan, 2.0], 5)[1:] == [2.0, 2.0, 2.0]
    ramp = smoothed([float(i) for i in range(101)], 10)
    assert ramp[50] == pytest.approx(50, abs=0.01)
