"""Implicit blocks in ode_bert: identities with the explicit stack, padding, gradients, statistics, flags."""

import pytest
import torch

from fairseq_implicit.depth.stack import BlockStack, StackConfig
from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.models.ode_bert import OdeBertConfig
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.names import parse_gradient
from fairseq_implicit.solvers.theta import Theta

SHARP = FixedPointConfig("anderson", 100, 1e-12)
SHAPE = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=4)
EXACT = Implicit(adjoint=SHARP)


def stack(kind="pre-norm", layers=2, gradient=EXACT, noise=None, tied=False, **theta):
    torch.manual_seed(0)
    field = TransformerFieldConfig(16, 32, **{"mixer": AttentionConfig(4), **(noise or {})}, kind=kind)
    solver = Theta(solver=SHARP, gradient=gradient, **theta)
    config = StackConfig(layers, 16, solver, tied=tied, final_norm=kind != "post-norm")
    return BlockStack(config, lambda layer: TransformerField(field)).double()


def embedding(seed=5):
    return torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 2 + [True] * 5])
LAYOUT = Layout(~PADDING)


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm", "parallel"])
def test_theta_zero_is_the_ordinary_encoder_to_the_last_bit(kind):
    module, x = stack(kind, theta=0.0).eval(), embedding()
    state = x
    for field in module.fields:
        f = field.prepare(state)
        state = state + f(0.0, state) if f.layer is None else f.layer(0.0, state)
    state = state if module.final_norm is None else module.final_norm(state)
    out = module(x)
    assert torch.equal(out.state, state)
    assert float(out.statistics["evaluations"]) == 2


def test_backward_euler_with_one_block_is_an_equilibrium():
    module, x = stack(layers=1).eval(), embedding()
    with torch.no_grad():
        out = module(x, return_hidden_states=True)
        z = out.hidden_states[1]
        assert torch.allclose(z, x + module.fields[0].prepare(x)(1.0, z), atol=1e-10)
    assert float(out.statistics["converged_share"]) == 1.0 and float(out.statistics["residual"]) < 1e-12


@pytest.mark.parametrize("theta", [dict(theta=1.0), dict(theta=0.5), dict(scheme="implicit-midpoint")])
def test_padding_and_batch_mates_change_no_answer(theta):
    module = stack(**theta).eval()
    x = LAYOUT.keep(embedding())
    with torch.no_grad():
        together = module(x, LAYOUT).state
        for row in range(3):
            length = int((~PADDING[row]).sum())
            torch.testing.assert_close(
                together[row, :length], module(x[row : row + 1, :length]).state[0], atol=1e-10, rtol=0
            )


@pytest.mark.parametrize("tied", [False, True])
def test_exact_gradient_equals_unrolling_with_dropout_on(tied):
    noise = dict(dropout=0.2, mixer=AttentionConfig(4, 0.2))

    def grads(gradient):
        module = stack(noise=noise, gradient=gradient, tied=tied, theta=0.5).train()
        torch.manual_seed(4)
        (module(embedding(), LAYOUT).state * embedding(9)).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])

    implicit, unrolled = grads(EXACT), grads(parse_gradient("bptt-60"))
    assert (implicit - unrolled).norm() / unrolled.norm() < 1e-8


class Affine(Field):
    """``f(t, z) = rate z``; not a number away from the start where it is ``fragile``."""

    def __init__(self, rate, fragile=False):
        super().__init__()
        self.rate, self.fragile = torch.nn.Parameter(torch.tensor(rate, dtype=torch.float64)), fragile

    def prepare(self, x, layout=UNPADDED):
        start = x.detach()

        def f(t, z):
            same = (z == start).flatten(1).all(1)[:, None, None] if self.fragile else torch.tensor(True)
            return torch.where(same, self.rate * z, float("nan"))

        return Increment(f)


def affine_stack(budget, *fields):
    config = StackConfig(len(fields), 16, Theta(solver=FixedPointConfig("picard", budget, 1e-6)))
    return BlockStack(config, lambda layer: fields[layer])


@pytest.mark.parametrize("training", [True, False])
def test_non_finite_values_of_a_field_are_an_error_that_names_the_block(training):
    module = affine_stack(9, Affine(0.1), Affine(0.1, fragile=True)).train(training)
    with pytest.raises(ArithmeticError, match="the solve of block 1 failed .*finite numbers.* has diverged"):
        module(embedding())


def test_blocks_far_from_their_tolerance_are_warned_of_in_training_now_and_then(caplog):
    module = affine_stack(3, Affine(0.1), Affine(0.9)).train()
    for update in range(150):
        module.set_num_updates(update)
        module(embedding())
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == 2, "at updates 0 and 100"
    assert found[1].startswith("update 100: the mean residual 0.2") and "of implicit block 1" in found[1]
    assert "raise max_iter (now 3)" in found[1]
    caplog.clear()
    module.eval()(embedding())
    affine_stack(30, Affine(0.1)).train()(embedding())
    assert not caplog.records


def test_statistics_keep_their_names_and_follow_the_backward_pass():
    module = stack().train()
    first = module(embedding())
    (first.state * embedding(9)).sum().backward()
    second = module(embedding())
    names = set(first.statistics)
    assert names == set(second.statistics) == set(stack(theta=0.0)(embedding()).statistics)
    assert float(first.statistics["evaluations_backward"]) == 0 < float(second.statistics["evaluations_backward"])


def check(**settings):
    OdeBertConfig(**{**SHAPE, **settings}).check()


def test_explicit_and_implicit_checkpoints_open_each_other():
    def build(scheme, **settings):
        config = OdeBertConfig(**SHAPE, ode_scheme=scheme, **settings)
        config.check()
        return config.build_depth()

    explicit, implicit = build("rk4"), build("theta", ode_theta=0.5, ode_steps=2)
    implicit.load_state_dict({k: v for k, v in explicit.state_dict().items() if not k.startswith("combinations")})
    assert isinstance(implicit.config.solver, Theta) and implicit.config.solver.steps == 2


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(ode_scheme="theta", ode_theta=1.5), "--ode-theta: 1.5 is outside"),
        (dict(ode_scheme="theta", ode_theta_max_iter=0), "--ode-theta-max-iter"),
        (dict(ode_scheme="theta", ode_theta_solver="newton"), "--ode-theta-solver"),
        (dict(ode_scheme="theta", ode_theta_gradient="reversible"), "--ode-theta-gradient"),
        (dict(ode_scheme="theta", ode_theta_gradient="phantom"), "--ode-theta-gradient"),
        (dict(ode_scheme="theta", ode_coefficients="learned"), "--ode-coefficients learned belongs to explicit"),
        (dict(ode_scheme="theta", ode_gradient="checkpoint-step"), "--ode-gradient"),
        (dict(ode_scheme="theta", stage_dropout="independent"), "--stage-dropout independent"),
        (dict(ode_scheme="implicit-midpoint", ode_theta=0.5), "--ode-theta 0.5"),
        (dict(ode_scheme="rk4", ode_theta=0.5), "--ode-theta 0.5 belongs to the implicit schemes"),
    ],
)
def test_impossible_flags_are_named(settings, sentence):
    with pytest.raises(ValueError) as caught:
        check(**settings)
    assert sentence in str(caught.value)
