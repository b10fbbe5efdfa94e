"""torchdyn and torchdiffeq behind the contract of the own adaptive loop.

Both libraries are optional and imported on first use. What they lack is added around the field: a limit on evaluations
that returns the last accepted state, a check for non-finite values (torchdyn loops for ever on NaN) that tries smaller
steps before it gives up, an end of a step wherever the field is not smooth, counts of accepted and rejected steps, a
float32 state around half-precision fields, times that start at 0 (torchdyn can lose the last point of an interval that
does not) and, for torchdiffeq, the error norm per sample over real tokens.

Only ``torchdyn.numerics`` is touched, with a fresh solver object per solve: its tableau is cast in place to the dtype
of the state, so that one half-precision solve would spoil every later one.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.adaptive import (
    LARGEST_FACTOR,
    SMALLEST_FACTOR,
    SMALLEST_STEP_IN_ROUNDING_UNITS,
    AdaptiveConfig,
    AdaptiveResult,
    Piece,
    check_tolerance,
    in_state_precision,
    solve_adaptive,
)
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import VectorField

BACKENDS = ("own", "torchdyn", "torchdiffeq")
BACKEND_PAIRS = {
    "own": ("bosh3", "dopri5", "tsit5"),
    "torchdyn": ("dopri5", "tsit5"),
    "torchdiffeq": ("bosh3", "dopri5"),
}
_INSTALL = {
    "torchdyn": "pip install --no-deps torchdyn==1.0.6 torchcde==0.2.5 torchdiffeq==0.2.5 torchsde==0.2.6 "
    "trampoline attrs && pip install scipy",
    "torchdiffeq": "pip install --no-deps torchdiffeq==0.2.5 && pip install scipy",
}


def check_backend(backend: str, scheme: str) -> None:
    """Raises:
    ValueError: unknown back end, or one that does not offer the scheme.
    ModuleNotFoundError: the back end is not installed; the sentence holds the install line.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown ODE back end '{backend}': choose one of {', '.join(BACKENDS)}.")
    if scheme not in BACKEND_PAIRS[backend]:
        raise ValueError(
            f"The back end {backend} has no sound adaptive '{scheme}': choose one of "
            f"{', '.join(BACKEND_PAIRS[backend])}, or --ode-backend own."
        )
    if backend != "own":
        _module(backend)


def _module(backend: str):
    # torchdyn.core would pull in Lightning and torchvision; numerics needs neither.
    name = "torchdyn.numerics" if backend == "torchdyn" else "torchdiffeq"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--ode-backend {backend} needs the package {backend} ({error}): install it with "
            f"`{_INSTALL[backend]}` or use --ode-backend own."
        ) from error


def solve_with(
    backend: str,
    f: VectorField,
    y: Tensor,
    duration: float,
    config: AdaptiveConfig,
    layout: Layout = UNPADDED,
    start: float = 0.0,
    pieces: Sequence[Piece] = (),
    **options,
) -> AdaptiveResult:
    """Integrates like :func:`solve_adaptive`, with the back end of that name.

    torchdyn measures the error over the whole batch, padding included; its answers are within tolerance of the batch,
    not of each sample, and it chooses its first step itself. torchdiffeq takes the first step that the own loop takes.

    Args:
        pieces: ``f`` cut at the times where it is not smooth; the libraries solve one after the other.
        options: further options of :func:`solve_adaptive`, for the back end ``own`` only.

    Raises:
        ValueError, ModuleNotFoundError: see :func:`check_backend`.
    """
    check_backend(backend, config.scheme)
    if backend == "own":
        return solve_adaptive(f, y, duration, config, layout, start, pieces=pieces, **options)
    if options:
        raise ValueError(f"{', '.join(sorted(options))}: only the back end own offers this, not {backend}.")
    dtype = torch.promote_types(y.dtype, torch.float32)
    check_tolerance(config, dtype)
    probe = _Probe(start, config.max_evaluations, y.to(dtype))
    integrate = _torchdyn if backend == "torchdyn" else _torchdiffeq
    smallest = SMALLEST_STEP_IN_ROUNDING_UNITS * torch.finfo(dtype).eps * duration
    status = Status.CONVERGED
    try:
        for piece in pieces or (Piece(f, start + duration),):
            probe.g, _ = in_state_precision(piece.field, y.dtype)
            _cover(integrate, probe, piece.end, config, layout, smallest)
    except _Stopped as stopped:
        status = stopped.status
    return AdaptiveResult(
        state=probe.last_state.to(y.dtype),
        evaluations=probe.evaluations,
        status=status,
        accepted=probe.accepted,
        rejected=probe.trials - probe.accepted,
        field_calls=probe.evaluations,
        reached=(probe.last_time,) * y.shape[0],
    )


def _cover(
    integrate: Callable, probe: "_Probe", end: float, config: AdaptiveConfig, layout: Layout, smallest: float
) -> None:
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
            state = integrate(probe, probe.last_state, length, config, layout)
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
            f"torchdyn's adjoint failed on its way back ({status.value}): use --ode-backend own with --ode-gradient "
            "checkpoint-step."
        )
        self.status = status


class _Probe:
    """The field as the libraries call it: times from 0 and 0-dim, counted, limited, checked for non-finite values."""

    def __init__(self, start: float, limit: int, state: Tensor):
        self.start, self.limit = start, limit
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
    _module("torchdyn")
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


