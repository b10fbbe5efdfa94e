"""The lambda layer against its definition, token by token, and what it costs."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fairseq_implicit.fields.mixers.lambda_layer import (
    BatchNorm,
    LambdaConfig,
    _content,
    _running_content,
    content_lambdas,
)
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.gradients.trajectory import CheckpointStep
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Span

DIM, HEADS, KEY, INTRA, TIME = 12, 3, 4, 2, 9
REACHES = {"local": dict(context=5), "one token": dict(context=1), "global": dict(context=0, max_length=TIME + 2)}
#: Padding behind, before, and in the middle; and nothing else.
REAL = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7, [1, 0] * 4 + [1], [0] * 9]).bool()


def build(dim=DIM, double=True, **options):
    torch.manual_seed(0)
    sizes = dict(heads=HEADS, key_depth=KEY, intra_depth=INTRA)
    made = LambdaConfig(**{**sizes, **options}).build(dim, "shared")
    return made.double() if double else made


def states(time=TIME, dim=DIM):
    return torch.randn(len(REAL), time, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(mixer, z, real, causal):
    """The output ``(time, dim)`` for one sequence, one lambda after the other."""
    time, value = len(z), DIM // HEADS
    q, k, v = mixer.qkv(z).split(mixer.widths, -1)
    q = mixer.query_norm(q).view(time, HEADS, KEY)
    k = k.view(time, INTRA, KEY)
    v = mixer.value_norm(v).view(time, INTRA, value)
    reach = mixer.positions.shape[2] // 2
    out = []
    for n in range(time):
        seen = [m for m in range(time) if real[m] and not (causal and m > n)]
        lambdas = torch.zeros(KEY, value, dtype=z.dtype)
        for u in range(INTRA if seen else 0):
            for key in range(KEY):
                shares = k[seen, u, key].softmax(0)
                for m, share in zip(seen, shares, strict=True):
                    lambdas[key] += share * v[m, u]
                    if abs(m - n) <= reach:
                        lambdas[key] += mixer.positions[key, u, m - n + reach] * v[m, u]
        out.append(torch.cat([q[n, h] @ lambdas for h in range(HEADS)]))
    return mixer.out(torch.stack(out))


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@torch.no_grad()
def test_it_is_the_sums_of_its_definition(reach, causal, norm):
    mixer, x, layout = build(norm=norm, **REACHES[reach]), states(), Layout(REAL, causal=causal)
    found = mixer.prepare(x, layout)(x)
    for row, real in enumerate(REAL):
        torch.testing.assert_close(found[row][real], by_hand(mixer, x[row], real, causal)[real], rtol=0, atol=1e-13)
    assert found.isfinite().all()
    whole = mixer.prepare(x, Layout(causal=causal))(x)
    everyone = torch.ones(TIME, dtype=torch.bool)
    torch.testing.assert_close(whole[1], by_hand(mixer, x[1], everyone, causal), rtol=0, atol=1e-13)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("causal", [False, True])
def test_what_padding_holds_changes_no_bit_and_not_even_nan_does(reach, causal):
    mixer, x, layout = build(double=False, **REACHES[reach]), states().float(), Layout(REAL, causal=causal)
    filled = [torch.where(REAL.unsqueeze(-1), x, filling) for filling in (0.0, -1e4, float("nan"))]
    found = [layout.keep(mixer.prepare(each, layout)(each)) for each in filled]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # Batch mates neither; and one sequence more or less padding.
    mates = x.clone()
    mates[[0, 2]] = x[[2, 0]] * 3.0
    again = layout.keep(mixer.prepare(mates, layout)(mates))
    assert torch.equal(again[[1, 3, 4]], found[0][[1, 3, 4]])
    alone = mixer.prepare(x[1:2, :6], Layout(causal=causal))(x[1:2, :6])
    torch.testing.assert_close(alone[0], found[0][1, :6], rtol=0, atol=1e-6)


def test_gradients_reach_everything_and_nothing_comes_from_padding():
    mixer, layout = build(), Layout(REAL)
    x = torch.where(REAL.unsqueeze(-1), states(), 1e4).requires_grad_()
    layout.keep(mixer.prepare(x, layout)(x)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in mixer.parameters())
    assert x.grad[~REAL].eq(0).all() and x.grad[0].ne(0).any(-1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_finite_differences(causal):
    mixer, x = build(), states(4)[:2].requires_grad_()
    mix = mixer.prepare(x, Layout(REAL[:2, 4:8], causal=causal))
    assert torch.autograd.gradcheck(mix, (x,), fast_mode=True)


class Size(TorchDispatchMode):
    """How many numbers all operations together write."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.total += result.numel()
        return result


