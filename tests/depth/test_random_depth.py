"""A number of steps per sequence: its distribution, each sequence as if alone, the gradient of the last steps."""

import math
import pickle
from collections import Counter

import pytest
import torch

from fairseq_implicit.depth.random_steps import RandomDepth
from fairseq_implicit.depth.stack import BlockStack, StackConfig
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.semilinear import SemiLinearField
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.adaptive import Adaptive
from fairseq_implicit.solvers.exponential import Exponential
from fairseq_implicit.solvers.multistep import AdamsPair
from fairseq_implicit.solvers.names import trajectory_gradient
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Span
from fairseq_implicit.solvers.theta import Theta

DIM = 8
DRAWN = [3, 1, 7, 2]


def loop(solver=None, kind="pre-norm", linear=True, noise=None, **options):
    torch.manual_seed(0)
    config = TransformerFieldConfig(DIM, 16, **{"mixer": AttentionConfig(2), **(noise or {})}, kind=kind)

    def field(block):
        inner = TransformerField(config)
        return SemiLinearField(inner, DIM, NormConfig()) if linear else inner

    options = {"random_depth": 4.0, "random_depth_gradient": 2, "final_norm": True, **options}
    module = BlockStack(StackConfig(1, DIM, solver or Exponential("etd2", 4), 0.5, **options), field).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def draws(module, monkeypatch, depths=DRAWN):
    monkeypatch.setattr(module.random_depth, "draw", lambda sequences: depths)
    return module


def batch():
    generator = torch.Generator().manual_seed(5)
    real = torch.arange(6) < torch.tensor([6, 4, 6, 2])[:, None]
    return torch.randn(4, 6, DIM, generator=generator, dtype=torch.float64) * real.unsqueeze(-1), Layout(real)


@pytest.mark.parametrize("mean, maximum", [(4.0, 8), (0.5, 3), (20.0, 60)])
def test_the_numbers_are_poisson_numbers_cut_to_their_range(mean, maximum):
    drawn = RandomDepth(mean, maximum, seed=1)
    counts = Counter()
    for update in range(100):
        drawn.set_num_updates(update)
        counts.update(drawn.draw(100))
    weights = {n: math.exp(n * math.log(mean) - math.lgamma(n + 1)) for n in range(1, maximum + 1)}
    expected = {n: 10_000 * weight / sum(weights.values()) for n, weight in weights.items()}
    assert set(counts) <= set(expected)
    common = [n for n in expected if expected[n] >= 5]
    chi_square = sum((counts[n] - expected[n]) ** 2 / expected[n] for n in common)
    assert chi_square < len(common) + 4 * math.sqrt(2 * len(common))
    average = sum(n * count for n, count in counts.items()) / 10_000
    assert average == pytest.approx(sum(n * e for n, e in expected.items()) / 10_000, abs=4 * math.sqrt(mean / 10_000))


def test_they_depend_on_seed_and_update_alone():
    drawn, other = RandomDepth(4.0, 8, seed=1), RandomDepth(4.0, 8, seed=2)
    first = drawn.draw(32)
    torch.manual_seed(9)
    assert drawn.draw(32) == pickle.loads(pickle.dumps(drawn)).draw(32) == first
    assert drawn.draw(7) == first[:7], "a batch with fewer sequences draws the first of them"
    assert other.draw(32) != first
    drawn.set_num_updates(1)
    assert drawn.draw(32) != first


SOLVERS = {
    "etd1": Exponential("etd1", 4),
    "etd4": Exponential("etd4", 4),
    "rk4": RungeKutta("rk4", 4),
    "checkpoint-stage": Exponential("etd2", 4, trajectory_gradient("checkpoint-stage")),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_each_sequence_is_what_it_is_alone_at_its_depth(solver, monkeypatch):
    module, (x, layout) = draws(loop(solver), monkeypatch), batch()
    together = module(x, layout)
    for row, depth in enumerate(DRAWN):
        # To the last bit what it is where all have its depth; alone, matrix products may round otherwise.
        assert torch.equal(together.state[row], draws(module, monkeypatch, [depth] * 4)(x, layout).state[row]), row
        rows = torch.tensor([row])
        alone = draws(module, monkeypatch, [depth])(x[rows], layout.rows(rows))
        torch.testing.assert_close(together.state[row], alone.state[0], rtol=0, atol=1e-13)
        with module.eval().at(depth):
            dialled = module(x[rows], layout.rows(rows))
        torch.testing.assert_close(dialled.state[0], alone.state[0], rtol=0, atol=1e-13)
        module.train()
        assert alone.statistics["evaluations"] == dialled.statistics["evaluations"]
    assert together.statistics["evaluations"] * 4 / sum(DRAWN) * depth == alone.statistics["evaluations"]


def test_a_post_norm_loop_of_euler_steps_is_its_layers(monkeypatch):
    module = loop(RungeKutta("euler"), "post-norm", linear=False, random_depth_gradient=99).double()
    module.config = StackConfig(**{**vars(module.config), "total_time": 1.0})
    x, layout = batch()
    state = x
    layer = module.fields[0].prepare(x, layout).layer
    for _ in range(3):
        state = layer(0.0, state)
    found = draws(module, monkeypatch, [3] * 4)(x, layout).state
    assert torch.equal(found, module.final_norm(state))


def gradients(module, x, layout):
    x = x.clone().requires_grad_()
    module.zero_grad()
    weights = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    (module(x, layout).state * weights).sum().backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}}


