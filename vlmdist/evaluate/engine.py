"""What answers: an engine turns samples into questions for its model, and a batch of questions into texts.

transformers   generate() of the model that was trained, in this process; the scores that the contracts speak of
vllm           vLLM, where it is installed: the same prompts and the same reading of the answers, faster on GPUs
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vlmdist.config import RunConfig
from vlmdist.evaluate.metrics import ANSWERED
from vlmdist.evaluate.subject import Subject
from vlmdist.sample import Sample

if TYPE_CHECKING:
    import torch

    from vlmdist.data.prompt import Encoded, Prompter


class Engine(Protocol):
    """What generates: transformers, or vLLM."""

    def encode(self, sample: Sample) -> Any:
        """The question as ``generate`` takes it. BadSample or ValueError where the sample can't be asked."""

    def generate(self, questions: Sequence[Any]) -> list[str]:
        """The answer to each. ValueError or IndexError where the model refuses one of them."""


class TransformersEngine:
    """Greedy answers of a loaded model, B questions together."""

    def __init__(self, model: Any, prompter: "Prompter", config: RunConfig):
        self.model, self.prompter = model, prompter
        self._settings = config.evaluate
        self._is_answered = ANSWERED.get(config.evaluate.metric) if config.evaluate.stop_when_answered else None

    @classmethod
    def of_model(cls, config: RunConfig, model: Any, processor: Any, *, few_shot: bool = False) -> "TransformersEngine":
        """With the run file's prompt. few_shot: worked examples come before each question."""
        from vlmdist.data.prompt import Prompter

        return cls(model, Prompter.for_run(processor, config, evaluation=True, few_shot=few_shot), config)

    def encode(self, sample: Sample) -> "Encoded":
        return self.prompter.encode_question(sample)

    def generate(self, questions: "Sequence[Encoded]") -> list[str]:
        """One batch, padded on the left to the longest question. Raises what transformers raises."""
        from vlmdist.evaluate.generate import generate_batch

        return generate_batch(
            self.model,
            self.prompter,
            questions,
            self._settings.max_new_tokens,
            is_answered=self._is_answered,
            cache=self._settings.cache,
        )


def open_engine(config: RunConfig, subject: Subject, device: "torch.device", *, few_shot: bool = False) -> Engine:
    """Load what is evaluated onto a device. few_shot: worked examples come before each question."""
    if config.evaluate.engine == "vllm":
        from vlmdist.evaluate.vllm_engine import VllmEngine

        return VllmEngine.open(config, subject, device, few_shot=few_shot)
    from vlmdist.model.load import load_for_evaluation

    model, processor = load_for_evaluation(
        config, device, checkpoint=subject.checkpoint, adapter=subject.adapter, merged=config.evaluate.merged
    )
    return TransformersEngine.of_model(config, model, processor, few_shot=few_shot)
