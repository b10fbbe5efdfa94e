"""Your own text -> `train.txt`, `valid.txt`, `test.txt`, cleaned, one paragraph per line, blank line between documents.

    python scripts/text_corpus.py PATH --out FOLDER

PATH is a plain-text file or a folder of them (.txt, .text, .md, .tokens, .raw). A folder that holds a file for
`train` and one for `valid` (wiki.train.tokens, corpus_valid.txt, dev.txt, ...) keeps its own split; in any other case
documents are split by a hash. Blank lines separate documents; a document of more than 200 paragraphs is cut there, so
that a single book can be split too.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from corpus_splits import (  # noqa: E402
    HELD_OUT_SHARE,
    SPLITS,
    Document,
    clean_paragraph,
    hashed_share,
    report,
    split_of,
    write_splits,
)

ENDINGS = (".txt", ".text", ".md", ".tokens", ".raw")
SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "validation": "valid",
    "test": "test",
}
LONGEST_DOCUMENT = 200  # paragraphs


def text_files(path: str) -> list[str]:
    """The text files that `path` stands for, in the order of their names.

    Raises FileNotFoundError when there is no such path or the folder holds no text.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    found = sorted(
        os.path.join(folder, file)
        for folder, _, files in os.walk(path)
        for file in files
        if file.lower().endswith(ENDINGS)
    )
    if not found:
        raise FileNotFoundError(f"{path}: the folder holds no text file (endings: {' '.join(ENDINGS)})")
    return found


def given_splits(files: list[str]) -> dict[str, str]:
    """{file: split} when the names of all files say which split they are, with at least one for train and valid;
    otherwise {}."""
    splits = {}
    for file in files:
        words = [w for w in re.split(r"[^a-z]+", os.path.basename(file).lower()) if w in SPLIT_NAMES]
        if len(words) != 1:
            return {}
        splits[file] = SPLIT_NAMES[words[0]]
    return splits if {"train", "valid"} <= set(splits.values()) else {}


def documents_of(file: str, longest: int = LONGEST_DOCUMENT) -> Iterator[Document]:
    """The documents of one file, named by file and number.

    Raises ValueError when the file is not UTF-8.
    """
    paragraphs: list[str] = []
    number = 0
    try:
        with open(file, encoding="utf-8-sig", newline=None) as stream:
            for line in stream:
                paragraph = clean_paragraph(line)
                if paragraph:
                    paragraphs.append(paragraph)
                if paragraphs and (not paragraph or len(paragraphs) >= longest):
                    yield Document(f"{file}#{number}", paragraphs)
                    paragraphs, number = [], number + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
    if paragraphs:
        yield Document(f"{file}#{number}", paragraphs)


def corpus_documents(files: list[str], root: str) -> Iterator[Document]:
    """The documents of all files, named relative to `root` so that moving the folder does not change the split."""
    quiet = len(files) < 2
    for file in tqdm(files, "  reading text", unit="files", disable=quiet):
        below = os.path.relpath(file, root).replace(os.sep, "/")
        for document in documents_of(file):
            yield Document(below + document.name[len(file) :], document.paragraphs)


def hash_split(documents: list[str]):
    """Assigns by hash; where a small corpus would leave valid or test empty, its documents with the lowest hashes are
    held out instead, the same share of them but one at least.

    Raises ValueError when there are fewer than three documents.
    """
    if len(documents) < 3:
        raise ValueError(
            f"{len(documents)} document(s) are too few to hold out a validation and a test set: separate documents by "
            "a blank line, or give a folder with a train and a valid file"
        )
    if {split_of(name) for name in documents} == set(SPLITS):
        return split_of
    held_out = max(1, round(HELD_OUT_SHARE * len(documents)))
    ranked = sorted(documents, key=hashed_share)
    held = dict.fromkeys(ranked[:held_out], "valid")
    held.update(dict.fromkeys(ranked[held_out : 2 * held_out], "test"))
    return lambda name: held.get(name, "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="a text file, or a folder of text files")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="gets train.txt, valid.txt and test.txt")
    arguments = parser.parse_args()
    try:
        files = text_files(arguments.path)
        root = arguments.path if os.path.isdir(arguments.path) else os.path.dirname(arguments.path)
        given = given_splits(files)
        if given:
            by_name = {os.path.relpath(file, root).replace(os.sep, "/"): split for file, split in given.items()}
            assign = lambda name: by_name[name.rsplit("#", 1)[0]]  # noqa: E731
        else:
            assign = hash_split([document.name for document in corpus_documents(files, root)])
        counts = write_splits(arguments.out, corpus_documents(files, root), assign)
    except (OSError, ValueError) as error:
        sys.exit(f"text_corpus: {error}")
    print(report(arguments.out, counts))


if __name__ == "__main__":
    main()
