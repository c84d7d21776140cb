"""What the READMEs name is there, and what they quote is said."""

import ast
import re
from pathlib import Path

import pytest

from vlmdist.cli import _parser

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
READMES = ["README.md", "shards/README.md", "dsconfigs/README.md", "slurm/README.md", "tests/README.md"]
TREE = README.split("## Where things are")[1].split("```")[1]


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", READMES)
def test_paths_exist(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:launch|dsconfigs|shards|slurm|vlmdist|tests)/[\w./-]+)`", text)
    # run as `bash slurm/submit.sh ...`
    named += re.findall(r"(?:bash|python|sbatch) (?:--\S+ )*((?:launch|shards|slurm)/[\w./-]+\.(?:sh|py))", text)
    named = [p for p in named if p != "slurm/cluster.env"]  # which the user makes
    assert [p for p in named if not (REPOSITORY / p).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    file = REPOSITORY / name
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(file: Path) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, punctuation gone, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tree_is_true() -> None:
    listed = [line.split()[0] for line in TREE.strip().splitlines()]
    assert [p for p in listed if not (REPOSITORY / p).exists()] == []


def test_the_tree_is_whole() -> None:
    top = {Path(name).parts[0] for name in READMES if "/" in name} | {"setup.py", "launch"}
    packages = {f"vlmdist/{p.name}" for p in (REPOSITORY / "vlmdist").iterdir() if p.is_dir() or p.suffix == ".py"}
    left_out = {p for p in packages if p.split("/")[1][0] in "_."} | {"vlmdist/errors.py"}
    assert [p for p in sorted(top | packages - left_out) if not re.search(rf"^{re.escape(p)}[/ ]", TREE, re.M)] == []


def test_every_command_is_in_the_readme() -> None:
    commands = next(a for a in _parser()._actions if a.dest == "command").choices
    assert commands is not None
    assert [name for name in commands if f"| `vlmdist {name}" not in section("Commands")] == []


def test_every_extra_can_be_installed() -> None:
    """``pip install 'vlmdist[NAME]'``, in the READMEs and in messages."""
    extras = (REPOSITORY / "setup.py").read_text(encoding="utf-8").split("extras_require")[1].split("entry_points")[0]
    offered = set(re.findall(r'^ +"([\w-]+)": \[', extras, re.M))
    texts = [(REPOSITORY / name).read_text(encoding="utf-8") for name in READMES] + SAID
    named = {name for text in texts for name in re.findall(r"vlmdist\[([\w-]+)\]", text)}
    assert named <= offered


def test_the_first_block_is_two_commands() -> None:
    block = README.split("```bash")[1].split("```")[0]
    commands = [line.split("#")[0].strip() for line in block.strip().splitlines()]
    assert commands == ["bash launch/demo.sh", "bash launch/test.sh"]


def test_every_shipped_script_is_told_of() -> None:
    cluster = (REPOSITORY / "slurm" / "README.md").read_text(encoding="utf-8")
    scripts = {p.name for p in (REPOSITORY / "slurm").glob("*.sh")}
    recipes = {name for name in scripts if name.startswith("train_")}
    assert [name for name in sorted(scripts - recipes) if f"`{name}" not in cluster] == []
    assert [name for name in sorted(recipes) if f"`slurm/{name}`" not in section("The four recipes")] == []
    corpora = (REPOSITORY / "shards" / "README.md").read_text(encoding="utf-8")
    sources = [p for p in (REPOSITORY / "shards").glob("*.py") if 'if __name__ == "__main__"' in p.read_text()]
    assert [p.name for p in sources if f"`{p.name} " not in corpora] == []


QUOTED = re.findall(
    r"`([^`]+)`",
    "\n".join(
        row.split("|")[1] for row in section("Troubleshooting, by message").splitlines() if row.startswith("| `")
    ),
)


@pytest.mark.parametrize("message", QUOTED)
def test_the_code_says_what_the_readme_quotes(message: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    pattern = re.compile(".*?".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in SAID), f"nothing says {message!r} any more"


def test_some_twenty_messages_are_quoted() -> None:
    assert len(QUOTED) >= 20


def texts_in(file: Path) -> list[str]:
    """Every string of a Python file as it is put together, with "…" for what is filled in; a shell script as it is."""
    source = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return source.splitlines()
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


SAID = [
    text
    for folder in ("vlmdist", "launch", "slurm")
    for file in sorted((REPOSITORY / folder).rglob("*"))
    if file.suffix in (".py", ".sh")
    for text in texts_in(file)
]
