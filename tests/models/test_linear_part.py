"""The contractive linear part in all three families: flags, schemes, statistics, the dial, the equilibrium."""

import copy
import dataclasses

import pytest
import torch
from fairseq.models import MODEL_REGISTRY

from fairseq_implicit.compat.parameters import decays
from fairseq_implicit.conversion.tied import deq_from_tied, tied_from_deq
from fairseq_implicit.fields.transformer import KINDS

SHAPE = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=4)
QUIET = dict(dropout=0.0, attention_dropout=0.0)
LOOP = dict(encoder_layers=1, ode_linear_part="diagonal", ode_scheme="etd2", ode_steps=4, ode_time=4.0)


def build(task, family="ode_bert", **settings):
    torch.manual_seed(0)
    model = MODEL_REGISTRY[family]
    part = "deq_linear_part" if family == "deq_bert" else "ode_linear_part"
    return model.build_model(model.config_class()(**{**SHAPE, part: "diagonal", **settings}), task)


CASES = (
    [("ode_bert", dict(ode_scheme=scheme)) for scheme in ("etd1", "etd2", "etd4", "euler", "rk4", "theta")]
    + [("ode_bert", dict(ode_scheme="etd4", ode_field=kind, ode_tied=True, ode_steps=2)) for kind in KINDS]
    + [
        ("ode_bert", dict(ode_scheme="bosh3", ode_tolerance=1e-4)),
        ("ode_bert", dict(ode_scheme="rk2", ode_coefficients="learned", ode_corrector="backward-euler")),
        ("ode_bert", dict(**LOOP, ode_random_depth=3.0)),
        ("neural_ode_bert", dict(ode_scheme="etd2", ode_tolerance=0.0)),
        ("neural_ode_bert", dict(ode_scheme="etd4", ode_tolerance=0.0, ode_depth_weights="constant")),
        ("neural_ode_bert", dict(ode_scheme="etd2", ode_tolerance=0.0, ode_kinetic_energy=0.1, ode_jacobian=0.1)),
        ("neural_ode_bert", dict(ode_tolerance=1e-4, ode_depth_weights="linear", ode_gradient="adjoint")),
        ("neural_ode_bert", dict(ode_tolerance=0.0, ode_gradient="reversible")),
        ("deq_bert", dict()),
        ("deq_bert", dict(deq_cell_norm="post-norm", deq_gradient="phantom-2", deq_cell_layers=2)),
        ("deq_bert", dict(deq_gradient="reversible", deq_max_iter=16)),
        ("deq_bert", dict(deq_weight_norm=True, deq_prelude_layers=1, deq_coda_layers=1, deq_jacobian_weight=0.1)),
    ]
)


@pytest.mark.parametrize("family, settings", CASES, ids=str)
def test_it_trains_in_every_family_and_batch_mates_change_nothing(task, tokens, family, settings):
    model = build(task, family, **settings).train()
    logits, extra = model(tokens)
    output = extra["output"]
    (logits[tokens.ne(1)].square().mean() + sum(output.penalties.values())).backward()
    linear = {name: p for name, p in model.named_parameters() if "raw_rate" in name or "raw_gain" in name}
    assert len(linear) in (2, 4) and not any(decays(parameter) for parameter in linear.values())
    for name, parameter in model.named_parameters():
        if "depth" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.abs().max() > 0 for parameter in linear.values())
    for name in ("rate_mean", "rate_min", "rate_max"):
        assert float(output.statistics[name]) == pytest.approx(0.8047, abs=1e-3)
    assert 0 < float(output.statistics["state_rms"]) < 10
    model.eval()
    with torch.no_grad():
        together = model(tokens, features_only=True)[0]
        for row, length in enumerate((12, 9, 5)):
            alone = model(tokens[row : row + 1, :length], features_only=True)[0]
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("weights", ["embedding", "linear"])
def test_gradients_without_a_kept_graph_reach_rates_and_input(task, tokens, weights):
    found = []
    settings = dict(ode_tolerance=1e-9, ode_scheme="dopri5", ode_depth_weights=weights, ode_max_evaluations=5000)
    for gradient in ("autograd", "adjoint"):
        model = build(task, "neural_ode_bert", **QUIET, **settings, ode_gradient=gradient).double()
        model(tokens)[0][tokens.ne(1)].square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def converted(checkpoint, task, **overrides):
    settings = dict(checkpoint["cfg"]["model"])
    family = MODEL_REGISTRY[settings.pop("_name")]
    model = family.build_model(family.config_class()(**{**settings, **overrides}), task).double()
    model.load_state_dict(copy.copy(checkpoint["model"]))
    return model.eval()


