"""Disentangled attention: against loops, under shifts, with padding, noise, and a table that layers share."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fairseq_implicit.fields.mixers.disentangled import (
    DisentangledAttention,
    DisentangledConfig,
    RelativeTable,
    buckets_of,
    table_rows,
)
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError

BATCH, TIME, DIM, HEADS = 2, 9, 12, 3
SMALL = dict(heads=HEADS, buckets=4, distance=7)


def mixer(dim=DIM, policy="shared", **options) -> DisentangledAttention:
    torch.manual_seed(0)
    made = DisentangledConfig(**{**SMALL, **options}).build(dim, policy).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def states(batch=BATCH, time=TIME):
    return torch.randn(batch, time, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def bucket(relative: int, buckets: int, distance: int) -> int:
    """The formula, in Python's own numbers."""
    middle, size = buckets // 2, abs(relative)
    if size <= middle:
        return relative
    logarithm = math.log(size / middle) / math.log((distance - 1) / middle)
    return int(math.copysign(math.ceil(logarithm * (middle - 1)) + middle, relative))


@pytest.mark.parametrize("buckets, distance", [(32, 128), (64, 512), (128, 512), (256, 512)])
def test_buckets_are_those_of_the_formula(buckets, distance):
    relative = torch.arange(-distance + 1, distance)
    found = buckets_of(relative, buckets, distance)
    assert found.tolist() == [bucket(each, buckets, distance) for each in relative.tolist()]
    assert found[-1] == buckets - 1 and torch.equal(found, -found.flip(0))
    rows = torch.tensor(table_rows(buckets, distance))
    assert len(rows) == 2 * distance + 1 and (rows.diff() >= 0).all()
    assert (
        rows[0] == 0 and rows[1] == 1 and rows[-1] == rows[-2] == 2 * buckets - 1
    )  # only far behind there is one more
    assert rows[distance] == buckets


def test_without_buckets_each_place_is_its_own():
    assert table_rows(0, 3) == (0, 1, 2, 3, 4, 5, 5)


def loop(made, x, layout, places):
    """Scores and values token by token, as the formula has them."""
    config, width = made.relative, DIM // HEADS
    table = made.table(torch.arange(2 * config.span))
    q, k, v = made.qkv(x).chunk(3, -1)
    if config.own_maps:
        queries = made.position_queries(table) if "p2c" in config.terms else None
        keys = made.position_keys(table) if "c2p" in config.terms else None
    else:
        queries, keys, _ = made.qkv(table).chunk(3, -1)
    terms = config.terms.split(",")
    mixed = torch.zeros_like(x)
    for b in range(len(x)):
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            for i in range(x.shape[1]):
                scores = []
                for j in range(x.shape[1]):
                    if layout.real is not None and not layout.real[b, j] or layout.causal and j > i:
                        scores.append(torch.tensor(-math.inf, dtype=torch.float64))
                        continue
                    relative = int(places[b][i] - places[b][j])
                    span = config.span
                    row = bucket(relative, config.buckets, config.distance) if config.buckets else relative
                    row = min(max(row + span, 0), 2 * span - 1)
                    score = q[b, i, part] @ k[b, j, part]
                    if "c2p" in terms:
                        score = score + q[b, i, part] @ keys[row, part]
                    if "p2c" in terms:
                        score = score + k[b, j, part] @ queries[row, part]
                    scores.append(score / math.sqrt(width * (1 + len(terms))))
                mixed[b, i, part] = torch.stack(scores).softmax(0) @ v[b, :, part]
    return made.out(mixed)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"own_maps": True}, {"terms": "c2p"}, {"terms": "p2c,c2p", "plain_table": True},
     {"terms": "p2c", "own_maps": True}, {"buckets": 0, "distance": 3}],
    ids=str,
)  # fmt: skip
def test_scores_are_those_of_a_loop(options, causal):
    made, x = mixer(**options), states()
    real = torch.ones(BATCH, TIME, dtype=torch.bool)
    real[1, 6:] = False
    everywhere = torch.arange(TIME).expand(BATCH, TIME)
    for layout, places in (
        (Layout(causal=causal), everywhere),
        (Layout(real, causal=causal), everywhere),
        (Layout(real, everywhere * 2 - torch.tensor([[0], [5]]), causal=causal), everywhere * 2),
    ):
        found = made.prepare(x, layout)(x)
        expected = loop(made, x, layout, places)
        torch.testing.assert_close(layout.keep(found), layout.keep(expected), rtol=0, atol=1e-12)


def test_what_is_injected_joins_the_projections():
    made, x = mixer(), states()
    added = torch.randn(BATCH, TIME, 3 * DIM, dtype=torch.float64)
    moved = mixer()
    moved.qkv.forward = lambda z: (
        torch.nn.functional.linear(z, made.qkv.weight, made.qkv.bias) + (added if z.shape == x.shape else 0.0)
    )
    torch.testing.assert_close(made.prepare(x)(x, added), moved.prepare(x)(x), rtol=0, atol=1e-12)


