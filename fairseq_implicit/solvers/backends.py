"""torchdyn and torchdiffeq behind the contract of the own adaptive loop.

Both libraries are optional and imported on first use. What they lack is added around the field: a limit on evaluations
that returns the last accepted state, a check for non-finite values (torchdyn loops for ever on NaN) that tries smaller
steps before it gives up, an end of a step wherever the field is not smooth, counts of accepted and rejected steps, a
float32 state around half-precision fields, times that start at 0 (torchdyn can lose the last point of an interval that
does not) and, for torchdiffeq, the error norm per sample over real tokens.

Only ``torchdyn.numerics`` is touched, with a fresh solver object per solve: its tableau is cast in place to the dtype
of the state, so that one half-precision solve would spoil every later one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.adaptive import (
    LARGEST_FACTOR,
    SMALLEST_FACTOR,
    SMALLEST_STEP_IN_ROUNDING_UNITS,
    Adaptive,
    AdaptiveSolution,
    check_tolerance,
)
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.gradients.trajectory import Direct
from fairseq_implicit.solvers.precision import in_state_precision, state_dtype
from fairseq_implicit.solvers.solver import NOTHING, Keep, Piece, Span
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import VectorField


@dataclass(frozen=True)
class Library(Adaptive):
    """An adaptive solver of a library, which has one step for all samples.

    Raises:
        OptionError: the library has no such pair, or no such gradient.
        ModuleNotFoundError: it is not installed; the sentence holds the install line.
    """

    keeps: ClassVar[bool] = False
    shares_steps: ClassVar[bool] = True
    #: what it is called, its sound pairs, the module with its solvers and how it is installed
    pairs: ClassVar[tuple[str, ...]]
    module: ClassVar[str]
    install: ClassVar[str]

    def __post_init__(self):
        super().__post_init__()
        if self.scheme not in self.pairs:
            raise OptionError(
                "scheme",
                f"{self.kind} has no sound adaptive {self.scheme!r}: choose one of {', '.join(self.pairs)}, or "
                "`backend` own.",
            )
        self.import_module()

    @classmethod
    def import_module(cls):
        """The module with the solvers."""
        try:
            return importlib.import_module(cls.module)
        except ImportError as error:
            raise ModuleNotFoundError(
                f"the back end {cls.kind} needs the package {cls.kind} ({error}): install it with `{cls.install}` or "
                "use the back end own."
            ) from error

    def library_solve(self, probe: _Probe, y: Tensor, duration: float, layout: Layout) -> Tensor:
        """The state that the library reaches from ``y`` in its own times from 0 to ``duration``."""
        raise TypeError(f"{type(self).__name__} defines no library_solve()")

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
    ) -> AdaptiveSolution:
        """See :meth:`Adaptive.integrate`. The pieces are solved one after the other.

        torchdyn measures the error over the whole batch, padding included; its answers are within tolerance of the
        batch, not of each sample, and it chooses its first step itself. torchdiffeq takes the own loop's first step.
        """
        if keep.penalties:
            raise OptionError("backend", f"penalties along the depth need own, not {self.kind}.")
        wide = state_dtype(x.dtype)
        check_tolerance(self, wide)
        probe = _Probe(span.start, self.max_evaluations, x.to(wide))
        smallest = SMALLEST_STEP_IN_ROUNDING_UNITS * torch.finfo(wide).eps * span.length
        status = Status.CONVERGED
        try:
            for piece in pieces or (Piece(f, span.start + span.length),):
                probe.g, _ = in_state_precision(piece.field, dtype or x.dtype)
                _cover(self, probe, piece.end, layout, smallest)
        except _Stopped as stopped:
            status = stopped.status
        return AdaptiveSolution(
            state=probe.last_state.to(x.dtype),
            evaluations=probe.evaluations,
            status=status,
            accepted=probe.accepted,
            rejected=probe.trials - probe.accepted,
            field_calls=probe.evaluations,
            reached=(probe.last_time,) * x.shape[0],
        )


def _cover(solver: Library, probe: _Probe, end: float, layout: Layout, smallest: float) -> None:
    """Let a library integrate from where the probe stands to ``end``.

    Raises:
        _Stopped: non-finite values however small the step, or another ending before ``end``.
    """
    length = end - probe.last_time
    while probe.last_time < end:
        rest = end - probe.last_time
        length = length if rest - length > smallest else rest
        probe.begin(length)
        try:
            state = solver.library_solve(probe, probe.last_state, length, layout)
        except _Stopped as stopped:
            # A trial step that overshoots says nothing about the field: the own loop, too, tries a smaller one. The
            # first call is at the state itself, where no smaller step helps.
            length = SMALLEST_FACTOR * min(probe.step, length)
            if stopped.status is not Status.NON_FINITE or probe.calls == 1 or length < smallest:
                raise
            continue
        probe.accept(length, state)
        if length == rest:
            probe.last_time = end
        length *= LARGEST_FACTOR


class _Stopped(ArithmeticError):
    """Ends a library's loop from within. A forward solve turns it into a status; a backward pass has nobody to tell."""

    def __init__(self, status: Status):
        super().__init__(
            f"torchdyn's adjoint failed on its way back ({status.value}): use the back end own with the gradient "
            "checkpoint-step."
        )
        self.status = status


