"""One writer to a folder: a lock that names its owner and that ends with its process, however that ends.

The lock is POSIX's, which the kernel keeps for the process alone: workers that outlive a killed process do not hold it,
and a folder on a network file system is protected from other machines. It stands alone, without torch and fairseq.
"""

from __future__ import annotations

import datetime
import os
import socket
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # no POSIX system: no lock
    fcntl = None


class FolderInUse(Exception):
    """Another process holds the lock; the message names it: ``process 4711 on host since ...``."""


def lock_folder(folder: str | Path, name: str, shared: bool = False) -> TextIO:
    """Locks a folder for this process until the returned file is closed.

    Args:
        folder: made when it is not there.
        name: of the lock's file in it, which stays there unless the owner removes it.
        shared: several processes may hold it together, none of them beside one that does not share.

    Raises:
        FolderInUse: another process holds the lock.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    lock = open(path, "a+", encoding="utf-8")
    if fcntl is None:
        return lock
    try:
        fcntl.lockf(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        owner = lock.read().strip() or "its process is not known"
        lock.close()
        raise FolderInUse(owner) from None
    except OSError:  # a file system without locks
        return lock
    if not os.path.exists(path) or not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
        lock.close()  # its owner removed it between the two calls above
        return lock_folder(folder, name, shared)
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
    lock.flush()
    return lock
