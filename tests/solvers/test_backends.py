"""torchdyn and torchdiffeq behind the own contract, and what torchdyn gets wrong."""

import builtins
import sys

import pytest
import torch

from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.adaptive import Adaptive, embedded_step
from fairseq_implicit.solvers.backends import Torchdyn, TorchdynAdjoint
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.names import BACKENDS, continuous_solver
from fairseq_implicit.solvers.solver import Keep, Piece, Span
from fairseq_implicit.solvers.status import Status
from tests.solvers.solving import Explicit, solve_adaptive, solve_explicit

LIBRARY_PAIRS = (
    ("torchdyn", "dopri5"), ("torchdyn", "tsit5"), ("torchdiffeq", "dopri5"), ("torchdiffeq", "bosh3")
)  # fmt: skip


@pytest.fixture
def block():
    torch.manual_seed(0)
    field = TransformerField(TransformerFieldConfig(16, 32, AttentionConfig(2))).double().eval()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(1.5)
    return field


@pytest.fixture
def state():
    torch.manual_seed(1)
    return torch.randn(3, 5, 16, dtype=torch.float64)


def solve_with(backend, f, y, duration, config, layout=UNPADDED, start=0.0, **options):
    solver = BACKENDS[backend](**vars(config))
    return solver.solve(f, y, Span(start, duration), layout, **options)


def solve_torchdyn_adjoint(f, y, duration, config, parameters, record=None):
    solver = Torchdyn(**{**vars(config), "gradient": TorchdynAdjoint()})
    return solver.solve(f, y, Span(0.0, duration), parameters=parameters, record=record)


def needs(backend):
    pytest.importorskip("torchdyn.numerics" if backend == "torchdyn" else "torchdiffeq")


