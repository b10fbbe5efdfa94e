"""The cross entropy of a large vocabulary, in half precision a few rows at a time.

Computed in float32 at once, half-precision logits would be held eight times over: as float32, as log-probabilities, as
the gradient of these and as their own. Here nothing of their size is made but the gradient, in their dtype.
"""

from __future__ import annotations

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

    Half-precision logits are read in float32, and the loss is summed in it. Their gradient can be taken once only: a
    second derivative is refused.

    Args:
        logits: ``(..., classes)``.
        target: int64, with as many entries as the logits have rows; those of ``ignore_index`` count for nothing.

    Returns:
        0-dim loss of at least float32, and 0-dim int64.
    """
    logits, target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if logits.dtype in (torch.float16, torch.bfloat16):
        if not torch.is_grad_enabled():
            logits = logits.detach()  # a function of its own is not told
        loss, guesses = _InPieces.apply(logits, target, ignore_index)
    else:
        # Pieces would save one tensor in three, and take a third longer: at small widths 3 % of a step.
        loss = functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        guesses = _largest(logits.detach())
    return loss, (guesses.eq(target) & target.ne(ignore_index)).sum()


def _largest(rows: Tensor) -> Tensor:
    """Where each row is largest, the first place of several."""
    if rows.device.type != "cpu":
        return rows.argmax(-1)
    return torch.from_numpy(rows.numpy().argmax(-1))  # torch's own looks at one number at a time


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        losses = logits.new_empty(target.shape, dtype=torch.float32)
        guesses = torch.empty_like(target)
        wanted = ctx.needs_input_grad[0]
        slopes = torch.empty_like(logits) if wanted else None
        count = max(1, _PIECE.get(logits.device.type, _PIECE_OF_DEVICES) // logits.shape[-1])
        for start in range(0, len(target), count):
            rows = slice(start, start + count)
            piece = logits[rows].detach().float().requires_grad_(wanted)
            guesses[rows] = _largest(piece.detach())
            with torch.set_grad_enabled(wanted):
                loss = functional.cross_entropy(piece, target[rows], ignore_index=ignore_index, reduction="none")
            if slopes is not None:
                (slopes[rows],) = torch.autograd.grad(loss, piece, torch.full_like(loss, _UNIT))
            losses[rows] = loss.detach()
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(guesses)
        return losses.sum(), guesses

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        (slopes,) = ctx.saved_tensors
        return slopes * (gradient / _UNIT), None, None