def test_a_shift_of_all_positions_changes_nothing():
    made, x = mixer(), states()
    places = torch.arange(TIME).expand(BATCH, TIME)
    expected = made.prepare(x, Layout(positions=places))(x)
    assert torch.equal(made.prepare(x, Layout(positions=places + 1000))(x), expected)
    torch.testing.assert_close(made.prepare(x)(x), expected, rtol=0, atol=1e-13)
    # Padding in front moves the tokens and changes nothing between them; a gap is none of theirs.
    real = torch.tensor([True, False, True, True, False])
    apart = torch.zeros(1, 5, DIM, dtype=torch.float64)
    apart[0, real] = x[0, :3]
    found = made.prepare(apart, Layout(real[None]))(apart)[0, real]
    torch.testing.assert_close(found, made.prepare(x[:1, :3])(x[:1, :3])[0], rtol=0, atol=1e-13)


def test_far_tokens_are_equally_far():
    made, x = mixer(buckets=0, distance=2), states(1, 6)

    def read_by_the_first(order):
        return made.prepare(x)(x[:, order])[0, 0]

    there = read_by_the_first([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(read_by_the_first([0, 1, 4, 3, 5, 2]), there, rtol=0, atol=1e-12)
    assert not torch.allclose(read_by_the_first([0, 2, 1, 3, 4, 5]), there, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_but_padding_is_finite(dtype):
    made, x = mixer(dropout=0.5).to(dtype), states().to(dtype).requires_grad_()
    layout = Layout(torch.tensor([[True] * TIME, [False] * TIME]))
    for training in (False, True):
        found = made.train(training).prepare(x, layout)(x)
        assert found.isfinite().all()
        found.float().square().mean().backward()
        assert x.grad.isfinite().all() and all(each.grad.isfinite().all() for each in made.parameters())


def test_noise_is_one_mask_per_solve():
    made, x = mixer(dropout=0.4, hidden_dropout=0.3).train(), states()
    mix = made.prepare(x)
    once = mix(x)
    assert torch.equal(mix(x), once) and not torch.equal(made.prepare(x)(x), once)
    for rates in (dict(dropout=0.4), dict(hidden_dropout=0.4)):
        anew = mixer(policy="independent", **rates).train().prepare(x)
        assert not torch.equal(anew(x), anew(x))
    assert DisentangledConfig(HEADS, 0.1, 0.3).noise == 0.3
    quiet = made.eval().prepare(x)(x)
    torch.manual_seed(3)
    mean = sum(made.train().prepare(x)(x) for _ in range(400)) / 400
    # Dropped probabilities keep the mean of the values, those of the table nearly so: scores are no linear map of it.
    assert (mean - quiet).norm() < 0.25 * quiet.norm()


def test_layers_have_one_table():
    first, second = mixer(), mixer()
    second.share(first)
    assert second.table is first.table and isinstance(first.table, RelativeTable)
    config = TransformerFieldConfig(DIM, 8, DisentangledConfig(**SMALL))
    one, other = TransformerField(config), TransformerField(config)
    separate = sum(parameter.numel() for field in (one, other) for parameter in field.parameters())
    other.share(one)
    together = torch.nn.ModuleList([one, other])
    assert separate - sum(parameter.numel() for parameter in together.parameters()) == 2 * 4 * DIM + 2 * DIM
    x = states().float()
    other.prepare(one.prepare(x)(0.0, x))(0.0, x).square().mean().backward()
    assert one.attention.table.embedding.weight.grad.any()


def test_only_the_rows_that_a_length_needs_are_mapped():
    made = mixer(buckets=64, distance=512)
    mapped = []
    made.qkv.register_forward_hook(lambda module, given, found: mapped.append(given[0].shape[-2]))
    x = states()
    made.prepare(x)(x)
    assert mapped == [TIME, 2 * TIME - 1]
    made.prepare(x, Layout(positions=torch.arange(TIME).expand(BATCH, TIME)))(x)
    assert mapped[2:] == [TIME, 128]  # positions that are given may be any


@pytest.mark.parametrize("options, maps", [({}, 3), ({"own_maps": True}, 2), ({"terms": "c2p"}, 3)], ids=str)
def test_operations_are_those_that_torch_counts(options, maps):
    made, x = mixer(dropout=0.1, **options).train(), states()
    mix = made.prepare(x)
    with FlopCounterMode(display=False) as count:
        mix(x)
    rows = len({row for row in table_rows(4, 7)})
    table = 2 * rows * DIM * DIM * maps  # once per batch, whatever its size
    assert count.get_total_flops() == BATCH * TIME * made.operations(TIME) + table


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(terms="c2p|p2c"), "terms: 'c2p|p2c' is unknown: choose c2p, p2c or c2p,p2c"),
        (dict(terms=""), "terms: '' is unknown"),
        (dict(terms="c2p,c2p"), "terms: 'c2p,c2p' is unknown"),
        (dict(buckets=1), "buckets: 1 of them: give at least 2, or 0"),
        (dict(buckets=-2), "buckets: -2 of them"),
        (dict(distance=0), "distance: 0 tokens"),
        (dict(buckets=16, distance=9), "buckets: half of 16 are for near places.*set that to 10 or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(OptionError, match=sentence.replace("|", r"\|")):
        DisentangledConfig(**{**SMALL, **options})
    assert DisentangledConfig(HEADS, buckets=16, distance=10).span == 16


def test_the_least_distance_is_enough():
    assert table_rows(16, 10)[-2:] == (31, 31)
    made, x = mixer(buckets=16, distance=10), states(1, 15)
    assert made.prepare(x, UNPADDED)(x).isfinite().all()
