"""What a network returns for a batch, typed, and as fairseq takes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

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
    """

    values: Tensor
    hidden_states: list[Tensor] | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)
    penalties: dict[str, Tensor] = field(default_factory=dict)
    auxiliary: list[tuple[float, Tensor]] = field(default_factory=list)

    def for_fairseq(self) -> tuple[Tensor, dict[str, Any]]:
        """The values, and beside this output RoBERTa's ``inner_states``, each ``(time, batch, dim)``."""
        states = self.hidden_states
        inner_states = None if states is None else [state.transpose(0, 1) for state in states]
        return self.values, {"inner_states": inner_states, "output": self}


def output_of(returned: Any) -> ModelOutput | None:
    """The typed output in what a fairseq model returned; None when the model is none of this package."""
    match returned:
        # Data parallelism may have wrapped the values since, and the loss's gradient must pass there.
        case (values, {"output": ModelOutput() as output}):
            return replace(output, values=values)
    return None
