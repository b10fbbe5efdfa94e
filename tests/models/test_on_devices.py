"""What matters on a device that the host must not wait for, without one; and fields compiled block by block."""

from types import SimpleNamespace

import pytest
import torch

from fairseq_implicit.criterions.implicit_masked_lm import ImplicitMaskedLMCriterion
from fairseq_implicit.depth import compilation
from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertConfig, NeuralOdeBertModel
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

ODE = (OdeBertConfig, OdeBertModel)
NEURAL = (NeuralOdeBertConfig, NeuralOdeBertModel)
DEQ = (DeqBertConfig, DeqBertModel)
SHAPE = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)
FIXED_STEPS = {
    "euler": (*ODE, dict(ode_scheme="euler", ode_field="post-norm")),
    "rk4 in two steps": (*ODE, dict(ode_scheme="rk4", ode_steps=2)),
    "random steps": (*ODE, dict(ode_random_steps=[1, 3])),
    "recomputed": (*ODE, dict(ode_scheme="rk2", checkpoint_activations=True)),
    "learned": (*ODE, dict(ode_scheme="rk4", ode_coefficients="gated", rk_norm=True, ode_consistency_weight=0.1)),
    "corrected": (*ODE, dict(ode_scheme="rk2", ode_corrector="pcformer")),
    "layer drop and drop path": (*ODE, dict(encoder_layerdrop=0.5, drop_path=0.2, ode_field="macaron")),
    "history": (*ODE, dict(ode_history="dlcl")),
    "continuous": (*NEURAL, dict(ode_tolerance=0.0)),
    "continuous, recomputed": (*NEURAL, dict(ode_tolerance=0.0, ode_gradient="checkpoint-step")),
    "knots": (*NEURAL, dict(ode_tolerance=0.0, ode_scheme="euler", ode_depth_weights="linear")),
    "disentangled": (*ODE, dict(ode_scheme="rk2", mixer="disentangled")),
}


def build(task, config, model, settings):
    torch.manual_seed(0)
    return model.build_model(config(**{**SHAPE, **settings}), task).train()


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("case", FIXED_STEPS)
def test_no_value_is_read_back_in_forward_and_backward_passes(task, case, has_padding):
    """A meta tensor has no data: whatever asks for a value fails."""
    config, model, settings = FIXED_STEPS[case]
    # The kernels that drop probabilities are those of CPUs or GPUs.
    built = build(task, config, model, {**settings, "attention_dropout": 0.0}).to("meta")
    tokens = torch.empty(3, 12, dtype=torch.int64, device="meta")
    sample = {
        "net_input": {"src_tokens": tokens, "has_padding": has_padding},
        "target": tokens,
        "predicted": torch.empty(5, dtype=torch.int64, device="meta"),
        "ntokens": 36,
        "nsentences": 3,
    }
    criterion = ImplicitMaskedLMCriterion(None, SimpleNamespace(target_dictionary=task.source_dictionary)).train()
    loss, sample_size, log = criterion(built, sample)
    (loss / sample_size).backward()
    assert built.encoder.embed_tokens.weight.grad is not None
    assert log["correct"].is_meta and log["loss"].is_meta


def test_places_that_the_batch_knows_are_those_that_the_device_would_find(task, tokens):
    criterion = ImplicitMaskedLMCriterion(None, SimpleNamespace(target_dictionary=task.source_dictionary)).train()
    target = torch.where(torch.arange(tokens.numel()).view_as(tokens) % 3 == 0, tokens, 1)
    sample = {
        "net_input": {"src_tokens": tokens},
        "target": target,
        "ntokens": tokens.numel(),
        "nsentences": len(tokens),
    }
    built = build(task, *ODE, {})
    found = []
    for known in ({}, {"predicted": target.flatten().ne(1).nonzero().squeeze(1)}):
        torch.manual_seed(0)
        found.append(criterion(built, {**sample, **known})[0])
    assert torch.equal(*found)


COMPILED = {
    "stack": (*ODE, dict(ode_scheme="rk2", checkpoint_activations=True)),
    "continuum": (*NEURAL, dict(ode_tolerance=0.1)),
    "equilibrium": (*DEQ, dict(deq_max_iter=6, deq_allow_nonconvergent=True, deq_monitor_interval=0)),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_blocks_are_the_model_under_the_same_names(task, tokens, case, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # no compiler is asked for
    torch.compiler.reset()
    traced = []
    monkeypatch.setattr(
        compilation, "_compiled", lambda f: torch.compile(f, backend=lambda graph, _: traced.append(graph) or graph)
    )
    config, model, settings = COMPILED[case]
    found = []
    for compiled in (False, True):
        built = build(task, config, model, settings)
        if compiled:
            built.compile_blocks()
        for _ in range(2):
            torch.manual_seed(3)
            built.zero_grad()
            logits = built(tokens)[0]
            logits.square().mean().backward()
        found.append((logits, {name: weight.grad for name, weight in built.named_parameters()}))
    (plain, gradients), (logits, others) = found
    assert traced and gradients.keys() == others.keys()
    torch.testing.assert_close(logits, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)


def test_what_cannot_be_compiled_is_said_in_a_sentence(task, monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="--compile-blocks: it needs a C\\+\\+ compiler"):
        build(task, *ODE, {}).compile_blocks()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--compile-blocks: it needs triton"):
        build(task, *ODE, {}).compile_blocks()
    with pytest.raises(ValueError, match="--compile-blocks: weights interpolated.*--ode-depth-weights embedding"):
        build(task, *NEURAL, dict(ode_depth_weights="linear")).compile_blocks()


def test_a_training_with_compiled_blocks(toy_flags, fairseq_train, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    runs = {}
    for name, flags in (("plain", []), ("compiled", ["--compile-blocks"])):
        flags = [*toy_flags, *flags, "--max-update", 3, "--save-dir", tmp_path / name]
        runs[name] = fairseq_train(*flags).losses()
    assert runs["compiled"] == pytest.approx(runs["plain"], abs=2e-3)
    plain, compiled = (torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in runs)
    assert plain.keys() == compiled.keys()
