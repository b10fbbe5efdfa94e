"""A scheme and a root finder of a user's own: one entry each, at once in every family by its name."""

from fractions import Fraction

import pytest
import torch
from fairseq.models import MODEL_REGISTRY

from fairseq_implicit.solvers.fixed_point import METHODS
from fairseq_implicit.solvers.picard import Picard
from fairseq_implicit.solvers.tableau import TABLEAUS, Tableau

THIRD = Tableau("third", a=((), (Fraction(1, 3),)), b=(Fraction(-1, 2), Fraction(3, 2)), order=2)


class Averaged(Picard):
    """Krasnoselskii's iteration: halfway to ``f(z)``."""

    def step(self, z, f_z, residual, damping):
        return z + residual / 2


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(TABLEAUS, "third", THIRD)
    monkeypatch.setitem(METHODS, "averaged", lambda config, z, dtype: Averaged())


@pytest.mark.parametrize(
    "family, own, like, tolerance",
    [
        ("ode_bert", dict(ode_scheme="third"), dict(ode_scheme="ralston2"), 1e-3),
        ("ode_bert", dict(ode_scheme="third", ode_coefficients="learned"), dict(ode_scheme="ralston2"), 1e-3),
        ("ode_bert", dict(ode_scheme="theta", ode_theta_solver="averaged"), dict(ode_scheme="theta"), 1e-3),
        ("neural_ode_bert", dict(ode_scheme="third", ode_tolerance=0), dict(ode_scheme="rk4", ode_tolerance=0), 1e-3),
        ("deq_bert", dict(deq_solver="averaged"), dict(), 5e-3),
        ("deq_bert", dict(deq_adjoint_solver="averaged"), dict(), 5e-3),
    ],
    ids=str,
)
def test_every_family_takes_them_by_their_names(task, tokens, family, own, like, tolerance):
    logits, gradients = [], []
    for settings in (own, like):
        torch.manual_seed(0)
        model = MODEL_REGISTRY[family]
        shape = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)
        model = model.build_model(model.config_class()(**shape, dropout=0.0, **settings), task).train()
        logits.append(model(tokens)[0])
        logits[-1].square().mean().backward()
        gradients.append(model.encoder.embed_tokens.weight.grad)
    torch.testing.assert_close(*logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)
    assert any(not torch.equal(*pair) for pair in (logits, gradients))
