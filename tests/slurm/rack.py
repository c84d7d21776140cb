"""A real Slurm whose nodes are kept apart as machines are: own network, host name, processes, /tmp, /dev/shm.

Needs root (namespaces). The rack is a network namespace with a bridge, on which slurmctld runs; each node is a set of
namespaces with a cable to it. The folders that tests name are seen by all nodes, as a cluster's shared disk is. No name
resolves but localhost. To kill a node's first process is a power cut: everything on it is gone at once.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from binaries import SlurmBinaries
from testbed import SlurmTestbed

CONTROLLER = "10.77.0.254"
FAST_INTERFACE = "hsn0"
"""A second interface of each node, with an IPv6 address alone."""

_RACK = """\
set -e
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
ip address add {controller}/24 dev br0
ip link add br1 type bridge
ip link set br1 up
echo ready
exec sleep infinity
"""

# $1: host name. Waits on its standard input until its cables are plugged in.
_NODE = """\
set -e
hostname "$1"
mount --make-rprivate /
mount -t proc proc /proc
mount --rbind /tmp /mnt
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
for folder in {shared}; do mkdir -p "$folder"; mount --bind "/mnt/${{folder#/tmp/}}" "$folder"; done
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
echo ready
read -r plugged
ip link set lo up
exec {slurmd}
"""


class Rack(SlurmTestbed):
    """As SlurmTestbed; ``shared``: folders under /tmp that all nodes see, besides the cluster's own."""

    def __init__(self, binaries: SlurmBinaries, folder: Path, shared: Sequence[Path], num_nodes: int = 4):
        super().__init__(binaries, folder, num_nodes)
        self.addresses = {node: f"10.77.0.{n}" for n, node in enumerate(self.nodes, 1)}
        self._shared = [folder, *shared]
        self._first_process: dict[str, int] = {}

    def start(self, timeout_s: float = 60) -> None:
        self._make_folders()
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n", encoding="utf-8")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n", encoding="utf-8")
        self._write_configuration()
        script = _RACK.format(controller=CONTROLLER)
        self._first_process["rack"] = self._start_apart("rack", ["--net"], script)
        slurmctld = self.binaries.programs["slurmctld"]
        self._start_daemon("slurmctld", [*self._in_rack(), slurmctld, "-c", "-D"])
        for node in self.nodes:
            self.start_node(node)
        self._wait_until_idle(timeout_s)

    def start_node(self, node: str) -> None:
        """Switch a node on (again)."""
        n = self.nodes.index(node) + 1
        stepd = f"-d {self.binaries.programs['slurmstepd']}" if "slurmstepd" in self.binaries.programs else ""
        slurmd = f"{self.binaries.programs['slurmd']} -D -N {node} {stepd}"
        script = _NODE.format(shared=" ".join(map(str, self._shared)), folder=self.folder, slurmd=slurmd)
        apart = ["--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child"]
        pid = self._first_process[node] = self._start_apart(node, apart, script, node)
        for bridge, inside, address in (
            ("br0", "eth0", f"{self.addresses[node]}/24"),
            ("br1", FAST_INTERFACE, f"fd77::{n}/64"),
        ):
            cable = f"{inside}-{n}"
            self._ip("link", "add", cable, "type", "veth", "peer", "name", inside, "netns", str(pid))
            self._ip("link", "set", cable, "master", bridge, "up")
            self._ip("address", "add", address, "dev", inside, *(["nodad"] if ":" in address else []), node=node)
            self._ip("link", "set", inside, "up", node=node)
        stdin = self._daemons[-1].stdin
        assert stdin is not None
        stdin.write(b"plugged\n")
        stdin.flush()

    def cut_power(self, node: str) -> None:
        """The node and all that runs on it are gone, without a word on any connection."""
        # the cable first: the kernel would still say goodbye for the processes
        with contextlib.suppress(subprocess.CalledProcessError):
            n = self.nodes.index(node) + 1
            self._ip("link", "delete", f"eth0-{n}")
            self._ip("link", "delete", f"{FAST_INTERFACE}-{n}")
        os.kill(self._first_process[node], signal.SIGKILL)

    def run(
        self,
        program: str,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> str:
        return self._run([*self._in_rack(), self.binaries.programs[program]], arguments, cwd, env, timeout_s)

    def _node_line(self, node: str, host: str, port: int) -> str:
        return f"NodeName={node} NodeHostname={node} NodeAddr={self.addresses[node]} Port={port}"

    def _controller(self, host: str) -> str:
        return f"{host}({CONTROLLER})"

    def _in_rack(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._first_process['rack']}/ns/net"]

    def _ip(self, *arguments: str, node: str = "rack") -> None:
        inside = ["nsenter", f"--net=/proc/{self._first_process[node]}/ns/net"]
        subprocess.run([*inside, "ip", *arguments], check=True, capture_output=True)

    def _start_apart(self, name: str, namespaces: Sequence[str], script: str, *arguments: str) -> int:
        """Start a shell script in new namespaces, wait until it says that it is ready; returns the pid of the shell."""
        inside = self._in_rack() if "rack" in self._first_process else []
        process = subprocess.Popen(
            [*inside, "unshare", *namespaces, "bash", "-c", script, name, *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.folder / "log" / f"{name}.err", "ab"),  # noqa: SIM115 - the child's
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self._daemons.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if line != b"ready\n":
            raise OSError(f"{name} did not start: {(self.folder / 'log' / f'{name}.err').read_text()}")
        if "--fork" not in namespaces:
            return process.pid
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(children[0])


def can_make_racks() -> bool:
    """Whether this user may make namespaces and network cables."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    cable = "unshare --net --uts --mount --pid --fork ip link add a0 type veth peer name a1"
    bridge = "unshare --net ip link add b0 type bridge"
    return all(subprocess.run(c.split(), capture_output=True).returncode == 0 for c in (cable, bridge))


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
