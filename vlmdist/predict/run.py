"""``vlmdist predict`` from the question to the answer.

1. Read the question: text and images, checked.
2. Find what answers, and how its samples ask; refuse what can't be asked, before any weights are loaded.
3. Load it, onto the GPU where there is one; answer while it is being made.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdist.errors import UserError
from vlmdist.predict.question import read_images, read_text
from vlmdist.predict.usual import Usual, usual_question
from vlmdist.sample import Sample

if TYPE_CHECKING:
    import torch

    from vlmdist.predict.answer import Answer, Predictor
    from vlmdist.predict.source import Source


def predict(
    asked: str,
    text: str | None,
    images: Sequence[Path] = (),
    *,
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    max_new_tokens: int | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Answer one question on standard output.

    asked: see ``vlmdist.predict.source``. text: "-" for standard input; None for the question that all samples of the
    run ask. as_json: print nothing. Returns {"answer", "json" (null for what is no JSON object), "tokens", "complete",
    "first_token_s", "seconds", "model"}. Raises UserError for what the user can mend.
    """
    read = None if text is None else read_text(text)
    pictures = read_images(images)
    device = choose_device()
    source, usual = open_source(asked, overrides, checkpoint, max_new_tokens, device)
    sample = make_sample(source, usual, read, pictures)
    predictor = load(source, device)
    if as_json:
        answer = predictor.answer(sample)
    else:
        from vlmdist.predict.terminal import Printer

        printer = Printer()
        answer = predictor.answer(sample, printer.print_growth)
        printer.end(answer)
    say(figures(answer))
    if not answer.is_whole:
        say(f"the answer was cut after {answer.num_tokens} tokens; --max-new-tokens allows more")
    return {
        "answer": answer.text,
        "json": answer.json,
        "tokens": answer.num_tokens,
        "complete": answer.is_whole,
        "first_token_s": round(answer.first_token_s, 3),
        "seconds": round(answer.seconds, 3),
        "model": source.name,
    }


def open_source(
    asked: str,
    overrides: Sequence[str],
    checkpoint: str | None,
    max_new_tokens: int | None,
    device: "torch.device",
) -> "tuple[Source, Usual]":
    """What answers, and how its samples ask. Says on standard error what the user should know.

    UserError where ``asked`` is nothing that can answer, or an option is wrong.
    """
    from dataclasses import replace

    from vlmdist.predict.source import find_source

    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: at least 1")
    source, notes = find_source(asked, overrides, checkpoint, device)
    usual = Usual()
    if source.is_run:
        usual, unknown = usual_question(source.config)
        notes += unknown
    if max_new_tokens is not None:
        settings = source.config.evaluate.model_copy(update={"max_new_tokens": max_new_tokens})
        source = replace(source, config=source.config.model_copy(update={"evaluate": settings}))
    say(*notes)
    return source, usual


def make_sample(source: "Source", usual: Usual, text: str | None, images: Sequence[bytes]) -> Sample:
    """The question as a sample. UserError where there is none, or where the model doesn't take it."""
    from vlmdist.model.families import family_of
    from vlmdist.model.load import load_config

    if text is None:
        if usual.text is None:
            raise UserError(
                "--text: is needed (- for standard input)"
                + (": the samples of the run don't all ask the same" if source.is_run else "")
            )
        text = usual.text
        say(f"asking as all samples of the run do: {text}")
    if not text.strip() and not images:
        raise UserError("--text: is empty, and there is no image")
    if images and not family_of(load_config(source.config.model)).sees:
        raise UserError(f"--image: {source.config.model.name_or_path} takes text only; leave the images out")
    if usual.has_images and not images:
        say("the samples of the run all show an image, and none was given")
    return usual.sample(text, images)


def load(source: "Source", device: "torch.device") -> "Predictor":
    """The model with its weights on the device; says on standard error how long it took."""
    from vlmdist.predict.answer import Predictor

    started_s = time.monotonic()
    predictor = Predictor(source, device)
    say(f"answering with {source.name} on {device_name(device)}, loaded in {time.monotonic() - started_s:.1f} s")
    return predictor


def choose_device() -> "torch.device":
    """The GPU where there is one. On CPUs torch takes the cores that this process may run on (or OMP_NUM_THREADS)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums in every run (NVIDIA cuBLAS manual)
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: "torch.device") -> str:
    """As the user knows it; of a CPU the threads that torch takes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' if threads > 1 else ''}"


def figures(answer: "Answer") -> str:
    return f"{answer.num_tokens} tokens in {answer.seconds:.1f} s, the first after {answer.first_token_s:.1f} s"


def say(*lines: str) -> None:
    """On standard error, so that standard output is the answer alone."""
    from vlmdist.report.shown_text import visible

    for line in lines:
        print(f"predict: {visible(line)}", file=sys.stderr, flush=True)
