"""Activations recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, replay_random: bool = False) -> Callable:
    """``function`` with its activations recomputed in the backward pass; itself while no gradient is recorded.

    Args:
        function: of tensors.
        replay_random: restore the random state for it. Needed only where ``function`` draws random numbers: noise that
            was drawn when the field was prepared stays what it was.
    """

    def run(*arguments):
        if not torch.is_grad_enabled():
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=replay_random)

    return run
