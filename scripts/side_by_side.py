"""Time and memory of several ways to do the same, measured so that the ratios can be trusted.

A module of the benchmarks and of the study.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]

# torch's profiler announces its start and stop on stderr, between the rows of tables; it looks at this when it is first
# used. Whoever has set a level keeps it.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def all_seconds(
    calls: dict[str, Call],
    rounds: int,
    before: Callable[[str], None] = lambda name: None,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each round. They take turns, one call each per round, so that whatever else the machine
    does hits all alike; ``before`` is called with the name and is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warm_up):
        for name, call in calls.items():
            before(name)
            synchronise()
            start = clock()
            call()
            synchronise()
            if turn >= warm_up:
                times[name].append(clock() - start)
    return times


def median_seconds(
    calls: dict[str, Call], rounds: int, before: Callable[[str], None] = lambda name: None, warm_up: int = 2
) -> dict[str, float]:
    """The median of each call's :func:`all_seconds`."""
    return {name: statistics.median(found) for name, found in all_seconds(calls, rounds, before, warm_up).items()}


def synchronise() -> None:
    """Wait until the accelerator, where there is one in use, has done what it was asked."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(call: Call, device: str = "cpu") -> int:
    """Most bytes that ``call`` makes the allocator of ``device`` hold at once beyond what it held before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def self_time_shares(call: Call, device: str = "cpu") -> dict[str, tuple[float, int]]:
    """Share of the time of ``call`` that each operation spends itself, and its calls, the largest share first.

    On an accelerator it is the accelerator's time.
    """
    on_device = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    with profile(activities=activities) as recorded:
        call()
        synchronise()
    of = "self_device_time_total" if on_device else "self_cpu_time_total"
    found = sorted(recorded.key_averages(), key=lambda event: -getattr(event, of))
    total = sum(getattr(event, of) for event in found)
    return {event.key: (getattr(event, of) / total, event.count) for event in found}