class _Probe:
    """The field as the libraries call it: times from 0 and 0-dim, counted, limited, checked for non-finite values."""

    def __init__(self, start: float, limit: int, state: Tensor):
        self.start, self.limit = start, limit
        self.g: VectorField  # of the piece under way
        self.last_state, self.last_time = state, start
        self.evaluations = self.accepted = self.trials = 0
        self.begin(0.0)

    def begin(self, length: float) -> None:
        """The library is about to integrate from the last state on, in its own times from 0 to ``length``."""
        self.start, self.step, self.calls = self.last_time, length, 0

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        if self.evaluations >= self.limit:
            raise _Stopped(Status.BUDGET_SPENT)
        self.evaluations += 1
        self.calls += 1
        dz = self.g(self.start + t.reshape(()), z)
        if not torch.isfinite(dz).all():
            raise _Stopped(Status.NON_FINITE)
        return dz

    def accept(self, t: float, state: Tensor) -> None:
        """A new state at the time ``t`` after the start of the library's interval."""
        self.last_time, self.last_state = self.start + t, state


def _torchdyn_solver(probe: _Probe, y: Tensor, duration: float, scheme: str) -> nn.Module:
    """A fresh solver of the library that reports its trial steps to ``probe``."""
    Torchdyn.import_module()
    solver = importlib.import_module("torchdyn.numerics.solvers.ode").str_to_solver(scheme, y.dtype)
    library_step = solver.step
    smallest = SMALLEST_STEP_IN_ROUNDING_UNITS * torch.finfo(y.dtype).eps * duration
    known = None

    def step(f, x, t, dt, k1=None, args=None):
        nonlocal known
        if x is not known:
            # The library hands a new state on only once it has accepted it.
            probe.accepted += known is not None
            probe.accept(float(t.detach()), x)
            known = x
        elif float(dt) < smallest:
            # The library has no smallest step: a stuck error estimate would spend the whole budget here.
            raise _Stopped(Status.STEP_UNDERFLOW)
        probe.trials += 1
        probe.step = float(dt.detach())
        return library_step(f, x, t, dt, k1=k1, args=args)

    solver.step = step
    return solver


@dataclass(frozen=True)
class Torchdyn(Library):
    """torchdyn's solvers; only ``torchdyn.numerics``, because ``core`` would pull in Lightning and torchvision."""

    kind: ClassVar[str] = "torchdyn"
    pairs: ClassVar[tuple[str, ...]] = ("dopri5", "tsit5")
    module: ClassVar[str] = "torchdyn.numerics"
    install: ClassVar[str] = (
        "pip install --no-deps torchdyn==1.0.6 torchcde==0.2.5 torchdiffeq==0.2.5 torchsde==0.2.6 trampoline attrs && "
        "pip install scipy"
    )

    def library_solve(self, probe: _Probe, y: Tensor, duration: float, layout: Layout) -> Tensor:
        solver = _torchdyn_solver(probe, y, duration, self.scheme)
        odeint = importlib.import_module("torchdyn.numerics.odeint").odeint
        span = torch.tensor([0.0, duration], dtype=y.dtype, device=y.device)
        times, states = odeint(probe, y, span, solver, atol=self.atol, rtol=self.rtol)
        if len(states) != len(span):
            raise ArithmeticError(
                f"torchdyn returned {len(states)} of {len(span)} states: it lost the end of the interval; use the "
                "back end own or torchdiffeq."
            )
        probe.accepted += 1
        return states[-1]


class _Reported:
    """The field with the calls that torchdiffeq looks for on it."""

    def __init__(self, probe: _Probe):
        self.probe = probe

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        return self.probe(t, z)

    def callback_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.probe.accept(float(t.detach()), state)
        self.probe.trials += 1
        self.probe.step = float(dt.detach())

    def callback_accept_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.probe.accepted += 1


@dataclass(frozen=True)
class Torchdiffeq(Library):
    """torchdiffeq's solvers, with the error norm per sample over real tokens."""

    kind: ClassVar[str] = "torchdiffeq"
    pairs: ClassVar[tuple[str, ...]] = ("bosh3", "dopri5")
    module: ClassVar[str] = "torchdiffeq"
    install: ClassVar[str] = "pip install --no-deps torchdiffeq==0.2.5 && pip install scipy"

    def library_solve(self, probe: _Probe, y: Tensor, duration: float, layout: Layout) -> Tensor:
        odeint = self.import_module().odeint

        end = torch.tensor([duration], dtype=torch.float64, device=y.device)
        options = {
            "norm": lambda error: layout.sample_mean(error.square()).sqrt().max(),
            "first_step": duration if self.first_step is None else min(self.first_step, duration),
            # Stop exactly at the end: by default the library steps past it and interpolates.
            "step_t": end,
        }
        span = torch.cat([torch.zeros_like(end), end])
        try:
            states = odeint(
                _Reported(probe), y, span, rtol=self.rtol, atol=self.atol, method=self.scheme, options=options
            )
        except AssertionError as error:
            if "underflow" in str(error):
                raise _Stopped(Status.STEP_UNDERFLOW) from error
            raise
        return states[-1]


