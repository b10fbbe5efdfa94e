"""The position-wise feed-forward network."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.shared_dropout import SharedDropout
from fairseq_implicit.fields.sub_layer import SubLayer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_accurate": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
    "silu": functional.silu,
    "linear": lambda x: x,
}


class FeedForward(SubLayer):
    """``fc2(Drop(activation(fc1 z)))``; gated, ``fc2(Drop(activation(a) * b))`` where ``a`` and ``b`` are the halves of
    ``fc1 z`` (arXiv 2002.05202: with gelu it is GEGLU, with silu SwiGLU).

    Args:
        dim: width of the state.
        hidden: inner width.
        activation: a name of ``ACTIVATIONS`` (fairseq's names).
        activation_dropout: rate after the activation.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).
        gated: as many numbers again decide how much of each passes.
        biases: of the linear maps.

    Raises:
        ValueError: unknown activation, non-positive inner width, impossible rate.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "gelu",
        activation_dropout: float = 0.0,
        dropout_policy: str = "shared",
        gated: bool = False,
        biases: bool = True,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if hidden < 1:
            raise ValueError(f"the feed-forward inner width must be positive, got {hidden}")
        self.activation = activation
        self.dropout = SharedDropout(activation_dropout, dropout_policy)
        self.gated = gated
        self.fc1 = nn.Linear(dim, 2 * hidden if gated else hidden, bias=biases)
        self.fc2 = nn.Linear(hidden, dim, bias=biases)

    def inner_projections(self) -> Iterator[nn.Linear]:
        yield self.fc1

    def residual_projections(self) -> Iterator[nn.Linear]:
        yield self.fc2

    def prepare(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Fix one solve's noise and return ``feed(z)``, both ``(batch, time, dim)``."""
        drop = self.dropout.prepare(x, width=self.fc2.in_features)
        activate = ACTIVATIONS[self.activation]

        def feed(z: Tensor) -> Tensor:
            return self.fc2(drop(activate(self.fc1(z))))

        def feed_gated(z: Tensor) -> Tensor:
            inner, gate = self.fc1(z).chunk(2, dim=-1)
            return self.fc2(drop(activate(inner) * gate))

        return feed_gated if self.gated else feed
