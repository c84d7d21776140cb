#!/usr/bin/env python3
"""Raw receipt lines, or pictures, labelled by a teacher model at any OpenAI-compatible endpoint.

    export OPENAI_API_KEY=...
    python shards/label_with_teacher.py --source lines.txt --out LABELS --model gpt-4-turbo --max-requests 2000
    python shards/receipt_lines.py --source LABELS/labels.jsonl --out CORPUS

    python shards/label_with_teacher.py --kind images --source FOLDER --out LABELS --model gpt-4o \\
        --max-cost 5 --price-in 2.5 --price-out 10          (the corpus is LABELS/corpus)

--kind lines: .txt (a line each), .jsonl or .csv (--column), or a folder of the latter; the answer has the form
normalized##product##brand##category. --kind images: a folder of JPEG, PNG, WebP or GIF; the answer is JSON of --fields.

    LABELS/labels.jsonl     {"text" or "image", "answer"} of everything labelled
    LABELS/rejected.jsonl   answers that are not in the form asked for, with the reason
    LABELS/answers.jsonl    every answer as it came; LABELS/requests.jsonl every request, and what it used
    LABELS/corpus/          of images, split by their bytes

Stopped by a signal, a kill or its budget, the same command goes on: what is answered is never asked again, equal inputs
are asked once. A budget holds for all starts together; each request is counted at its most before it is sent. With
another model, prompt or examples it is another question; with other --request fields it is not. The key comes from the
environment only.
"""

import _environment  # noqa: F401  # isort: skip

import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receipt_lines import find_files, read_rows
from teacher_options import make_budget, make_parser, make_teacher, read_options
from teacher_prompts import IMAGE_MIME, Prompt, find_line, find_object, image_prompt, line_prompt, read_text

from vlmdist.data.convert.account import NUM_NAMED
from vlmdist.data.convert.corpora import (
    CorpusWriter,
    Row,
    bytes_group,
    make_key,
    question_and_answer,
    read_bytes,
    run_script,
)
from vlmdist.data.convert.splits import assign_splits
from vlmdist.data.teacher.answers import AnswerLog, Check, Question, question_key
from vlmdist.data.teacher.asking import Asking, StoppedBySignal
from vlmdist.data.teacher.budget import Pace
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.run_folder import replace_file_text

LABELS_FILE = "labels.jsonl"
REJECTED_FILE = "rejected.jsonl"
CORPUS_FOLDER = "corpus"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Input:
    """One thing to label; inputs with equal content are one."""

    name: str
    """A raw line itself, or a picture's path inside the source."""
    content: str
    """The line, or the SHA-256 of the picture's bytes."""
    file: Path | None = None


def main(arguments: list[str] | None = None) -> None:
    options = read_options(make_parser(__doc__).parse_args(arguments))
    teacher = make_teacher(options)
    check: Check = find_line
    if options.kind == "lines":
        prompt = line_prompt(options.prompt, options.examples)
        inputs = read_lines(options.source, options.column)
    else:
        prompt = image_prompt(options.fields, options.prompt, options.examples)
        inputs = find_images(options.source)
        check = functools.partial(find_object, fields=options.fields)
    questions = [to_question(options.model, prompt, item) for item in inputs]
    with AnswerLog(options.out, check) as log:
        asking = Asking(
            teacher=teacher,
            log=log,
            budget=make_budget(options),
            pace=Pace(options.requests_per_minute, options.tokens_per_minute),
            concurrency=options.concurrency,
            max_attempts=options.max_attempts,
            num_asks=1 + options.retry_rejected,
            backoff_s=options.backoff,
            tokens_per_image=options.image_tokens,
        )
        why = ask_with_progress(asking, questions)
        write_labels(options, asking, inputs, questions)
        if options.kind == "images" and why is None:
            write_corpus(options, log, prompt, inputs, questions)
    if why is not None:
        told = f"{why}; nothing is lost or asked twice: go on with the same command"
        if isinstance(why, RunFailed):
            raise RunFailed(f"{told}{' and a larger budget' if 'budget' in str(why) else ''}")
        print(told, file=sys.stderr)
        sys.exit(why.exit_code)


