"""shards/receipt_lines.py"""

import json
from pathlib import Path

import pytest
from corpus_sources import answer_of, bytes_of, call, left_out, question_of, read_samples, real_data, refused

PROMPT = "Expand abbreviations for products (receipt items), additionally highlight the product, brand and category: "
SCRIPT = "receipt_lines"


def dialogue(line: str, answer: str) -> str:
    return json.dumps({"dialogue": [{"human": line, "assistant": answer}]}, ensure_ascii=False)


def write_source(file: Path, rows: list[str]) -> Path:
    file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return file


def many_rows(number: int = 60) -> list[str]:
    return [dialogue(f"ЧАЙ {i}", f"Чай {i}##Чай##-##Напитки") for i in range(number)]


def group_of(record: dict) -> str:
    return " ".join(record["meta"]["raw"].casefold().split())


def test_real_receipt_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = real_data("ru_receipts")
    source, gold = folder / "receipts_dataset.jsonl", folder / "slgero" / "standard.csv"
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--gold", gold, "--out", out) == 0
    rows = [json.loads(line)["dialogue"][0] for line in source.read_text(encoding="utf-8").splitlines()]
    wanted = {(" ".join(r["human"].casefold().split()), r["assistant"].strip()) for r in rows}
    found, split_of = [], {}
    for split in ("train", "validation", "test"):
        for record, _ in read_samples(out / split).values():
            assert question_of(record) == PROMPT + record["meta"]["raw"]
            assert record["answer"] == answer_of(record)
            found.append((group_of(record), record["answer"]))
            assert split_of.setdefault(group_of(record), split) == split
    assert sorted(found) == sorted(wanted)  # nothing lost, nothing twice
    assert f"{len(rows) - len(wanted)} of {len(rows)} rows repeat" in capsys.readouterr().out
    golden = read_samples(out / "gold")
    assert len(golden) == 45
    assert golden["gold-000001"][0]["answer"] == "-##сок##-##Воды, соки, напитки"
    assert not {group_of(record) for record, _ in golden.values()} & set(split_of)


def test_repeats_go_and_several_answers_stay_together(tmp_path: Path) -> None:
    rows = many_rows() + [
        dialogue("хлеб  белый", "Хлеб белый##Хлеб##-"),
        dialogue("ХЛЕБ БЕЛЫЙ", "Хлеб белый##Хлеб##-"),  # a repeat but for case and spaces
        dialogue("ХЛЕБ БЕЛЫЙ", "Белый хлеб##Хлеб##-##Хлеб"),
    ]
    source = write_source(tmp_path / "a.jsonl", rows)
    for name, extra, number in (("once", (), 62), ("all", ("--keep-repeats",), 63)):
        out = tmp_path / name
        assert call(SCRIPT, "--source", source, "--out", out, "--fractions", 0.5, 0.25, 0.25, *extra) == 0
        splits = {s: [r for r, _ in read_samples(out / s).values()] for s in ("train", "validation", "test")}
        assert sum(map(len, splits.values())) == number
        homes = [s for s, records in splits.items() for r in records if group_of(r) == "хлеб белый"]
        assert len(homes) == number - 60
        assert len(set(homes)) == 1


def test_plain_columns_from_jsonl_and_csv_in_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_source(source / "a.jsonl", [json.dumps({"text": "MLK 0.50L", "answer": "Milk 0.50 liters##Milk##-"})])
    write_source(source / "b.csv", ["text,answer", '"JUICE, 1L",Juice 1 liter##Juice##-', "007,NA##NA##NA##NA"])
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out, "--fractions", 1, 0, 0) == 0
    pairs = {(r["meta"]["raw"], r["answer"]) for r, _ in read_samples(out / "train").values()}
    assert pairs == {
        ("MLK 0.50L", "Milk 0.50 liters##Milk##-"),
        ("JUICE, 1L", "Juice 1 liter##Juice##-"),
        ("007", "NA##NA##NA##NA"),
    }
    assert sorted(p.name for p in out.iterdir()) == ["corpus.json", "train"]


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    bad = [
        "{broken",
        "[]",
        dialogue("x", "only##two"),
        dialogue("", "a##b##c"),
        '{"text": "x"}',
        dialogue("x", "a##b##c##d##e"),
    ]
    source = write_source(tmp_path / "a.jsonl", many_rows(30) + bad)
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out, "--max-bad-share", 0.5) == 0
    assert list(left_out(out)) == [f"a.jsonl:{i}" for i in range(31, 37)]
    assert "3 or 4 fields" in left_out(out)["a.jsonl:33"]
    assert json.loads((out / "corpus.json").read_text())["unusable"] == 6


def test_too_many_bad_rows_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "a.jsonl", [*many_rows(30), dialogue("x", "no fields")])
    said = refused(capsys, SCRIPT, "--source", source, "--out", tmp_path / "out")
    assert "1 of 31 rows" in said
    assert "a.jsonl:31" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_lines_of_the_gold_set_leave_the_others(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", many_rows())
    gold = write_source(tmp_path / "gold.csv", ["text,product,brand,category", "чай  7,чай,,Напитки"])
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--gold", gold, "--out", out) == 0
    lines = {group_of(r) for s in ("train", "validation", "test") for r, _ in read_samples(out / s).values()}
    assert len(lines) == 59
    assert "чай 7" not in lines
    assert "a.jsonl:8" in left_out(out)
    ((record, _),) = read_samples(out / "gold").values()
    assert record["answer"] == "-##чай##-##Напитки"


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", many_rows())
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(SCRIPT, "--source", source, "--out", tmp_path / name, "--seed", seed) == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert bytes_of(tmp_path / "a") != bytes_of(tmp_path / "c")


def test_out_is_never_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "a.jsonl", many_rows())
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out) == 0
    before = bytes_of(out)
    assert "--overwrite" in refused(capsys, SCRIPT, "--source", source, "--out", out, "--seed", 9)
    assert bytes_of(out) == before
    assert call(SCRIPT, "--source", source, "--out", out, "--seed", 9, "--overwrite") == 0
    assert bytes_of(out) != before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert "not made by" in refused(capsys, SCRIPT, "--source", source, "--out", foreign, "--overwrite")
    assert "is a file" in refused(capsys, SCRIPT, "--source", source, "--out", source)
    blocked = source / "below" / "out"  # below a file: nobody may write there, not even root
    assert "can't be written" in refused(capsys, SCRIPT, "--source", source, "--out", blocked)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere.jsonl", None, "give a file"),
        ("a.txt", b"x", "give a file"),
        ("empty.jsonl", b"", "no usable row"),
        ("latin.jsonl", b'{"text": "\xff\xfe", "answer": "a##b##c"}\n', "UTF-8"),
        ("other.csv", b"a,b\n1,2\n", "over the limit"),
    ],
)
def test_wrong_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, said: str
) -> None:
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    assert said in refused(capsys, SCRIPT, "--source", source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "a.jsonl", many_rows())
    out = tmp_path / "out"
    assert "sum to 1" in refused(capsys, SCRIPT, "--source", source, "--out", out, "--fractions", 0.9, 0.9, 0.1)
    assert "between 0 and 1" in refused(capsys, SCRIPT, "--source", source, "--out", out, "--fractions", 2, 0, 0)
    gold = write_source(tmp_path / "gold.csv", ["line,product", "a,b"])
    assert "needs the columns" in refused(capsys, SCRIPT, "--source", source, "--out", out, "--gold", gold)
