import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdist.evaluate.parse import find_answer_line, parse_fields, parse_json_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"total": "14.10"}', ({"total": "14.10"}, True)),
        ('```json\n{"total": "14.10"}\n```', ({"total": "14.10"}, True)),
        ('```\n{"total": 14.1}```', ({"total": 14.1}, True)),
        ('  {"a": {"b": [1, 2]}}\n', ({"a": {"b": [1, 2]}}, True)),
        ('{"a": 1, "a": 2}', ({"a": 2}, True)),
        ("{}", ({}, True)),
        ('{"total": "14.10"} Anything else?', ({}, False)),
        ('Here you are: {"total": "14.10"}', ({}, False)),
        ('[{"total": "14.10"}]', ({}, False)),
        ("null", ({}, False)),
        ("14.10", ({}, False)),
        ("", ({}, False)),
        ("{'total': '14.10'}", ({}, False)),
        ('{"total": "14', ({}, False)),
        ('{"a": "line\nbreak"}', ({}, False)),
        ("[" * 200_000, ({}, False)),
        ('{"a":' * 200_000, ({}, False)),
        ('{"a": ' + "9" * 5000 + "}", ({}, False)),  # longer than Python turns into a number
    ],
)
def test_json_answers(text, expected):
    assert parse_json_answer(text) == expected


def test_nan_is_read_as_the_recipe_reads_it():
    answer, valid = parse_json_answer('{"total": NaN}')
    assert valid
    assert str(answer["total"]) == "nan"


@given(st.text())
@settings(max_examples=300)
def test_json_answer_never_raises(text):
    answer, valid = parse_json_answer(text)
    assert isinstance(answer, dict)
    assert valid or answer == {}


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
@settings(max_examples=100)
def test_json_answer_gives_back_what_was_written(value):
    text = json.dumps(value)
    if "```" not in text:
        assert parse_json_answer(f"```json\n{text}\n```") == (value, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Вино игристое Lavetti##Вино##Lavetti##Алкоголь",
            {"normalised": "Вино игристое Lavetti", "product": "Вино", "brand": "Lavetti", "category": "Алкоголь"},
        ),
        ("Бахилы##Бахилы##-", {"normalised": "Бахилы", "product": "Бахилы", "brand": None}),
        (
            "Бахилы ## Бахилы ## - ## Товары",
            {"normalised": "Бахилы", "product": "Бахилы", "brand": None, "category": "Товары"},
        ),
        ("a##b##c##d##e", {"normalised": "a", "product": "b", "brand": "c", "category": "d"}),
        ("a####c", {"normalised": "a", "product": "", "brand": "c"}),
        ("no form", {"normalised": "no form"}),
        ("", {"normalised": ""}),
    ],
)
def test_fields(text, expected):
    assert parse_fields(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a##b##c##d", "a##b##c##d"),
        ("a##b##c", "a##b##c"),
        ("Normalized product: a##b##c##d", "a##b##c##d"),
        ("Sure! Here it is.\n\nNormalized product: a##b##-##d\n\nLet me know if you need more.", "a##b##-##d"),
        ("Normalized product:\na##b##c\r\nThe brand is c.", "a##b##c"),
        # a base model goes on with examples of its own: the first one is the answer
        (" a##b##c##d\nExpand abbreviations: X\nNormalized product: x##y##z##w", "a##b##c##d"),
        ("## Answer\nThe product:\na##b##c##d", "a##b##c##d"),
        ("I can't say", "I can't say"),
        ("Normalized product: I can't say\nreally", "I can't say"),
        ("a##b", "a##b"),
        ("\n \n", ""),
        ("", ""),
    ],
)
def test_answer_line(text, expected):
    assert find_answer_line(text) == expected
