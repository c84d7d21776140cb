"""The Python that a model card tells its readers to run: plain transformers and peft."""

import json

from vlmdist.export.markdown import escaped, fenced
from vlmdist.export.source import Source
from vlmdist.model.families import PARTS


def usage(source: Source, merged: bool, doubt: str | None) -> str:
    """Loading and asking, in Python; every exported folder of the tests is asked by it.

    doubt: why the prompt isn't shown to be the run's.
    """
    sees, config = source.family.sees, source.config.model
    auto_model = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    auto_processor = "AutoProcessor" if sees else "AutoTokenizer"
    trusts = source.base_is_own_code or config.trust_remote_code
    trust = ", trust_remote_code=True" if trusts else ""
    imports = [auto_model, auto_processor, "GenerationConfig"]
    load = [f'model = {auto_model}.from_pretrained(folder, dtype="auto"{trust})']
    extra = []
    if not merged:
        quantised = config.quantization != "none"
        extra = ["import torch", "from peft import PeftModel"]
        revision = "" if config.revision is None else f", revision={json.dumps(config.revision)}"
        held = f", quantization_config={_quantisation(source)}" if quantised else ""
        load = [
            f"base = {auto_model}.from_pretrained(",
            f"    {json.dumps(source.base)}{revision}, dtype={source.dtype}{held}{trust}",
            ")",
        ]
        load += ["model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)"]
        imports += ["BitsAndBytesConfig"] if quantised else []
    content = '[{"type": "image", "image": image}, {"type": "text", "text": question}]' if sees else "question"
    code = [
        *extra,
        f"from transformers import {', '.join(sorted(imports))}",
        "",
        'folder = "."  # this folder, or its name on the hub',
        f"processor = {auto_processor}.from_pretrained(folder{trust})",
        *load,
        f'messages = [{{"role": "user", "content": {content}}}]',
        "inputs = processor.apply_chat_template(",
        '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        ").to(model.device" + (", model.dtype)" if sees else ")"),
        "answer = model.generate(**inputs, generation_config=GenerationConfig.from_pretrained(folder))",
        'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    longest = source.config.evaluate.max_new_tokens
    note = f"Answers are greedy and end after {longest} tokens at the latest (generation_config.json)."
    if source.base_is_own_code:
        note += " The model's class comes with this folder as a Python file, hence trust_remote_code=True."
    if doubt is not None:
        note += f" **The prompt is not shown to be that of training:** {escaped(doubt)}"
    return fenced("python", "\n".join(code)) + f"\n\n{note}"


def _quantisation(source: Source) -> str:
    if source.config.model.quantization == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    skipped = [
        prefix
        for part in PARTS
        if part not in source.config.model.quantized_parts
        for prefix in getattr(source.family, part)
    ]
    return (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        f"bnb_4bit_compute_dtype={source.dtype}, llm_int8_skip_modules={json.dumps(skipped)})"
    )
