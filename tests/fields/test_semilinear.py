"""The linear part beside any field: what it adds, where it may be cut, and the cell of the same equation."""

import math

import pytest
import torch

from fairseq_implicit.fields.equilibrium_cell import CellConfig, EquilibriumCell
from fairseq_implicit.fields.injection import InjectionConfig
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.semilinear import SemiLinearField
from fairseq_implicit.fields.time_conditioned import DepthEmbeddedField, InterpolatedField
from fairseq_implicit.fields.transformer import KINDS, TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.exponential import SCHEMES, Exponential
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.reversible_iteration import ReversibleIteration
from fairseq_implicit.solvers.solver import Span

DIM = 8


def config(kind="pre-norm", **noise):
    return TransformerFieldConfig(DIM, 16, **{"mixer": AttentionConfig(2), **noise}, kind=kind)


FIELDS = {kind: lambda kind=kind: TransformerField(config(kind)) for kind in KINDS} | {
    "embedded": lambda: DepthEmbeddedField(config(), 3.0),
    "linear": lambda: InterpolatedField(config(), 3.0, 3, "linear"),
    "constant": lambda: InterpolatedField(config(), 3.0, 3, "constant"),
}
fields = pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)


def spread(module, scale=0.5, seed=0):
    """Weights away from their start, rates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def semilinear(make=FIELDS["pre-norm"], scale=0.5):
    return spread(SemiLinearField(make(), DIM, NormConfig()), scale).eval()


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    x = torch.randn(2, 5, DIM, generator=generator, dtype=torch.float64) * real.unsqueeze(-1)
    return x, Layout(real)


@fields
def test_the_right_hand_side_is_the_equation(make):
    field, (x, layout) = semilinear(make), inputs()
    z = layout.keep(x.flip(0) + 0.3)
    f, inner = field.prepare(x, layout), field.field.prepare(x, layout)
    rate, gain, u = field.linear_rate(), field.injection.gain, field.injection.norm(x)
    for t in (0.0, 0.4, 1.7):
        expected = layout.keep(-rate * (z - gain * u) + inner(t, z))
        torch.testing.assert_close(f(t, z), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(f.linear.rest(t, z) - rate * z, expected, rtol=0, atol=1e-13)
    assert (f(0.4, z)[1, 3:] == 0).all() and f.layer is None
    times = torch.tensor([0.4, 1.7], dtype=torch.float64)
    each = torch.stack([f(time.item(), z)[row] for row, time in enumerate(times)])
    torch.testing.assert_close(f(times, z), each, rtol=0, atol=1e-13)


@fields
def test_both_increments_are_cut_where_the_field_is(make):
    field, (x, layout) = semilinear(make), inputs()
    f, inner = field.prepare(x, layout), field.field.prepare(x, layout)
    for increment in (f, f.linear.rest):
        pieces = increment.pieces(3.0)
        assert [(one.end, one.continues) for one in pieces] == [(one.end, one.continues) for one in inner.pieces(3.0)]
        for one in pieces:
            torch.testing.assert_close(one.field(one.end - 0.3, x), increment(one.end - 0.3, x), rtol=0, atol=1e-13)
    doubled = f.within(lambda function: lambda t, z: 2 * function(t, z))
    torch.testing.assert_close(doubled.linear.rest(0.3, x), 2 * f.linear.rest(0.3, x))
    torch.testing.assert_close(doubled(0.3, x), 2 * f(0.3, x))
    assert doubled.linear.rate is f.linear.rate


def test_rates_and_gain_start_where_they_should():
    field = SemiLinearField(FIELDS["pre-norm"](), DIM, NormConfig())
    torch.testing.assert_close(torch.exp(-field.linear_rate()), torch.full((DIM,), math.sqrt(1 / 5)))
    assert field.injection.gain.item() == pytest.approx(1.0)
    assert field.half().linear_rate().dtype is torch.float32


def cell_of(field, kind):
    """The equilibrium cell with the weights of a semi-linear field."""
    cell = EquilibriumCell(CellConfig(config(kind), linear_part="diagonal")).double().eval()
    cell.layers[0].load_state_dict(field.field.state_dict())
    cell.linear.load_state_dict(field.linear.state_dict())
    cell.injection.load_state_dict(field.injection.state_dict())
    return cell


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm"])
def test_the_cell_is_one_exponential_euler_step(kind):
    field, (x, layout) = semilinear(FIELDS[kind]), inputs()
    f, z = field.prepare(x, layout), layout.keep(x.flip(0) + 0.3)
    step = Exponential("etd1").solve(f.linear.rest, z, Span(), layout, rate=f.linear.rate).state
    torch.testing.assert_close(cell_of(field, kind).prepare(x, layout)(z), step, rtol=0, atol=1e-13)


SHARP = FixedPointConfig("anderson", 200, 1e-13)


def equilibrium(cell, x, layout):
    f = cell.prepare(x, layout)
    return Implicit(adjoint=SHARP).equilibrium(f, torch.zeros_like(x), SHARP, layout).state


def long_unroll(cell, x, layout):
    f, state = cell.prepare(x, layout), torch.zeros_like(x)
    for _ in range(150):
        state = f(state)
    return state


def reversible(cell, x, layout):
    f = cell.prepare(x, layout)
    severed = f.severed()
    leaves, sources, budget = severed.depends_on, f.depends_on, FixedPointConfig(max_iter=20)
    gradient = ReversibleIteration(damping=0.5)
    return gradient.equilibrium(severed, torch.zeros_like(x), budget, layout, depends_on=leaves, sources=sources).state


def coupled_unroll(cell, x, layout):
    """The reversible iteration with its graph."""
    f, y = cell.prepare(x, layout), torch.zeros_like(x)
    z = y
    for _ in range(10):
        y = (y + f(z)) / 2
        z = (z + f(y)) / 2
    return z


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm"])
def test_the_equilibrium_is_where_every_scheme_ends(kind):
    field, (x, layout) = semilinear(FIELDS[kind], scale=0.1), inputs()
    with torch.no_grad():
        found = equilibrium(cell_of(field, kind), x, layout)
        f = field.prepare(x, layout)
        for scheme in SCHEMES:
            for h in (0.5, 1.0):
                solver = Exponential(scheme, round(120 / h))
                end = solver.solve(f.linear.rest, x, Span(0.0, 120.0), layout, rate=f.linear.rate).state
                torch.testing.assert_close(end, found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solved, unrolled", [(equilibrium, long_unroll), (reversible, coupled_unroll)])
def test_its_gradients_are_those_of_an_unroll(solved, unrolled):
    field, (x, layout) = semilinear(scale=0.1), inputs()
    weights = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    found = []
    for solve in (solved, unrolled):
        cell, start = cell_of(field, "pre-norm"), x.clone().requires_grad_()
        (solve(cell, start, layout) * weights).sum().backward()
        found.append({"x": start.grad, **{name: each.grad for name, each in cell.named_parameters()}})
    for name, expected in found[1].items():
        assert (found[0][name] - expected).abs().max() < 1e-8, name
    assert found[1]["linear.raw_rate"].abs().max() > 1e-3
    assert found[1]["injection.raw_gain"].abs() > 1e-3


def test_a_cell_of_two_layers_adds_their_increments():
    cell = spread(EquilibriumCell(CellConfig(config(), layers=2, linear_part="diagonal")), 0.3).eval()
    x, layout = inputs()
    z = layout.keep(x + 0.2)
    first, second = (layer.prepare(x, layout) for layer in cell.layers)
    half = first(0.0, z)
    rate, pull = cell.linear(), cell.injection(x)[0]
    weight = (1 - torch.exp(-rate)) / rate
    expected = torch.exp(-rate) * z + weight * (rate * pull + half + second(0.0, z + half))
    torch.testing.assert_close(cell.prepare(x, layout)(z), layout.keep(expected), rtol=0, atol=1e-13)


def test_rows_of_a_cell_are_those_of_the_whole():
    cell, (x, layout) = cell_of(semilinear(), "pre-norm"), inputs()
    index = torch.tensor([1])
    part = cell.prepare(x, layout).rows(index)(x[index] + 0.1)
    torch.testing.assert_close(part, cell.prepare(x, layout)(x + 0.1)[index], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(injection=InjectionConfig(qkv=True)), "qkv_injection: a linear part pulls the state to the input"),
        (dict(injection=InjectionConfig(residual=False)), "injection: a linear part"),
        (dict(linear_part="full"), "linear_part: 'full' is unknown: choose one of none, diagonal"),
    ],
)
def test_cells_that_have_no_meaning_are_refused(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        CellConfig(config(), **{"linear_part": "diagonal", **options})
