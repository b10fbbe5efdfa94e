"""Wide and narrow attention against former's formulas and against ordinary attention."""

import pytest
import torch

from fairseq_implicit.fields.mixers import MIXERS
from fairseq_implicit.layout import Layout

DIM = 12


def build(mixer, heads, dim=DIM, **options):
    torch.manual_seed(0)
    return MIXERS[mixer](heads=heads, **options).build(dim, "shared").double()


def states(dim=DIM):
    return torch.randn(2, 6, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LAYOUT = Layout(torch.tensor([[True] * 6, [True] * 4 + [False] * 2]))


def set_ordinary(mixer, qkv, out, bias=None):
    with torch.no_grad():
        mixer.qkv.weight.copy_(qkv)
        mixer.qkv.bias.zero_()
        mixer.out.weight.copy_(out)
        mixer.out.bias.zero_() if bias is None else mixer.out.bias.copy_(bias)


@pytest.mark.parametrize("mixer, expected", [("narrow-attention", 768), ("wide-attention", 524_416)])
def test_weights_are_those_of_the_reference(mixer, expected):
    assert sum(each.numel() for each in build(mixer, heads=8, dim=128).parameters()) == expected


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_with_one_head_they_are_ordinary_attention(dropout):
    ordinary, x = build("attention", 1, dropout=dropout), states()
    wide, narrow = (build(name, 1, dropout=dropout) for name in ("wide-attention", "narrow-attention"))
    maps = torch.cat([narrow.queries.weight, narrow.keys.weight, narrow.values.weight])
    for mixer, qkv, out, bias in (
        (wide, wide.qkv.weight, wide.out.weight, wide.out.bias),
        (narrow, maps, torch.eye(DIM), None),
    ):
        set_ordinary(ordinary, qkv, out, bias)
        found = []
        for each in (mixer, ordinary):
            torch.manual_seed(3)
            found.append(each.prepare(x, LAYOUT)(x))
        torch.testing.assert_close(*found, rtol=0, atol=1e-13)


def by_hand(q, k, v, real):
    """One head's values: scores of queries and keys that were each divided by the fourth root of their width."""
    root = q.shape[-1] ** 0.25
    scores = (q / root) @ (k / root).T
    return scores.masked_fill(~real, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("heads", [2, 3])
def test_several_heads_are_the_formulas(heads):
    wide, narrow, x = build("wide-attention", heads), build("narrow-attention", heads), states()
    got_wide, got_narrow = (each.prepare(x, LAYOUT)(x) for each in (wide, narrow))
    maps = wide.qkv.weight.view(3, heads, DIM, DIM)
    for row, real in enumerate(LAYOUT.real):
        z = x[row]
        found = [by_hand(*(z @ maps[part, head].T for part in range(3)), real) for head in range(heads)]
        torch.testing.assert_close(got_wide[row], wide.out(torch.cat(found, -1)), rtol=0, atol=1e-13)
        found = [
            by_hand(narrow.queries(part), narrow.keys(part), narrow.values(part), real) for part in z.chunk(heads, -1)
        ]
        torch.testing.assert_close(got_narrow[row], torch.cat(found, -1), rtol=0, atol=1e-13)


def test_narrow_attention_commutes_with_permutations_of_its_slices():
    narrow, x = build("narrow-attention", 3), states()

    def permuted(z):
        return torch.cat([z.chunk(3, -1)[slice] for slice in (2, 0, 1)], -1)

    torch.testing.assert_close(narrow.prepare(x)(permuted(x)), permuted(narrow.prepare(x)(x)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mixer", ["wide-attention", "narrow-attention"])
def test_an_injection_goes_into_queries_keys_and_values(mixer):
    module, x = build(mixer, 3), states()
    width = MIXERS[mixer](heads=3).added_width(DIM)
    mix = module.prepare(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        values = torch.zeros(width, dtype=torch.float64)
        values[2 * width // 3 :] = torch.randn(width // 3, dtype=torch.float64)
        if mixer == "wide-attention":
            module.out.weight.copy_(torch.eye(DIM).repeat(1, 3))
            expected = values[2 * width // 3 :].view(3, DIM).sum(0)
        else:
            expected = values[2 * width // 3 :]
        # All keys are alike, so each token finds the values that were injected.
        torch.testing.assert_close(mix(x, values.expand(2, 6, -1)), expected.expand(2, 6, -1), rtol=0, atol=1e-13)
        assert mix(x).eq(0).all()


def test_heads_that_do_not_divide_the_width_are_refused_by_narrow_attention_alone():
    with pytest.raises(ValueError, match="heads must divide the width: 5 heads, width 12"):
        build("narrow-attention", 5)
    assert build("wide-attention", 5).prepare(states())(states()).shape == (2, 6, DIM)
