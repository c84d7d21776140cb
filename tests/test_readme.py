"""What the README names is there."""

import re
from pathlib import Path

from vlmdist.cli import _LATER, _parser

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_paths_in_the_readme_exist() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    listed = [line.split()[0] for line in tree.strip().splitlines()]
    linked = re.findall(r"`((?:launch|dsconfigs|shards|slurm|vlmdist|tests)/[\w./-]+)`", README)
    missing = [p for p in [*listed, *linked] if not (REPOSITORY / p).exists()]
    assert missing == []


def test_every_top_level_module_is_in_the_tree() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    places = [p for p in (REPOSITORY / "vlmdist").iterdir() if p.is_dir() or p.suffix == ".py"]
    places = [p for p in places if p.name[0] not in "_." and p.name != "errors.py"]
    missing = [p.name for p in places if f"vlmdist/{p.name}" not in tree]
    assert missing == []


def test_every_command_is_in_the_readme() -> None:
    commands = next(a for a in _parser()._actions if a.dest == "command").choices
    assert commands is not None
    for name in commands:
        assert (f"`{name}`" if name in _LATER else f"`vlmdist {name}") in README, name


def test_the_readme_begins_with_two_commands() -> None:
    block = README.split("```bash")[1].split("```")[0]
    commands = [line.split("#")[0].strip() for line in block.strip().splitlines()]
    assert commands == ["bash launch/demo.sh", "bash launch/test.sh"]
