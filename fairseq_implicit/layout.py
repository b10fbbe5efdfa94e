"""What a batch of sequences is: which tokens are real, where they stand, who sees whom; and every mean over them.

A layout is made once per batch, where the batch enters a network, and handed on unchanged to depth, fields and solvers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def token_sum(values: Tensor) -> Tensor:
    """Sum ``(batch, time, ...)`` over time, strictly left to right, in float64.

    A sum whose grouping depends on the number of tokens gives a padded sample other bits than the same sample alone.
    From left to right, trailing zeros are exactly neutral.
    """
    return values.double().cumsum(dim=1)[:, -1]


@dataclass(frozen=True, eq=False)
class Layout:
    """The shape of a batch ``(batch, time)``. ``Layout()`` is that of any batch without padding, at no cost.

    Attributes:
        real: ``(batch, time)`` bool, False at padding; ``None``: all tokens are real, and no device has to be asked.
        positions: ``(batch, time)`` int64; ``None``: each real token's place among those of its sample, from 0.
        segments: ``(batch, time)`` int64, the part of its sample (sentence A or B) that a token belongs to; ``None``
            where the batch has no parts.
        causal: a token sees itself and those before it only.

    Raises:
        ValueError: ``real`` is not bool, or the tensors have not one shape ``(batch, time)``.
    """

    real: Tensor | None = None
    positions: Tensor | None = None
    segments: Tensor | None = None
    causal: bool = False

    def __post_init__(self):
        given = [tensor for tensor in (self.real, self.positions, self.segments) if tensor is not None]
        shapes = {tuple(tensor.shape) for tensor in given}
        if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"a layout's tensors have one shape (batch, time), not {sorted(shapes)}")
        if self.real is not None and self.real.dtype is not torch.bool:
            raise ValueError(f"a layout's real tokens are marked by bool, not by {self.real.dtype}")

    def rows(self, index: Tensor) -> Layout:
        """The layout of the samples ``index``, a tensor of their numbers."""
        parts = (None if part is None else part[index] for part in (self.real, self.positions, self.segments))
        real, positions, segments = parts
        return Layout(real, positions, segments, self.causal)

    def alone(self, row: int, x: Tensor) -> tuple[Tensor, Layout]:
        """One sample without its padding.

        Args:
            row: the sample.
            x: ``(batch, time, dim)``, for the shape.

        Returns:
            ``(time,)`` bool, True at its real tokens, and the layout ``(1, their number)`` of these.
        """
        real = torch.ones_like(x[row, :, 0], dtype=torch.bool) if self.real is None else self.real[row]
        parts = (None if part is None else part[row : row + 1, real] for part in (self.positions, self.segments))
        positions, segments = parts
        return real, Layout(None, positions, segments, self.causal)

    def positions_of(self, tokens: Tensor) -> Tensor:
        """The position of each of ``tokens`` ``(batch, time)``, int64; 0 at padding unless positions were given."""
        if self.positions is not None:
            return self.positions
        if self.real is None:
            return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return (self.real.cumsum(1) - 1).clamp(min=0) * self.real

    def places(self, x: Tensor) -> Tensor:
        """The positions of the tokens of ``x`` ``(batch, time, dim)``: int64 ``(batch, time)``, or ``(1, time)`` where
        all samples have the same."""
        alike = self.real is None and self.positions is None
        return self.positions_of(x[: 1 if alike else None, :, 0])

    def visibility(self, x: Tensor, window: int | None = None) -> tuple[Tensor | None, bool]:
        """``attn_mask`` and ``is_causal`` of torch's scaled_dot_product_attention over ``x`` ``(batch, time, dim)``."""
        if self.real is None and not self._narrow(x, window):
            return None, self.causal
        return self.mask(x, window), False

    def _narrow(self, x: Tensor, window: int | None) -> bool:
        """Whether a window leaves anything out."""
        return window is not None and (self.positions is not None or window < x.shape[1] - 1)

    def mask(self, x: Tensor, window: int | None = None) -> Tensor | None:
        """Bool, ``(batch or 1, 1, time or 1, time)``: whether the query (third) sees the key (last); ``None``: all do.

        Args:
            x: ``(batch, time, dim)``, for its shape and device.
            window: how many positions on each side of its own a query sees; ``None``: all of them.
        """
        mask = None if self.real is None else self.real[:, None, None, :]
        time = x.shape[1]
        if self.causal:
            earlier = torch.ones(time, time, dtype=torch.bool, device=x.device).tril()[None, None]
            mask = earlier if mask is None else mask & earlier
        if window is not None and self._narrow(x, window):
            # What padding sees matters to nobody, but it must be something: its place is that of the first token.
            keys = self.places(x)[:, None, None, :]
            queries = keys.transpose(2, 3)
            near = (keys >= queries - window) & (keys <= queries + window)
            mask = near if mask is None else mask & near
        return mask

    def keep(self, x: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
        """``x`` ``(batch, time, ...)`` at real tokens, ``otherwise`` (zero) at padding.

        A selection, not a product: NaN at padding goes no further.
        """
        if self.real is None:
            return x
        return torch.where(self.real.view(*self.real.shape, *(1,) * (x.dim() - 2)), x, otherwise)

    def sizes(self, x: Tensor) -> Tensor:
        """How many numbers of ``x`` ``(batch, time, dim)`` belong to real tokens: ``(batch,)`` int64."""
        if self.real is None:
            return torch.full((x.shape[0],), x.shape[1] * x.shape[2], device=x.device)
        return self.real.sum(1) * x.shape[2]

    def norm(self, x: Tensor) -> Tensor:
        """Euclidean norm of each sample of ``x`` ``(batch, time, dim)``: ``(batch,)`` float64, exact about padding."""
        return token_sum(self.keep(torch.linalg.vector_norm(x, dim=-1).double().square())).sqrt()

    def sample_mean(self, x: Tensor) -> Tensor:
        """Mean of the numbers of each sample of ``x`` ``(batch, time, dim)``: ``(batch,)``, differentiable.

        What ``x`` holds at padding must be finite.
        """
        if self.real is None:
            share = x.new_full((1, 1, 1), 1.0 / (x.shape[1] * x.shape[2]))
        else:
            share = (self._token_share / x.shape[2]).to(x.dtype)
        return (x * share).sum((1, 2))

    @cached_property
    def _token_share(self) -> Tensor:
        """``(batch, time, 1)`` float64: one over the number of the sample's real tokens, 0 at padding."""
        assert self.real is not None
        real = self.real.double()
        return (real / real.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` ``(batch or 1, time or 1, dim)`` over the real tokens of the whole batch: 0-dim."""
        if self.real is None:
            return values.mean()
        return self.keep(values).sum() / (self.real.sum() * values.shape[2])

    def rms(self, x: Tensor) -> Tensor:
        """Detached root mean square of ``x`` ``(batch, time, dim)`` over the real tokens of the whole batch: 0-dim.

        Squares are taken in float32 (float64 for float64): those of half precision overflow from 256 on.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=wide).square()
        return (self.mean(squares) / x.shape[-1]).sqrt()


#: Of batches without padding, in which every token sees every other.
UNPADDED = Layout()
