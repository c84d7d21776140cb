"""Worked examples: which are taken, what the model then reads, and that none of them is asked about."""

import json

import pytest
from ranks import run_vlmdist
from tiny_families import make_llava, picture
from tiny_models import make_tiny_llama
from transformers import AutoTokenizer

from vlmdist.config import load_run
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.data.templates import RECEIPT_LINES_FEW_SHOT
from vlmdist.errors import UserError
from vlmdist.evaluate.few_shot import choose_examples, clusters_of, show
from vlmdist.evaluate.figures import cluster_of
from vlmdist.evaluate.metrics import METRICS
from vlmdist.evaluate.run import evaluate_run
from vlmdist.evaluate.scores import read_predictions
from vlmdist.model.load import load_processor

TASK = "Expand abbreviations for products (receipt items), additionally highlight the product, brand and category: "
INSTRUCTION = "Imagine that you are a professional receipt data analyst."


def _write(folder, lines):
    with ShardWriter(folder) as writer:
        for i, (raw, answer) in enumerate(lines):
            turns = [{"role": "user", "content": TASK + raw}, {"role": "assistant", "content": answer}]
            writer.write(f"{folder.name}-{i}", turns)
    return folder


@pytest.fixture
def lines(tmp_path):
    """(train, test): B, D, E, F are in the training split alone; D is there twice, the truth of F is unreadable."""
    words = "ABCDEF"
    answers = {w: f"{w.lower()}##{w.lower()}##-" for w in words} | {"F": "no fields"}
    train = _write(tmp_path / "train", [(w, answers[w]) for w in "ABCDDEF"])
    return train, _write(tmp_path / "test", [(w, answers[w]) for w in "ACA"])


def test_examples_are_never_of_the_test_split_nor_twice_the_same(lines):
    train, test = map(Corpus.open, lines)
    used = clusters_of(test, len(test))
    assert len(used) == 2
    for seed in range(20):
        chosen, keys = choose_examples(train, 3, seed, METRICS["fuzzy_fields"], used)
        texts = {train.read(i).messages[0].text.removeprefix(TASK) for i in chosen}
        assert texts == {"B", "D", "E"}
        assert keys == [train.key(i) for i in chosen]
        assert not {cluster_of(train.read(i)) for i in chosen} & used
    orders = {tuple(choose_examples(train, 2, seed, METRICS["fuzzy_fields"], used)[0]) for seed in range(20)}
    assert len(orders) > 1, "the seed has no say"
    with pytest.raises(UserError, match=r"--few-shot 4: .* has only 3 samples"):
        choose_examples(train, 4, 0, METRICS["fuzzy_fields"], used)


def test_the_published_prompt(lines, tmp_path):
    """Instruction, two worked examples, task and line, «Normalized product:», as one text."""
    train, test = map(Corpus.open, lines)
    model = make_tiny_llama(tmp_path / "model", [INSTRUCTION + TASK])
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompter = Prompter(tokenizer, RECEIPT_LINES_FEW_SHOT, "assistant", 512)
    shown = show([train.read(1), train.read(3)], INSTRUCTION)
    asked = shown.before(test.read(0))
    assert asked.truth == test.read(0).truth
    text = tokenizer.decode(prompter.encode_question(asked).input_ids)
    assert text == (
        f"{tokenizer.bos_token}{INSTRUCTION}\n"
        f"{TASK}B\nNormalized product: b##b##-\n"
        f"{TASK}D\nNormalized product: d##d##-\n"
        f"{TASK}A\nNormalized product:"
    )
    assert prompter.stop_token_ids == [tokenizer.eos_token_id]


def test_images_of_examples_stand_before_the_questions_own(tmp_path):
    with ShardWriter(tmp_path / "train") as writer:
        for i in range(3):
            turns = [
                {"role": "system", "content": "dropped"},
                {"role": "user", "content": [{"type": "text", "text": f"q{i}"}, {"type": "image", "index": 0}]},
                {"role": "assistant", "content": f"a{i}"},
            ]
            writer.write(f"s{i}", turns, [picture(i, 40, 40)])
    corpus = Corpus.open(tmp_path / "train")
    samples = [corpus.read(i) for i in range(3)]
    asked = show(samples[:2], "told").before(samples[2])
    assert asked.images == tuple(s.images[0] for s in samples)
    assert [m.role for m in asked.messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert asked.messages[0].text == "told\ndropped"
    assert [p.index for m in asked.messages for p in m.content if hasattr(p, "index")] == [0, 1, 2]
    # each image goes into the prompt as its tokens
    make_llava(tmp_path / "model")
    config = _config(tmp_path)
    prompter = Prompter.for_run(load_processor(config.model), config, evaluation=True)
    one = prompter.encode_question(samples[2])
    three = prompter.encode_question(asked)
    assert three.features["pixel_values"].shape[0] == 3 * one.features["pixel_values"].shape[0]


def _config(folder):
    file = folder / "run.yaml"
    file.write_text(
        f"output_dir: {folder / 'run'}\n"
        f"model: {{name_or_path: {folder / 'model'}, precision: fp32}}\n"
        f"data: {{train: {folder / 'train'}, test: {folder / 'test'}, max_length: 1024}}\n"
        "train: {global_batch_size: 4}\n"
        "evaluate:\n"
        "  metric: fuzzy_fields\n"
        "  max_new_tokens: 8\n"
        f"  instruction: {INSTRUCTION}\n"
        "  few_shot_template: receipt-lines-few-shot\n"
    )
    return load_run(file)


def test_evaluated_with_examples_on_one_and_two_ranks(lines, tmp_path, capsys):
    make_tiny_llama(tmp_path / "model", [INSTRUCTION + TASK])
    config = _config(tmp_path)
    with pytest.raises(UserError, match="has only 3 samples"):
        evaluate_run(config, base=True, few_shot=5)
    scores = evaluate_run(config, base=True, few_shot=2)
    assert scores["folder"].endswith("eval/base-2shot")
    assert "worked examples from" in capsys.readouterr().err
    run_vlmdist(2, "evaluate", tmp_path / "run.yaml", "--base", "--few-shot", "2", "--name", "two")
    for name in ("predictions.jsonl", "scores.json"):
        folder = tmp_path / "run" / "eval"
        assert (folder / "two" / name).read_bytes() == (folder / "base-2shot" / name).read_bytes()
    told = json.loads((tmp_path / "run/eval/two/evaluation.json").read_text())["shown"]
    assert len(told["examples"]) == 2
    zero = evaluate_run(config, base=True)
    assert zero["folder"].endswith("eval/base")
    rows, with_examples = (read_predictions(s["folder"]) for s in (zero, scores))
    assert [r["truth"] for r in rows] == [r["truth"] for r in with_examples]
    assert [r["prediction"] for r in rows] != [r["prediction"] for r in with_examples]
