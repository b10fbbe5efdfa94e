"""What training asks of an equilibrium at each update: unrolled warm-up, phantom gradients, then the exact ones.

A phase is a function of the update number and a seed alone, so it is restored with the number from a checkpoint and
is the same on every rank: budgets that differ between ranks would leave all but one of them waiting.
"""

import math
import random
from dataclasses import dataclass, replace

from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient
from fairseq_implicit.solvers.gradients.phantom import Phantom
from fairseq_implicit.solvers.gradients.unrolled import Unrolled


@dataclass(frozen=True)
class PhaseConfig:
    """The schedule.

    Attributes:
        warmup_updates: updates that unroll ``warmup_steps`` tied steps from the start, without a solver.
        warmup_steps: see above.
        phantom_updates: updates after the warm-up that take phantom gradients of ``phantom_steps`` steps.
        phantom_steps: see above.
        ramp_updates: updates after the warm-up over which budget (linearly) and tolerance (geometrically) go from
            their starts to the solver's own.
        start_max_iter: evaluation budget at the start of the ramp; ``None`` leaves the budget alone.
        start_tol: tolerance at the start of the ramp; ``None`` leaves it alone.
        budget_jitter: the budget of each update moves by a whole number drawn from [−jitter, jitter].
        jacobian_weight: weight γ of the Jacobian penalty; 0 for none.
        jacobian_frequency: share of the updates that pay it.
        jacobian_weight_step: added to γ every ``jacobian_weight_interval`` updates.
        jacobian_weight_interval: see above.
        seed: of the jitter and of the penalty's draws.

    Raises:
        OptionError: an option is out of range or needs another.
    """

    warmup_updates: int = 0
    warmup_steps: int = 4
    phantom_updates: int = 0
    phantom_steps: int = 4
    ramp_updates: int = 0
    start_max_iter: int | None = None
    start_tol: float | None = None
    budget_jitter: int = 0
    jacobian_weight: float = 0.0
    jacobian_frequency: float = 1.0
    jacobian_weight_step: float = 0.0
    jacobian_weight_interval: int = 0
    seed: int = 1

    def __post_init__(self):
        for name in ("warmup_updates", "phantom_updates", "ramp_updates", "budget_jitter", "jacobian_weight_interval"):
            if getattr(self, name) < 0:
                raise OptionError(name, f"{getattr(self, name)} is negative.")
        for name in ("warmup_steps", "phantom_steps"):
            if getattr(self, name) < 1:
                raise OptionError(name, f"{getattr(self, name)} steps make no gradient; give at least 1.")
        ramped = self.start_max_iter is not None or self.start_tol is not None
        if self.ramp_updates and not ramped:
            raise OptionError("ramp_updates", "a ramp needs a start: give a starting budget, tolerance or both.")
        if ramped and not self.ramp_updates:
            name = "start_max_iter" if self.start_max_iter is not None else "start_tol"
            raise OptionError(name, "a start needs the number of updates of its ramp.")
        if self.start_max_iter is not None and self.start_max_iter < 1:
            raise OptionError("start_max_iter", f"a budget of {self.start_max_iter} evaluations finds nothing.")
        if self.start_tol is not None and not (math.isfinite(self.start_tol) and self.start_tol > 0):
            raise OptionError("start_tol", f"the tolerance {self.start_tol} is not a positive number.")
        if self.jacobian_weight < 0 or self.jacobian_weight_step < 0:
            raise OptionError("jacobian_weight", "a negative weight would reward expansion.")
        if not 0.0 < self.jacobian_frequency <= 1.0:
            raise OptionError("jacobian_frequency", f"{self.jacobian_frequency} is outside (0, 1].")
        if bool(self.jacobian_weight_step) != bool(self.jacobian_weight_interval):
            raise OptionError("jacobian_weight_step", "a growing weight needs both its step and its interval.")
        if self.jacobian_weight_step and not self.jacobian_weight:
            raise OptionError("jacobian_weight_step", "there is no Jacobian penalty to strengthen; give it a weight.")

    @property
    def moves(self) -> bool:
        """Whether two updates may differ."""
        timed = self.warmup_updates or self.phantom_updates or self.ramp_updates or self.jacobian_weight_interval
        drawn = self.budget_jitter or (self.jacobian_weight and self.jacobian_frequency < 1)
        return bool(timed or drawn)

    def check(self, solver: FixedPointConfig, gradient: EquilibriumGradient) -> None:
        """Refuse schedules that contradict the solver or gradient they lead to.

        Raises:
            OptionError: naming the option of the schedule.
        """
        if not gradient.uses_solver:
            for name in ("phantom_updates", "ramp_updates"):
                if getattr(self, name):
                    raise OptionError(name, f"{gradient.name} has no solver to lead up to; drop one of the two.")
        if not gradient.needs_equilibrium and self.budget_jitter:
            raise OptionError("budget_jitter", f"{gradient.name} has a fixed number of steps; drop one of the two.")
        if self.start_max_iter is not None and self.start_max_iter > solver.max_iter:
            raise OptionError(
                "start_max_iter",
                f"the ramp starts at {self.start_max_iter} evaluations, above its end {solver.max_iter}.",
            )
        if self.start_tol is not None:
            if solver.tol is None:
                raise OptionError("start_tol", "a tolerance ramp needs its end; give the solver's tolerance too.")
            if self.start_tol < solver.tol:
                raise OptionError("start_tol", f"the ramp starts at {self.start_tol:g}, below its end {solver.tol:g}.")
        lowest = solver.max_iter if self.start_max_iter is None else self.start_max_iter
        if self.budget_jitter >= lowest:
            raise OptionError(
                "budget_jitter", f"{self.budget_jitter} can leave no evaluation of a budget of {lowest}; give less."
            )


@dataclass(frozen=True)
class Phase:
    """What one update does.

    Attributes:
        solver: with this update's budget and tolerance.
        gradient: this update's gradient.
        jacobian_weight: γ of this update; 0 where the penalty was not drawn.
    """

    solver: FixedPointConfig
    gradient: EquilibriumGradient
    jacobian_weight: float


def phase_at(update: int, config: PhaseConfig, solver: FixedPointConfig, gradient: EquilibriumGradient) -> Phase:
    """The phase of update ``update``, counted from 0 over the network's whole life."""
    draw = random.Random(config.seed * 1_000_003 + update)
    penalised = draw.random() < config.jacobian_frequency
    jitter = draw.randint(-config.budget_jitter, config.budget_jitter)

    weight = config.jacobian_weight
    if config.jacobian_weight_interval:
        weight += config.jacobian_weight_step * (update // config.jacobian_weight_interval)
    weight = weight if penalised else 0.0
    if update < config.warmup_updates:
        # Plain tied steps whatever the later damping is.
        return Phase(solver, Unrolled(config.warmup_steps), weight)

    since = update - config.warmup_updates
    share = min(1.0, since / config.ramp_updates) if config.ramp_updates else 1.0
    budget, tol = solver.max_iter, solver.tol
    if config.start_max_iter is not None:
        budget = round(config.start_max_iter + share * (solver.max_iter - config.start_max_iter))
    if config.start_tol is not None:
        assert solver.tol is not None, "PhaseConfig.check() refuses a ramp without an end"
        tol = config.start_tol * (solver.tol / config.start_tol) ** share
    solver = replace(solver, max_iter=budget + jitter, tol=tol)
    if since < config.phantom_updates:
        gradient = Phantom(config.phantom_steps, gradient.damping)
    return Phase(solver, gradient, weight)
