"""Stacks whose blocks become one cell: exact where the blocks are equal, refused where there is no such cell."""

import pytest
import torch

from fairseq_implicit.conversion.averaged import tied
from tests.conversion.test_tied import checkpoint, ode, opened


def stack(task, equal=(), **settings):
    """An ode_bert of 5 blocks in random weights, some of them ``equal``, and its checkpoint."""
    model, config = ode(task, ode_tied=False, encoder_layers=5, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for block in equal:
            model.encoder.depth.fields[block].load_state_dict(model.encoder.depth.fields[equal[0]].state_dict())
    return model, checkpoint(model, config, "ode_bert")


def logits(model, tokens):
    """Of the real tokens."""
    with torch.no_grad():
        return model(tokens)[0][tokens.ne(1)]


@pytest.mark.parametrize("prelude, coda", [(0, 0), (1, 0), (0, 2), (1, 2)])
@pytest.mark.parametrize("field", ["post-norm", "pre-norm"])
def test_equal_blocks_between_others_are_the_same_function(field, prelude, coda, task, tokens):
    source, stored = stack(task, equal=range(prelude, 5 - coda), ode_field=field, drop_path=0.1)
    found = tied(stored, prelude=prelude, coda=coda)
    settings = found["cfg"]["model"]
    assert settings["deq_gradient"] == f"bptt-{5 - prelude - coda}" and settings["encoder_layers"] == 5
    model = opened(found, task)
    torch.testing.assert_close(logits(model, tokens), logits(source, tokens), rtol=0, atol=2e-6)
    depth = model.encoder.depth
    for place, layer in [*enumerate(depth.prelude), *enumerate(depth.coda, start=5 - coda)]:
        own = source.encoder.depth.fields[place].state_dict()
        assert all(torch.equal(weight, own[name]) for name, weight in layer.state_dict().items())
    assert (depth.output_norm is not None) == (field == "pre-norm")


def test_a_first_block_without_a_norm_stays_in_the_prelude(task, tokens):
    source, stored = stack(task, equal=range(1, 5), no_first_norm=True)
    model = opened(tied(stored, prelude=1), task)
    torch.testing.assert_close(logits(model, tokens), logits(source, tokens), rtol=0, atol=2e-6)


def test_blocks_with_a_linear_part_become_the_cell_of_their_equilibrium(task, tokens):
    settings = dict(ode_linear_part="diagonal", ode_scheme="etd1")
    source, stored = stack(task, equal=range(5), **settings)
    found = tied(stored)
    assert found["cfg"]["model"]["deq_linear_part"] == "diagonal"
    cell = opened(found, task, deq_eval_tol=1e-5)
    # Many blocks of the same field are the long way to its fixed point.
    stored["cfg"]["model"].update(ode_tied=True, encoder_layers=60)
    one = {name.replace("fields.4.", "fields.0."): weight for name, weight in stored["model"].items()}
    names = ("fields.1.", "fields.2.", "fields.3.", "combinations.")
    weights = {name: weight for name, weight in one.items() if not any(part in name for part in names)}
    long = opened({**stored, "model": weights}, task)
    torch.testing.assert_close(logits(cell, tokens), logits(long, tokens), rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [dict(ode_scheme="rk4"), dict(ode_scheme="rk2", ode_coefficients="learned")])
def test_equal_blocks_of_any_scheme_are_a_tied_stack(settings, task, tokens):
    source, stored = stack(task, equal=range(5), **settings)
    model = opened(tied(stored, "ode_bert"), task)
    assert len(model.encoder.depth.fields) == 1
    assert torch.equal(logits(model, tokens), logits(source, tokens))


def test_unequal_blocks_become_their_mean(task):
    source, stored = stack(task, ode_field="post-norm")
    found = tied(stored, prelude=1, coda=1)["model"]
    for name, weight in source.encoder.depth.fields[0].state_dict().items():
        blocks = [source.state_dict()[f"encoder.depth.fields.{block}.{name}"] for block in (1, 2, 3)]
        torch.testing.assert_close(found[f"encoder.depth.cell.layers.0.{name}"], sum(blocks) / 3)
        assert found[f"encoder.depth.cell.layers.0.{name}"].dtype == weight.dtype


@pytest.mark.parametrize("coda", [0, 1])
@pytest.mark.parametrize("field", ["post-norm", "pre-norm"])
def test_with_a_gain_it_is_a_cell_that_converges_and_hears_its_input(field, coda, task, tokens):
    _, stored = stack(task, ode_field=field)
    model = opened(tied(stored, prelude=1, coda=coda, gain=2.0), task)
    assert model.encoder.depth.config.gradient.needs_equilibrium
    assert float(model.encoder.depth.cell.injection.gain) == pytest.approx(2.0)
    norms = stored["model"]["encoder.depth.final_norm.weight"] if field == "pre-norm" else None
    if norms is not None:
        last = model.encoder.depth.output_norm if coda else model.encoder.depth.cell.final_norm
        assert torch.equal(last.weight, norms)
    model.train()
    values, extra = model(tokens)
    assert torch.isfinite(values).all() and extra["output"].statistics["converged_share"] == 1.0
    values.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.encoder.depth.parameters())
    assert float(model.encoder.depth.cell.injection.raw_gain.grad) != 0.0


@pytest.mark.parametrize(
    "settings, options, sentence",
    [
        (dict(ode_tied=True), {}, "ode_tied is True: its blocks are one already"),
        (dict(), dict(prelude=3, coda=2), "a prelude of 3 and a coda of 2 leave none of the 5 blocks"),
        (dict(), dict(prelude=-1), "a prelude of -1"),
        (dict(), dict(family="ode_bert", coda=1), "an ode_bert ties all of its blocks"),
        (dict(), dict(gain=float("nan")), "a gain of nan"),
        (dict(), dict(gain=-1.0), "a gain of -1.0"),
        (dict(ode_scheme="rk4"), {}, "ode_scheme is rk4"),
        (dict(ode_field="parallel"), {}, "ode_field is parallel"),
        (dict(no_first_norm=True), {}, "block 1 has other weights than block 0"),
        (dict(attention_window=4, attention_global_every=2), {}, "attention_global_every makes its layers differ"),
        (dict(ode_linear_part="diagonal", ode_scheme="etd2"), dict(coda=1), "ode_linear_part is diagonal"),
    ],
)
def test_what_cannot_be_tied_is_refused(settings, options, sentence, task):
    source, config = ode(task, **{"encoder_layers": 5, "ode_tied": False, **settings})
    with pytest.raises(ValueError, match=sentence):
        tied(checkpoint(source, config, "ode_bert"), **options)


def test_blocks_of_another_shape_stay_outside(task):
    _, stored = stack(task)
    weights = dict(stored["model"])
    del weights["encoder.depth.fields.0.attention.out.bias"]
    with pytest.raises(ValueError, match="block 1 has other weights than block 0: leave it"):
        tied({**stored, "model": weights})
    with pytest.raises(ValueError, match="holds deq_bert"):
        tied({**stored, "cfg": {"model": {"_name": "deq_bert"}}})
