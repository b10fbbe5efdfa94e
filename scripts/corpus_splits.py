"""Documents -> cleaned text files `train.txt`, `valid.txt`, `test.txt`.

The layout is fairseq's: one paragraph per line, one blank line between documents. Which split a document belongs to
follows from a hash of its name alone, so the split does not depend on the order, the machine or the other documents,
and no document is ever in two splits.
"""

import hashlib
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE = 0.04  # of the documents, for each of valid and test


class Document(NamedTuple):
    """A text with a name that is unique in its corpus; `paragraphs` hold no line break."""

    name: str
    paragraphs: list[str]


class Counts(NamedTuple):
    documents: int
    paragraphs: int
    characters: int


def clean_paragraph(text: str) -> str:
    """`text` on one line: every run of white space (line breaks and separators of Unicode included) becomes one space,
    control, format, surrogate and unassigned characters go. fairseq splits tokens at white space and lines at `\\r`,
    so neither may survive inside a paragraph."""
    text = " ".join(text.split())
    if text.isprintable():
        return text
    kept = "".join(c for c in text if unicodedata.category(c)[0] != "C")
    return " ".join(kept.split())


def hashed_share(name: str) -> float:
    """A number in [0, 1) that depends on nothing but `name`."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:6], "big") / 2**48


def split_of(name: str) -> str:
    """The split of the document called `name`: 'valid', 'test' or (mostly) 'train'."""
    share = hashed_share(name)
    if share < HELD_OUT_SHARE:
        return "valid"
    return "test" if share < 2 * HELD_OUT_SHARE else "train"


def deduplicated(documents: Iterable[Document]) -> Iterable[Document]:
    """The documents without any paragraph that has occurred before, in this document or an earlier one."""
    seen = set()
    for document in documents:
        fresh = []
        for paragraph in document.paragraphs:
            digest = hashlib.blake2b(paragraph.encode("utf-8"), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                fresh.append(paragraph)
        if fresh:
            yield Document(document.name, fresh)


def write_splits(folder: str, documents: Iterable[Document], assign=split_of) -> dict[str, Counts]:
    """Writes the three files into `folder` and returns what each holds. The folder appears only when it is complete:
    whoever is interrupted leaves no half corpus behind.

    Raises ValueError when a split would be empty.
    """
    partial = folder.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    counts = {split: [0, 0, 0] for split in SPLITS}
    files = {
        split: open(os.path.join(partial, f"{split}.txt"), "w", encoding="utf-8", newline="\n") for split in SPLITS
    }
    try:
        for document in documents:
            split = assign(document.name)
            count, file = counts[split], files[split]
            if count[0]:
                file.write("\n")
            file.writelines(paragraph + "\n" for paragraph in document.paragraphs)
            count[0] += 1
            count[1] += len(document.paragraphs)
            count[2] += sum(map(len, document.paragraphs))
    finally:
        for file in files.values():
            file.close()
    empty = [split for split in ("train", "valid") if not counts[split][0]]
    if empty:
        shutil.rmtree(partial)
        raise ValueError(f"no text for the {' and '.join(empty)} split of {folder}: give more documents")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return {split: Counts(*count) for split, count in counts.items()}


def report(folder: str, counts: dict[str, Counts]) -> str:
    """One line per split for the terminal."""
    return "\n".join(
        f"  {os.path.join(folder, split + '.txt')}: "
        + ", ".join(f"{number:,} {name[:-1] if number == 1 else name}" for name, number in c._asdict().items())
        for split, c in counts.items()
    )


if __name__ == "__main__":
    sys.exit("corpus_splits is a part of text_corpus.py and embedded_corpus.py: run one of them")
