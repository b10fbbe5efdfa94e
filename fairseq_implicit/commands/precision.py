"""Prints the precision flag for fairseq-train that pays on this machine; nothing where float32 does.

    fairseq-train DATA $(fairseq-implicit precision) ...

GPUs get --fp16, CPUs with instructions for bfloat16 (amx_bf16, avx512_bf16, ARM's bf16) --bf16. On all other CPUs
bfloat16 is emulated and slower than float32. A model of the tiny presets gains little: 1.1 at width 128.
"""

import argparse
import sys

from fairseq_implicit.machine import training_precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> None:
    sys.stdout.write(f"{training_precision()}\n")
