"""The cross entropy of a large vocabulary, a few rows at a time.

Written as one operation it holds the logits four times over: as log-probabilities, as the gradient of these, as their
own gradient and, in half precision, in float32. Here nothing of their size is made but the gradient, in their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: Numbers in one piece: on a CPU as many as stay in its cache, elsewhere enough to keep the device busy.
_PIECE = {"cpu": 1 << 18}
_PIECE_OF_DEVICES = 1 << 24

#: Slopes, which lie in [-1, 1], are kept in these units until the scale of the loss is known: those of rare words, of
#: 1e-8 and less, would vanish in float16. A power of two, so that nothing is rounded.
_UNIT = 2.0**14


def cross_entropy_and_correct(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The summed cross entropy in nats, and how many targets have the largest logit.

    Half-precision logits are read in float32, and the loss is summed in it; float64 stays. Has a gradient in ``logits``
    once: a second derivative is refused.

    Args:
        logits: ``(..., classes)``.
        target: int64, with as many entries as the logits have rows; those of ``ignore_index`` count for nothing.

    Returns:
        0-dim loss of at least float32, and 0-dim int64.
    """
    if not torch.is_grad_enabled():
        logits = logits.detach()  # a function of its own is not told
    return _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index)


def _pieces(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _PIECE.get(logits.device.type, _PIECE_OF_DEVICES) // max(1, logits.shape[-1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_empty(target.shape, dtype=wide)
        guesses = torch.empty_like(target)
        slopes = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in _pieces(logits):
            piece = logits[rows].detach().to(wide)
            guesses[rows] = piece.argmax(-1)
            with torch.set_grad_enabled(slopes is not None):
                piece.requires_grad_(slopes is not None)
                loss = functional.cross_entropy(piece, target[rows], ignore_index=ignore_index, reduction="none")
            if slopes is not None:
                (slopes[rows],) = torch.autograd.grad(loss, piece, torch.full_like(loss, _UNIT))
            losses[rows] = loss.detach()
        ctx.save_for_backward(slopes)
        counted = target.ne(ignore_index)
        correct = (guesses.eq(target) & counted).sum()
        ctx.mark_non_differentiable(correct)
        # nll_loss only sums: in the order in which the losses of seeded runs have always been summed.
        return functional.nll_loss(-losses.unsqueeze(1), counted.long() - 1, ignore_index=-1, reduction="sum"), correct

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        (slopes,) = ctx.saved_tensors
        return slopes * (gradient / _UNIT), None, None
