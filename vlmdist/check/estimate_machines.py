"""Rates of GPU nodes, each as a range, from data sheets and from what others have published.

Where a run's own machine differs (other links, a slow host), name the links, or measure with ``vlmdist bench``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmdist.check.estimate import OPTIMIZER_BYTES, Link, Machine
from vlmdist.check.gpus import GPUS, Gpu, largest_gpu
from vlmdist.errors import UserError
from vlmdist.model.peaks import gpu_peak

Range = tuple[float, float]
"""Slow, fast."""

# Share of a GPU's peak that its products of matrices reach in training a transformer, recomputation counted.
#
# 7.0  24 to 30 % (30 TFLOPS of PyTorch alone, 38 of ZeRO, 39 of Megatron; https://arxiv.org/abs/2101.06840,
#      1910.02054, 1909.08053); less with eager attention and short samples, which is a guess
# 8.0  39 to 50 % for transformers' models under DeepSpeed (92 and 116 TFLOPS, a third more with recomputation,
#      https://github.com/deepspeedai/DeepSpeed/pull/1453), 34 % (https://github.com/SeanNaren/min-LLM/issues/13)
# 9.0  36 to 59 % (https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md, HFU);
#      with eager attention and separate kernels less, which is a guess
# 7.5, 8.6, 8.9: no published figures of training; peaks of GeForce cards are half of a data center's share of what
#      the chip does, and so are reached further. A guess.
_PEAK_SHARES: dict[tuple[int, int], Range] = {
    (7, 0): (0.16, 0.40),
    (7, 5): (0.15, 0.40),
    (8, 0): (0.28, 0.55),
    (8, 6): (0.30, 0.70),
    (8, 9): (0.30, 0.70),
    (9, 0): (0.25, 0.58),
}
_MEMORY_SHARE: Range = (0.5, 0.9)
_LAUNCH_S: Range = (170e-6, 50e-6)
"""Slow: 25.5 tokens a second of a Llama-7B in eager PyTorch, which waits for the host: 225 linear layers a token
(https://pytorch.org/blog/accelerating-generative-ai-2/). Fast: newer hosts, a guess."""
_WORKER_SPEED: Range = (0.5, 1.3)
"""Of a node's core to the one that the samples were timed on."""

# Bus bandwidth in 1e9 bytes a second of NCCL's rings within a node.
_NVLINK: dict[tuple[int, int], Range] = {
    # two links of 25 between the GPUs of a four-GPU node, six in a ring of eight (V100's data sheet: 300 both ways)
    (7, 0): (45, 130),
    # https://github.com/NVIDIA/nccl-tests/issues/149, 178
    (8, 0): (190, 235),
    # https://github.com/NVIDIA/nccl-tests/issues/212: 370 round a ring, 480 with NVLink SHARP
    (9, 0): (330, 480),
}
# a 3.0, 4.0, 5.0 slot's 16 lanes carry 16, 32, 64 one way; https://github.com/NVIDIA/nccl-tests/issues/178: 20 over
# 4.0; https://github.com/NVIDIA/nccl/issues/1639: 28 over 5.0
_PCIE: dict[int, Range] = {7: (5, 12), 8: (9, 24), 9: (18, 40)}
"""By the first number of the capability."""
_NETWORKS: dict[str, float] = {"edr": 12.5, "hdr": 25, "ndr": 50, "10gbe": 1.25, "25gbe": 3.125, "100gbe": 12.5}
"""1e9 bytes a second of one adapter. 4 x EDR gave about 40 in https://github.com/NVIDIA/nccl-tests/issues/29."""
_NETWORK_SHARE: Range = (0.6, 0.95)
_USUAL_NETWORK = {7: "edr", 8: "hdr", 9: "ndr"}
_LATENCY_S: Range = (8e-6, 3e-6)
_NETWORK_LATENCY_S: Range = (25e-6, 6e-6)
_MESSAGE_HOP_S: Range = (2e-4, 3e-5)
"""Of gloo over TCP, by which ranks tell each other counts."""
_HOST_ADAM_PER_S: Range = (0.2e9, 1.4e9)
"""Parameters a second of DeepSpeed's CPU Adam on all cores of a node: 11.6e9 in 8.2 s
(https://github.com/deepspeedai/DeepSpeed/pull/735), and a third of 1e9 on two threads
(https://github.com/ISEEKYAN/Megatron-LM/issues/188). With one thread a rank it is slower still."""
_ON_HOST_BYTES = 4
"""That a parameter's gradient and weight take over PCIe."""


@dataclass(frozen=True)
class Nodes:
    """Machines to estimate for."""

    gpu: Gpu
    gpus_per_node: int
    num_nodes: int = 1
    link: str | None = None
    """Within a node: nvlink or pcie; None: not known."""
    network: tuple[int, str] | None = None
    """Adapters a node, and their kind; None: not known."""

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.num_nodes

    @property
    def text(self) -> str:
        """As a line of the report names them: ``4 nodes of 8 x A100 80 GB (nvlink, 8 x hdr)``."""
        nodes = f"{self.num_nodes} nodes of " if self.num_nodes > 1 else ""
        adapters = f"{self.network[0]} x {self.network[1]}" if self.network else None
        links = ", ".join(filter(None, (self.link, adapters)))
        return f"{nodes}{self.gpus_per_node} x {self.gpu.name}" + (f" ({links})" if links else "")


def parse_nodes(text: str) -> Nodes:
    """``2xV100``, ``8xA100-40GB/nvlink``, ``4x8xA100/nvlink/8hdr``: [NODESx]GPUSxGPU[/LINK][/NETWORK]. UserError."""
    shape, *links = text.split("/")
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\D.*)", shape)
    gpu = largest_gpu(found[3]) if found else None
    if found is None or gpu is None or not int(found[1] or 1) * int(found[2]):
        raise UserError(
            f"--on: {text!r} is not [NODESx]GPUSxGPU[/LINK][/NETWORK], as 2xV100, 8xA100-40GB/nvlink or "
            f"4x8xA100/nvlink/8hdr; GPUs are {', '.join(GPUS)}"
        )
    link, network = None, None
    for word in links:
        adapters = re.fullmatch(rf"(\d*)({'|'.join(_NETWORKS)})", word.lower())
        if adapters:
            network = max(1, int(adapters[1] or 1)), adapters[2]
        elif word.lower() == "pcie" or (word.lower() == "nvlink" and gpu.capability in _NVLINK):
            link = word.lower()
        else:
            within = "nvlink or pcie" if gpu.capability in _NVLINK else "pcie"
            raise UserError(
                f"--on: {text!r}: {word!r} is no link of a {gpu.name}: within a node {within}, between nodes "
                f"{', '.join(_NETWORKS)}, with the adapters a node before it (8hdr)"
            )
    return Nodes(gpu, int(found[2]), int(found[1] or 1), link, network)


