import json
import random
from fractions import Fraction

import pytest
import reference_scorer as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdist.evaluate.metrics import METRICS, UnreadableTruth

fuzzy, fuzzy_fields, count_json = METRICS["fuzzy"], METRICS["fuzzy_fields"], METRICS["count_json"]
exact_json, f1_fields, valid_json = METRICS["exact_json"], METRICS["f1_fields"], METRICS["valid_json"]

CHECK_TRUTH = {
    "company": "ABC HO TRADING",
    "date": "29-12-2017",
    "address": "67,JLN MEWAH 25/63 TMN SRI MUDA, 40400 SHAH ALAM.",
    "total": "14.10",
}
CHECK_PREDICTION = {
    "company": "ABC HO TRADING",
    "date": "742016-W",
    "address": "67, JLN Mewah 25/63 TWN SRI HUDA, 40400 SHAH ALAM.",
    "total": "RM 14.10",
}


def test_published_check_value():
    found = fuzzy(json.dumps(CHECK_TRUTH), "```json\n" + json.dumps(CHECK_PREDICTION) + "\n```")
    assert {name: f.score for name, f in found.fields.items()} == {
        "company": 100,
        "date": 33,
        "address": 87,
        "total": 77,
    }
    assert found.figures["score"] == 74.25
    assert found.figures["exact"] == 0
    assert found.fields["company"].exact
    assert not found.fields["total"].exact


def test_fuzzy_by_hand():
    # "abc" and "abd": "ab" is common, 200 * 2 / 6 = 66.67 -> 67; a missing field compares with "" and gets 0
    found = fuzzy('{"a": "abc", "b": 5}', '{"a": "abd", "extra": "ignored"}')
    assert (found.fields["a"].score, found.fields["b"].score) == (67, 0)
    assert found.figures["score"] == 33.5
    # numbers compare as text: "14.1" in "14.10" gives 200 * 4 / 9 = 88.9
    assert fuzzy('{"total": "14.10"}', '{"total": 14.1}').figures["score"] == 89
    # halves go to the even neighbour: 200 * 1 / 16 = 12.5 -> 12
    assert fuzzy('{"a": "' + "x" * 8 + '"}', '{"a": "x' + "y" * 7 + '"}').figures["score"] == 12
    assert fuzzy('{"a": null}', '{"a": "None"}').figures["score"] == 100
    assert fuzzy('{"a": ""}', "{}").figures == {"score": 100, "exact": 100, "valid_json": 100}
    assert fuzzy('{"a": "x"}', '[{"a": "x"}]').figures == {"score": 0, "exact": 0, "valid_json": 0}


@pytest.mark.parametrize("truth", ["", "no json", "[1]", "{}", "null"])
def test_fuzzy_refuses_an_unreadable_truth(truth):
    with pytest.raises(UnreadableTruth):
        fuzzy(truth, "{}")


def test_fuzzy_fields_by_hand():
    truth = "Вино игристое Lavetti##Вино##Lavetti##Алкоголь"
    whole = fuzzy_fields(truth, truth)
    assert whole.figures == {"score": 100, "exact": 100, "valid_form": 100}
    # "Вина" for "Вино" 200 * 3 / 8 = 75; "-" for "Lavetti" 0; no category 0
    found = fuzzy_fields(truth, "Вино игристое Lavetti##Вина##-")
    assert {name: f.score for name, f in found.fields.items()} == {
        "normalised": 100,
        "product": 75,
        "brand": 0,
        "category": 0,
    }
    assert found.figures == {"score": 43.75, "exact": 0, "valid_form": 100}


def test_fuzzy_fields_three_fields_and_none():
    found = fuzzy_fields("Бахилы##Бахилы##-", "Бахилы##Бахилы##-##Аптека")
    assert list(found.fields) == ["normalised", "product", "brand"]
    assert found.figures["score"] == 100
    assert fuzzy_fields("Бахилы##Бахилы##-", "Бахилы##Бахилы##--").fields["brand"].score == 0
    assert fuzzy_fields("Бахилы##Бахилы##-", "").figures == {"score": 0, "exact": 0, "valid_form": 0}


