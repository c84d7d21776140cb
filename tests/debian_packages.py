"""Programs that tests need, unpacked from the distribution's own packages into a folder of the project.

Needs no root and changes nothing on the system: apt works on private lists and a private cache, ``dpkg -x`` writes
files only. Works on Debian and Ubuntu; elsewhere the programs must be installed.
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_DONE = "unpacked"

Apt = Sequence[str]
"""apt-get with its options: what a subcommand is appended to."""


class PackagesMissing(Exception):
    """The packages can't be unpacked here; the text says why and what to do."""


def not_installed(apt: Apt, packages: Sequence[str]) -> list[str]:
    """The packages and what they depend on and is not installed here."""
    simulated = run([*apt, "--simulate", "--no-install-recommends", "install", *packages], check=False)
    return sorted({*packages, *re.findall(r"^Inst (\S+)", simulated.stdout, re.MULTILINE)})


def unpack(
    folder: Path,
    packages: Sequence[str],
    choose: Callable[[Apt, Sequence[str]], list[str]] = not_installed,
    finish: Callable[[Path], None] = lambda root: None,
) -> Path:
    """The root folder of the unpacked packages, made in ``folder`` on the first call.

    choose: all packages that are needed for ``packages``. finish: mends and checks the root once it is there. Raises
    PackagesMissing, as ``finish`` may.
    """
    names = " ".join(packages)
    with locked(folder):
        if not (folder / _DONE).is_file():
            if not shutil.which("apt-get") or not shutil.which("dpkg"):
                raise PackagesMissing(f"no apt here to unpack {names} with: install what holds these programs")
            shutil.rmtree(folder, ignore_errors=True)
            apt = private_apt(folder / "apt")
            run([*apt, "update"], check=False)  # a source that can't be reached is no matter if the packages are found
            chosen = choose(apt, packages)
            root = _download_and_unpack(folder, apt, chosen, names)
            finish(root)
            shutil.rmtree(folder / "apt")
            (folder / _DONE).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return folder / "root"


def missing_libraries(files: Sequence[Path], library_path: str) -> list[str]:
    """Names of shared libraries that the programs would not find with this LD_LIBRARY_PATH."""
    env = {**os.environ, "LD_LIBRARY_PATH": library_path}
    output = "".join(subprocess.run(["ldd", f], env=env, capture_output=True, text=True).stdout for f in files)
    return sorted(set(re.findall(r"(\S+) => not found", output)))


def private_apt(state: Path) -> list[str]:
    """apt-get with lists and caches under ``state``: needs no root and no lists on the system, takes no lock of it."""
    lists, cache = state / "lists", state / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    options = {
        "Dir::State": state,
        "Dir::State::Lists": lists,
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::State::extended_states": state / "extended_states",
        "Dir::Cache": cache,
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",  # root's downloads go into this folder, which the user _apt may not enter
        "APT::Update::Post-Invoke::": "true",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
    }
    return ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two test runs at once must not unpack into the same folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / (folder.name + ".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except PermissionError as e:
        raise PackagesMissing(f"{e.filename} can't be written, where programs for the tests are unpacked") from None


def run(command: Sequence[str], check: bool = True, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, check=check, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def _download_and_unpack(folder: Path, apt: Apt, packages: Sequence[str], names: str) -> Path:
    root, debs = folder / "root", folder / "debs"
    root.mkdir(parents=True)
    debs.mkdir()
    try:
        run([*apt, "download", *packages], cwd=debs)
    except subprocess.CalledProcessError as e:
        raise PackagesMissing(
            f"{names} could not be downloaded ({last_line(e.stderr)}): is there a network? "
            f"Or install them: apt-get install {names}"
        ) from None
    except subprocess.TimeoutExpired:
        raise PackagesMissing(f"{names} could not be downloaded in ten minutes: apt-get install {names}") from None
    for deb in sorted(debs.glob("*.deb")):
        run(["dpkg", "-x", str(deb), str(root)])
    shutil.rmtree(debs)
    return root
