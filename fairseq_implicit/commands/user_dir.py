"""Prints the folder to give to fairseq's commands as --user-dir."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> None:
    sys.stdout.write(f"{Path(__file__).resolve().parents[1]}\n")
