"""The contract of everything that integrates: an object, its frozen configuration, and one method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.status import SolveResult
from fairseq_implicit.solvers.vector_field import Time, VectorField


class Span(NamedTuple):
    """The interval of a solve, in units of time."""

    start: float = 0.0
    length: float = 1.0


class Keep(NamedTuple):
    """What a solve keeps of its way, besides its end.

    Attributes:
        states: those after its steps.
        penalties: the integrals that training can weigh, energy and error estimate.
    """

    states: bool = False
    penalties: bool = False


NOTHING = Keep()


class Piece(NamedTuple):
    """A field on a stretch of time where it is smooth, both ends included.

    Attributes:
        field: ``f(t, z)`` for the times of the stretch.
        end: the time at which the stretch ends.
        continues: whether the field starts with the value that the piece before it ends with (a kink, not a jump).
    """

    field: VectorField
    end: float
    continues: bool = False


@dataclass(frozen=True)
class Solution(SolveResult):
    """A :class:`SolveResult` with what a solve through time knows of its way.

    Attributes:
        field_calls: evaluations of the field on the whole batch, the number that time is proportional to.
        accepted, rejected: steps per sample: an ``int`` when all samples agree, else a ``(batch,)`` tensor.
        reached: the time that each sample reached; the end of the interval unless the solve stopped early.
        states: the states after the accepted steps when they were asked for, the initial one first.
        times: the time of each of ``states``, a ``(batch,)`` tensor where the samples differ.
        energy: ``(batch,)``, with gradient, the integral of the mean squared rate of change over the depth.
        local_error: ``(batch,)``, with gradient, the sum over accepted steps of the rms error estimate.
        weights: of the stages of each sub-step, where the scheme combines them.
        carried: what the next block of a stack needs from this one.
        converged: ``(batch,)`` bool, whether every implicit step met the tolerance; ``None`` where none was taken.
    """

    field_calls: int = 0
    accepted: int | Tensor = 0
    rejected: int | Tensor = 0
    reached: tuple[float, ...] = ()
    states: Sequence[Tensor] = ()
    times: Sequence[Time] = ()
    energy: Tensor | None = None
    local_error: Tensor | None = None
    weights: tuple[tuple[Any, ...], ...] = field(default=(), repr=False)
    carried: Tensor | None = None
    converged: Tensor | None = None


class Solver:
    """``dz/dt = f(t, z)`` from the start of a span to its end, gradient included. Subclasses are frozen dataclasses
    with a ``gradient``.

    Attributes:
        kind: which gradients it can have: see :class:`fairseq_implicit.solvers.gradients.trajectory.Direct`.
        combines: whether it adds up stages with weights that may be learned, and takes them as ``combination``.
        implicit: whether it solves equations, whose ``residual`` and ``converged`` it reports and whose backward passes
            it records.
        adaptive: whether it chooses its steps, and may stop before the end.
        one_field: whether all evaluations must be of one and the same function, noise included.
        keeps: whether it can :class:`Keep` anything.
        shares_steps: whether it has one step for all samples only.
        remedy: what helps after a failure, other than what always does.
        own_coefficients: whether the weights of its stages are its own affair.
        carries_history: whether a layer history of the stack would be a second one.
        mixes_history: whether it corrects a ``mixture`` of its prediction with earlier blocks.
    """

    gradient: Any

    kind: ClassVar[str]
    combines: ClassVar[bool] = False
    implicit: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    one_field: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    shares_steps: ClassVar[bool] = False
    remedy: ClassVar[str] = ""
    own_coefficients: ClassVar[bool] = False
    carries_history: ClassVar[bool] = False
    mixes_history: ClassVar[bool] = False

    def check_gradient(self) -> None:
        """Raises:
        OptionError: the gradient cannot be formed around this solver.
        """
        if self.kind not in self.gradient.serves:
            raise OptionError("gradient", f"{self.gradient.name} {self.gradient.condition}.")

    def solve(
        self,
        f: VectorField,
        x: Tensor,
        span: Span,
        layout: Layout = UNPADDED,
        *,
        parameters: Sequence[Tensor] = (),
        record: AdjointRecord | None = None,
        **options,
    ) -> Solution:
        """Integrate from ``x`` at the start of ``span``.

        Args:
            f: prepared field.
            x: ``(batch, time, dim)``.
            span: the interval.
            layout: of the batch.
            parameters: every tensor with gradient that ``f`` reads, other than its arguments, for gradients that do not
                arise from a kept graph: those left out receive none.
            record: receives the cost of the backward pass.
            options: of :meth:`integrate`.

        Raises:
            OptionError: a tolerance does not suit the precision of ``x``.
        """
        return self.gradient.solve(self, f, x, span, layout, parameters, record, **options)

    def integrate(
        self,
        f: VectorField,
        x: Tensor,
        span: Span,
        layout: Layout = UNPADDED,
        *,
        dtype: torch.dtype | None = None,
        pieces: Sequence[Piece] = (),
        keep: Keep = NOTHING,
    ) -> Solution:
        """The forward pass, whose operations autograd follows; arguments as in :meth:`solve`.

        Args:
            dtype: in which ``f`` is entered, where the state is wider; that of ``x`` by default.
            pieces: ``f`` cut at the times where it is not smooth; empty: it is smooth.
            keep: what to keep of the way.
        """
        raise TypeError(f"{type(self).__name__} defines no integrate()")

    def state(self, x: Tensor) -> Tensor:
        """``x`` in the dtype in which a stack carries it from solve to solve."""
        return x

    def plain_layers(self, span: Span) -> int:
        """How many residual layers ``z + f(t, z)`` over unit time the solve of ``span`` is, 0 where it is none."""
        return 0
