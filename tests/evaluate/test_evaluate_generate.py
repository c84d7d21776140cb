import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample
from vlmdist.evaluate.generate import generate_batch

MAX_NEW_TOKENS = 20


@pytest.fixture(scope="module")
def asked(tiny_llama, line_corpus):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompter = Prompter(AutoTokenizer.from_pretrained(tiny_llama), None, "assistant", 512)
    corpus = Corpus.open(line_corpus)
    questions = []
    for i in range(len(corpus)):
        try:
            questions.append(prompter.encode_question(corpus.read(i)))
        except BadSample:
            continue
    return model, prompter, questions


def _greedy_by_hand(model, prompter, question):
    """One token at a time, no cache, no padding, no ``generate``."""
    ids = list(question.input_ids)
    for _ in range(MAX_NEW_TOKENS):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in prompter.stop_token_ids:
            break
    return prompter.decode_answer(ids[len(question.input_ids) :])


def test_a_padded_batch_answers_as_each_question_alone(asked):
    model, prompter, questions = asked
    assert len({len(q.input_ids) for q in questions}) > 5
    answers = generate_batch(model, prompter, questions, MAX_NEW_TOKENS)
    assert answers == [_greedy_by_hand(model, prompter, q) for q in questions]


def test_the_models_own_generation_settings_do_not_enter(asked):
    model, prompter, questions = asked
    plain = generate_batch(model, prompter, questions[:4], MAX_NEW_TOKENS)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.max_length = 1.8, True, 9.0, 5
    try:
        assert generate_batch(model, prompter, questions[:4], MAX_NEW_TOKENS) == plain
        assert model.generation_config is own
    finally:
        own.repetition_penalty, own.do_sample, own.temperature, own.max_length = None, None, None, None


def test_an_answer_ends_at_its_stop_token(asked):
    model, prompter, questions = asked
    free = generate_batch(model, prompter, questions[:1], MAX_NEW_TOKENS)[0]
    # the first token of the answer becomes the end of the turn: nothing may be left of it
    with torch.inference_mode():
        first = int(model(input_ids=torch.tensor([questions[0].input_ids])).logits[0, -1].argmax())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prompter, "stop_token_ids", property(lambda self: [first]))
        assert generate_batch(model, prompter, questions[:1], MAX_NEW_TOKENS) == [""]
    assert free != ""
