"""Continuous depth: one time-conditioned field integrated over the whole depth (neural ODE, arXiv 1806.07366).

Regularisers: kinetic energy and the Frobenius norm of the Jacobian (Finlay et al., arXiv 2002.02798) keep the flow easy
to solve, the local error (Pal et al., arXiv 2105.03918) keeps it easy for the very solver that is used.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.depth.random_steps import RandomSteps
from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.adaptive import (
    STEP_CONTROLS,
    AdaptiveConfig,
    AdaptiveResult,
    Piece,
    solve_adaptive,
)
from fairseq_implicit.solvers.backends import check_backend, solve_torchdyn_adjoint, solve_with
from fairseq_implicit.solvers.jacobian import frobenius_finite_difference
from fairseq_implicit.solvers.reversible import LARGEST_STATE, solve_reversible
from fairseq_implicit.solvers.runge_kutta import ExplicitConfig, solve_explicit
from fairseq_implicit.solvers.sensitivity import solve_adjoint
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import VectorField

logger = logging.getLogger(__name__)

REVERSIBLE_SCHEME = "reversible-heun"
ADAPTIVE_GRADIENTS = ("autograd", "checkpoint-step", "adjoint", "torchdyn-adjoint")
FIXED_GRADIENTS = ("autograd", "checkpoint-step", "checkpoint-stage")
GRADIENTS = ("autograd", "checkpoint-step", "checkpoint-stage", "adjoint", "torchdyn-adjoint", "reversible")


@dataclass(frozen=True)
class ContinuousConfig:
    """How the depth is solved.

    Attributes:
        dim: width of the state.
        duration: the depth T, in units of one transformer layer.
        scheme: an embedded pair for adaptive solves; any tableau or ``reversible-heun`` for fixed steps.
        tolerance: of adaptive solves; 0 takes ``steps`` fixed steps instead.
        absolute_tolerance: ``None``: the same as ``tolerance``.
        steps: fixed steps over the whole depth.
        max_evaluations: per sample and solve.
        first_step: first trial step of adaptive solves; ``None``: one layer, beyond which an error estimate is not to
            be trusted before it has been seen to be small.
        backend: see :mod:`fairseq_implicit.solvers.backends`.
        step_control: ``sample``, ``batch``, or ``auto``: in evaluation always ``sample``, so that batch mates change no
            answer (with a library each sample is then solved by itself); in training ``sample`` where field and back
            end can.
        gradient: one of ``GRADIENTS``.
        kinetic_energy, jacobian, local_error: weights of the regularisers, 0 for none.
        random_steps: ``(low, high)`` of the number of fixed steps drawn at each update, or ``None``.
        seed: of ``random_steps``.
        noise: whether the field has dropout at all.
        independent_noise: whether that is drawn anew at each evaluation.
        final_norm: end with a layer norm.
        norm: that norm.

    Raises:
        ValueError: an impossible combination, in one sentence that names the flag.
        ModuleNotFoundError: the back end is not installed.
    """

    dim: int
    duration: float
    scheme: str = "dopri5"
    tolerance: float = 1e-2
    absolute_tolerance: float | None = None
    steps: int = 12
    max_evaluations: int = 500
    first_step: float | None = None
    backend: str = "own"
    step_control: str = "auto"
    gradient: str = "autograd"
    kinetic_energy: float = 0.0
    jacobian: float = 0.0
    local_error: float = 0.0
    random_steps: tuple[int, int] | None = None
    seed: int = 1
    noise: bool = False
    independent_noise: bool = False
    final_norm: bool = True
    norm: NormConfig = field(default_factory=NormConfig)

    def __post_init__(self):
        if not 0 < self.duration < math.inf:
            raise ValueError(f"--ode-time {self.duration}: the depth must be positive and finite")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"--ode-tolerance {self.tolerance}: give a positive tolerance, or 0 for fixed steps")
        for flag, value in (
            ("--ode-kinetic-energy", self.kinetic_energy),
            ("--ode-jacobian", self.jacobian),
            ("--ode-local-error", self.local_error),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{flag} {value}: the weight of a penalty must be finite and not negative")
        if self.step_control not in STEP_CONTROLS + ("auto",):
            raise ValueError(f"--ode-step-control {self.step_control!r} is unknown: auto, {', '.join(STEP_CONTROLS)}")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"--ode-gradient {self.gradient!r} is unknown: choose one of {', '.join(GRADIENTS)}")
        if self.adaptive:
            self._check_adaptive()
        else:
            self._check_fixed()
        if self.noise and self.independent_noise and (self.adaptive or self.reversible):
            raise ValueError(
                "--stage-dropout independent makes the field a different function at each evaluation: neither an "
                "adaptive nor a reversible solve has a meaning then; use --stage-dropout shared"
            )
        if self.penalised and self.gradient not in FIXED_GRADIENTS:
            raise ValueError(
                f"--ode-gradient {self.gradient} carries the gradient of the final state only, not that of the "
                "penalties: use autograd or checkpoint-step with --ode-kinetic-energy, --ode-jacobian and "
                "--ode-local-error"
            )
        if self.penalised and self.backend != "own":
            raise ValueError(f"penalties along the depth need --ode-backend own, not {self.backend}")

    def _check_adaptive(self) -> None:
        if self.scheme == REVERSIBLE_SCHEME or self.gradient in ("reversible", "checkpoint-stage"):
            raise ValueError(
                f"--ode-scheme {self.scheme} with --ode-gradient {self.gradient} takes fixed steps: set "
                "--ode-tolerance 0"
            )
        check_backend(self.backend, self.solve("batch").scheme)
        if self.gradient == "torchdyn-adjoint" and self.backend != "torchdyn":
            raise ValueError("--ode-gradient torchdyn-adjoint needs --ode-backend torchdyn")
        if self.backend != "own" and self.gradient not in ("autograd", "torchdyn-adjoint"):
            raise ValueError(
                f"--ode-gradient {self.gradient} needs --ode-backend own: {self.backend} has autograd"
                + (" and torchdyn-adjoint" if self.backend == "torchdyn" else "")
            )
        if self.backend != "own" and self.step_control == "sample":
            raise ValueError(f"--ode-step-control sample needs --ode-backend own: {self.backend} has one step for all")
        if self.random_steps is not None:
            raise ValueError("--ode-random-steps draws a number of fixed steps: set --ode-tolerance 0")

    def _check_fixed(self) -> None:
        if self.backend != "own":
            raise ValueError(
                f"--ode-backend {self.backend} is for adaptive solves: set --ode-tolerance, or --ode-backend own"
            )
        if (self.scheme == REVERSIBLE_SCHEME) != (self.gradient == "reversible"):
            raise ValueError(
                f"--ode-scheme {REVERSIBLE_SCHEME} and --ode-gradient reversible belong together, got "
                f"--ode-scheme {self.scheme} --ode-gradient {self.gradient}"
            )
        if self.gradient not in FIXED_GRADIENTS + ("reversible",):
            raise ValueError(f"--ode-gradient {self.gradient} is for adaptive solves: set --ode-tolerance")
        if self.local_error > 0:
            raise ValueError("--ode-local-error needs the error estimate of adaptive steps: set --ode-tolerance")
        if self.steps < 1:
            raise ValueError(f"--ode-steps {self.steps}: at least one step is needed")
        if not self.reversible:
            self.explicit(self.steps)

    @property
    def adaptive(self) -> bool:
        return self.tolerance > 0

    @property
    def reversible(self) -> bool:
        return self.scheme == REVERSIBLE_SCHEME

    @property
    def penalised(self) -> bool:
        return self.kinetic_energy > 0 or self.jacobian > 0 or self.local_error > 0

    def solve(self, step_control: str) -> AdaptiveConfig:
        """The adaptive solve."""
        absolute = self.tolerance if self.absolute_tolerance is None else self.absolute_tolerance
        first_step = 1.0 if self.first_step is None else self.first_step
        return AdaptiveConfig(self.scheme, self.tolerance, absolute, self.max_evaluations, step_control, first_step)

    def explicit(self, steps: int) -> ExplicitConfig:
        """One of ``steps`` fixed steps, with a float32 state around half-precision fields as in adaptive solves."""
        return ExplicitConfig(
            self.scheme, 1, self.duration / steps, self.gradient, True, replay_random=self.independent_noise
        )


@dataclass
class _Trajectory:
    """A solve, as the statistics and penalties need it."""

    state: Tensor
    evaluations: int | Tensor
    accepted: int | Tensor
    rejected: int | Tensor = 0
    backward: float = 0.0
    stopped: float = 0.0
    states: Sequence[Tensor] = ()
    times: Sequence[float | Tensor] = ()
    energy: Tensor | None = None
    local_error: Tensor | None = None


class ContinuousDepth(Depth):
    """The solve of one field over the whole depth.

    Statistics: ``evaluations`` and ``evaluations_max`` per sample, ``steps`` accepted and ``rejected`` (means over the
    batch), ``evaluations_backward`` (of the last backward pass that evaluated anew), ``stopped`` (share of solves that
    hit the limit of evaluations), ``state_rms``.

    Args:
        config: see :class:`ContinuousConfig`.
        field: the time-conditioned field.

    Raises:
        ValueError: the field cannot do what the configuration asks, in one sentence.
    """

    def __init__(self, config: ContinuousConfig, field: Field):
        super().__init__()
        self.config = config
        self.field = field
        self.final_norm = config.norm.build(config.dim) if config.final_norm else None
        self.random_steps = None if config.random_steps is None else RandomSteps(config.random_steps, config.seed)
        if field.piecewise and config.step_control == "sample":
            raise ValueError(
                "--ode-step-control sample gives every sample its own time, but weights interpolated along the depth "
                "need one for the batch in training: use batch, or auto (sample in evaluation)"
            )
        if field.piecewise and config.gradient == "torchdyn-adjoint":
            raise ValueError(
                "--ode-gradient torchdyn-adjoint fails on weights that act at some depths only: use --ode-gradient "
                "adjoint with --ode-backend own, or --ode-depth-weights embedding"
            )
        self._backward_evaluations = 0.0
        self._warned = False

    def layers(self) -> Iterator[Field]:
        return self.field.layers()

    @property
    def step_control(self) -> str:
        """``sample`` or ``batch``: that of a solve in the present mode, training or evaluation."""
        if self.config.step_control != "auto":
            return self.config.step_control
        one_step = self.field.piecewise or self.config.backend != "own"
        return "batch" if self.training and one_step else "sample"

    def forward(self, x: Tensor, layout: Layout = UNPADDED, return_hidden_states: bool = False) -> DepthOutput:
        """Solve from the embedding at t = 0 to t = T.

        Args:
            x: embedding ``(batch, time, dim)``.
            layout: of the batch.
            return_hidden_states: collect the embedding and the state after each accepted step (before the final norm);
                of libraries and memory-free gradients only the first and last.

        Raises:
            ArithmeticError: non-finite values, a state beyond the range of the reversible scheme, or steps that shrank
                to nothing.
        """
        f = self.field.prepare(x, layout)
        # Penalties need the trajectory only where they are trained.
        penalised = self.config.penalised and torch.is_grad_enabled()
        keep = return_hidden_states or penalised
        if self.config.adaptive:
            trajectory = self._solve_adaptive(f, x, layout, keep, penalised)
        else:
            trajectory = self._solve_fixed(f, x, layout, keep, penalised)
        penalties = self._penalties(f, trajectory, layout, x.dtype) if penalised else {}
        state = trajectory.state.to(x.dtype)
        statistics = self._statistics(trajectory, layout)
        if self.final_norm is not None:
            state = self.final_norm(state)
        hidden_states = [one.to(x.dtype) for one in trajectory.states] if return_hidden_states else None
        return DepthOutput(state, hidden_states, statistics, penalties)

    def _trained(self) -> tuple[Tensor, ...]:
        return tuple(parameter for parameter in self.field.parameters() if parameter.requires_grad)

    def _note_backward(self, evaluations: int) -> None:
        self._backward_evaluations = float(evaluations)

    def _solve_adaptive(self, f: Increment, x: Tensor, layout: Layout, keep: bool, penalised: bool) -> _Trajectory:
        config = self.config
        solve = config.solve(self.step_control)
        training = torch.is_grad_enabled()
        if config.backend != "own":
            alone = solve.step_control == "sample"
            result = self._solve_alone(x, layout) if alone else self._solve_with_library(f, x, layout)
        elif config.gradient == "adjoint" and training:
            result = solve_adjoint(
                f, x, config.duration, solve, self._trained(), layout, on_backward=self._note_backward,
                pieces=f.pieces(config.duration),
            )  # fmt: skip
        else:
            recompute = config.gradient == "checkpoint-step"
            result = solve_adaptive(
                f, x, config.duration, solve, layout, keep_states=keep, penalties=penalised, recompute=recompute,
                pieces=f.pieces(config.duration),
            )  # fmt: skip
            if recompute and training:
                self._note_backward(result.field_calls)
        self._check(result)
        return _Trajectory(
            state=result.state,
            evaluations=result.evaluations,
            accepted=result.accepted,
            rejected=result.rejected,
            backward=self._backward_evaluations,
            stopped=float(result.status is Status.BUDGET_SPENT),
            states=result.states or ((x, result.state) if keep else ()),
            times=result.times or ((0.0, config.duration) if keep else ()),
            energy=result.energy,
            local_error=result.local_error,
        )

    def _solve_with_library(self, f: Increment, x: Tensor, layout: Layout) -> AdaptiveResult:
        config = self.config
        solve = config.solve("batch")
        if config.gradient == "torchdyn-adjoint" and torch.is_grad_enabled():
            return solve_torchdyn_adjoint(
                f, x, config.duration, solve, self._trained(), on_backward=self._note_backward
            )
        pieces = f.pieces(config.duration)
        return solve_with(config.backend, f, x, config.duration, solve, layout, pieces=pieces)

    def _solve_alone(self, x: Tensor, layout: Layout) -> AdaptiveResult:
        """Each sample in a solve of its own over its real tokens: the libraries have one step for all and, torchdyn,
        padding in its norm."""
        state, results = x.clone(), []
        for row in range(len(x)):
            real, own = layout.alone(row, x)
            mine = x[row : row + 1, real]
            f = self.field.prepare(mine, own)
            # A row of nothing but padding is no sample.
            results.append(self._solve_with_library(f, mine, own) if mine.numel() else AdaptiveResult(mine, 0))
            state[row, real] = results[-1].state[0]
        return AdaptiveResult(
            state=state,
            evaluations=torch.tensor([one.evaluations for one in results], device=x.device),
            status=Status.worst(one.status for one in results),
            accepted=torch.tensor([one.accepted for one in results], device=x.device),
            rejected=torch.tensor([one.rejected for one in results], device=x.device),
            field_calls=sum(one.field_calls for one in results),
            reached=tuple(at for one in results for at in one.reached),
        )

    def _check(self, result: AdaptiveResult) -> None:
        if result.status is Status.NON_FINITE:
            raise ArithmeticError(
                f"the field returned non-finite values at depth {min(result.reached or (0.0,)):.3g} of "
                f"{self.config.duration:g}: the model has diverged; lower --lr, or continue from an earlier checkpoint"
            )
        if result.status is Status.STEP_UNDERFLOW:
            raise ArithmeticError(
                f"the steps shrank to nothing at depth {min(result.reached or (0.0,)):.3g} of "
                f"{self.config.duration:g}: the field is not smooth at this tolerance; raise --ode-tolerance"
            )
        if result.status is Status.BUDGET_SPENT and not self._warned:
            self._warned = True
            logger.warning(
                "a solve spent its %d evaluations before the end of the depth and goes on with the state it reached: "
                "raise --ode-max-evaluations or --ode-tolerance, or train with --ode-kinetic-energy (reported once; "
                "the statistic 'stopped' counts them)",
                self.config.max_evaluations,
            )

    def _solve_fixed(self, f: Increment, x: Tensor, layout: Layout, keep: bool, penalised: bool) -> _Trajectory:
        config = self.config
        draws = self.random_steps is not None and self.training
        steps = self.random_steps.draw() if draws else config.steps
        if config.reversible:
            result = solve_reversible(f, x, config.duration, steps, self._trained())
            if result.status is Status.NON_FINITE:
                raise ArithmeticError(
                    f"the reversible solve met non-finite values or a state beyond {LARGEST_STATE:g}: the model has "
                    "diverged; lower --lr, take more --ode-steps, or another --ode-scheme with --ode-gradient "
                    "checkpoint-step"
                )
            ends = ((x, result.state), (0.0, config.duration)) if keep else ((), ())
            backward = float(steps + 1) if torch.is_grad_enabled() else 0.0
            return _Trajectory(result.state, result.evaluations, steps, 0, backward, 0.0, *ends)
        one_step = config.explicit(steps)
        h, state, evaluations = one_step.total_time, x, 0
        states, times = [x], [0.0]
        pieces = f.pieces(config.duration)
        jumps = not all(piece.continues for piece in pieces[1:])
        energy = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)) if penalised else None
        for step in range(steps):
            step_field = _from_the_left(f, pieces, (step + 1) * h, h) if jumps else f
            result = solve_explicit(step_field, state, one_step, t0=step * h, field_dtype=x.dtype)
            evaluations += result.evaluations
            if penalised:
                # The mean velocity of the step: a lower bound of the energy that needs no further evaluation.
                velocity = (result.state - state) / h
                energy = energy + h * layout.sample_mean(velocity.square())
            state = result.state
            if keep:
                states.append(state)
                times.append((step + 1) * h)
        recomputed = torch.is_grad_enabled() and config.gradient != "autograd"
        return _Trajectory(
            state, evaluations, steps, 0, float(evaluations) if recomputed else 0.0, 0.0, states, times, energy
        )

    def _penalties(
        self, f: Increment, trajectory: _Trajectory, layout: Layout, precision: torch.dtype
    ) -> dict[str, Tensor]:
        config, penalties = self.config, {}
        if config.kinetic_energy > 0:
            penalties["kinetic_energy"] = config.kinetic_energy * trajectory.energy.mean()
        if config.local_error > 0:
            penalties["local_error"] = config.local_error * trajectory.local_error.mean()
        if config.jacobian > 0:
            # One place of the trajectory per pass stands for the integral over the depth.
            place = int(torch.randint(len(trajectory.states), (), device="cpu"))
            t, z = trajectory.times[place], trajectory.states[place].detach()

            def at_place(y: Tensor) -> Tensor:
                return f(t, y.to(precision)).to(y.dtype)

            norm = frobenius_finite_difference(at_place, z, at_place(z), precision, layout=layout)
            penalties["jacobian"] = config.jacobian * config.duration * norm
        return penalties

    def _statistics(self, trajectory: _Trajectory, layout: Layout) -> dict[str, float | Tensor]:
        evaluations = trajectory.evaluations
        return {
            "evaluations": _mean(evaluations),
            "evaluations_max": evaluations.max() if isinstance(evaluations, Tensor) else evaluations,
            "steps": _mean(trajectory.accepted),
            "rejected": _mean(trajectory.rejected),
            "evaluations_backward": trajectory.backward,
            "stopped": trajectory.stopped,
            "state_rms": layout.rms(trajectory.state),
        }


def _from_the_left(f: VectorField, pieces: Sequence[Piece], end: float, h: float) -> VectorField:
    """``f`` for one step: weights that jump at its end are those before the jump for all its stages."""
    before = end - 1e-6 * h
    left = next(piece.field for piece in pieces if piece.end > before)
    return lambda t, z: left(t, z) if t > before else f(t, z)


def _mean(counts: int | Tensor) -> int | Tensor:
    return counts.float().mean() if isinstance(counts, Tensor) else counts
