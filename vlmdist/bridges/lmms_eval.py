"""lmms-eval's model ``vlmdist``: a run's checkpoint answers lmms-eval's tasks, with the prompt it was trained with.

    accelerate launch --num_processes=2 -m lmms_eval --model vlmdist \\
        --model_args run=RUN.yaml,checkpoint=best --tasks TASK --batch_size 8 --output_path OUT --log_samples

Without GPUs add --multi_gpu, or accelerate starts one process only. lmms-eval (0.7) finds the model by the entry point
``lmms_eval.models`` of this package. Text and images; tasks that generate (no likelihoods, no several rounds). Greedy,
as ``vlmdist evaluate``, with the run file's evaluate section, but for what a task sets: ``max_new_tokens``, and
``until``, which lmms-eval itself sets to a blank line where a task says nothing. An answer doesn't end where the run
file's metric has what it reads (stop_when_answered): the task has its own.

Answers don't depend on the number of processes at --batch_size 1, lmms-eval's default. lmms-eval deals the documents
to the processes by turns, so larger batches are cut from other documents when their number changes, and padding, with
it rounding, changes too.
"""

import io
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm

from vlmdist.config import RunConfig, load_run
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.evaluate.answer import Answerer
from vlmdist.evaluate.engine import TransformersEngine, open_engine
from vlmdist.evaluate.few_shot import Shown
from vlmdist.evaluate.plan import cut_batches
from vlmdist.evaluate.readable import Readable
from vlmdist.evaluate.subject import choose_subject
from vlmdist.sample import Sample, parse_record

if TYPE_CHECKING:
    import torch

MANIFEST = ModelManifest(model_id="vlmdist", chat_class_path="vlmdist.bridges.lmms_eval.Vlmdist")

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


class Vlmdist(lmms):
    """A run's checkpoint as a chat model of lmms-eval.

    run: run file or run folder. checkpoint: as for ``vlmdist evaluate``. base: the model before training.
    batch_size: documents answered together. max_batch_size, device: lmms-eval hands them to every model; accelerate
    decides which device is this rank's.
    """

    is_simple = False

    def __init__(
        self,
        run: str | None = None,
        checkpoint: str | None = None,
        base: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        from accelerate import Accelerator

        self.accelerator = Accelerator()  # lmms-eval gathers by it
        # not accelerate's, which on CPUs takes every process for the only one; lmms-eval goes by these too
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        with _told(self._rank):
            self.batch_size = _check_arguments(run, batch_size, unknown)
            self._config = _for_lmms_eval(load_run(str(run)))  # lmms-eval makes numbers of digits
            self._shown = Shown(self._config.evaluate.instruction) if base else Shown()
            self._engine = self._open(checkpoint, base)
        self._warned: set[tuple[str, str]] = set()

    def _open(self, checkpoint: str | None, base: bool) -> TransformersEngine:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums in every run (NVIDIA cuBLAS manual)
        import torch

        torch.set_num_threads(self._config.threads_per_rank)  # CPU kernels round differently with another count
        subject, notes = choose_subject(self._config, checkpoint, base)
        if self._rank == 0:
            what = "the base model" if subject.folder is None else subject.folder
            print(*[f"vlmdist: {note}" for note in [*notes, f"answering with {what}"]], sep="\n", file=sys.stderr)
        return cast(TransformersEngine, open_engine(self._config, subject, self.device))

    @property
    def device(self) -> "torch.device":
        return self.accelerator.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, in their order. One that can't be asked is answered by "" and named."""
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=self._rank != 0, desc="vlmdist")
        with _told(self._rank):
            for max_new_tokens, members in self._by_length(requests).items():
                asked = _Documents([requests[i] for i in members], self.task_dict)
                answerer = Answerer(cast(Readable, asked), self._engine_for(max_new_tokens), self._shown)
                for batch in self._batches(asked):
                    for n, row in zip(batch, answerer.answer(batch), strict=True):
                        answers[members[n]] = _until(row["prediction"], asked.settings(n).get("until"))
                        if "error" in row:
                            logger.warning(f"{row['id']}: not answered: {row['error']}")
                    bar.update(len(batch))
        bar.close()
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Always UserError: not offered."""
        with _told(self._rank):
            raise UserError(f"task {_task_of(requests)}: asks in several rounds, which --model vlmdist doesn't offer")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Always UserError: not offered."""
        with _told(self._rank):
            raise UserError(
                f"task {_task_of(requests)}: compares likelihoods of given answers (output_type loglikelihood or "
                "multiple_choice), which --model vlmdist doesn't offer; take a task that generates"
            )

    def clean(self) -> None:
        """lmms-eval calls this after the last answer: a judge may need the memory."""
        del self._engine
        super().clean()

    def _by_length(self, requests: Sequence[Instance]) -> dict[int, list[int]]:
        """Numbers of the requests by their longest answer in tokens."""
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            settings = request.args[2]
            self._tell_what_is_not_honoured(request.task_name, settings)
            groups[int(settings.get("max_new_tokens") or self._config.evaluate.max_new_tokens)].append(i)
        return groups

    def _tell_what_is_not_honoured(self, task: str, settings: dict[str, Any]) -> None:
        sampling = settings.get("do_sample") or (settings.get("temperature") or 0) > 0
        for is_asked, what in ((sampling, "sampling"), ((settings.get("num_beams") or 1) > 1, "beam search")):
            if is_asked and (task, what) not in self._warned:
                self._warned.add((task, what))
                logger.warning(f"task {task} asks for {what}; vlmdist answers greedily")

    def _engine_for(self, max_new_tokens: int) -> TransformersEngine:
        settings = self._config.evaluate.model_copy(update={"max_new_tokens": max_new_tokens})
        config = self._config.model_copy(update={"evaluate": settings})
        return TransformersEngine(self._engine.model, self._engine.prompter, config)

    def _batches(self, asked: "_Documents") -> Sequence[Sequence[int]]:
        if self.batch_size == 1:
            return [(i,) for i in range(len(asked))]
        sizes = [asked.sizes(i) for i in range(len(asked))]
        text_bytes, num_images, image_pixels = (list(column) for column in zip(*sizes, strict=True))
        return cut_batches(text_bytes, num_images, image_pixels, self.batch_size)