def test_fuzzy_fields_finds_the_line_in_chatter():
    chatter = "Of course!\nNormalized product: a##b##c\nExpand abbreviations: z\nNormalized product: z##z##z"
    assert fuzzy_fields("a##b##c", chatter).figures["score"] == 100


@pytest.mark.parametrize("truth", ["", "a", "a##b", "a##b##c##d##e", "a##b\nc##d"])
def test_fuzzy_fields_refuses_an_unreadable_truth(truth):
    with pytest.raises(UnreadableTruth):
        fuzzy_fields(truth, "a##b##c")


def test_exact_fields_by_hand():
    found = exact_json('{"a": "x", "b": "1.0", "c": null}', '{"a": "x", "b": 1.0, "c": "", "d": 0}')
    assert {name: f.exact for name, f in found.fields.items()} == {"a": True, "b": True, "c": False}
    assert found.figures["score"] == pytest.approx(200 / 3)
    assert (found.figures["exact"], found.figures["valid_json"]) == (0, 100)
    assert exact_json('{"a": "x"}', '{"a": "x"').figures == {"score": 0, "exact": 0, "valid_json": 0}


def test_f1_by_hand():
    # of three fields in the truth two are predicted right, one wrong, and one that isn't there: 2 x 2 / (3 + 4)
    truth = '{"company": "A B", "date": "1.1.", "address": "", "total": "5"}'
    found = f1_fields(truth, '{"company": " A B ", "date": "1.1.", "address": "X", "total": "6", "tax": null}')
    assert found.figures["score"] == pytest.approx(100 * 4 / 7)
    assert found.ratios == {"score": (400, 7), "precision": (200, 4), "recall": (200, 3)}
    assert list(found.fields) == ["company", "date", "total"]
    assert f1_fields(truth, "no json").ratios["score"] == (0, 3)
    assert f1_fields('{"a": ""}', "{}").figures["score"] == 100


def test_valid_json_asks_for_an_object():
    assert valid_json("whatever", '```json\n{"a": 1}\n```').figures == {"score": 100, "exact": 0}
    assert valid_json("[1]", "[1]").figures == {"score": 0, "exact": 100}


def test_counts_by_hand():
    truth = json.dumps({"dime": 2, "penny": 5}, indent=2)
    assert count_json(truth, truth + "\n").figures == {
        "score": 100,
        "exact": 100,
        "counts_equal": 100,
        "count_accuracy": 100,
        "valid_json": 100,
        "mean_absolute_error": 0,
    }
    # the same counts written otherwise are not the same answer
    figures = count_json(truth, '{"penny": 5, "dime": 2}').figures
    assert (figures["score"], figures["counts_equal"]) == (0, 100)
    # dime right, penny 1 off, nickel 2 too many: errors 0 + 1 + 2 over three classes
    found = count_json(truth, '{"dime": 2, "penny": 4, "nickel": 2}')
    assert found.figures["mean_absolute_error"] == 1
    assert found.figures["count_accuracy"] == pytest.approx(100 / 3)
    assert {name: f.score for name, f in found.fields.items()} == {"dime": 100, "penny": 0, "nickel": 0}
    assert count_json(truth, "no idea").figures["mean_absolute_error"] == 3.5
    assert count_json("{}", "{}").figures["score"] == 100


@pytest.mark.parametrize("junk", ['"two"', "[2]", "true", "1e300", "-1", "NaN", "2.5", "null", "Infinity", '{"a": 1}'])
def test_a_value_that_is_no_count_is_wrong_and_zero(junk):
    found = count_json('{"dime": 2}', f'{{"dime": {junk}}}')
    assert found.figures["mean_absolute_error"] == 2
    assert not found.fields["dime"].exact
    with pytest.raises(UnreadableTruth):
        count_json(f'{{"dime": {junk}}}', "{}")


# -- against the second scorer -----------------------------------------------------------------------------------------

ALPHABETS = ["ab", "0123456789.-RM ", "abcdefghij KLM,./", "вино ЧАЙлитр№", "aé\u0301\u200b😀\ud800"]


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(30)))


def _near(rng: random.Random, text: str) -> str:
    letters = list(text)
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(letters) + 1)
        letters[place : place + rng.randrange(3)] = rng.choices("ab1 -", k=rng.randrange(3))
    return "".join(letters)


