"""GLUE's tables -> the line files that fairseq binarises: `<split>.input0`, `<split>.input1`, `<split>.label`.

    python examples/glue/columns.py GLUE_FOLDER/RTE --task RTE --out FOLDER

Train and dev become `train` and `valid` (MNLI's mismatched dev set `valid1`); unlabelled test tables are left alone.
"""

import argparse
import os
import sys
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple


class Table(NamedTuple):
    """Columns from 0, as the published archives have them."""

    sentences: Tuple[int, ...]
    label: int
    dev_label: Optional[int] = None  # where it is another column than in train
    header: bool = True
    scores: bool = False  # similarity from 0 to 5 instead of classes


TABLES: Dict[str, Table] = {
    "CoLA": Table((3,), 1, header=False),
    "MNLI": Table((8, 9), 11, dev_label=15),
    "MRPC": Table((3, 4), 0),
    "QNLI": Table((1, 2), 3),
    "QQP": Table((3, 4), 5),
    "RTE": Table((1, 2), 3),
    "SST-2": Table((0,), 1),
    "STS-B": Table((7, 8), 9, scores=True),
    "WNLI": Table((1, 2), 3),
}
FILES = {"train": ("train.tsv",), "valid": ("dev.tsv", "dev_matched.tsv"), "valid1": ("dev_mismatched.tsv",)}


def rows(path: str, table: Table) -> Iterator[List[str]]:
    """The rows of a table. GLUE does not quote: a quotation mark is a character. Some files end lines with CRLF."""
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines):
            if number == 0 and table.header or not line.strip():
                continue
            yield line.rstrip("\r\n").split("\t")


def write_split(path: str, table: Table, out: str, split: str) -> Tuple[int, int]:
    """Writes one split and returns how many rows were written and how many were too short to be read.

    Raises ValueError when no row has the columns of this task.
    """
    label_column = table.label if split == "train" or table.dev_label is None else table.dev_label
    needed = max(*table.sentences, label_column)
    written = short = 0
    names = [f"input{i}" for i in range(len(table.sentences))] + ["label"]
    files = [open(os.path.join(out, f"{split}.{name}"), "w", encoding="utf-8", newline="\n") for name in names]
    try:
        for row in rows(path, table):
            if len(row) <= needed:
                short += 1
                continue
            label = row[label_column].strip()
            if table.scores:
                label = str(float(label) / 5.0)
            for file, text in zip(files, [row[column] for column in table.sentences] + [label]):
                file.write(" ".join(text.split()) + "\n")
            written += 1
    finally:
        for file in files:
            file.close()
    if not written:
        raise ValueError(f"{path} has no row with {needed + 1} columns: is it the table of another --task?")
    return written, short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="with train.tsv and dev.tsv")
    parser.add_argument("--task", required=True, choices=sorted(TABLES))
    parser.add_argument("--out", required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    os.makedirs(arguments.out, exist_ok=True)
    try:
        for split, candidates in FILES.items():
            found = [name for name in candidates if os.path.isfile(os.path.join(arguments.folder, name))]
            if found:
                path = os.path.join(arguments.folder, found[0])
                written, short = write_split(path, TABLES[arguments.task], arguments.out, split)
                skipped = f", {short} incomplete rows left out" if short else ""
                print(f"  {split}: {written:,} examples{skipped}")
            elif split != "valid1":
                raise FileNotFoundError(f"{arguments.folder} holds no {' or '.join(candidates)}")
    except (OSError, ValueError) as error:
        sys.exit(f"columns: {error}")


if __name__ == "__main__":
    main()
