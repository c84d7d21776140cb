"""Costs follow from a measured rule, in whole numbers, and are close to what samples really have."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_tiny_llava, train_tiny_tokenizer
from tiny_run import write_lines

from vlmdist.data.costs import NUM_MEASURED, SampleCosts, apply_rule, measure_rule
from vlmdist.data.order import Cursor
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.data.stream import Mixture


def costs_of(corpus: Corpus, prompter: Prompter, patch_work: float = 0.0) -> SampleCosts:
    samples = Mixture([corpus], [1.0], seed=1).first_samples(Cursor(), NUM_MEASURED)
    return apply_rule(measure_rule([corpus], samples, prompter, patch_work), corpus, prompter)


def real_tokens(corpus: Corpus, prompter: Prompter) -> np.ndarray:
    return np.array([len(prompter.encode_training(corpus.read(i)).input_ids) for i in range(len(corpus))])


def test_text_tokens_are_planned_closely_and_seldom_too_few(tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "lines", 300, seed=4)
    prompter = Prompter(train_tiny_tokenizer(texts), None, "assistant", 512)
    corpus = Corpus.open(tmp_path / "lines")
    costs, real = costs_of(corpus, prompter), real_tokens(corpus, prompter)
    assert np.mean(real <= costs.tokens) >= 0.97
    assert np.corrcoef(real, costs.work)[0, 1] > 0.98
    assert costs.tokens.sum() < 1.25 * real.sum()
    assert costs.tokens.dtype == costs.work.dtype == np.int64


@pytest.mark.parametrize("processor_tells", [True, False])
def test_image_tokens_by_the_processor_or_measured(
    tmp_path: Path, jpeg: Callable[..., bytes], processor_tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor

    rng = random.Random(0)
    with ShardWriter(tmp_path / "images") as writer:
        for i in range(60):
            images = [jpeg(rng.randint(20, 60), rng.randint(20, 60)) for _ in range(i % 3)]
            content = [{"type": "image", "index": k} for k in range(len(images))]
            question = {"role": "user", "content": [*content, {"type": "text", "text": "what " * rng.randint(1, 9)}]}
            writer.write(f"s{i:03d}", [question, {"role": "assistant", "content": "a receipt"}], images)
    corpus = Corpus.open(tmp_path / "images")
    processor = AutoProcessor.from_pretrained(make_tiny_llava(tmp_path / "model", ["what", "a receipt"]))
    if not processor_tells:
        monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", None)
    prompter = Prompter(processor, None, "assistant", 512)
    costs, real = costs_of(corpus, prompter), real_tokens(corpus, prompter)
    assert (np.abs(costs.tokens - real) <= 2).all()
    # a patch of the tower as dear as a text token: 28 x 28 pixels are 4 patches of 14 x 14
    dear = costs_of(corpus, prompter, patch_work=1.0)
    assert (dear.work - costs.work == 4 * 1024 * corpus.num_images).all()


def test_samples_that_cannot_be_used_do_not_spoil_the_rule(tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "lines", 40, seed=4)
    corpus = Corpus.open(tmp_path / "lines")
    short = Prompter(train_tiny_tokenizer(texts), None, "assistant", 8)  # every sample is too long
    costs = costs_of(corpus, short)
    assert costs.tokens.min() >= 1
    assert costs.tokens.max() <= 8
