"""Predictions in the files of lmms-eval and VLMEvalKit: what stands in them, and what a user meets."""

import json
import shutil
from pathlib import Path

import openpyxl
import pandas
import pytest

from vlmdist.bridges.evaluation import Evaluation, read_evaluation
from vlmdist.bridges.lmms_eval_log import write_lmms_eval_log
from vlmdist.bridges.predictions import convert_predictions
from vlmdist.bridges.vlmevalkit import prediction_table, write_vlmevalkit
from vlmdist.cli import main
from vlmdist.config import load_run
from vlmdist.errors import UserError
from vlmdist.evaluate.run import evaluate_run


@pytest.fixture(scope="session")
def finished(tag_run) -> Path:
    """The run folder with eval/base; read only. Its run.yaml is there, as training leaves it."""
    folder = Path(evaluate_run(load_run(tag_run), base=True)["folder"])
    shutil.copy(tag_run, folder.parents[1] / "run.yaml")
    return folder.parents[1]


@pytest.fixture
def run_copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "receipts"))


@pytest.fixture
def evaluated(tmp_path) -> Path:
    """An evaluation folder whose date is all that is read."""
    folder = tmp_path / "run" / "eval" / "base"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").touch()
    return folder


def _made(*rows, folder=Path("runs/tags/eval/base"), questions=None, **scores):
    """An evaluation without a corpus. rows: of {id, truth, prediction}."""
    scores = {"metric": "exact", "score": 50.0, "figures": {"exact": 50.0}, **scores}
    identity = {"generation": {"batch_size": 1, "max_new_tokens": 8}, "shown": {}}
    rows = [{"score": 50.0, **row} for row in rows]
    questions = questions or [f"Q{i}?" for i in range(len(rows))]
    return Evaluation(folder, "/corpora/tags/test", scores, identity, rows, questions)


def _sheet(file):
    """Rows of {cell name: value} of a workbook."""
    sheet = openpyxl.load_workbook(file).active
    return [{cell.coordinate: cell.value for cell in row if cell.value is not None} for row in sheet.iter_rows()]


# -- lmms-eval ---------------------------------------------------------------------------------------------------------


