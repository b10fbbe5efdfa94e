"""What holds for every mixer, by its name alone: under solvers, as an equilibrium, recomputed, with padding."""

import math

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fairseq_implicit.depth.equilibrium import EquilibriumConfig, EquilibriumDepth
from fairseq_implicit.families.deq_bert import DeqBertOptions
from fairseq_implicit.families.neural_ode_bert import NeuralOdeBertOptions
from fairseq_implicit.families.ode_bert import OdeBertOptions
from fairseq_implicit.fields.equilibrium_cell import CellConfig
from fairseq_implicit.fields.injection import InjectionConfig
from fairseq_implicit.fields.mixers import MIXERS
from fairseq_implicit.fields.transformer import TransformerField
from fairseq_implicit.layout import Layout
from fairseq_implicit.networks.encoder import Encoder
from fairseq_implicit.networks.initialisation import initialise
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.unrolled import Unrolled
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Span

FAMILIES = {"ode_bert": OdeBertOptions, "neural_ode_bert": NeuralOdeBertOptions, "deq_bert": DeqBertOptions}
SHAPE = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=4)
NOISE = dict(dropout=0.2, attention_dropout=0.2, activation_dropout=0.1)
SYMBOLS, PADDING, TIME = 40, 1, 12
LENGTHS = (12, 9, 5)


def options(mixer, family="ode_bert", **settings):
    return FAMILIES[family](mixer=mixer, max_positions=TIME, **SHAPE, **settings)


def network(mixer, family="ode_bert", **settings):
    torch.manual_seed(0)
    config = options(mixer, family, encoder_init_std=0.2, **settings)
    made = Encoder(config.network(SYMBOLS, PADDING), config.build_depth())
    initialise(made, config.initialisation())
    return made.double()


def layer(mixer, kind="pre-norm", **settings):
    return options(mixer, **settings).transformer_field(kind)


