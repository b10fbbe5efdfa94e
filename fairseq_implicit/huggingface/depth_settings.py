"""How the depth of an encoder is solved: options that fit into a JSON file, and the solver that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.adaptive import Adaptive
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient
from fairseq_implicit.solvers.gradients.names import parse_gradient
from fairseq_implicit.solvers.names import FIXED_GRADIENTS, trajectory_gradient
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Solver, Span
from fairseq_implicit.solvers.tableau import get_tableau
from fairseq_implicit.solvers.theta import SCHEMES, Theta

EQUILIBRIUM = "equilibrium"
UNITS = ("layer", "stack")


@dataclass(frozen=True)
class DepthSettings:
    """The options of :func:`fairseq_implicit.huggingface.solve_depth`.

    Attributes:
        scheme: an explicit scheme (euler, midpoint, heun2, rk4, …), ``theta``, ``implicit-midpoint``, or
            ``equilibrium``.
        over: ``layer``: each layer is a field of its own; ``stack``: all layers together are one. By default the
            equilibrium is that of the stack, everything else goes layer by layer.
        steps: sub-steps per solve.
        total_time: what each solve integrates; 1 is the time of the plain layer (or stack).
        tolerance: above 0, adaptive steps of an embedded pair (bosh3, dopri5, tsit5), each sample with its own.
        max_evaluations: what adaptive steps may cost per sample and solve.
        theta: θ of the scheme of that name: 0 explicit, 1/2 the trapezoid, 1 (the default) backward Euler.
        gradient: of explicit schemes ``autograd``, ``checkpoint-step`` or ``checkpoint-stage``; of equations ``ift``
            (exact), ``neumann-K``, ``phantom-K``, ``jfb`` or ``bptt-K`` (K evaluations, no equation is solved).
        solver: root solver of equations: anderson, broyden or picard.
        max_iter: evaluations that an equation may cost per sample.
        tol: relative residual at which an equation is solved; by default by precision (1e-3 in float32).
        gain: of the input that is injected into an equilibrium, normalised, at every evaluation; 0 for none.
        layers: path of the list of layers, for an encoder of unknown architecture.

    Raises:
        OptionError: a value or a combination that has no meaning.
    """

    scheme: str
    over: str | None = None
    steps: int = 1
    total_time: float = 1.0
    tolerance: float = 0.0
    max_evaluations: int = 500
    theta: float | None = None
    gradient: str | None = None
    solver: str = "anderson"
    max_iter: int = 30
    tol: float | None = None
    gain: float = 1.0
    layers: str | None = None

    def __post_init__(self):
        self._refuse_other_types()
        if self.over is not None:
            check_choice("over", self.over, UNITS)
        if not self.is_equilibrium and not self.is_implicit:
            get_tableau(self.scheme)
        self._refuse_strangers()
        if not 0 < self.total_time < float("inf"):
            raise OptionError("total_time", f"a total time of {self.total_time} is not positive and finite.")
        if not 0 <= self.tolerance < float("inf"):
            raise OptionError("tolerance", f"{self.tolerance}: give a positive tolerance, or 0 for fixed steps.")
        if not 0 <= self.gain < float("inf"):
            raise OptionError("gain", f"a gain of {self.gain} is not finite, or negative.")
        if self.steps < 1:
            raise OptionError("steps", f"{self.steps} steps per solve: give a whole number of at least 1.")
        _ = self.equation_gradient if self.is_equilibrium else self.trajectory

    def _refuse_other_types(self) -> None:
        """Values that came from a file or a command line as text, say."""
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("steps", "max_evaluations", "max_iter"), (int,)),
            **dict.fromkeys(("total_time", "tolerance", "theta", "tol", "gain"), (int, float)),
            **dict.fromkeys(("gradient", "solver", "layers"), (str,)),
        }
        defaults = {one.name: one.default for one in fields(self)}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value != defaults[name] and (not isinstance(value, kind) or isinstance(value, bool)):
                wanted = "a name" if str in kind else "a number" if float in kind else "a whole number"
                raise OptionError(name, f"{value!r} is not {wanted}.")

    def _refuse_strangers(self) -> None:
        """Options that would be without effect."""
        strangers = {
            "steps": not self.is_equilibrium and not self.tolerance,
            "total_time": not self.is_equilibrium,
            "tolerance": not self.is_equilibrium and not self.is_implicit,
            "max_evaluations": bool(self.tolerance),
            "theta": self.scheme == "theta",
            "solver": self.is_equilibrium or self.is_implicit,
            "max_iter": self.is_equilibrium or self.is_implicit,
            "tol": self.is_equilibrium or self.is_implicit,
            "gain": self.is_equilibrium,
        }
        for name, value in self.as_dict().items():
            if not strangers.get(name, True):
                how = " with a `tolerance`" if self.tolerance and name == "steps" else ""
                raise OptionError(name, f"{value} would have no effect on {self.scheme}{how}: leave it out.")

    @property
    def is_equilibrium(self) -> bool:
        return self.scheme == EQUILIBRIUM

    @property
    def is_implicit(self) -> bool:
        """Whether its steps solve equations."""
        return self.scheme in SCHEMES

    @property
    def whole_stack(self) -> bool:
        return (self.over or ("stack" if self.is_equilibrium else "layer")) == "stack"

    @property
    def span(self) -> Span:
        return Span(0.0, self.total_time)

    @property
    def fixed_point(self) -> FixedPointConfig:
        """Solver of its equations."""
        return FixedPointConfig(self.solver, self.max_iter, self.tol)

    @cached_property
    def equation_gradient(self) -> EquilibriumGradient:
        """Gradient of its equations."""
        adjoint = FixedPointConfig("anderson", self.max_iter, self.tol)
        gradient = parse_gradient(self.gradient or "ift", adjoint=adjoint)
        if gradient.reconstructs:
            raise OptionError(
                "gradient",
                f"{gradient.name} must be told all that the layers read, which layers of transformers do not say: take "
                "ift, neumann-K, phantom-K, jfb or bptt-K.",
            )
        _ = self.fixed_point
        return gradient

    @cached_property
    def trajectory(self) -> Solver:
        """What integrates a field."""
        if self.is_implicit:
            theta = {} if self.theta is None else {"theta": self.theta}
            return Theta(
                self.scheme, **theta, steps=self.steps, solver=self.fixed_point, gradient=self.equation_gradient
            )
        check_choice("gradient", self.gradient or "autograd", FIXED_GRADIENTS)
        gradient = trajectory_gradient(self.gradient or "autograd")
        if self.tolerance:
            return Adaptive(self.scheme, self.tolerance, self.tolerance, self.max_evaluations, gradient=gradient)
        return RungeKutta(self.scheme, self.steps, gradient, state_float32=True)

    def as_dict(self) -> dict[str, Any]:
        """What differs from the defaults, for a configuration file."""
        defaults = {one.name: one.default for one in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> DepthSettings:
        """The opposite of :meth:`as_dict`.

        Raises:
            OptionError: an option is unknown, or none names the scheme.
        """
        known = [one.name for one in fields(cls)]
        for name in options:
            check_choice("solve_depth", name, known)
        if "scheme" not in options:
            raise OptionError("scheme", "say how the depth is to be solved, such as scheme='rk4'.")
        return cls(**options)
