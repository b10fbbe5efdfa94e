"""Adaptive solves: accuracy, cost, independence of batch mates and padding, endings."""

import math

import pytest
import torch

from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.adaptive import PAIRS, Adaptive, embedded_step
from fairseq_implicit.solvers.solver import Piece
from fairseq_implicit.solvers.status import Status
from tests.solvers.solving import solve_adaptive

ROTATION = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def rotation(t, z):
    """Non-autonomous and coupled: the exact flow is a rotation by t + (1 - cos 2t) / 2."""
    t = torch.as_tensor(t, dtype=z.dtype).reshape(-1, 1, 1)
    return (1 + torch.sin(2 * t)) * (z @ ROTATION.to(z.dtype))


def exact_rotation(y, t):
    angle = t + (1 - math.cos(2 * t)) / 2
    return y @ torch.matrix_exp(ROTATION * angle)


def block(seed=0, dim=16, dropout=0.0, dtype=torch.float64, scale=1.0):
    torch.manual_seed(seed)
    field = TransformerField(
        TransformerFieldConfig(dim, 2 * dim, AttentionConfig(2, dropout), dropout=dropout, activation_dropout=dropout)
    ).to(dtype)
    with torch.no_grad():
        for parameter in field.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return field


@pytest.mark.parametrize("scheme", PAIRS)
@pytest.mark.parametrize("control", ("sample", "batch"))
def test_error_follows_tolerance(scheme, control):
    torch.manual_seed(0)
    y = torch.randn(3, 2, 2, dtype=torch.float64)
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        config = Adaptive(scheme, tolerance, tolerance, 100000, control)
        result = solve_adaptive(rotation, y, 1.5, config)
        assert result.status is Status.CONVERGED
        errors.append((result.state - exact_rotation(y, 1.5)).abs().max().item())
        assert errors[-1] < 20 * tolerance
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("scheme, order", (("bosh3", 3), ("dopri5", 5), ("tsit5", 5)))
def test_error_estimate_falls_with_its_order(scheme, order):
    y = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64)
    sizes = [embedded_step(rotation, scheme, 0.3, h, y, rotation(0.3, y))[2].norm().item() for h in (0.2, 0.1)]
    assert math.log2(sizes[0] / sizes[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("scheme, stages", (("bosh3", 4), ("dopri5", 7), ("tsit5", 7)))
def test_a_smooth_block_costs_one_step(scheme, stages):
    field = block(scale=0.3).eval()
    y = torch.randn(2, 5, 16, dtype=torch.float64)
    result = solve_adaptive(field.prepare(y), y, 1.0, Adaptive(scheme, 1e-2, 1e-2))
    assert result.evaluations == stages and result.accepted == 1 and result.rejected == 0
    assert result.field_calls == stages


def test_evaluations_are_counted_as_the_field_sees_them():
    calls = []

    def counted(t, z):
        calls.append(t)
        return rotation(t, z)

    y = torch.randn(1, 3, 2, dtype=torch.float64)
    result = solve_adaptive(counted, y, 4.0, Adaptive("dopri5", 1e-6, 1e-6))
    assert len(calls) == result.field_calls == result.evaluations
    assert result.evaluations == 1 + 6 * (result.accepted + result.rejected)
    assert result.rejected > 0 and result.reached == (4.0,)


def test_a_smaller_first_step_saves_rejections_only():
    y = torch.randn(1, 3, 2, dtype=torch.float64)
    whole = solve_adaptive(rotation, y, 4.0, Adaptive("dopri5", 1e-6, 1e-6))
    small = solve_adaptive(rotation, y, 4.0, Adaptive("dopri5", 1e-6, 1e-6, first_step=0.5))
    assert small.rejected < whole.rejected and small.evaluations < whole.evaluations
    torch.testing.assert_close(small.state, exact_rotation(y, 4.0), rtol=0, atol=1e-4)
    beyond = solve_adaptive(rotation, y, 4.0, Adaptive("dopri5", 1e-6, 1e-6, first_step=9.0))
    assert torch.equal(beyond.state, whole.state)


def test_start_time_reaches_the_field():
    y = torch.randn(1, 2, 2, dtype=torch.float64)
    config = Adaptive("dopri5", 1e-9, 1e-9)
    whole = solve_adaptive(rotation, y, 1.5, config)
    half = solve_adaptive(rotation, y, 0.7, config)
    rest = solve_adaptive(rotation, half.state, 0.8, config, start=0.7)
    torch.testing.assert_close(rest.state, whole.state, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scheme", PAIRS)
def test_each_sample_of_a_padded_batch_gets_what_it_gets_alone(scheme):
    field = block(scale=2.0).eval()
    torch.manual_seed(1)
    lengths, width = (7, 3, 5), 7
    y = torch.randn(3, width, 16, dtype=torch.float64) * torch.tensor([0.3, 1.0, 3.0]).double().view(-1, 1, 1)
    padding = torch.arange(width)[None] >= torch.tensor(lengths)[:, None]
    config = Adaptive(scheme, 1e-5, 1e-5)
    together = solve_adaptive(field.prepare(y, Layout(~padding)), y, 3.0, config, Layout(~padding))
    assert len(set(together.evaluations.tolist())) > 1, "the samples should differ in difficulty"
    for row, length in enumerate(lengths):
        mine = y[row : row + 1, :length]
        alone = solve_adaptive(field.prepare(mine), mine, 3.0, config)
        torch.testing.assert_close(together.state[row : row + 1, :length], alone.state, rtol=0, atol=1e-9)
        assert alone.evaluations == together.evaluations[row]
        assert alone.rejected == together.rejected if isinstance(together.rejected, int) else together.rejected[row]


def test_batch_control_meets_the_tolerance_of_the_hardest_sample():
    """One sample's error must not be diluted by easy batch mates: the norm is a maximum over the batch."""
    torch.manual_seed(0)
    y = torch.randn(6, 1, 2, dtype=torch.float64)

    def field(t, z):
        speed = torch.ones(6, 1, 1, dtype=z.dtype)
        speed[0] = 8.0
        return speed[: len(z)] * rotation(t, z)

    config = Adaptive("dopri5", 1e-6, 1e-6, step_control="batch")
    crowd, alone = solve_adaptive(field, y, 1.0, config), solve_adaptive(field, y[:1], 1.0, config)
    assert crowd.evaluations >= alone.evaluations
    torch.testing.assert_close(crowd.state[:1], alone.state, rtol=0, atol=1e-5)
    assert sum(h for _, h in crowd.accepted_steps) == pytest.approx(1.0)


@pytest.mark.parametrize("scheme", PAIRS)
def test_frozen_noise_costs_no_evaluations(scheme):
    """With dropout 0.1 a solve takes as many evaluations as in eval mode: its masks do not change on the way."""
    field = block(dim=32, dropout=0.1, dtype=torch.float32)
    torch.manual_seed(2)
    y = torch.randn(4, 12, 32)
    config = Adaptive(scheme, 1e-4, 1e-4)
    still = solve_adaptive(field.eval().prepare(y), y, 1.0, config)
    noisy = solve_adaptive(field.train().prepare(y), y, 1.0, config)
    # The thinned field is another field: of low order it may ask for one step more.
    assert noisy.field_calls <= still.field_calls + (3 if scheme == "bosh3" else 0)
    redrawn = solve_adaptive(lambda t, z: field.prepare(z)(t, z), y, 1.0, Adaptive(scheme, 1e-4, 1e-4, 200))
    assert redrawn.field_calls > 2 * noisy.field_calls


@pytest.mark.parametrize("control", ("sample", "batch"))
def test_recomputation_gives_the_gradients_of_autograd(control):
    field = block(dropout=0.1, scale=1.5)
    y = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    f = field.prepare(y)
    gradients = []
    for recompute in (False, True):
        config = Adaptive("dopri5", 1e-6, 1e-6, step_control=control)
        result = solve_adaptive(f, y, 2.0, config, recompute=recompute, penalties=True)
        loss = result.state.square().sum() + result.energy.sum() + result.local_error.sum()
        gradients.append(torch.autograd.grad(loss, [y, *field.parameters()]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_gradient_is_that_of_the_flow():
    y = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    result = solve_adaptive(rotation, y, 1.5, Adaptive("tsit5", 1e-10, 1e-10))
    weight = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((result.state * weight).sum(), y)
    flow = torch.matrix_exp(ROTATION * (1.5 + (1 - math.cos(3.0)) / 2))
    torch.testing.assert_close(gradient, weight @ flow.T, rtol=0, atol=1e-8)


def test_energy_and_local_error():
    """A constant field of value v has kinetic energy v² per unit of time and no error."""
    y = torch.zeros(2, 3, 4, dtype=torch.float64)
    result = solve_adaptive(
        lambda t, z: torch.full_like(z, 3.0), y, 2.0, Adaptive("bosh3"), penalties=True, keep_states=True
    )
    torch.testing.assert_close(result.energy, torch.full((2,), 18.0, dtype=torch.float64))
    assert result.local_error.max() < 1e-12
    assert len(result.states) == 2 and result.times == [0.0, 2.0]


def test_half_precision_field_keeps_a_float32_state():
    field = block(dtype=torch.bfloat16).eval()
    y = torch.randn(2, 4, 16, dtype=torch.bfloat16)
    f = field.prepare(y)
    seen = set()

    def spy(t, z):
        seen.add(z.dtype)
        return f(t, z)

    result = solve_adaptive(spy, y, 1.0, Adaptive("bosh3", 1e-2, 1e-2))
    assert seen == {torch.bfloat16} and result.state.dtype is torch.bfloat16
    exact = solve_adaptive(block().eval().prepare(y.double()), y.double(), 1.0, Adaptive("bosh3", 1e-6, 1e-6))
    assert (result.state.double() - exact.state).abs().max() < 0.05


def test_stiff_field_ends_at_the_limit_with_the_last_state():
    y = torch.ones(2, 1, 2, dtype=torch.float64)
    result = solve_adaptive(lambda t, z: -1e6 * (z - 2), y, 1.0, Adaptive("dopri5", 1e-6, 1e-6, 300))
    assert result.status is Status.BUDGET_SPENT and result.evaluations <= 300
    assert torch.isfinite(result.state).all() and 0 < result.reached[0] < 1.0
    assert (result.state > 1.0).all(), "the accepted steps moved towards the fixed point"


def test_nan_field_ends_at_once_and_spares_its_neighbours():
    y = torch.tensor([[[1.0, 0.0]], [[float("inf"), 0.0]]], dtype=torch.float64)
    result = solve_adaptive(rotation, y, 1.5, Adaptive("dopri5", 1e-6, 1e-6))
    assert result.status is Status.NON_FINITE
    torch.testing.assert_close(result.state[:1], exact_rotation(y[:1], 1.5), rtol=0, atol=1e-4)
    assert result.evaluations[1] == 1


def test_overflow_of_a_large_step_is_only_a_rejection():
    """The first trial steps leave the domain of the field; smaller ones are fine, and so are the gradients."""

    def field(t, z):
        return torch.exp(-5 * z) + torch.where(z > 20, float("nan"), 0.0) * z

    y = torch.full((2, 1, 1), -1.0, dtype=torch.float64)
    y[1] = 1.0
    y.requires_grad_()
    result = solve_adaptive(field, y, 1.0, Adaptive("dopri5", 1e-6, 1e-6))
    assert result.status is Status.CONVERGED
    exact = torch.log(torch.exp(5 * y) + 5) / 5
    torch.testing.assert_close(result.state, exact, rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(result.state.sum(), y)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), y)[0], rtol=0, atol=1e-3)


def test_nan_that_appears_on_the_way_keeps_the_last_finite_state():
    def field(t, z):
        t = torch.as_tensor(t, dtype=z.dtype).reshape(-1, 1, 1)
        return torch.ones_like(z) + torch.where(t > 0.5, float("nan"), 0.0)

    result = solve_adaptive(field, torch.zeros(1, 1, 1, dtype=torch.float64), 1.0, Adaptive("bosh3"))
    assert result.status is Status.NON_FINITE
    assert result.state.item() == pytest.approx(result.reached[0]) and 0.4 < result.reached[0] <= 0.5


def kinked(jump):
    """A rotation whose speed has a kink or a jump at t = 0.7 and 1.1, as pieces, and the angle at t = 2."""
    speeds = [lambda t: 1 + t, lambda t: 1.7 - 3 * (t - 0.7) + jump, lambda t: 0.5 + 2 * (t - 1.1) - jump]
    angle = 0.7 + 0.245 + 0.4 * (1.7 + jump) - 1.5 * 0.16 + 0.9 * (0.5 - jump) + 0.81

    def turning(speed):
        return lambda t, z: speed(torch.as_tensor(t, dtype=z.dtype).reshape(-1, 1, 1)) * (z @ ROTATION)

    ends = (0.7, 1.1, 2.0)
    return [Piece(turning(speed), end, jump == 0.0) for speed, end in zip(speeds, ends, strict=True)], angle


@pytest.mark.parametrize("jump", (0.0, 4.0))
@pytest.mark.parametrize("control", ("sample", "batch"))
@pytest.mark.parametrize("scheme, stages", (("bosh3", 4), ("dopri5", 7), ("tsit5", 7)))
def test_steps_end_where_the_field_is_not_smooth(scheme, stages, control, jump):
    pieces, angle = kinked(jump)
    torch.manual_seed(0)
    y = torch.randn(3, 2, 2, dtype=torch.float64) * torch.tensor([0.01, 1.0, 30.0]).double().view(-1, 1, 1)
    for tolerance in (1e-4, 1e-6):
        config = Adaptive(scheme, tolerance, tolerance, 100000, control)
        result = solve_adaptive(None, y, 2.0, config, pieces=pieces, keep_states=True)
        assert result.status is Status.CONVERGED and result.reached == (2.0,) * 3
        exact = y @ torch.matrix_exp(ROTATION * angle)
        scale = 1 + y.abs().amax((1, 2), keepdim=True)
        assert ((result.state - exact) / scale).abs().max() < 10 * tolerance
        starts = 3 if jump else 1
        assert result.field_calls == starts + (stages - 1) * ((result.field_calls - starts) // (stages - 1))
        trials = torch.as_tensor(result.accepted) + torch.as_tensor(result.rejected)
        assert torch.equal(torch.as_tensor(result.evaluations), starts + (stages - 1) * trials)
        for end, state in zip((0.7, 1.1), result.piece_states[:-1], strict=True):
            assert any(
                t is not None and torch.equal(state, kept) for t, kept in zip(result.times, result.states, strict=True)
            ), end
    assert len(result.piece_states) == 3 and torch.equal(result.piece_states[-1], result.state)


def test_the_end_of_a_piece_does_not_shorten_the_steps_of_the_next():
    """A short piece costs one short step and no slow recovery after it (of three steps, were it to begin there)."""
    ends = [end + short for end in range(1, 8) for short in (0.0, 1e-4)] + [8.0]
    torch.manual_seed(0)
    y = torch.randn(1, 3, 2, dtype=torch.float64)
    config = Adaptive("dopri5", 1e-6, 1e-6, first_step=0.3)
    plain = solve_adaptive(rotation, y, 8.0, config)
    cut = solve_adaptive(None, y, 8.0, config, pieces=[Piece(rotation, end, True) for end in ends])
    assert cut.accepted <= plain.accepted + 2 * len(ends)


@pytest.mark.parametrize("jump", (0.0, 4.0))
def test_pieces_share_one_limit_of_evaluations(jump):
    pieces, _ = kinked(jump)
    y = torch.ones(2, 1, 2, dtype=torch.float64) * torch.tensor([0.01, 1.0]).double().view(-1, 1, 1)
    whole = solve_adaptive(None, y, 2.0, Adaptive("bosh3", 1e-5, 1e-5), pieces=pieces).evaluations
    assert whole[0] < whole[1]
    for limit in range(4, int(whole[1]), 7):
        result = solve_adaptive(None, y, 2.0, Adaptive("bosh3", 1e-5, 1e-5, limit), pieces=pieces)
        assert result.status is Status.BUDGET_SPENT and result.reached[1] < 2.0
        assert torch.as_tensor(result.evaluations).max() <= limit
        assert (result.reached[0] == 2.0) == (limit >= whole[0]), "one sample's end is not its neighbour's"


def test_recomputation_evaluates_the_piece_that_was_evaluated():
    pieces, _ = kinked(0.0)
    y = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    config = Adaptive("bosh3", 1e-5, 1e-5)
    gradients = [
        torch.autograd.grad(
            solve_adaptive(None, y, 2.0, config, pieces=pieces, recompute=recompute).state.sum(), y
        )[0]
        for recompute in (False, True)
    ]  # fmt: skip
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "arguments, sentence",
    (
        ({"scheme": "rk4"}, "no embedded error estimate"),
        ({"scheme": "heun2"}, "no embedded error estimate"),
        ({"rtol": 0.0}, "rtol: a tolerance must be a positive number"),
        ({"atol": float("nan")}, "atol: a tolerance must be a positive number"),
        ({"max_evaluations": 6}, "at least 7"),
        ({"step_control": "token"}, "step_control: 'token'"),
        ({"first_step": 0.0}, "first step must be a positive time"),
    ),
)
def test_impossible_configurations(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Adaptive(**arguments)


def test_tolerance_below_the_floor_of_the_state():
    y = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="tolerance: 1e-07 is below the floor of a float32 state.*raise it"):
        solve_adaptive(rotation, y, 1.0, Adaptive("dopri5", 1e-7, 1e-7))
    solve_adaptive(rotation, y.double(), 1.0, Adaptive("dopri5", 1e-7, 1e-7))
