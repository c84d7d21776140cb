#!/usr/bin/env python3
"""Published weights that transformers can't load by itself, made into ordinary transformers folders.

    python launch/convert_model.py moondream2 --source DOWNLOADED --out models/moondream2-2024-04-02
    python launch/convert_model.py internvl-v1-5 --source DOWNLOADED --out models/mini-internvl-chat-2b-v1-5

moondream2       vikhyatk/moondream2, revision 2024-04-02
internvl-v1-5    OpenGVLab/Mini-InternVL-Chat-2B-V1-5, and the other InternVL-Chat-V1-5 models on InternLM2

--source is the repository as published (safetensors or .bin, config.json, tokenizer); none of its code is run. Every
tensor must find its place, else nothing is written and the names are told. --out appears whole, by a rename.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmdist.data.convert.corpora import run_script
from vlmdist.data.templates import TEMPLATES
from vlmdist.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("moondream2", "internvl-v1-5"))
    parser.add_argument("--source", type=Path, required=True, help="folder of the published repository")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise UserError(f"--out {options.out}: is there already; move it away or choose another folder")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    convert, template = _converter(options.model)
    model, processor = convert(options.source)
    processor.chat_template = TEMPLATES[template]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.out.name}-", dir=options.out.parent) as work:
        staging = Path(work) / "model"
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors are made readable by their owner alone
        staging.rename(options.out)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"{options.out}: {type(model).__name__}, {billions:.2f} billion parameters in {model.dtype}")


def _converter(name: str) -> tuple[Callable[[Path], tuple[Any, Any]], str]:
    """The converter and the name of the model's chat template."""
    if name == "moondream2":
        from vlmdist.model.published import moondream

        return moondream.convert, "moondream"
    from vlmdist.model.published import internvl

    return internvl.convert, "internlm2"


if __name__ == "__main__":
    sys.exit(run_script(main))
