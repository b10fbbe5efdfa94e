"""Disentangled attention, whose table all layers share, in every family: gradients, files, presets, command line."""

import pytest
import torch
from fairseq.models import MODEL_REGISTRY

from fairseq_implicit.families.ode_bert import OdeBertOptions
from fairseq_implicit.fields.mixers.disentangled import RelativeTable

SHAPE = dict(
    encoder_layers=3, encoder_embed_dim=12, encoder_ffn_embed_dim=16, encoder_attention_heads=3, mixer="disentangled",
    disentangled_buckets=4, disentangled_distance=8, encoder_init_std=0.2,
)  # fmt: skip
QUIET = dict(dropout=0.0, attention_dropout=0.0)


def build(task, family="ode_bert", **settings):
    torch.manual_seed(0)
    model = MODEL_REGISTRY[family]
    return model.build_model(model.config_class()(**{**SHAPE, **settings}), task).double()


def gradients(model, tokens):
    """Of a loss at real tokens, by name; noise begins at the same seed."""
    model.zero_grad()
    torch.manual_seed(5)
    model.train()(tokens)[0][tokens.ne(1)].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    "family, settings",
    [
        ("ode_bert", {}),
        ("ode_bert", dict(ode_tied=True)),
        ("neural_ode_bert", {}),
        ("neural_ode_bert", dict(ode_depth_weights="linear")),
        ("deq_bert", dict(deq_prelude_layers=1, deq_cell_layers=2, deq_coda_layers=1)),
    ],
)
def test_all_layers_have_one_table_and_no_other_positions(task, tokens, family, settings):
    model = build(task, family, **settings)
    assert model.encoder.embed_positions is None
    assert len([module for module in model.modules() if isinstance(module, RelativeTable)]) == 1
    table = [name for name in gradients(model, tokens) if ".table.embedding." in name]
    assert len(table) == 1 and model.get_parameter(table[0]).grad.any()
    shuffled = tokens[:1, [0, 2, 1, *range(3, 12)]]
    with torch.no_grad():
        model.eval()
        assert not torch.allclose(model(shuffled)[0][0, 5], model(tokens[:1])[0][0, 5], atol=1e-6)
    # A state dict of it opens, with the table under the name of every layer.
    other = build(task, family, **settings)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("gradient", ["checkpoint-step", "checkpoint-stage"])
@pytest.mark.parametrize("scheme", ["euler", "rk4"])
def test_recomputed_gradients_are_those_of_autograd_to_the_last_bit(task, tokens, scheme, gradient):
    kept, recomputed = (
        gradients(build(task, ode_scheme=scheme, ode_steps=2, ode_gradient=name), tokens)
        for name in ("autograd", gradient)
    )
    assert kept.keys() == recomputed.keys() and all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_the_adjoint_of_knots_with_one_table_is_the_gradient(task, tokens):
    common = dict(QUIET, ode_depth_weights="linear", ode_scheme="dopri5", ode_tolerance=1e-6, encoder_init_std=0.05)
    exact = gradients(build(task, "neural_ode_bert", **common), tokens)
    adjoint = gradients(build(task, "neural_ode_bert", **common, ode_gradient="adjoint"), tokens)
    assert exact.keys() == adjoint.keys() and any(".table.embedding." in name for name in exact)
    for name, gradient in exact.items():
        torch.testing.assert_close(adjoint[name], gradient, rtol=0, atol=1e-5 * (1 + float(gradient.abs().max())))


@pytest.mark.parametrize("around", [0, 1])
def test_the_gradient_at_an_equilibrium_is_that_of_a_long_unroll(task, tokens, around):
    """Also where layers before and behind the cell have the cell's table."""
    settings = dict(
        QUIET, deq_prelude_layers=around, deq_coda_layers=around, deq_cell_layers=2, encoder_init_std=0.05,
        deq_max_iter=80, deq_tol=1e-12, deq_allow_nonconvergent=True, deq_monitor_interval=0,
    )  # fmt: skip
    solved = gradients(build(task, "deq_bert", **settings, deq_gradient="ift"), tokens)
    unrolled = gradients(build(task, "deq_bert", **settings, deq_gradient="bptt-60"), tokens)
    assert solved.keys() == unrolled.keys() and any(".table.embedding." in name for name in solved)
    for name, gradient in unrolled.items():
        torch.testing.assert_close(solved[name], gradient, rtol=0, atol=1e-8, msg=name)


def test_presets_have_the_published_shapes():
    for size, layers in (("small", 6), ("base", 12)):
        config = MODEL_REGISTRY[f"deberta_v3_{size}"].config_class()()
        assert isinstance(config, OdeBertOptions) and config.check().layers == layers
        mixer = config.mixer_config()
        assert (config.encoder_embed_dim, mixer.heads, mixer.buckets, mixer.distance) == (768, 12, 256, 512)
        assert (config.norm().eps, mixer.norm_eps, mixer.hidden_dropout, mixer.dropout) == (1e-7, 1e-7, 0.1, 0.1)
        assert not config.learned_positions and config.ode_field == "post-norm" and config.ode_scheme == "euler"


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            dict(mixer="attention", disentangled_buckets=256),
            "--disentangled-distance 8 belongs to --mixer disentangled",
        ),
        (dict(disentangled_terms="p2p"), "--disentangled-terms: 'p2p' is unknown: choose c2p, p2c or c2p,p2c"),
        (dict(disentangled_buckets=14), "--disentangled-buckets: half of 14 .* --disentangled-distance 8 leaves none"),
        (dict(encoder_position_start="sinusoidal"), "sinusoidal is a start of learned positions, and here are none"),
        (dict(encoder_attention_heads=5), "--encoder-attention-heads 5 does not divide --encoder-embed-dim 12"),
    ],
)
def test_wrong_flags_are_named(task, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(task, **settings)


def test_training_saves_resumes_and_averages(fairseq_train, toy_flags, command, tmp_path):
    flags = (*toy_flags, "--arch", "deberta_v3_small", "--encoder-layers", 2, "--encoder-attention-heads", 2,
             "--disentangled-buckets", 8, "--disentangled-distance", 16, "--disable-validation",
             "--ode-scheme", "rk2", "--save-interval-updates", 2, "--keep-interval-updates", 9)  # fmt: skip
    whole = fairseq_train(*flags, "--max-update", 4, "--save-dir", tmp_path / "whole")
    middle = ("--restore-file", tmp_path / "whole/checkpoint_1_2.pt")
    resumed = fairseq_train(*flags, *middle, "--max-update", 4, "--save-dir", tmp_path / "parts")
    assert {update: whole.losses()[update] for update in (3, 4)} == resumed.losses()
    stored = torch.load(tmp_path / "whole/checkpoint_last.pt", weights_only=False)["model"]
    first, second = (stored[f"encoder.depth.fields.{layer}.attention.table.embedding.weight"] for layer in (0, 1))
    assert torch.equal(first, second) and first.data_ptr() == second.data_ptr() and first.shape == (16, 16)
    mean = tmp_path / "mean.pt"
    status, _, said = command("average-checkpoints", tmp_path / "whole", "--last", 2, "--output", mean)
    assert status == 0, said
    averaged = torch.load(mean, weights_only=False)["model"]
    assert torch.equal(*(averaged[f"encoder.depth.fields.{layer}.attention.table.norm.bias"] for layer in (0, 1)))
