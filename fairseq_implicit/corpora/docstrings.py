"""Real English that every machine of this project holds: the documentation strings of installed packages.

Sources are parsed, never imported. One source file is one document; examples, tables and signatures are left out, so
that what stays is prose, and a paragraph that has occurred before is, too.
"""

import ast
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.records import Document
from fairseq_implicit.corpora.workers import advance, run_tasks

# Third-party packages inside the library folder, and folders whose strings are test data rather than documentation.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "include"}

_TOGETHER = 32  # files that a process parses before it is given others

ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`~?([^`<]*)(?:<[^`]*>)?`")
CODE_SPAN = re.compile(r"``?([^`]+)``?_?")
BOLD = re.compile(r"\*\*?([^*\s][^*]*)\*\*?")
LIST_ITEM = re.compile(r"(?:[-*+•]\s|\d+[.)]\s|:\w[^:]*:|\*{0,2}`{0,2}\w+`{0,2}(?: \([^)]*\))?\s*:(?:\s|$))")


class SourceFile(NamedTuple):
    name: str  # path below its root, with "/" on every system
    path: str


def source_files(root: str, prefix: str) -> list[SourceFile]:
    """Every Python file below `root`, in the order of its name."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                path = os.path.join(folder, file)
                found.append(SourceFile(f"{prefix}/{os.path.relpath(path, root).replace(os.sep, '/')}", path))
    return sorted(found)


def in_source_order(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, depth first."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(list(ast.iter_child_nodes(node))))


def docstrings(source: str) -> Iterator[str]:
    """The documentation strings of a module: its own, those of its classes and functions, and the texts that torch
    attaches to compiled functions by calling `add_docstr`, in the order of the source.

    Raises SyntaxError or ValueError when `source` is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in someone else's source is no news
        tree = ast.parse(source)
    for node in in_source_order(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "add_docstr",
            "add_docstr_all",
        ):
            for part in node.args:
                for constant in ast.walk(part):
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        yield inspect.cleandoc(constant.value)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as a sentence: three words or more, at least four fifths letters and spaces."""
    if len(paragraph.split()) < 3:
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return letters >= 0.8 * len(paragraph) and not paragraph.startswith(("..", ">>>", "def ", "import ", "from "))


def prose(docstring: str) -> list[str]:
    """The paragraphs of a docstring that are prose, each on one line, without the mark-up of reStructuredText."""
    paragraphs: list[list[str]] = []
    literal_indent: int | None = None  # of the line that opened a literal block with "::" or a doctest
    fresh = True
    for line in docstring.splitlines():
        text = line.strip()
        if not text:
            fresh = True
            continue
        indent = len(line) - len(line.lstrip())
        if literal_indent is not None:
            if indent > literal_indent:
                continue
            literal_indent = None
        if text.startswith((">>>", "...", "$ ", "|", "+-", "```")):
            fresh = True
            continue
        if fresh or LIST_ITEM.match(text):
            paragraphs.append([])
        paragraphs[-1].append(text)
        fresh = False
        if text.endswith("::"):
            literal_indent = indent
    kept = []
    for lines in paragraphs:
        text = " ".join(lines)
        text = ROLE.sub(r"\1", text)
        text = BOLD.sub(r"\1", CODE_SPAN.sub(r"\1", text))
        text = " ".join(re.sub(r"::$", ":", text).split())
        if is_prose(text):
            kept.append(text)
    return kept


def paragraphs_of(path: str) -> list[str]:
    """The prose of one source file; none when the file is no Python of this version."""
    with open(path, "rb") as stream:
        source = stream.read()
    advance(consumed=len(source), text=len(source))
    try:
        return [paragraph for text in docstrings(source) for paragraph in prose(text)]
    except (SyntaxError, ValueError):
        return []


def _together(first: int, paths: list[str]) -> tuple[int, list[list[str]]]:
    return first, [paragraphs_of(path) for path in paths]


def standard_files() -> list[SourceFile]:
    """The sources of the standard library and of torch.

    Raises:
        CorpusError: torch is not installed.
    """
    torch_package = importlib.util.find_spec("torch")
    if torch_package is None or not torch_package.submodule_search_locations:
        raise CorpusError("the torch package, whose documentation is a part of the corpus, is not installed")
    torch_folder = list(torch_package.submodule_search_locations)[0]
    return source_files(sysconfig.get_paths()["stdlib"], "python") + source_files(torch_folder, "torch")


def docstring_documents(files: list[SourceFile], workers: int) -> Iterator[Document]:
    """The documents in the order of ``files``, whatever the number of processes, without repeated paragraphs."""
    paths = [file.path for file in files]
    tasks = [(first, paths[first : first + _TOGETHER]) for first in range(0, len(paths), _TOGETHER)]
    done = dict(run_tasks(_together, tasks, workers, sum(map(os.path.getsize, paths)), "reading sources"))
    found = [paragraphs for first, _ in tasks for paragraphs in done[first]]
    seen: set[str] = set()
    for file, paragraphs in zip(files, found, strict=True):
        fresh = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            yield Document("\n".join(fresh), file.name, 0)
