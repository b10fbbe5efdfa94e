"""What a network returns for a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class ModelOutput:
    """Predictions or features, and what the depth says of itself.

    Attributes:
        values: logits ``(batch, time, vocabulary)``, at selected positions only ``(selected, vocabulary)``, those of a
            classification head ``(batch, classes)``; or features ``(batch, time, dim)``.
        hidden_states: the states along the depth when asked for, first the input, each ``(batch, time, dim)``.
        statistics: name -> number or detached 0-dim tensor, to be logged.
        penalties: name -> 0-dim tensor with gradient, already weighted, per unit of the loss's sample size.
        auxiliary: ``(weight, values)`` pairs: what a corrected state gives in place of the last, whose loss is added
            with that weight.
        operations: floating-point operations of the forward and backward pass on this batch, padding included: those of
            the matrix products (see :class:`~fairseq_implicit.depth.output.DepthOutput`).
        lambdas: the content lambdas along the depth when asked for, each ``(batch, key, value)``.
    """

    values: Tensor
    hidden_states: list[Tensor] | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)
    penalties: dict[str, Tensor] = field(default_factory=dict)
    auxiliary: list[tuple[float, Tensor]] = field(default_factory=list)
    operations: float | Tensor = 0.0
    lambdas: list[Tensor] | None = None

    def read_by(self, head: Callable[[Tensor], Tensor]) -> ModelOutput:
        """The same output with what ``head`` makes of the features, of the auxiliary ones, too."""
        auxiliary = [(weight, head(features)) for weight, features in self.auxiliary]
        return replace(self, values=head(self.values), auxiliary=auxiliary)
