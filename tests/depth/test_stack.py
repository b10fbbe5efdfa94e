"""The stack of blocks on analytic fields and on the real transformer field."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fairseq_implicit.depth.stack import BlockStack
from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.coefficients import MODES, check_coefficients
from fairseq_implicit.solvers.multistep import AdamsPair
from fairseq_implicit.solvers.names import FIXED_GRADIENTS
from fairseq_implicit.solvers.solver import Span
from fairseq_implicit.solvers.tableau import TABLEAUS, get_tableau
from tests.depth.configs import stack_config
from tests.solvers.solving import Explicit, solve_explicit

DIM = 16


def is_meaningful(scheme, mode):
    try:
        check_coefficients(get_tableau(scheme), mode, "tableau", "block")
    except ValueError:
        return False
    return True


SCHEMES_AND_MODES = [(scheme, mode) for scheme in TABLEAUS for mode in MODES if is_meaningful(scheme, mode)]
# One stack of each kind that runs through other code than the rest.
VARIANTS = {
    "euler": {},
    "rk4": {"scheme": "rk4"},
    "sub-steps": {"scheme": "kutta3", "steps": 2, "total_time": 0.75},
    "gated": {"scheme": "rk4", "coefficients": "gated"},
    "gated model": {"scheme": "rk2", "coefficients": "gated", "scope": "model"},
    "ema channel": {"scheme": "rk2", "coefficients": "ema", "scope": "channel"},
    "softmax": {"scheme": "kutta3", "coefficients": "softmax", "steps": 2},
    "stage norm": {"scheme": "rk2", "coefficients": "learned", "stage_norm": True},
    "residual": {"scheme": "rk2", "residual_in_field": True},
    "backward-euler": {"scheme": "rk2", "coefficients": "gated", "corrector": "backward-euler"},
    "adams": {"scheme": "rk2", "corrector": "adams"},
    "pcformer": {"scheme": "rk2", "coefficients": "ema", "corrector": "pcformer"},
    "dlcl": {"scheme": "rk2", "coefficients": "gated", "history": "dlcl"},
    "tied": {"scheme": "rk2", "tied": True},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


class Oscillator(Field):
    """x' = a (1 + sin 2t) J x with a learned rate a."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.times = []

    def prepare(self, x, layout=UNPADDED):
        def f(t, z):
            self.times.append(t)
            return self.rate * (1 + math.sin(2 * t)) * torch.stack([-z[..., 1], z[..., 0]], dim=-1)

        return Increment(f)


def transformer(kind="pre-norm", **noise):
    return TransformerField(TransformerFieldConfig(DIM, 2 * DIM, **{"mixer": AttentionConfig(2), **noise}, kind=kind))


def stack(layers=3, kind="pre-norm", noise=None, **options):
    torch.manual_seed(0)
    return BlockStack(stack_config(layers, DIM, **options), lambda layer: transformer(kind, **(noise or {})))


def embedding(batch=2, time=5, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, time, DIM, dtype=torch.float64).to(dtype)


def silence(module):
    """Zero output projections: every increment is zero."""
    for field in module.fields:
        for projection in field.residual_projections():
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
    return module


# --- what a stack is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["euler", "rk2", "rk4"])
def test_tied_blocks_are_one_solve_through_time(scheme):
    x = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64)
    tied = BlockStack(stack_config(4, 2, scheme=scheme, tied=True), lambda layer: Oscillator())
    one_solve = solve_explicit(Oscillator().prepare(x), x, Explicit(scheme, steps=4, total_time=4.0))
    out = tied(x)
    torch.testing.assert_close(out.state, one_solve.state, rtol=0, atol=1e-14)
    assert out.statistics["evaluations"] == one_solve.evaluations
    assert len(list(tied.parameters())) == 1


def test_block_l_integrates_from_l_to_l_plus_total_time():
    fields = [Oscillator() for _ in range(3)]
    module = BlockStack(stack_config(3, 2, scheme="rk4", steps=2, total_time=0.5), fields.__getitem__)
    module(torch.ones(1, 1, 2, dtype=torch.float64))
    nodes = [0.0, 0.125, 0.125, 0.25, 0.25, 0.375, 0.375, 0.5]
    assert [field.times for field in fields] == [[block + node for node in nodes] for block in range(3)]