# --- inputs -----------------------------------------------------------------------------------------------------------


def read_lines(source: Path, column: str) -> list[Input]:
    """Different lines in the order of the files; what has no text is named."""
    files = [source] if source.suffix.lower() == ".txt" and source.is_file() else find_files(source)
    lines, unusable = [], []
    for file in files:
        rows = read_text(file).split("\n") if file.suffix.lower() == ".txt" else read_rows(file)
        for number, row in enumerate(rows, 1):
            text = row.get(column) if isinstance(row, dict) else row if file.suffix.lower() == ".txt" else None
            if isinstance(text, str) and text.strip():
                lines.append(text.strip())
            elif file.suffix.lower() != ".txt":
                unusable.append(f"{file.name}:{number} has no text in {column}")
    for sentence in unusable[:NUM_NAMED]:
        print(f"left out: {sentence}")
    if not lines:
        raise UserError(f"--source {source}: holds no line with text" + (f" in {column}" if unusable else ""))
    return _once([Input(line, line) for line in lines], len(unusable))


def find_images(source: Path) -> list[Input]:
    """Different pictures in the order of their paths."""
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder; pictures are taken from a folder and those in it")
    suffixes = (*(f".{name}" for name in IMAGE_MIME), ".jpeg")
    files = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in suffixes and p.is_file()]
    if not files:
        raise UserError(f"--source {source}: holds no picture ({', '.join(suffixes)})")
    try:
        return _once([Input(p.relative_to(source).as_posix(), bytes_group(read_bytes(p)), p) for p in files], 0)
    except BadSample as e:
        raise UserError(f"--source {source}: {e}") from None


def _once(inputs: list[Input], num_unusable: int) -> list[Input]:
    different = list({item.content: item for item in reversed(inputs)}.values())[::-1]
    repeats, unusable = len(inputs) - len(different), f", {num_unusable} rows without text" if num_unusable else ""
    print(f"{len(different)} inputs to label ({repeats} repeats{unusable})", flush=True)
    return different


def to_question(model: str, prompt: Prompt, item: Input) -> Question:
    def messages() -> list[dict[str, Any]]:
        if item.file is None:
            return prompt.messages(item.content)
        data = read_bytes(item.file)
        if bytes_group(data) != item.content:
            raise BadSample("the picture has changed since the start")
        return prompt.messages(data)

    return Question(question_key(model, prompt.fingerprint, item.content), item.name, messages)


# --- asking -----------------------------------------------------------------------------------------------------------


def ask_with_progress(asking: Asking, questions: Sequence[Question]) -> RunFailed | StoppedBySignal | None:
    """Returns why it ended early. Says at the end what came of it."""
    from tqdm import tqdm

    started = time.monotonic()
    num_before = sum(not asking.is_open(q) for q in questions)
    with tqdm(total=len(questions), initial=num_before, unit=" inputs", mininterval=0.5, disable=None) as bar:

        def show() -> None:
            bar.update(num_before + asking.num_done - bar.n)
            if asking.budget.cost is not None:
                bar.set_postfix_str(f"cost {asking.budget.cost:.2f}", refresh=False)

        asking.on_change = show
        why: RunFailed | StoppedBySignal | None = None
        try:
            asking.run(questions)
        except (RunFailed, StoppedBySignal) as e:
            why = e
    print_table(asking, questions, time.monotonic() - started)
    return why


