"""Rotary positions: queries and keys are turned by angles that grow with their place (arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED, Layout


def rotation(x: Tensor, width: int, base: float, layout: Layout = UNPADDED) -> Callable[[Tensor], Tensor]:
    """``turn(q)``, ``(batch, heads, time, width)`` to the same, after which products of queries and keys depend on
    their distance alone.

    Numbers ``i`` and ``i + width / 2`` are the coordinates of a plane that turns by ``base^(-2 i / width)`` radians per
    position: the halves as in GPT-NeoX and ModernBERT, not the neighbours of the paper.

    Args:
        x: what the depth starts from, ``(batch, time, dim)``.
        width: of a head; even.
        base: the larger, the slower the last planes turn.
        layout: of the batch.
    """
    # Angles in float32: half precision has no room for many turns.
    wide = torch.promote_types(x.dtype, torch.float32)
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=wide, device=x.device) / width)
    angles = layout.places(x)[:, None, :, None].to(wide) * frequencies
    cos, sin = angles.cos(), angles.sin()

    def turn(q: Tensor) -> Tensor:
        one, other = q.chunk(2, dim=-1)
        return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1).to(q.dtype)

    return turn
