"""What ``train.cache_vision_features`` would keep: whether it can be, and how much disk it takes."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmdist.check.disk import nearest_there
from vlmdist.check.samples import Taken
from vlmdist.check.shown import gigabytes
from vlmdist.config import RunConfig
from vlmdist.data.prompt import Encoded
from vlmdist.data.shards.corpus import Corpus
from vlmdist.model.families import family_of
from vlmdist.model.vision_features import family_problem, features_per_tile

_TOKEN_BYTES = 9
"""Its id and whether it is in the loss."""


def feature_facts(
    config: RunConfig, transformers_config: Any, corpora: Sequence[Corpus], even: Sequence[Taken], dtype: torch.dtype
) -> tuple[dict[str, int], list[str], list[str]]:
    """Facts (samples, bytes), problems, and warnings. even: samples looked at, spread evenly over the corpora."""
    problem = family_problem(family_of(transformers_config), transformers_config.model_type)
    if problem:
        return {}, [problem], []
    num_samples, num_bytes = 0, 0.0
    for number, corpus in enumerate(corpora):
        seen = [t.encoded for t in even if t.corpus == number and t.encoded.features]
        with_images = int((corpus.num_images > 0).sum())
        if seen:
            num_samples += with_images
            num_bytes += with_images * float(np.mean([_bytes_of(e, transformers_config, dtype) for e in seen]))
    facts = {"samples": num_samples, "bytes": round(num_bytes)}
    folder = nearest_there(Path(config.output_dir))
    free = shutil.disk_usage(folder).free
    if num_bytes <= free:
        return facts, [], []
    text = f"train.cache_vision_features: {gigabytes(facts['bytes'])} of features, {folder} has {gigabytes(free)}"
    return facts, [], [f"{text}; keeping them ends when it is nearly full, and the run goes on without the others"]


def _bytes_of(encoded: Encoded, transformers_config: Any, dtype: torch.dtype) -> int:
    pixels = encoded.features["pixel_values"].shape
    numbers = pixels[0] * features_per_tile(transformers_config, *pixels[-2:])
    return numbers * dtype.itemsize + len(encoded.input_ids) * _TOKEN_BYTES
