"""Sums of parameter gradients over the steps of a backward pass."""

from collections.abc import Sequence

from torch import Tensor


def accumulate(totals: list[Tensor | None], parts: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """Adds ``factor * parts`` to ``totals`` in place; ``None`` stands for zero on both sides."""
    for i, part in enumerate(parts):
        if part is None or factor == 0.0:
            continue
        total = totals[i]
        if total is None:
            totals[i] = part * factor
        else:
            total.add_(part, alpha=factor)
