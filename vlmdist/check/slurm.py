"""Would Slurm ever start this job? Asked of the cluster through scontrol and ``sbatch --test-only``.

What is asked for comes from the #SBATCH lines of a job script, sbatch's environment and options, the later over the
earlier as with sbatch itself (https://slurm.schedmd.com/sbatch.html).
"""

import difflib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmdist.errors import UserError

_TIMEOUT_S = 20
_SHORT = {"p": "partition", "A": "account", "C": "constraint", "t": "time", "N": "nodes", "n": "ntasks", "G": "gpus"}
_SHORT |= {"c": "cpus-per-task", "q": "qos"}
_ENVIRONMENT = ("partition", "account", "constraint", "qos")
_DOWN = ("DOWN", "DRAIN", "FAIL", "MAINT", "NO_RESPOND")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Request:
    """What a job asks for, as sbatch's long options; ``script`` is submitted where there is one."""

    options: Mapping[str, str] = field(default_factory=dict)
    script: Path | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    """Of these, what is not written in the script."""

    @property
    def num_nodes(self) -> int:
        return _number(self.options.get("nodes", "1").partition("-")[0], 1)

    @property
    def gpus_per_node(self) -> int | None:
        """None where none are asked for."""
        o = self.options
        for name in ("gpus-per-node", "gres"):
            if name in o:
                return _gpu_count(o[name])
        if "gpus-per-task" in o and self.tasks_per_node is not None:
            return _gpu_count(o["gpus-per-task"]) * self.tasks_per_node
        return -(-_gpu_count(o["gpus"]) // self.num_nodes) if "gpus" in o else None

    @property
    def gpu_type(self) -> str | None:
        for name in ("gpus-per-node", "gres", "gpus-per-task", "gpus"):
            found = re.search(r"(?:gpu:)?([a-zA-Z][\w.-]*):\d+$", self.options.get(name, ""))
            if found and found[1] != "gpu":
                return found[1]
        return None

    @property
    def tasks_per_node(self) -> int | None:
        """Ranks a node; None where the request doesn't say."""
        o = self.options
        if "ntasks-per-node" in o:
            return _number(o["ntasks-per-node"], 1)
        return -(-_number(o["ntasks"], 1) // self.num_nodes) if "ntasks" in o else None

    @property
    def cpus_per_node(self) -> int:
        return _number(self.options.get("cpus-per-task", "1"), 1) * (self.tasks_per_node or 1)

    @property
    def memory_bytes_per_node(self) -> int | None:
        """Host memory a node, from --mem or --mem-per-cpu; None where the request names neither."""
        if "mem" in self.options:
            return _memory_bytes(self.options["mem"])
        per_cpu = _memory_bytes(self.options.get("mem-per-cpu", ""))
        return None if per_cpu is None else per_cpu * self.cpus_per_node


def read_request(script: Path | None, options: Mapping[str, str | None]) -> Request:
    """options: of the command line, None where not given. UserError where the script can't be read."""
    given = {
        name: os.environ[f"SBATCH_{name.upper()}"] for name in _ENVIRONMENT if f"SBATCH_{name.upper()}" in os.environ
    }
    given |= {name: value for name, value in options.items() if value is not None}
    return Request({**(_of_script(script) if script else {}), **given}, script, given)


def cluster_problems(request: Request) -> tuple[list[str], list[str]]:
    """Problems and warnings, a sentence each."""
    missing = [program for program in ("scontrol", "sbatch") if shutil.which(program) is None]
    if missing:
        return [], [f"Slurm: {' and '.join(missing)} not on the PATH, so the request was not compared with the cluster"]
    try:
        partitions = {p["PartitionName"]: p for p in _show("partition")}
        nodes = _show("node")
    except _NoAnswer as e:
        return [], [f"Slurm: the cluster does not answer ({e}), so the request was not compared with it"]
    problems = _partition_problems(request, partitions) or _node_problems(request, partitions, nodes)
    if not problems:
        refused = _test_only(request)
        if refused:
            problems.append(f"Slurm: sbatch would refuse the job: {refused}")
    return problems, []


# -- against the cluster -----------------------------------------------------------------------------------------------


class _NoAnswer(Exception):
    pass


def _partition_problems(request: Request, partitions: Mapping[str, Mapping[str, str]]) -> list[str]:
    wanted = _wanted_partitions(request, partitions)
    if not wanted:
        return [
            f"Slurm: the cluster has no default partition; give --partition, one of {', '.join(sorted(partitions))}"
        ]
    problems = []
    for name in wanted:
        if name not in partitions:
            near = difflib.get_close_matches(name, partitions, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(partitions))}"
            problems.append(f"Slurm: --partition: there is no partition {name!r}; {hint}")
            continue
        facts = partitions[name]
        if facts.get("State", "UP") != "UP":
            problems.append(f"Slurm: --partition: {name} is {facts['State']}: jobs wait there without end")
        problems += _limit_problems(request, name, facts) + _account_problems(request, name, facts)
    # a job may name several partitions and starts in any that takes it
    return problems if len(problems) >= len(wanted) else []


def _limit_problems(request: Request, name: str, facts: Mapping[str, str]) -> list[str]:
    problems = []
    asked, most = request.options.get("time"), facts.get("MaxTime", "UNLIMITED")
    if asked is not None:
        seconds, limit = time_seconds(asked), time_seconds(most)
        if seconds is None and asked.upper() not in ("UNLIMITED", "INFINITE", "0"):
            problems.append(f"Slurm: --time: {asked!r} is no time; Slurm takes minutes, h:mm:ss or d-h:mm:ss")
        elif limit is not None and (seconds is None or seconds > limit):
            problems.append(f"Slurm: --time: {asked} is longer than the {most} that partition {name} allows")
    max_nodes = facts.get("MaxNodes", "UNLIMITED")
    if max_nodes.isdigit() and request.num_nodes > int(max_nodes):
        problems.append(f"Slurm: --nodes: {request.num_nodes}, partition {name} allows {max_nodes} a job")
    return problems


def _account_problems(request: Request, name: str, facts: Mapping[str, str]) -> list[str]:
    allowed, denied = facts.get("AllowAccounts", "ALL"), facts.get("DenyAccounts", "")
    account = request.options.get("account")
    if allowed not in ("ALL", ""):
        if account is None:
            return [f"Slurm: --account: partition {name} takes only {allowed}; name yours"]
        if account not in allowed.split(","):
            return [f"Slurm: --account: {account!r} may not use partition {name}, which takes {allowed}"]
    if account is not None and account in denied.split(","):
        return [f"Slurm: --account: {account!r} may not use partition {name}"]
    return []


def _node_problems(
    request: Request, partitions: Mapping[str, Mapping[str, str]], nodes: Sequence[Mapping[str, str]]
) -> list[str]:
    """The first thing that leaves too few nodes; a job that names several partitions starts in one of them."""
    found: list[str] = []
    for name in _wanted_partitions(request, partitions):
        problem = _nodes_of(name, request, [n for n in nodes if name in n.get("Partitions", "").split(",")])
        if problem is None:
            return []
        found.append(problem)
    return found


def _nodes_of(partition: str, request: Request, nodes: Sequence[Mapping[str, str]]) -> str | None:
    count, o = request.num_nodes, request.options
    if len(nodes) < count:
        return f"Slurm: --nodes: {count}, partition {partition} has {len(nodes)}"
    left = nodes
    constraint = o.get("constraint")
    if constraint is not None and re.fullmatch(r"[\w.-]+([&|][\w.-]+)*", constraint):
        having = [n for n in left if _has_features(n, constraint)]
        if len(having) < count:
            features = sorted({f for n in nodes for f in _features(n)})
            return (
                f"Slurm: --constraint: {len(having)} nodes of partition {partition} have {constraint}, {count} are "
                f"asked for; its features: {', '.join(features) or 'none'}"
            )
        left = having
    if request.gpus_per_node is not None:
        having = [n for n in left if _gpus_of(n, request.gpu_type) >= request.gpus_per_node]
        if len(having) < count:
            kinds = sorted({n.get("Gres", "(null)") for n in left})
            kind = f" {request.gpu_type}" if request.gpu_type else ""
            return (
                f"Slurm: {len(having)} nodes of partition {partition} have {request.gpus_per_node}{kind} GPUs, "
                f"{count} are asked for; its nodes have {', '.join(kinds)}"
            )
        left = having
    having = [n for n in left if _number(n.get("CPUTot", ""), 1 << 30) >= request.cpus_per_node]
    if len(having) < count:
        most = max(_number(n.get("CPUTot", ""), 0) for n in left)
        return (
            f"Slurm: --cpus-per-task: {request.cpus_per_node} cores a node, those of partition {partition} have {most}"
        )
    left = having
    memory = request.memory_bytes_per_node
    if memory is not None:
        having = [n for n in left if _number(n.get("RealMemory", ""), 1 << 40) * 2**20 >= memory]
        if len(having) < count:
            most = max(_number(n.get("RealMemory", ""), 0) for n in left)
            return (
                f"Slurm: --mem: {memory / 2**30:.0f} GiB a node, those of partition {partition} have "
                f"{most / 1024:.0f} GiB"
            )
        left = having
    up = [n for n in left if not any(state in n.get("State", "") for state in _DOWN)]
    if len(up) < count:
        states = ", ".join(f"{n['NodeName']} {n.get('State')}" for n in left if n not in up)
        return f"Slurm: --nodes: {count} are asked for, {len(up)} of the fitting nodes of {partition} are up ({states})"
    return None


def _wanted_partitions(request: Request, partitions: Mapping[str, Mapping[str, str]]) -> list[str]:
    if "partition" in request.options:
        return request.options["partition"].split(",")
    return [name for name, facts in partitions.items() if facts.get("Default") == "YES"]


def _test_only(request: Request) -> str | None:
    """Slurm's own answer where it would refuse the job."""
    options = [f"--{name}={value}" for name, value in request.given.items()]
    what = [str(request.script)] if request.script else ["--wrap=true"]
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", *options, *what], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return None
    lines = [line.split("error: ")[-1].strip() for line in done.stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"exit code {done.returncode}"


def _show(what: str) -> list[dict[str, str]]:
    try:
        done = subprocess.run(
            ["scontrol", "show", what, "--oneliner"], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise _NoAnswer(str(e)) from None
    if done.returncode != 0:
        raise _NoAnswer(" ".join(done.stderr.split())[:200] or f"exit code {done.returncode}")
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines() if "=" in line]


def _features(node: Mapping[str, str]) -> set[str]:
    names = f"{node.get('AvailableFeatures', '')},{node.get('ActiveFeatures', '')}".split(",")
    return {n for n in names if n and n != "(null)"}


def _has_features(node: Mapping[str, str], constraint: str) -> bool:
    found = _features(node)
    return any(all(name in found for name in group.split("&")) for group in constraint.split("|"))


def _gpus_of(node: Mapping[str, str], kind: str | None) -> int:
    total = 0
    for found_kind, count in re.findall(r"gpu(?::([a-zA-Z][\w.-]*))?:(\d+)", node.get("Gres", "")):
        if kind is None or kind == found_kind:
            total += int(count)
    return total


# -- as sbatch reads it ------------------------------------------------------------------------------------------------


def _of_script(script: Path) -> dict[str, str]:
    """The #SBATCH lines, which end where the first command begins."""
    try:
        lines = script.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"--script: {script} can't be read: {e.strerror}") from None
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith("#SBATCH"):
            found |= _parse_options(shlex.split(line[len("#SBATCH") :], comments=True))
        elif line.strip() and not line.startswith("#"):
            break
    return found


def _parse_options(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
        elif word.startswith("-") and len(word) > 1:
            name, value = _SHORT.get(word[1], word[1]), word[2:].removeprefix("=")
            has_value = value
        else:
            continue
        if not has_value and words and not words[0].startswith("-"):
            value = words.pop(0)
        found[name] = value
    return found


def time_seconds(text: str) -> int | None:
    """Of minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None for what is no such time (UNLIMITED)."""
    days, has_days, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(p.isdigit() for p in parts) or (has_days and not days.isdigit()) or len(parts) > 3:
        return None
    numbers = [int(p) for p in parts]
    if has_days:
        hours, minutes, seconds = (numbers + [0, 0])[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (numbers + [0])[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _gpu_count(text: str) -> int:
    """Of 2, v100:2, gpu:2, gpu:v100:2, gpu; several kinds by commas."""
    counts = []
    for part in text.split(","):
        last = part.rpartition(":")[2]
        if last.isdigit() and (part.startswith("gpu") or ":" in part or part.isdigit()):
            counts.append(int(last))
        elif part == "gpu" or part.startswith("gpu:"):
            counts.append(1)
    return sum(counts)


def _memory_bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    return int(found[1]) * _UNITS[found[2] or "M"] if found and int(found[1]) else None


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isdigit() else otherwise
