"""Token files (`text.token_files`) in parts, which are made apart from each other and joined."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from fairseq_implicit.corpora.durable import publish
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.text.token_files import index_header

# Lines whose offsets are computed at once.
_BLOCK = 2**20


def join_parts(parts: list[Path], prefix: Path, dtype: np.dtype) -> tuple[int, int]:
    """Joins consecutive parts into ``<prefix>.bin`` and ``<prefix>.idx``.

    Args:
        parts: in order; part ``p`` consists of ``p.ids`` (token ids) and ``p.lengths`` (int32 line lengths).
        prefix: path of the result without its suffix.
        dtype: type of the ids.

    Returns:
        the numbers of lines and of tokens.

    Raises:
        CorpusError: a part's ids and lengths do not belong together.
    """
    for part in parts:
        if not PartWriter.is_complete(part, dtype):
            raise CorpusError(f"{_ids(part)} and {_lengths(part)} do not fit; remove them and run the command again.")
    with open(prefix.with_name(prefix.name + ".bin"), "wb") as output:
        for part in parts:
            with open(_ids(part), "rb") as ids:
                shutil.copyfileobj(ids, output, 2**22)
    lines = sum(_lengths(part).stat().st_size // 4 for part in parts)
    tokens = 0
    with open(prefix.with_name(prefix.name + ".idx"), "wb") as output:
        output.write(index_header(dtype, lines))
        for part in parts:
            with open(_lengths(part), "rb") as lengths:
                shutil.copyfileobj(lengths, output, 2**22)
        for part in parts:
            with open(_lengths(part), "rb") as file:
                while len(lengths := np.fromfile(file, dtype=np.int32, count=_BLOCK)):
                    ends = tokens + np.cumsum(lengths, dtype=np.int64)
                    output.write(((ends - lengths) * np.dtype(dtype).itemsize).tobytes())
                    tokens = int(ends[-1])
    return lines, tokens


def _ids(part: Path) -> Path:
    return part.with_name(part.name + ".ids")


def _lengths(part: Path) -> Path:
    return part.with_name(part.name + ".lengths")


class PartWriter:
    """Writes one part under temporary names; `close` publishes it, lengths last."""

    def __init__(self, part: Path, suffix: str):
        self._part = part
        self._temporaries = [path.with_name(path.name + suffix) for path in (_ids(part), _lengths(part))]
        self._files = [open(path, "wb") for path in self._temporaries]

    @staticmethod
    def is_complete(part: Path, dtype: np.dtype) -> bool:
        """True when the part was published, with as many ids as the lengths say."""
        if not (_lengths(part).is_file() and _ids(part).is_file()) or _lengths(part).stat().st_size % 4:
            return False
        tokens = int(np.fromfile(_lengths(part), dtype=np.int32).sum(dtype=np.int64))
        return _ids(part).stat().st_size == tokens * np.dtype(dtype).itemsize

    def write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Appends lines."""
        self._files[0].write(ids.tobytes())
        self._files[1].write(lengths.tobytes())

    def close(self) -> None:
        """Makes the part durable and publishes it."""
        paths = (_ids(self._part), _lengths(self._part))
        for file, temporary, path in zip(self._files, self._temporaries, paths, strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            publish(temporary, path)
