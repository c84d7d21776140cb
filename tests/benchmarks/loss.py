#!/usr/bin/env python3
"""The loss over a vocabulary of 128,256: full logits, and chunks of them whose gradient is made at once.

    python tests/benchmarks/loss.py [--tokens 4096] [--rounds 3]

A Llama of one narrow layer, so that the head is nearly all there is; every token is in the loss. Each side is a process
of its own: its peak resident memory over what it held before, and the seconds of a forward and a backward (fp32, one
thread).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

VOCABULARY = 128_256
WIDTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the micro-batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--side", choices=("full", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.tokens)))
        return
    rows: dict[str, list[dict[str, float]]] = {"full": [], "chunked": []}
    for _ in range(options.rounds):
        for side, found in rows.items():
            command = [sys.executable, __file__, "--side", side, "--tokens", str(options.tokens)]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{options.tokens} tokens, vocabulary {VOCABULARY:,}\n")
    print("| logits | peak MB | seconds | loss |\n|---|---|---|---|")
    for side, found in rows.items():
        megabytes, seconds = (statistics.median(row[name] for row in found) for name in ("MB", "seconds"))
        print(f"| {side} | {megabytes:,.0f} | {seconds:.2f} | {found[0]['loss']:.6f} |")


def measure(side: str, tokens: int) -> dict[str, float]:
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as the vlmdist command does, for both sides
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlmdist.data.collate import MicroBatch
    from vlmdist.train.loss import token_loss_sum

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    model.lm_head.weight.requires_grad_(False)  # as under LoRA
    ids = torch.randint(0, VOCABULARY, (1, tokens))
    batch = MicroBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, [(0, 0)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if side == "full":
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")
    else:
        loss = token_loss_sum(model, batch)
    loss.backward()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MB": (peak - before) * 1024 / 1e6, "seconds": seconds, "loss": float(loss.detach())}


if __name__ == "__main__":
    main()
