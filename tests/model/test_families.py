"""Each cell of the README's table of model families, on tiny random weights of the family's real classes.

The expected word, yes or no, is read from the table itself.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_sources import real_data
from ranks import run_vlmdist
from tiny_families import (
    IDEFICS3_TEMPLATE,
    IDEFICS3_TOKENS,
    INTERNVL_TEMPLATE,
    INTERNVL_TOKENS,
    QWEN_TEMPLATE,
    QWEN_VL_TEMPLATE,
    QWEN_VL_TOKENS,
    TINY,
    TinyFamily,
    conversation,
    idefics3_processor,
    internvl_processor,
    llava_processor,
    make_llava_onevision,
    make_paligemma,
    make_vipllava,
    picture,
    qwen2_5_vl_processor,
)
from tiny_run import tiny_run, write_run
from torch import nn
from torch.nn.functional import cross_entropy

from vlmdist.config import RunConfig
from vlmdist.data.collate import NOT_IN_LOSS, MicroBatch, pack, pad_right
from vlmdist.data.costs import told_by_processor
from vlmdist.data.prompt import Encoded, Prompter
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.data.templates import VICUNA
from vlmdist.errors import UserError
from vlmdist.evaluate.generate import generate_batch
from vlmdist.model.families import FAMILIES, Family
from vlmdist.model.load import load_for_evaluation, load_for_training, load_processor
from vlmdist.model.processors import adapted
from vlmdist.run_folder import read_jsonl
from vlmdist.sample import ImagePart, Message, Sample, TextPart
from vlmdist.train.loss import token_loss_sum
from vlmdist.train.packing import prove_packing

CPU = torch.device("cpu")
README = Path(__file__).resolve().parents[2] / "README.md"
COLUMNS = {
    # column of the table: the tests behind it
    "mask proven": (
        "test_what_is_in_the_loss_is_what_the_assistant_says",
        "test_no_token_is_seen_before_it_is_predicted",
        "test_loss_is_that_of_the_full_logits",
    ),
    "packing equal": ("test_packed_equals_padded",),
    "QLoRA skips vision": ("test_nf4_holds_the_language_model_alone",),
    "LoRA merge equal": ("test_merged_adapter_gives_the_same_logits",),
    "generation batched = single": ("test_a_batch_answers_as_each_question_alone",),
    "ZeRO-2 two ranks": ("test_two_ranks_equal_one", "test_two_ranks_equal_one_in_every_family"),
}
ALL_FULL = {"vision_tower": "full", "projector": "full", "language_model": "full", "head": "full"}
# one that reads text only, one like LLaVA, one whose inputs are unlike the others'; the rest are slow
ON_RANKS = ("Llama-3", "LLaVA-1.5", "Qwen2.5-VL")


def readme_table() -> dict[str, dict[str, str]]:
    """{family: {column: cell}} of the table under "Model families"."""
    lines = README.read_text(encoding="utf-8").split("## Model families")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def is_yes(family: str, column: str) -> bool:
    return readme_table()[family][column].startswith("yes")


@dataclass(frozen=True)
class Made:
    """A family's tiny model on disk."""

    name: str
    folder: Path
    tiny: TinyFamily

    def config(self, adapt: dict[str, Any] | None = None, **model: Any) -> RunConfig:
        return RunConfig.model_validate(
            {
                "output_dir": "unused",
                "model": {"name_or_path": str(self.folder), "precision": "fp32", **model},
                "adapt": self.parts(adapt or {}),
                "data": {"train": "unused"},
                "train": {"global_batch_size": 1},
            }
        )

    def parts(self, adapt: dict[str, Any]) -> dict[str, Any]:
        """``adapt`` without the parts that the family lacks."""
        lacking = {0: ("vision_tower", "projector")}.get(self.tiny.max_images, ())
        lacking = ("vision_tower",) if self.name == "Fuyu" else lacking
        return {part: how for part, how in adapt.items() if part not in lacking}

    def load(self, adapt: dict[str, Any] | None = None, **model: Any) -> tuple[Any, Family]:
        return load_for_training(self.config(adapt, **model), CPU)

    @cached_property
    def prompter(self) -> Prompter:
        return Prompter(load_processor(self.config().model), None, "assistant", 1024)

    @cached_property
    def rows(self) -> list[Encoded]:
        """Unlike lengths: text alone, an image before or between texts, several turns and images."""
        return [self.prompter.encode_training(sample) for sample in samples_for(self.tiny)]

    @property
    def padded(self) -> MicroBatch:
        return padded(self.rows, self.prompter.pad_token_id)


