"""What is wrong with an answer, and whose pictures come first."""

import json

import pytest

from vlmdist.report.answers import make_sample
from vlmdist.report.pictures import in_turn
from vlmdist.report.shown_text import shorten, visible

TRUTH = json.dumps({"company": "Shop", "total": "1.50"})


def sample_of(answer, metric="fuzzy", truth=TRUTH, score=50.0, **more):
    return make_sample(0, {"id": "a", "truth": truth, "prediction": answer, "score": score, **more}, None, metric, 100)


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (TRUTH, ["right"]),
        (f"```json\n{TRUTH}\n```", ["right"]),
        ('{"company": "Shop", "total": "1.90"}', ["wrong field"]),
        ('{"company": "Shop"}', ["missing field"]),
        ('{"company": "Ship"}', ["missing field", "wrong field"]),
        ("I see a receipt.", ["not JSON"]),
        (f"{TRUTH} is what I read", ["not JSON"]),
        ('{"company": "Shop", "tot', ["cut off"]),
        ("  \n", ["empty"]),
    ],
)
def test_kinds_of_json_answers(answer, kinds):
    assert sample_of(answer)["kinds"] == kinds


def test_kinds_of_other_answers():
    assert sample_of("", error="the image is broken")["kinds"] == ["failed"]
    assert sample_of("milk", "fuzzy_fields", "milk##milk##-")["kinds"] == ["other form"]
    assert sample_of("milk##tea##-", "fuzzy_fields", "milk##milk##-")["kinds"] == ["wrong field"]
    assert sample_of("a", "exact", "b", 0.0)["kinds"] == ["wrong"]
    assert sample_of("a", "exact", "a", 100.0)["kinds"] == ["right"]
    assert sample_of("a", "a metric of another version", "b", 100.0)["kinds"] == ["right"]


def test_fields_tell_what_is_wrong_with_each():
    past = {"id": "a", "prediction": '{"total": "9"}', "score": 7}
    row = {"id": "a", "truth": TRUTH, "prediction": '{"total": "1.90"}', "score": 40}
    sample = make_sample(3, row, past, "fuzzy", 100)
    assert [(f["name"], f["kind"], f["past"]) for f in sample["fields"]] == [
        ("company", "missing field", ""),
        ("total", "wrong field", "9"),
    ]
    assert (sample["score"], sample["past_score"]) == (40, 7)


def test_texts_are_cut_and_told():
    sample = sample_of("x" * 150)
    assert len(sample["answer"]) == 100
    assert sample["lengths"] == {"answer": 150}


def test_pictures_go_in_turn_to_the_worst_the_best_and_the_most_changed():
    scores = [(float(i), 50.0 if i == 50 else float(i)) for i in range(100)]
    scores[40], scores[60] = (40.0, 95.0), (60.0, 1.0)
    samples = [{"place": i, "score": score, "past_score": past} for i, (score, past) in enumerate(scores)]
    order = [s["place"] for s in in_turn(samples)]
    assert order[:4] == [0, 99, 40, 60]
    assert sorted(order) == list(range(100))


def test_what_cannot_be_seen_is_written_out():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x00\x07\x7f\u200b\ud83d") == "⟨U+0000⟩⟨U+0007⟩⟨U+007F⟩⟨U+200B⟩⟨U+D83D⟩"
    assert visible("नमस्ते 👩‍🚀 é") == "नमस्ते 👩‍🚀 é"  # joiners that belong to writing stay
    assert shorten("abcdef", 3) == "abc…"
