import pytest
import torch
from tiny_families import make_llava, picture
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from vlmdist.config import ModelConfig
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample
from vlmdist.evaluate.generate import generate_batch
from vlmdist.model.load import load_processor
from vlmdist.sample import ImagePart, Message, Sample, TextPart

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


def test_images_go_through_the_vision_tower_once(tmp_path):
    """With the question, not again for every token; and the whole batch in one call."""
    make_llava(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path), precision="fp32")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompter = Prompter(load_processor(config), None, "assistant", 512)
    shown = Message("user", (ImagePart(0), TextPart("what is it?")))
    samples = [Sample(i, str(i), (shown,), (picture(i, 40, 50),)) for i in range(3)]
    calls = []
    model.model.vision_tower.register_forward_hook(lambda _, inputs, out: calls.append(out))
    generate_batch(model, prompter, [prompter.encode_question(s) for s in samples], MAX_NEW_TOKENS)
    assert len(calls) == 1
    assert calls[0].last_hidden_state.shape[0] == 3