def samples_for(tiny: TinyFamily) -> list[Sample]:
    samples = [
        conversation("What is the total of milk, bread, tea and rice?", "14.10 RM"),
        conversation("Is it paid?", "Yes, in cash."),
        conversation("Sum?", "2", "And with the tax of 10 % that the shop in town takes?", "2.20 RM in all."),
    ]
    if tiny.max_images:
        samples[1:1] = [
            conversation((0, "Read it."), "A receipt."),
            conversation(("Name the shop that is shown here:", 1, "in one word."), "Bakery"),
        ]
    if tiny.max_images > 1:
        samples.append(conversation((2, 1, "Which is longer?"), "The second.", ("And than this one?", 0), "No."))
    return samples


@pytest.fixture(scope="module", params=list(TINY))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    tiny = TINY[request.param]
    return Made(request.param, tiny.make(tmp_path_factory.mktemp("family")), tiny)


def padded(rows: Sequence[Encoded], pad_token_id: int = 0) -> MicroBatch:
    return MicroBatch(*pad_right(rows, pad_token_id)).to(CPU)


def gradient_of(model: nn.Module) -> torch.Tensor:
    """All gradients in one row, which are then forgotten."""
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """By the norm of the difference, relative to the norm of what is expected."""
    assert float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)) <= tolerance


# -- mask proven -------------------------------------------------------------------------------------------------------


def test_what_is_in_the_loss_is_what_the_assistant_says(made: Made) -> None:
    assert_mask(made.prompter, samples_for(made.tiny))


def assert_mask(prompter: Prompter, samples: Sequence[Sample]) -> None:
    prompter.prove()
    for sample in samples:
        row = prompter.encode_training(sample)
        kept = [t for t, inside in zip(row.input_ids, row.in_loss, strict=True) if inside]
        said = "".join(m.text + prompter.end_of_turn for m in sample.messages if m.role == "assistant")
        found = prompter.tokenizer.decode(kept, skip_special_tokens=False)
        # whether the space before an answer belongs to its first token is the tokenizer's affair
        assert "".join(found.split()) == "".join(said.split())
        specials = set(prompter.tokenizer.convert_ids_to_tokens(kept)) & set(prompter.tokenizer.all_special_tokens)
        assert all(token in prompter.end_of_turn for token in specials)


