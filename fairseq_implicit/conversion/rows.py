"""The rows of a vocabulary in another order, and the padding's place among the positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: One row for each symbol.
_SYMBOLS = ("encoder.embed_tokens.weight", "encoder.lm_head.weight", "encoder.lm_head.bias")
_POSITIONS = "encoder.embed_positions.weight"


def reordered(weights: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Weights under our names with row ``order[i]`` of each symbol's matrices at place ``i``.

    ``order.argsort()`` undoes it.

    Args:
        weights: of a model.
        order: a permutation, ``(symbols,)`` int64.

    Raises:
        ValueError: it is none of so many symbols.
    """
    symbols = len(weights[_SYMBOLS[0]])
    if not torch.equal(order.sort().values, torch.arange(symbols)):
        raise ValueError(f"the vocabulary's {len(order):,} tokens are not the model's {symbols:,}")
    return {name: weight[order] if name in _SYMBOLS else weight for name, weight in weights.items()}


def with_padding(weights: Mapping[str, Tensor], positions: int, padding: int) -> dict[str, Tensor]:
    """The same weights with ``padding + 1`` rows before the first position, if positions have any, new ones 0.

    Args:
        weights: of a model.
        positions: how many it has.
        padding: the id of the padding.
    """
    if _POSITIONS not in weights:
        return dict(weights)
    rows = weights[_POSITIONS]
    if len(rows) != positions + padding + 1:
        rows = torch.cat([rows.new_zeros(padding + 1, rows.shape[1]), rows[len(rows) - positions :]])
    return {**weights, _POSITIONS: rows}
