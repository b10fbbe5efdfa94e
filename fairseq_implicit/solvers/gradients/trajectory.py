"""Gradients of a solve through time that follow the graph of its forward pass.

Memory: a plain solve keeps the activations of every evaluation. ``checkpoint-step`` keeps one state per step,
``checkpoint-stage`` one per evaluation; both evaluate the field once more in the backward pass and give the same
gradients as ``autograd``, because all noise was drawn when the field was prepared, outside the recomputed part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fairseq_implicit.solvers.recomputation import recomputed


@dataclass(frozen=True)
class Direct:
    """Backpropagation through the solver's operations; the base of all gradients of a trajectory.

    Attributes:
        name: how it is called.
        serves: the kinds of solver that it can be formed around.
        condition: what those have in common, as the end of a sentence.
        along_the_way: whether what a solve keeps of its way has a gradient as well.
        recomputes: whether the backward pass evaluates all stages again.
        takes_pieces: whether the field may consist of several pieces, each with weights of its own.
    """

    name: ClassVar[str] = "autograd"
    serves: ClassVar[tuple[str, ...]] = ("fixed", "adaptive", "torchdyn", "torchdiffeq")
    condition: ClassVar[str] = "needs a solver whose graph can be kept"
    along_the_way: ClassVar[bool] = True
    recomputes: ClassVar[bool] = False
    takes_pieces: ClassVar[bool] = True

    def around_step(self, step: Callable, replay_random: bool) -> Callable:
        """What evaluates one step, as the backward pass should see it."""
        return step

    def around_stage(self, f: Callable, replay_random: bool) -> Callable:
        """The field, as the backward pass should see it."""
        return f

    def update_cost(self, forward, backward):
        """Cost of an update in evaluations of the field, and how it is made up, as of an equilibrium's gradient.

        An evaluation costs 1, its full backward pass 2; rejected steps count as if they had one.

        Args:
            forward: evaluations of the solve.
            backward: those that the backward pass made, as :class:`AdjointRecord` has them.
        """
        return (4 * forward, "4 x solve") if self.recomputes else (3 * forward, "3 x solve")

    def solve(self, solver, f, x, span, layout, parameters, record, **options):
        """See :meth:`fairseq_implicit.solvers.solver.Solver.solve`."""
        result = solver.integrate(f, x, span, layout, **options)
        if record is not None and self.recomputes:
            record.evaluations = result.field_calls if torch.is_grad_enabled() else 0
        return result


@dataclass(frozen=True)
class CheckpointStep(Direct):
    """Each step's activations are recomputed."""

    name: ClassVar[str] = "checkpoint-step"
    serves: ClassVar[tuple[str, ...]] = ("fixed", "adaptive")
    condition: ClassVar[str] = "needs `backend` own"
    recomputes: ClassVar[bool] = True

    def around_step(self, step: Callable, replay_random: bool) -> Callable:
        return recomputed(step, replay_random)


@dataclass(frozen=True)
class CheckpointStage(Direct):
    """Each evaluation's activations are recomputed."""

    name: ClassVar[str] = "checkpoint-stage"
    serves: ClassVar[tuple[str, ...]] = ("fixed",)
    condition: ClassVar[str] = "takes fixed steps: set `tolerance` 0"
    recomputes: ClassVar[bool] = True

    def around_stage(self, f: Callable, replay_random: bool) -> Callable:
        return recomputed(f, replay_random)
