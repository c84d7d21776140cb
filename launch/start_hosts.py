"""Start ranks on several machines with DeepSpeed's launcher, and end as they end.

    python launch/start_hosts.py HOSTFILE train RUN.yaml [section.field=value ...]

HOSTFILE is DeepSpeed's: a line `HOST slots=N` for each machine, N ranks on it; # begins a comment. DeepSpeed reaches
the hosts by pdsh and ssh without a password; this folder, Python and vlmdist must have the same paths on all of them.
MASTER_ADDR and MASTER_PORT choose the rendezvous. FORWARDED_ENVIRONMENT goes along, and what DeepSpeed's own file
.deepspeed_env says (`NAME=value` lines, in the home or the current folder).

Four things are added to DeepSpeed's launcher:

- Hosts that can't be reached, or lack the folder or vlmdist, are named before anything starts.
- SIGUSR1, SIGTERM and SIGHUP (a terminal that is closed) go to every rank as SIGUSR1, by a second pdsh, until all have
  saved and ended; Ctrl-C as SIGINT. DeepSpeed would end its ssh connections and every launcher on the hosts, also those
  of other runs.
- Where the ranks of one host end badly, those of the others are asked to end: one that still waits for the lost ones
  to come would wait for half an hour.
- The exit code is that of the host that failed first, where pdsh gives the largest.
"""

import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from start_ranks import explain

