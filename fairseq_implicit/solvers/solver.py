"""The contract of everything that integrates: an object, its frozen configuration, and one method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.coefficients import Combination, Weight
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.precision import state_dtype
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
        reused: evaluations of implicit steps that their gradients start from, so that no other was made for these.
    """

    field_calls: int = 0
    accepted: int | Tensor = 0
    rejected: int | Tensor = 0
    reached: tuple[float, ...] = ()
    states: Sequence[Tensor] = ()
    times: Sequence[Time] = ()
    energy: Tensor | None = None
    local_error: Tensor | None = None
    weights: tuple[tuple[Weight, ...], ...] = field(default=(), repr=False)
    carried: Tensor | None = None
    converged: Tensor | None = None
    reused: int = 0


class Solver:
    """``dz/dt = f(t, z)`` from the start of a span to its end, gradient included. Subclasses are frozen dataclasses
    with a ``gradient``.

    Attributes:
        kind: which gradients it can have: see :class:`fairseq_implicit.solvers.gradients.trajectory.Direct`.
        combines: whether it adds up stages with weights that may be learned, and takes them as ``combination``.
        implicit: whether it solves equations, whose ``residual`` and ``converged`` it reports and whose backward passes
            it records.
        adaptive: whether it chooses its steps, and may stop before the end.
        exponential: whether it solves the linear part of a field by itself, whose ``rate`` it takes beside the rest.
        one_field: whether all evaluations must be of one and the same function, noise included.
        keeps: whether it can :class:`Keep` anything.
        shares_steps: whether it has one step for all samples only.
        remedy: what helps after a failure, other than what always does.
        own_coefficients: whether the weights of its stages are its own affair.
        carries_history: whether a layer history of the stack would be a second one.
        evaluates_once: whether a solve evaluates the field once, recomputation in the backward pass aside.
        mixes_history: whether it corrects a ``mixture`` of its prediction with earlier blocks.
        state_float32: whether a stack carries a half-precision state in float32 from solve to solve.
        steps: where it is not ``adaptive``, how many it takes.
        max_evaluations: where it is ``adaptive``, what one sample may cost.
        solver: where it is ``implicit``, that of its equations.
    """

    # Subclasses are dataclasses: `dataclasses.replace` gives the same solver in other steps.
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    gradient: Any
    steps: int
    max_evaluations: int
    solver: FixedPointConfig

    state_float32: bool = False
    kind: ClassVar[str]
    combines: ClassVar[bool] = False
    implicit: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    exponential: ClassVar[bool] = False
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

    def check_penalties(self, consistency: float, second_order: float) -> None:
        """Raises:
        OptionError: these weights of :class:`Combination`'s penalties have no meaning for this solver.
        """

    @property
    def evaluates_once(self) -> bool:
        return False

    @property
    def shares_combination(self) -> bool:
        """Whether all blocks of a stack have the same weights of their stages."""
        return False

    def combination(self, dim: int, norm: Callable[[int], nn.LayerNorm] = nn.LayerNorm) -> Combination:
        """The weights of the stages, for a state of width ``dim``; ``norm`` makes a norm of a width."""
        raise TypeError(f"{type(self).__name__} has no stages")

    def around_layer(self, layer: VectorField) -> VectorField:
        """A map ``(t, z) -> z'`` that takes the place of a solve (see :meth:`plain_layers`), as the backward pass
        should see it."""
        return layer

    def update_cost(self, forward: float | Tensor, backward: float | Tensor, solves: int) -> float | Tensor:
        """Evaluations' worth of an update: an evaluation of the field counts 1, a product with its Jacobian 1, a
        backward pass through an evaluation 2. Penalties are not counted.

        Args:
            forward: evaluations of all solves.
            backward: those of their backward passes, as :class:`AdjointRecord` has them.
            solves: how many solves these are.
        """
        return self.gradient.update_cost(forward, backward)[0]

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
        return x.to(state_dtype(x.dtype)) if self.state_float32 else x

    def plain_layers(self, span: Span) -> int:
        """How many residual layers ``z + f(t, z)`` over unit time the solve of ``span`` is, 0 where it is none."""
        return 0