def cost(mixer, time, causal=False):
    """Operations of matrix products by torch's count, and numbers written."""
    x, layout = torch.randn(2, time, DIM), Layout(causal=causal)
    mix = mixer.prepare(x, layout)
    with FlopCounterMode(display=False) as operations, torch.no_grad():
        mix(x)
    with Size() as size, torch.no_grad():
        mix(x)
    return operations.get_total_flops(), size.total


@pytest.mark.parametrize("causal", [False, True])
def test_the_local_form_is_linear_in_the_length(causal):
    mixer = build(double=False, context=7)
    (few, small), (many, large), (most, largest) = (cost(mixer, time, causal) for time in (64, 128, 256))
    # Weights and lambdas of whole sequences are there once.
    assert most - many == 2 * (many - few)
    # Running sums join a pair less at each of their levels.
    assert largest - large == pytest.approx(2 * (large - small), rel=0.01 if causal else 0)
    assert many < 2.2 * few and large < 2.1 * small
    assert mixer.operations(64) == mixer.operations(256)
    full = build(double=False, context=0, max_length=256)
    assert cost(full, 256)[0] > 3 * cost(full, 128)[0]


@pytest.mark.parametrize("options", [dict(context=7), dict(context=0, max_length=40)], ids=["local", "global"])
def test_operations_are_those_that_torch_counts(options):
    mixer = build(double=False, **options)
    assert cost(mixer, 32)[0] == 2 * 32 * mixer.operations(32)


@pytest.mark.parametrize("intra, context", [(1, 1), (4, 25), (16, 101), (4, 0)])
def test_queries_find_values_of_the_size_of_those_that_were_written(intra, context):
    """Whatever the depth and the reach, and however many weights the table of positions has."""
    mixer = build(dim=256, double=False, heads=8, key_depth=16, intra_depth=intra, context=context)
    with torch.no_grad():
        mixer.out.weight.copy_(torch.eye(256))
        mixer.out.bias.zero_()
        nn.init.normal_(mixer.qkv.weight, std=0.02)
        x = torch.randn(2, 200, 256)
        assert 0.3 < mixer.prepare(x)(x).std() < 2.0