def states(seed=1):
    return torch.randn(3, TIME, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def real():
    return torch.arange(TIME) < torch.tensor(LENGTHS)[:, None]


def tokens():
    ids = torch.randint(4, SYMBOLS, (3, TIME), generator=torch.Generator().manual_seed(3))
    return torch.where(real(), ids, PADDING)


@pytest.mark.parametrize("mixer", MIXERS)
def test_rk4_has_order_four(mixer):
    torch.manual_seed(0)
    x, layout = states(), Layout(real())
    f = TransformerField(layer(mixer)).double().eval().prepare(layout.keep(x), layout)
    with torch.no_grad():
        ends = [
            RungeKutta("rk4", steps).solve(f, layout.keep(x), Span(0.0, 2.0), layout).state for steps in (16, 32, 64)
        ]
    slope = math.log2((ends[0] - ends[1]).norm() / (ends[1] - ends[2]).norm())
    assert slope == pytest.approx(4.0, abs=0.15)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_implicit_gradient_is_that_of_a_long_unroll(mixer):
    """With dropout, weight norm, padding, and into the mixer's projections where it takes an injection."""
    shape = layer(mixer, "post-norm", **NOISE)
    injection = InjectionConfig(qkv=shape.mixer.added_width(shape.dim) > 0)
    sharp = FixedPointConfig("anderson", 150, 1e-13)
    cell = CellConfig(shape, weight_norm=True, injection=injection, initial_std=0.1)
    torch.manual_seed(0)
    depth = EquilibriumDepth(EquilibriumConfig(cell, sharp, gradient=Implicit(adjoint=sharp))).double().train()
    x, layout = Layout(real()).keep(states()), Layout(real())

    def gradient(kind):
        depth.config = EquilibriumConfig(cell, sharp, gradient=kind)
        depth.zero_grad()
        torch.manual_seed(11)
        (depth(x, layout).state * states(9)).sum().backward()
        return {name: parameter.grad for name, parameter in depth.named_parameters()}

    implicit, unrolled = gradient(Implicit(adjoint=sharp)), gradient(Unrolled(150))
    for name, expected in unrolled.items():
        assert expected.norm() > 0, name
        assert (implicit[name] - expected).norm() < 1e-8 * expected.norm(), name


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kind, scheme", [("pre-norm", "rk4"), ("post-norm", "euler"), ("macaron", "rk2")])
@pytest.mark.parametrize("policy", ["shared", "independent"])
def test_recomputation_gives_the_same_bits(mixer, kind, scheme, policy):
    def gradient(mode):
        model = network(mixer, ode_field=kind, ode_scheme=scheme, ode_gradient=mode, stage_dropout=policy, **NOISE)
        torch.manual_seed(5)
        model.train()(tokens(), features_only=True).values.square().sum().backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    expected = gradient("autograd")
    assert any(".attention." in name for name in expected)
    for mode in ("checkpoint-step", "checkpoint-stage"):
        found = gradient(mode)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), mode


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batch_mates_change_no_bit(mixer, family):
    model = network(mixer, family).eval()
    ids, kept = tokens(), real()
    with torch.no_grad():
        found = model(ids, features_only=True).values
        # A batch mate says something else, and padding holds other embeddings.
        other = ids.clone()
        other[0] = functional.pad(other[0, 1:], (0, 1), value=7)
        embedded = model.embed_tokens(other)
        embedded = torch.where(kept.unsqueeze(-1), embedded, 1e3)
        again = model(other, features_only=True, token_embeddings=embedded).values
        assert torch.equal(again[1:][kept[1:]], found[1:][kept[1:]])
        assert not torch.equal(again[0], found[0])
        for row, length in enumerate(LENGTHS):
            alone = model(ids[row : row + 1, :length], features_only=True).values
            torch.testing.assert_close(
                alone[0], found[row, :length], rtol=0, atol=1e-6 if family == "deq_bert" else 1e-11
            )


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_token_sees_others_and_causal_ones_only_where_the_layout_says_so(mixer):
    torch.manual_seed(0)
    field = TransformerField(layer(mixer)).double().eval()
    x = states()
    changed = x.clone()
    changed[:, 7] = states(2)[:, 7]
    with torch.no_grad():
        for causal in (False, True):
            layout = Layout(causal=causal)
            moved = (field.prepare(x, layout)(0.0, x) - field.prepare(changed, layout)(0.0, changed)).abs().amax((0, 2))
            assert (moved[8:] > 1e-6).all()
            assert moved[:7].eq(0).all() if causal else (moved[:7] > 1e-6).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_operations_are_those_that_torch_counts(mixer):
    # torch does not count the kernel that attends without dropout on CPUs.
    module = layer(mixer, attention_dropout=0.1).mixer.build(16, "shared").train()
    x = states().float()
    mix = module.prepare(x)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        mix(x)
    # What is computed once for a batch, whatever its size, is no token's: the maps of a table of 2 TIME - 1 distances.
    of_the_batch = {"disentangled": 2 * (2 * TIME - 1) * 16 * 3 * 16}.get(mixer, 0)
    assert counted.get_total_flops() == pytest.approx(3 * TIME * module.operations(TIME) + of_the_batch, rel=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_start_does_not_explode(mixer):
    """Of a state of variance 1 the mixer makes something that is at most of that size."""
    for family, settings in (("ode_bert", {}), ("deq_bert", {}), ("ode_bert", {"encoder_init": "plain"})):
        torch.manual_seed(0)
        config = FAMILIES[family](
            mixer=mixer,
            max_positions=TIME,
            encoder_layers=2,
            encoder_embed_dim=256,
            encoder_attention_heads=4,
            **settings,
        )
        made = Encoder(config.network(SYMBOLS, PADDING), config.build_depth())
        initialise(made, config.initialisation())
        x = torch.randn(2, TIME, 256)
        for each in made.depth.layers():
            assert each.attention.prepare(x)(x).std() < 1.0


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_identity_start_is_the_identity(mixer):
    model = network(mixer, ode_field="pre-norm", encoder_init="identity").eval()
    x = states()
    with torch.no_grad():
        for each in model.depth.layers():
            assert each.prepare(x)(0.0, x).eq(0).all()