def test_the_adams_pair_passes_the_increment_from_block_to_block():
    x = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64)
    module = BlockStack(stack_config(4, 2, scheme="rk2", corrector="adams", tied=True), lambda layer: Oscillator())
    state, increment = x, None
    for block in range(4):
        result = AdamsPair().solve(Oscillator().prepare(x), state, Span(float(block), 1.0), carried=increment)
        state, increment = result.state, result.carried
    assert torch.equal(module(x).state, state)


def test_pre_norm_euler_is_the_residual_encoder_bit_for_bit():
    module, x = stack(), embedding(dtype=torch.float32)
    module.float()
    expected = x
    for field in module.fields:
        expected = expected + field.prepare(expected)(0.0, expected)
    assert torch.equal(module(x).state, expected)


@pytest.mark.parametrize("gradient", FIXED_GRADIENTS)
def test_post_norm_euler_is_the_published_layer_bit_for_bit(gradient):
    module, x = stack(kind="post-norm", gradient=gradient).float(), embedding(dtype=torch.float32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = x
    for field in module.fields:
        attend, feed = field.attention.prepare(expected, Layout(~mask)), field.feed_forward.prepare(expected)
        inner = field.attention_norm(expected + attend(expected))
        expected = field.feed_forward_norm(inner + feed(inner))
    assert torch.equal(module(x, Layout(~mask)).state[~mask], expected[~mask])


def test_dlcl_mixes_the_normalised_outputs_of_all_layers():
    module, x = stack(history="dlcl").double(), embedding()
    outputs, state = [], None
    with torch.no_grad():
        module.history.mixture.copy_(torch.randn(4, 4).tril())
        outputs.append(module.history.norms[0](x))
        for row in range(1, 5):
            state = sum(module.history.mixture[row - 1, k] * output for k, output in enumerate(outputs))
            if row < 4:
                increment = module.fields[row - 1].prepare(state)(0.0, state)
                outputs.append(module.history.norms[row](state + increment))
    torch.testing.assert_close(module(x).state, state, rtol=0, atol=1e-12)


def test_pcformer_predicts_then_corrects_on_mixtures_of_the_history():
    module, x = stack(layers=2, scheme="rk2", corrector="pcformer").double(), embedding()
    predictor, corrector = module.predictor_history, module.history
    with torch.no_grad():
        for history in (predictor, corrector):
            history.mixture.copy_(torch.randn(3, 3).tril())
        past, state = [x], corrector.mixture[0, 0] * x
        for block, field in enumerate(module.fields):
            f = field.prepare(state)
            guess = predictor.norms[block + 1](solve_explicit(f, state, Explicit("rk2")).state)
            mixed = sum(predictor.mixture[block + 1, k] * value for k, value in enumerate(past + [guess]))
            past.append(corrector.norms[block + 1](mixed + f(0.0, mixed)))
            state = sum(corrector.mixture[block + 1, k] * value for k, value in enumerate(past))
    out = module(x)
    torch.testing.assert_close(out.state, state, rtol=0, atol=1e-12)
    assert out.statistics["evaluations"] == 6


def test_histories_start_as_plain_means():
    mixture = stack(history="dlcl").history.mixture
    assert torch.equal(mixture, torch.tensor([[1, 0, 0, 0], [1 / 2] * 2 + [0] * 2, [1 / 3] * 3 + [0], [1 / 4] * 4]))


def test_final_norm_and_hidden_states():
    module, x = stack(scheme="rk2", final_norm=True).double(), embedding()
    out = module(x, return_hidden_states=True)
    assert len(out.hidden_states) == 4 and torch.equal(out.hidden_states[0], x)
    assert torch.equal(module.final_norm(out.hidden_states[-1]), out.state)
    assert module(x).hidden_states is None


# --- facts that hold for every variant ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, corrector",
    [
        ("pre-norm", "none"),
        ("parallel", "none"),
        ("macaron", "none"),
        ("pre-norm", "backward-euler"),
        ("pre-norm", "adams"),
    ],
)
def test_zero_output_projections_make_every_block_the_identity(kind, corrector):
    """Not so by definition: a post-norm layer and stage norms normalise the state, layer histories mix it, and
    residual-in-field adds the state itself."""
    x = embedding(dtype=torch.float32)
    fields = silence(stack(1, kind)).fields
    for scheme, mode in SCHEMES_AND_MODES:
        if corrector != "adams" or (scheme, mode) == ("heun2", "fixed"):
            config = stack_config(1, DIM, scheme=scheme, coefficients=mode, corrector=corrector)
            assert torch.equal(BlockStack(config, fields.__getitem__)(x).state, x), (scheme, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_float32", [False, True])
def test_state_stays_bounded_through_48_blocks_in_half_precision(dtype, state_float32):
    layers = 48
    fields = [field.to(dtype) for field in stack(layers).fields]
    x = embedding(1, 4, dtype)
    mask = torch.tensor([[False, False, False, True]])
    for index, (scheme, mode) in enumerate(SCHEMES_AND_MODES):
        if state_float32 and index % 5:
            continue
        config = stack_config(layers, DIM, scheme=scheme, coefficients=mode, state_float32=state_float32)
        with torch.no_grad():
            out = BlockStack(config, fields.__getitem__).to(dtype)(x, Layout(~mask))
        assert out.state.dtype == dtype and out.state.isfinite().all(), (scheme, mode)
        # Pre-norm increments have an rms of about 1/3, so 48 of them reach at most 16.
        assert 0 < out.statistics["state_rms"] < 20, (scheme, mode)


@pytest.mark.parametrize("name", ["residual", "stage norm", "backward-euler", "adams", "pcformer", "dlcl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_variants_in_half_precision(dtype, name):
    """Residual-in-field multiplies the state by 2.5 in each block: twelve blocks leave the range of float16."""
    module = stack(layers=12, **VARIANTS[name]).to(dtype)
    out = module(embedding(1, 4, dtype))
    if name != "residual":
        assert out.state.isfinite().all() and out.statistics["state_rms"] < 20
    elif dtype == torch.float16:
        assert not out.state.isfinite().all()
    else:
        assert out.statistics["state_rms"] > 2.5**12


def test_a_float32_state_keeps_what_bfloat16_rounds_away():
    reference = stack(layers=48, scheme="rk4").bfloat16()
    x = embedding(dtype=torch.bfloat16)
    exact = copy.deepcopy(reference).double()(x.double()).state
    rounded = reference(x).state
    kept_config = stack_config(48, DIM, scheme="rk4", state_float32=True)
    kept = BlockStack(kept_config, reference.fields.__getitem__)(x).state
    assert kept.dtype == torch.bfloat16
    assert (kept - exact).norm() < 0.6 * (rounded - exact).norm()


@pytest.mark.parametrize(
    "name, policy",
    [(name, "shared") for name in VARIANTS]
    + [(name, "independent") for name in ("euler", "gated", "sub-steps", "adams", "pcformer")],
)
def test_gradient_modes_agree_with_dropout_on(name, policy):
    noise = dict(
        dropout=0.2, mixer=AttentionConfig(2, 0.2), activation_dropout=0.2, drop_path=0.3, dropout_policy=policy
    )
    found = []
    for gradient in FIXED_GRADIENTS:
        module = stack(2, noise=noise, gradient=gradient, stage_dropout=policy, **VARIANTS[name]).double()
        x = embedding(batch=4).requires_grad_()
        mask = torch.zeros(4, 5, dtype=torch.bool)
        mask[1, 3:] = True
        torch.manual_seed(3)
        out = module(x, Layout(~mask))
        torch.rand(5)  # something else draws between forward and backward
        grads = torch.autograd.grad(out.state.square().mean(), [x, *module.parameters()], allow_unused=True)
        found.append([out.state, *grads])
    for plain, by_step, by_stage in zip(*found, strict=True):
        if plain is None:
            assert by_step is None and by_stage is None
        else:
            assert (plain - by_step).abs().max() <= 1e-10 * max(1.0, plain.abs().max().item())
            assert (plain - by_stage).abs().max() <= 1e-10 * max(1.0, plain.abs().max().item())


@variants
def test_every_parameter_is_used(options):
    """DistributedDataParallel stops at a parameter that gets no gradient."""
    module = stack(**options).double()
    module(embedding()).state.square().sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


@variants
def test_padding_content_changes_no_bit(options):
    module, x = stack(**options).eval(), embedding(dtype=torch.float32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    other = torch.where(mask.unsqueeze(-1), 100 * torch.randn_like(x), x)
    first, second = module(x, Layout(~mask)), module(other, Layout(~mask))
    assert torch.equal(first.state[~mask], second.state[~mask])
    for name, value in first.statistics.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.statistics[name])), name


@variants
def test_a_sample_alone_equals_the_sample_in_a_batch(options):
    module, x = stack(**options).eval(), embedding(dtype=torch.float32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    together = module(x, Layout(~mask)).state[0, :3]
    torch.testing.assert_close(module(x[:1, :3]).state[0], together, rtol=1e-6, atol=1e-6)


@variants
def test_nothing_is_read_back_from_the_device(options):
    """A meta tensor has no data: whatever asks for a value fails."""
    module = stack(**options).to("meta")
    out = module(torch.empty(2, 5, DIM, device="meta"), Layout(torch.empty(2, 5, dtype=torch.bool, device="meta")))
    assert out.state.shape == (2, 5, DIM)


@variants
def test_copies_pickles_and_checkpoints_give_the_same_output(options):
    module, x = stack(**options).double(), embedding()
    state = module(x).state
    assert torch.equal(copy.deepcopy(module)(x).state, state)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x).state, state)
    torch.manual_seed(9)
    other = BlockStack(module.config, lambda layer: transformer()).double()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x).state, state)