def test_content_lambdas_are_those_of_each_evaluation():
    mixer, x, layout = build(), states(), Layout(REAL)
    with torch.no_grad():
        mix, found = mixer.prepare(x, layout), []
        with content_lambdas(found):
            observed = mixer.prepare(x, layout)
        mix(x)
        assert torch.equal(observed(x), mix(x)) and observed(2 * x) is not None
        assert [tuple(each.shape) for each in found] == 2 * [(len(REAL), KEY, DIM // HEADS)]
        # One more query, all ones, in a layer without positions: it reads the sum of the lambda's rows.
        mixer.positions.zero_()
        mixer.query_norm.weight.zero_()
        mixer.query_norm.bias.fill_(1.0)
        mixer.out.weight.copy_(torch.eye(DIM))
        mixer.out.bias.zero_()
        read = mixer.prepare(x, layout)(x)
        torch.testing.assert_close(read[:, 0], found[0].sum(1).repeat(1, HEADS), rtol=0, atol=1e-13)
        with content_lambdas(None):
            mixer.prepare(x, layout)(x)
    assert len(found) == 2


@pytest.mark.parametrize("scale", [1.0, 5000.0])
def test_running_lambdas_are_those_of_each_prefix_whatever_the_size_of_the_keys(scale):
    """Exponentials of such keys overflow, and beside the largest of the whole sequence those of early tokens vanish."""
    generator = torch.Generator().manual_seed(0)
    k = (torch.randn(5, TIME, INTRA, KEY, dtype=torch.float64, generator=generator) * scale).requires_grad_()
    v = torch.randn(5, TIME, INTRA, 3, dtype=torch.float64, generator=generator) * REAL[..., None, None]
    running = _running_content(k, v, Layout(REAL, causal=True))
    for end in range(1, TIME + 1):
        prefix = _content(k[:, :end], v[:, :end], Layout(REAL[:, :end]))
        torch.testing.assert_close(running[:, end - 1], prefix, rtol=1e-12, atol=1e-12)
        own, other = (
            torch.autograd.grad(each.sum(), k, retain_graph=True)[0] for each in (running[:, end - 1], prefix)
        )
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
        assert not own[:, end:].any()


def test_batch_norm_in_half_precision_sums_in_float32():
    x = 4 * torch.randn(4, 4096, 3, generator=torch.Generator().manual_seed(0))
    wide, narrow = BatchNorm(3).train(), BatchNorm(3).half().train()
    torch.testing.assert_close(
        narrow.prepare(UNPADDED)(x.half()).float(), wide.prepare(UNPADDED)(x), rtol=5e-3, atol=5e-3
    )
    torch.testing.assert_close(narrow.running_var.float(), wide.running_var, rtol=5e-3, atol=5e-3)


def test_batch_norm_is_torchs_over_the_real_tokens():
    ours, torchs = BatchNorm(6).double(), nn.BatchNorm1d(6).double()
    with torch.no_grad():
        for norm in (ours, torchs):
            norm.weight.copy_(torch.linspace(0.5, 2, 6))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
    x, layout = states(dim=6), Layout(REAL)
    filled = torch.where(REAL.unsqueeze(-1), x, 1e3)
    for _ in range(3):
        norm = ours.prepare(layout)
        found = norm(filled)
        torch.testing.assert_close(found[REAL], torchs(x[REAL]), rtol=0, atol=1e-12)
        assert torch.equal(norm(filled), found)  # again, as recomputation does: the running statistics hear nothing
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.eval().prepare(layout)(x)[REAL], torchs.eval()(x[REAL]), rtol=0, atol=1e-12)
    assert torch.equal(ours.prepare(UNPADDED)(x), ours.prepare(layout)(x))


def test_recomputed_batch_norms_count_a_batch_once():
    field = TransformerField(TransformerFieldConfig(DIM, 16, LambdaConfig(HEADS, norm="batch"))).double()
    x = states().requires_grad_()
    solver = RungeKutta(gradient=CheckpointStep())
    solver.solve(field.prepare(x), x, Span()).state.sum().backward()
    assert field.attention.query_norm.num_batches_tracked == field.attention.value_norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(context=4), "context: 4 tokens have no middle one: give an odd number, or 0"),
        (dict(context=-1), "context: -1 tokens"),
        (dict(key_depth=0), "key_depth: it must be at least 1"),
        (dict(intra_depth=0), "intra_depth: it must be at least 1"),
        (dict(context=0, max_length=0), "max_length: it must be at least 1"),
        (dict(max_length=100), "max_length: with a `context` of 25 tokens there is no limit: leave it out"),
        (dict(norm="group"), "norm: 'group' is unknown: choose one of layer, batch, none"),
    ],
)
def test_impossible_options_are_refused(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        LambdaConfig(HEADS, **options)


def test_more_tokens_than_distances_are_refused_before_anything_is_computed():
    mixer = build(context=0, max_length=TIME - 1)
    with pytest.raises(OptionError, match="--lambda-max-length: an input of 9 tokens is longer than the 8 whose"):
        mixer.prepare(states())
    with pytest.raises(ValueError, match="lambda queries must divide the width: 5 queries, width 12"):
        build(heads=5)
