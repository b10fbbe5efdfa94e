"""Continuous depth: one time-conditioned field integrated over the whole depth (neural ODE, arXiv 1806.07366).

Regularisers: kinetic energy and the Frobenius norm of the Jacobian (Finlay et al., arXiv 2002.02798) keep the flow easy
to solve, the local error (Pal et al., arXiv 2105.03918) keeps it easy for the very solver that is used.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fairseq_implicit.depth.convergence import BudgetAlarm, per_sample_mean, rate_statistics, refuse_failure
from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.depth.random_steps import RandomSteps
from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.mixers.lambda_layer import content_lambdas
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.adaptive import STEP_CONTROLS
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.jacobian import frobenius_finite_difference
from fairseq_implicit.solvers.solver import NOTHING, Keep, Solution, Solver, Span
from fairseq_implicit.solvers.status import Status


@dataclass(frozen=True)
class ContinuousConfig:
    """What is solved and with which penalties.

    Attributes:
        dim: width of the state.
        duration: the depth T, in units of one transformer layer.
        solver: of the whole depth.
        step_control: of an adaptive solver: ``sample``, ``batch``, or ``auto``: in evaluation always ``sample``, so
            that batch mates change no answer (with a library each sample is then solved by itself); in training
            ``sample`` where field and solver can.
        kinetic_energy, jacobian, local_error: weights of the regularisers, 0 for none.
        random_steps: ``(low, high)`` of the number of fixed steps drawn at each update, or ``None``.
        seed: of ``random_steps``.
        noise: whether the field has dropout at all.
        independent_noise: whether that is drawn anew at each evaluation.
        final_norm: end with a layer norm.
        norm: that norm.

    Raises:
        OptionError: an impossible combination, in one sentence that names the option.
    """

    dim: int
    duration: float
    solver: Solver
    step_control: str = "auto"
    kinetic_energy: float = 0.0
    jacobian: float = 0.0
    local_error: float = 0.0
    random_steps: tuple[int, int] | None = None
    seed: int = 1
    noise: bool = False
    independent_noise: bool = False
    final_norm: bool = True
    norm: NormConfig = NormConfig()

    def __post_init__(self):
        solver = self.solver
        if not 0 < self.duration < math.inf:
            raise OptionError("duration", f"{self.duration}: the depth must be positive and finite.")
        for name in ("kinetic_energy", "jacobian", "local_error"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(name, f"{getattr(self, name)}: a penalty's weight must be finite and not negative.")
        check_choice("step_control", self.step_control, ("auto", *STEP_CONTROLS))
        if self.step_control == "sample" and solver.shares_steps:
            raise OptionError("step_control", f"sample needs `backend` own: {solver.kind} has one step for all.")
        if self.random_steps is not None:
            if solver.adaptive:
                raise OptionError("random_steps", "it draws a number of fixed steps: set `tolerance` 0.")
            RandomSteps(self.random_steps, self.seed)
        if self.noise and self.independent_noise and solver.one_field:
            raise OptionError(
                "stage_dropout",
                "independent makes the field a different function at each evaluation: neither an adaptive nor a "
                "reversible solve has a meaning then; use shared.",
            )
        if self.local_error > 0 and not solver.adaptive:
            raise OptionError("local_error", "it needs the error estimate of adaptive steps: set `tolerance`.")
        if self.penalised and not solver.gradient.along_the_way:
            raise OptionError(
                "gradient",
                f"{solver.gradient.name} carries the gradient of the final state only, not that of the penalties: use "
                "autograd or checkpoint-step with `kinetic_energy`, `jacobian` and `local_error`.",
            )
        if self.penalised and not solver.keeps:
            raise OptionError("backend", f"penalties along the depth need own, not {solver.kind}.")

    @property
    def penalised(self) -> bool:
        return self.kinetic_energy > 0 or self.jacobian > 0 or self.local_error > 0


class ContinuousDepth(Depth):
    """The solve of one field over the whole depth.

    Statistics, see :mod:`fairseq_implicit.depth.convergence`: ``evaluations`` and ``evaluations_max`` per sample,
    ``steps`` and ``rejected`` (means over the batch), ``evaluations_backward``, ``stopped``, ``state_rms``; ``rate_…``
    of a linear part.

    Args:
        config: see :class:`ContinuousConfig`.
        field: the time-conditioned field.

    Raises:
        OptionError: the field cannot do what the configuration asks, in one sentence.
    """

    def __init__(self, config: ContinuousConfig, field: Field):
        super().__init__()
        self.config = config
        self.field = field
        self.final_norm = config.norm.build(config.dim) if config.final_norm else None
        self.random_steps = None if config.random_steps is None else RandomSteps(config.random_steps, config.seed)
        if field.piecewise and config.step_control == "sample":
            raise OptionError(
                "step_control",
                "sample gives every sample its own time, but weights interpolated along the depth need one for the "
                "batch in training: use batch, or auto (sample in evaluation).",
            )
        if field.piecewise and not config.solver.gradient.takes_pieces:
            raise OptionError(
                "gradient",
                f"{config.solver.gradient.name} fails on weights that act at some depths only: use adjoint with "
                "`backend` own, or `depth_weights` embedding.",
            )
        self.adjoint = AdjointRecord()
        self.budget_alarm = BudgetAlarm()

    def layers(self) -> Iterator[Field]:
        return self.field.layers()

    def config_at(self, depth: int) -> ContinuousConfig:
        """That of ``depth`` fixed steps over the same time."""
        solver = self.config.solver
        if solver.adaptive:
            raise OptionError("tolerance", "adaptive steps choose their number themselves: set 0 for fixed ones.")
        return replace(self.config, solver=replace(solver, steps=depth))

    @property
    def piecewise(self) -> bool:
        return self.field.piecewise

    @property
    def scheduled(self) -> bool:
        return self.random_steps is not None

    def count_updates(self, updates: int) -> None:
        if self.random_steps is not None:
            self.random_steps.update = updates

    @property
    def step_control(self) -> str:
        """``sample`` or ``batch``: that of a solve in the present mode, training or evaluation."""
        if self.config.step_control != "auto":
            return self.config.step_control
        one_step = self.field.piecewise or self.config.solver.shares_steps
        return "batch" if self.training and one_step else "sample"

    def solver(self) -> Solver:
        """That of the present mode and update."""
        solver = self.config.solver
        if solver.adaptive:
            return replace(solver, step_control=self.step_control)
        if self.random_steps is not None and self.training:
            return replace(solver, steps=self.random_steps.draw())
        return solver

    def forward(
        self, x: Tensor, layout: Layout = UNPADDED, return_hidden_states: bool = False, return_lambdas: bool = False
    ) -> DepthOutput:
        """Solve from the embedding at t = 0 to t = T.

        Args:
            x: embedding ``(batch, time, dim)``.
            layout: of the batch.
            return_hidden_states: collect the embedding and the state after each accepted step (before the final norm);
                of libraries and memory-free gradients only the first and last.
            return_lambdas: collect the content lambdas at these states.

        Raises:
            ArithmeticError: the solve failed; the sentence says where.
            OptionError: the tolerance does not suit the precision.
        """
        # Penalties need the trajectory only where they are trained.
        penalised = self.config.penalised and torch.is_grad_enabled()
        keep = Keep(states=return_hidden_states or return_lambdas or penalised, penalties=penalised)
        f = self.field.prepare(x, layout).within(self.around)
        solution = self.solve(f, x, layout, keep)
        penalties = self._penalties(f, solution, layout, x.dtype) if penalised else {}
        state = solution.state.to(x.dtype)
        statistics = self._statistics(solution, layout)
        if self.final_norm is not None:
            state = self.final_norm(state)
        hidden_states = [one.to(x.dtype) for one in solution.states] if return_hidden_states else None
        cost = self.config.solver.update_cost(statistics["evaluations"], statistics["evaluations_backward"], 1)
        operations = cost * self.field.operations(x.shape[1])
        lambdas = self._lambdas(solution, x, layout) if return_lambdas else None
        return DepthOutput(state, hidden_states, statistics, penalties, operations=operations, lambdas=lambdas)

    def _lambdas(self, solution: Solution, x: Tensor, layout: Layout) -> list[Tensor]:
        """Content lambdas along the trajectory. Each sample may be there at a time of its own."""
        found: list[Tensor] = []
        samples = torch.arange(len(x), device=x.device)
        for t, state in zip(solution.times, solution.states, strict=True):
            parts: list[Tensor] = []
            for rows in samples.split(1) if isinstance(t, Tensor) else (samples,):
                time = float(t[rows]) if isinstance(t, Tensor) else t
                with content_lambdas(parts):
                    self.field.prepare(x[rows], layout.rows(rows))(time, state[rows].to(x.dtype))
            if parts:
                found.append(torch.cat(parts))
        return found

    def solve(self, f: Increment, x: Tensor, layout: Layout = UNPADDED, keep: Keep = NOTHING) -> Solution:
        """The solve of the prepared field over the whole depth; arguments and errors as in :meth:`forward`."""
        solver = self.solver()
        if solver.shares_steps and self.step_control == "sample":
            solution = self._solve_alone(solver, x, layout)
        else:
            solution = self._solve(solver, f, x, layout, keep)
        where = f", at depth {min(solution.reached):.3g} of {self.config.duration:g}," if solution.reached else ""
        refuse_failure(solution.status, f"the continuous depth{where}", solver.remedy)
        if solver.adaptive:
            self.budget_alarm.hear(solution.status, solver.max_evaluations)
        if keep.states and not solution.states:
            return replace(solution, states=(x, solution.state), times=(0.0, self.config.duration))
        return solution

    def _solve(self, solver: Solver, f: Increment, x: Tensor, layout: Layout, keep: Keep = NOTHING) -> Solution:
        parameters: tuple[Tensor, ...] = ()
        if not solver.gradient.along_the_way:
            # It arises from no kept graph, so it must be told where to go.
            read = (*self.field.read_parameters(), *f.constants)
            parameters = tuple(tensor for tensor in read if tensor.requires_grad)
        options: dict[str, Any] = {}
        if solver.exponential and f.linear is not None:
            options["rate"], f = f.linear
        return solver.solve(
            f,
            x,
            Span(0.0, self.config.duration),
            layout,
            parameters=parameters,
            record=self.adjoint,
            pieces=f.pieces(self.config.duration),
            keep=keep,
            **options,
        )

    def _solve_alone(self, solver: Solver, x: Tensor, layout: Layout) -> Solution:
        """Each sample in a solve of its own over its real tokens: the libraries have one step for all and, torchdyn,
        padding in its norm."""
        state, results = x.clone(), []
        for row in range(len(x)):
            real, own = layout.alone(row, x)
            mine = x[row : row + 1, real]
            f = self.field.prepare(mine, own)
            # A row of nothing but padding is no sample.
            results.append(self._solve(solver, f, mine, own) if mine.numel() else Solution(mine, 0))
            state[row, real] = results[-1].state[0]
        return Solution(
            state=state,
            evaluations=torch.tensor([one.evaluations for one in results], device=x.device),
            status=Status.worst(one.status for one in results),
            accepted=torch.tensor([one.accepted for one in results], device=x.device),
            rejected=torch.tensor([one.rejected for one in results], device=x.device),
            field_calls=sum(one.field_calls for one in results),
            reached=tuple(at for one in results for at in one.reached),
        )

    def _penalties(self, f: Increment, solution: Solution, layout: Layout, precision: torch.dtype) -> dict[str, Tensor]:
        config, penalties = self.config, {}
        if config.kinetic_energy > 0:
            assert solution.energy is not None, "Keep.penalties asks for it"
            penalties["kinetic_energy"] = config.kinetic_energy * solution.energy.mean()
        if config.local_error > 0:
            assert solution.local_error is not None, "Keep.penalties asks for it"
            penalties["local_error"] = config.local_error * solution.local_error.mean()
        if config.jacobian > 0:
            # One place of the trajectory per pass stands for the integral over the depth.
            place = int(torch.randint(len(solution.states), (), device="cpu"))
            t, z = solution.times[place], solution.states[place].detach()

            def at_place(y: Tensor) -> Tensor:
                return f(t, y.to(precision)).to(y.dtype)

            norm = frobenius_finite_difference(at_place, z, at_place(z), precision, layout=layout)
            penalties["jacobian"] = config.jacobian * config.duration * norm
        return penalties

    def _statistics(self, solution: Solution, layout: Layout) -> dict[str, float | Tensor]:
        evaluations = solution.evaluations
        return {
            "evaluations": per_sample_mean(evaluations),
            "evaluations_max": evaluations.max() if isinstance(evaluations, Tensor) else evaluations,
            "steps": per_sample_mean(solution.accepted),
            "rejected": per_sample_mean(solution.rejected),
            "evaluations_backward": float(self.adjoint.evaluations),
            "stopped": float(solution.status is Status.BUDGET_SPENT),
            "state_rms": layout.rms(solution.state),
            **rate_statistics([self.field.linear_rate()]),
        }
