"""What the numerical rooms promise each other, read from their source."""

import ast
from pathlib import Path

import pytest

import fairseq_implicit

ROOMS = ("solvers", "fields", "depth", "networks", "conversion")
FILES = sorted(path for room in ROOMS for path in (Path(fairseq_implicit.__file__).parent / room).rglob("*.py"))
BARE_MASKS = {"padding_mask", "valid", "visible"}


def names_in_signatures(tree):
    """Arguments of all functions, and annotated names of all classes (the arguments of dataclasses)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            yield from (each.arg for each in (*node.posonlyargs, *node.args, *node.kwonlyargs))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def questions(tree):
    """Calls that ask an object whether it has something: ``hasattr(x, name)`` and ``getattr(x, name, default)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "hasattr" or node.func.id == "getattr" and len(node.args) > 2:
                yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_bare_mask_is_handed_on_and_no_capability_is_guessed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not BARE_MASKS & set(names_in_signatures(tree))
    assert not list(questions(tree))


def test_the_rules_themselves():
    tree = ast.parse("def f(x, *, valid=None): ...\nclass A:\n    visible: int\ng = lambda padding_mask: 0")
    assert set(names_in_signatures(tree)) == {"x", *BARE_MASKS}
    tree = ast.parse("hasattr(f, 'rows'); getattr(f, 'layer', None); getattr(f, name)")
    assert len(list(questions(tree))) == 2
