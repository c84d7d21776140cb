"""Two runs that were really trained: receipt lines in QLoRA for a few steps, and pictures on a tiny LLaVA in full until
it answers with JSON."""

import pytest
from tiny_families import make_llava, picture
from tiny_run import make_tiny_world, tiny_run, write_run
from trained import INSTRUCTION, Trained, train

from vlmdist.data.shards.writer import ShardWriter


@pytest.fixture(scope="session")
def lines_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    world = make_tiny_world(tmp_path_factory.mktemp("lines-run"), num_test=5)
    tree = tiny_run(
        world,
        world / "run",
        model={"quantization": "nf4"},
        prompt={"template": "receipt-lines"},
        train={"max_steps": 8, "learning_rate": 0.03, "save_steps": 4, "metric_for_best_model": "validation_loss"},
        evaluate={"per_device_eval_batch_size": 1},
    )
    return train(world, write_run(tree, world / "run.yaml"))


@pytest.fixture(scope="session")
def pictures_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All samples ask the same, the picture behind the text, under one system message. Answers hold HTML."""
    world = tmp_path_factory.mktemp("pictures-run")
    for name, numbers in (("train", range(16)), ("test", range(16, 20))):
        with ShardWriter(world / name) as writer:
            for i in numbers:
                answer = f'{{"<b>": "{"abc"[i % 3]}"}}'
                asked = [{"type": "text", "text": INSTRUCTION}, {"type": "image", "index": 0}]
                said = [
                    {"role": "system", "content": "Be short."},
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answer},
                ]
                writer.write(f"picture-{i}", said, [picture(i, 50, 40)], answer=answer)
    make_llava(world / "model")
    tree = tiny_run(
        world,
        world / "run",
        adapt={"projector": "full", "language_model": "full", "head": "full"},
        data={"validation": None},
        train={"max_steps": 50, "learning_rate": 0.005, "num_train_epochs": 30},
        evaluate={"metric": "fuzzy", "max_new_tokens": 16, "per_device_eval_batch_size": 1},
    )
    return train(world, write_run(tree, world / "run.yaml"))