def test_fixed_coefficients_add_nothing_to_a_checkpoint():
    """So one checkpoint can be evaluated with another scheme or number of steps."""
    euler = stack(final_norm=True)
    rk4 = stack(scheme="rk4", steps=2, final_norm=True)
    assert set(euler.state_dict()) == set(rk4.state_dict())
    assert {name.split(".")[0] for name in euler.state_dict()} == {"fields", "final_norm"}


@pytest.mark.parametrize("scheme", TABLEAUS)
def test_richardson_slope_on_a_random_encoder_block(scheme):
    torch.manual_seed(0)
    x = embedding()
    f = transformer().double().prepare(x)
    with torch.no_grad():
        ends = [solve_explicit(f, x, Explicit(scheme, steps, 2.0)).state for steps in (16, 32, 64)]
    slope = math.log2((ends[0] - ends[1]).norm() / (ends[1] - ends[2]).norm())
    # The slopes of the fifth-order pairs fall to 5 from above, and further steps would end in rounding.
    order = get_tableau(scheme).order
    assert -0.15 < slope - order < (0.4 if order == 5 else 0.15)


# --- statistics, penalties, layer drop ---------------------------------------------------------------------------

NAMES = {
    "euler": {"evaluations", "state_rms", "coefficient_sum", "coefficient_moment"},
    "gated": {"evaluations", "state_rms", "coefficient_sum", "coefficient_moment", "gate_mean", "gate_entropy"},
    "ema channel": {"evaluations", "state_rms", "coefficient_sum", "coefficient_moment", "alpha"},
    "adams": {"evaluations", "state_rms"},
}


