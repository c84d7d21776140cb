"""DeepSpeed's JSON: shipped files, "auto", clashes; schedules and the loss on their own."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_run

from vlmdist.config import RunConfig, TrainConfig
from vlmdist.errors import RunFailed, UserError
from vlmdist.train.ds_config import load_ds_config
from vlmdist.train.gradients import GradientWatch
from vlmdist.train.optim import learning_rate, make_optimizer


def config(deepspeed: str, **model: object) -> RunConfig:
    return RunConfig.model_validate(tiny_run(Path("w"), Path("o"), train={"deepspeed": deepspeed}, model=model))


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_shipped_files_are_filled(name: str) -> None:
    tree = load_ds_config(config(name), 4, torch.bfloat16)
    assert "auto" not in json.dumps(tree)
    assert tree["train_batch_size"] == 4 * tree["train_micro_batch_size_per_gpu"] == 8
    assert tree["gradient_clipping"] == 1.0
    assert tree["bf16"]["enabled"]
    assert not tree["fp16"]["enabled"]


def test_clashes_are_told_together(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps(
            {
                "gradient_clipping": 0.5,
                "gradient_accumulation_steps": 4,
                "optimizer": {"type": "Adam"},
                "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
            }
        )
    )
    with pytest.raises(UserError) as caught:
        load_ds_config(config(str(file), quantization="nf4"), 2, torch.bfloat16)
    text = "\n".join(caught.value.problems)
    for says in ("gradient_clipping is 0.5", "gradient_accumulation_steps is 4", "'optimizer' is not allowed",
                 "zero_optimization.reduce_bucket_size: 'auto'", "can't shard nf4"):  # fmt: skip
        assert says in text, text


def test_broken_json_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text("{")
    with pytest.raises(UserError, match="can't be read as JSON"):
        load_ds_config(config(str(file)), 1, torch.float32)


def rates(total: int, **options: object) -> list[float]:
    c = TrainConfig(global_batch_size=1, learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(s, total, c) for s in range(1, total + 1)]


def test_cosine_with_warmup_equals_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = rates(100, warmup_ratio=0.1)
    # theirs starts at 0 and wastes the first step; ours rises from 1/10 and reaches the peak at the same step + 1
    assert ours[9:] == pytest.approx([1.0, *theirs[10:]][: len(ours[9:])], abs=0.02)
    assert ours[10:] == pytest.approx(theirs[10:], abs=1e-9)
    assert ours[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_other_schedules() -> None:
    assert rates(4, lr_scheduler_type="constant") == [1.0] * 4
    assert rates(4, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]
    moondream = rates(1000, lr_scheduler_type="moondream")
    assert moondream[0] == pytest.approx(0.1)
    assert max(moondream) == pytest.approx(1.0, abs=1e-3)
    assert moondream.index(max(moondream)) == 100
    assert moondream[-1] < 0.13
    assert rates(3, warmup_steps=100)[:3] == [0.01, 0.02, 0.03]


def test_optimizers_that_need_a_gpu_say_so() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    for name in ("paged_adamw_32bit", "adamw_8bit"):
        with pytest.raises(UserError, match="needs a GPU"):
            make_optimizer(
                parameters,
                TrainConfig(global_batch_size=1, optim=name),  # type: ignore[arg-type]
                offload=False,
                device=torch.device("cpu"),
            )


def test_parameter_without_gradient_is_an_error() -> None:
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    watch = GradientWatch(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(RunFailed, match=r"2 trainable parameters got no gradient .* unused\.bias, unused\.weight"):
        watch.check()