def machines(nodes: Nodes, *, offloads: bool) -> tuple[Machine, Machine] | None:
    """The fastest and the slowest that such nodes may be; None for a GPU whose peak is not known.

    offloads: the optimizer steps on the host.
    """
    peak = gpu_peak(nodes.gpu.name)
    shares = _PEAK_SHARES.get(nodes.gpu.capability)
    if peak is None or shares is None:
        return None
    slow, fast = (
        Machine(
            flops_per_s=peak.flops_per_s * shares[end],
            memory_bytes_per_s=_memory(nodes, end),
            launch_s=_LAUNCH_S[end],
            link=_link(nodes, end),
            message_s=_MESSAGE_HOP_S[end] * (nodes.world_size - 1),
            hidden_share=float(end),
            optimizer_elements_per_s=_host_adam(nodes, end) if offloads else _memory(nodes, end) / OPTIMIZER_BYTES,
            worker_speed=_WORKER_SPEED[end],
        )
        for end in (0, 1)
    )
    return fast, slow


def _memory(nodes: Nodes, end: int) -> float:
    return nodes.gpu.memory_gb_per_s * 1e9 * _MEMORY_SHARE[end]


def _link(nodes: Nodes, end: int) -> Link:
    """The ring is as fast as its slowest link: between nodes, all their adapters carry rings of their own."""
    within = _within_node(nodes, end)
    if nodes.num_nodes == 1:
        return Link(within * 1e9, _LATENCY_S[end])
    # not known: one adapter a node of the GPU's time, or one for each GPU, as in NVIDIA's own nodes
    usual = _USUAL_NETWORK[nodes.gpu.capability[0]]
    adapters, kind = nodes.network or ((1, nodes.gpus_per_node)[end], usual)
    between = adapters * _NETWORKS[kind] * _NETWORK_SHARE[end]
    return Link(min(within, between) * 1e9, _NETWORK_LATENCY_S[end])


def _within_node(nodes: Nodes, end: int) -> float:
    capability = nodes.gpu.capability
    pcie, nvlink = _PCIE[capability[0]], _NVLINK.get(capability)
    if nodes.link == "pcie" or nvlink is None:
        return pcie[end]
    return nvlink[end] if nodes.link == "nvlink" else (pcie[0], nvlink[1])[end]


def _host_adam(nodes: Nodes, end: int) -> float:
    """Of one rank: its share of the node's cores, and its way over PCIe, one after the other."""
    computing = nodes.gpus_per_node / _HOST_ADAM_PER_S[end]
    moving = _ON_HOST_BYTES / (_PCIE[nodes.gpu.capability[0]][end] * 1e9)
    return 1 / (computing + moving)


def named(texts: Sequence[str]) -> tuple[list[Nodes], list[str]]:
    """Of ``--on``, and a sentence for each that can't be read."""
    found, problems = [], []
    for text in texts:
        try:
            found.append(parse_nodes(text))
        except UserError as e:
            problems += e.problems
    return found, problems
