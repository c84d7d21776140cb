"""The report page: whole, self-contained, and inert whatever a model wrote."""

import base64
import gzip
import hashlib
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_run import add_evaluation, add_generated, make_run, receipt_rows, write_rows

from vlmdist.errors import UserError
from vlmdist.report.page import write_report

BLOCKS = {"dt", "dd", "td", "th", "li", "p", "h1", "h2", "h3", "div", "section", "article"}
VOID = {"meta", "link", "img", "input", "br", "hr"}
HOSTILE = '</div></script><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>'


class Page(HTMLParser):
    """All elements with their attributes, the text outside of scripts and styles, and whether the tags are balanced."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        """Those that a browser would run."""
        self.samples: list[list[dict]] = []
        """Of each gallery."""
        self.pictures: list[bytes] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "elements that were not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        self.text += " " if tag in BLOCKS else ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> without a beginning"
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            attributes = next(a for t, a in reversed(self.elements) if t == "script")
            kind = attributes.get("type")
            if kind == "application/gzip":
                self.samples.append(json.loads(gzip.decompress(base64.b64decode(data))))
            elif kind == "image/jpeg":
                self.pictures.append(base64.b64decode(data))
            else:
                self.scripts.append(data)
        elif not (self._open and self._open[-1] == "style"):
            self.text += data

    @property
    def plots(self) -> list[dict[str, str]]:
        return self.all("div", class_="plot")

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = {k.replace("_", ""): v for k, v in attributes.items()}
        return [a for t, a in self.elements if t == tag and all(v in a.get(k, "").split() for k, v in wanted.items())]


def report(*runs: Path, out: Path | None = None) -> Page:
    return Page(write_report(runs, out).read_text(encoding="utf-8"))


def refuse_the_outside(page: Page) -> None:
    """No element may load, send or run anything but the page's own script."""
    for tag, attributes in page.elements:
        assert tag in ("script", "img", "use", "a", "link") or not {"src", "href"} & attributes.keys(), tag
        for name in ("src", "href", "srcset", "action", "data", "poster", "formaction"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "http" not in attributes.get("style", "")
        assert tag not in ("iframe", "object", "embed", "form", "base")
    assert len(page.scripts) == 1
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert re.search(r"script-src ([^;]*)", policy)[1] == f"'sha256-{digest}'"
    assert re.search(r"img-src ([^;]*)", policy)[1] == "data:"


def test_the_page_tells_the_whole_run(tmp_path):
    run = make_run(tmp_path / "receipts")
    add_evaluation(run, "base", [{**row, "prediction": "I see a receipt."} for row in receipt_rows(30)])
    add_evaluation(run, "step-000060", receipt_rows(30))
    page = report(run)
    refuse_the_outside(page)
    text = " ".join(page.text.split())
    assert "tiny-vlm, trained with LoRA of rank 16 over nf4 weights on 626 samples of receipts/train" in text
    assert "Last logged 2026-01-01 10:20 UTC, step 60" in text
    assert "Best validation loss 1 at step 40" in text
    assert "Best validation score 66.0 at step 60" in text
    assert "Restarts 1" in text
    assert "Bad samples 1" in text  # the same one twice: before and after the restart
    assert "cut <b>off" in text
    assert "step-000060 1.5 MB" in text
    assert "2.8.0, then 2.9.0" in text
    assert "train.lr_scheduler_type cosine" in text
    assert "most often rank 1" in text
    assert len(page.samples[0]) == 30
    titles = list(dict.fromkeys(a["aria-label"].removesuffix("; arrow keys read values") for a in page.plots))
    assert [t.removesuffix(" over steps") for t in titles] == [
        "Loss",
        "Validation scores",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Waiting for data",
        "Slowest rank",
        "Memory",
        "Where a step goes",
    ]


def test_scores_have_intervals_and_what_changed_beyond_chance(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    rows = receipt_rows(30)
    add_evaluation(run, "base", [{**row, "prediction": "I see a receipt."} for row in rows])
    add_evaluation(run, "step-000003", rows)
    scores = json.loads((run / "eval" / "step-000003" / "scores.json").read_text())
    page = report(run)
    text = " ".join(page.text.split())
    (low, high), score = scores["interval"], scores["score"]
    assert f"{score:.1f} {low:.1f} to {high:.1f} +{score:.1f}" in text  # the base's is 0
    assert "company 30 samples" in text
    assert len(page.all("span", class_="up")) > 4
    assert page.all("span", class_="unsure") == []


def test_no_change_is_claimed_where_it_may_be_chance(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    rows = receipt_rows(30)
    add_evaluation(run, "base", rows)
    add_evaluation(
        run, "step-000003", [{**row, "prediction": row["truth"]} if i == 0 else row for i, row in enumerate(rows)]
    )
    page = report(run)
    assert "may be chance" in page.text
    changes = page.all("span", class_="change")
    assert changes
    assert all("unsure" in a["class"] for a in changes)


def test_redone_steps_cost_twice_and_count_once(tmp_path):
    text = " ".join(report(make_run(tmp_path / "run", steps=60)).text.split())
    # by the clock of the made-up run the second start, on 2 ranks, begins 600 s after the first, on 4
    in_steps = sum(18 * (4 if 20 * i < 600 else 2) for i in range(62)) / 3600
    first_s, second_s = 20 * 29, 61 * 20 + 2 - 600  # from each start to its last row
    hours = (first_s * 4 + second_s * 2) / 3600
    assert f"GPU hours {hours:.1g}" in text or f"GPU hours {hours:.2g}" in text
    assert f"{in_steps:.2g} of it in steps" in text
    assert f"in steps {in_steps:.2g}" in text
    assert "Steps 60 epoch 3 of 3" in text
    assert "Waiting for data 5.0 %" in text


def test_the_later_row_of_a_redone_step_is_drawn(tmp_path):
    page = report(make_run(tmp_path / "run", steps=60))
    reading = json.loads(page.plots[0]["data-reading"])
    training, validation = reading["series"]
    assert [x for x, _ in training["points"]] == list(range(1, 61))
    at_31 = dict(training["points"])[31]
    assert at_31 == pytest.approx(0.5 + 2.718281828 ** (-3.1), abs=1e-3)  # not the 0.25 higher one of the first start
    assert validation["points"] == [[20, 1.2], [40, 1.0], [60, 1.2]]


@pytest.mark.parametrize("metric", ["fuzzy", "fuzzy_text"])
def test_hostile_output_is_inert(tmp_path, metric):
    run = make_run(tmp_path / "run", steps=3)
    answers = {
        "script": HOSTILE,
        "attribute": "\" onmouseover=alert(1) x='",
        "template": "{{ 7 * 191 }}{% raw %}",
        "comment": "<!-- <![CDATA[ <style>*{display:none}</style>",
        "controls": "a\x00b\x1b[31m\rc\u202egnp.exe\u2066\x9b",
        "long": "A" * 1_000_000,
        "fields": json.dumps({HOSTILE: HOSTILE, "total": HOSTILE}),
        HOSTILE: "the id is hostile",
        "surrogate": "\ud800 half",
    }
    truth = json.dumps({"total": "1.50", "<script>": "x"})
    rows = [{"id": key, "truth": truth, "prediction": answer} for key, answer in answers.items()]
    rows.append({"id": "failed", "truth": truth, "prediction": "", "error": HOSTILE})
    add_evaluation(run, "base", rows, metric)
    add_evaluation(run, "step-000003", rows, metric)
    page = report(run)
    refuse_the_outside(page)
    raw = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.all("script")) == 2, "the samples, as data, and the page's own"
    assert len(page.all("img")) == 0
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", raw)
    assert "alert(1)" not in raw, "nothing of a model's is there as it is"
    samples = {sample["id"]: sample for sample in page.samples[0]}
    assert samples["template"]["answer"] == "{{ 7 * 191 }}{% raw %}"
    assert samples["script"]["answer"] == HOSTILE  # shown, not dropped
    assert samples["controls"]["answer"].startswith("a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+000D⟩c⟨U+202E⟩gnp.exe")
    assert samples["surrogate"]["answer"] == "⟨U+D800⟩ half"
    assert samples["long"]["lengths"] == {"answer": 1_000_000, "past": 1_000_000}
    assert samples["failed"]["kinds"] == ["failed"]
    assert len(raw) < 500_000


def test_field_names_from_model_output_stay_bounded(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    rows = [
        {"id": str(i), "truth": '{"cat": 1}', "prediction": json.dumps({f"{i}-{j}<b>": 1 for j in range(100)})}
        for i in range(50)
    ]
    add_evaluation(run, "step-000003", rows, "count_json")
    page = report(run)
    refuse_the_outside(page)
    assert "60 of 5001 fields are shown" in page.text
    assert (run / "report.html").stat().st_size < 3_000_000


def test_every_sample_is_there_worst_first(tmp_path):
    run = make_run(tmp_path / "run")
    rows = receipt_rows(2000)
    add_evaluation(run, "base", [{**row, "prediction": "{}"} for row in rows])
    add_evaluation(run, "step-000060", rows)
    page = report(run)
    assert (run / "report.html").stat().st_size < 1_500_000
    assert {s["id"] for s in page.samples[0]} == {row["id"] for row in rows}
    scores = [s["score"] for s in page.samples[0]]
    assert scores == sorted(scores)
    assert "All 2,000 samples" in page.text


def test_what_would_not_fit_is_cut_and_told(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=3)
    noise = random.Random(0)
    rows = [{"id": str(i), "truth": "a", "prediction": "".join(noise.choices("ab cd", k=3000))} for i in range(300)]
    add_evaluation(run, "base", rows, "fuzzy_text")
    add_evaluation(run, "step-000003", rows, "fuzzy_text")
    assert report(run).samples[0][0].keys() & {"lengths"} == set()
    monkeypatch.setattr("vlmdist.report.gallery.MAX_PACKED_BYTES", 300_000)
    page = report(run)
    assert len(page.samples[0]) == 300
    assert page.samples[0][0]["lengths"] == {"answer": 3000, "past": 3000}
    monkeypatch.setattr("vlmdist.report.gallery.ATTEMPTS", ((300, 4000), (100, 250)))
    page = report(run)
    assert len(page.samples[0]) == 100
    assert "100 of 300 samples: the worst half, and a fair share of the rest" in page.text


def test_without_an_evaluation_the_answers_while_training_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [{"id": f"line-{i}", "truth": "milk##milk##-", "prediction": "milk"} for i in range(4)]
    add_generated(run, 20, rows)
    add_generated(run, 60, [{**row, "prediction": row["truth"]} for row in rows])
    settings = (run / "run.yaml").read_text().replace("metric: fuzzy", "metric: fuzzy_fields")
    (run / "run.yaml").write_text(settings)
    page = report(run)
    refuse_the_outside(page)
    assert "No evaluation is finished" in page.text
    assert "Answers of step-000060-validation" in page.text
    assert [s["past"] for s in page.samples[0]] == ["milk"] * 4
    assert [s["kinds"] for s in page.samples[0]] == [["right"]] * 4


def test_ten_evaluations_and_long_names(tmp_path):
    run = make_run(tmp_path / ("a-very-long-name-of-a-run-" * 9))
    for i in range(10):
        add_evaluation(run, f"step-{i:06d}-{'x' * 200}", receipt_rows(6))
    page = report(run)
    refuse_the_outside(page)
    assert len(page.all("th", scope="col")) >= 11
    assert "x" * 81 not in page.text


def test_several_runs_are_compared(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", learning_rate=1e-3)]
    add_evaluation(runs[0], "step-000060", receipt_rows(10))
    page = report(*runs, out=tmp_path / "both.html")
    refuse_the_outside(page)
    text = " ".join(page.text.split())
    assert "2 runs side by side" in text
    assert "train.learning_rate 0.0002 0.001" in text
    assert "adapt.lora.r" not in text[: text.index("How they did")], "only what differs"
    assert "Score of step-000060 (fuzzy)" in text
    first = json.loads(page.plots[0]["data-reading"])
    assert [s["label"] for s in first["series"]] == ["a/run", "b/run"]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for tag, a in page.elements if tag in ("a", "use") and a.get("href", "").startswith("#")}
    assert targets <= set(ids), "every link within the page leads somewhere"


def test_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    for name in ("environment.json", "steps.jsonl", "bad_samples.jsonl"):
        (run / name).unlink()
    page = report(run)
    refuse_the_outside(page)
    assert "No step is logged yet." in page.text


def test_cut_and_broken_files_still_give_a_page(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "ab") as f:
        f.write(
            b'[1]\n{"step": "x"}\n{"step": 61, "loss": NaN}\n{"step": 62, "loss": "high"}\n{"step": 63, "loss": 0.\xd0'
        )
    (run / "environment.json").write_text('[{"time":')
    (run / "eval" / "unfinished").mkdir(parents=True)
    add_evaluation(run, "odd", receipt_rows(3))
    with open(run / "eval" / "odd" / "predictions.jsonl", "a") as f:
        f.write('{"id": 5, "truth": null, "prediction": 7, "score": "?"}\n{"id": "cut')
    odd = {"metric": None, "score": "high", "by_field": {"total": 3}, "figures": []}
    (run / "eval" / "odd" / "scores.json").write_text(json.dumps(odd))
    page = report(run)
    refuse_the_outside(page)
    assert "metrics.jsonl: 1 lines are no JSON objects" in page.text
    assert "environment.json: can't be read" in page.text
    assert "eval/unfinished: is not finished" in page.text
    assert len(page.samples[0]) == 4


def test_images_and_questions_come_from_the_test_shards(tmp_path, monkeypatch):
    from PIL import Image

    from vlmdist.data.shards.writer import ShardWriter

    buffer = io.BytesIO()
    Image.effect_noise((800, 600), 80).convert("RGB").save(buffer, "PNG")
    rows = receipt_rows(6)
    with ShardWriter(tmp_path / "test") as writer:
        for row in rows:
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "Read <this> receipt."}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": row["truth"]}]
            writer.write(row["id"], turns, images=[buffer.getvalue()])
    run = make_run(tmp_path / "run", test=str(tmp_path / "test"))
    add_evaluation(run, "step-000060", rows)
    page = report(run)
    refuse_the_outside(page)
    assert len(page.pictures) == 6
    assert [Image.open(io.BytesIO(p)).size for p in page.pictures] == [(800, 600)] * 6
    assert [s["pictures"] for s in page.samples[0]] == [1] * 6
    assert "Asked each time: Read <this> receipt." in page.text

    monkeypatch.setattr("vlmdist.report.page.MAX_PAGE_BYTES", 1_800_000)
    page = report(run)
    assert 0 < len(page.pictures) < 6
    assert f"{6 - len(page.pictures)} have none" in page.text
    assert (run / "report.html").stat().st_size < 1_800_000

    for shard in (tmp_path / "test").glob("*.tar"):
        shard.unlink()
    page = report(run)
    assert page.pictures == []
    assert "Questions and images are not shown" in page.text


def test_all_mistakes_are_told_at_once(tmp_path):
    (tmp_path / "no_run").mkdir()
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError) as e:
        write_report([tmp_path / "no_run", run, tmp_path / "missing"], tmp_path / "nowhere" / "x.html")
    assert len(e.value.problems) == 3
    assert "no_run: is no run folder" in e.value.problems[0]
    assert "missing: no such run folder" in e.value.problems[1]
    assert "nowhere: no such folder to write x.html into" in e.value.problems[2]
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        write_report([run], tmp_path)
    (run / "run.yaml").write_text("- just\n- a list\n")
    with pytest.raises(UserError, match="run.yaml"):
        write_report([run])


def test_a_run_file_of_another_version_is_shown_as_it_is(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    write_rows(run / "steps.jsonl", [])
    (run / "run.yaml").write_text("model: {name_or_path: old/model, gone: 1}\ndata: {train: [x]}\n")
    text = report(run).text
    assert "model.gone" in text
    assert "run.yaml is shown as it is" in text
