"""A text of your own -> train.txt, valid.txt, test.txt, one paragraph per line, blank line between documents.

    fairseq-implicit text-corpus PATH --out FOLDER
    fairseq-implicit text-corpus --docstrings --out FOLDER

PATH is a plain-text file or a folder of them (.txt, .text, .md, .tokens, .raw). A folder that holds a file for
`train` and one for `valid` (wiki.train.tokens, corpus_valid.txt, dev.txt, ...) keeps its own split; in any other case
documents are split by a hash. Blank lines separate documents; a document of more than 200 paragraphs is cut there, so
that a single book can be split too. --docstrings takes the documentation strings of Python and torch instead.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fairseq_implicit.corpora.docstrings import docstring_documents, standard_files
from fairseq_implicit.corpora.small_corpus import (
    Counts,
    HashSplit,
    cleaned,
    documents_of,
    given_splits,
    text_files,
    write_splits,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a text file, or a folder of text files")
    parser.add_argument("--docstrings", action="store_true", help="the documentation strings of Python and torch")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="gets train.txt, valid.txt, test.txt")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that parse sources (default: all cores)"
    )


def report(folder: Path, counts: Mapping[str, Counts]) -> str:
    """One line per split for the terminal."""
    return "\n".join(
        f"  {folder / split}.txt: "
        + ", ".join(f"{number:,} {name[:-1] if number == 1 else name}" for name, number in found._asdict().items())
        for split, found in counts.items()
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.docstrings == (arguments.path is not None):
        raise argparse.ArgumentError(None, "give a PATH or --docstrings, one of the two")
    if arguments.docstrings:
        documents = list(cleaned(docstring_documents(standard_files(), arguments.workers)))
        assign = HashSplit(text for _, text in documents)
        split = ((assign(text), text) for _, text in documents)
    else:
        files = text_files(arguments.path)
        given = {str(file): split for file, split in given_splits(files).items()}
        if given:
            split = ((given[path], text) for path, text in cleaned(documents_of(files)))
        else:  # read twice, for a text may be larger than the memory
            assign = HashSplit(text for _, text in cleaned(documents_of(files)))
            split = ((assign(text), text) for _, text in cleaned(documents_of(files)))
    sys.stdout.write(f"{report(arguments.out, write_splits(arguments.out, split))}\n")