@pytest.mark.parametrize("name", NAMES)
def test_statistics_per_block_and_aggregated(name):
    found = stack(**VARIANTS[name]).double()(embedding()).statistics
    totals = NAMES[name]
    blocks = {f"block{block}/{total}" for block in range(3) for total in totals - {"evaluations"}}
    assert set(found) == totals | blocks
    for total in totals - {"evaluations", "state_rms"}:
        mean = sum(float(found[f"block{block}/{total}"]) for block in range(3)) / 3
        assert float(found[total]) == pytest.approx(mean)
    assert found["state_rms"] is found["block2/state_rms"]
    for value in found.values():
        assert not isinstance(value, torch.Tensor) or (value.dim() == 0 and not value.requires_grad)


def test_state_rms_is_that_of_the_real_tokens():
    module, x = stack(scheme="rk2").double(), embedding()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 2:] = True
    out = module(x, Layout(~mask))
    assert float(out.statistics["state_rms"]) == pytest.approx(out.state[~mask].square().mean().sqrt().item(), rel=1e-6)


def test_state_rms_of_a_large_half_precision_state_does_not_overflow():
    module = silence(stack()).half()
    rms = module(torch.full((1, 2, DIM), 3e4, dtype=torch.float16)).statistics["state_rms"]
    assert float(rms) == pytest.approx(3e4, rel=1e-3)


def test_gate_starts_near_the_tableau_in_every_block():
    found = stack(scheme="rk4", coefficients="gated").double()(embedding()).statistics
    for block in range(3):
        assert float(found[f"block{block}/gate_mean"]) == pytest.approx(1 / 6, abs=0.08)
        assert float(found[f"block{block}/gate_entropy"]) < math.log(4)


