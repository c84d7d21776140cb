"""Where Slurm's programs are: installed, or unpacked from the distribution's own packages into a folder of the project.

Unpacking: see debian_packages.py. Where there is no Debian or Ubuntu, Slurm must be installed.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from debian_packages import Apt, missing_libraries, not_installed, run, unpack

# raised where there is no Slurm and none can be unpacked; the text says why and what to do
from debian_packages import PackagesMissing as SlurmMissing

PROGRAMS = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "sinfo", "squeue", "scontrol", "scancel")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")


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
    """An installed Slurm, else one unpacked into ``folder`` (made there on the first call). Raises SlurmMissing."""
    return _installed() or _unpacked(unpack(folder, PACKAGES, _packages_needed, _finish))


def _installed() -> SlurmBinaries | None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"
    found = {name: shutil.which(name, path=path) for name in PROGRAMS if name != "slurmstepd"}
    if not all(found.values()):
        return None
    return SlurmBinaries({name: Path(p) for name, p in found.items() if p})


# --- unpacking --------------------------------------------------------------------------------------------------------


def _packages_needed(apt: Apt, packages: Sequence[str]) -> list[str]:
    """The packages, every one of Slurm's they depend on, and what of their other dependencies is not installed."""
    cache = ["apt-cache", *apt[2:]]
    depends = run(
        [*cache, "depends", "--recurse", "--no-suggests", "--no-recommends", "--no-conflicts", "--no-breaks"]
        + ["--no-replaces", "--no-enhances", *packages],
        check=False,
    )
    names = set(re.findall(r"^(\w\S*)$", depends.stdout, re.MULTILINE))
    # a part of Slurm that is installed would be left out by the simulation, but plugins must lie in one folder
    slurm = {n for n in names if n.startswith(("slurm", "libslurm", "libmunge", "libhwloc")) and ":" not in n}
    virtual = {n for n in slurm if "Package: " not in run([*cache, "show", n], check=False).stdout}
    return sorted({*not_installed(apt, packages), *(slurm - virtual)})


def _finish(root: Path) -> None:
    _link_plain_names(root)
    programs = [root / "usr/sbin" / name for name in ("slurmctld", "slurmd", "slurmstepd")] + [root / "usr/bin/srun"]
    missing = missing_libraries(programs, _library_path(root)["LD_LIBRARY_PATH"])
    if missing:
        raise SlurmMissing(f"the unpacked Slurm lacks {', '.join(missing)}: apt-get install {' '.join(PACKAGES)}")


def _link_plain_names(root: Path) -> None:
    """Debian calls the programs slurmctld-wlm and so on; under that name slurmd refuses every job with --gres."""
    for folder in ("usr/bin", "usr/sbin"):
        for program in (root / folder).glob("*-wlm"):
            plain = program.with_name(program.name.removesuffix("-wlm"))
            plain.unlink(missing_ok=True)  # an absolute link through /etc/alternatives, if it is there at all
            plain.symlink_to(program.name)


def _unpacked(root: Path) -> SlurmBinaries:
    programs = {}
    for name in PROGRAMS:
        found = [p for p in (root / "usr/sbin" / name, root / "usr/bin" / name) if p.exists()]
        if not found:
            raise SlurmMissing(f"the unpacked Slurm in {root.parent} has no {name}: remove that folder and try again")
        programs[name] = found[0]
    return SlurmBinaries(programs, _plugin_dir(root), _library_path(root))


def _plugin_dir(root: Path) -> Path:
    return next(root.glob("usr/lib/*/slurm-wlm"))


def _library_path(root: Path) -> dict[str, str]:
    plugins = _plugin_dir(root)
    return {"LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}"}
