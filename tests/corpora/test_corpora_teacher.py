"""shards/label_with_teacher.py against a real server on this machine that is slow, fails and answers rubbish."""

import email.utils
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_sources import ROOT, bytes_of, call, question_of, read_samples, refused
from PIL import Image
from teacher_server import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    Action,
    Server,
    always_good,
    completion,
    good_answer,
    teacher_server,
)

from vlmdist.data.convert.instructions import RECEIPT_IMAGE
from vlmdist.data.teacher.endpoint import read_retry_after
from vlmdist.errors import BadSample

SCRIPT = "label_with_teacher"
KEY = "sk-a-very-secret-key-4711"
PRICES = ("--price-in", 10, "--price-out", 30)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def write_lines(folder: Path, number: int) -> Path:
    file = folder / "lines.txt"
    file.write_text("".join(f"line {i:03d}\n" for i in range(number)), encoding="utf-8")
    return file


def arguments(server: Server, source: Path, out: Path, *more: object) -> list[str]:
    given = ("--source", source, "--out", out, "--model", "teacher", "--base-url", server.url, "--backoff", 0.02, *more)
    return [str(a) for a in given]


def start(server: Server, source: Path, out: Path, *more: object) -> "subprocess.Popen[str]":
    """The script as a process of its own, for signals."""
    command = [sys.executable, str(ROOT / "shards" / f"{SCRIPT}.py"), *arguments(server, source, out, *more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def wait_for_requests(server: Server, number: int) -> None:
    deadline = time.monotonic() + 60
    while server.num_requests() < number:
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_lines_become_labels_that_receipt_lines_reads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path, 40)
    source.write_text(source.read_text() + "line 003\n\n  line 004 \n")  # equal inputs are asked once
    out, corpus = tmp_path / "labels", tmp_path / "corpus"
    with teacher_server(lambda item, n: Action(completion(f"{good_answer(item)} {KEY}"))) as server:
        assert call(SCRIPT, *arguments(server, source, out, "--concurrency", 3)) == 0
        assert set(server.asked.values()) == {1}
        assert server.keys == {f"Bearer {KEY}"}
        assert server.most_at_once <= 3
        roles = [m["role"] for m in server.requests[0]["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]  # two worked examples
        assert server.requests[0]["max_tokens"] == 512
        before = bytes_of(out)
        assert call(SCRIPT, *arguments(server, source, out)) == 0
        assert server.num_requests() == 40
        assert bytes_of(out) == before
    answers = {row["text"]: row["answer"] for row in rows(out / "labels.jsonl")}
    assert answers == {f"line {i:03d}": f"Line {i:03d}##Thing##-##Goods [key]" for i in range(40)}
    said = capfd.readouterr()
    assert KEY not in said.out + said.err + "".join(b.decode() for b in bytes_of(out).values())
    assert "40 inputs to label (2 repeats)" in said.out
    assert call("receipt_lines", "--source", out / "labels.jsonl", "--out", corpus) == 0
    found = {r["meta"]["raw"]: r["answer"] for s in ("train", "test") for r, _ in read_samples(corpus / s).values()}
    assert found.items() <= answers.items()


RUBBISH = {
    "two fields": (completion("a##b"), "2 fields instead of 3 or 4"),
    "no fields": (completion("I'm sorry, I can't do that."), "no ## in it"),
    "hole": (completion("a####b"), "an empty field"),
    "two answers": (completion("a##b##c\nd##e##f"), "several different answers"),
    "silent": (completion(""), "empty answer"),
    "null": (completion(None), "empty answer"),
    "cut": (completion("a##b##c", finish="length"), "cut off at the token limit"),
}
GOOD = {
    "chatter": completion("Sure!\n\n**Normalized product: a##b##c##d**\n\nAnything else?"),
    "fences": completion("```\na##b##c##d\n```"),
    "no usage": completion("a##b##c##d", usage="none"),
    "odd usage": completion("a##b##c##d", usage={"prompt_tokens": -5, "completion_tokens": "7"}),
}
FAILURES = {
    "busy": Action(b'{"error": {"message": "slow down"}}', 429, {"Retry-After": "0.3"}),
    "broken": Action(b'{"error": {"message": "oops"}}', 500),
    "cut off": Action(completion("a##b##c##d"), cut_after=30),
    "html": Action(b"<html><body>Welcome</body></html>", headers={"Content-Type": "text/html"}),
    "half json": Action(completion("a##b##c##d")[:40]),
    "no choice": Action(b'{"choices": []}'),
    "list": Action(b"[1]"),
    "slow": Action(completion("a##b##c##d"), delay_s=2),
}


def test_a_server_that_fails_and_talks_rubbish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [*RUBBISH, *GOOD, *FAILURES, "never", "refused"]

    def behaviour(item: str, times_before: int) -> Action:
        if item in RUBBISH:
            return Action(RUBBISH[item][0])
        if item == "never":
            return Action(b"{}", 503)
        if item == "refused":
            return Action(b'{"error": {"message": "not this one"}}', 400)
        return Action(GOOD.get(item, completion("a##b##c##d"))) if times_before or item in GOOD else FAILURES[item]

    source, out = tmp_path / "lines.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"line": name}) + "\n" for name in names))
    more = ("--column", "line", "--timeout", 1.5, "--max-attempts", 3, "--max-rejected-share", 0.6)
    with teacher_server(behaviour) as server:
        assert call(SCRIPT, *arguments(server, source, out, *more, "--concurrency", 4)) == 0
        assert server.most_at_once <= 5  # 4, and the handler of the request that timed out
        once, twice = [*RUBBISH, *GOOD, "refused"], list(FAILURES)
        assert server.asked == {**dict.fromkeys(once, 1), **dict.fromkeys(twice, 2), "never": 3}
    assert {row["text"] for row in rows(out / "labels.jsonl")} == {*GOOD, *FAILURES}
    assert {row["answer"] for row in rows(out / "labels.jsonl")} == {"a##b##c##d"}
    rejected = {row["text"]: row["why"] for row in rows(out / "rejected.jsonl")}
    assert rejected == {name: why for name, (_, why) in RUBBISH.items()}
    sent = rows(out / "requests.jsonl")
    assert len([r for r in sent if "result" not in r]) == server.num_requests()
    how = {r["result"] for r in sent if "result" in r}
    assert how >= {"HTTP 429", "HTTP 500", "connection", "no chat completion", "time-out", "answered", "rejected"}
    said = capsys.readouterr().out
    assert "HTTP 503: 1" in said
    assert "HTTP 400: 1" in said


def test_retry_after_holds_for_all_requests(tmp_path: Path) -> None:
    def behaviour(item: str, times_before: int) -> Action:
        if item == "line 000" and not times_before:
            return Action(b"{}", 429, {"Retry-After": "1"})
        return Action(completion(good_answer(item)), delay_s=0.05)

    with teacher_server(behaviour) as server:
        source = write_lines(tmp_path, 6)
        assert call(SCRIPT, *arguments(server, source, tmp_path / "out", "--concurrency", 2)) == 0
        late = [t - server.times[0] for t in server.times[2:]]  # two were on their way
    assert min(late) >= 0.9


def test_requests_per_minute(tmp_path: Path) -> None:
    with teacher_server() as server:
        source = write_lines(tmp_path, 9)
        assert call(SCRIPT, *arguments(server, source, tmp_path / "out", "--requests-per-minute", 600)) == 0
        assert server.times[-1] - server.times[0] >= 0.1 * 8 * 0.8


def test_tokens_per_minute_count_what_was_used(tmp_path: Path) -> None:
    with teacher_server() as server:
        source = write_lines(tmp_path, 9)
        per_minute = (PROMPT_TOKENS + ANSWER_TOKENS) * 600  # ten requests a second, once their use is known
        more = ("--tokens-per-minute", per_minute, "--concurrency", 1)
        assert call(SCRIPT, *arguments(server, source, tmp_path / "out", *more)) == 0
        assert server.times[-1] - server.times[0] >= 0.1 * 8 * 0.8


def test_rejected_answers_are_asked_again_when_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behaviour(item: str, times_before: int) -> Action:
        return Action(completion(good_answer(item) if times_before == 2 or item < "line 004" else "rubbish"))

    source, out = write_lines(tmp_path, 8), tmp_path / "out"
    with teacher_server(behaviour) as server:
        said = refused(capsys, SCRIPT, *arguments(server, source, out, "--retry-rejected", 1))
        assert "4 of 8 inputs" in said
        assert not (out / "labels.jsonl").exists()
        assert len(rows(out / "rejected.jsonl")) == 4
        assert server.num_requests() == 12
        assert call(SCRIPT, *arguments(server, source, out, "--retry-rejected", 2)) == 0
        assert server.num_requests() == 16
    assert len(rows(out / "labels.jsonl")) == 8
    assert rows(out / "rejected.jsonl") == []


def picture(number: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 60), (number * 20 % 256, 3, 200)).save(file, kind)
    return file.getvalue()


def test_pictures_become_a_corpus(tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    for i in range(12):
        (folder / f"{i:02d}.jpg").write_bytes(picture(i))
    (folder / "more" / "again.jpg").write_bytes(picture(3))
    (folder / "more" / "a.png").write_bytes(picture(50, "PNG"))
    answer = 'Here:\n```json\n{"company": "Ü {1}", "date": null, "total": 14.10, "address": " "}\n```\n'
    with teacher_server(lambda item, n: Action(completion(answer))) as server:
        more = ("--kind", "images", "--fractions", 0.5, 0.25, 0.25)
        assert call(SCRIPT, *arguments(server, folder, out, *more)) == 0
        assert len(server.asked) == server.num_requests() == 13
        assert call(SCRIPT, *arguments(server, folder, out, *more)) == 0
        assert server.num_requests() == 13
    found = {s: read_samples(out / "corpus" / s) for s in ("train", "validation", "test")}
    assert [len(samples) for samples in found.values()] == [7, 3, 3]
    records = {record["meta"]["source"]: (record, images) for s in found.values() for record, images in s.values()}
    assert len(records) == 13
    record, images = records["03.jpg"]
    assert images == [picture(3)]
    assert question_of(record) == RECEIPT_IMAGE
    assert record["answer"] == '{"company": "Ü {1}", "total": "14.10"}'


# --- never twice, never too much --------------------------------------------------------------------------------------


def test_killed_and_started_again_nothing_answered_is_asked_twice(tmp_path: Path) -> None:
    source, out, num_kills = write_lines(tmp_path, 60), tmp_path / "out", 3
    with teacher_server(lambda item, n: Action(completion(good_answer(item)), delay_s=0.02)) as server:
        for kill in range(num_kills):
            process = start(server, source, out, "--concurrency", 3)
            wait_for_requests(server, 12 * (kill + 1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kept = {row["name"] for row in rows_whole(out / "answers.jsonl")}
            assert len(kept) >= server.num_requests() - 3 * (kill + 1)  # only what was in flight is lost
            asked_before = {name: server.asked[name] for name in kept}
        for file in ("answers.jsonl", "requests.jsonl"):  # as a machine that loses power leaves them
            with open(out / file, "ab") as f:
                f.write(b'{"key": "\xd0')
        process = start(server, source, out, "--concurrency", 3)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert asked_before == {name: server.asked[name] for name in kept}
        assert server.num_requests() <= 60 + 3 * num_kills
        assert f"of all starts: {server.num_requests()}\n" in said
        assert call(SCRIPT, *arguments(server, source, out)) == 0  # and the files are still readable
    assert len(rows(out / "labels.jsonl")) == 60


def rows_whole(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_waits_for_answers_on_their_way(tmp_path: Path, number: signal.Signals, code: int) -> None:
    source, out = write_lines(tmp_path, 30), tmp_path / "out"
    with teacher_server(lambda item, n: Action(completion(good_answer(item)), delay_s=0.5)) as server:
        process = start(server, source, out, "--concurrency", 3)
        wait_for_requests(server, 5)
        process.send_signal(number)
        said, errors = process.communicate(timeout=30)
        assert process.returncode == code
        assert "go on with the same command" in errors
        assert "Traceback" not in errors
        assert len(rows(out / "labels.jsonl")) == server.num_requests() < 12


def test_a_signal_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmdist.data.teacher.asking.GRACE_S", 0.3)

    def behaviour(item: str, times_before: int) -> Action:
        os.kill(os.getpid(), signal.SIGTERM)
        return Action(completion(good_answer(item)), delay_s=5)

    with teacher_server(behaviour) as server:
        started = time.monotonic()
        assert call(SCRIPT, *arguments(server, write_lines(tmp_path, 3), tmp_path / "out")) == 85
        assert time.monotonic() - started < 4


def test_a_budget_of_requests_holds_over_all_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_lines(tmp_path, 30), tmp_path / "out"
    sometimes = {f"line {i:03d}" for i in range(0, 30, 5)}

    def behaviour(item: str, times_before: int) -> Action:
        return Action(b"{}", 500) if item in sometimes and not times_before else always_good(item, 0)

    with teacher_server(behaviour) as server:
        for budget, wanted in ((10, 10), (10, 10), (17, 17), (100, 36)):
            code = call(SCRIPT, *arguments(server, source, out, "--max-requests", budget))
            assert code == (0 if budget == 100 else 1)
            assert server.num_requests() == wanted  # a failed request counts as well
            said = capsys.readouterr().err
            assert ("--max-requests" in said and "go on with the same command" in said) == (budget != 100)
        assert max(server.answered.values()) == 1
    assert len(rows(out / "labels.jsonl")) == 30


@pytest.mark.parametrize(
    ("usage", "really", "budget", "least"),
    [
        (None, (PROMPT_TOKENS, ANSWER_TOKENS), 0.064, 20),  # small against the estimate
        ({"prompt_tokens": 1000, "completion_tokens": 512}, (1000, 512), 0.27, 9),  # about as estimated
        ("none", (1000, 512), 0.27, 9),  # unknown: the estimates are all there is
    ],
)
def test_a_budget_of_money_is_never_exceeded(
    tmp_path: Path,
    usage: object,
    really: tuple[int, int],
    budget: float,
    least: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = write_lines(tmp_path, 60), tmp_path / "out"
    each = (really[0] * 10 + really[1] * 30) / 1e6
    with teacher_server(lambda item, n: Action(completion(good_answer(item), usage), delay_s=0.02)) as server:
        for _ in range(2):  # the second start has nothing left to spend
            assert call(SCRIPT, *arguments(server, source, out, "--max-cost", budget, *PRICES)) == 1
            assert server.num_requests() * each <= budget
            assert server.num_requests() >= least
            assert "--max-cost" in capsys.readouterr().err
        assert call(SCRIPT, *arguments(server, source, out, "--max-cost", 100, *PRICES)) == 0
        assert set(server.asked.values()) == {1}


def test_what_a_killed_start_had_in_flight_stays_counted(tmp_path: Path) -> None:
    source, out = write_lines(tmp_path, 20), tmp_path / "out"
    with teacher_server(lambda item, n: Action(completion(good_answer(item)), delay_s=30)) as server:
        process = start(server, source, out, "--concurrency", 4, "--max-requests", 6)
        wait_for_requests(server, 4)
        process.kill()
        process.communicate()
        cost = sum(row["prompt"] * 10 + row["answer"] * 30 for row in rows(out / "requests.jsonl")) / 1e6
        assert call(SCRIPT, *arguments(server, source, out, "--max-cost", 1.1 * cost, *PRICES)) == 1
        assert server.num_requests() == 4
        assert call(SCRIPT, *arguments(server, source, out, "--max-requests", 6, "--timeout", 0.3)) == 1
        assert server.num_requests() == 6


# --- what ends it -----------------------------------------------------------------------------------------------------


def test_a_refused_key_ends_it_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}).encode()
    with teacher_server(lambda item, n: Action(body, 401, delay_s=0.02)) as server:
        out = tmp_path / "out"
        assert call(SCRIPT, *arguments(server, write_lines(tmp_path, 30), out, "--concurrency", 2)) == 1
        assert server.num_requests() <= 2
    said = capfd.readouterr()
    assert "HTTP 401: Incorrect API key provided: [key]" in said.err
    assert KEY not in said.out + said.err + "".join(b.decode() for b in bytes_of(out).values())


def test_an_endpoint_that_is_down_is_not_asked_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with teacher_server() as server:
        pass
    source = write_lines(tmp_path, 500)
    more = ("--max-attempts", 2, "--concurrency", 2, "--max-rejected-share", 1)
    assert call(SCRIPT, *arguments(server, source, tmp_path / "out", *more)) == 1
    assert "10 inputs in a row got no answer" in capsys.readouterr().err
    assert len(rows(tmp_path / "out" / "requests.jsonl")) < 60


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--base-url", "http://example.test/v1"), "--allow-http"),
        (("--base-url", f"https://user:{KEY}@example.test/v1"), "without user"),
        (("--base-url", f"https://example.test/v1?key={KEY}"), "query"),
        (("--base-url", "ftp://example.test"), "http(s)"),
        (("--key-env", "NO_SUCH_KEY", "--base-url", "https://example.test/v1"), "NO_SUCH_KEY is not set"),
        (("--key-env", "ODD_KEY"), "printable ASCII"),
        (("--max-cost", 1), "--price-in"),
        (("--max-cost", 1, *PRICES, "--request", '{"max_tokens": null}'), "max_tokens"),
        (("--source", "no/such"), "--source"),
        (("--prompt", "no/such"), "no/such"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_sent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.setenv("ODD_KEY", KEY + "\u2028more")
    with teacher_server() as server:
        error = refused(capsys, SCRIPT, *arguments(server, write_lines(tmp_path, 3), tmp_path / "out", *more))
        assert server.num_requests() == 0
    assert said in error
    assert KEY not in error
    assert "Traceback" not in error


def test_examples_and_prompt_are_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_lines(tmp_path, 2), tmp_path / "out"
    (tmp_path / "prompt.txt").write_text("Be brief.\n")
    examples = tmp_path / "pairs.csv"
    examples.write_text("text,answer\nMLK,Milk##Milk##-\n")
    more = ("--prompt", tmp_path / "prompt.txt", "--examples", examples, "--request", '{"max_completion_tokens": 9}')
    with teacher_server() as server:
        assert call(SCRIPT, *arguments(server, source, out, *more)) == 0
        request = server.requests[0]
        assert [m["content"] for m in request["messages"][:3]][::2] == ["Be brief.", "Milk##Milk##-"]
        assert request["max_completion_tokens"] == 9
        assert "max_tokens" not in request
        assert call(SCRIPT, *arguments(server, source, out)) == 0  # another prompt is another question
        assert server.num_requests() == 4
        examples.write_text("text,answer\nMLK,Milk\n")
        assert "none that a teacher may give: no ##" in refused(capsys, SCRIPT, *arguments(server, source, out, *more))


def test_one_process_a_folder_and_the_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with teacher_server() as server:
        call_arguments = arguments(server, write_lines(tmp_path, 3), out)
        with open(out / "answers.jsonl", "a") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            assert "another process" in refused(capsys, SCRIPT, *call_arguments)
        monkeypatch.setitem(sys.modules, "openai", None)
        assert "pip install openai" in refused(capsys, SCRIPT, *call_arguments)
        assert server.num_requests() == 0


# --- reading answers --------------------------------------------------------------------------------------------------


def test_find_line() -> None:
    call(SCRIPT, "--help")  # puts shards/ on the path
    from teacher_prompts import find_line

    for raw in ("a##b##-", " a##b##-\r\n", "**a##b##-**", "`a##b##-`", "**Normalized product:** a##b##-\n\nDone ##1"):
        assert find_line(raw) == "a##b##-"
    for raw, why in {
        "a##b": "2 fields",
        "a##b##c##d##e": "5 fields",
        "a## ##c": "empty field",
        "a\nb": "no ##",
    }.items():
        with pytest.raises(BadSample, match=why):
            find_line(raw)


def test_find_object() -> None:
    call(SCRIPT, "--help")  # puts shards/ on the path
    from teacher_prompts import find_object

    fields = ("company", "total")
    for raw in (
        '{"total": 0.50, "company": "A"}',
        'x {"company": "A", "total": "0.50"} y {',
        '{"company":"A","total":"0.50"}' * 2,
    ):
        assert find_object(raw, fields) == '{"company": "A", "total": "0.50"}'
    for raw, why in {
        "no": "no JSON object",
        '{"company": "A"': "no JSON object",
        '{"company": "A"} {"company": "B"}': "several",
        '{"company": "A", "tax": "1"}': "not asked for",
        '{"company": ["A"]}': "no text",
        '{"company": true}': "no text",
        '{"company": null, "total": " "}': "none of the fields",
        "{}": "none of the fields",
        '{"a":' * 3000: "no JSON object",
    }.items():
        with pytest.raises(BadSample, match=why):
            find_object(raw, fields)


def test_read_retry_after() -> None:
    assert read_retry_after({"retry-after": "2.5"}) == 2.5
    assert read_retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < (read_retry_after({"retry-after": date}) or 0) < 31
    assert read_retry_after({"retry-after": "soon"}) is None
    assert read_retry_after({}) is None
