"""Two machines with sshd and a third from which they are reached, all on this one: namespaces of the Linux kernel.

Each machine has its own network, mounts and (the two with sshd) processes and host name; they share nothing else but
the file system. Nothing outside is changed: sshd and pdsh are unpacked, not installed, and lie over /usr for these
machines alone, as their /etc does; all of it is gone with their processes. Needs root.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import debian_packages
from debian_packages import PackagesMissing, last_line

PACKAGES = ("openssh-server", "pdsh")
HOSTS = ("worker-0", "worker-1")

_MOUNTS = """\
set -e
if [[ -n $programs ]]; then mount -t overlay overlay -o "lowerdir=$programs:/usr" /usr; fi
mount -t overlay overlay -o "lowerdir=$folder/etc:/etc" /etc
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
"""
_LOGIN = """\
ip link add bridge type bridge
ip address add 10.77.0.1/24 dev bridge
ip link set bridge up
echo ready
exec sleep infinity
"""
_WORKER = """\
hostname "$name"
echo ready
read -r _ # until the cable is plugged in
ip address add "$address/24" dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f "$folder/etc/ssh/sshd_config"
"""
_SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
_SSH_CONFIG = """\
Host *
    IdentityFile {folder}/user_key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking no
    LogLevel ERROR
"""


class HostsMissing(Exception):
    """No such machines can be made here; the text says why."""


class TwoHosts:
    """``with TwoHosts(unpacked, folder) as hosts: hosts.start(["bash", "launch/train.sh", ...], cwd=...)``"""

    def __init__(self, programs: Path, folder: Path):
        self.programs, self.folder = programs, folder
        self._machines: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> "TwoHosts":
        if os.geteuid() != 0:
            raise HostsMissing("network namespaces need root")
        for program in ("unshare", "nsenter", "ip", "ssh", "ssh-keygen"):
            if not shutil.which(program):
                raise HostsMissing(f"network namespaces with ssh need the program {program}")
        installed = shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()
        if not installed:
            unpack(self.programs)
        try:
            self._write_etc()
            self._start_machines("" if installed else str(self.programs / "root" / "usr"))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self, command: Sequence[str | Path], cwd: Path, env: Mapping[str, str]) -> "subprocess.Popen[str]":
        """Start a command on the machine from which the two are reached; signals go to the command itself."""
        return subprocess.Popen(
            [*self._on_login(), "env", "-C", str(cwd), *map(str, command)],
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self, words: str, machines: Sequence[str] = HOSTS) -> list[int]:
        """Ids of the processes on these machines, as this one counts them, whose command line holds the words."""
        spaces = {os.readlink(f"/proc/{self._machines[name].pid}/ns/net") for name in machines}
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile
                on_a_machine = entry.name.isdigit() and os.readlink(entry / "ns" / "net") in spaces
                if on_a_machine and words in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """End the machines and all that was started on them."""
        if "login" in self._machines:  # the others have process namespaces, which end with their first process
            for pid in self.processes("", ["login"]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for machine in self._machines.values():
            machine.kill()
            machine.communicate()
        self._machines.clear()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _on_login(self) -> list[str]:
        return ["nsenter", "--target", str(self._machines["login"].pid), "--net", "--mount"]

    def _write_etc(self) -> None:
        etc = self.folder / "etc"
        (etc / "ssh").mkdir(parents=True)
        for key in ("host_key", "user_key"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)])
        home = self.folder / "home"  # what the user's own start-up files would do is no business of a test
        home.mkdir()
        users = f"root:x:0:0::{home}:/bin/bash\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
        files = {
            "passwd": users,
            "shadow": "root:*:19000:0:99999:7:::\n",
            "hosts": "127.0.0.1 localhost\n" + "".join(f"{_address(name)} {name}\n" for name in HOSTS),
            "ssh/sshd_config": _SSHD_CONFIG.format(folder=self.folder),
            "ssh/ssh_config": _SSH_CONFIG.format(folder=self.folder),
        }
        for name, text in files.items():
            (etc / name).write_text(text, encoding="utf-8")

    def _start_machines(self, programs: str) -> None:
        self._start_machine("login", ["--net", "--mount"], _LOGIN, programs)
        own = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        for name in HOSTS:
            self._start_machine(name, own, _WORKER, programs)
        for name in HOSTS:
            machine, cable = self._machines[name], f"to-{name}"
            peer = ["peer", "name", "eth0", "netns", str(machine.pid)]
            _run([*self._on_login(), "ip", "link", "add", cable, "type", "veth", *peer])
            _run([*self._on_login(), "ip", "link", "set", cable, "master", "bridge", "up"])
            assert machine.stdin is not None
            machine.stdin.write("\n")
            machine.stdin.flush()
        deadline = time.monotonic() + 60
        for name in HOSTS:
            while subprocess.run([*self._on_login(), "ssh", name, "true"], capture_output=True, timeout=60).returncode:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{name} has no sshd: {(self.folder / f'{name}.log').read_text()}")
                time.sleep(0.2)

    def _start_machine(self, name: str, namespaces: list[str], script: str, programs: str) -> None:
        log = self.folder / f"{name}.log"
        variables = {"name": name, "address": _address(name), "folder": str(self.folder), "programs": programs}
        with open(log, "wb") as errors:
            machine = subprocess.Popen(
                ["unshare", *namespaces, "--", "bash", "-c", _MOUNTS + script],
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=_end_with_parent,
            )
        self._machines[name] = machine
        assert machine.stdout is not None
        if machine.stdout.readline() != "ready\n":
            machine.wait(timeout=30)
            raise HostsMissing(f"no namespace can be made here: {last_line(log.read_text())}")


def unpack(folder: Path) -> None:
    """PACKAGES and what they need, from the distribution, into folder/root; once."""
    try:
        debian_packages.unpack(folder, PACKAGES)
    except PackagesMissing as e:
        raise HostsMissing(str(e)) from None


def _address(name: str) -> str:
    return {"login": "10.77.0.1", "worker-0": "10.77.0.2", "worker-1": "10.77.0.3"}[name]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
