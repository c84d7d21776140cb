"""What a reader may count on in docstrings: they are there, and name errors and shapes.

Self-evident needs no words: a name that says all of its one or two statements, fields with docstrings of their own, a
method that a documented base has.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = {p.relative_to(REPOSITORY): ast.parse(p.read_text()) for p in sorted((REPOSITORY / "vlmdist").rglob("*.py"))}
FOR_USERS = ("UserError", "RunFailed", "StopRequested", "BadSample")
ARRAYS = ("torch.Tensor", "np.ndarray")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Public:
    """A class or function whose name, and those around it, have no leading underscore."""

    where: str
    node: ast.ClassDef | Function
    owner: ast.ClassDef | None

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def docstring_and_class(self) -> str:
        return f"{self.docstring}\n{ast.get_docstring(self.owner) or ''}" if self.owner else self.docstring


def public_parts(path: Path, body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[Public]:
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            name = f"{owner.name}.{node.name}" if owner else node.name
            yield Public(f"{path}:{node.lineno} {name}", node, owner)
            if isinstance(node, ast.ClassDef):
                yield from public_parts(path, node.body, node)


PUBLIC = [part for path, tree in MODULES.items() for part in public_parts(path, tree.body)]
CLASSES = {part.node.name: part.node for part in PUBLIC if isinstance(part.node, ast.ClassDef)}


def says_itself(part: Public) -> bool:
    if isinstance(part.node, ast.ClassDef):
        return holds_documented_fields(part.node)
    statements = [s for s in part.node.body if not isinstance(s, ast.Assert)]
    short = len(statements) <= 2 and part.node.end_lineno - statements[0].lineno < 5  # type: ignore[operator]
    return short or (part.owner is not None and is_told_in_a_base(part.owner, part.node.name))


def holds_documented_fields(node: ast.ClassDef) -> bool:
    """Of a dataclass or a section of the run file: the docstrings under its fields say it."""
    fields = [s for s in node.body if isinstance(s, ast.AnnAssign)]
    told = [s for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
    return bool(fields) and (bool(told) or len(fields) <= 2)


def is_told_in_a_base(owner: ast.ClassDef, method: str) -> bool:
    for base in owner.bases:
        found = CLASSES.get(ast.unparse(base).split(".")[-1].split("[")[0])
        if found is None:
            continue
        for node in found.body:
            if isinstance(node, Function) and node.name == method and ast.get_docstring(node):
                return True
        if is_told_in_a_base(found, method):
            return True
    return False


@pytest.mark.parametrize("path", [p for p, tree in MODULES.items() if tree.body], ids=str)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(MODULES[path])


def test_public_names_are_explained() -> None:
    assert [part.where for part in PUBLIC if not part.docstring and not says_itself(part)] == []


def test_errors_for_users_are_named() -> None:
    """Of what the function itself raises, in its own docstring or its class's."""
    unnamed = []
    for part in PUBLIC:
        if isinstance(part.node, ast.ClassDef):
            continue
        unnamed += [f"{part.where}: {e}" for e in sorted(raised(part.node)) if e not in part.docstring_and_class]
    assert unnamed == []


def raised(node: Function) -> set[str]:
    calls = [s.exc for s in ast.walk(node) if isinstance(s, ast.Raise) and isinstance(s.exc, ast.Call)]
    return {ast.unparse(call.func) for call in calls} & set(FOR_USERS)


SHAPE = re.compile(r"\[|shape|scalar|bytes as they are|any number|each element|every element")


def test_tensors_have_their_shape_told() -> None:
    """``[B, T]``, or in words, in the docstring of the function or of its class."""
    shapeless = []
    for part in PUBLIC:
        if isinstance(part.node, ast.ClassDef) or part.node.name == "forward":
            continue
        annotations = [a.annotation for a in part.node.args.args + part.node.args.kwonlyargs] + [part.node.returns]
        signature = [ast.unparse(a).strip("'\"") for a in annotations if a is not None]
        if set(signature) & set(ARRAYS) and not says_itself(part) and not SHAPE.search(part.docstring_and_class):
            shapeless.append(part.where)
    assert shapeless == []
