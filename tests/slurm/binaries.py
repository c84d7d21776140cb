"""Where Slurm's programs are: installed, or unpacked from the distribution's own packages into a folder of the project.

Unpacking needs no root and changes nothing on the system: apt works on private lists and a private cache, ``dpkg -x``
writes files only. Works on Debian and Ubuntu; elsewhere Slurm must be installed.
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "sinfo", "squeue", "scontrol", "scancel")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
_DONE = "unpacked"


class SlurmMissing(Exception):
    """There is no Slurm and none can be unpacked; the text says why and what to do."""


@dataclass(frozen=True)
class SlurmBinaries:
    programs: dict[str, Path]
    plugin_dir: Path | None = None
    """PluginDir of slurm.conf; None for an installed Slurm, which knows its own."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the programs need in their environment."""

    @property
    def version(self) -> tuple[int, ...]:
        run = subprocess.run(
            [self.programs["slurmd"], "-V"],  # the only one that needs no slurm.conf for it
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return tuple(int(n) for n in re.findall(r"\d+", run.stdout)[:3])


def find_slurm(folder: Path) -> SlurmBinaries:
    """An installed Slurm, else one unpacked into ``folder`` (made there on the first call)."""
    installed = _installed()
    if installed is not None:
        return installed
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise SlurmMissing(
            "no Slurm here, and no apt to unpack it with: install Slurm (slurmctld, slurmd, srun, sbatch)"
        )
    with _locked(folder):
        if not (folder / _DONE).is_file():
            _unpack(folder)
    return _unpacked(folder)


def _installed() -> SlurmBinaries | None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"
    found = {name: shutil.which(name, path=path) for name in PROGRAMS if name != "slurmstepd"}
    if not all(found.values()):
        return None
    return SlurmBinaries({name: Path(p) for name, p in found.items() if p})


# --- unpacking --------------------------------------------------------------------------------------------------------


def _packages_needed(apt: Sequence[str]) -> list[str]:
    """PACKAGES, every package of Slurm's they depend on, and what of their other dependencies is not installed."""
    cache = ["apt-cache", *apt[2:]]
    simulated = _run([*apt, "--simulate", "--no-install-recommends", "install", *PACKAGES], check=False)
    wanted = set(re.findall(r"^Inst (\S+)", simulated.stdout, re.MULTILINE))
    depends = _run(
        [*cache, "depends", "--recurse", "--no-suggests", "--no-recommends", "--no-conflicts", "--no-breaks"]
        + ["--no-replaces", "--no-enhances", *PACKAGES],
        check=False,
    )
    names = set(re.findall(r"^(\w\S*)$", depends.stdout, re.MULTILINE))
    # a part of Slurm that is installed would be left out by the simulation, but plugins must lie in one folder
    slurm = {n for n in names if n.startswith(("slurm", "libslurm", "libmunge", "libhwloc")) and ":" not in n}
    virtual = {n for n in slurm if "Package: " not in _run([*cache, "show", n], check=False).stdout}
    return sorted({*PACKAGES, *wanted, *(slurm - virtual)})


def _finish(root: Path) -> None:
    _link_plain_names(root)
    programs = [root / "usr/sbin" / name for name in ("slurmctld", "slurmd", "slurmstepd")] + [root / "usr/bin/srun"]
    missing = missing_libraries(programs, _library_path(root)["LD_LIBRARY_PATH"])
    if missing:
        raise PackagesMissing(f"the unpacked Slurm lacks {', '.join(missing)}: apt-get install {' '.join(PACKAGES)}")


def _link_plain_names(root: Path) -> None:
    """Debian calls the programs slurmctld-wlm and so on; under that name slurmd refuses every job with --gres."""
    for folder in ("usr/bin", "usr/sbin"):
        for program in (root / folder).glob("*-wlm"):
            plain = program.with_name(program.name.removesuffix("-wlm"))
            plain.unlink(missing_ok=True)  # an absolute link through /etc/alternatives, if it is there at all
            plain.symlink_to(program.name)


def _unpacked(folder: Path) -> SlurmBinaries:
    root = folder / "root"
    programs = {}
    for name in PROGRAMS:
        found = [p for p in (root / "usr/sbin" / name, root / "usr/bin" / name) if p.exists()]
        if not found:
            raise SlurmMissing(f"the unpacked Slurm in {folder} has no {name}: remove that folder and try again")
        programs[name] = found[0]
    return SlurmBinaries(programs, _plugin_dir(root), _library_path(root))


def _plugin_dir(root: Path) -> Path:
    return next(root.glob("usr/lib/*/slurm-wlm"))


def _library_path(root: Path) -> dict[str, str]:
    plugins = _plugin_dir(root)
    return {"LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}"}
