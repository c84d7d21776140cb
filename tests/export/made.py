"""Run folders and checkpoints for the tests of exporting, and answers in a process that knows nothing of vlmdist."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ranks import rank_environment
from safetensors.torch import save_file

from vlmdist.config import RunConfig, dump_run
from vlmdist.data.prompt import Prompter
from vlmdist.evaluate.generate import generate_batch
from vlmdist.model.adapters import trainable_names
from vlmdist.model.load import load_for_evaluation, load_for_training
from vlmdist.run_folder import TRAINABLE_WEIGHTS, RunFolder, write_manifest
from vlmdist.sample import ImagePart, Message, Sample, TextPart
from vlmdist.train.state import STATE_FILE, TrainState

CPU = torch.device("cpu")
FINGERPRINT = "f" * 64


@dataclass(frozen=True)
class Question:
    text: str
    image: Path | None = None
    """Shown before the text."""

    def sample(self) -> Sample:
        shown = () if self.image is None else (ImagePart(0),)
        images = () if self.image is None else (self.image.read_bytes(),)
        return Sample(0, "question", (Message("user", (*shown, TextPart(self.text))),), images)


def run_config(base: Path, output_dir: Path, adapt: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"name_or_path": str(base), "precision": "fp32"},
        "adapt": adapt,
        "data": {"train": "data/train"},
        "train": {"global_batch_size": 8},
        "evaluate": {"max_new_tokens": 8},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if name in tree else section
    return RunConfig.model_validate(tree)


def make_run(config: RunConfig, scale: float = 0.05) -> Path:
    """The run folder of ``config`` with one checkpoint, its trained weights moved by random numbers of that size."""
    model, _ = load_for_training(config, CPU)
    torch.manual_seed(11)
    names = set(trainable_names(model))
    weights = {
        n: (p.detach() + scale * torch.randn(p.shape).to(p.dtype)).contiguous()
        for n, p in model.named_parameters()
        if n in names
    }
    run = RunFolder(Path(config.output_dir))
    checkpoint = run.checkpoint_dir(3)
    checkpoint.mkdir(parents=True)
    save_file(weights, checkpoint / TRAINABLE_WEIGHTS)
    state = TrainState(step=3, global_batch_size=8, tokens=1234)
    (checkpoint / STATE_FILE).write_text(state.as_text(), encoding="utf-8")
    for folder in (checkpoint, run.path):
        (folder / "run.yaml").write_text(dump_run(config), encoding="utf-8")
    write_manifest(checkpoint, {"step": 3, "world_size": 1, "corpora": [FINGERPRINT]})
    return run.path


class Answer(NamedTuple):
    text: str
    tokens: tuple[int, ...]
    """Before the first stop token."""


def evaluators_answers(config: RunConfig, checkpoint: Path | None, questions: list[Question]) -> list[Answer]:
    """Each question by itself, as the evaluator answers it."""
    model, processor = load_for_evaluation(config, CPU, checkpoint=checkpoint)
    prompter = Prompter.for_run(processor, config, evaluation=True)
    decode, generated = prompter.decode_answer, []

    def noting(tokens: Sequence[int]) -> str:
        stops = [i for i, token in enumerate(tokens) if token in prompter.stop_token_ids]
        generated.append(tuple(tokens[: stops[0] if stops else None]))
        return decode(tokens)

    prompter.decode_answer = noting  # type: ignore[method-assign]
    encoded = [prompter.encode_question(q.sample()) for q in questions]
    texts = [generate_batch(model, prompter, [e], config.evaluate.max_new_tokens)[0] for e in encoded]
    return [Answer(*pair) for pair in zip(texts, generated, strict=True)]


# Runs the Python that a folder's model card tells its readers to run. -I and the blocked name: an editable install of
# vlmdist would be found otherwise.
_FRESH = """
import contextlib, io, json, re, sys
sys.modules["vlmdist"] = None
import torch
from PIL import Image
torch.set_num_threads(1)
answers = []
for folder, questions in json.load(sys.stdin):
    card = open(f"{folder}/README.md", encoding="utf-8").read()
    code = re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace('folder = "."', f"folder = {folder!r}")
    load, use = code.split("messages = ")
    names = {}
    exec(load, names)
    said = []
    for text, image in questions:
        names.update(question=text, image=image and Image.open(image))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec("messages = " + use, names)
        tokens = names["answer"][0, names["inputs"]["input_ids"].shape[1] :].tolist()
        stops = json.load(open(f"{folder}/generation_config.json"))["eos_token_id"]
        ends = [i for i, token in enumerate(tokens) if token in stops]
        said.append([out.getvalue().strip(), tokens[: ends[0] if ends else None]])
    answers.append(said)
try:
    import vlmdist
except ImportError:
    print(json.dumps(answers))
"""


def fresh_answers(asked: list[tuple[Path, list[Question]]], cache: Path) -> list[list[Answer]]:
    """What each exported folder answers in a fresh Python without vlmdist, by the code of its own model card."""
    jobs = [(str(f), [(q.text, None if q.image is None else str(q.image)) for q in qs]) for f, qs in asked]
    environment = rank_environment(HF_HOME=str(cache), TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run(
        [sys.executable, "-I", "-c", _FRESH],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return [[Answer(text, tuple(tokens)) for text, tokens in of_folder] for of_folder in answers]