@dataclass(frozen=True)
class TorchdynAdjoint(Direct):
    """torchdyn's own continuous adjoint around its adaptive solvers.

    It fails on frozen and on unused parameters, so only those are handed to it that need a gradient and receive one at
    the start of the interval, which costs one more evaluation and its gradient. Its backward pass integrates with the
    same tolerances: exact to the tolerance where the flow can be run backwards, wrong by 100 % on strongly contracting
    ones. torchdyn's interpolated adjoint is not offered: it measures no error of its interpolation.
    """

    name: ClassVar[str] = "torchdyn-adjoint"
    serves: ClassVar[tuple[str, ...]] = ("torchdyn",)
    condition: ClassVar[str] = "needs `backend` torchdyn and a `tolerance`"
    along_the_way: ClassVar[bool] = False
    takes_pieces: ClassVar[bool] = False

    def update_cost(self, forward, backward):
        return forward + 3 * backward, "solve + 3 x adjoint"

    def solve(
        self,
        solver: Torchdyn,
        f: VectorField,
        x: Tensor,
        span: Span,
        layout: Layout,
        parameters: Sequence[Tensor],
        record: AdjointRecord | None,
        **options,
    ) -> AdaptiveSolution:
        """See :meth:`Solver.solve`.

        Raises:
            OptionError: a half-precision state, which torchdyn's adjoint cannot carry.
            ArithmeticError: the solve, forward or backward, did not reach its end, without which there is no adjoint.
        """
        if not torch.is_grad_enabled():
            return solver.integrate(f, x, span, layout, **options)
        start, duration = span
        check_tolerance(solver, state_dtype(x.dtype))
        if x.dtype not in (torch.float32, torch.float64):
            raise OptionError(
                "gradient",
                f"torchdyn's adjoint cannot carry a {str(x.dtype)[6:]} state: use adjoint with `backend` own.",
            )
        gather = importlib.import_module("torchdyn.numerics.sensitivity")._gather_odefunc_adjoint
        probe = _Probe(start, solver.max_evaluations, x)
        probe.g = lambda t, z: f(t, z).to(x.dtype)
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            wanted = tuple(p for p in parameters if p.requires_grad)
            gradients = torch.autograd.grad(f(start, z).sum(), (z,) + wanted, allow_unused=True)[1:]
            used = [p for p, gradient in zip(wanted, gradients, strict=True) if gradient is not None]
        vector_field = _ModuleField(probe, used)
        flat = torch.cat([p.contiguous().flatten() for p in used]) if used else x.new_zeros(0)
        library = _torchdyn_solver(probe, x, duration, solver.scheme)
        solve = gather(
            vector_field, flat, library, solver.atol, solver.rtol, None, solver.scheme, solver.atol, solver.rtol,
            None, "standard",
        )  # fmt: skip
        try:
            _, states = solve.apply(flat, x, x.new_tensor([0.0, duration]))
        except _Stopped as stopped:
            raise ArithmeticError(
                f"The forward solve stopped at depth {probe.last_time:.3g} of {start + duration:g} "
                f"({stopped.status.value}), so torchdyn's adjoint has no end point to start from: raise "
                "max_evaluations or the tolerance, or use the gradient autograd."
            ) from None
        if len(states) != 2:
            raise ArithmeticError("torchdyn lost the end of the interval: use the gradient autograd instead.")
        forward, accepted, trials = probe.evaluations, probe.accepted + 1, probe.trials
        # The backward solve has a budget of its own, and nobody left to receive a status: it ends in an error.
        probe.limit = forward + 10 * solver.max_evaluations
        if record is not None and flat.requires_grad:
            flat.register_hook(lambda gradient: setattr(record, "evaluations", probe.evaluations - forward))
        return AdaptiveSolution(
            state=states[-1],
            evaluations=forward,
            status=Status.CONVERGED,
            accepted=accepted,
            rejected=trials - accepted,
            field_calls=forward,
            reached=(start + duration,) * x.shape[0],
        )


class _ModuleField(nn.Module):
    """The bare minimum that torchdyn's adjoint asks of a vector field: a call and ``parameters()``."""

    def __init__(self, call: Callable, tensors: list[Tensor]):
        super().__init__()
        self.call, self.tensors = call, tensors

    def parameters(self, recurse: bool = True):
        return iter(self.tensors)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.call(t, z)
