"""Batches: none is thrown away, and none is still in the making when the process ends."""

import atexit
import queue
import threading
import time

import numpy as np
from fairseq.data import data_utils, iterators

from fairseq_implicit.compat.wrapping import wrap


def register() -> None:
    wrap(data_utils, "batch_by_size", _batch_by_size)
    atexit.register(finish_buffers)


def _batch_by_size(original, indices, *args, **kwargs):
    """All samples in batches.

    fairseq drops the last batch of every epoch and split whose size is no multiple of
    ``--required-batch-size-multiple`` (8 by default; with smaller batches it drops a whole one), and so trains
    nothing at all on fewer samples than that. The batches are consecutive, so what is missing is the end.
    """
    if not isinstance(indices, np.ndarray):
        indices = np.fromiter(indices, dtype=np.int64, count=-1)
    if len(indices) == 0:
        return []
    batches = list(original(indices, *args, **kwargs))
    batched = sum(map(len, batches))
    return batches if batched == len(indices) else [*batches, indices[batched:]]


def finish_buffers(patience: float = 10.0) -> None:
    """Ends the threads that read batches ahead, before the interpreter goes.

    A run that stops inside an epoch leaves fairseq's daemon thread in the middle of a torch operation; when the
    interpreter then takes the lock away from it, the C++ stack unwinds through code that forbids it and the process
    aborts ("terminate called without an active exception", exit status 134) after an entirely successful run.

    Args:
        patience: seconds to wait for all threads together.
    """
    deadline = time.monotonic() + patience
    for thread in threading.enumerate():
        if not isinstance(thread, iterators.BackgroundConsumer):
            continue
        thread._max_len = 0  # it stops after the batch in hand
        while thread.is_alive() and time.monotonic() < deadline:
            try:
                thread._queue.get_nowait()  # it may be waiting for room in the queue
            except queue.Empty:
                pass
            thread.join(timeout=0.02)
