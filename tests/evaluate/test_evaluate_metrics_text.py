import random
from fractions import Fraction
from functools import cache

import pytest

from vlmdist.evaluate.metrics import METRICS, UnreadableTruth

anls, cer, exact, fuzzy_text = METRICS["anls"], METRICS["cer"], METRICS["exact"], METRICS["fuzzy_text"]


def test_exact_and_fuzzy_by_hand():
    assert exact("dog", " dog\n").figures == {"score": 100, "exact": 100}
    assert exact("dog", "Dog").figures["score"] == 0
    assert fuzzy_text("dog", "dig ").figures == {"score": 67, "exact": 0}


@pytest.mark.parametrize(
    ("truth", "prediction", "score"),
    [
        ("abcd", "abcd", 100),
        ("abcd", "abce", 75),
        ("abcd", "ab", 0),  # a distance of exactly half is over
        ("abcde", "abc", 60),
        ("The  Dog ", "the dog", 100),
        ("thedog", "the dog", 100 * 6 / 7),
        ('["no", "yes", "yeah"]', "Yes", 100),
        ('["12:00", "noon"]', "12:30", 80),
        ("[sic", "[sic", 100),
        ("", "", 100),
        ("", "x", 0),
        ("x", "", 0),
    ],
)
def test_anls_by_hand(truth, prediction, score):
    assert anls(truth, prediction).figures["score"] == pytest.approx(score)


@pytest.mark.parametrize("truth", ["[]", "[1]", '["a", null]'])
def test_anls_refuses_a_list_of_no_answers(truth):
    with pytest.raises(UnreadableTruth):
        anls(truth, "a")


def test_cer_by_hand():
    found = cer("14.10", "RM 14.1")
    assert found.ratios == {"character_error_rate": (400, 5)}  # "RM " too much, "0" missing
    assert found.figures == {"score": pytest.approx(20), "exact": 0}
    assert cer("ab", "something else").figures["score"] == 0
    assert cer("ab", "something else").ratios["character_error_rate"] == (1400, 2)
    assert (cer("", "").figures["score"], cer("", "x").figures["score"]) == (100, 0)


# -- against the definition of the edit distance -----------------------------------------------------------------------


def distance(a: str, b: str) -> int:
    """Levenshtein distance, straight from its recursion; nothing of rapidfuzz."""

    @cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


def reference_anls(answers: list[str], given: str) -> Fraction:
    best = Fraction(0)
    for answer in answers:
        a, b = (" ".join(text.split()).lower() for text in (answer, given))
        share = Fraction(distance(a, b), max(len(a), len(b))) if a or b else Fraction(0)
        if share < Fraction(1, 2):
            best = max(best, 1 - share)
    return 100 * best


def test_anls_and_cer_agree_with_the_definition_on_random_pairs():
    rng = random.Random(30)
    num_between = 0
    for _ in range(2000):
        alphabet = rng.choice(["ab", "aAbB ", "0123.", "вино \u00e9\U0001f600"])
        truth = "".join(rng.choices(alphabet, k=rng.randrange(9)))
        letters = list(truth)
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(letters) + 1)
            letters[place : place + rng.randrange(2)] = rng.choices(alphabet, k=rng.randrange(2))
        given = "".join(letters)
        found = anls(truth, given).figures["score"]
        assert found == pytest.approx(float(reference_anls([truth], given)))
        num_between += 0 < found < 100
        wanted = truth.strip()
        assert cer(truth, given).ratios["character_error_rate"] == (100 * distance(wanted, given.strip()), len(wanted))
    assert num_between > 200
