"""Parquet re-packs of The Pile and OSCAR: one row is one document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fairseq_implicit.corpora.problems import CorpusError, ReadProblem
from fairseq_implicit.corpora.records import Document, RecordError, document_from_record

_COLUMNS = ("text", "content", "meta", "metadata")
# Rows decoded at once; documents reach megabytes, so this stays small.
_ROWS = 256


def read_parquet(path: Path, on_compressed: Callable[[int], None] | None = None) -> Iterator[Document | ReadProblem]:
    """Yields the documents of a parquet file; offsets are row numbers.

    Raises:
        CorpusError: pyarrow is missing, or the file has no column with a text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(f"Reading {path} needs pyarrow, which is not installed: pip install pyarrow.") from error
    row, rows = 0, 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            if "text" not in columns and "content" not in columns:
                raise CorpusError(
                    f"{path} has no column 'text' or 'content' (its columns: {', '.join(file.schema_arrow.names)})."
                )
            rows, size = file.metadata.num_rows, path.stat().st_size
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    try:
                        yield document_from_record(record, str(path), row - 1)
                    except RecordError as error:
                        sentence = f"{path}: row {row - 1} is no document: {error}."
                        yield ReadProblem("record without text", str(path), row - 1, sentence, 1)
                if on_compressed is not None:
                    on_compressed(size * row // rows - size * (row - batch.num_rows) // rows)
    except (pyarrow.ArrowException, OSError) as error:
        yield ReadProblem(
            "corrupt parquet data",
            str(path),
            row,
            f"{path} cannot be read from row {row} on ({error}); fetch it again.",
            max(rows - row, 0),
        )
