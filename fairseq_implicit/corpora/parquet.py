"""Parquet re-packs of The Pile and OSCAR: one row is one document."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from fairseq_implicit.corpora.content import encoding_fault, invalid_in
from fairseq_implicit.corpora.problems import CorpusError, ReadProblem, shown
from fairseq_implicit.corpora.records import TEXT_FIELDS, Document, RecordError, document_from_record, in_words

_META_COLUMNS = ("meta", "metadata")
# Rows decoded at once; documents reach megabytes, so this stays small.
_ROWS = 256


def read_parquet(
    file: BinaryIO,
    name: str,
    text_fields: tuple[str, ...] = TEXT_FIELDS,
    on_compressed: Callable[[int], None] | None = None,
) -> Iterator[Document | ReadProblem]:
    """Yields the documents of a parquet file; offsets are row numbers.

    A damaged page costs the rows that are left of its row group: pyarrow cannot pass over a page.

    Args:
        file: the file, which must be seekable.
        name: its name, for documents and problems.
        text_fields: names of the column with the text; the first one that is there counts.
        on_compressed: called with numbers of consumed file bytes.

    Raises:
        CorpusError: pyarrow is missing, or the file has no column with a text.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(f"Reading {name} needs pyarrow, which is not installed: pip install pyarrow.") from error
    try:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        names = table.schema_arrow.names
        sizes = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    except Exception as error:  # pyarrow raises many kinds for damaged files
        sentence = f"{name} cannot be opened ({shown(str(error), 300)}); fetch it again."
        yield ReadProblem("corrupt parquet data", name, 0, sentence)
        return
    columns = [column for column in names if column in text_fields + _META_COLUMNS]
    if not set(columns) & set(text_fields):
        found = shown(", ".join(names), 300)
        raise CorpusError(f"{name} has no column {in_words(text_fields)} (its columns: {found}).")
    size, rows = os.fstat(file.fileno()).st_size, max(sum(sizes), 1)
    row = first = 0
    for number, group_rows in enumerate(sizes):
        row, first = first, first + group_rows
        try:
            for batch in table.iter_batches(batch_size=_ROWS, row_groups=[number], columns=columns):
                for record in _records(batch):
                    yield _document(record, name, row, text_fields)
                    row += 1
                if on_compressed is not None:
                    on_compressed(size * row // rows - size * (row - batch.num_rows) // rows)
        except Exception as error:
            yield ReadProblem(
                "corrupt parquet data",
                name,
                row,
                f"{name}: the rows {row} to {first - 1} cannot be read ({shown(str(error), 300)}); fetch it again.",
                max(first - row, 0),
            )


def _records(batch) -> Iterator[dict | Exception]:
    """The rows of a batch; row by row when one of them cannot be converted."""
    try:
        yield from batch.to_pylist()
        return
    except Exception:
        pass
    for row in range(batch.num_rows):
        try:
            yield {name: _value(batch.column(name)[row]) for name in batch.schema.names}
        except Exception as error:
            yield error


def _value(cell) -> object:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes()


def _document(record: dict | Exception, name: str, row: int, text_fields: tuple[str, ...]) -> Document | ReadProblem:
    try:
        if isinstance(record, Exception):
            raise RecordError(f"it cannot be converted ({type(record).__name__}: {shown(str(record), 300)})")
        repairs: tuple[str, ...] = ()
        for column, value in record.items():
            if isinstance(value, bytes):  # a string that is not UTF-8, or a binary column
                invalid = invalid_in(value)
                if column in text_fields and (fault := encoding_fault(value, invalid)):
                    raise RecordError(f"its text is not UTF-8 ({fault})")
                record[column] = value.decode("utf-8", "replace")
                repairs = ("invalid UTF-8",) if invalid else repairs
        document = document_from_record(record, name, row, text_fields)
        document.repairs += repairs
        return document
    except RecordError as error:
        return ReadProblem("record without text", name, row, f"{name}: row {row} is no document: {error}.", 1)
