"""One engine for every explicit Runge–Kutta scheme on a fixed grid.

Nothing here reads a value back from the device, times and coefficients are Python floats, and the loops have lengths
known before the solve: a solve can be captured by ``torch.compile(fullgraph=True)``.

Memory: a plain solve keeps the activations of every evaluation. ``checkpoint-step`` keeps one state per sub-step,
``checkpoint-stage`` one state per evaluation; both evaluate the field once more in the backward pass and give the same
gradients as ``autograd``, because all noise was drawn when the field was prepared, outside the recomputed part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fairseq_implicit.solvers.coefficients import Combination, Weight, combine
from fairseq_implicit.solvers.status import SolveResult
from fairseq_implicit.solvers.tableau import Tableau, get_tableau
from fairseq_implicit.solvers.vector_field import VectorField

GRADIENTS = ("autograd", "checkpoint-step", "checkpoint-stage")


@dataclass(frozen=True)
class ExplicitConfig:
    """An explicit solve: ``steps`` steps of size ``total_time / steps``.

    Attributes:
        scheme: name or alias of a tableau.
        steps: number of sub-steps, at least 1.
        total_time: length of the interval, positive.
        gradient: one of ``GRADIENTS``.
        state_float32: keep a half-precision state in float32; the field still sees its own dtype.
        residual_in_field: integrate ``z + F(z)`` instead of ``F(z)``, as the original ODE-Transformer code does. It
            has a spurious exponential mode (a zero field multiplies the state by 2.7 per RK4 block); for compatibility.
        replay_random: on recomputation restore the random state. Needed only when the field draws random numbers in
            each evaluation.
    """

    scheme: str = "euler"
    steps: int = 1
    total_time: float = 1.0
    gradient: str = "autograd"
    state_float32: bool = False
    residual_in_field: bool = False
    replay_random: bool = True

    def __post_init__(self):
        get_tableau(self.scheme)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"{self.steps} steps per solve: the number of steps must be a whole number of at least 1")
        if not 0 < self.total_time < float("inf"):
            raise ValueError(f"a total time of {self.total_time} per solve: it must be positive and finite")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"unknown gradient mode {self.gradient!r}; the modes are {', '.join(GRADIENTS)}")

    @property
    def tableau(self) -> Tableau:
        return get_tableau(self.scheme)

    @property
    def step_size(self) -> float:
        return self.total_time / self.steps


@dataclass(frozen=True)
class ExplicitResult(SolveResult):
    """A solve's result with the weights that each sub-step used (see ``coefficients.Combination.statistics``)."""

    weights: tuple[tuple[Weight, ...], ...] = ()


def explicit_stages(
    f: VectorField, tableau: Tableau, t: float, y: Tensor, h: float, required: Sequence[bool]
) -> list[Tensor | None]:
    """The increments ``F_i = f(t + c_i h, y + h Σ_j a_ij F_j)``; ``None`` for a stage that is not required.

    Args:
        f: the prepared field.
        tableau: the scheme.
        t: time at the start of the step.
        y: state ``(batch, time, dim)``.
        h: step size.
        required: for each stage, whether to evaluate it (``tableau.required`` or ``Combination.required``).
    """
    stages: list[Tensor | None] = []
    for row, node, wanted in zip(tableau.a_values, tableau.c_values, required):
        stages.append(f(t + node * h, combine(y, stages, row, h)) if wanted else None)
    return stages


def explicit_step(
    f: VectorField, t: float, y: Tensor, h: float, tableau: Tableau, combination: Combination | None = None
) -> tuple[Tensor, tuple[Weight, ...]]:
    """One step: the new state ``(batch, time, dim)`` and the weights of its stages.

    Without ``combination`` the weights are the tableau's b.
    """
    if combination is None:
        stages = explicit_stages(f, tableau, t, y, h, tableau.required)
        return combine(y, stages, tableau.b_values, h), tableau.b_values
    return combination(y, explicit_stages(f, tableau, t, y, h, combination.required), h)


def embedded_error(tableau: Tableau, stages: Sequence[Tensor], h: float) -> Tensor:
    """Local error estimate ``h Σ (b_i − b̂_i) F_i`` of a step whose stages have all been evaluated.

    Raises:
        ValueError: the scheme has no embedded weights.
    """
    if tableau.b_hat_values is None:
        raise ValueError(f"scheme {tableau.name!r} has no embedded weights; heun2, bosh3, dopri5 and tsit5 have")
    differences = [b - b_hat for b, b_hat in zip(tableau.b_values, tableau.b_hat_values)]
    return combine(torch.zeros_like(stages[0]), stages, differences, h)


def entering_dtype(f: VectorField, dtype: torch.dtype) -> VectorField:
    """The field for a state that may be wider than ``dtype``: the state is cast on entry."""
    return lambda t, z: f(t, z.to(dtype))


def with_residual(f: VectorField) -> VectorField:
    """The field ``z + F(z)`` of the original ODE-Transformer code."""
    return lambda t, z: z + f(t, z)


def recomputed(function: Callable, config: ExplicitConfig) -> Callable:
    """``function`` with its activations recomputed in the backward pass; itself when no gradient is recorded."""
    if not torch.is_grad_enabled():
        return function

    def run(*arguments):
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=config.replay_random)

    return run


def solver_state(x: Tensor, config: ExplicitConfig) -> Tensor:
    """``x`` in the dtype in which the solve accumulates."""
    return x.float() if config.state_float32 and x.dtype in (torch.float16, torch.bfloat16) else x


def solver_field(f: VectorField, config: ExplicitConfig, dtype: torch.dtype) -> VectorField:
    """The field as the engine evaluates it: entered in ``dtype``, with the configured residual and recomputation."""
    if config.residual_in_field:
        f = with_residual(f)
    f = entering_dtype(f, dtype)
    return recomputed(f, config) if config.gradient == "checkpoint-stage" else f


def solve_explicit(
    f: VectorField,
    x: Tensor,
    config: ExplicitConfig,
    combination: Combination | None = None,
    t0: float = 0.0,
    field_dtype: torch.dtype | None = None,
) -> ExplicitResult:
    """Integrate ``dy/dt = f(t, y)`` from ``y(t0) = x`` over ``config.total_time``.

    Args:
        f: prepared field, ``f(t, z) -> dz``; all noise constant along the solve.
        x: initial state ``(batch, time, dim)``.
        config: scheme, steps, gradient mode.
        combination: weights of the stages; without it the tableau's b.
        t0: start time.
        field_dtype: dtype in which the field is entered; that of ``x`` by default.

    Returns:
        the state at ``t0 + total_time`` (float32 where ``config.state_float32`` asks for it) and its cost.

    Raises:
        ValueError: ``combination`` was made for another scheme.
    """
    tableau = config.tableau
    if combination is not None and combination.tableau.name != tableau.name:
        raise ValueError(
            f"the coefficients were made for scheme {combination.tableau.name!r}, the solve uses {tableau.name!r}"
        )
    f = solver_field(f, config, field_dtype or x.dtype)
    step = recomputed(explicit_step, config) if config.gradient == "checkpoint-step" else explicit_step
    state = solver_state(x, config)
    h = config.step_size
    weights = []
    for index in range(config.steps):
        state, step_weights = step(f, t0 + index * h, state, h, tableau, combination)
        weights.append(step_weights)
    required = tableau.required if combination is None else combination.required
    return ExplicitResult(state, evaluations=config.steps * sum(required), weights=tuple(weights))
