"""How the values of flags are read, and the part of a job that a scheduler gives this process."""

import argparse
import re
from collections.abc import Mapping

from fairseq_implicit.corpora.problems import CorpusError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def byte_size(text: str) -> int:
    """Reads a size such as ``4GB``, ``512MiB`` or ``65536``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] == "I":
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write for example 65536, 500MB or 4GB")
    return int(float(match[1]) * _UNITS[match[2]])


def positive(text: str) -> int:
    """Reads a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def part_of(text: str) -> tuple[int, int]:
    """Reads ``i/n`` with 0 ≤ i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no part; write i/n with 0 <= i < n, for example 0/3")
    return int(match[1]), int(match[2])


def part_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's part under SLURM (array tasks and/or several tasks per job) or torchrun, else ``(0, 1)``.

    Raises:
        CorpusError: a variable of the scheduler is no number.
    """

    def number(name: str, default: int) -> int:
        value = environment.get(name, "")
        if not value:
            return default
        if not value.isdigit():
            raise CorpusError(f"The environment variable {name}={value} is no number; give --part i/n instead.")
        return int(value)

    if "SLURM_JOB_ID" in environment:
        tasks = number("SLURM_NTASKS", 1)
        rank = number("SLURM_PROCID", 0) if tasks > 1 else 0
        array, count = 0, 1
        if "SLURM_ARRAY_TASK_ID" in environment:
            step = max(number("SLURM_ARRAY_TASK_STEP", 1), 1)
            array = (number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)) // step
            count = number("SLURM_ARRAY_TASK_COUNT", 1)
        return array * tasks + rank, count * tasks
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return number("RANK", 0), number("WORLD_SIZE", 1)
    return 0, 1


def component_weight(text: str) -> tuple[str, float]:
    """Reads ``NAME=WEIGHT``."""
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no weight; write NAME=NUMBER") from None
