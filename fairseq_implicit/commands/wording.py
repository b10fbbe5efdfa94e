"""Words of tables: numbers with their nouns, and what a measurement depends on."""

import platform

import torch


def counted(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def conditions(device: str, threads: int) -> str:
    """What a measurement depends on besides its settings, for the line above a table."""
    return f"torch {torch.__version__}, {device}, {counted(threads, 'thread')}, {platform.machine()}"
