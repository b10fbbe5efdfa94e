"""LambdaBERT: its presets, its content lambdas along every depth, and where its batch norm has no place."""

import types

import pytest
import torch
from fairseq.models import MODEL_REGISTRY

from fairseq_implicit.fields.mixers.lambda_layer import LambdaLayer
from fairseq_implicit.models.hub_interface import ImplicitBertHubInterface
from fairseq_implicit.options import OptionError

SHAPE = dict(encoder_layers=3, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)
LAMBDA = dict(mixer="lambda", lambda_key_depth=4, lambda_intra_depth=2, lambda_context=5)
BATCH_NORM = dict(mixer="lambda", lambda_norm="batch")


def build(task, family, **settings):
    torch.manual_seed(0)
    model = MODEL_REGISTRY[family]
    return model.build_model(model.config_class()(**{**SHAPE, **LAMBDA, **settings}), task).eval()


def lambdas_of(mixer, z, real):
    """By hand, ``(batch, key, value)``, of what the mixer reads."""
    _, k, v = mixer.qkv(z).split(mixer.widths, -1)
    k = k.unflatten(-1, (2, 4)).masked_fill(~real[:, :, None, None], -torch.inf).softmax(1)
    v = mixer.value_norm(v).unflatten(-1, (2, -1)) * real[:, :, None, None]
    return torch.einsum("bmuk,bmuv->bkv", k, v)


def found_in(model, tokens):
    with torch.no_grad():
        features, extra = model.extract_features(
            tokens, features_only=True, return_all_hiddens=True, return_lambdas=True
        )
        assert torch.equal(features, model(tokens, features_only=True)[0])
    return extra["output"].hidden_states, extra["lambdas"]


