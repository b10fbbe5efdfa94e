"""GLUE's tables -> line files: `<split>.input0`, `<split>.input1`, `<split>.label`, and `classes`, the labels in order.

    python examples/glue/columns.py GLUE_FOLDER/RTE --task RTE --out FOLDER

Train and dev become `train` and `valid` (MNLI's mismatched dev set `valid1`); unlabelled test tables are left alone.
Similarity scores (STS-B) are written as numbers from 0 to 1, without `classes`.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple


class Table(NamedTuple):
    """Columns from 0, as the published archives have them."""

    sentences: tuple[int, ...]
    label: int
    labels: tuple[str, ...]  # the classes in order; none: similarity from 0 to 5
    dev_label: int | None = None  # where it is another column than in train
    header: bool = True

    def target(self, cell: str) -> str:
        """The label of a cell, a score divided by 5. Raises ValueError where the cell is neither."""
        if self.labels:
            if cell not in self.labels:
                raise ValueError(f"{cell!r} is not one of the labels {', '.join(self.labels)}")
            return cell
        try:
            score = float(cell)
        except ValueError:
            score = -1.0
        if not 0.0 <= score <= 5.0:
            raise ValueError(f"{cell!r} is not a score from 0 to 5")
        return str(score / 5.0)


BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TABLES: dict[str, Table] = {
    "CoLA": Table((3,), 1, BINARY, header=False),
    "MNLI": Table((8, 9), 11, ("contradiction", "neutral", "entailment"), dev_label=15),
    "MRPC": Table((3, 4), 0, BINARY),
    "QNLI": Table((1, 2), 3, ENTAILMENT),
    "QQP": Table((3, 4), 5, BINARY),
    "RTE": Table((1, 2), 3, ENTAILMENT),
    "SST-2": Table((0,), 1, BINARY),
    "STS-B": Table((7, 8), 9, ()),
    "WNLI": Table((1, 2), 3, BINARY),
}
FILES = {"train": ("train.tsv",), "valid": ("dev.tsv", "dev_matched.tsv"), "valid1": ("dev_mismatched.tsv",)}


def rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 1 and cells of a table. GLUE does not quote: a quotation mark is a character. Some files end
    lines with CRLF."""
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n").split("\t")


def examples(path: str, table: Table, split: str) -> tuple[list[tuple[list[str], str]], int]:
    """Sentences and target of each row, white space as one blank, and how many rows were too short to be read.

    Raises ValueError when the table is not that of this task: too few columns, other labels, a header or none.
    """
    label_column = table.label if split == "train" or table.dev_label is None else table.dev_label
    needed = max(*table.sentences, label_column)
    found, short = [], 0
    for number, row in rows(path):
        header = table.header and number == 1
        if len(row) <= needed:
            short += not header
            continue
        try:
            target = table.target(row[label_column].strip())
        except ValueError as error:
            if header:
                continue
            raise ValueError(f"{path}, line {number}: {error}: is it the table of another --task?") from None
        if header:
            raise ValueError(f"{path} starts without a header: is it the table of another --task?")
        found.append(([" ".join(row[column].split()) for column in table.sentences], target))
    if not found:
        raise ValueError(f"{path} has no row with {needed + 1} columns: is it the table of another --task?")
    return found, short


def write_split(path: str, table: Table, out: str, split: str) -> tuple[int, int]:
    """Writes one split and returns how many rows were written and how many were too short to be read.

    Raises ValueError, see :func:`examples`.
    """
    found, short = examples(path, table, split)
    columns = zip(*((*texts, target) for texts, target in found), strict=True)
    names = [f"input{i}" for i in range(len(table.sentences))] + ["label"]
    for name, lines in zip(names, columns, strict=True):
        with open(os.path.join(out, f"{split}.{name}"), "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
    return len(found), short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="with train.tsv and dev.tsv")
    parser.add_argument("--task", required=True, choices=sorted(TABLES))
    parser.add_argument("--out", required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    table = TABLES[arguments.task]
    try:
        os.makedirs(arguments.out, exist_ok=True)
        if table.labels:
            with open(os.path.join(arguments.out, "classes"), "w", encoding="utf-8") as classes:
                classes.writelines(f"{label}\n" for label in table.labels)
        for split, candidates in FILES.items():
            found = [name for name in candidates if os.path.isfile(os.path.join(arguments.folder, name))]
            if found:
                path = os.path.join(arguments.folder, found[0])
                written, short = write_split(path, table, arguments.out, split)
                skipped = f", {short} incomplete rows left out" if short else ""
                print(f"  {split}: {written:,} examples{skipped}")
            elif split != "valid1":
                raise FileNotFoundError(f"{arguments.folder} holds no {' or '.join(candidates)}")
    except (OSError, ValueError) as error:
        sys.exit(f"columns: {error}")


if __name__ == "__main__":
    main()