@functools.cache
def real_tiktoken(file: str, digits: str) -> Any:
    """The vocabulary of a tiktoken file; ``digits`` is the part of the pattern in which Llama-3's and Qwen's differ.

    tokenizer.py of https://github.com/meta-llama/llama3, tokenization_qwen.py of https://huggingface.co/Qwen/Qwen-7B
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return TikTokenConverter(str(real_data("tokenizers") / file), pattern=pattern).converted()


def real_tokenizer(vocabulary: Any, template: str, special: Sequence[str], **roles: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, padding_side="left", **roles)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


def real_llama3_idefics3() -> Any:
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>", "pad_token": "<|end_of_text|>"}
    vocabulary = real_tiktoken("llama3/tokenizer.model", r"\p{N}{1,3}")
    return idefics3_processor(
        real_tokenizer(vocabulary, IDEFICS3_TEMPLATE, ["<|im_start|>", *IDEFICS3_TOKENS], **roles)
    )


def real_qwen(template: str, more: Sequence[str] = (), **roles: Any) -> Any:
    vocabulary = real_tiktoken("qwen/qwen.tiktoken", r"\p{N}")
    roles |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return real_tokenizer(vocabulary, template, ["<|im_start|>", *more], **roles)


def real_vicuna_llava() -> Any:
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(real_data("tokenizers") / "llama2_vicuna_llava15")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = VICUNA
    return llava_processor(tokenizer)


REAL_VOCABULARIES = {
    "Idefics3": real_llama3_idefics3,
    "InternVL": lambda: internvl_processor(real_qwen(INTERNVL_TEMPLATE, extra_special_tokens=INTERNVL_TOKENS)),
    "LLaVA-1.5": real_vicuna_llava,
    "Qwen2.5": lambda: real_qwen(QWEN_TEMPLATE),
    "Qwen2.5-VL": lambda: qwen2_5_vl_processor(real_qwen(QWEN_VL_TEMPLATE, QWEN_VL_TOKENS)),
}


@pytest.mark.parametrize("name", sorted(REAL_VOCABULARIES))
def test_mask_on_the_familys_real_vocabulary(name: str) -> None:
    prompter = Prompter(adapted(REAL_VOCABULARIES[name]()), None, "assistant", 1024)
    assert len(prompter.tokenizer) >= 32_000
    assert_mask(prompter, samples_for(TINY[name]))


def test_no_token_is_seen_before_it_is_predicted(made: Made) -> None:
    """Another answer leaves the logits of all positions before it as they are."""
    model, _ = made.load()
    for row in made.rows:
        places = [i for i, inside in enumerate(row.in_loss) if inside]
        assert_not_seen_before(model, made.prompter, row, places[0])
        assert_not_seen_before(model, made.prompter, row, places[-1])


def assert_not_seen_before(model: Any, prompter: Prompter, row: Encoded, place: int) -> None:
    changed = list(row.input_ids)
    changed[place] = prompter.tokenizer.encode("k", add_special_tokens=False)[0]
    assert changed != row.input_ids
    model.eval()
    with torch.no_grad():
        as_said, as_changed = (
            model(**padded([r]).inputs, use_cache=False).logits[0] for r in (row, replace(row, input_ids=changed))
        )
    assert torch.equal(as_said[:place], as_changed[:place])
    assert not torch.allclose(as_said[place:], as_changed[place:], atol=1e-3)


def test_a_question_in_the_loss_is_not_seen_before_either(tmp_path: Path) -> None:
    """PaliGemma sees its question both ways, but where the question is trained on too."""
    made = Made("PaliGemma", TINY["PaliGemma"].make(tmp_path), TINY["PaliGemma"])
    model, _ = made.load()
    sample = conversation((0, "Read it."), "A receipt.")
    usual = made.prompter.encode_training(sample)
    place = usual.in_loss.index(True) - 3
    with pytest.raises(AssertionError):
        assert_not_seen_before(model, made.prompter, usual, place)
    prompter = Prompter(made.prompter.processor, None, "everything", 1024)
    assert_not_seen_before(model, prompter, prompter.encode_training(sample), place)


def test_loss_is_that_of_the_full_logits(made: Made) -> None:
    """The head deferred and in chunks, tied or not, against a plain forward; loss and gradient."""
    model, _ = made.load(ALL_FULL)
    batch = made.padded
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    expected = cross_entropy(
        logits.flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=NOT_IN_LOSS, reduction="sum"
    )
    expected.backward()
    expected_gradient = gradient_of(model)
    found = token_loss_sum(model, batch, logits_at_once=3 * logits.shape[-1])  # three tokens at a time
    found.backward()
    # fp32: sums of some hundred terms in another order
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_close(gradient_of(model), expected_gradient, 1e-5)


def test_loss_where_the_model_caps_its_logits(tmp_path: Path) -> None:
    """PaliGemma 2 bends its logits behind the head, so the head can't be deferred."""
    folder = make_paligemma(tmp_path, text_kind="gemma2", final_logit_softcapping=0.5)
    test_loss_is_that_of_the_full_logits(Made("PaliGemma", folder, TINY["PaliGemma"]))


# -- image tokens ------------------------------------------------------------------------------------------------------