@pytest.mark.parametrize("gradient", FIXED_GRADIENTS)
def test_penalties_are_weighted_means_over_blocks_with_gradient(gradient):
    module = stack(
        scheme="rk2",
        coefficients="learned",
        start="ones",
        consistency_penalty=0.5,
        second_order_penalty=2.0,
        gradient=gradient,
        steps=2,
    ).double()
    with torch.no_grad():
        module.combinations[0].weights.values.fill_(0.5)
    penalties = module(embedding()).penalties
    # Block 0 has Σw = 1 and Σwc = 1/2; the two others Σw = 2 and Σwc = 1.
    assert penalties["consistency"].item() == pytest.approx(0.5 * 2 / 3)
    assert penalties["second_order"].item() == pytest.approx(2.0 * 0.25 * 2 / 3)
    penalties["consistency"].backward()
    assert [block.weights.values.grad.tolist() for block in module.combinations] == [
        [0, 0],
        [pytest.approx(1 / 3)] * 2,
        [pytest.approx(1 / 3)] * 2,
    ]


@pytest.mark.parametrize("gradient", FIXED_GRADIENTS)
def test_penalty_of_a_gate_reaches_the_field_through_recomputation(gradient):
    found = []
    for way in ("autograd", gradient):
        module = stack(scheme="rk2", coefficients="gated", second_order_penalty=1.0, gradient=way).double()
        module(embedding()).penalties["second_order"].backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert any(grad is not None and grad.abs().max() > 0 for grad in found[0])
    for plain, other in zip(*found, strict=True):
        assert (plain is None and other is None) or torch.equal(plain, other)


@pytest.mark.parametrize("name", ["euler", "gated", "ema channel", "adams", "pcformer", "dlcl", "tied"])
def test_layer_drop_skips_whole_blocks_and_keeps_all_statistics(name):
    module = stack(layers=4, layerdrop=0.5, **VARIANTS[name]).double()
    x = embedding()
    assert torch.equal(module.eval()(x).state, module(x).state)
    full = module(x).statistics
    per_block = full["evaluations"] // 4
    module.train()
    counts = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found = module(x).statistics
        torch.manual_seed(seed)
        kept = int((torch.rand(4) >= 0.5).sum())
        assert found["evaluations"] == kept * per_block
        assert list(found) == list(full)
        counts.add(kept)
    assert len(counts) > 2


def test_a_stack_whose_blocks_are_all_skipped_is_the_identity():
    module, x = stack(layers=2, scheme="rk4", coefficients="gated", layerdrop=0.999).double(), embedding()
    torch.manual_seed(0)
    out = module(x)
    assert torch.equal(out.state, x) and out.statistics["evaluations"] == 0
    assert float(out.statistics["gate_mean"]) == pytest.approx(1 / 6)


@pytest.mark.parametrize("name", ["gated", "dlcl"])
def test_a_stack_compiles_into_one_graph(name):
    module, x = stack(layers=2, **VARIANTS[name]).eval(), embedding(dtype=torch.float32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    compiled = torch.compile(module, backend="eager", fullgraph=True)(x, Layout(~mask))
    torch.testing.assert_close(compiled.state, module(x, Layout(~mask)).state)
    assert set(compiled.statistics) == set(module(x, Layout(~mask)).statistics)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"layers": 0}, "a stack of 0 blocks"),
        ({"scheme": "rk9"}, "unknown scheme 'rk9'"),
        ({"steps": 0}, "0 steps per solve"),
        ({"total_time": -1.0}, "a total time of -1.0"),
        ({"gradient": "adjoint"}, "gradient: adjoint is for adaptive solves"),
        ({"coefficients": "free"}, "coefficients: 'free' is unknown"),
        ({"history": "dense"}, "history: 'dense' is unknown"),
        ({"stage_dropout": "none"}, "stage_dropout: 'none' is unknown"),
        ({"layerdrop": 1.0}, "layerdrop: 1.0"),
        ({"consistency_penalty": -1.0, "coefficients": "learned"}, "consistency_penalty: the weight -1.0"),
        ({"consistency_penalty": 1.0}, "consistency_penalty: it needs learned"),
        (
            {"second_order_penalty": 1.0, "coefficients": "learned"},
            "second_order_penalty: 'euler' has one stage; take two stages or more",
        ),
        ({"corrector": "adams"}, "set `scheme` heun2 and `steps` 1, not euler and 1"),
        ({"corrector": "adams", "scheme": "rk2", "steps": 2}, "not rk2 and 2"),
        ({"corrector": "adams", "scheme": "rk2", "coefficients": "gated"}, "coefficients of its own"),
        ({"corrector": "adams", "scheme": "rk2", "history": "dlcl"}, "carries a history of its own"),
        ({"corrector": "pcformer", "history": "dlcl"}, "carries a history of its own"),
    ],
)
def test_a_configuration_without_meaning_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        stack_config(**{"layers": 2, "dim": DIM, **options})
