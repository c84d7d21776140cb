"""The page of a real run: a tiny vision-language model, trained and evaluated by the commands, on pictures of tags."""

import io
import json
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw
from ranks import rank_environment
from tiny_models import make_tiny_llava
from tiny_run import tiny_run, write_run

from vlmdist.data.shards.writer import ShardWriter
from vlmdist.report.page import write_report

GOODS = ("milk", "bread", "tea", "soap", "rice")
QUESTION = "Read the price tag and answer with a JSON object."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    world = tmp_path_factory.mktemp("tags")
    texts = []
    for split, num in (("train", 16), ("validation", 4), ("test", 7)):
        with ShardWriter(world / split) as writer:
            for i in range(num):
                answer = json.dumps({"product": GOODS[i % 5], "price": f"{i}.90"})
                asked = [{"type": "image", "index": 0}, {"type": "text", "text": QUESTION}]
                said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                writer.write(f"{split}-{i:03d}", said, [_tag(f"{GOODS[i % 5]} {i}.90")], answer=answer)
                texts += [QUESTION, answer]
    make_tiny_llava(world / "model", texts)
    tree = tiny_run(
        world,
        world / "run",
        train={"max_steps": 3, "eval_steps": 2, "generate_samples": 2},
        evaluate={"metric": "fuzzy", "max_new_tokens": 12},
    )
    file = write_run(tree, world / "run.yaml")
    for command in (["evaluate", file, "--base"], ["train", file], ["evaluate", file]):
        done = subprocess.run(
            [sys.executable, "-m", "vlmdist", *map(str, command)],
            env=rank_environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    return world / "run"


def test_the_page_of_a_real_run_shows_its_pictures_questions_and_scores(run, browser, tmp_path):
    file = write_report([run], tmp_path / "page.html")
    browser.emulate()
    browser.open(file)
    browser.wait_for("performance.getEntriesByName('answers shown').length")
    assert browser.ask("document.querySelectorAll('.card').length") == 7
    assert browser.ask(f"document.body.innerText.includes('Asked each time: {QUESTION}')")
    browser.wait_for("[...document.images].every((image) => image.complete)")
    assert browser.ask("[...document.images].map((image) => image.naturalWidth)") == [120] * 7
    browser.ask("document.querySelector('button.image').click()")
    assert browser.ask("document.querySelector('button.image').ariaExpanded") == "true"

    scores = json.loads((run / "eval" / "base" / "scores.json").read_text())
    first = "document.querySelector('table.scores .value').textContent"
    assert browser.ask(first) == f"{scores['score']:.1f}"
    plots = browser.ask("[...document.querySelectorAll('figcaption')].map((c) => c.firstChild.textContent.trim())")
    assert {"Loss", "Validation scores", "Memory", "Where a step goes"} <= set(plots)
    assert browser.requests == [file.as_uri()]
    assert browser.complaints == []


def test_a_screenshot_shows_the_page(run, browser, tmp_path):
    browser.emulate(800, 600)
    browser.open(write_report([run], tmp_path / "page.html"))
    browser.screenshot(tmp_path / "page.png")
    image = Image.open(tmp_path / "page.png").convert("RGB")
    assert image.size == (800, 600)
    assert len(image.getcolors(1 << 20)) > 100, "a head with a gradient, tiles and text"


def _tag(text):
    image = Image.new("RGB", (120, 60), "white")
    ImageDraw.Draw(image).text((8, 20), text, fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
