"""One rank's work: from the sample numbers of a batch to its rows, failures included."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdist.config import RunConfig
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample
from vlmdist.evaluate.figures import cluster_of
from vlmdist.evaluate.metrics import UnreadableTruth
from vlmdist.evaluate.scores import Row, metric_by_name

if TYPE_CHECKING:
    import torch

    from vlmdist.data.prompt import Encoded


def check_truths(corpus: Corpus, samples: Sequence[int], metric: str) -> list[str]:
    """What the metric can't compare with, a sentence a sample. Samples that can't be read are no matter here."""
    function = metric_by_name(metric)
    problems = []
    for i in samples:
        try:
            function(corpus.read(i).truth, "")
        except BadSample:
            continue
        except UnreadableTruth as e:
            problems.append(
                f"sample {corpus.key(i)} in {corpus.shard_name(i)}: {e}; mend it or choose another evaluate.metric "
                f"than {metric}"
            )
    return problems


class Answerer:
    """The model with its prompts, loaded once; ``answer`` turns one batch into rows."""

    def __init__(self, config: RunConfig, checkpoint: Path | None, corpus: Corpus, device: "torch.device"):
        from vlmdist.data.prompt import Prompter
        from vlmdist.model.load import load_for_evaluation

        self.corpus = corpus
        self.max_new_tokens = config.evaluate.max_new_tokens
        self.model, processor = load_for_evaluation(config, checkpoint, device)
        self.prompter = Prompter.for_run(processor, config, evaluation=True)

    def answer(self, samples: Sequence[int]) -> list[Row]:
        """Rows of {number, id, truth, prediction} in the order of ``samples``; "error" too where a sample failed."""
        rows = [self._blank_row(i) for i in samples]
        questions: list[tuple[Row, Encoded]] = []
        for row in rows:
            try:
                sample = self.corpus.read(row["number"])
                row["truth"] = sample.truth
                row["cluster"] = cluster_of(sample)
                questions.append((row, self.prompter.encode_question(sample)))
            except (BadSample, ValueError) as e:  # ValueError: the processor refuses the text or image
                row["error"] = str(e)[:300]
        for row, answer in zip([r for r, _ in questions], self._generate([q for _, q in questions]), strict=True):
            row.update(answer)
        return rows

    def _generate(self, questions: "list[Encoded]") -> list[dict[str, str]]:
        from vlmdist.evaluate.generate import generate_batch

        if not questions:
            return []
        try:
            answers = generate_batch(self.model, self.prompter, questions, self.max_new_tokens)
            return [{"prediction": a} for a in answers]
        except (ValueError, IndexError) as e:
            # the model refuses an input (say, image tokens that don't match the image): find the sample it is
            if len(questions) == 1:
                return [{"error": f"the model refuses the sample: {str(e)[:300]}"}]
            return [answer for q in questions for answer in self._generate([q])]

    def _blank_row(self, number: int) -> Row:
        return {"number": number, "id": self.corpus.key(number), "truth": None, "prediction": ""}