def _close(found: float, expected: Fraction) -> bool:
    return abs(found - float(expected)) < 1e-9


def test_fuzzy_agrees_with_the_second_scorer_on_random_pairs():
    rng = random.Random(20)
    for _ in range(6000):
        truth = {name: _word(rng) for name in rng.sample(["company", "date", "address", "total"], rng.randrange(1, 5))}
        guess = {name: _near(rng, value) for name, value in truth.items() if rng.random() < 0.9}
        text = json.dumps(guess, ensure_ascii=rng.random() < 0.5)
        text = rng.choice([text, f"```json\n{text}\n```", text[:-1], f"[{text}]", text + " "])
        wanted = json.dumps(truth)
        assert _close(fuzzy(wanted, text).figures["score"], reference.fuzzy(wanted, text)), (wanted, text)


def test_fuzzy_fields_agrees_with_the_second_scorer_on_random_pairs():
    rng = random.Random(21)
    for _ in range(4000):
        values = [rng.choice([_word(rng), "-"]).replace("#", "") for _ in range(rng.choice([3, 4]))]
        guess = "##".join(_near(rng, v) for v in values[: rng.randrange(2, 5)]).strip()
        truth = "##".join(values)
        assert _close(fuzzy_fields(truth, guess).figures["score"], reference.fuzzy_fields(truth.strip(), guess)), guess


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, min_size=1, max_size=4), JSON_VALUES)
@settings(max_examples=300, deadline=None)
def test_fuzzy_agrees_with_the_second_scorer_on_any_json(truth, prediction):
    wanted, text = json.dumps(truth), json.dumps(prediction)
    if "```" not in wanted + text:
        assert _close(fuzzy(wanted, text).figures["score"], reference.fuzzy(wanted, text))


# -- whatever the model writes -----------------------------------------------------------------------------------------

TRUTHS = {
    "fuzzy": '{"company": "A", "total": "1.00"}',
    "fuzzy_fields": "a##b##-##d",
    "fuzzy_text": "text",
    "exact": "text",
    "exact_json": '{"company": "A", "total": "1.00"}',
    "f1_fields": '{"company": "A", "total": "1.00"}',
    "valid_json": '{"company": "A"}',
    "count_json": '{"dime": 2}',
    "anls": "text",
    "cer": "text",
    "choice": "B",
    "choice_circular": '{"answer": "B", "options": ["a cat", "a dog"], "question": 17}',
}
RIGHT = {**TRUTHS, "choice_circular": "B"}
MALFORMED = [
    "",
    "\x00\x01\x1b[31m\x7f\x85\u2028",
    "\ud800 half a pair",
    '{"company": "\\ud800", "total": "\\u0000"}',
    '{"company": {"a": [1, {"b": null}]}, "total": [[], {}]}',
    '{"company": NaN, "total": -Infinity, "dime": 1e999}',
    '{"company": 1, "company": [2]}',
    '```json\n{"company": "A"}\n``` and more',
    "[]" * 1000,
    '{"company": ' + "[" * 900 + "]" * 900 + "}",
    '{"company": ' * 100_000,
    '{"dime": ' + "9" * 4000 + "}",
    "x" * 1_000_000,
    '{"company": "' + "y" * 1_000_000 + '"}',
    "##" * 500_000,
    "\n" * 100_000 + "a##b##c",
    "<script>alert(1)</script>",
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prediction", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_prediction_never_crashes_a_metric(metric, prediction):
    score = METRICS[metric](TRUTHS[metric], prediction)
    assert 0 <= score.figures["score"] <= 100
    assert all(0 <= f.score <= 100 for f in score.fields.values())


@pytest.mark.parametrize("metric", METRICS)
@given(prediction=st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_is_scored(metric, prediction):
    assert 0 <= METRICS[metric](TRUTHS[metric], prediction).figures["score"] <= 100


@pytest.mark.parametrize("metric", METRICS)
def test_the_truth_itself_gets_100(metric):
    assert METRICS[metric](TRUTHS[metric], RIGHT[metric]).figures["score"] == 100
