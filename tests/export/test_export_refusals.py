"""What export refuses, each with a sentence and nothing left behind; and the card's redactions."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from made import FINGERPRINT, make_run, run_config
from ranks import rank_environment
from safetensors.torch import load_file, save_file
from tiny_families import make_llama3, make_llava, make_paligemma, make_smollm2

from vlmdist.config import load_run
from vlmdist.errors import RunFailed, UserError
from vlmdist.export.run import export_run
from vlmdist.run_folder import TRAINABLE_WEIGHTS, append_jsonl, write_manifest
from vlmdist.train.hyperparameters import public_run_file

LORA = {"language_model": "lora", "lora": {"r": 4, "alpha": 8}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(run_config(make_llama3(tmp_path / "model"), tmp_path / "run", LORA))


def edit_run(run_dir: Path, section: str, **fields: object) -> None:
    """As if the run had been started so."""
    tree = yaml.safe_load((run_dir / "run.yaml").read_text())
    tree[section].update(fields)
    checkpoint = run_dir / "checkpoints" / "step-000003"
    for folder in (run_dir, checkpoint):
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    list_again(checkpoint)


def change_weights(checkpoint: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, checkpoint / TRAINABLE_WEIGHTS)
    list_again(checkpoint)


def list_again(checkpoint: Path) -> None:
    write_manifest(checkpoint, {"step": 3, "world_size": 1, "corpora": [FINGERPRINT]})


def refused(run_dir: Path, says: str, **options: object) -> None:
    parent = run_dir.parent / "outs"
    parent.mkdir(exist_ok=True)
    with pytest.raises(UserError) as e:
        export_run(run_dir, parent / "out", **options)  # type: ignore[arg-type]
    assert says in str(e.value)
    assert list(parent.iterdir()) == []


def test_where_there_is_no_checkpoint(run_dir: Path) -> None:
    refused(run_dir.parent / "nowhere", "no such run folder")
    refused(run_dir, "best: is not there", checkpoint="best")
    refused(run_dir, "is no whole checkpoint: no such folder", checkpoint=run_dir / "checkpoints" / "step-000009")
    shutil.rmtree(run_dir / "checkpoints" / "step-000003")
    refused(run_dir, "holds no whole checkpoint. Train first")


def test_a_damaged_checkpoint(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-000003" / TRAINABLE_WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    refused(run_dir, f"passed over: step-000003: {TRAINABLE_WEIGHTS} is changed")
    refused(run_dir, f"is no whole checkpoint: {TRAINABLE_WEIGHTS} is changed", checkpoint=file.parent)


def test_a_checkpoint_of_other_settings(run_dir: Path) -> None:
    """alpha changes no weight's name or shape, only what the weights mean."""
    tree = yaml.safe_load((run_dir / "run.yaml").read_text())
    tree["adapt"]["lora"]["alpha"] = 16
    (run_dir / "run.yaml").write_text(yaml.safe_dump(tree))
    refused(run_dir, "adapt.lora.alpha: the checkpoint was made with 8.0, the run file now says 16.0")


def test_weights_that_the_adapt_section_does_not_train(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-000003"
    weights = load_file(checkpoint / TRAINABLE_WEIGHTS)
    first = sorted(weights)[0]
    change_weights(checkpoint, {n: w for n, w in weights.items() if n != first} | {"lm_head.weight": torch.ones(1)})
    refused(run_dir, "1 are missing")
    change_weights(checkpoint, weights | {first: weights[first][:-1].contiguous()})
    refused(run_dir, "1 have another shape", merge=True)


def test_an_existing_folder_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is there already; move it away"):
        export_run(run_dir, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="can't be made"):
        export_run(run_dir, tmp_path / "file" / "out")


def test_private_without_a_repository(run_dir: Path) -> None:
    refused(run_dir, "--private: is for a repository", private=True)


def test_a_base_model_that_is_not_there(run_dir: Path) -> None:
    (run_dir.parent / "model").rename(run_dir.parent / "moved")
    refused(run_dir, "model.name_or_path")
    edit_run(run_dir, "model", name_or_path=str(run_dir.parent / "moved"))
    (run_dir.parent / "moved" / "model.safetensors").unlink()
    refused(run_dir, "can't be loaded", merge=True)


CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_model_with_code_of_its_own(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run_dir.parent / "model"
    (base / "own.py").write_text(CUSTOM_CODE)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config))
    refused(run_dir, "trust_remote_code")


def test_a_base_that_is_published_quantised(run_dir: Path) -> None:
    file = run_dir.parent / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(config))
    refused(run_dir, "nothing is merged into quantised weights", merge=True)


def test_a_full_weight_that_is_shared_needs_the_whole_model(tmp_path: Path) -> None:
    """peft would untie it: the head would stay the base's."""
    adapt = {"vision_tower": "lora", "language_model": "full", "head": "full", "lora": {"r": 2}}
    run_dir = make_run(run_config(make_paligemma(tmp_path / "model"), tmp_path / "run", adapt))
    refused(run_dir, "is shared with another layer")


def test_a_disk_that_is_too_small(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(run_dir, "0.00 GB are free there", merge=True)


def test_a_machine_that_is_too_small(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=1000))
    refused(run_dir, "export on a machine with more, or the adapter alone", merge=True)
    export_run(run_dir, run_dir.parent / "adapter")


