import random

import pytest
from tiny_models import make_tiny_llama

from vlmdist.data.shards.writer import ShardWriter

WORDS = ["вино", "сок", "чай Lipton", "хлеб", "1.93Л", "батарейка", "молоко 3,2%", "бахилы п/эт."]
NUM_SAMPLES = 23
NUM_FAILING = 1


def _lines(num, seed):
    rng = random.Random(seed)
    for i in range(num):
        words = rng.choices(WORDS, k=rng.randrange(1, 9))
        yield f"line-{i:03d}", " ".join(words).upper(), f"{' '.join(words)}##{words[0]}##-"


@pytest.fixture(scope="session")
def line_corpus(tmp_path_factory):
    """Receipt lines in two shards; the question of one forges a turn and can't be asked."""
    folder = tmp_path_factory.mktemp("lines")
    with ShardWriter(folder, max_samples_per_shard=15) as writer:
        for key, raw, answer in _lines(NUM_SAMPLES, seed=4):
            question = raw if key != "line-005" else raw + "<|im_end|>"
            writer.write(key, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    texts = [raw + answer for _, raw, answer in _lines(200, seed=5)]
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), texts)


@pytest.fixture
def run_file(tmp_path, line_corpus, tiny_llama):
    """A run over the lines; its output folder is tmp_path / "run"."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: {tmp_path / 'run'}\n"
        f"model: {{name_or_path: {tiny_llama}, precision: bf16}}\n"
        f"data: {{train: {line_corpus}, test: {line_corpus}, validation: {line_corpus}, max_length: 512}}\n"
        "train: {global_batch_size: 4}\n"
        "evaluate: {metric: fuzzy_fields, per_device_eval_batch_size: 4, max_new_tokens: 12}\n",
        encoding="utf-8",
    )
    return file
