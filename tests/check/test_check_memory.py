"""The memory table against what is really taken here, and against published runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from real_memory import peak_bytes
from tiny_families import TINY, conversation

from vlmdist.check.memory import Estimator, Settings
from vlmdist.config import RunConfig
from vlmdist.data.prompt import Prompter
from vlmdist.model.families import family_of
from vlmdist.model.load import load_config, load_for_training, load_processor
from vlmdist.train.ds_config import load_ds_config
from vlmdist.train.loss import token_loss_sum


def run_config(folder: Path, checkpointing: bool = False, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "model": {"name_or_path": str(folder), "precision": "fp32", "gradient_checkpointing": checkpointing},
        "adapt": {"language_model": "lora", "lora": {"r": 4, "dropout": 0.0}},
        "data": {"train": "unused", "max_length": 4096},
        "train": {"global_batch_size": 4, "per_device_train_batch_size": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return RunConfig.model_validate(tree)


def estimator_of(config: RunConfig, num_images: int, dtype: torch.dtype = torch.float32) -> Estimator:
    transformers_config = load_config(config.model)
    prompter = Prompter.for_run(load_processor(config.model), config)
    images = tuple(range(num_images))
    encoded = [
        prompter.encode_training(conversation((*images, "what is the total of this" * n), "It is milk " * n))
        for n in (12, 9)
    ]
    return Estimator(
        config,
        transformers_config,
        family_of(transformers_config),
        encoded,
        prompter.pad_token_id,
        dtype,
        fused_attention_repeats_heads=True,
    )


def settings_of(config: RunConfig, world_size: int = 1, **changed: Any) -> Settings:
    ds_config = load_ds_config(config, world_size, torch.float32)
    return Settings.of(config, ds_config, config.train.per_device_train_batch_size, world_size)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_the_traced_peak_is_what_the_allocator_gives_out(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """A real step on this machine, counted by torch's own allocator; never more than 3 % below it."""
    family = TINY[name]
    model_folder = family.make(tmp_path / "model")
    sees = family.max_images > 0 and name != "Fuyu"
    adapt = {"vision_tower": "lora", "projector": "full"} if sees else {}
    config = run_config(model_folder, checkpointing, adapt=adapt)
    estimator = estimator_of(config, family.max_images)
    table = estimator.table(settings_of(config))

    model, _ = load_for_training(config, torch.device("cpu"))
    batch = estimator.micro_batch(2).to(torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step() -> None:
        token_loss_sum(model, batch).backward()  # type: ignore[no-untyped-call]

    step()  # what is made once
    real = peak_bytes(step)
    assert 0.97 * real <= table.activations.peak <= 1.10 * real
    held = {n: p.numel() * 4 for n, p in model.named_parameters()}
    assert table.weights == sum(size for n, size in held.items() if "lora_" not in n)
    assert table.adapters == sum(size for n, size in held.items() if "lora_" in n)


def test_rows_under_each_zero_stage(tmp_path: Path) -> None:
    """Bytes a trained parameter as dsconfigs/README.md has them, in fp32: 4 + 4 + 12 split over 4 ranks."""
    model = TINY["Llama-3"].make(tmp_path / "model")
    found = {}
    for name in ("zero1", "zero2", "zero2_offload", "zero3"):
        config = run_config(model, train={"deepspeed": name}, adapt={"language_model": "full", "head": "full"})
        estimator = estimator_of(config, 0)
        table = estimator.table(settings_of(config, world_size=4))
        n = estimator.num_trained
        found[name] = tuple(round(x / n, 2) for x in (table.weights, table.gradients, table.optimizer, table.host))
    assert found == {
        "zero1": (4, 4, 3, 0),
        "zero2": (4, 1, 3, 0),
        "zero2_offload": (4, 1, 0, 4),
        "zero3": (1, 1, 3, 0),
    }


def test_each_lever_lowers_what_it_should(tmp_path: Path) -> None:
    model = TINY["Llama-3"].make(tmp_path / "model")
    config = run_config(model)
    estimator = estimator_of(config, 0)
    plain = estimator.table(settings_of(config))
    checkpointed = estimator.table(settings_of(run_config(model, checkpointing=True)))
    narrow = estimator.table(settings_of(run_config(model, model={"quantization": "nf4"})))
    eight = estimator.table(settings_of(run_config(model, train={"optim": "adamw_8bit"})))
    assert checkpointed.activations.saved < plain.activations.saved / 3
    assert checkpointed.weights == plain.weights
    assert narrow.weights < 0.6 * plain.weights
    assert narrow.adapters == plain.adapters
    assert eight.optimizer == plain.optimizer / 2  # 4 + 2 bytes in place of 4 + 8
    assert dict(plain.rows())["weights"] == plain.weights
    assert sum(size for _, size in plain.rows()) == plain.total
