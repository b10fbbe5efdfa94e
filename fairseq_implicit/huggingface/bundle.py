"""The modules that a family needs, flat, as transformers loads them with a model: without this package.

transformers copies the modules that stand beside a model's weights and follows ``from .name import``, but knows neither
sub-folders nor packages. So ``fairseq_implicit/solvers/theta.py`` becomes ``solvers_theta.py``, and what it imports of
this package is imported from its neighbours.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.huggingface.modeling import auto_classes

_PACKAGE = __name__.partition(".")[0]


def flat_name(module: str) -> str:
    """``solvers_theta`` of ``fairseq_implicit.solvers.theta``."""
    return "_".join(module.split(".")[1:])


def auto_map(config: type[ImplicitBertConfig]) -> dict[str, str]:
    """Where transformers finds a family's classes in a bundled folder: Auto class -> module and class."""
    return {auto: f"{flat_name(config.__module__)}.{name}" for auto, name in auto_classes(config).items()}


def bundle(config: type[ImplicitBertConfig]) -> dict[str, str]:
    """The text of every module that a family imports, directly or not, by the name of its file.

    Raises:
        ImportError: a module imports this package in a way that cannot be made flat.
    """
    found: dict[str, str] = {}
    waiting = [config.__module__]
    while waiting:
        module = waiting.pop()
        if flat_name(module) + ".py" in found:
            continue
        text = _source(module)
        found[flat_name(module) + ".py"] = _flattened(text, module)
        waiting += _imports(text, module)
    return found


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"the module {module} has no file that could be bundled")
    return Path(spec.origin).read_text(encoding="utf-8")


def _imports(text: str, module: str) -> list[str]:
    """The modules of this package that a text imports names from."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == _PACKAGE for alias in node.names):
            raise ImportError(f"{module} imports {_PACKAGE} as a whole: write 'from {_PACKAGE}.… import …'")
        if not isinstance(node, ast.ImportFrom):
            continue
        source = node.module or ""
        if node.level or source == _PACKAGE:
            raise ImportError(f"{module} imports from a package: write 'from {_PACKAGE}.… import …'")
        if source.startswith(f"{_PACKAGE}."):
            spec = importlib.util.find_spec(source)
            for alias in node.names:
                if spec is not None and spec.submodule_search_locations and _is_module(source, alias.name):
                    raise ImportError(f"{module} imports the module {alias.name}: import what is in it")
            found.append(source)
    return found


def _is_module(package: str, name: str) -> bool:
    return importlib.util.find_spec(f"{package}.{name}") is not None


def _flattened(text: str, module: str) -> str:
    pattern = rf"^(\s*)from ({_PACKAGE}(?:\.\w+)+) import"
    flat = re.sub(pattern, lambda found: f"{found[1]}from .{flat_name(found[2])} import", text, flags=re.MULTILINE)
    left = [node for node in ast.walk(ast.parse(flat)) if isinstance(node, ast.ImportFrom) and not node.level]
    if any((node.module or "").split(".")[0] == _PACKAGE for node in left):
        raise ImportError(f"{module} imports {_PACKAGE} in a line that cannot be rewritten")
    return flat
