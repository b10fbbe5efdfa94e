"""Predictor–corrector steps: one more evaluation of the field at a predicted state.

Backward-Euler style: any explicit step predicts P, then ``y' = y + T F(t0 + T, P)``.

Adams pair: the increment of the previous block is a value that travels along the depth,

    P = y + h (3/2 F_l − 1/2 F_{l−1}),      y' = y + h/2 (F(P) + F_l),

and the first block, which has no predecessor, takes a step of Heun's method (the same with P = y + h F_l).

Sources: arXiv 2411.03042 (PCformer); Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, III.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import NOTHING, Solution, Span
from fairseq_implicit.solvers.tableau import HEUN2


@dataclass(frozen=True)
class BackwardEulerCorrected(RungeKutta):
    """One sweep of the fixed-point iteration for backward Euler, started at the explicit solution: the result has
    order 1 whatever the predictor's order."""

    evaluates_once = False

    def plain_layers(self, span: Span) -> int:
        return 0

    def integrate(
        self, f, x, span, layout=UNPADDED, *, dtype=None, pieces=(), keep=NOTHING, combination=None, carried=None,
        mixture=None,
    ) -> Solution:  # fmt: skip
        dtype = dtype or x.dtype
        predicted = super().integrate(f, x, span, layout, dtype=dtype, combination=combination)
        if mixture is None:
            base, prediction = self.state(x), predicted.state
        else:
            base = prediction = mixture(predicted.state)
        evaluate = self.field(f, dtype)

        def correct(state: Tensor, prediction: Tensor) -> Tensor:
            return torch.add(state, evaluate(span.start + span.length, prediction), alpha=span.length)

        state = self.gradient.around_step(correct, self.replay_random)(base, prediction)
        spent = predicted.field_calls + 1
        return replace(predicted, state=state, evaluations=spent, field_calls=spent)


@dataclass(frozen=True)
class HistoryCorrected(BackwardEulerCorrected):
    """The same, corrected at a mixture of the prediction with all earlier blocks (PCformer)."""

    carries_history: ClassVar[bool] = True
    mixes_history: ClassVar[bool] = True


@dataclass(frozen=True)
class AdamsPair(RungeKutta):
    """The AB2/AM2 pair, one step per block; its scheme is Heun's, which starts it."""

    own_coefficients: ClassVar[bool] = True
    carries_history: ClassVar[bool] = True

    scheme: str = "heun2"

    def __post_init__(self):
        super().__post_init__()
        if self.tableau is not HEUN2 or self.steps != 1:
            raise OptionError(
                "corrector",
                "the Adams pair takes one step per block and is started by Heun's method: set `scheme` heun2 and "
                f"`steps` 1, not {self.scheme} and {self.steps}.",
            )
        if self.learns or self.stage_norm:
            raise OptionError("corrector", "adams has coefficients of its own: `coefficients` fixed, no `stage_norm`.")

    def integrate(
        self, f, x, span, layout=UNPADDED, *, dtype=None, pieces=(), keep=NOTHING, combination=None, carried=None,
        mixture=None,
    ) -> Solution:  # fmt: skip
        """See :meth:`RungeKutta.integrate`; ``carried`` is the increment of the previous block ``(batch, time, dim)``,
        at the same distance in time."""
        t0, h = span
        evaluate = self.field(f, dtype or x.dtype)

        def advance(state: Tensor, before: Tensor | None):
            increment = evaluate(t0, state)
            if before is None:
                predicted = torch.add(state, increment, alpha=h)
            else:
                predicted = torch.add(torch.add(state, increment, alpha=1.5 * h), before, alpha=-0.5 * h)
            corrected = torch.add(state, evaluate(t0 + h, predicted), alpha=0.5 * h)
            return torch.add(corrected, increment, alpha=0.5 * h), increment

        state, increment = self.gradient.around_step(advance, self.replay_random)(self.state(x), carried)
        return Solution(state, 2, field_calls=2, accepted=1, carried=increment)