def test_the_gradient_goes_through_the_last_steps_of_each(monkeypatch):
    module, (x, layout) = draws(loop(), monkeypatch), batch()
    found = gradients(module, x, layout)
    # By hand: each alone, its first steps detached, with the injection's graph of the embedding.
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    total, weights = 0.0, torch.linspace(-1, 1, DIM, dtype=torch.float64)
    step = Exponential("etd2")
    for row, depth in enumerate(DRAWN):
        rows = torch.tensor([row])
        mine, own = leaf[rows], layout.rows(rows)
        f = module.fields[0].prepare(mine, own)
        state = mine
        for index in range(depth):
            state = state.detach() if depth > 2 and index == depth - 2 else state
            state = step.solve(f.linear.rest, state, Span(0.0, 0.125), own, rate=f.linear.rate).state
        total = total + (module.final_norm(state) * weights).sum()
    total.backward()
    torch.testing.assert_close(found["x"], leaf.grad, rtol=0, atol=1e-13)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-12, msg=name)
    assert (found["x"].abs().sum((1, 2)) > 0).all()
    whole = gradients(draws(loop(random_depth_gradient=7), monkeypatch), x, layout)
    assert (whole["x"] - found["x"]).abs().max() > 1e-3, "the truncated gradient is another"


def test_one_noise_serves_the_whole_loop_and_recomputation_changes_no_bit(monkeypatch):
    x, layout = batch()
    noise = dict(dropout=0.2, mixer=AttentionConfig(2, dropout=0.1))
    found = []
    for gradient in ("autograd", "checkpoint-step", "checkpoint-stage"):
        module = loop(Exponential("etd4", 4, trajectory_gradient(gradient)), noise=noise)
        torch.manual_seed(3)
        found.append(gradients(module, x, layout))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def test_evaluation_takes_the_configured_steps(monkeypatch):
    module, (x, layout) = loop().eval(), batch()
    plain = BlockStack(StackConfig(1, DIM, Exponential("etd2", 4), 0.5, final_norm=True), lambda _: module.fields[0])
    plain.final_norm = module.final_norm
    assert torch.equal(module(x, layout).state, plain.eval()(x, layout).state)
    assert module.scheduled
    module.count_updates(17)
    assert module.random_depth.update == 17


def test_the_cost_counts_what_the_batch_really_evaluates(monkeypatch):
    module, (x, layout) = draws(loop(), monkeypatch), batch()
    output = module(x, layout)
    # Seven steps of two evaluations, two of the steps with a backward pass.
    assert output.operations == (2 * 5 + 3 * 2 * 2) * module.fields[0].operations(6)
    assert set(output.statistics) >= {"rate_mean", "rate_min", "rate_max", "state_rms", "evaluations"}


def test_the_dial_of_a_loop_is_more_steps_of_one_size():
    module, (x, layout) = loop(random_depth=None), batch()
    module.eval()
    f = module.fields[0].prepare(x, layout)
    for depth in (1, 3, 9):
        with module.at(depth):
            found = module(x, layout).state
        state = Exponential("etd2", depth).solve(f.linear.rest, x, Span(0.0, depth * 0.125), layout, rate=f.linear.rate)
        assert torch.equal(found, module.final_norm(state.state))
    assert module.config.solver.steps == 4
    finer = loop(random_depth=None, random_steps=(1, 4)).eval()
    assert finer.config_at(9).total_time == 0.5 and finer.config_at(9).solver.steps == 9


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: StackConfig(2, DIM, random_depth=4.0), "2 blocks with weights of their own are no loop"),
        (lambda: StackConfig(1, DIM, random_depth=0.0), "random_depth: a mean of 0.0 steps"),
        (lambda: StackConfig(1, DIM, random_depth=math.nan), "random_depth: a mean of nan steps"),
        (lambda: StackConfig(1, DIM, random_depth=9.0, random_depth_max=3), "random_depth_max: 3 steps leave nothing"),
        (lambda: StackConfig(1, DIM, random_depth=4.0, random_depth_gradient=0), "random_depth_gradient: 0 steps"),
        (lambda: StackConfig(1, DIM, random_depth=4.0, random_steps=(1, 2)), "draws steps of other sizes"),
        (lambda: StackConfig(1, DIM, random_depth=4.0, history="dlcl"), "no layers to combine or to skip"),
        (lambda: StackConfig(1, DIM, random_depth=4.0, layerdrop=0.1), "no layers to combine or to skip"),
        (lambda: StackConfig(1, DIM, Theta(), random_depth=4.0), "counts fixed explicit steps"),
        (lambda: StackConfig(1, DIM, Adaptive(), random_depth=4.0), "counts fixed explicit steps"),
        (lambda: StackConfig(1, DIM, AdamsPair(), random_depth=4.0), "counts fixed explicit steps"),
    ],
)
def test_what_is_no_loop_is_refused(make, sentence):
    with pytest.raises(OptionError, match=sentence):
        make()


def test_tied_blocks_with_coefficients_of_their_own_are_no_loop():
    learned = RungeKutta("rk2", coefficients="learned")
    with pytest.raises(OptionError, match="scope: a loop of one block has one set"):
        BlockStack(StackConfig(3, DIM, learned, tied=True, random_depth=4.0), lambda _: loop().fields[0])
    shared = RungeKutta("rk2", coefficients="learned", scope="model")
    BlockStack(StackConfig(3, DIM, shared, tied=True, random_depth=4.0), lambda _: loop().fields[0])