def print_table(asking: Asking, questions: Sequence[Question], seconds: float) -> None:
    verdicts = [asking.log.verdict(q) for q in questions]
    rejected = Counter(v.reason for v in verdicts if v.answer is None and v.num_answers)
    num_open = sum(not v.num_answers for v in verdicts) - asking.failures.total()
    budget = asking.budget
    print(f"{'inputs':<12}{len(questions):>10}")
    print(f"{'labelled':<12}{sum(v.answer is not None for v in verdicts):>10}")
    for title, reasons in (("rejected", rejected), ("given up", asking.failures)):
        named = ", ".join(f"{why}: {n}" for why, n in reasons.most_common())
        print(f"{title:<12}{reasons.total():>10}   {named}".rstrip())
    print(f"{'not asked':<12}{num_open:>10}")
    print(f"{'requests':<12}{budget.results.total():>10}   of all starts: {budget.num_requests}")
    tokens = budget.tokens
    print(f"{'tokens':<12}{tokens.total:>10}   of all starts: {tokens.prompt} prompt, {tokens.answer} answer")
    if budget.cost is not None:
        print(f"{'cost':<12}{budget.cost:>10.4f}   of all starts")
    print(f"{'time':<12}{seconds:>9.1f}s", flush=True)


# --- labels -----------------------------------------------------------------------------------------------------------


def write_labels(
    options: argparse.Namespace, asking: Asking, inputs: Sequence[Input], questions: Sequence[Question]
) -> None:
    """labels.jsonl and rejected.jsonl. UserError, and no labels, where too much can't be used."""
    field = "text" if options.kind == "lines" else "image"
    labels, rejected = [], []
    for item, question in zip(inputs, questions, strict=True):
        verdict = asking.log.verdict(question)
        if verdict.answer is not None:
            labels.append({field: item.name, "answer": verdict.answer})
        elif verdict.num_answers:
            rejected.append({field: item.name, "why": verdict.reason, "raw": verdict.raw, "asked": verdict.num_answers})
    _write_rows(options.out / REJECTED_FILE, rejected)
    num_unusable = len(rejected) + asking.failures.total()
    if num_unusable > options.max_rejected_share * (len(labels) + num_unusable):
        (options.out / LABELS_FILE).unlink(missing_ok=True)
        raise UserError(
            f"{num_unusable} of {len(labels) + num_unusable} inputs asked have no usable answer, over the limit of "
            f"{options.max_rejected_share:.1%}, so no labels are written: see {options.out / REJECTED_FILE}; mend the "
            "prompt or its examples, ask again (--retry-rejected), or raise --max-rejected-share"
        )
    _write_rows(options.out / LABELS_FILE, labels)
    print(
        f"{len(labels)} labels in {options.out / LABELS_FILE}, {len(rejected)} answers in {options.out / REJECTED_FILE}"
    )


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file_text(file, text.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair stays escaped


def write_corpus(
    options: argparse.Namespace,
    log: AnswerLog,
    prompt: Prompt,
    inputs: Sequence[Input],
    questions: Sequence[Question],
) -> None:
    """Labelled pictures as shards, their bytes as they are; a split that gets no picture is left away."""
    answers = [log.verdict(q).answer for q in questions]
    labelled = [(item, answer) for item, answer in zip(inputs, answers, strict=True) if answer is not None]
    fractions = dict(zip(SPLITS, options.fractions, strict=True))
    split_of_each = assign_splits([item.content for item, _ in labelled], fractions, options.seed)
    about = {
        "script": "label_with_teacher",
        "source": options.source.resolve().name,
        "model": options.model,
        "seed": options.seed,
    }
    out = options.out / CORPUS_FOLDER
    with CorpusWriter(out, overwrite=True, about=about, max_bad_share=options.max_rejected_share) as corpus:
        for item, answer in zip(inputs, answers, strict=True):
            if answer is None:
                corpus.leave_out_bad(item.name, "the teacher gave no usable answer")
        for split in SPLITS:
            rows = [
                Row(
                    make_key(item.name),
                    question_and_answer(prompt.question, answer, num_images=1),
                    answer,
                    (item.file,) if item.file else (),
                    {"source": item.name},
                )
                for (item, answer), s in zip(labelled, split_of_each, strict=True)
                if s == split
            ]
            if rows:
                corpus.write_split(split, rows, total=len(rows))


if __name__ == "__main__":
    sys.exit(run_script(main))
