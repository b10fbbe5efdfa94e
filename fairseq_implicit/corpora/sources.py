"""Which files a corpus consists of and what each of them is: extension first, content where the extension is silent."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.side_files import is_side_file

STANDARD_INPUT = "-"
# Its other names would be opened anew, which worker processes cannot.
_STANDARD_INPUT_NAMES = {STANDARD_INPUT, "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}
BOUNDARIES = ("auto", "blank-line", "line", "file")

_COMPRESSION_SUFFIXES = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".bz2": "bz2", ".xz": "xz"}
_JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_TEXT_SUFFIXES = {".txt", ".text", ".tokens", ".raw"}
_OTHER_SUFFIXES = {".parquet", ".tar", ".tgz"}
# Side files that stand next to the data in the published layouts.
_NOT_DATA = re.compile(r"(^\.)|sha256|checksum|^readme|^license|\.md$|\.lock$|\.incomplete$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One input file: the unit of work, of resuming and of spreading over machines.

    Attributes:
        name: absolute path, or ``-`` for the standard input. Sorted names give every machine the same numbering.
        split: "train", "valid" or "test" when the whole file belongs to one split, "" when documents are hashed.
    """

    name: str
    split: str = ""

    @property
    def is_pipe(self) -> bool:
        """True for what can be read once only: the standard input, a named pipe, ``<(command)`` of a shell."""
        if self.name == STANDARD_INPUT:
            return True
        try:
            mode = os.stat(self.name).st_mode
        except OSError:
            return False
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def suffixes_of(name: str) -> tuple[str, str | None]:
    """(format suffix, compression by suffix): ``(".jsonl", "zst")`` for ``00.jsonl.zst``, in lower case."""
    lower = name.lower()
    stem, last = os.path.splitext(lower)
    if last in _COMPRESSION_SUFFIXES:
        return os.path.splitext(stem)[1], _COMPRESSION_SUFFIXES[last]
    if last == ".tgz":
        return ".tar", "gz"
    # `blns.jsonl.zst.tar` is a tar file; its members are compressed one by one.
    return last, None


def is_corpus_file(name: str) -> bool:
    """True when a folder's file of this name is read; a file named on the command line is always read."""
    if _NOT_DATA.search(name):
        return False
    suffix, compression = suffixes_of(name)
    return suffix in _JSON_SUFFIXES | _TEXT_SUFFIXES | _OTHER_SUFFIXES or (suffix == "" and compression is not None)


def is_archived_corpus_file(name: str) -> bool:
    """The same for an archive's member: its path is looked at as `find_sources` looks at a folder's files."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return bool(parts) and not any(part.startswith(".") for part in parts) and is_corpus_file(parts[-1])


def find_sources(paths: list[str], split: str = "") -> tuple[list[Source], list[str]]:
    """Expands files and folders.

    Returns:
        the sources, sorted by name, and the names of files in folders that are no corpus files; pipes and devices are
        none. A sub-folder that cannot be listed and a link that leads nowhere are sources too: reading them says what
        is wrong.

    Raises:
        CorpusError: a path does not exist, or a folder holds nothing to read.
    """
    names: set[str] = set()
    passed_over: list[str] = []
    for path in paths:
        if path in _STANDARD_INPUT_NAMES:
            names.add(STANDARD_INPUT)
        elif os.path.isdir(path):
            files, unreadable = _files_below(path)
            named = (os.path.abspath(file) for file in files if is_corpus_file(os.path.basename(file)))
            chosen = {file for file in named if not Source(file).is_pipe}
            chosen |= {os.path.abspath(folder) for folder in unreadable}
            if not chosen:
                raise CorpusError(
                    f"The folder {path} holds no corpus file (.jsonl, .json, .ndjson, .txt, .tokens, .raw, .parquet or "
                    "a compressed form of them); name the files themselves if they carry other names."
                )
            names |= chosen
            passed_over += [file for file in files if os.path.abspath(file) not in chosen]
        elif os.path.exists(path):
            names.add(os.path.abspath(path))
        else:
            raise CorpusError(
                f"The input {path} does not exist; give a file, a folder, '-' for the standard input, or "
                "hf://OWNER/NAME for a dataset repository of the Hugging Face hub."
            )
    side_files = {name for name in names if name != STANDARD_INPUT and is_side_file(Path(name))}
    return [Source(name, split) for name in sorted(names - side_files)], passed_over + sorted(side_files)


def _files_below(root: str) -> tuple[list[str], list[str]]:
    """(files, folders that cannot be listed) below a folder, hidden ones left out.

    Linked folders are entered after the folders themselves, and each folder once, so that a link back up does not go
    round for ever and a file has the same name on every machine.
    """
    files: list[str] = []
    unreadable: list[str] = []
    folders, links = [root], []
    entered: set[tuple[int, int]] = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            unreadable.append(folder)
            continue
        for entry in found:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            else:
                files.append(entry.path)
        links.sort()
    return sorted(files), unreadable


def looks_like_json(name: str, head: bytes) -> bool:
    """True when a stream is JSON lines: by the name, else by the first character that is no white space."""
    suffix, _ = suffixes_of(name)
    if suffix in _JSON_SUFFIXES:
        return True
    if suffix in _TEXT_SUFFIXES:
        return False
    first = head.lstrip()[:1]
    return first == b"{" or (first == b'"' and head.lstrip().partition(b"\n")[0].rstrip().endswith(b'"'))
