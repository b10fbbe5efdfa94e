"""What every depth (stack, continuum, equilibrium) returns to the model."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class DepthOutput:
    """The encoder's state after its depth.

    Attributes:
        state: ``(batch, time, dim)``.
        hidden_states: the states along the depth when asked for, first the input, each ``(batch, time, dim)``.
        statistics: flat, name -> scalar (0-dim detached tensor, float or int): evaluations, residual, gate means …
            The criterion logs each under its own name. The names must be the same for every batch and rank.
        penalties: name -> 0-dim tensor **with** gradient, already weighted, per masked token: the criterion
            adds each to the loss, times the sample size.
        auxiliary_states: ``(weight, state)`` pairs whose masked-LM loss is added to the loss with that weight
            (fixed-point correction).
    """

    state: Tensor
    hidden_states: list[Tensor] | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)
    penalties: dict[str, Tensor] = field(default_factory=dict)
    auxiliary_states: list[tuple[float, Tensor]] = field(default_factory=list)