def checkpoint(model, name):
    return {"model": model.state_dict(), "cfg": {"model": {**dataclasses.asdict(model.args), "_name": name}}}


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm"])
@pytest.mark.parametrize("settings", [dict(encoder_layers=1), dict(encoder_layers=3, ode_tied=True)], ids=str)
def test_a_loop_opens_as_the_equilibrium_of_the_same_equation(task, tokens, kind, settings):
    loop = build(task, **QUIET, **{**LOOP, **settings, "ode_field": kind}).double().eval()
    real = tokens.ne(1)
    with torch.no_grad():
        for parameter in loop.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
        there = deq_from_tied(checkpoint(loop, "ode_bert"))
        solved = converted(there, task, deq_tol=1e-12, deq_max_iter=200)
        answer, extra = solved(tokens)
        assert extra["output"].statistics["converged_share"] == 1
        with loop.encoder.depth.at(100):
            torch.testing.assert_close(loop(tokens)[0][real], answer[real], rtol=0, atol=1e-10)
        with loop.encoder.depth.at(1):
            assert (loop(tokens)[0] - answer)[real].abs().max() > 1e-3
        # And back: as many steps of etd1 as the unrolled cell takes.
        there["cfg"]["model"]["deq_gradient"] = "bptt-7"
        back = converted(tied_from_deq(there), task)
        assert back.args.ode_scheme == "etd1" and back.args.encoder_layers == 7
        unrolled = converted(there, task)(tokens)[0]
        torch.testing.assert_close(back(tokens)[0][real], unrolled[real], rtol=0, atol=1e-12)


def test_the_dials_of_a_loop_and_of_its_equilibrium_lead_to_one_answer(task, tokens):
    loop = build(task, **QUIET, **LOOP).double().eval()
    cell = converted(deq_from_tied(checkpoint(loop, "ode_bert")), task, deq_solver="picard", deq_tol=1e-12)
    found = {}
    with torch.no_grad():
        for model in (loop, cell):
            for depth in (1, 2, 60):
                with model.encoder.depth.at(depth):
                    found[model, depth] = model(tokens)[0][tokens.ne(1)]
    torch.testing.assert_close(found[loop, 60], found[cell, 60], rtol=0, atol=1e-10)
    for model in (loop, cell):
        assert (found[model, 1] - found[model, 2]).abs().max() > 1e-4


def test_dials_of_other_depths(task):
    for family, settings, expected in (
        ("ode_bert", dict(ode_linear_part="none"), (2, 5, 1.0)),
        ("ode_bert", dict(ode_tied=True), (5, 1, 1.0)),
        ("ode_bert", dict(ode_tied=True, ode_steps=2), (1, 5, 2.5)),
        ("ode_bert", dict(ode_tied=True, ode_scheme="theta"), (5, 1, 1.0)),
    ):
        config = build(task, family, **settings).encoder.depth.config_at(5)
        assert (config.layers, config.solver.steps, config.total_time) == expected, settings
    neural = build(task, "neural_ode_bert", ode_tolerance=0.0).encoder.depth.config_at(5)
    assert (neural.solver.steps, neural.duration) == (5, 2.0)
    assert build(task, "deq_bert", deq_eval_tol=1e-2).encoder.depth.config_at(5).evaluation.max_iter == 5
    assert build(task, "deq_bert", deq_gradient="bptt-3").encoder.depth.config_at(5).gradient.steps == 5
    for family in ("ode_bert", "neural_ode_bert"):
        with pytest.raises(ValueError, match="adaptive steps choose their number themselves"):
            build(task, family, ode_scheme="bosh3", ode_tolerance=0.1).encoder.depth.config_at(5)
    with pytest.raises(ValueError, match="a loop of another depth would have others"):
        build(task, ode_tied=True, ode_history="dlcl").encoder.depth.config_at(5)