def test_lmms_eval_files_hold_every_answer_with_its_question(run_copy, tags, tmp_path, capsys):
    evaluation = run_copy / "eval" / "base"
    assert main(["predictions", str(evaluation), "--to", "lmms-eval", "--out", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    results_file, samples_file = map(Path, facts["files"])
    assert results_file.parent == samples_file.parent == tmp_path / "out" / "receipts__base"
    assert sorted(results_file.parent.iterdir()) == sorted([results_file, samples_file])
    own = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    assert [s["doc_id"] for s in samples] == list(range(len(tags)))
    assert [s["input"] for s in samples] == [row["question"] for row in tags]
    assert [s["target"] for s in samples] == [row["answer"] for row in tags]
    assert [s["filtered_resps"] for s in samples] == [row["prediction"] for row in own]
    assert [s["score"] * 100 for s in samples] == pytest.approx([row["score"] for row in own])
    results = json.loads(results_file.read_text())
    task = samples_file.stem.partition("_samples_")[2]
    scores = json.loads((evaluation / "scores.json").read_text())
    assert results["results"][task]["score,none"] == pytest.approx(scores["score"] / 100)
    assert results["n-samples"][task]["effective"] == facts["num_samples"] == len(tags)


def test_a_second_call_replaces_its_own_files_and_no_others(evaluated, tmp_path):
    made = _made({"id": "a", "truth": "x", "prediction": "y"}, folder=evaluated)
    first = write_lmms_eval_log(made, tmp_path / "out")
    before = [file.read_bytes() for file in first]
    assert write_lmms_eval_log(made, tmp_path / "out") == first
    assert [file.read_bytes() for file in first] == before
    first[0].write_text('{"model_source": "llava_hf"}')
    with pytest.raises(UserError, match="not of this command"):
        write_lmms_eval_log(made, tmp_path / "out")
    assert [file.read_bytes() for file in first] == [b'{"model_source": "llava_hf"}', before[1]]


def test_percent_become_shares_and_counts_stay(evaluated, tmp_path):
    figures = {"mean_absolute_error": 3.5, "exact": 25.0}
    made = _made({"id": "a", "truth": "x", "prediction": "y"}, folder=evaluated, figures=figures)
    results_file, samples_file = write_lmms_eval_log(made, tmp_path / "out")
    results = json.loads(results_file.read_text())
    assert json.loads(samples_file.read_text())["score"] == 0.5
    (measured,) = results["results"].values()
    assert measured["score,none"] == 0.5
    assert measured["mean_absolute_error,none"] == 3.5
    assert measured["exact,none"] == 0.25
    (directions,) = results["higher_is_better"].values()
    assert directions == {"score": True, "mean_absolute_error": False, "exact": True}


# -- VLMEvalKit --------------------------------------------------------------------------------------------------------


def test_a_prediction_file_is_what_pandas_reads_from_either_kind(run_copy, tags, tmp_path):
    evaluation = run_copy / "eval" / "base"
    own = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text().splitlines()]
    convert_predictions(evaluation, "vlmevalkit", tmp_path / "tiny_tags.tsv")
    convert_predictions(evaluation, "vlmevalkit", tmp_path / "tiny_tags.xlsx")
    table = pandas.read_csv(tmp_path / "tiny_tags.tsv", sep="\t", keep_default_na=False)
    assert list(table) == ["index", "id", "question", "answer", "prediction"]
    assert table["index"].tolist() == list(range(len(tags)))
    assert table["question"].tolist() == [row["question"] for row in tags]
    assert table["answer"].tolist() == [row["answer"] for row in tags]
    assert table["prediction"].tolist() == [row["prediction"] for row in own]
    assert len(_sheet(tmp_path / "tiny_tags.xlsx")) == len(tags) + 1
    workbook = pandas.read_excel(tmp_path / "tiny_tags.xlsx", keep_default_na=False)
    assert list(workbook) == list(table)
    without_control = [_printable(row["prediction"]) for row in own]
    assert workbook["prediction"].tolist() == without_control
    assert workbook["answer"].tolist() == table["answer"].tolist()


def _printable(text):
    return "".join("\ufffd" if c < " " and c not in "\t\n\r" else c for c in text)


def test_texts_of_a_workbook_stay_texts(tmp_path):
    said = '=HYPERLINK("http://x.y") <b>&amp;\r\n\x07 нет \ud800'
    made = _made({"id": "a", "truth": "007", "prediction": said}, questions=[" two  blanks "])
    write_vlmevalkit(made, tmp_path / "a.xlsx")
    header, row = _sheet(tmp_path / "a.xlsx")
    assert header == {"A1": "index", "B1": "id", "C1": "question", "D1": "answer", "E1": "prediction"}
    assert row["C2"] == " two  blanks "
    assert row["D2"] == "007"
    assert row["E2"] == '=HYPERLINK("http://x.y") <b>&amp;\n\ufffd нет \ufffd'
    again = (tmp_path / "a.xlsx").read_bytes()
    write_vlmevalkit(made, tmp_path / "a.xlsx")
    assert (tmp_path / "a.xlsx").read_bytes() == again


def test_multiple_choice_has_a_column_a_letter():
    truths = [{"answer": "B", "options": ["a cat", "a dog", "an ox"]}, {"answer": "A", "options": ["yes", "no"]}]
    rows = [{"id": f"q{i}", "truth": json.dumps(t), "prediction": "B."} for i, t in enumerate(truths)]
    header, table = prediction_table(_made(*rows))
    assert header == ["index", "id", "question", "answer", "A", "B", "C", "prediction"]
    assert table == [
        [0, "q0", "Q0?", "B", "a cat", "a dog", "an ox", "B."],
        [1, "q1", "Q1?", "A", "yes", "no", None, "B."],
    ]


def test_passes_of_a_circular_question_are_a_million_apart():
    passes = [("17", "A"), ("9", "B"), ("17", "B"), ("9", "A")]
    rows = [
        {"id": f"p{i}", "truth": json.dumps({"answer": a, "options": ["x", "y"], "question": q}), "prediction": "A"}
        for i, (q, a) in enumerate(passes)
    ]
    header, table = prediction_table(_made(*rows))
    columns = dict(zip(header, zip(*table, strict=True), strict=True))
    assert columns["index"] == (0, 1, 1_000_000, 1_000_001)
    assert columns["g_index"] == (0, 1, 0, 1)


def test_whole_numbers_as_keys_are_the_index():
    _, table = prediction_table(_made(*({"id": key, "truth": "t", "prediction": "p"} for key in ("241", "1000241"))))
    assert [row[0] for row in table] == [241, 1000241]


def test_an_answer_too_long_for_a_cell_is_named(tmp_path):
    made = _made({"id": "tag-7", "truth": "x", "prediction": "y" * 40_000})
    with pytest.raises(UserError, match=r"tag-7: its prediction has 40000 characters.*\.tsv"):
        write_vlmevalkit(made, tmp_path / "a.xlsx")
    assert not list(tmp_path.iterdir())
    write_vlmevalkit(made, tmp_path / "a.tsv")
    assert len(pandas.read_csv(tmp_path / "a.tsv", sep="\t")["prediction"][0]) == 40_000


@pytest.mark.parametrize("name", ["a.xlsx", "a.tsv"])
def test_another_file_is_left_alone(tmp_path, name):
    made = _made({"id": "a", "truth": "x", "prediction": "y"})
    (tmp_path / name).write_text("index\tquestion\n")
    with pytest.raises(UserError, match="not of this command"):
        write_vlmevalkit(made, tmp_path / name)
    assert (tmp_path / name).read_text() == "index\tquestion\n"


# -- what a user meets -------------------------------------------------------------------------------------------------


def test_the_corpus_is_found_by_its_fingerprint(run_copy, tag_run, tmp_path):
    folder = run_copy / "eval" / "base"
    corpus = tag_run.parent / "test"
    (run_copy / "run.yaml").unlink()
    with pytest.raises(UserError, match="--shards"):
        read_evaluation(folder, None)
    moved = shutil.copytree(corpus, tmp_path / "moved")
    assert read_evaluation(folder, str(moved)).questions == read_evaluation(folder, str(corpus)).questions
    other = tmp_path / "other"
    other.mkdir()
    (other / "questions.jsonl").write_text('{"question": "Another?", "answer": "x"}\n')
    with pytest.raises(UserError, match="fingerprint"):
        read_evaluation(folder, str(other))


def test_an_evaluation_that_is_not_finished_is_refused(run_copy, tmp_path):
    predictions = run_copy / "eval" / "base" / "predictions.jsonl"
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="not finished"):
        convert_predictions(run_copy / "eval" / "base", "lmms-eval", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluation.json", '{"corpus": 3}'),
        ("evaluation.json", "[]"),
        ("evaluation.json", None),
        ("scores.json", "{}"),
        ("scores.json", "{"),
        ("predictions.jsonl", '{"id": "tag-000", "truth": "x", "prediction": "y"}\n'),
    ],
)
def test_files_that_are_no_evaluation_are_refused_by_a_sentence(run_copy, tmp_path, capsys, name, text):
    file = run_copy / "eval" / "base" / name
    file.unlink() if text is None else file.write_text(text)
    assert main(["predictions", str(file.parent), "--to", "lmms-eval", "--out", str(tmp_path / "out")]) == 2
    assert str(file.parent) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "to", "says"),
    [
        ("table.csv", "vlmevalkit", ".xlsx, or .tsv"),
        ("nowhere/table.tsv", "vlmevalkit", "can't be written"),
        ("file", "lmms-eval", "is a file"),
    ],
)
def test_a_place_that_can_not_be_is_refused_by_a_sentence(run_copy, tmp_path, capsys, out, to, says):
    (tmp_path / "file").write_text("")
    arguments = ["predictions", str(run_copy / "eval" / "base"), "--to", to, "--out", str(tmp_path / out)]
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_run_folder_is_no_evaluation(run_copy, tmp_path, capsys):
    assert main(["predictions", str(run_copy), "--to", "lmms-eval", "--out", str(tmp_path / "out")]) == 2
    assert "RUN/eval/NAME" in capsys.readouterr().err
