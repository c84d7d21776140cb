"""The page of ``vlmdist predict --serve``: images and a question in, the answer as it grows, its JSON as a table.

What a model says is only ever the value of a text field or of a text cell: nothing in it is markup, and nothing is
loaded for it. Errors are text too: Gradio's own pop-ups render markup.
"""

import html
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.predict.answer import Answer, Predictor
from vlmdist.predict.question import read_image
from vlmdist.predict.run import figures, make_sample
from vlmdist.predict.source import Source
from vlmdist.predict.terminal import pretty
from vlmdist.predict.usual import Usual
from vlmdist.report.shown_text import visible
from vlmdist.sample import IMAGE_EXTENSIONS, Sample

MAX_WAITING = 16
"""Questions that wait for the one that is being answered."""
MAX_FIELDS = 200
"""Rows of the table."""
_BETWEEN_UPDATES_S = 0.05
"""A browser that gets more than it can show would be behind when the answer ends."""


def make_page(
    source: Source, usual: Usual, predictor: Predictor, device: str, has_ended: Callable[[], bool]
) -> gr.Blocks:
    """The page. device: as the user is told it. has_ended: asked after each token; True ends what is being answered."""

    stopping: dict[str | None, threading.Event] = {}  # by the browser's tab

    def ask(request: gr.Request, text: str, images: list[tuple[str, Any]] | None = None) -> Iterator[dict[Any, Any]]:
        stopped = stopping[request.session_hash] = threading.Event()
        hidden = {fields: gr.update(visible=False), as_json: gr.update(visible=False)}
        yield {answer: "", status: "reading the question", **hidden}
        try:
            pictures = [_read(Path(file)) for file, _ in images or []]
            sample = make_sample(source, usual, text, pictures)
            found = None
            for found in _grow(predictor, sample, lambda: stopped.is_set() or has_ended()):
                if isinstance(found, str):
                    yield {answer: visible(found), status: "answering"}
        except (UserError, RunFailed) as e:
            yield {status: f"error: {visible(str(e))}"}
            return
        if isinstance(found, Answer):
            end = "" if found.is_whole else "; stopped" if stopped.is_set() else "; cut at the longest answer"
            yield {answer: visible(found.text), status: figures(found) + end, **shown_json(found)}

    def stop(request: gr.Request) -> None:
        if request.session_hash in stopping:
            stopping[request.session_hash].set()

    def shown_json(found: Answer) -> dict[Any, Any]:
        if found.json is None:
            return {}
        rows = [[visible(name), visible(value)] for name, value in table_of(found.json)[:MAX_FIELDS]]
        return {fields: gr.update(value=rows, visible=True), as_json: gr.update(value=pretty(found.json), visible=True)}

    with gr.Blocks(title=f"vlmdist: {source.name}", analytics_enabled=False) as page:
        gr.HTML(f"<h2>{html.escape(visible(source.name))}</h2><p>{html.escape(device)}</p>")
        with gr.Row():
            with gr.Column():
                inputs = [
                    gr.Textbox(
                        usual.text or "", label="Question", lines=3, max_lines=12, elem_id="question", render=False
                    )
                ]
                if predictor.prompter.has_images:
                    extensions = [f".{extension}" for extension in IMAGE_EXTENSIONS]
                    images = gr.Gallery(
                        label="Images",
                        type="filepath",
                        file_types=extensions,
                        sources=["upload", "clipboard"],
                        interactive=True,
                        object_fit="contain",
                        height=320,
                        preview=True,
                        buttons=[],
                        elem_id="images",
                    )
                    inputs.append(images)
                inputs[0].render()
                with gr.Row():
                    go = gr.Button("Ask", variant="primary", elem_id="ask")
                    halt = gr.Button("Stop", elem_id="stop")
            with gr.Column():
                answer = gr.Textbox(
                    label="Answer", lines=4, max_lines=30, interactive=False, buttons=["copy"], elem_id="answer"
                )
                status = gr.Textbox(label="Status", interactive=False, elem_id="status")
                fields = gr.Dataframe(
                    headers=["field", "value"],
                    datatype="str",
                    type="array",
                    label="Fields",
                    interactive=False,
                    wrap=True,
                    visible=False,
                    elem_id="fields",
                )
                as_json = gr.Textbox(
                    label="JSON",
                    lines=4,
                    max_lines=30,
                    interactive=False,
                    visible=False,
                    buttons=["copy"],
                    elem_id="json",
                )
        go.click(
            ask,
            inputs,
            [answer, status, fields, as_json],
            show_progress="hidden",
            concurrency_limit=1,
            trigger_mode="once",
            api_visibility="private",
        )
        halt.click(stop, queue=False, api_visibility="private")
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def table_of(value: Any, name: str = "") -> list[tuple[str, str]]:
    """(field, value) of every leaf of a JSON object, the names of nested ones joined by dots."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in table_of(inner, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and value:
        return [row for i, inner in enumerate(value) for row in table_of(inner, f"{name}[{i}]")]
    if value is None or isinstance(value, bool):
        return [(name, {None: "null", True: "true", False: "false"}[value])]
    return [(name, "" if value in ({}, []) else str(value))]


def _read(file: Path) -> bytes:
    try:
        return read_image(file)
    except BadSample as e:
        raise UserError(f"{file.name}: {e}") from None


def _grow(predictor: Predictor, sample: Sample, is_cancelled: Callable[[], bool]) -> Iterator[str | Answer]:
    """The answer so far as it grows, then the answer; generated in a thread that ends with this iterator."""
    left = threading.Event()
    said: queue.SimpleQueue[str | Answer | Exception] = queue.SimpleQueue()

    def generate() -> None:
        try:
            said.put(predictor.answer(sample, said.put, lambda: left.is_set() or is_cancelled()))
        except Exception as e:
            said.put(e)

    threading.Thread(target=generate, name="answer", daemon=True).start()
    try:
        while True:
            found = said.get()
            while isinstance(found, str) and not said.empty():
                found = said.get()
            if isinstance(found, Exception):
                raise found
            yield found
            if isinstance(found, Answer):
                return
            time.sleep(_BETWEEN_UPDATES_S)
    finally:
        left.set()