def test_image_tokens_are_told_by_the_size(made: Made) -> None:
    """What micro-batches are planned by, against the tokens that the image really takes."""
    if not made.tiny.max_images:
        pytest.skip("takes text only")
    messages = (Message("user", (ImagePart(0), TextPart("Read it."))), Message("assistant", (TextPart("No."),)))
    lengths, told = [], []
    for width, height in [(60, 44), (30, 90), (20, 20), (200, 31)]:
        sample = Sample(0, "sample", messages, (picture(0, width, height),))
        lengths.append(len(made.prompter.encode_training(sample).input_ids))
        told.append(told_by_processor(made.prompter.processor, [(width, height)]))
    tokens = [t[0] for t in told if t is not None]
    if not tokens:  # then a mean is measured, which serves where all images take as many
        tokens = [0] * len(lengths)
    assert [n - lengths[0] for n in lengths] == [n - tokens[0] for n in tokens]


# -- packing -----------------------------------------------------------------------------------------------------------


def test_packed_equals_padded(made: Made) -> None:
    model, _ = made.load(ALL_FULL)
    if not is_yes(made.name, "packing equal"):
        with pytest.raises(UserError, match=r"train\.packing"):
            prove_packing(model, made.prompter)
        return
    prove_packing(model, made.prompter)
    packed = MicroBatch(*pack(made.rows), packed_lengths=tuple(len(r.input_ids) for r in made.rows)).to(CPU)
    assert packed.num_loss_tokens == made.padded.num_loss_tokens
    losses, gradients = [], []
    for batch in (packed, made.padded):
        loss = token_loss_sum(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(gradient_of(model))
    # fp32: the kernels see other shapes, so they add in another order
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close(gradients[0], gradients[1], 1e-5)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_nf4_holds_the_language_model_alone(made: Made) -> None:
    model, family = made.load({"projector": "full"}, quantization="nf4", precision="auto")
    held = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            held[name.removeprefix("base_model.model.").removesuffix(".base_layer")] = type(module).__name__
    packed = {n for n, kind in held.items() if kind == "Linear4bit"}
    assert packed == {n for n in held if family.part_of(n) == "language_model"}
    assert len(packed) >= 2 * 4  # of each of the two layers: attention and feed-forward
    assert {family.part_of(n) for n in held.keys() - packed} >= {"head"}
    token_loss_sum(model, made.padded).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert any("lora_B" in n for n, _ in trained)
    assert [n for n, p in trained if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_merged_adapter_gives_the_same_logits(made: Made) -> None:
    adapt = {"vision_tower": "lora", "language_model": "lora"}
    model, _ = made.load(adapt)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    model.eval()
    inputs = made.padded.inputs
    with torch.no_grad():
        adapted = model(**inputs, use_cache=False).logits
        with model.disable_adapter():
            base = model(**inputs, use_cache=False).logits
        merged = model.merge_and_unload()(**inputs, use_cache=False).logits
    seen = inputs["attention_mask"].bool()
    # logits are of the order of 1; fp32 rounds W x + B A x and (W + B A) x differently, some 1e-6 a layer
    torch.testing.assert_close(merged[seen], adapted[seen], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base[seen], adapted[seen], atol=1e-2)


# -- generation --------------------------------------------------------------------------------------------------------


class TokensOf(Prompter):
    """A prompter whose answers are token numbers up to the stop token: no text can hide a difference."""

    def __init__(self, prompter: Prompter):
        self.__dict__ = prompter.__dict__

    def decode_answer(self, token_ids: Sequence[int]) -> Any:
        return tuple(itertools.takewhile(lambda token: token not in self.stop_token_ids, token_ids))


def test_a_batch_answers_as_each_question_alone(made: Made) -> None:
    model, _ = load_for_evaluation(made.config(), CPU)
    prompter = TokensOf(made.prompter)
    questions = [prompter.encode_question(sample) for sample in samples_for(made.tiny)]
    assert len({len(q.input_ids) for q in questions}) >= 3
    together = generate_batch(model, prompter, questions, max_new_tokens=12)
    alone = [generate_batch(model, prompter, [q], max_new_tokens=12)[0] for q in questions]
    assert together == alone
    assert len({token for answer in alone for token in answer}) > len(questions)
    # the first token against a forward without a cache: the prompt is laid out as in training
    for question, answer in zip(questions, alone, strict=True):
        with torch.no_grad():
            logits = model(**padded([question]).inputs, use_cache=False).logits[0, -1]
        assert answer[:1] == prompter.decode_answer([int(logits.argmax())])


# -- ranks -------------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, max_images: int) -> None:
    """Sixteen samples, every third without an image, so that some micro-batches are text alone."""
    with ShardWriter(folder, max_samples_per_shard=8) as writer:
        for i in range(16):
            images = [picture(i, 40 + i, 70 - 2 * i)] if max_images and i % 3 else []
            shown = [{"type": "image", "index": 0}] if images else []
            question = {"type": "text", "text": "What is the total? " * (1 + i % 4)}
            messages = [
                {"role": "user", "content": [*shown, question]},
                {"role": "assistant", "content": f"{i}.10 RM"},
            ]
            writer.write(f"sample-{i:02d}", messages, images)


def assert_two_ranks_equal_one(made: Made, folder: Path) -> None:
    write_corpus(folder / "train", made.tiny.max_images)
    losses = []
    for ranks in (1, 2):
        tree = tiny_run(folder, folder / f"run-{ranks}")
        tree["model"]["name_or_path"] = str(made.folder)
        tree["adapt"] |= made.parts({"projector": "full"})
        tree["data"] = {"train": str(folder / "train"), "num_workers": 0}
        tree["train"] |= {"max_steps": 2}
        run_vlmdist(ranks, "train", write_run(tree, folder / f"run-{ranks}.yaml"))
        rows = read_jsonl(folder / f"run-{ranks}" / "metrics.jsonl")
        assert not (folder / f"run-{ranks}" / "bad_samples.jsonl").read_text()
        losses.append([(row["loss"], row["grad_norm"]) for row in rows if "loss" in row])
    assert len(losses[0]) == len(losses[1]) == 2
    for (loss, norm), (loss_of_two, norm_of_two) in zip(*losses, strict=True):
        # fp32: other micro-batches, so other sums; one optimizer step lies between the two rows
        assert loss_of_two == pytest.approx(loss, rel=1e-5)
        assert norm_of_two == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_equal_one(name: str, tmp_path: Path) -> None:
    assert_two_ranks_equal_one(Made(name, TINY[name].make(tmp_path / "model"), TINY[name]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if name not in ON_RANKS])
def test_two_ranks_equal_one_in_every_family(name: str, tmp_path: Path) -> None:
    assert_two_ranks_equal_one(Made(name, TINY[name].make(tmp_path / "model"), TINY[name]), tmp_path)


# -- without a row of its own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "make"), [("llava_onevision", make_llava_onevision), ("vipllava", make_vipllava)])
def test_a_family_that_is_not_listed_works_by_the_usual_names(kind: str, make: Any, tmp_path: Path) -> None:
    assert kind not in FAMILIES
    unlisted = Made(kind, make(tmp_path), TinyFamily(make, 2))
    for test in (
        test_what_is_in_the_loss_is_what_the_assistant_says,
        test_no_token_is_seen_before_it_is_predicted,
        test_loss_is_that_of_the_full_logits,
        test_image_tokens_are_told_by_the_size,
        test_nf4_holds_the_language_model_alone,
        test_merged_adapter_gives_the_same_logits,
        test_a_batch_answers_as_each_question_alone,
    ):
        test(unlisted)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_readme_table_is_what_is_tested() -> None:
    table = readme_table()
    assert list(table) == list(TINY)
    for name, cells in table.items():
        assert list(cells) == list(COLUMNS), name
        # only packing may be refused: the run says so itself; every other cell has to hold
        assert {cell for column, cell in cells.items() if column != "packing equal"} == {"yes"}, name
    assert all(test in globals() for tests in COLUMNS.values() for test in tests)
