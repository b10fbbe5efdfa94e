"""One job to an output folder, or its parts together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.folder_lock import FolderInUse, lock_folder


@contextlib.contextmanager
def own_folder(folder: Path, name: str, part: int, parts: int) -> Iterator[None]:
    """Locks an output folder for the time of the block.

    Args:
        folder: made when it is not there.
        name: of the lock's file, which is removed at the end unless other parts share it.
        part, parts: a whole job (one part) has the folder for itself; parts of one job share it, but no two processes
            work at the same part.

    Raises:
        CorpusError: another process has the folder or this part of the job; the sentence names it.
    """
    own = name if parts == 1 else f"{name}.{part}-{parts}"
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(lock_folder(folder, own))
            if parts > 1:  # at last, for it names who took it last
                locks.enter_context(lock_folder(folder, name, shared=True))
        except FolderInUse as owner:
            raise CorpusError(
                f"Another process works in {folder} ({owner}); wait for it, stop it, or give another --output."
            ) from None
        try:
            yield
        finally:
            (folder / own).unlink(missing_ok=True)  # while it is locked: nobody else can hold it then
