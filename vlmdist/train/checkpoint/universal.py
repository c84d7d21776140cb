"""A checkpoint in the form that fits any number of ranks: DeepSpeed's universal checkpoint.

https://www.deepspeed.ai/tutorials/universal-checkpointing/. Run as a process of its own, once a start, by rank 0:
DeepSpeed's converter forks workers, which a process with a process group had better not do.

    python -m vlmdist.train.checkpoint.universal CHECKPOINT OUT PARENT_PID
"""

import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from vlmdist.run_folder import TRAINABLE_WEIGHTS

DEEPSPEED_DIR = "deepspeed"
UNIVERSAL_DIR = "universal"


def convert(checkpoint: Path, out: Path) -> None:
    """Write ``out/universal`` from a verified checkpoint."""
    import torch
    from deepspeed.checkpoint import ds_to_universal

    from vlmdist.train.checkpoint.deepspeed_files import load_safely

    source = _complete(checkpoint, out)
    torch.load = load_safely  # type: ignore[assignment]  # the converter's own calls would unpickle anything
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(out / UNIVERSAL_DIR),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def _complete(checkpoint: Path, out: Path) -> Path:
    """DeepSpeed's files with all that it expects in them: what we keep only once is put back."""
    import torch
    from safetensors.torch import load_file

    from vlmdist.train.checkpoint.deepspeed_files import lacks_masters, load_safely, restore_masters

    files = sorted((checkpoint / DEEPSPEED_DIR).glob("*_optim_states.pt"), key=_rank_of)
    states = [load_safely(f) for f in files]
    if not any(lacks_masters(s) for s in states):
        return checkpoint / DEEPSPEED_DIR
    restore_masters(states, load_file(checkpoint / TRAINABLE_WEIGHTS))
    source = out / DEEPSPEED_DIR
    source.mkdir()
    for file, state in zip(files, states, strict=True):
        torch.save(state, source / file.name)
    for file in (checkpoint / DEEPSPEED_DIR).glob("*_model_states.pt"):
        shutil.copyfile(file, source / file.name)
    return source


def _rank_of(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    from vlmdist.processes import die_with_parent

    die_with_parent(int(sys.argv[3]))
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
