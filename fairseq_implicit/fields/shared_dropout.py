"""Noise that stays constant along a solve.

With masks redrawn at every evaluation the field is not a function: neither the order of a scheme nor an adjoint
means anything, and an adaptive solver multiplies its evaluations. Each site therefore draws one mask per solve.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

POLICIES = ("shared", "independent")

#: Masks are cut from random 16-bit words, four to a 64-bit draw: on a CPU about three times faster than one
#: floating-point draw per element. The rate is exact to 2**-17, and the scale uses the rate really drawn.
_WORD = 1 << 16


def _identity(x: Tensor) -> Tensor:
    return x


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


def keep_mask(shape: tuple[int, ...], rate: float, device: torch.device) -> tuple[Tensor, float]:
    """Draw a bool mask, True with probability ``1 - rate``, and the scale that keeps the mean.

    Returns:
        mask of ``shape`` and ``1 / (1 - rate')`` where ``rate'`` is ``rate`` rounded to 16 bits.
    """
    dropped = min(round(rate * _WORD), _WORD - 1)
    count = 1
    for extent in shape:
        count *= extent
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    mask = words.view(torch.int16)[:count].view(shape) >= dropped - _WORD // 2
    return mask, _WORD / (_WORD - dropped)


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

    def prepare(self, like: Tensor, width: int | None = None) -> Callable[[Tensor], Tensor]:
        """Fix the mask of one solve.

        Args:
            like: a tensor ``(batch, time, dim)`` on the device and in the dtype of what will be dropped.
            width: last extent of what will be dropped, where it is not that of ``like``.
        """
        if not self.training or self.rate == 0.0:
            return _identity
        if self.policy == "independent":
            return lambda x: functional.dropout(x, self.rate, training=True)
        shape = like.shape if width is None else (*like.shape[:-1], width)
        return self._masked(shape, like)

    def _masked(self, shape: tuple[int, ...], like: Tensor) -> Callable[[Tensor], Tensor]:
        mask, scale = keep_mask(shape, self.rate, like.device)
        if like.dtype in (torch.float32, torch.float64):
            # One multiplication per evaluation instead of two; four bytes per element, shared by all stages.
            factor = mask.to(like.dtype).mul_(scale)
            return lambda x: x * factor
        # A half-precision scale would be rounded (1/0.9 is off by 0.15 % in bfloat16), so it stays a Python number.
        return lambda x: (x * mask).mul_(scale)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, policy={self.policy}"


class DropPath(SharedDropout):
    """Stochastic depth: the whole increment of a sample is dropped, or scaled to keep the mean (arXiv 1603.09382)."""

    def prepare(self, like: Tensor, width: int | None = None) -> Callable[[Tensor], Tensor]:
        """Fix which samples keep their increment: a mask ``(batch, 1, 1)``."""
        if not self.training or self.rate == 0.0:
            return _identity
        shape = (like.shape[0], 1, 1)
        if self.policy == "independent":
            return lambda x: self._masked(shape, like)(x)
        return self._masked(shape, like)


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
