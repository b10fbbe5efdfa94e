"""A folder that is whole under its name, or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, which has its name when the block has ended without an error.

    What a killed process leaves is ``NAME.part`` beside it, which the next one to write it removes.

    Raises:
        FileExistsError: the target is there.
        OSError: it cannot be written.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: remove it or choose another name")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
