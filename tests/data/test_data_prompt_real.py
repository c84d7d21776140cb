"""The recipes' templates on the real vocabularies of Llama-3 and of Llama-2/Vicuna."""

from typing import Any

import pytest
from corpus_sources import real_data

from vlmdist.data.prompt import Prompter
from vlmdist.data.templates import TEMPLATES

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# tokenizer.py of https://github.com/meta-llama/llama3: the pattern that splits text before byte pairs are merged
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3() -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    specials = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>"]
    specials += [reserved[4], "<|eot_id|>", *reserved[5:]]
    file = str(real_data("tokenizers") / "llama3" / "tokenizer.model")
    fast = TikTokenConverter(vocab_file=file, pattern=LLAMA3_PATTERN, extra_special_tokens=specials).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<|begin_of_text|>",  # noqa: S106 - tokens of a vocabulary, no passwords
        eos_token="<|end_of_text|>",  # noqa: S106
    )


def vicuna() -> Any:
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(real_data("tokenizers") / "llama2_vicuna_llava15")


@pytest.mark.parametrize(("make", "size"), [(llama3, 128_256 - 1), (vicuna, 32_000)])
def test_recipe_templates_are_proven_on_real_vocabularies(make: Any, size: int) -> None:
    tokenizer = make()
    assert len(tokenizer) >= size
    for template in TEMPLATES.values():
        Prompter(tokenizer, template, "assistant", 512).prove()


def test_llama3s_own_template_which_trims_turns_is_proven() -> None:
    prompter = Prompter(llama3(), LLAMA3_TEMPLATE, "assistant", 512)
    prompter.prove()
    assert prompter.end_of_turn == "<|eot_id|>"