class _Documents:
    """The requests' documents as samples, numbered in the order of the requests; what Answerer reads."""

    def __init__(self, requests: Sequence[Instance], datasets: dict[str, Any]):
        self._requests, self._datasets = requests, datasets

    def __len__(self) -> int:
        return len(self._requests)

    def key(self, i: int) -> str:
        _, _, _, document, task, split = self._requests[i].args
        return f"document {document} of {task} ({split})"

    def settings(self, i: int) -> dict[str, Any]:
        """The task's generation settings."""
        found: dict[str, Any] = self._requests[i].args[2]
        return found

    def read(self, i: int) -> Sample:
        """Raises BadSample."""
        messages: list[dict[str, Any]] = []
        images: list[bytes] = []
        for message in self._messages(i):
            parts: list[dict[str, Any]] = []
            for part in _parts_of(message):
                if part["type"] == "image":
                    parts.append({"type": "image", "index": len(images)})
                    images.append(_encoded(part["url"]))
                else:
                    parts.append(part)
            messages.append({"role": message["role"], "content": parts})
        parsed, _, _ = parse_record({"messages": messages}, len(images))
        return Sample(i, self.key(i), parsed, tuple(images))

    def sizes(self, i: int) -> tuple[int, int, int]:
        """UTF-8 bytes of text, number of images, and pixels of all of them."""
        parts = [part for message in self._messages(i) for part in _parts_of(message)]
        pictures = [part["url"] for part in parts if part["type"] == "image"]
        pixels = sum(p.width * p.height for p in pictures if isinstance(p, Image.Image))
        return sum(len(part.get("text", "").encode()) for part in parts), len(pictures), pixels

    def _messages(self, i: int) -> list[dict[str, Any]]:
        _, to_messages, _, document, task, split = self._requests[i].args
        messages: list[dict[str, Any]] = to_messages(self._datasets[task][split][document])
        return messages


def _check_arguments(run: str | None, batch_size: int | str, unknown: dict[str, Any]) -> int:
    problems = []
    if run is None:
        problems.append("--model_args: run=RUN.yaml is missing, the run file or run folder")
    if unknown:
        problems.append(f"--model_args: unknown {', '.join(unknown)}; there are run, checkpoint and base")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        problems.append(f"--batch_size {batch_size}: must be a whole number from 1, vlmdist finds none by itself")
    if problems:
        raise UserError(problems)
    return int(batch_size)


def _for_lmms_eval(config: RunConfig) -> RunConfig:
    """Where an answer ends is the task's business, not that of the run file's metric."""
    settings = config.evaluate.model_copy(update={"stop_when_answered": False, "engine": "transformers"})
    return config.model_copy(update={"evaluate": settings})


def _parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise UserError(f"the task asks about {part['type']}; --model vlmdist takes text and images")
    return parts


def _encoded(image: Any) -> bytes:
    """An image as lmms-eval hands it over: a picture of Pillow, or the path of a file. Its pixels aren't changed."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError, TypeError) as e:
        raise BadSample(f"the image {str(image)[:100]!r} can't be read: {getattr(e, 'strerror', None) or e}") from None


def _until(answer: str, stops: Sequence[str] | str | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        answer = answer.split(stop, 1)[0] if stop else answer
    return answer


def _task_of(requests: Sequence[Instance]) -> str:
    return str(requests[0].task_name) if requests else "?"


@contextmanager
def _told(rank: int) -> Iterator[None]:
    """End the process by our sentence and exit code: lmms-eval would print a traceback and end with 0."""
    try:
        yield
    except (UserError, RunFailed) as e:
        # every rank: the launcher ends the others as soon as one has ended, perhaps before rank 0 came to say it
        print(f"{f'[rank {rank}] ' if rank else ''}error: {e}", file=sys.stderr, flush=True)
        raise SystemExit(e.exit_code) from None
