"""The whole model: adapters merged into the base in 16 or 32 bit, or a full fine-tune as it is.

Memory: the model once, one weight of the checkpoint at a time, and the shard that is being written.
"""

from pathlib import Path
from typing import Any

import psutil

from vlmdist.errors import UserError
from vlmdist.export.source import Source
from vlmdist.model.adapters import adapt, load_trainable, merge_adapters
from vlmdist.model.families import auto_model
from vlmdist.model.load import from_pretrained
from vlmdist.model.memory import weight_bytes

MAX_SHARD_SIZE = "5GB"


def model_bytes(source: Source) -> int:
    """Bytes of the weights as they are exported, from the configuration alone."""
    unquantised = source.config.model.model_copy(update={"quantization": "none"})
    return weight_bytes(source.model_without_memory(), unquantised, source.family, source.dtype)


def refuse_what_cannot_be_merged(source: Source, num_bytes: int) -> None:
    """Raises UserError before anything is loaded."""
    base = source.config.model.name_or_path
    if getattr(source.base_config, "quantization_config", None) is not None:
        raise UserError(
            f"model.name_or_path: {base} is itself published quantised, and nothing is merged into quantised weights; "
            "export the adapter (leave --merge out)"
        )
    available = psutil.virtual_memory().total
    if num_bytes > available:
        raise UserError(
            f"the merged model takes {num_bytes / 1e9:.1f} GB of memory, this machine has {available / 1e9:.1f} GB; "
            "export on a machine with more, or the adapter alone (leave --merge out)"
        )


def save_model(source: Source, generation: Any, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write the trained model as safetensors with its configuration and generation settings."""
    model = _trained_model(source)
    model.generation_config = generation
    if source.base_is_own_code:
        # the file that defines the class goes along; the folder then asks for trust_remote_code=True
        type(model).register_for_auto_class("AutoModelForImageTextToText")
        type(model.config).register_for_auto_class()
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def _trained_model(source: Source) -> Any:
    """On the CPU, in the run's dtype, without adapters."""
    base = from_pretrained(auto_model(source.family), source.config.model, dtype=source.dtype)
    adapted = adapt(base, source.config.adapt, source.family)
    load_trainable(adapted, source.weights_file)
    return merge_adapters(adapted)