STOPPED_WITH_CHECKPOINT = 85
RESEND_S = 5
"""A rank that is only just starting can't hear a signal yet."""
SIGNAL_TIMEOUT_S = 60
CHECK_TIMEOUT_S = 300
FORWARDED_ENVIRONMENT = ("OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "NCCL_", "GLOO_")
"""Beginnings of names. No secrets: the values stand in the command line of the remote shell."""
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15"

_NO_FOLDER, _NO_VLMDIST, _NO_SSH = 3, 4, 255
# DeepSpeed's --quiet does not reach the launchers on the hosts, which tell of every process they start and end
_LAUNCHER_CHATTER = re.compile(rb"\[[^]]+\] \[[A-Z]+\] \[(launch|real_accelerator)\.py:")


class HostsError(Exception):
    """Wrong hostfile, or hosts that can't run ranks: the user can mend it. The text has one problem a line."""


@dataclass(frozen=True)
class HostEnded:
    """pdsh's last word on a host where not all went well."""

    host: str
    code: int
    """Exit code; negative: the signal that ended ssh."""


def main(argv: list[str]) -> int:
    if len(argv) < 2:
        print("usage: python launch/start_hosts.py HOSTFILE ARGUMENTS OF VLMDIST...", file=sys.stderr)
        return 2
    try:
        hosts = read_hostfile(Path(argv[0]))
        if not shutil.which("pdsh"):
            raise HostsError("DeepSpeed reaches the hosts by pdsh, which is not installed here: apt-get install pdsh")
        check_hosts(hosts)
    except HostsError as e:
        print("\n".join(f"error: {problem}" for problem in str(e).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return _Ranks(hosts, argv[1:], Path(argv[0])).run()


# --- the hosts --------------------------------------------------------------------------------------------------------


def read_hostfile(file: Path) -> list[str]:
    """Names of the hosts, in rank order; HostsError with every line that DeepSpeed could not use."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise HostsError(f"hostfile {file}: {getattr(e, 'strerror', None) or 'is no text'}") from None
    hosts: list[str] = []
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        # pdsh would take brackets and commas for lists of hosts, a leading -, ^ or / for a filter
        match = re.fullmatch(r"(\w[\w.@-]*)\s+slots=([1-9]\d*)(\s+#.*)?", text)
        if match is None:
            problems.append(f"{file}, line {number}: {text!r} is not of the form `HOST slots=N`, N ranks on that host")
        elif match[1] in hosts:
            problems.append(f"{file}, line {number}: {match[1]} stands there twice; one line with all its slots")
        else:
            hosts.append(match[1])
    if not hosts and not problems:
        problems.append(f"{file} names no host; a line is `HOST slots=N`, N ranks on that host")
    if problems:
        raise HostsError("\n".join(problems))
    return hosts


def check_hosts(hosts: Sequence[str]) -> None:
    """HostsError with all hosts that can't be reached, or lack this folder or vlmdist."""
    folder = os.getcwd()
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vlmdist') is None)"
    command = f"cd {shlex.quote(folder)} || exit {_NO_FOLDER}; "
    command += f"{shlex.quote(sys.executable)} -c {shlex.quote(found)} || exit {_NO_VLMDIST}"
    try:
        done = subprocess.run(
            _pdsh(hosts, command),
            env=_pdsh_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise HostsError(f"not all of {', '.join(hosts)} answered over ssh within {CHECK_TIMEOUT_S} s") from None
    why = {
        _NO_FOLDER: f"has no folder {folder}: the hosts share the run file, data and output under the same paths",
        _NO_VLMDIST: f"can't import vlmdist with {sys.executable}: install it there too, under the same path",
        _NO_SSH: "can't be reached by ssh without a password: try `ssh -o BatchMode=yes HOST true`",
    }
    ended = [e for e in map(_host_ended, done.stderr.splitlines()) if e]
    problems = [f"{e.host} {why.get(e.code, f'ended the check with {e.code}')}" for e in ended]
    if not problems and done.returncode:
        problems = done.stderr.splitlines() or [f"pdsh ended with {done.returncode}"]
    if problems:
        raise HostsError("\n".join(problems))


def _pdsh(hosts: Sequence[str], command: str) -> list[str]:
    return ["pdsh", "-S", "-w", ",".join(hosts), command.replace("%", "%%")]


def _pdsh_environment() -> dict[str, str]:
    options = f"{SSH_OPTIONS} {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
    return {**os.environ, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": options}


def _host_ended(line: str) -> HostEnded | None:
    """What pdsh says where a host's command ended with another code than 0."""
    match = re.search(r"pdsh@\S+: (\S+): \S+ (exited with exit code|killed by signal) (\d+)\s*$", line)
    if match is None:
        return None
    return HostEnded(match[1], int(match[3]) if match[2].startswith("exited") else -int(match[3]))


# --- the ranks --------------------------------------------------------------------------------------------------------


class _Ranks:
    def __init__(self, hosts: Sequence[str], arguments: Sequence[str], hostfile: Path):
        self.hosts, self.arguments, self.hostfile = hosts, arguments, hostfile
        # below 32768, where the kernel hands out ports for connections; two runs on the same hosts keep apart
        self.port = int(os.environ.get("MASTER_PORT") or random.randrange(12000, 32000))
        self.events: queue.SimpleQueue[HostEnded | signal.Signals | None] = queue.SimpleQueue()
        """What the main thread waits for; None: everything has ended."""
        self.interrupted = False

    def run(self) -> int:
        """Start the ranks, pass signals on, and return the exit code once all have ended."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda received, frame: self.events.put(signal.Signals(received)))
        with tempfile.TemporaryDirectory(prefix="vlmdist-hosts-") as folder:
            environment_file = Path(folder) / "environment"
            environment_file.write_text(environment_lines(), encoding="utf-8")
            launcher = subprocess.Popen(
                self._command(),
                env={**_pdsh_environment(), "DS_ENV_FILE": str(environment_file)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl-C would end pdsh and leave the ranks on their hosts
            )
            output = threading.Thread(target=self._pass_on_output, args=(launcher.stdout,), daemon=True)
            errors = threading.Thread(target=self._pass_on_errors, args=(launcher.stderr,), daemon=True)
            output.start()
            errors.start()
            ended = self._until_the_end()
            output.join()
            return self._exit_code(ended, launcher.wait())

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(self.hostfile), "--quiet"]
        # DeepSpeed would start the ranks of a hostfile with one host here, whichever host it is
        command += ["--force_multi", "--no_ssh_check", "--launcher_args=-N", f"--master_port={self.port}"]
        if os.environ.get("MASTER_ADDR"):
            command.append(f"--master_addr={os.environ['MASTER_ADDR']}")
        return [*command, "--no_local_rank", "--module", "vlmdist", *map(quote_argument, self.arguments)]

    def _until_the_end(self) -> list[HostEnded]:
        """The hosts that ended badly, in the order in which they did."""
        ended: list[HostEnded] = []
        sending: signal.Signals | None = None
        while True:
            try:
                event = self.events.get(timeout=RESEND_S if sending else None)
            except queue.Empty:
                event = sending
            if event is None:
                return ended
            if isinstance(event, HostEnded):
                ended.append(event)
                sending = sending or signal.SIGUSR1  # but not at once: mostly the others end by themselves
            else:
                self.interrupted = self.interrupted or event is signal.SIGINT
                sending = signal.SIGINT if self.interrupted else signal.SIGUSR1
                self._signal_ranks(sending)

    def _signal_ranks(self, number: signal.Signals) -> None:
        code = Path(__file__).with_name("signal_ranks.py").read_text(encoding="utf-8")
        command = shlex.join([sys.executable, "-c", code, str(self.port), number.name])
        try:
            subprocess.run(
                _pdsh(self.hosts, command),
                env=_pdsh_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,  # a host that has gone is no news
                timeout=SIGNAL_TIMEOUT_S,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            pass  # the next one follows

    def _exit_code(self, ended: Sequence[HostEnded], launcher_code: int) -> int:
        if self.interrupted:
            return 130
        if not ended:
            return launcher_code
        first = next((e for e in ended if e.code != STOPPED_WITH_CHECKPOINT), ended[0])
        if first.code == _NO_SSH or first.code < 0:
            print(f"error: the connection to {first.host} was lost; ranks may still run there", file=sys.stderr)
            return 1
        # DeepSpeed's launcher ends with the negative code of a rank that a signal ended
        return explain(first.code - 256 if first.code > 192 else first.code, f"a rank on {first.host}")

    def _pass_on_output(self, stream: IO[bytes]) -> None:
        for line in stream:
            if not _LAUNCHER_CHATTER.match(line):
                _write(1, line)

    def _pass_on_errors(self, stream: IO[bytes]) -> None:
        for line in stream:
            event = _host_ended(line.decode(errors="replace"))
            if event is not None:
                self.events.put(event)
            else:
                _write(2, line)
        self.events.put(None)


def _write(descriptor: int, line: bytes) -> None:
    try:
        os.write(descriptor, line)
    except OSError:
        pass  # who read it has gone (`| head`, a closed terminal); the ranks go on


def quote_argument(argument: str) -> str:
    """As DeepSpeed must get an argument so that, through pdsh and the remote shell, vlmdist gets it as it is."""
    argument = argument.replace("%", "%%")  # pdsh: %h is the host
    if " " not in argument:
        return shlex.quote(argument)
    # DeepSpeed puts it in double quotes and escapes those inside, nothing else
    return re.sub(r"[\\$`]", r"\\\g<0>", argument)


def environment_lines() -> str:
    """FORWARDED_ENVIRONMENT and the user's .deepspeed_env files as one such file."""
    lines = []
    for name, value in sorted(os.environ.items()):
        if name.startswith(FORWARDED_ENVIRONMENT) and value and "\n" not in value:
            # DeepSpeed puts a value with such characters in double quotes
            escaped = re.sub(r'[\\$`"]', r"\\\g<0>", value)
            lines.append(f"{name}={escaped.replace('%', '%%')}")
    for folder in (Path.home(), Path.cwd()):
        file = folder / ".deepspeed_env"
        if file.is_file():
            lines += [line for line in file.read_text(encoding="utf-8").splitlines() if "=" in line]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
