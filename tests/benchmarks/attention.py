#!/usr/bin/env python3
"""Causal attention in bf16 on one thread of a CPU, forward and backward: ours beside torch's kernel, by turns.

    python tests/benchmarks/attention.py [--rounds 7]

Error: of the gradient of the queries, relative to float64's (norms).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlmdist.model.cpu_attention import causal_attention

HEADS, KEY_HEADS, WIDTH = 6, 3, 64
LENGTHS = (32, 80, 232, 500, 1000, 1500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{HEADS} heads, {KEY_HEADS} of keys, {WIDTH} wide; torch {torch.__version__}\n")
    print("| tokens | torch ms | ours ms | times faster | error of torch's, ours |\n|---|---|---|---|---|")
    for length in LENGTHS:
        q = torch.randn(HEADS, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(KEY_HEADS, length, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        upstream = torch.randn(HEADS, length, WIDTH, dtype=torch.bfloat16)
        exact = gradients(of_torch, [x.detach().double().requires_grad_() for x in (q, k, v)], upstream.double())
        ms: dict[str, list[float]] = {"torch": [], "ours": []}
        errors = {}
        for _ in range(1 + options.rounds):
            for name, attention in (("torch", of_torch), ("ours", ours)):
                repeats = max(1, 2000 // length)
                began = time.perf_counter()
                for _ in range(repeats):
                    found = gradients(attention, [q, k, v], upstream)
                ms[name].append(1e3 * (time.perf_counter() - began) / repeats)
                errors[name] = float((found[0].double() - exact[0]).norm() / exact[0].norm())
        theirs, mine = (statistics.median(ms[name][1:]) for name in ms)
        print(
            f"| {length:,} | {theirs:.2f} | {mine:.2f} | {theirs / mine:.2f} | "
            f"{errors['torch']:.4f}, {errors['ours']:.4f} |",
            flush=True,
        )


def of_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return causal_attention(q, k, v, WIDTH**-0.5)


def gradients(
    attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(attention(*inputs), inputs, upstream)


if __name__ == "__main__":
    main()
