"""One rank's work: from the sample numbers of a batch to its rows, failures included."""

from collections.abc import Sequence
from typing import Any

from vlmdist.errors import BadSample
from vlmdist.evaluate.engine import Engine
from vlmdist.evaluate.few_shot import Shown
from vlmdist.evaluate.figures import cluster_of
from vlmdist.evaluate.metrics import UnreadableTruth
from vlmdist.evaluate.readable import Readable
from vlmdist.evaluate.scores import Row, metric_by_name

LESS_MEMORY = "Lower evaluate.per_device_eval_batch_size or evaluate.max_new_tokens"


def check_truths(corpus: Readable, samples: Sequence[int], metric: str) -> list[str]:
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
    """Turns batches of samples into rows. shown: what stands before each question."""

    def __init__(self, corpus: Readable, engine: Engine, shown: Shown | None = None):
        self.corpus, self.engine, self.shown = corpus, engine, shown or Shown()

    def answer(self, samples: Sequence[int]) -> list[Row]:
        """Rows of {number, id, cluster, truth, prediction} in the order of ``samples``; where one failed, "error"."""
        rows = [self._blank_row(i) for i in samples]
        questions: list[tuple[Row, Any]] = []
        for row in rows:
            try:
                sample = self.corpus.read(row["number"])
                row["truth"] = sample.truth
                row["cluster"] = cluster_of(sample)
                questions.append((row, self.engine.encode(self.shown.before(sample))))
            except (BadSample, ValueError) as e:  # ValueError: the processor refuses the text or image
                row["error"] = str(e)[:300]
        for row, answer in zip([r for r, _ in questions], self._generate([q for _, q in questions]), strict=True):
            row.update(answer)
        return rows

    def _generate(self, questions: Sequence[Any]) -> list[dict[str, str]]:
        if not questions:
            return []
        try:
            return [{"prediction": a} for a in self.engine.generate(questions)]
        except (ValueError, IndexError) as e:
            # the model refuses an input (say, image tokens that don't match the image): find the sample it is
            if len(questions) == 1:
                return [{"error": f"the model refuses the sample: {str(e)[:300]}"}]
            return [answer for q in questions for answer in self._generate([q])]

    def _blank_row(self, number: int) -> Row:
        return {"number": number, "id": self.corpus.key(number), "truth": None, "prediction": ""}