def agree(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", [dict(), dict(ode_scheme="theta"), dict(ode_field="post-norm", ode_tied=True)])
def test_of_a_stack_they_are_those_of_every_block_at_the_state_before_it(task, tokens, settings):
    model = build(task, "ode_bert", **settings)
    states, found = found_in(model, tokens)
    with torch.no_grad():
        expected = []
        for block, state in enumerate(states[:3]):
            field = model.encoder.depth.fields[0 if settings.get("ode_tied") else block]
            read = state if "ode_field" in settings else field.attention_norm(state)
            expected.append(lambdas_of(field.attention, read, tokens.ne(1)))
    agree(found, expected)


@pytest.mark.parametrize("settings", [dict(ode_tolerance=0.0, ode_steps=4, ode_depth_weights="linear"),
                                      dict(ode_tolerance=1e-3, ode_depth_weights="linear"),
                                      dict(ode_tolerance=1e-3)])  # fmt: skip
def test_of_a_continuous_depth_they_are_those_along_its_trajectory(task, tokens, settings):
    model = build(task, "neural_ode_bert", **settings)
    states, found = found_in(model, tokens)
    assert len(found) == len(states) > 2
    field = model.encoder.depth.field
    first, last = (field, field) if "ode_depth_weights" not in settings else (field.knots[0], field.knots[-1])
    with torch.no_grad():
        for place, part in ((0, first), (-1, last)):
            read = part.attention_norm(states[place])  # a fresh embedding of the depth moves no norm
            torch.testing.assert_close(found[place], lambdas_of(part.attention, read, tokens.ne(1)), rtol=0, atol=2e-6)
    # Those of one sequence alone are the same, at the times of its own steps.
    _, alone = found_in(model, tokens[1:2, :9])
    torch.testing.assert_close(alone[-1][0], found[-1][1], rtol=0, atol=1e-5)


def test_of_an_equilibrium_they_are_those_there_between_those_of_prelude_and_coda(task, tokens):
    model = build(task, "deq_bert", deq_prelude_layers=1, deq_cell_layers=2, deq_coda_layers=1, deq_tol=1e-6)
    states, found = found_in(model, tokens)
    depth, real = model.encoder.depth, tokens.ne(1)
    with torch.no_grad():
        prelude, coda = depth.prelude[0], depth.coda[0]
        expected = [
            lambdas_of(prelude.attention, prelude.attention_norm(states[0]), real),
            *found[1:3],
            lambdas_of(coda.attention, coda.attention_norm(states[2]), real),
        ]
        stream, _ = depth.cell.injection(states[1])
        inner = depth.cell.layers[0]
        expected[1] = lambdas_of(inner.attention, inner.attention_norm(states[2] + stream), real)
    agree(found, expected)


def test_the_hub_returns_them_beside_the_features(task, tokens):
    model = build(task, "ode_bert")
    hub = ImplicitBertHubInterface.__new__(ImplicitBertHubInterface)
    torch.nn.Module.__init__(hub)
    hub.model = model
    hub.register_buffer("_float_tensor", torch.zeros(1))
    with torch.no_grad():
        features, lambdas = hub.extract_features(tokens, return_lambdas=True)
        assert torch.equal(features, hub.extract_features(tokens))
        states, again = hub.extract_features(tokens[0], return_all_hiddens=True, return_lambdas=True)
        assert len(states) == 4 and torch.equal(states[0], hub.extract_features(tokens[0], True)[0])
    assert [tuple(each.shape) for each in lambdas] == 3 * [(3, 4, 8)]
    torch.testing.assert_close(again[2], lambdas[2][:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["ode_bert", "neural_ode_bert", "deq_bert"])
def test_other_mixers_have_none(task, tokens, family):
    model = MODEL_REGISTRY[family]
    attention = model.build_model(model.config_class()(**SHAPE), task).eval()
    with pytest.raises(ValueError, match="return_lambdas: what mixes the tokens here has no content lambdas"):
        attention.extract_features(tokens, features_only=True, return_lambdas=True)


# --- batch norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, settings",
    [
        ("ode_bert", dict(ode_scheme="rk2")),
        ("ode_bert", dict(ode_scheme="euler", ode_steps=2)),
        ("ode_bert", dict(ode_scheme="euler", ode_random_steps=[1, 2])),
        ("ode_bert", dict(ode_scheme="euler", ode_corrector="backward-euler")),
        ("ode_bert", dict(ode_scheme="heun2", ode_corrector="adams")),
        ("ode_bert", dict(ode_scheme="bosh3", ode_tolerance=0.1)),
        ("ode_bert", dict(ode_scheme="theta")),
        ("ode_bert", dict(ode_scheme="implicit-midpoint")),
        ("neural_ode_bert", dict()),
        ("neural_ode_bert", dict(ode_scheme="euler", ode_tolerance=0.0)),
        ("deq_bert", dict()),
        ("deq_bert", dict(deq_gradient="bptt-4")),
    ],
    ids=str,
)
def test_a_batch_norm_is_refused_where_a_solve_evaluates_it_more_than_once(task, family, settings):
    with pytest.raises(OptionError, match="^--lambda-norm: batch makes each evaluation another function of the state"):
        build(task, family, **settings, lambda_norm="batch")


@pytest.mark.parametrize("settings", [dict(), dict(ode_time=2.0), dict(ode_coefficients="learned"), dict(ode_split=2),
                                      dict(ode_gradient="checkpoint-step", ode_field="post-norm")])  # fmt: skip
def test_where_each_block_is_evaluated_once_it_trains(task, tokens, settings):
    model = build(task, "ode_bert", ode_scheme="euler", lambda_norm="batch", **settings).train()
    model(tokens)[0].square().mean().backward()
    counted = [int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counted == [1] * len(counted) and len(counted) == 2 * len(model.encoder.depth.fields)
    model.eval()
    with torch.no_grad():
        together, alone = (model(ids, features_only=True)[0] for ids in (tokens, tokens[2:, :5]))
    torch.testing.assert_close(together[2, :5], alone[0], rtol=0, atol=1e-5)


# --- options and presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ode_bert", "neural_ode_bert", "deq_bert"])
def test_options_of_a_lambda_layer_need_one(task, family):
    with pytest.raises(ValueError, match="--lambda-context 5 belongs to --mixer lambda, and --mixer is attention"):
        MODEL_REGISTRY[family].build_model(MODEL_REGISTRY[family].config_class()(**SHAPE, lambda_context=5), task)
    with pytest.raises(ValueError, match="--lambda-context: 6 tokens have no middle one"):
        build(task, family, lambda_context=6)


def test_an_input_longer_than_the_table_says_which_flag(task, tokens):
    model = build(task, "deq_bert", lambda_context=0, lambda_max_length=11)
    with pytest.raises(ValueError, match="^--lambda-max-length: an input of 12 tokens is longer than the 11 whose"):
        model(tokens)
    model(tokens[:, :11])


def test_positions_need_no_embedding_where_the_lambdas_tell_them_apart(task):
    assert build(task, "ode_bert").encoder.embed_positions is None
    assert build(task, "ode_bert", lambda_context=1).encoder.embed_positions is not None


@pytest.mark.parametrize("size, layers, dim", [("tiny", 2, 128), ("small", 4, 512), ("base", 12, 768)])
def test_the_presets_are_bert_with_lambda_layers(task, tokens, size, layers, dim):
    model = MODEL_REGISTRY[f"lambda_bert_{size}"]
    config = model.config_class()()
    with torch.device("meta"):
        network = model.build_model(config, task).encoder
    assert len(network.depth.fields) == layers and network.embed_positions is not None
    for field in network.depth.fields:
        assert isinstance(field.attention, LambdaLayer) and field.attention_norm.eps == 1e-12
        # h k + u k + u v of each of the state's numbers, and 8 · 4 · 25 positions
        inner = dim * (64 + 32 + 4 * dim // 8)
        weights = {name: each.numel() for name, each in field.attention.named_parameters()}
        assert weights["qkv.weight"] == inner and weights["positions"] == 800
        assert inner == 368_640 or size != "base"


def test_the_smallest_preset_trains_and_is_opened_under_another_scheme(fairseq_train, toy_data, tmp_path):
    shape = ("--encoder-layers", 1, "--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32)
    run = fairseq_train(
        *(toy_data, "--task", "implicit_masked_lm", "--arch", "lambda_bert_tiny", "--criterion", "implicit_masked_lm"),
        *("--optimizer", "adam", "--lr", 1e-3, "--tokens-per-sample", 32, "--batch-size", 8, "--cpu", *shape),
        *("--max-update", 2, "--log-interval", 1, "--log-format", "json", "--save-dir", tmp_path),
    )
    assert len(run.losses()) == 2
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert "encoder.depth.fields.0.attention.positions" in stored["model"]
    from fairseq import checkpoint_utils

    for overrides in ({}, {"ode_scheme": "rk4"}):
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
            [str(tmp_path / "checkpoint_last.pt")], arg_overrides={"data": toy_data, **overrides}
        )
        assert models[0].encoder.depth.config.solver.scheme == overrides.get("ode_scheme", "euler")
    with pytest.raises(ValueError, match="--lambda-norm: batch"):
        checkpoint_utils.load_model_ensemble_and_task(
            [str(tmp_path / "checkpoint_last.pt")],
            arg_overrides={"data": toy_data, "ode_scheme": "rk4", "lambda_norm": "batch"},
        )


@pytest.mark.parametrize("kind, attention", [("wide", 524_416), ("narrow", 768)])
def test_formers_presets_have_its_shape(task, kind, attention):
    model = MODEL_REGISTRY[f"former_{kind}"]
    network = model.build_model(model.config_class()(), types.SimpleNamespace(**vars(task))).encoder
    blocks = [sum(each.numel() for each in field.parameters()) for field in network.depth.fields]
    assert blocks == 6 * [attention + 2 * 128 * 512 + 512 + 128 + 4 * 128]
    assert network.layernorm_embedding is None
