"""States of a solve, kept so that their inner products and combinations are fast and exact about padding."""

from torch import Tensor
from torch.nn import functional

from fairseq_implicit.layout import token_sum

CHUNK = 1024  # numbers per piece: long enough for matrix products to be efficient


class StoredStates:
    """States of one solve, stored so that inner products and combinations are matrix products.

    Tokens are packed into pieces of about ``CHUNK`` numbers, whatever their number, and the stored states lie next
    to the pieces: ``(batch, pieces, states, numbers)``. The pieces of a product are added from left to right.

    Args:
        like: a state, ``(batch, time, dim)``, for shape, dtype and device.
        states: how many states it holds.
    """

    def __init__(self, like: Tensor, states: int):
        _, self.time, self.dim = like.shape
        self.tokens = max(1, 1 << (CHUNK // self.dim).bit_length() - 1) if self.dim <= CHUNK else 1
        # Two pieces at least: a batch of one product takes another path through the library, with other rounding.
        pieces = max(2, -(-self.time // self.tokens))
        self.missing = pieces * self.tokens - self.time
        # Not zeroed: a solve that ends early touches the pages of the states that it stored, and no others.
        self.stored = like.new_empty(like.shape[0], pieces, states, self.tokens * self.dim)

    def pack(self, x: Tensor) -> Tensor:
        """``(batch, time, dim)`` to ``(batch, pieces, numbers)``."""
        if self.missing:
            x = functional.pad(x, (0, 0, 0, self.missing))
        return x.reshape(x.shape[0], -1, self.tokens * self.dim)

    def put(self, slot: int, x: Tensor) -> None:
        """Store a state."""
        self.stored[:, :, slot] = self.pack(x)

    def products(self, x: Tensor, used: int) -> Tensor:
        """Inner products of ``x`` with the first ``used`` states, ``(batch, used)``, float64."""
        # As row times transposed matrix: the library's matrix times column is up to ten times slower.
        return token_sum((self.pack(x).unsqueeze(2) @ self.stored[:, :, :used].mT).squeeze(2))

    def combine(self, weights: Tensor) -> Tensor:
        """``Σ weightsᵢ stateᵢ`` over the first states, ``(batch, time, dim)``; ``weights`` is ``(batch, used)``."""
        stored = self.stored[:, :, : weights.shape[1]]
        mixed = weights.to(stored.dtype)[:, None, None, :] @ stored
        return mixed.reshape(mixed.shape[0], -1, self.dim)[:, : self.time]

    def clear(self, samples: Tensor) -> None:
        """Zero the states of the ``samples``, ``(batch,)`` bool."""
        self.stored[samples] = 0.0

    def rows(self, index: Tensor) -> "StoredStates":
        """The same states for some samples only."""
        self.stored = self.stored[index]
        return self
