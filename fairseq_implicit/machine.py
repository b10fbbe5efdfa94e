"""What the machine is good at: its precisions, and the speed of its matrix products."""

import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

#: Instructions of a CPU that multiply bfloat16: Intel's tiles, AVX-512 of Intel and AMD, ARM. Without one of them every
#: product is emulated, up to a hundred times slower than in float32.
BFLOAT16_INSTRUCTIONS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})

#: Rows of the matrices by whose products a peak is measured, at most: a millisecond of the fastest GPUs.
LARGEST_MATRIX = 8192


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16, so that training in it can pay."""
    return not BFLOAT16_INSTRUCTIONS.isdisjoint(cpu_instructions())


def cpu_instructions(listing: str = "/proc/cpuinfo") -> frozenset[str]:
    """Names of the CPU's instruction sets as torch tells them, and where an older torch does not, Linux in ``listing``.

    Empty where neither tells.
    """
    try:
        known: Mapping[str, Any] = torch.cpu.get_capabilities()
    except AttributeError:
        return _listed(listing)
    return frozenset(name for name, value in known.items() if value is True)


def _listed(path: str) -> frozenset[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return frozenset(_flags(file))
    except OSError:  # not Linux
        return frozenset()


def _flags(lines: Iterable[str]) -> list[str]:
    """Of the first processor; x86 calls them flags, ARM features."""
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return values.split()
    return []


def training_precision() -> str:
    """The flag of the precision that pays here: ``--fp16`` on GPUs, ``--bf16`` on CPUs that have it, else empty."""
    if torch.cuda.is_available():
        return "--fp16"
    return "--bf16" if multiplies_bfloat16() else ""


def matrix_product_speed(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating-point operations per second of square matrix products: the fastest of what ``seconds`` have room for.

    The matrices grow while a product takes less than a hundredth of that time, up to ``LARGEST_MATRIX``.
    """
    start, best, size = time.perf_counter(), 0.0, 256
    left, right = _matrices(size, device, dtype)
    for turn in itertools.count():
        synchronise(device)
        begun = time.perf_counter()
        torch.mm(left, right)
        synchronise(device)
        spent = time.perf_counter() - begun
        best = max(best, 2 * size**3 / spent)
        if begun + spent - start >= seconds and turn > 0:  # the first product may be slow: libraries are loaded
            return best
        if turn > 0 and spent < 0.01 * seconds and size < LARGEST_MATRIX:
            size *= 2
            left, right = _matrices(size, device, dtype)
    raise AssertionError("the loop above has no end")


def _matrices(size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # Not random numbers: the training's must stay what they are. Not zeros: they take less power.
    left = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    return left, left.t().contiguous()


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has done what it was asked."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
