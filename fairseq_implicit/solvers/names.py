"""The solvers by their names, and which one a set of options asks for."""

from collections.abc import Mapping

from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.adaptive import Adaptive
from fairseq_implicit.solvers.backends import Torchdiffeq, Torchdyn, TorchdynAdjoint
from fairseq_implicit.solvers.exponential import SCHEMES as EXPONENTIAL
from fairseq_implicit.solvers.exponential import Exponential
from fairseq_implicit.solvers.gradients.continuous_adjoint import ContinuousAdjoint
from fairseq_implicit.solvers.gradients.trajectory import CheckpointStage, CheckpointStep, Direct
from fairseq_implicit.solvers.multistep import AdamsPair, BackwardEulerCorrected, HistoryCorrected
from fairseq_implicit.solvers.reversible import Reconstruction, ReversibleHeun
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Solver

#: Explicit schemes on a grid, by what corrects their step.
CORRECTORS: Mapping[str, type[RungeKutta]] = {
    "none": RungeKutta,
    "backward-euler": BackwardEulerCorrected,
    "adams": AdamsPair,
    "pcformer": HistoryCorrected,
}
#: Adaptive solvers.
BACKENDS: Mapping[str, type[Adaptive]] = {"own": Adaptive, "torchdyn": Torchdyn, "torchdiffeq": Torchdiffeq}
#: Gradients of a solve through time.
GRADIENTS: Mapping[str, Direct] = {
    gradient.name: gradient
    for gradient in (
        Direct(),
        CheckpointStep(),
        CheckpointStage(),
        ContinuousAdjoint(),
        TorchdynAdjoint(),
        Reconstruction(),
    )
}
#: Those of fixed steps.
FIXED_GRADIENTS = tuple(name for name, gradient in GRADIENTS.items() if RungeKutta.kind in gradient.serves)
REVERSIBLE_SCHEME = "reversible-heun"


def trajectory_gradient(name: str) -> Direct:
    """The gradient of that name.

    Raises:
        OptionError: there is none.
    """
    check_choice("gradient", name, tuple(GRADIENTS))
    return GRADIENTS[name]


def continuous_solver(
    scheme: str = "dopri5",
    tolerance: float = 1e-2,
    absolute_tolerance: float | None = None,
    steps: int = 12,
    max_evaluations: int = 500,
    first_step: float | None = None,
    backend: str = "own",
    gradient: str = "autograd",
    replay_random: bool = False,
) -> Solver:
    """What solves a whole depth.

    Args:
        scheme: an embedded pair for adaptive solves; for fixed steps any tableau, an exponential scheme or
            ``reversible-heun``.
        tolerance: of adaptive solves; 0 takes ``steps`` fixed steps instead.
        absolute_tolerance: ``None``: the same as ``tolerance``.
        steps: fixed steps over the whole depth.
        max_evaluations: per sample and solve.
        first_step: first trial step of adaptive solves; ``None``: one layer, beyond which an error estimate is not to
            be trusted before it has been seen to be small.
        backend: one of ``BACKENDS``.
        gradient: one of ``GRADIENTS``.
        replay_random: whether the field draws random numbers in each evaluation.

    Raises:
        OptionError: an impossible value or combination.
        ModuleNotFoundError: the back end is not installed.
    """
    if not 0 <= tolerance < float("inf"):
        raise OptionError("tolerance", f"{tolerance}: give a positive tolerance, or 0 for fixed steps.")
    check_choice("backend", backend, tuple(BACKENDS))
    form = trajectory_gradient(gradient)
    if tolerance > 0:
        if scheme == REVERSIBLE_SCHEME or scheme in EXPONENTIAL:
            raise OptionError("scheme", f"{scheme} with `gradient` {gradient} takes fixed steps: set `tolerance` 0.")
        absolute = tolerance if absolute_tolerance is None else absolute_tolerance
        first_step = 1.0 if first_step is None else first_step
        return BACKENDS[backend](scheme, tolerance, absolute, max_evaluations, "batch", first_step, form)
    if backend != "own":
        raise OptionError("backend", f"{backend} is for adaptive solves: set `tolerance`, or take own.")
    if scheme == REVERSIBLE_SCHEME:
        return ReversibleHeun(steps, form)
    if scheme in EXPONENTIAL:
        return Exponential(scheme, steps, form, state_float32=True, replay_random=replay_random)
    return RungeKutta(scheme, steps, form, state_float32=True, replay_random=replay_random)
