"""Worker processes with one progress bar, and without orphans when the parent is killed."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from fairseq_implicit.corpora.problems import CorpusError

logger = logging.getLogger(__name__)

# Consumed file bytes and text bytes of the running stage, shared by parent and workers.
_consumed = None
_text = None
_SECONDS_BETWEEN_LOG_LINES = 30
# Documents are small and the lock is shared: what this process has not reported yet.
_held = [0, 0]
_REPORTED_TOGETHER = 2**18


def advance(consumed: int = 0, text: int = 0) -> None:
    """Reports progress from inside a task: bytes of input files consumed, bytes of text that came out of them."""
    held = _held
    held[0] += consumed
    held[1] += text
    if held[0] >= _REPORTED_TOGETHER or held[1] >= _REPORTED_TOGETHER:
        _report()


def _report() -> None:
    for number, shared in enumerate((_consumed, _text)):
        if shared is not None and _held[number]:
            with shared.get_lock():
                shared.value += _held[number]
        _held[number] = 0


def _call(function: Callable, task: tuple) -> object:
    try:
        return function(*task)
    finally:
        _report()


def _start_worker(consumed, text, parent: int, standard_input: int | None) -> None:
    global _consumed, _text
    _consumed, _text = consumed, text
    if standard_input is not None:
        os.dup2(standard_input, 0)
        sys.stdin = open(0, closefd=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent cannot stop its workers; they notice that they were adopted and end themselves."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def run_tasks(
    function: Callable, tasks: list[tuple], workers: int, total: int, label: str, unit: str = "B"
) -> Iterator[object]:
    """Runs ``function(*task)`` for every task and yields the results as they come.

    Args:
        function: a module-level function; it reports progress through `advance`.
        tasks: argument tuples.
        workers: processes; 1 runs the tasks in this one.
        total: expected sum of the consumed bytes, for the time that is left.
        label: the bar's caption.

    Raises:
        CorpusError: a worker process died (usually for want of memory). Errors of a task are raised as they are.
    """
    global _consumed, _text
    context = multiprocessing.get_context("fork")
    _consumed, _text = context.Value("q", 0), context.Value("q", 0)
    standard_input = None
    bar = _Bar(label, total, unit)
    try:
        if workers == 1 or len(tasks) <= 1:
            ticker = threading.Thread(target=bar.follow, daemon=True)
            ticker.start()
            for task in tasks:
                yield _call(function, task)
            return
        others = set(multiprocessing.active_children())
        with contextlib.suppress(OSError):  # a daemon has none
            standard_input = os.dup(0)  # multiprocessing closes that of its processes
        initial = (_consumed, _text, os.getpid(), standard_input)
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, initial) as pool:
            waiting = {pool.submit(_call, function, task) for task in tasks}
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    bar.refresh()
                    for future in done:
                        yield future.result()
            except BrokenProcessPool as error:
                raise CorpusError(
                    f"A worker process ended abruptly while {label}; when memory ran out use fewer --workers. Run the "
                    "same command again to go on from there."
                ) from error
            except BaseException:
                # Leaving the pool would otherwise wait for files that take half an hour each.
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
    finally:
        bar.close()
        if standard_input is not None:
            os.close(standard_input)
        _consumed = _text = None


class _Bar:
    """A tqdm bar on a terminal, a log line now and then elsewhere."""

    def __init__(self, label: str, total: int, unit: str):
        self._label, self._total = label, total
        self._bar = tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            desc=label,
            disable=None,
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self._begun = self._logged = time.monotonic()
        self._lock = threading.Lock()
        self._closed = False

    def follow(self) -> None:
        """Refreshes until closed; for tasks that run in this process."""
        while not self._closed:
            time.sleep(0.5)
            self.refresh()

    def refresh(self) -> None:
        with self._lock:
            if self._closed or _consumed is None:
                return
            now = time.monotonic()
            speed = _text.value / 1e6 / max(now - self._begun, 1e-9)
            if not self._bar.disable:
                self._bar.set_postfix_str(f"text {speed:.1f} MB/s", refresh=False)
                self._bar.update(min(_consumed.value, self._total) - self._bar.n)
            elif now - self._logged >= _SECONDS_BETWEEN_LOG_LINES:
                self._logged = now
                share = min(_consumed.value / self._total, 1.0) if self._total else 0.0
                left = (now - self._begun) * (1 / share - 1) if share else float("nan")
                logger.info("%s: %.1f %%, text %.1f MB/s, %.0f s left", self._label, 100 * share, speed, left)

    def close(self) -> None:
        self.refresh()
        with self._lock:
            self._closed = True
            self._bar.close()
