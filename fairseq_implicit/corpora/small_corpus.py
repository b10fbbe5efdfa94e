"""A corpus that needs no shards: documents to the files ``train.txt``, ``valid.txt`` and ``test.txt`` of one folder.

They are read, cleaned and assigned to splits as those of the large corpora are: which split a document belongs to
follows from a hash of its text alone, so the split does not depend on the order, the machine or the other documents,
and equal documents are never in two splits.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fairseq_implicit.corpora.cleaning import clean
from fairseq_implicit.corpora.durable import publish_folder
from fairseq_implicit.corpora.problems import CorpusError, ReadProblem
from fairseq_implicit.corpora.readers import ReadOptions, read_source
from fairseq_implicit.corpora.records import Document
from fairseq_implicit.corpora.segments import document_key, share_of
from fairseq_implicit.corpora.settings import SPLITS
from fairseq_implicit.corpora.sources import Source

HELD_OUT_SHARE = 0.04  # of the documents, for each of valid and test
LONGEST_DOCUMENT = 200  # paragraphs; a longer one is cut, so that a single book can be split too

_ENDINGS = (".txt", ".text", ".md", ".tokens", ".raw")
_SPLIT_NAMES = {split: split for split in SPLITS} | dict.fromkeys(("val", "dev", "validation"), "valid")
_SEED = 1


class Counts(NamedTuple):
    documents: int
    paragraphs: int
    characters: int


def text_files(path: Path) -> list[Path]:
    """The text files that ``path`` stands for, in the order of their names.

    Raises:
        CorpusError: there is no such path, or the folder holds no text.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CorpusError(f"{path}: no such file or folder")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(_ENDINGS))
    if not found:
        raise CorpusError(f"{path}: the folder holds no text file (endings: {' '.join(_ENDINGS)})")
    return found


def given_splits(files: Iterable[Path]) -> dict[Path, str]:
    """{file: split} when the names of all files say which split they are, with at least one for train and valid;
    otherwise {}."""
    splits = {}
    for file in files:
        words = [word for word in re.split(r"[^a-z]+", file.name.lower()) if word in _SPLIT_NAMES]
        if len(words) != 1:
            return {}
        splits[file] = _SPLIT_NAMES[words[0]]
    return splits if {"train", "valid"} <= set(splits.values()) else {}


def documents_of(files: list[Path]) -> Iterator[Document]:
    """The documents of text files; blank lines separate them.

    Raises:
        CorpusError: a file cannot be read as text, or not as a whole.
    """
    for file in tqdm(files, "  reading text", unit="files", disable=len(files) < 2):
        for item in read_source(Source(str(file)), ReadOptions(boundary="blank-line")):
            if isinstance(item, ReadProblem):
                raise CorpusError(item.sentence)
            if isinstance(item, Document):
                if item.repairs:
                    what = ", ".join(item.repairs)
                    raise CorpusError(f"{file} is not UTF-8 text ({what} after byte {item.offset}): convert it first")
                yield item


def cleaned(documents: Iterable[Document], longest: int = LONGEST_DOCUMENT) -> Iterator[tuple[str, str]]:
    """(path, text) of each document that is not empty, one paragraph per line, cut at ``longest`` paragraphs."""
    for document in documents:
        text, _ = clean(document.text)
        paragraphs = text.split("\n") if text else []
        for start in range(0, len(paragraphs), longest):
            yield document.path, "\n".join(paragraphs[start : start + longest])


class HashSplit:
    """Assigns texts by their hash. Where a small corpus would leave valid or test empty, its documents with the lowest
    hashes are held out instead, the same share of them but one at least.

    Raises:
        CorpusError: there are fewer than three different texts.
    """

    def __init__(self, texts: Iterable[str]):
        keys = {_key(text) for text in texts}
        if len(keys) < 3:
            raise CorpusError(
                f"{len(keys)} document(s) are too few to hold out a validation and a test set: separate documents by "
                "a blank line, or give a folder with a train and a valid file"
            )
        self._held: dict[bytes, str] | None = None
        if set(map(_split_of, keys)) != set(SPLITS):
            ranked, count = sorted(keys), max(1, round(HELD_OUT_SHARE * len(keys)))
            self._held = dict.fromkeys(ranked[:count], "valid") | dict.fromkeys(ranked[count : 2 * count], "test")

    def __call__(self, text: str) -> str:
        key = _key(text)
        return _split_of(key) if self._held is None else self._held.get(key, "train")


def _key(text: str) -> bytes:
    return document_key(text.encode("utf-8"), _SEED)


def _split_of(key: bytes) -> str:
    share = share_of(key, 0)
    if share < HELD_OUT_SHARE:
        return "valid"
    return "test" if share < 2 * HELD_OUT_SHARE else "train"


def write_splits(folder: Path, documents: Iterable[tuple[str, str]]) -> Mapping[str, Counts]:
    """Writes the three files and returns what each holds. The folder appears only when it is complete: whoever is
    interrupted leaves the old one in its place.

    Args:
        folder: is replaced.
        documents: (split, text) with one paragraph per line; one blank line will stand between documents.

    Raises:
        CorpusError: train or valid would be empty.
    """
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts = {split: [0, 0, 0] for split in SPLITS}
    files = {split: open(partial / f"{split}.txt", "w", encoding="utf-8", newline="\n") for split in SPLITS}
    try:
        for split, text in documents:
            count = counts[split]
            files[split].write(f"\n{text}\n" if count[0] else f"{text}\n")
            breaks = text.count("\n")
            for place, number in enumerate((1, breaks + 1, len(text) - breaks)):
                count[place] += number
    finally:
        for file in files.values():
            file.close()
    empty = [split for split in ("train", "valid") if not counts[split][0]]
    if empty:
        shutil.rmtree(partial)
        raise CorpusError(f"no text for the {' and '.join(empty)} split of {folder}: give more documents")
    shutil.rmtree(folder, ignore_errors=True)
    publish_folder(partial, folder)
    return {split: Counts(*count) for split, count in counts.items()}
