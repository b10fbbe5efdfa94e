"""Noise that stays constant along a solve.

With masks redrawn at every evaluation the field is not a function: neither the order of a scheme nor an adjoint
means anything, and an adaptive solver multiplies its evaluations. Each site therefore draws one mask per solve.
"""

import math
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.solvers.precision import field_dtype

POLICIES = ("shared", "independent")

#: Masks are cut from random 16-bit words, four to a 64-bit draw: on a CPU about three times faster than one
#: floating-point draw per element. The rate is exact to 2**-17, and the scale uses the rate really drawn.
_WORD = 1 << 16

#: The bits of 1 in the types of 16 bits: there the words themselves become the mask, without another tensor.
_ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}


class Drop(Protocol):
    """One site's noise of one solve: ``drop(x)``, or ``drop(x, onto)`` for ``onto + drop(x)`` in one pass."""

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor: ...


def _unchanged(x: Tensor, onto: Tensor | None = None) -> Tensor:
    return x if onto is None else onto + x


def check_rate(name: str, rate: float) -> float:
    """Return ``rate`` if it is a probability in [0, 1); ValueError otherwise."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}")
    return float(rate)


def check_policy(policy: str) -> str:
    """Return ``policy`` if it is known; ValueError otherwise."""
    if policy not in POLICIES:
        raise ValueError(f"stage dropout must be one of {', '.join(POLICIES)}; got {policy!r}")
    return policy


def keep_mask(
    shape: tuple[int, ...], rate: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """Draw a mask of ``dtype``, 1 with probability ``1 - rate`` and else 0, and the scale that keeps the mean.

    The mask has the precision of what it multiplies: a bool one is promoted through a copy, forward and backward, which
    in half precision costs four times the product.

    Returns:
        mask of ``shape`` and ``1 / (1 - rate')`` where ``rate'`` is ``rate`` rounded to 16 bits.
    """
    dropped = min(round(rate * _WORD), _WORD - 1)
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    kept = words.view(torch.int16)[:count].view(shape).ge_(dropped - _WORD // 2)
    one = _ONE.get(dtype)
    mask = kept.to(dtype) if one is None else kept.mul_(one).view(dtype)
    return mask, _WORD / (_WORD - dropped)


class _Masked(torch.autograd.Function):
    """``onto + scale · mask · x`` in one pass, forward and backward; ``onto`` may be a 0-dim zero.

    The scale enters each product before it is rounded. In half precision it would itself be rounded as a tensor (1/0.9
    is off by 0.15 % in bfloat16), which is what the derivative of ``addcmul`` makes of it. The mask is 0 or 1, so the
    sum has the bits of a product and an addition that follows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor, scale: float, onto: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale, ctx.dtype, ctx.onto = scale, x.dtype, onto.dtype
        return torch.addcmul(onto, x, mask, value=scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (mask,) = ctx.saved_tensors
        x = onto = None
        if ctx.needs_input_grad[0]:
            x = _Masked.apply(gradient, mask, ctx.scale, gradient.new_zeros(())).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            onto = gradient.to(ctx.onto)
        return x, None, None, onto


class SharedDropout(nn.Module):
    """One dropout site.

    Args:
        rate: probability of dropping an element.
        policy: ``shared`` draws one mask in ``prepare`` and reuses it at every evaluation of the solve;
            ``independent`` draws anew at each evaluation, to reproduce publications that did so.

    Raises:
        ValueError: rate outside [0, 1) or unknown policy.
    """

    def __init__(self, rate: float, policy: str = "shared"):
        super().__init__()
        self.rate = check_rate("dropout", rate)
        self.policy = check_policy(policy)

    def prepare(self, like: Tensor, width: int | None = None) -> Drop:
        """Fix the mask of one solve.

        Args:
            like: a tensor ``(batch, time, dim)`` on the device and in the dtype of what will be dropped.
            width: last extent of what will be dropped inside a sub-layer, where it is not that of ``like``. There it
                comes from a matrix product, in the precision of autocast where that is on.
        """
        if not self.training or self.rate == 0.0:
            return _unchanged
        if self.policy == "independent":
            return lambda x, onto=None: _unchanged(functional.dropout(x, self.rate, training=True), onto)
        if width is None:
            return self._masked(like.shape, like.dtype, like.device)
        return self._masked((*like.shape[:-1], width), field_dtype(like), like.device)

    def _masked(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Drop:
        mask, scale = keep_mask(shape, self.rate, device, dtype)
        zero = mask.new_zeros(())
        return lambda x, onto=None: _Masked.apply(x, mask, scale, zero if onto is None else onto)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, policy={self.policy}"


class DropPath(SharedDropout):
    """Stochastic depth: the whole increment of a sample is dropped, or scaled to keep the mean (arXiv 1603.09382)."""

    def prepare(self, like: Tensor, width: int | None = None) -> Drop:
        """Fix which samples keep their increment: a mask ``(batch, 1, 1)``."""
        if not self.training or self.rate == 0.0:
            return _unchanged
        drawn = partial(self._masked, (like.shape[0], 1, 1), like.dtype, like.device)
        return (lambda x, onto=None: drawn()(x, onto)) if self.policy == "independent" else drawn()


class ReplayedGenerator:
    """Gives operations that draw their own noise (attention dropout) the same noise at every evaluation.

    Only the generator's host-side state is touched, so nothing is synchronised. The seed comes from the CPU
    generator, so it follows ``torch.manual_seed`` and is restored by activation checkpointing.
    """

    def __init__(self, device: torch.device):
        self.seed = int(torch.randint(0, 2**62, ()))
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            self.generator = torch.cuda.default_generators[index]
        else:
            self.generator = torch.default_generator

    def __enter__(self) -> None:
        self.state = self.generator.get_state()
        self.generator.manual_seed(self.seed)

    def __exit__(self, *exc) -> None:
        self.generator.set_state(self.state)
