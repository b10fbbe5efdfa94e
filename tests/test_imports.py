"""Imports point one way, from solvers to networks to tasks and from text to corpora: the table below says which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "fairseq_implicit"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE
# What each folder may import of the package, besides itself; the package's own __init__ and __main__ may import all.
ALLOWED = {
    "options": set(),
    "layout": set(),
    "module_list": set(),
    "solvers": {"layout", "module_list", "options"},
    "fields": {"layout", "module_list", "options", "solvers"},
    "depth": {"layout", "module_list", "options", "solvers", "fields"},
    "networks": {"layout", "options", "solvers", "fields", "depth"},
    "families": {"layout", "options", "solvers", "fields", "depth", "networks"},
    "models": {"layout", "options", "solvers", "fields", "depth", "networks", "families", "text", "data", "compat"},
    "huggingface": set("layout options solvers fields depth networks families text conversion new_folder".split()),
    "conversion": {"solvers"},
    "text": set(),
    "data": {"text", "compat"},
    "tasks": {"machine", "solvers", "fields", "depth", "models", "text", "data", "criterions", "compat"},
    "criterions": {"solvers", "fields", "depth", "networks", "models", "data", "compat"},
    "optim": {"compat"},
    "corpora": {"text", "folder_lock"},
    "evaluation": {"options", "solvers", "fields", "depth", "models", "text", "data", "compat", "huggingface"},
    "commands": set(
        "options machine open_mp solvers depth conversion models text data compat corpora".split()
        + ["evaluation", "huggingface", "new_folder"]
    ),
    "compat": {"networks", "folder_lock", "machine"},
    "folder_lock": set(),
    "machine": set(),
    "new_folder": set(),
    "open_mp": set(),
}
WITHOUT_FAIRSEQ = set(ALLOWED) - {"models", "data", "tasks", "criterions", "optim", "evaluation", "commands", "compat"}
# What a folder may import beside the standard library. The optional back ends are for adaptive steps.
ONLY = {
    "options": set(),
    "layout": {"torch"},
    "module_list": {"torch"},
    "solvers": {"torch", "torchdyn", "torchdiffeq"},
    "fields": {"torch"},
    "depth": {"torch"},
    "networks": {"torch"},
    "families": {"torch"},
    "conversion": {"torch", "safetensors"},
    "text": {"numpy", "sentencepiece", "tokenizers"},
    "huggingface": {"torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "huggingface_hub"},
    "folder_lock": set(),
    "machine": {"torch"},
    "new_folder": set(),
    "open_mp": set(),
}
FAIRSEQ = ("fairseq", "fairseq_cli", "hydra", "omegaconf")
FILES = sorted(ROOT.rglob("*.py"))


def folder_of(path):
    """``solvers`` for solvers/tableau.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_modules(path):
    """Dotted names of everything a file imports, wherever in the file it does so."""
    package = (PACKAGE, *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # ``from fairseq_implicit import solvers`` names the folder in the alias.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offence(folder, module):
    """Why ``folder`` must not import ``module``, or ``None``."""
    parts = module.split(".")
    if parts[0] == PACKAGE and len(parts) > 1:
        if parts[1] != folder and parts[1] not in ALLOWED[folder]:
            return f"{folder} must not import {PACKAGE}.{parts[1]}"
    elif parts[0] == "fairseq" and folder in WITHOUT_FAIRSEQ:
        return f"{folder} must not import fairseq"
    elif folder in ONLY and parts[0] not in ONLY[folder] | set(sys.stdlib_module_names) | {PACKAGE}:
        return f"{folder} must not import {parts[0]}"
    return None


def test_the_package_was_found():
    assert {"layout", "solvers", "fields", "depth"} <= {folder_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    folder = folder_of(path)
    if folder in ("__init__", "__main__"):
        return
    assert folder in ALLOWED, f"{folder} has no place in the order of imports: give it one in this test"
    assert [found for module in imported_modules(path) if (found := offence(folder, module))] == []


def test_what_needs_no_fairseq_loads_without_it_and_soon():
    """Every module left of the models, in a process that has neither fairseq nor transformers."""
    count, seconds = import_without(WITHOUT_FAIRSEQ - {"huggingface"}, *FAIRSEQ, "transformers")
    assert count > 80 and seconds < 1.5


def test_the_transformers_face_loads_without_fairseq():
    pytest.importorskip("transformers", reason="transformers is not installed")
    count, _ = import_without({"huggingface"}, *FAIRSEQ)
    assert count > 1


def import_without(folders, *absent):
    """How many modules these folders have, and how long importing them took in a process without some packages."""
    rooms = [path for path in FILES if folder_of(path) in folders]
    names = [".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)) for path in rooms]
    code = """
import importlib, sys, time
for absent in sys.argv[1].split():
    sys.modules[absent] = None
import torch
started = time.process_time()
for name in sys.argv[2:]:
    importlib.import_module(name.removesuffix(".__init__"))
print(time.process_time() - started)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, " ".join(absent), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return len(names), float(done.stdout)


def test_objectives_are_numpy_alone():
    modules = {module for path in (ROOT / "data" / "objectives").glob("*.py") for module in imported_modules(path)}
    assert {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) == {PACKAGE, "numpy"}


@pytest.mark.parametrize(
    "folder, module, refused",
    [
        ("layout", "fairseq_implicit.solvers.status", True),
        ("solvers", "fairseq_implicit.fields.mixers.attention", True),
        ("solvers", "fairseq_implicit.solvers.status.SolveResult", False),
        ("solvers", "scipy.linalg", True),
        ("solvers", "torch.nn", False),
        ("fields", "fairseq.utils", True),
        ("fields", "fairseq_implicit.depth.stack", True),
        ("depth", "fairseq_implicit.models.bert", True),
        ("networks", "fairseq.modules", True),
        ("networks", "transformers", True),
        ("huggingface", "transformers.AutoModel", False),
        ("huggingface", "fairseq.models", True),
        ("huggingface", "fairseq_implicit.models.ode_bert", True),
        ("networks", "fairseq_implicit.models.config", True),
        ("families", "fairseq_implicit.models.config", True),
        ("models", "fairseq_implicit.networks.encoder", False),
        ("conversion", "fairseq_implicit.models.ode_bert", True),
        ("models", "fairseq.models", False),
        ("models", "fairseq_implicit.tasks", True),
        ("corpora", "fairseq_implicit.data.blocks", True),
        ("corpora", "fairseq_implicit.text.token_files.MappedTokens", False),
        ("text", "fairseq_implicit.corpora.durable", True),
        ("text", "torch", True),
    ],
)
def test_the_rule_itself(folder, module, refused):
    assert (offence(folder, module) is not None) == refused
