"""Sums of parameter gradients over the steps of a backward pass."""

from collections.abc import Sequence

from torch import Tensor


def accumulate(totals: list[Tensor | None], parts: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """Adds ``factor * parts`` to ``totals`` in place; ``None`` stands for zero on both sides."""
    for i, part in enumerate(parts):
        if part is None or factor == 0.0:
            continue
        if totals[i] is None:
            totals[i] = part * factor
        else:
            totals[i].add_(part, alpha=factor)