@pytest.mark.parametrize("backend, scheme", LIBRARY_PAIRS)
def test_libraries_agree_with_the_own_loop_on_a_real_block(backend, scheme, block, state):
    needs(backend)
    state.requires_grad_()
    f, config = block.prepare(state), Adaptive(scheme, 1e-6, 1e-6)
    own, other = solve_adaptive(f, state, 2.0, config), solve_with(backend, f, state, 2.0, config)
    assert other.status is Status.CONVERGED
    torch.testing.assert_close(own.state, other.state, rtol=0, atol=3e-5)
    assert other.accepted >= 1 and other.evaluations == other.field_calls
    gradients = [torch.autograd.grad(r.state.square().sum(), [state, *block.parameters()]) for r in (own, other)]
    for one, another in zip(*gradients, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend, scheme", LIBRARY_PAIRS)
def test_evaluations_and_trials_add_up(backend, scheme, state):
    needs(backend)
    calls = []

    def field(t, z):
        assert t.dim() == 0
        calls.append(float(t.detach()))
        return -4 * z * z.abs()

    result = solve_with(backend, field, state, 3.0, Adaptive(scheme, 1e-5, 1e-5), start=5.0)
    stages = 4 if scheme == "bosh3" else 7
    before = 2 if backend == "torchdyn" else 1
    assert len(calls) == result.evaluations == before + (stages - 1) * (result.accepted + result.rejected)
    assert min(calls) == 5.0 and max(calls) <= 8.0 + 1e-12
    assert result.reached == (8.0,) * 3


def test_own_dopri5_step_is_that_of_torchdyn(block, state):
    needs("torchdyn")
    from torchdyn.numerics.solvers.ode import str_to_solver

    f = block.prepare(state)
    k1 = f(0.0, state)
    own, last, _ = embedded_step(f, "dopri5", 0.0, 0.7, state, k1)
    t, h = torch.tensor([0.0, 0.7], dtype=torch.float64)
    theirs = str_to_solver("dopri5", torch.float64).step(f, state, t, h, k1=k1)
    torch.testing.assert_close(own, theirs[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(last, theirs[0], rtol=0, atol=1e-13)


def test_own_rk4_is_that_of_torchdyn_on_an_autonomous_field(block, state):
    needs("torchdyn")
    from torchdyn.numerics import odeint

    f = block.prepare(state)
    own = solve_explicit(f, state, Explicit("rk4", steps=4)).state
    span = torch.linspace(0, 1, 5, dtype=torch.float64)
    theirs = odeint(lambda t, z: f(t, z), state, span, solver="rk4")[1][-1]
    assert (own - theirs).abs().max() < 1e-14 * own.abs().max().clamp(min=1)


def test_own_rk4_38_is_that_of_torchdiffeq(block, state):
    needs("torchdiffeq")
    from torchdiffeq import odeint

    f = block.prepare(state)
    own = solve_explicit(f, state, Explicit("rk4_38", steps=4)).state
    theirs = odeint(f, state, torch.linspace(0, 1, 5, dtype=torch.float64), method="rk4")[-1]
    assert (own - theirs).abs().max() < 1e-13


def test_torchdyn_rk4_has_order_one_on_non_autonomous_fields():
    """A defect of torchdyn 1.0.6: it evaluates the stages at wrong times. When this fails, a release has mended it, and
    the warning in the documentation of the back ends can go."""
    needs("torchdyn")
    from torchdyn.numerics import odeint

    def field(t, x):
        return torch.cos(3 * torch.as_tensor(t, dtype=torch.float64)) * torch.ones_like(x)

    x, exact = torch.zeros(1, 1, 1, dtype=torch.float64), torch.sin(torch.tensor(4.5).double()) / 3

    def slope(solve):
        coarse, fine = ((solve(n) - exact).abs().item() for n in (32, 64))
        return torch.log2(torch.tensor(coarse / fine)).item()

    def theirs(n):
        return odeint(field, x, torch.linspace(0, 1.5, n + 1, dtype=torch.float64), solver="rk4")[1][-1]

    assert slope(theirs) == pytest.approx(1.0, abs=0.15)
    own = slope(lambda n: solve_explicit(field, x, Explicit("rk4", n, 1.5)).state)
    assert own == pytest.approx(4.0, abs=0.15)


@pytest.mark.parametrize("backend, scheme", LIBRARY_PAIRS)
def test_endings(backend, scheme, state):
    needs(backend)
    config = Adaptive(scheme, 1e-6, 1e-6, max_evaluations=100)
    stiff = solve_with(backend, lambda t, z: -1e6 * (z - 2), state, 1.0, config)
    assert stiff.status is Status.BUDGET_SPENT and stiff.evaluations == 100
    assert torch.isfinite(stiff.state).all() and 0 < stiff.reached[0] < 1.0
    broken = solve_with(backend, lambda t, z: z * float("nan"), state, 1.0, config)
    assert broken.status is Status.NON_FINITE
    torch.testing.assert_close(broken.state, state, rtol=0, atol=0)


@pytest.mark.parametrize("backend, scheme", LIBRARY_PAIRS)
def test_overshooting_trial_steps_are_no_broken_field(backend, scheme):
    """The first trial leaves every range (as in the own loop, whose first trial is the whole interval here, too)."""
    needs(backend)
    y = torch.full((1, 1, 1), 30.0, dtype=torch.float64, requires_grad=True)
    result = solve_with(backend, lambda t, z: -(z**3), y, 1.0, Adaptive(scheme, 1e-6, 1e-6, 5000))
    assert result.status is Status.CONVERGED and result.reached == (1.0,)
    exact = (1 / 900 + 2.0) ** -0.5
    assert result.state.item() == pytest.approx(exact, abs=1e-4)
    (gradient,) = torch.autograd.grad(result.state, y)
    assert gradient.item() == pytest.approx(exact**3 / 27000, rel=2e-2)


@pytest.mark.parametrize("backend, scheme", LIBRARY_PAIRS)
def test_a_field_that_breaks_on_the_way_keeps_the_last_finite_state(backend, scheme):
    needs(backend)

    def field(t, z):
        return torch.ones_like(z) if t <= 0.5 else z * float("nan")

    y = torch.zeros(1, 1, 1, dtype=torch.float64)
    result = solve_with(backend, field, y, 1.0, Adaptive(scheme, 1e-6, 1e-6))
    assert result.status is Status.NON_FINITE and 0.4 < result.reached[0] <= 0.5
    assert result.state.item() == pytest.approx(result.reached[0])


@pytest.mark.parametrize("backend, scheme", LIBRARY_PAIRS)
def test_libraries_end_a_step_at_each_kink(backend, scheme):
    needs(backend)
    times = []

    def piece(k):
        def field(t, z):
            assert k <= float(t) <= k + 1
            times.append(float(t))
            return torch.full_like(z, float(k))

        return Piece(field, k + 1.0)

    y = torch.zeros(2, 1, 1, dtype=torch.float64)
    config = Adaptive(scheme, 1e-6, 1e-6)
    result = solve_with(backend, None, y, 3.0, config, pieces=[piece(k) for k in range(3)])
    assert result.status is Status.CONVERGED and result.reached == (3.0, 3.0)
    torch.testing.assert_close(result.state, torch.full_like(y, 3.0), rtol=0, atol=1e-12)
    assert result.evaluations == len(times) and {1.0, 2.0, 3.0} <= set(times)


@pytest.mark.parametrize("backend, scheme", (("torchdyn", "tsit5"), ("torchdiffeq", "dopri5")))
def test_half_precision_field(backend, scheme, block):
    needs(backend)
    y = torch.randn(2, 3, 16)
    half = block.bfloat16()
    result = solve_with(backend, half.prepare(y.bfloat16()), y.bfloat16(), 1.0, Adaptive(scheme, 1e-2, 1e-2))
    assert result.state.dtype is torch.bfloat16 and result.status is Status.CONVERGED


def test_one_half_precision_solve_does_not_spoil_the_next(block, state):
    needs("torchdyn")
    config = Adaptive("dopri5", 1e-9, 1e-9)
    f = block.prepare(state)
    before = solve_with("torchdyn", f, state, 1.0, config).state
    low = Adaptive("dopri5", 1e-2, 1e-2)
    solve_with("torchdyn", lambda t, z: -z, state.bfloat16(), 1.0, low)
    torch.testing.assert_close(solve_with("torchdyn", f, state, 1.0, config).state, before, rtol=0, atol=0)


def test_torchdiffeq_measures_each_sample_over_its_real_tokens(block, state):
    """Padding and easy batch mates must not dilute the error of a hard sample."""
    needs("torchdiffeq")
    real = torch.ones(3, 5, dtype=torch.bool)
    real[0, 1:] = False
    wide = torch.cat([state, torch.zeros(3, 40, 16).double()], 1)
    layout, beside = Layout(real), Layout(torch.cat([real, torch.zeros(3, 40, dtype=torch.bool)], 1))
    config = Adaptive("dopri5", 1e-5, 1e-5)
    narrow = solve_with("torchdiffeq", block.prepare(state, layout), state, 3.0, config, layout)
    broad = solve_with("torchdiffeq", block.prepare(wide, beside), wide, 3.0, config, beside)
    assert narrow.evaluations == broad.evaluations
    torch.testing.assert_close(broad.state[:, :5], narrow.state, rtol=0, atol=1e-9)


def test_torchdyn_adjoint_within_tolerance_despite_frozen_and_unused_parameters(block, state):
    needs("torchdyn")
    block.attention.out.weight.requires_grad_(False)
    unused = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    state.requires_grad_()
    trained = [p for p in block.parameters() if p.requires_grad]
    f, config = block.prepare(state), Adaptive("dopri5", 1e-8, 1e-8)
    exact = torch.autograd.grad(solve_adaptive(f, state, 1.0, config).state.square().sum(), [state, *trained])
    record = AdjointRecord()
    result = solve_torchdyn_adjoint(f, state, 1.0, config, (*block.parameters(), unused), record)
    gradients = torch.autograd.grad(result.state.square().sum(), [state, *trained])
    for one, other in zip(exact, gradients, strict=True):
        assert (one - other).norm() < 1e-5 * one.norm() + 1e-7
    assert record.evaluations > 0


def test_torchdyn_adjoint_refuses_half_precision(block, state):
    needs("torchdyn")
    with pytest.raises(ValueError, match="cannot carry a bfloat16 state"):
        solve_torchdyn_adjoint(lambda t, z: -z, state.bfloat16(), 1.0, Adaptive("dopri5", 1e-2, 1e-2), ())


def test_torchdyn_adjoint_refuses_to_lose_the_gradient(block, state):
    """A solve cut short has no adjoint; its state without a graph would train nothing and say nothing."""
    needs("torchdyn")
    config = Adaptive("dopri5", 1e-9, 1e-9, max_evaluations=20)
    with pytest.raises(ArithmeticError, match="stopped at depth .* of 3.*raise max_evaluations"):
        solve_torchdyn_adjoint(block.prepare(state), state, 3.0, config, tuple(block.parameters()))


def test_pairs_that_a_library_lacks():
    with pytest.raises(ValueError, match="torchdiffeq has no sound adaptive 'tsit5'.*`backend` own"):
        BACKENDS["torchdiffeq"]("tsit5")
    with pytest.raises(ValueError, match="torchdyn has no sound adaptive 'bosh3'"):
        BACKENDS["torchdyn"]("bosh3")
    with pytest.raises(ValueError, match="backend: 'jax' is unknown"):
        continuous_solver("dopri5", backend="jax")


@pytest.mark.parametrize("backend", ("torchdyn", "torchdiffeq"))
def test_missing_library_is_one_sentence_with_the_install_line(backend, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == backend:
            monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name.split(".")[0] == backend:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("importlib.import_module", lambda name, package=None: missing(name))
    with pytest.raises(ModuleNotFoundError, match=rf"the back end {backend} needs .*`pip install --no-deps"):
        BACKENDS[backend]("dopri5")


def test_options_of_the_own_loop_are_refused_elsewhere(state):
    needs("torchdiffeq")
    with pytest.raises(ValueError, match="backend: penalties along the depth need own"):
        solve_with("torchdiffeq", lambda t, z: -z, state, 1.0, Adaptive("dopri5"), keep=Keep(penalties=True))