def test_a_disk_that_fills_up(run_dir: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for it: the same calls fail, in the middle of the weights."""
    (tmp_path / "outs").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "vlmdist", "export", str(run_dir), "--out", str(tmp_path / "outs" / "out"), "--merge"],
        capture_output=True,
        text=True,
        timeout=120,
        env=rank_environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "failed: --out" in done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "outs").iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmdist.export import run

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "outs").mkdir()
    monkeypatch.setattr(run, "save_adapter", full)
    with pytest.raises(RunFailed, match="No space left on device; nothing of it is left"):
        export_run(run_dir, tmp_path / "outs" / "out")
    assert list((tmp_path / "outs").iterdir()) == []


# -- what is written ---------------------------------------------------------------------------------------------------


def test_auto_precision_is_that_of_the_runs_device(run_dir: Path, tmp_path: Path) -> None:
    """A run on a V100 was fp16; a login node without a GPU must not make bf16 of it."""
    edit_run(run_dir, "model", precision="auto")
    checkpoint = run_dir / "checkpoints" / "step-000003"
    change_weights(checkpoint, {n: w.half() for n, w in load_file(checkpoint / TRAINABLE_WEIGHTS).items()})
    assert export_run(run_dir, tmp_path / "out", merge=True)["dtype"] == "float16"
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    run_dir = make_run(run_config(make_smollm2(tmp_path / "model"), tmp_path / "run", LORA))
    export_run(run_dir, tmp_path / "out", merge=True)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_bos_token_that_the_run_was_trained_without(tmp_path: Path) -> None:
    """transformers puts one before a template that has none, where the tokenizer asks for it; vlmdist doesn't."""
    from transformers import AutoProcessor

    base = make_llava(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_bos_token = True
    template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
        "{% endfor %}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.save_pretrained(base)
    question = [{"role": "user", "content": [{"type": "text", "text": "Sum?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    bos = processor.tokenizer.bos_token_id
    assert bos in AutoProcessor.from_pretrained(base).apply_chat_template(question, **options)["input_ids"][0]
    export_run(make_run(run_config(base, tmp_path / "run", LORA)), tmp_path / "out")
    exported = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(question, **options)["input_ids"][0]
    assert bos not in exported
    assert processor.tokenizer.decode(exported) == "user: Sum?\nassistant: "
    assert "not shown" not in (tmp_path / "out" / "README.md").read_text()


def test_generation_is_greedy_up_to_the_runs_stop_tokens(run_dir: Path, tmp_path: Path) -> None:
    export_run(run_dir, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    ids = {t["content"]: t["id"] for t in tokens}
    assert settings["eos_token_id"] == sorted([ids["<|eot_id|>"], ids["<|end_of_text|>"]])
    assert settings["pad_token_id"] == ids["<|reserved_special_token_0|>"]
    assert settings["do_sample"] is False
    assert settings["max_new_tokens"] == 8


def test_the_card_tells_the_run_and_no_secret(run_dir: Path, tmp_path: Path) -> None:
    secret = "https://user:hunter2@host/corpus?signature=abc123"  # noqa: S105
    edit_run(run_dir, "data", train=[{"shards": secret}, {"shards": "pipe:curl -H 'Authorization: hunter3' x"}])
    start = {"start": True, "corpora": [{"fingerprint": FINGERPRINT, "samples": 4321, "weight": 1.0}]}
    append_jsonl(run_dir / "steps.jsonl", start)
    (run_dir / "environment.json").write_text(
        json.dumps([{"python": "3.11.9", "packages": {"torch": "2.13"}, "host": "n7"}])
    )
    (run_dir / "eval" / "od|d").mkdir(parents=True)
    scores = {
        "metric": "fuzzy",
        "score": 12.3456,
        "num_samples": 9,
        "num_errors": 1,
        "by_field": {"total": {"score": 50.0}},
    }
    (run_dir / "eval" / "od|d" / "scores.json").write_text(json.dumps(scores))
    (run_dir / "eval" / "od|d" / "evaluation.json").write_text(json.dumps({"checkpoint": None}))
    (tmp_path / "model" / "README.md").write_text("---\nlicense: llama3\n---\n")
    (tmp_path / "model" / "LICENSE").write_text("text")
    export_run(run_dir, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "`https://host/corpus` | 4,321 | 1 |",
        FINGERPRINT,
        "3 optimizer steps of 8 samples: 0.00 epochs, 1,234 tokens",
        "| language model | lora | ",
        "LoRA: rank 4, alpha 8, dropout 0, bias none, on all linear layers",
        "| `od¦d` | base model | `fuzzy` | 12.35 | total 50.00 | 9 | 1 |",
        "Python 3.11.9, torch 2.13",
        "names the licence `llama3`",
        "holds `LICENSE`",
        "pipe:curl ...",
    ):
        assert said in card, said
    for hidden in ("hunter2", "hunter3", "abc123", "n7"):
        assert hidden not in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["vlmdist", "lora"],
        "license": "llama3",
    }
    block = card.split("```yaml\n")[1].split("```")[0]
    assert block == public_run_file(load_run(run_dir))
    assert yaml.safe_load(block)["adapt"]["lora"]["r"] == 4
