"""Combination coefficients: where each mode starts, what it keeps by construction, what is refused."""

import math

import pytest
import torch

from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.coefficients import (
    MODES,
    SMALLEST_START,
    Combination,
    check_coefficients,
    combine,
)
from fairseq_implicit.solvers.tableau import TABLEAUS, get_tableau
from tests.solvers.solving import Explicit, solve_explicit

DIM = 5
POSITIVE = [name for name, tableau in TABLEAUS.items() if tableau.stages > 1 and min(tableau.b) >= 0]


def combination(scheme, mode, **options):
    torch.manual_seed(0)
    return Combination(get_tableau(scheme), mode, dim=DIM, **options).double()


def increments(scheme, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(2, 3, DIM, dtype=torch.float64) for _ in range(get_tableau(scheme).stages)]


@pytest.mark.parametrize("scheme", TABLEAUS)
@pytest.mark.parametrize("options", [{}, {"channels": DIM}], ids=["scalar", "channel"])
def test_learned_weights_start_at_the_tableau(scheme, options):
    state, stages = torch.zeros(2, 3, DIM, dtype=torch.float64), increments(scheme)
    learned, _ = combination(scheme, "learned", **options)(state, stages, 0.5)
    fixed, _ = combination(scheme, "fixed")(state, stages, 0.5)
    # The parameter is created in float32.
    torch.testing.assert_close(learned, fixed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", POSITIVE)
@pytest.mark.parametrize("mode", ["softmax", "gated"])
def test_shares_start_at_the_tableau_or_just_above_zero(scheme, mode):
    weights = [weight.item() for weight in combination(scheme, mode).at_rest()]
    b = get_tableau(scheme).b_values
    zeros = sum(weight == 0 for weight in b)
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    for weight, expected in zip(weights, b, strict=True):
        if expected == 0:
            assert weight == pytest.approx(SMALLEST_START / (1 + zeros * SMALLEST_START), rel=1e-4)
        else:
            assert weight == pytest.approx(expected / (1 + zeros * SMALLEST_START), rel=1e-4)


@pytest.mark.parametrize("scheme", POSITIVE)
@pytest.mark.parametrize("mode", ["softmax", "gated", "ema-normalised"])
def test_shares_sum_to_one_whatever_is_learned(scheme, mode):
    """Consistency by construction: a constant field F = 1 moves the state by exactly the total time."""
    block = combination(scheme, mode)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = torch.zeros(2, 3, DIM, dtype=torch.float64)
    result = solve_explicit(lambda t, z: torch.ones_like(z), x, Explicit(scheme, 3, 1.5), block)
    torch.testing.assert_close(result.state, torch.full_like(x, 1.5), rtol=0, atol=1e-13)


def test_two_learned_ones_are_two_tied_euler_steps():
    torch.manual_seed(2)
    matrix, x = torch.randn(DIM, DIM, dtype=torch.float64), torch.randn(1, 2, DIM, dtype=torch.float64)

    def f(t, z):
        return torch.tanh(z @ matrix)

    ours = solve_explicit(f, x, Explicit("rk2"), combination("heun2", "learned", start="ones")).state
    torch.testing.assert_close(ours, solve_explicit(f, x, Explicit("euler", 2, 2.0)).state, rtol=0, atol=1e-14)


def test_gate_of_two_stages_is_a_sigmoid_of_the_concatenated_increments():
    block, (first, second) = combination("heun2", "gated"), increments("heun2")
    state = torch.randn(2, 3, DIM, dtype=torch.float64)
    gate = torch.sigmoid(torch.cat([first, second], -1) @ block.weights.weight.T + block.weights.bias)
    assert gate.shape == (2, 3, 1)
    expected = state + 0.25 * (gate * first + (1 - gate) * second)
    torch.testing.assert_close(block(state, [first, second], 0.25)[0], expected, rtol=0, atol=1e-14)


def test_gate_of_more_stages_is_a_softmax():
    block, stages = combination("rk4", "gated"), increments("rk4")
    gate = (torch.cat(stages, -1) @ block.weights.weight.T + block.weights.bias).softmax(-1)
    expected = sum(gate[..., i : i + 1] * stage for i, stage in enumerate(stages))
    torch.testing.assert_close(block(torch.zeros_like(stages[0]), stages, 1.0)[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalised", [False, True])
def test_ema_weights(normalised):
    block = combination("rk4", "ema-normalised" if normalised else "ema")
    assert block.weights.alpha.item() == 0.5
    with torch.no_grad():
        block.weights.logit.fill_(math.log(0.3 / 0.7))
    total = 1 - 0.7**4
    expected = [0.3 * 0.7 ** (4 - i) / (total if normalised else 1) for i in (1, 2, 3, 4)]
    assert [float(weight) for weight in block.at_rest()] == pytest.approx(expected, rel=1e-6)
    found = block.statistics(block.at_rest())
    assert float(found["alpha"]) == pytest.approx(0.3, rel=1e-6)
    assert float(found["coefficient_sum"]) == pytest.approx(1 if normalised else total, rel=1e-6)


def test_channel_weights_act_on_their_channel():
    block, stages = combination("heun2", "learned", channels=DIM), increments("heun2")
    with torch.no_grad():
        block.weights.values.zero_()
        block.weights.values[1, 3] = 2.0
    moved, _ = block(torch.zeros_like(stages[0]), stages, 1.0)
    assert torch.equal(moved[..., 3], 2 * stages[1][..., 3])
    assert moved[..., [0, 1, 2, 4]].abs().max() == 0


def test_stage_norms_are_those_of_pcformer():
    block, stages = combination("heun2", "learned", stage_norms=True), increments("heun2")
    state = 7 * torch.randn(2, 3, DIM, dtype=torch.float64)
    with torch.no_grad():
        for parameter in block.norms.parameters():
            parameter.normal_()
    norms = block.norms
    expected = norms.state(state) + 0.5 * sum(
        0.5 * norm(stage) for norm, stage in zip(norms.increments, stages, strict=True)
    )
    torch.testing.assert_close(block(state, stages, 0.5)[0], expected, rtol=0, atol=1e-12)


def test_stage_norms_of_half_precision_parameters_take_a_float32_state():
    block = Combination(get_tableau("heun2"), dim=DIM, stage_norms=True).bfloat16()
    stages = [stage.bfloat16() for stage in increments("heun2")]
    assert block(torch.randn(2, 3, DIM), stages, 1.0)[0].dtype == torch.float32


@pytest.mark.parametrize("scheme", ["heun2", "rk4"])
def test_gate_statistics_see_real_tokens_only(scheme):
    block, stages = combination(scheme, "gated"), increments(scheme)
    real = torch.ones(2, 3, dtype=torch.bool)
    real[1, 1:] = False
    weights = block(torch.zeros_like(stages[0]), stages, 1.0)[1]
    found = block.statistics(weights, Layout(real))
    kept = torch.cat(weights, -1)[real]
    assert kept.shape == (4, len(stages))
    nodes = torch.tensor(get_tableau(scheme).c_values, dtype=torch.float64)
    expected = {
        "coefficient_sum": 1.0,
        "coefficient_moment": (kept @ nodes).mean().item(),
        "gate_mean": kept[:, 0].mean().item(),
        "gate_entropy": torch.distributions.Categorical(kept).entropy().mean().item(),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, abs=1e-12)
    assert not any(value.requires_grad for value in found.values())


def test_a_saturated_gate_has_entropy_zero():
    weights = (torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    assert float(Combination(get_tableau("heun2"), "gated", dim=DIM).statistics(weights)["gate_entropy"]) == 0


def test_fixed_coefficients_report_the_order_conditions():
    found = combination("rk4", "fixed").statistics(get_tableau("rk4").b_values)
    assert found == {"coefficient_sum": pytest.approx(1.0), "coefficient_moment": pytest.approx(0.5)}


def test_penalties_and_their_gradients():
    block = combination("heun2", "learned", start="ones")
    weights = block.at_rest()
    consistency, second = block.consistency_penalty(weights), block.second_order_penalty(weights)
    assert (float(consistency), float(second)) == (1.0, 0.25)  # Σw = 2, Σwc = 1
    assert torch.autograd.grad(consistency, block.weights.values, retain_graph=True)[0].tolist() == [2.0, 2.0]
    assert torch.autograd.grad(second, block.weights.values)[0].tolist() == [0.0, 1.0]


def test_penalty_of_a_gate_is_a_mean_over_real_tokens():
    block, stages = combination("midpoint", "gated"), increments("midpoint")
    real = torch.tensor([[True, True, False], [True, False, False]])
    weights = block.weights(stages)
    expected = ((weights[1] / 2 - 0.5) ** 2).squeeze(-1)[real].mean()
    torch.testing.assert_close(block.second_order_penalty(weights, Layout(real)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_zero_increments_leave_the_state_bit_for_bit(mode):
    state = torch.randn(2, 3, DIM, dtype=torch.float64)
    stages = [torch.zeros_like(state)] * 4
    assert torch.equal(combination("rk4", mode)(state, stages, 0.7)[0], state)


def test_a_half_precision_state_stays_half_and_a_wide_state_stays_wide():
    stage = torch.ones(1, 1, DIM, dtype=torch.bfloat16)
    for weight in (0.3, torch.tensor(0.3), torch.full((1, 1, 1), 0.3)):
        assert combine(torch.zeros(1, 1, DIM, dtype=torch.bfloat16), [stage], [weight], 1.0).dtype == torch.bfloat16
        wide = combine(torch.zeros(1, 1, DIM), [stage], [weight], 1.0)
        torch.testing.assert_close(wide, torch.full((1, 1, DIM), 0.3), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "scheme, mode, start, scope, sentence",
    [
        ("rk4", "free", "tableau", "block", "coefficients: 'free' is unknown"),
        ("rk4", "learned", "zeros", "block", "start: 'zeros' is unknown"),
        ("rk4", "learned", "tableau", "layer", "scope: 'layer' is unknown"),
        ("rk4", "gated", "ones", "block", "start: ones belongs to `coefficients` learned"),
        ("rk4", "gated", "tableau", "channel", "'gated' has no weight per channel"),
        ("rk4", "fixed", "tableau", "channel", "'fixed' has no weight per channel"),
        ("rk4", "fixed", "tableau", "model", "'fixed' has nothing to share"),
        ("euler", "gated", "tableau", "block", "'euler' has one stage only"),
        ("euler", "softmax", "tableau", "block", "'euler' has one stage only"),
        ("euler", "ema-normalised", "tableau", "block", "'euler' has one stage only"),
        ("dopri5", "softmax", "tableau", "block", "'dopri5' has a negative one"),
        ("tsit5", "gated", "tableau", "model", "'tsit5' has a negative one"),
    ],
)
def test_what_has_no_meaning_is_refused(scheme, mode, start, scope, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_coefficients(get_tableau(scheme), mode, start, scope)


def test_a_gate_needs_the_width():
    with pytest.raises(ValueError, match="pass dim"):
        Combination(get_tableau("heun2"), "gated")
