"""What the machine is good at: its precisions, and the speed of its matrix products."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

#: Instructions of a CPU that multiply bfloat16: Intel's tiles, AVX-512 of Intel and AMD, ARM. Without one of them every
#: product is emulated, up to a hundred times slower than in float32.
BFLOAT16_INSTRUCTIONS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


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
