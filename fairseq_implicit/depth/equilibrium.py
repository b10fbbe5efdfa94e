"""An equilibrium as the depth of an encoder: ``z* = f(z*; x)`` instead of a stack of layers."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fairseq_implicit.depth.clock import UpdateCount
from fairseq_implicit.depth.convergence import ALARM_RESIDUAL, ResidualAlarm, rate_statistics, refuse_failure
from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.depth.schedule import Phase, PhaseConfig, phase_at
from fairseq_implicit.fields.equilibrium_cell import CellConfig, CellLayer, CellMap, EquilibriumCell
from fairseq_implicit.fields.mixers.lambda_layer import content_lambdas
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.module_list import ModuleList
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.fixed_point import FixedPointConfig, solve
from fairseq_implicit.solvers.gradients.equilibrium import Equilibrium, EquilibriumGradient
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.jacobian import (
    frobenius_double_backward,
    frobenius_finite_difference,
    spectral_radius,
)
from fairseq_implicit.solvers.precision import field_dtype
from fairseq_implicit.solvers.recomputation import recomputed
from fairseq_implicit.solvers.vector_field import StateMap

logger = logging.getLogger(__name__)

ESTIMATORS = ("finite-difference", "double-backward")
INITIAL_STATES = ("zero", "input")

RADIUS_STEPS = 20  # products with the Jacobian per estimate of the spectral radius
REVERSIBLE_ERROR = 0.01  # estimated relative error of a reversible gradient above which training is warned
ACCEPTED_SHARE = 0.95  # share of samples that must converge at update 0


class NonConvergentCellError(OptionError):
    """The cell does not converge at update 0."""


@dataclass(frozen=True)
class EquilibriumConfig:
    """What is solved and how it is differentiated.

    Attributes:
        cell: the map.
        solver: forward solver at its full budget.
        evaluation: forward solver of evaluation; ``None``: the same.
        gradient: the gradient after all phases.
        phases: the schedule that leads there.
        prelude_layers: ordinary layers before the equilibrium.
        coda_layers: ordinary layers after it.
        initial_state: ``zero`` or ``input``.
        recompute: recompute the cell in the backward pass (``phantom``, ``jfb`` and ``bptt`` only).
        correction: evaluation numbers whose ``f(z)`` is also trained to predict (fixed-point correction).
        correction_weight: weight of the last of them.
        correction_decay: factor from each to the one before.
        jacobian_estimator: ``finite-difference`` or ``double-backward``.
        jacobian_probes: random directions per estimate.
        monitor_interval: updates between measurements of spectral radius and Jacobian norm; 0 for never.
        allow_nonconvergent: train a cell that does not converge at update 0.

    Raises:
        OptionError: an impossible value or combination.
    """

    cell: CellConfig
    solver: FixedPointConfig = FixedPointConfig()
    evaluation: FixedPointConfig | None = None
    gradient: EquilibriumGradient = Implicit()
    phases: PhaseConfig = PhaseConfig()
    prelude_layers: int = 0
    coda_layers: int = 0
    initial_state: str = "zero"
    recompute: bool = False
    correction: tuple[int, ...] = ()
    correction_weight: float = 1.0
    correction_decay: float = 0.8
    jacobian_estimator: str = "finite-difference"
    jacobian_probes: int = 1
    monitor_interval: int = 100
    allow_nonconvergent: bool = False

    def __post_init__(self):
        gradient, layer, injection = self.gradient, self.cell.layer, self.cell.injection
        self.phases.check(self.solver, gradient)
        for name in ("prelude_layers", "coda_layers", "monitor_interval"):
            if getattr(self, name) < 0:
                raise OptionError(name, f"{getattr(self, name)} is negative.")
        check_choice("initial_state", self.initial_state, INITIAL_STATES)
        check_choice("jacobian_estimator", self.jacobian_estimator, ESTIMATORS)
        if self.jacobian_probes < 1:
            raise OptionError(
                "jacobian_probes", f"{self.jacobian_probes} directions estimate nothing; give at least 1."
            )
        if not self.cell.bounded and gradient.needs_equilibrium:
            raise OptionError(
                "no_final_norm",
                "a pre-norm cell without a norm at its end has spectral radius 1 whatever its weights, so it has no "
                f"equilibrium for {gradient.name} to differentiate; keep the norm or unroll with bptt-K.",
            )
        if not injection.residual and not injection.qkv and self.initial_state == "zero":
            raise OptionError(
                "injection",
                "nothing of the input would reach the state; inject it or start from it (initial state input).",
            )
        if layer.dropout_policy == "independent" and layer.is_noisy and gradient.needs_equilibrium:
            which = "attention dropout" if layer.mixer.noise > 0 else "dropout"
            raise OptionError(
                "stage_dropout",
                f"{which} with a new mask at every evaluation leaves no fixed point to solve for; share the masks "
                "(stage dropout shared) or set the rates to 0.",
            )
        if self.recompute and not gradient.recomputable:
            raise OptionError(
                "checkpoint_activations",
                f"{gradient.name} differentiates one evaluation many times in the backward pass, which recomputation "
                "would repeat or, in its reentrant form, refuse; its memory does not grow with the budget anyway.",
            )
        for count in self.correction:
            if not 1 <= count < gradient.budget(self.solver):
                raise OptionError("correction", f"evaluation {count} lies outside the budget.")
        if self.correction and not gradient.keeps_iterates:
            raise OptionError("correction", f"{gradient.name} keeps no iterates to correct; drop one of the two.")
        if list(self.correction) != sorted(set(self.correction)):
            raise OptionError("correction", "the evaluation numbers must rise.")
        if self.correction_weight <= 0 or not 0 < self.correction_decay <= 1:
            raise OptionError("correction_weight", "weight must be positive and decay in (0, 1].")


class _Within(StateMap):
    """A map with something put around it."""

    def __init__(self, cell: StateMap, around: Callable[[Callable], Callable]):
        self.cell, self.around, self.function = cell, around, around(cell)

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)

    def rows(self, index: Tensor) -> StateMap | None:
        chosen = self.cell.rows(index)
        return None if chosen is None else _Within(chosen, self.around)


class EquilibriumDepth(Depth):
    """Prelude, equilibrium, coda.

    Statistics, the same names for every batch:

    - ``evaluations``, ``…_p95``, ``…_max``: evaluations of the cell that the solver spent, over the samples
      of the batch; the tracked evaluations after it are not counted.
    - ``residual``, ``converged_share``: of the forward solve, over the samples.
    - ``evaluations_backward``, ``…_p95``, ``…_max``, ``adjoint_residual`` (of the reversible iteration an estimate of
      the gradient's error), ``adjoint_fallbacks`` (samples): of the *previous* backward pass, the only one known when
      the batch is logged; 0 before the first.
    - ``spectral_radius``, ``jacobian_norm`` (‖J‖_F / √N): measured every ``monitor_interval`` updates and repeated
      in between; 0 before the first measurement of a run.
    - ``injection_gain`` (0 without residual injection), ``evaluation_budget``.
    - ``rate_mean``, ``rate_min``, ``rate_max``, ``state_rms`` of a cell with a linear part.

    Args:
        config: see :class:`EquilibriumConfig`.
    """

    def __init__(self, config: EquilibriumConfig):
        super().__init__()
        self.config = config
        layer = config.cell.layer
        self.prelude = ModuleList(CellLayer(layer.at(place)) for place in range(config.prelude_layers))
        self.cell = EquilibriumCell(config.cell)
        passed = config.prelude_layers + config.cell.layers
        self.coda = ModuleList(CellLayer(layer.at(passed + place)) for place in range(config.coda_layers))
        # Most layers leave the state unnormalised; the cell's own end already is normal unless it was left out.
        finished = layer.residual.ends_in_norm if config.coda_layers > 0 else config.cell.ends_in_norm
        self.output_norm = None if finished else layer.norm.build(layer.dim)
        self.updates = UpdateCount()
        self.adjoint = AdjointRecord()
        self.checked = False
        self.measured_at = -1
        self.spectral_radius = 0.0
        self.jacobian_norm = 0.0
        self.alarm = ResidualAlarm()
        self.gradient_alarm = ResidualAlarm(REVERSIBLE_ERROR)

    def layers(self) -> Iterator[CellLayer]:
        for part in (self.prelude, self.cell.layers, self.coda):
            yield from part

    def initialise(self) -> None:
        self.cell.initialise()

    def config_at(self, depth: int) -> EquilibriumConfig:
        """That of a budget of ``depth`` evaluations, or of as many unrolled steps."""
        config = self.config
        if not config.gradient.needs_equilibrium:
            return replace(config, gradient=replace(config.gradient, steps=depth), correction=())
        return replace(config, evaluation=replace(config.evaluation or config.solver, max_iter=depth))

    @property
    def scheduled(self) -> bool:
        return self.config.monitor_interval > 0 or self.config.phases.moves

    def count_updates(self, updates: int) -> None:
        self.updates.reach(updates)

    @property
    def updates_seen(self) -> int:
        return self.updates.value

    def phase(self) -> Phase:
        """What this pass does: the schedule's phase in training, the full solve in evaluation."""
        config = self.config
        if not self.training:
            return Phase(config.evaluation or config.solver, config.gradient, 0.0)
        config.gradient.check_budget(config.solver.max_iter + config.phases.budget_jitter)
        return phase_at(self.updates.value, config.phases, config.solver, config.gradient)

    def forward(
        self, x: Tensor, layout: Layout = UNPADDED, return_hidden_states: bool = False, return_lambdas: bool = False
    ) -> DepthOutput:
        """Solve for the equilibrium of ``x``.

        Args:
            x: embedding ``(batch, time, dim)``.
            layout: of the batch.
            return_hidden_states: collect the input and the states after prelude, equilibrium and coda layers.
            return_lambdas: collect the content lambdas of prelude, cell (at the equilibrium) and coda layers.

        Raises:
            NonConvergentCellError: at update 0 of training, when the cell does not converge.
            ArithmeticError: the cell returned non-finite values.
            OptionError: the tolerance or the memory cap does not suit the precision or the batch.
        """
        hidden = [x] if return_hidden_states else None
        lambdas: list[Tensor] | None = [] if return_lambdas else None
        with content_lambdas(lambdas):
            x = self._through(self.prelude, x, layout, hidden)
        # Weights that are computed from others (weight norm) are computed once per pass.
        cached = parametrize.cached() if self.config.cell.weight_norm else contextlib.nullcontext()
        with cached:
            cell = self.cell.prepare(x, layout)
            phase = self.phase()
            if self.training and not self.checked and self.updates.value == 0:
                self._check_convergence(cell, x, layout)
            found = self._solve(cell, x, layout, phase)
            refuse_failure(found.solve.status, "the equilibrium")
            penalties = self._penalties(cell, found, layout, phase)
            if self.training:
                self._monitor(cell, found, layout)
            if lambdas is not None:
                with content_lambdas(lambdas):
                    self.cell.prepare(x, layout)(found.state)
        with content_lambdas(lambdas):
            state = self._finish(found.state, layout, hidden, collect=True)
        auxiliary = [
            (weight, self._finish(found.iterates[count], layout, None)) for count, weight in self._correction_weights()
        ]
        statistics = self._statistics(found, phase)
        if self.cell.linear is not None:
            statistics |= {"state_rms": layout.rms(found.state), **rate_statistics([self.cell.linear()])}
        operations = self._operations(statistics, phase, found.reused, x.shape[1])
        return DepthOutput(state, hidden, statistics, penalties, auxiliary, operations, lambdas)

    def _through(
        self, layers: Iterable[CellLayer], state: Tensor, layout: Layout, hidden: list[Tensor] | None
    ) -> Tensor:
        for layer in layers:
            state = layout.keep(layer.residual(state, layout).layer(state))
            if hidden is not None:
                hidden.append(state)
        return state

    def _finish(self, state: Tensor, layout: Layout, hidden: list[Tensor] | None, collect: bool = False) -> Tensor:
        if collect and hidden is not None:
            hidden.append(state)
        state = self._through(self.coda, state, layout, hidden)
        return state if self.output_norm is None else layout.keep(self.output_norm(state))

    def _initial_state(self, x: Tensor) -> Tensor:
        return x if self.config.initial_state == "input" else torch.zeros_like(x)

    def _solve(self, cell: CellMap, x: Tensor, layout: Layout, phase: Phase) -> Equilibrium:
        f = cell.severed() if phase.gradient.reconstructs else cell
        leaves = f.depends_on
        compiled = _Within(f, self.around)
        return phase.gradient.equilibrium(
            _Within(compiled, recomputed) if self.config.recompute else compiled,
            self._initial_state(x),
            phase.solver,
            layout,
            self.adjoint,
            depends_on=leaves,
            sources=cell.depends_on,
            capture=self.config.correction if self.training else (),
        )

    def _correction_weights(self) -> list[tuple[int, float]]:
        """``(evaluation, weight)``: γ^(n−1−i) times the weight, in training."""
        counts = self.config.correction if self.training else ()
        last = len(counts) - 1
        return [
            (count, self.config.correction_weight * self.config.correction_decay ** (last - place))
            for place, count in enumerate(counts)
        ]

    def _penalties(self, cell: CellMap, found: Equilibrium, layout: Layout, phase: Phase) -> dict[str, Tensor]:
        config = self.config
        if not config.phases.jacobian_weight:
            return {}
        if not self.training or not phase.jacobian_weight:
            return {"jacobian_penalty": found.state.new_zeros((), dtype=torch.float32)}
        point = (found.state if found.point is None else found.point).detach()
        if config.jacobian_estimator == "double-backward":
            estimate = frobenius_double_backward(cell, point, config.jacobian_probes, layout)
        else:
            precision = field_dtype(point)
            estimate = frobenius_finite_difference(cell, point, cell(point), precision, config.jacobian_probes, layout)
        return {"jacobian_penalty": phase.jacobian_weight * estimate}

    @torch.no_grad()
    def _measure(self, cell: CellMap, point: Tensor, layout: Layout) -> None:
        """Spectral radius and Jacobian norm at ``point``; the training's random numbers are not touched."""
        generator = torch.Generator().manual_seed(self.config.phases.seed + self.updates.value)
        radius = spectral_radius(cell, point, RADIUS_STEPS, layout, generator)
        square = frobenius_finite_difference(cell, point, cell(point), field_dtype(point), 1, layout, generator)
        self.spectral_radius, self.jacobian_norm = torch.stack([radius.mean(), square.sqrt()]).tolist()
        self.measured_at = self.updates.value

    def _monitor(self, cell: CellMap, found: Equilibrium, layout: Layout) -> None:
        update, interval = self.updates.value, self.config.monitor_interval
        if interval and update % interval == 0 and self.measured_at != update:
            self._measure(cell, (found.state if found.point is None else found.point).detach(), layout)
        if self.config.gradient.reconstructs:
            # Of the previous backward pass, as all that is known of backward passes.
            error = float(torch.as_tensor(self.adjoint.residual).max())
            if self.gradient_alarm.due(update, error):
                logger.warning(
                    "update %d: the reversible iteration did not come back to its start, and the gradient is wrong by "
                    "an estimated %.2g of its size; lower max_iter or gradient_damping, or take the gradient ift",
                    update,
                    error,
                )
        if not found.solve.converged.all():
            mean = float(found.solve.residual.mean())
            # A network that is being unrolled is not asked to converge yet.
            solving = found.point is not None and self.config.solver.criterion == "relative"
            if solving and self.alarm.due(update, mean):
                logger.warning(
                    "update %d: the mean residual %.3f of the equilibrium is above %.2f (%s); raise the budget, or "
                    "strengthen the contraction: a larger injection gain, a Jacobian penalty, a smaller learning rate",
                    update,
                    mean,
                    ALARM_RESIDUAL,
                    found.solve.sentence(),
                )

    @torch.no_grad()
    def _check_convergence(self, cell: CellMap, x: Tensor, layout: Layout) -> None:
        """Solve once at full budget at update 0, say how it went, and refuse a cell that has no equilibrium.

        Raises:
            NonConvergentCellError: too few samples converge and nobody has allowed it.
        """
        self.checked = True
        config = self.config
        result = solve(cell, self._initial_state(x), config.solver, layout)
        refuse_failure(result.status, "the equilibrium")
        self._measure(cell, result.state, layout)
        evaluations, residual, share = torch.stack(
            [result.evaluations.double().mean(), result.residual.double().mean(), result.converged.double().mean()]
        ).tolist()
        logger.info(
            "equilibrium at update 0: spectral radius %.3f, Jacobian norm %.3f, %.1f evaluations (budget %d), "
            "residual %.1e (tolerance %.0e), %.0f %% of the samples converged",
            self.spectral_radius,
            self.jacobian_norm,
            evaluations,
            config.solver.max_iter,
            residual,
            result.tolerance,
            100 * share,
        )
        if share >= ACCEPTED_SHARE or not config.gradient.uses_solver or config.allow_nonconvergent:
            return
        raise NonConvergentCellError(
            "allow_nonconvergent",
            f"the cell does not converge: after {config.solver.max_iter} evaluations {100 * share:.0f} % of the "
            f"samples meet the tolerance {result.tolerance:g} (mean residual {residual:.2g}, spectral radius "
            f"{self.spectral_radius:.2f}). {self._advice()} or set this to train it as it is.",
        )

    def _advice(self) -> str:
        cell, injection = self.config.cell, self.config.cell.injection
        if not injection.residual:
            return "Inject the input into the residual stream (`injection` residual), which makes the map contract,"
        if self.spectral_radius < 0.95:
            return "It contracts, so raise `max_iter`, loosen `tol`,"
        if cell.has_linear_part:
            return "Lower the scale of the initial weights, set `jacobian_weight`,"
        return (
            f"Raise `injection_gain` above {injection.gain:g}, lower the scale of the initial weights, set "
            "`jacobian_weight`,"
        )

    def _operations(
        self, statistics: dict[str, float | Tensor], phase: Phase, reused: bool, time: int
    ) -> float | Tensor:
        """See :class:`DepthOutput`; of ``time`` tokens a sequence, penalties and measurements not included."""
        gradient = phase.gradient
        cost = gradient.update_cost(statistics["evaluations"], statistics["evaluations_backward"])[0] - int(reused)
        if self.config.recompute:
            cost = cost + gradient.steps  # the tracked evaluations
        codas = 1 + len(self._correction_weights())
        explicit = sum(layer.operations(time) for layer in self.prelude)
        explicit += sum(layer.operations(time) for layer in self.coda) * codas
        return cost * self.cell.operations(time) + 3 * explicit

    def _statistics(self, found: Equilibrium, phase: Phase) -> dict[str, float | Tensor]:
        result, adjoint = found.solve, self.adjoint
        gain = self.cell.injection.gain
        forward, backward = (
            torch.as_tensor(counts, dtype=torch.float32).flatten()
            for counts in (result.evaluations, adjoint.evaluations)
        )
        # The first ones are those that a line of text shows.
        return {
            "evaluations": forward.mean(),
            "evaluations_backward": backward.mean(),
            "residual": result.residual.float().mean(),
            "converged_share": result.converged.float().mean(),
            "adjoint_fallbacks": torch.as_tensor(adjoint.fallbacks, dtype=torch.float32),
            "spectral_radius": self.spectral_radius,
            "injection_gain": 0.0 if gain is None else gain.detach(),
            "evaluation_budget": float(phase.gradient.budget(phase.solver)),
            "jacobian_norm": self.jacobian_norm,
            "adjoint_residual": torch.as_tensor(adjoint.residual, dtype=torch.float32).mean(),
            "evaluations_p95": forward.quantile(0.95),
            "evaluations_max": forward.max(),
            "evaluations_backward_p95": backward.quantile(0.95),
            "evaluations_backward_max": backward.max(),
        }
