"""A real Slurm on this machine: one slurmctld, several slurmd that play nodes with two GPUs each, all on loopback.

Started and stopped in about a second each, as any user. The GPUs are /dev/null and /dev/zero: Slurm hands them out and
sets CUDA_VISIBLE_DEVICES; what runs on them is the CPU.
"""

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from binaries import SlurmBinaries

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

_SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=3
KillWait=5
CompleteWait=0
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{plugin_dir}
{nodes}
PartitionName=gpu Nodes=ALL Default=YES DefaultTime=01:00:00 MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=0 State=UP
PartitionName=lowgrace Nodes=ALL PriorityTier=1 GraceTime=8 State=UP
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=OFF State=UP
"""


class SlurmTestbed:
    """``with SlurmTestbed(binaries, folder) as slurm: job = slurm.sbatch("job.sh", cwd=...); slurm.wait(job)``"""

    def __init__(self, binaries: SlurmBinaries, folder: Path, num_nodes: int = 4):
        self.binaries = binaries
        self.folder = folder
        self.nodes = [f"gpu{n:02d}" for n in range(1, num_nodes + 1)]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "SlurmTestbed":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The caller's environment without what a surrounding Slurm job or torchrun left in it, with this cluster's."""
        foreign = re.compile(
            r"SLURM|SBATCH|SRUN|PMI|VLMDIST_|RANK$|WORLD_SIZE$|LOCAL_RANK$|MASTER_|TORCHELASTIC|PYTEST"
        )
        kept = {k: v for k, v in os.environ.items() if not foreign.match(k)}
        links = self.folder / "bin"
        return {
            **kept,
            **self.binaries.environment,
            "SLURM_CONF": str(self.conf),
            "PATH": f"{links}:{kept.get('PATH', '')}",
        }

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = 30) -> None:
        """Start the daemons and wait until every node is idle."""
        self._make_folders()
        self._write_configuration()
        programs = self.binaries.programs
        self._start_daemon("slurmctld", [programs["slurmctld"], "-c", "-D"])
        for node in self.nodes:
            # -d: the unpacked slurmd looks for its slurmstepd where the package would have put it
            stepd = ["-d", programs["slurmstepd"]] if "slurmstepd" in programs else []
            self._start_daemon(f"slurmd.{node}", [programs["slurmd"], "-D", "-N", node, *stepd])
        self._wait_until_idle(timeout_s)

    def stop(self) -> None:
        """End all jobs, then the daemons; nothing of this cluster is left running, whatever state it was in."""
        if any(d.poll() is None for d in self._daemons):
            with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
                self.run("scancel", "--user", str(os.geteuid()), timeout_s=10)
                self._until(lambda: not self.run("squeue", "-h").strip(), 15, lambda: "jobs left")
        for sig, grace_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for daemon in self._daemons:
                if daemon.poll() is None:
                    daemon.send_signal(sig)
            deadline = time.monotonic() + grace_s
            while time.monotonic() < deadline and any(d.poll() is None for d in self._daemons):
                time.sleep(0.05)
        self._daemons.clear()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Every process of this cluster: those that have its slurm.conf in their environment."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def sbatch(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """Submit a job from the folder ``cwd``; returns its id."""
        output = self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        return int(output.strip().split(";")[0])

    def state(self, job: int | str) -> str:
        """RUNNING, COMPLETED, ...: as Slurm calls it. Of an array, one task: "12_3"."""
        return self.facts(job)["JobState"]

    def facts(self, job: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", str(job))))

    def node_names(self, job: int) -> list[str]:
        """The nodes of a job, in order."""
        nodes = re.findall(r" NodeList=(\S+)", self.run("scontrol", "show", "job", "--oneliner", str(job)))
        return self.run("scontrol", "show", "hostnames", nodes[0]).split()

    def wait(self, job: int | str, timeout_s: float = 120) -> str:
        """Wait for the end of a job; returns its last state. TimeoutError with its log where it takes too long."""
        self._until(
            lambda: self.state(job) in ENDED, timeout_s, lambda: f"{self.facts(job)}\n{self.log(job)}", every_s=0.5
        )
        return self.state(job)

    def wait_until(self, condition: Callable[[], bool], job: int | str, timeout_s: float = 60) -> None:
        """Wait for something a job does; TimeoutError with its log where it ends before, or takes too long."""

        def happened() -> bool:
            if condition():
                return True
            if self.state(job) in ENDED and not condition():
                raise AssertionError(f"job {job} is {self.state(job)}\n{self.log(job)}")
            return False

        self._until(happened, timeout_s, lambda: f"job {job} is {self.state(job)}\n{self.log(job)}", every_s=0.3)

    def log(self, job: int | str) -> str:
        file = Path(self.facts(job)["StdOut"])
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else f"({file} does not exist)"

    def run(
        self,
        program: str,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> str:
        """Run one of Slurm's programs; returns its standard output. An error of it is shown as it is."""
        return self._run([self.binaries.programs[program]], arguments, cwd, env, timeout_s)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _run(
        self,
        command: Sequence[str | Path],
        arguments: Sequence[str | Path],
        cwd: Path | None,
        env: Mapping[str, str] | None,
        timeout_s: float,
    ) -> str:
        done = subprocess.run(
            [*map(str, command), *map(str, arguments)],
            cwd=cwd or self.folder,
            env={**self.environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            what = " ".join([Path(command[-1]).name, *map(str, arguments)])
            raise SlurmError(f"{what}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def _make_folders(self) -> None:
        for name in ("ctld", "spool", "log", "bin", *(f"spool/{n}" for n in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name, program in self.binaries.programs.items():
            (self.folder / "bin" / name).symlink_to(program)

    def _wait_until_idle(self, timeout_s: float) -> None:
        idle = f"idle {len(self.nodes)}"
        self._until(lambda: self._sinfo() == idle, timeout_s, lambda: f"nodes are {self._sinfo()!r}\n{self._logs()}")

    def _node_line(self, node: str, host: str, port: int) -> str:
        return f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"

    def _controller(self, host: str) -> str:
        return f"{host}(127.0.0.1)"

    def _write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        ctld_port, *node_ports = free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"{self._node_line(node, host, port)} CPUs=16 RealMemory=256000 Gres=gpu:v100:2 Feature=v100 State=UNKNOWN"
            for node, port in zip(self.nodes, node_ports, strict=True)
        )
        plugin_dir = f"PluginDir={self.binaries.plugin_dir}" if self.binaries.plugin_dir else ""
        text = _SLURM_CONF.format(
            controller=self._controller(host),
            ctld_port=ctld_port,
            user=user_name(),
            folder=self.folder,
            plugin_dir=plugin_dir,
            nodes=nodes,
        )
        self.conf.write_text(text, encoding="utf-8")
        # a GPU needs a File that is a device: with a count alone the node is drained
        gpus = [f"NodeName={n} Name=gpu Type=v100 File={d}\n" for n in self.nodes for d in ("/dev/null", "/dev/zero")]
        (self.folder / "gres.conf").write_text("".join(gpus), encoding="utf-8")
        if self.binaries.version >= (23, 2):
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf-8")

    def _start_daemon(self, name: str, command: Sequence[str | Path]) -> None:
        with open(self.folder / "log" / f"{name}.out", "wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [str(c) for c in command],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )

    def _sinfo(self) -> str:
        try:
            return self.run("sinfo", "-p", "gpu", "-h", "-o", "%T %D", timeout_s=10).strip()
        except (SlurmError, subprocess.TimeoutExpired) as e:
            return str(e)

    def _logs(self) -> str:
        tails = [
            f"--- {f.name}\n{f.read_text(errors='replace')[-2000:]}" for f in sorted((self.folder / "log").iterdir())
        ]
        return "\n".join(tails)

    @staticmethod
    def _until(
        condition: Callable[[], bool], timeout_s: float, complaint: Callable[[], str], every_s: float = 0.1
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s:.0f} s: {complaint()}")
            time.sleep(every_s)


class SlurmError(Exception):
    """One of Slurm's programs failed; its own message."""


def user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def free_ports(count: int) -> list[int]:
    """Ports that are free now, below the range from which the kernel takes those of outgoing connections."""
    found: list[int] = []
    start = 10000 + os.getpid() % 20000
    for port in (*range(start, 32768), *range(10000, start)):
        with socket.socket() as s:
            with contextlib.suppress(OSError):
                s.bind(("127.0.0.1", port))
                found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports")


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def remove(folder: Path) -> None:
    """Remove the folder of a stopped cluster."""
    shutil.rmtree(folder, ignore_errors=True)
