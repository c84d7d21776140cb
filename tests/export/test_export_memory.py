"""How much memory a merge takes: the model once, and a shard."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made import make_run, run_config
from ranks import REPOSITORY, rank_environment
from tiny_families import SMOLLM2_TEMPLATE, tiny_tokenizer

SHARD_BYTES = 50_000_000

# peak of the resident memory, mapped files included, over what it was before the export
_MEASURE = f"""
import functools, json, sys, threading, time
import peft, torch, transformers
from pathlib import Path
from vlmdist.export import model, run
torch.set_num_threads(1)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, peak, over = resident(), 0, threading.Event()
def watch():
    global peak
    while not over.wait(0.003):
        peak = max(peak, resident())
watcher = threading.Thread(target=watch)
watcher.start()
run.save_model = functools.partial(model.save_model, max_shard_size={SHARD_BYTES})
run.export_run(Path(sys.argv[1]), Path(sys.argv[2]), merge=True)
over.set()
watcher.join()
print(json.dumps(peak - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [{"language_model": "lora"}, {"language_model": "full", "head": "full"}])
def test_the_model_is_held_once(adapt: dict[str, Any], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(SMOLLM2_TEMPLATE, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, vocab_size=len(tokenizer)
    )
    model = LlamaForCausalLM(config)
    model_bytes = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    del model
    run_dir = make_run(run_config(tmp_path / "model", tmp_path / "run", adapt))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(run_dir), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
        env=rank_environment(),
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    extra = json.loads(done.stdout.splitlines()[-1]) - model_bytes
    # one shard, and 64 MB for the modules that are imported on the way; a second model would be 400 MB
    assert extra < SHARD_BYTES + 64_000_000, f"{extra / 1e6:.0f} MB over {model_bytes / 1e6:.0f} MB"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
