"""Files that are either absent or complete, also after ``kill -9`` or a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path


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


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically."""
    temporary = temporary_beside(path)
    # File names that are not UTF-8 and strings from damaged records may hold unpaired surrogates. Escaped like this they
    # are valid JSON too, and come back from it as they were.
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically, with sorted keys so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict | None:
    """A JSON file's value, or None when the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


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
