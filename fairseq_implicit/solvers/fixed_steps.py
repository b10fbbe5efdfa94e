"""Equal steps of an explicit one-step scheme, whatever one step is.

Nothing here reads a value back from the device, times are Python floats, and the loops have lengths known before the
solve: a solve can be captured by ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairseq_implicit.layout import Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.coefficients import Weight
from fairseq_implicit.solvers.gradients.trajectory import Direct
from fairseq_implicit.solvers.precision import entered_in, state_dtype
from fairseq_implicit.solvers.solver import Keep, Piece, Solution, Solver, Span
from fairseq_implicit.solvers.vector_field import Time, VectorField

#: ``step(f, t, y, h)``: the new state ``(batch, time, dim)`` and the weights of the stages, where they have any.
Step = Callable[[VectorField, Time, Tensor, float], tuple[Tensor, tuple[Weight, ...]]]


@dataclass(frozen=True)
class FixedSteps(Solver):
    """What the explicit schemes in equal steps have in common.

    Attributes:
        scheme: its name.
        steps: number of sub-steps, at least 1.
        gradient: how its gradient is formed.
        state_float32: keep a half-precision state in float32; the field still sees its own dtype.
        replay_random: on recomputation restore the random state. Needed only when the field draws random numbers in
            each evaluation.

    Raises:
        OptionError: a number of steps that is none, or a gradient that cannot be formed.
    """

    kind: ClassVar[str] = "fixed"
    one_field: ClassVar[bool] = False

    scheme: str = "euler"
    steps: int = 1
    gradient: Direct = Direct()
    state_float32: bool = False
    replay_random: bool = True

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError("steps", f"{self.steps} steps per solve: give a whole number of at least 1.")
        self.check_gradient()

    def around_layer(self, layer: VectorField) -> VectorField:
        return self.gradient.around_step(self.gradient.around_stage(layer, self.replay_random), self.replay_random)

    def field(self, f: VectorField, dtype: torch.dtype) -> VectorField:
        """The field as it is evaluated: entered in ``dtype``, with the configured recomputation."""
        return self.gradient.around_stage(entered_in(f, dtype), self.replay_random)

    def march(
        self,
        step: Step,
        evaluations: int,
        f: VectorField,
        x: Tensor,
        span: Span,
        layout: Layout,
        dtype: torch.dtype | None,
        pieces: Sequence[Piece],
        keep: Keep,
    ) -> Solution:
        """All steps of a solve.

        Args:
            step: one of them.
            evaluations: of the field in each.
            f, x, span, layout, dtype, pieces, keep: see :meth:`Solver.integrate`.
        """
        h, dtype = span.length / self.steps, dtype or x.dtype
        evaluated = self.field(f, dtype)
        step = self.gradient.around_step(step, self.replay_random)
        state = self.state(x)
        jumps = not all(piece.continues for piece in pieces[1:])
        energy = x.new_zeros(x.shape[0], dtype=state_dtype(x.dtype)) if keep.penalties else None
        weights, states, times = [], [x], [span.start]
        for index in range(self.steps):
            end = span.start + (index + 1) * h
            g = self.field(_from_the_left(f, pieces, end, h), dtype) if jumps else evaluated
            following, step_weights = step(g, span.start + index * h, state, h)
            if energy is not None:
                # The mean velocity of the step: a lower bound of the energy that needs no further evaluation.
                energy = energy + h * layout.sample_mean(((following - state) / h).square())
            state = following
            if step_weights:
                weights.append(step_weights)
            if keep.states:
                states.append(state)
                times.append(end)
        spent = self.steps * evaluations
        kept: dict[str, Any] = {"states": states, "times": times} if keep.states else {}
        return Solution(
            state, spent, field_calls=spent, accepted=self.steps, energy=energy, weights=tuple(weights), **kept
        )


def _from_the_left(f: VectorField, pieces: Sequence[Piece], end: float, h: float) -> VectorField:
    """``f`` for one step: weights that jump at its end are those before the jump for all its stages."""
    before = end - 1e-6 * h
    left = next(piece.field for piece in pieces if piece.end > before)
    return lambda t, z: left(t, z) if t > before else f(t, z)