@pytest.mark.parametrize(
    "family, settings, sentence",
    [
        ("ode_bert", dict(ode_linear_part="full"), "--ode-linear-part: 'full' is unknown: choose one of none, diag"),
        (
            "ode_bert",
            dict(ode_linear_part="none", ode_scheme="etd2"),
            "--ode-scheme: etd2 solves a linear part .* heun2",
        ),
        (
            "ode_bert",
            dict(ode_scheme="etd2", ode_coefficients="learned"),
            "--ode-coefficients learned belongs to Runge",
        ),
        ("ode_bert", dict(ode_scheme="etd2", ode_tolerance=0.1), "--ode-tolerance 0.1 belongs to Runge"),
        ("ode_bert", dict(ode_scheme="etd2", rk_norm=True), "--rk-norm True belongs to Runge"),
        ("ode_bert", dict(ode_scheme="etd2", ode_theta=0.5), "--ode-theta 0.5 belongs to the implicit schemes"),
        ("ode_bert", dict(ode_scheme="rk2", ode_residual_in_field=True), "which --ode-linear-part diagonal is to"),
        ("ode_bert", dict(ode_random_depth=3.0), "--ode-random-depth: 2 blocks with weights of their own"),
        (
            "ode_bert",
            dict(encoder_layers=1, ode_random_depth=3.0, drop_path=0.1),
            "--drop-path 0.1 would skip the whole",
        ),
        ("ode_bert", dict(ode_random_depth_max=3), "--ode-random-depth-max 3 needs --ode-random-depth, the mean"),
        ("ode_bert", dict(ode_random_depth_gradient=3), "--ode-random-depth-gradient 3 needs --ode-random-depth"),
        (
            "ode_bert",
            dict(ode_linear_part="none", encoder_layers=1, ode_random_depth=9.0),
            "--ode-random-depth-gradient: 8 last steps of up to 18 leave the embedding without .* --ode-linear-part",
        ),
        ("ode_bert", dict(ode_scheme="theta", ode_random_depth=3.0), "--ode-random-depth 3.0 belongs to explicit"),
        ("neural_ode_bert", dict(ode_linear_part="full"), "--ode-linear-part: 'full' is unknown"),
        (
            "neural_ode_bert",
            dict(ode_linear_part="none", ode_scheme="etd4", ode_tolerance=0.0),
            "--ode-scheme: etd4 solves a linear part exactly and the field has none, so that it is rk4: take that, or "
            "set --ode-linear-part diagonal",
        ),
        ("neural_ode_bert", dict(ode_scheme="etd4"), "--ode-scheme: etd4 .* takes fixed steps: set --ode-tolerance 0"),
        ("deq_bert", dict(deq_linear_part="full"), "--deq-linear-part: 'full' is unknown"),
        ("deq_bert", dict(deq_injection="none", deq_initial_state="input"), "--deq-injection: a linear part pulls"),
        ("deq_bert", dict(deq_qkv_injection=True), "--deq-qkv-injection: a linear part pulls"),
        ("deq_bert", dict(deq_no_final_norm=True), "--deq-no-final-norm: a cell with a linear part has no norm"),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_flag(task, family, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(task, family, **settings)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            dict(encoder_layers=2),
            "ode_tied is False, and blocks with weights of their own have no fixed point in common",
        ),
        (dict(ode_field="macaron"), "ode_field is macaron"),
        (dict(ode_scheme="rk2", rk_norm=True), "rk_norm is True"),
        (dict(ode_history="dlcl"), "ode_history is dlcl"),
    ],
)
def test_what_has_no_equilibrium_of_its_own_is_not_converted(task, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        deq_from_tied(checkpoint(build(task, **{**LOOP, **settings}), "ode_bert"))


def test_a_loop_of_a_thousand_steps_stays_bounded(task, tokens):
    loop = build(task, **QUIET, **LOOP, encoder_init="plain", encoder_init_std=2.0).eval()
    with torch.no_grad(), loop.encoder.depth.at(1000):
        _, extra = loop(tokens)
    rms = float(extra["output"].statistics["state_rms"])
    untied = build(task, **QUIET, **{**LOOP, "ode_linear_part": "none", "ode_scheme": "heun2"},
                   encoder_init="plain", encoder_init_std=2.0).eval()  # fmt: skip
    with torch.no_grad(), untied.encoder.depth.at(1000):
        _, extra = untied(tokens)
    assert 0 < rms < 300 < float(extra["output"].statistics["state_rms"])
