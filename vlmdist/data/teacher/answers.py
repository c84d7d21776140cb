"""Questions to a teacher model and the log of its answers, which is never asked for twice.

    OUT/answers.jsonl    one row an answer, as the teacher gave it: {"key", "name", "raw", "finish", "prompt", "answer",
                         "time", "seconds"}; prompt and answer are tokens

The file only grows. Whatever ended a start, the next one reads it and goes on.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmdist.data.teacher.endpoint import Message, Reply, Tokens
from vlmdist.errors import BadSample, UserError
from vlmdist.run_folder import mend_jsonl, read_jsonl

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class Question:
    """One input. ``messages`` makes the request when it is sent, so that pictures are in memory only then."""

    key: str
    """``question_key``: the same for the same model, prompt and input."""
    name: str
    """The input, for people: a line, or a picture's name."""
    messages: Callable[[], list[Message]]
    """Raises BadSample where the input can't be read any more."""


def question_key(model: str, prompt: str, content: str) -> str:
    """SHA-256 of all that decides an answer; how it is sampled does not belong to it."""
    return hashlib.sha256(json.dumps([model, prompt, content]).encode()).hexdigest()


Check = Callable[[str], str]
"""A teacher's raw answer to the answer proper; BadSample with the reason where there is none."""


@dataclass
class Verdict:
    """What came of one question so far: its answers in the log, judged."""

    num_answers: int = 0
    answer: str | None = None
    """The first answer that passed."""
    reason: str = ""
    """Why the last one didn't."""
    raw: str = ""
    """The last one that didn't."""


class AnswerLog:
    """answers.jsonl: every answer ever paid for. Use as a context: it locks the folder against a second process."""

    def __init__(self, folder: Path, check: Check):
        self.folder = folder
        self.verdicts: dict[str, Verdict] = {}
        self._check = check

    def __enter__(self) -> "AnswerLog":
        path = self.folder / ANSWERS_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{self.folder}: another process asks for this folder; wait for it, or stop it") from None
        mend_jsonl(path)
        for row in read_jsonl(path):
            if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("key", "raw", "finish")):
                raise UserError(f"{path}: was not written by this script ({str(row)[:100]}); give another folder")
            self._judge(row["key"], row["raw"], row["finish"])
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def verdict(self, question: Question) -> Verdict:
        return self.verdicts.get(question.key) or Verdict()

    def add(self, question: Question, reply: Reply, tokens: Tokens, seconds: float) -> Verdict:
        """Keep an answer, on the disk before anything else happens."""
        row = {
            "key": question.key,
            "name": question.name,
            "raw": reply.text,
            "finish": reply.finish,
            "prompt": tokens.prompt,
            "answer": tokens.answer,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
        }
        self._file.write(_to_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._judge(question.key, reply.text, reply.finish)

    def _judge(self, key: str, raw: str, finish: str) -> Verdict:
        verdict = self.verdicts.setdefault(key, Verdict())
        verdict.num_answers += 1
        if verdict.answer is None:
            try:
                if finish == "length":
                    raise BadSample("cut off at the token limit")
                if not raw.strip():
                    raise BadSample("empty answer")
                verdict.answer = self._check(raw)
            except BadSample as e:
                verdict.reason, verdict.raw = str(e), raw
        return verdict


def _to_line(row: dict[str, Any]) -> str:
    # a lone surrogate in an answer is no Unicode text and can't be written as it is
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"