def _torchdyn(probe: _Probe, y: Tensor, duration: float, config: AdaptiveConfig, layout: Layout) -> Tensor:
    solver = _torchdyn_solver(probe, y, duration, config.scheme)
    odeint = importlib.import_module("torchdyn.numerics.odeint").odeint
    span = torch.tensor([0.0, duration], dtype=y.dtype, device=y.device)
    times, states = odeint(probe, y, span, solver, atol=config.atol, rtol=config.rtol)
    if len(states) != len(span):
        raise ArithmeticError(
            f"torchdyn returned {len(states)} of {len(span)} states: it lost the end of the interval; use "
            f"--ode-backend own or torchdiffeq."
        )
    probe.accepted += 1
    return states[-1]


def _torchdiffeq(probe: _Probe, y: Tensor, duration: float, config: AdaptiveConfig, layout: Layout) -> Tensor:
    odeint = _module("torchdiffeq").odeint

    def field(t, z):
        return probe(t, z)

    def on_accept(t, state, dt):
        probe.accepted += 1

    def on_step(t, state, dt):
        probe.accept(float(t.detach()), state)
        probe.trials += 1
        probe.step = float(dt.detach())

    field.callback_step, field.callback_accept_step = on_step, on_accept
    end = torch.tensor([duration], dtype=torch.float64, device=y.device)
    options = {
        "norm": lambda error: layout.sample_mean(error.square()).sqrt().max(),
        "first_step": duration if config.first_step is None else min(config.first_step, duration),
        # Stop exactly at the end: by default the library steps past it and interpolates.
        "step_t": end,
    }
    span = torch.cat([torch.zeros_like(end), end])
    try:
        states = odeint(field, y, span, rtol=config.rtol, atol=config.atol, method=config.scheme, options=options)
    except AssertionError as error:
        if "underflow" in str(error):
            raise _Stopped(Status.STEP_UNDERFLOW) from error
        raise
    return states[-1]


def solve_torchdyn_adjoint(
    f: VectorField,
    y: Tensor,
    duration: float,
    config: AdaptiveConfig,
    parameters: tuple[Tensor, ...],
    start: float = 0.0,
    on_backward: Callable[[int], None] | None = None,
) -> AdaptiveResult:
    """torchdyn's own continuous adjoint around its adaptive solvers.

    Its adjoint fails on frozen and on unused parameters, so only those are handed to it that need a gradient and
    receive one at the start of the interval, which costs one more evaluation and its gradient. Its backward pass
    integrates with the same tolerances: exact to the tolerance where the flow can be run backwards, wrong by 100 % on
    strongly contracting ones. torchdyn's interpolated adjoint is not offered: it measures no error of its
    interpolation.

    Args:
        parameters: every tensor with gradient that ``f`` reads, other than its arguments.
        on_backward: called after the backward solve with its evaluations of the field.

    Raises:
        ValueError: a half-precision state, which torchdyn's adjoint cannot carry.
        ArithmeticError: the solve, forward or backward, did not reach its end, without which there is no adjoint.
    """
    check_backend("torchdyn", config.scheme)
    check_tolerance(config, torch.promote_types(y.dtype, torch.float32))
    if y.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"torchdyn's adjoint cannot carry a {str(y.dtype)[6:]} state: use --ode-gradient adjoint instead."
        )
    gather = importlib.import_module("torchdyn.numerics.sensitivity")._gather_odefunc_adjoint
    probe = _Probe(start, config.max_evaluations, y)
    probe.g = lambda t, z: f(t, z).to(y.dtype)
    with torch.enable_grad():
        z = y.detach().requires_grad_()
        wanted = tuple(p for p in parameters if p.requires_grad)
        gradients = torch.autograd.grad(f(start, z).sum(), (z,) + wanted, allow_unused=True)[1:]
        used = [p for p, gradient in zip(wanted, gradients) if gradient is not None]
    vector_field = _ModuleField(probe, used)
    flat = torch.cat([p.contiguous().flatten() for p in used]) if used else y.new_zeros(0)
    solver = _torchdyn_solver(probe, y, duration, config.scheme)
    solve = gather(
        vector_field, flat, solver, config.atol, config.rtol, None, config.scheme, config.atol, config.rtol,
        None, "standard",
    )  # fmt: skip
    try:
        _, states = solve.apply(flat, y, y.new_tensor([0.0, duration]))
    except _Stopped as stopped:
        raise ArithmeticError(
            f"The forward solve stopped at depth {probe.last_time:.3g} of {start + duration:g} "
            f"({stopped.status.value}), so torchdyn's adjoint has no end point to start from: raise "
            "--ode-max-evaluations or --ode-tolerance, or use --ode-gradient autograd."
        ) from None
    if len(states) != 2:
        raise ArithmeticError("torchdyn lost the end of the interval: use --ode-gradient autograd instead.")
    forward, accepted, trials = probe.evaluations, probe.accepted + 1, probe.trials
    # The backward solve has a budget of its own, and nobody left to receive a status: it ends in an error.
    probe.limit = forward + 10 * config.max_evaluations
    if on_backward is not None and flat.requires_grad:
        flat.register_hook(lambda gradient: on_backward(probe.evaluations - forward))
    return AdaptiveResult(
        state=states[-1],
        evaluations=forward,
        status=Status.CONVERGED,
        accepted=accepted,
        rejected=trials - accepted,
        field_calls=forward,
        reached=(start + duration,) * y.shape[0],
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
