"""Files that are either absent or complete, also after ``kill -9`` or a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path

from fairseq_implicit.corpora.problems import CorpusError


def temporary_beside(path: Path) -> Path:
    """A name beside ``path`` that no other process of any machine uses; left-overs match ``*.part-*``."""
    return path.with_name(f"{path.name}.part-{socket.gethostname()}-{os.getpid()}")


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished, synchronised temporary file its name in one step."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Writes a small file atomically."""
    temporary = temporary_beside(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically."""
    # File names that are not UTF-8 and strings from damaged records may hold unpaired surrogates. Escaped like this
    # they are valid JSON too, and come back from it as they were.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def publish_folder(temporary: Path, path: Path) -> None:
    """Makes a finished folder of files durable and gives it its name in one step."""
    for member in [*temporary.iterdir(), temporary]:
        descriptor = os.open(member, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    publish(temporary, path)


def is_whole(path: Path, size: int) -> bool:
    """True when a file is there with the size that its record gives."""
    return path.is_file() and path.stat().st_size == size


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically, with sorted keys so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path, shape: dict) -> dict | None:
    """The object in a JSON file of our own, or None when the file does not exist.

    Args:
        path: the file.
        shape: keys that must be there, with the type of each value, a shape of its own, or a list of one shape for
            all items; the key ``"*"`` stands for all keys, and one that ends in ``?`` may be missing.

    Raises:
        CorpusError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError as well
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not _fits(value, shape):
        raise _damaged(path, "it is no record of this program")
    return value


def _fits(value: object, shape: object) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if "*" in shape:
        return all(_fits(item, shape["*"]) for item in value.values())
    for name, part in shape.items():
        key = name.removesuffix("?")
        if key not in value and key == name or key in value and not _fits(value[key], part):
            return False
    return True


def _damaged(path: Path, reason: str) -> CorpusError:
    return CorpusError(f"{path} is damaged ({reason}); remove it and run the same command again.")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashedFile:
    """A temporary file that is hashed while it is written and published under its name at the end."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = temporary_beside(path)
        self._file = open(self._temporary, "wb", buffering=2**20)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def publish(self) -> str:
        """Makes the file durable under its name; returns its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        publish(self._temporary, self.path)
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Removes the temporary file."""
        with contextlib.suppress(OSError):  # a full disk is reported once
            self._file.close()
        self._temporary.unlink(missing_ok=True)
