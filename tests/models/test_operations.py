"""The operations that a model says its forward and backward pass cost, against torch's own count of them."""

import types

import pytest
import torch
from fairseq.data import Dictionary
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fairseq_implicit.compat.outputs import output_of
from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertConfig, NeuralOdeBertModel
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

# Wide beside its sequence: a product with a Jacobian goes both ways through the attention's products, and the model
# counts it as an evaluation. Attention dropout: torch does not count the kernel that attends without it on CPUs.
SHAPE = dict(encoder_layers=2, encoder_embed_dim=64, encoder_ffn_embed_dim=256, encoder_attention_heads=4,
             attention_dropout=0.1, dropout=0.1)  # fmt: skip
BATCH, TIME, SYMBOLS = 2, 8, 100

ODE = (OdeBertConfig, OdeBertModel)
NEURAL = (NeuralOdeBertConfig, NeuralOdeBertModel)
DEQ = (DeqBertConfig, DeqBertModel)
CASES = {
    "euler": (*ODE, dict(ode_scheme="euler", ode_field="post-norm")),
    "rk4, two steps": (*ODE, dict(ode_scheme="rk4", ode_steps=2)),
    "rk2, recomputed": (*ODE, dict(ode_scheme="rk2", checkpoint_activations=True)),
    "rk3, stages recomputed": (*ODE, dict(ode_scheme="rk3", ode_gradient="checkpoint-stage")),
    "euler layers, recomputed": (*ODE, dict(ode_scheme="euler", ode_field="post-norm", checkpoint_activations=True)),
    "narrow embeddings": (*ODE, dict(ode_scheme="euler", encoder_embedding_dim=16)),
    "macaron": (*ODE, dict(ode_scheme="euler", ode_field="macaron")),
    "gated, norms of queries and keys": (
        *ODE,
        dict(
            gated_feed_forward=True,
            no_biases=True,
            attention_rotary_base=9.0,
            attention_qk_norm=True,
            attention_window=2,
        ),
    ),
    "predictor-corrector": (*ODE, dict(ode_scheme="rk2", ode_corrector="pcformer")),
    "adaptive blocks": (*ODE, dict(ode_scheme="bosh3", ode_tolerance=0.1)),
    "theta": (*ODE, dict(ode_scheme="theta", ode_theta=0.5, ode_theta_max_iter=6, ode_theta_tol=1e-6)),
    "implicit midpoint": (*ODE, dict(ode_scheme="implicit-midpoint", ode_steps=2, ode_theta_gradient="phantom-2")),
    "continuous": (*NEURAL, dict(ode_tolerance=0.0, ode_scheme="rk4")),
    "continuous, adaptive": (*NEURAL, dict(ode_tolerance=0.1, checkpoint_activations=True)),
    "adjoint": (*NEURAL, dict(ode_tolerance=0.1, ode_gradient="adjoint", dropout=0.0)),
    "reversible": (*NEURAL, dict(ode_tolerance=0.0, ode_gradient="reversible", ode_steps=4)),
    "knots": (*NEURAL, dict(ode_tolerance=0.0, ode_scheme="euler", ode_depth_weights="linear")),
    **{
        f"deq, {gradient}": (*DEQ, dict(deq_gradient=gradient, deq_max_iter=8, deq_tol=1e-6))
        for gradient in ("ift", "neumann-4", "phantom-2", "jfb", "bptt-5", "reversible")
    },
    "deq, recomputed": (*DEQ, dict(deq_gradient="phantom-3", checkpoint_activations=True)),
    "deq, prelude and coda": (*DEQ, dict(deq_prelude_layers=1, deq_coda_layers=2, deq_warmup_updates=5)),
}

#: Relative errors of the formula, where it is one: products with a Jacobian, the part of the first tracked evaluation
#: that nobody differentiates, the embedding of the time.
ABOUT = {
    "theta": 0.03, "implicit midpoint": 0.01, "continuous": 0.005, "continuous, adaptive": 0.005, "adjoint": 0.005,
    "reversible": 0.005, "deq, ift": 0.03, "deq, neumann-4": 0.04, "deq, phantom-2": 0.05, "deq, jfb": 0.06,
    "deq, recomputed": 0.01,
}  # fmt: skip


class Count(TorchDispatchMode):
    """Operations by torch's own formulas. Its FlopCounterMode follows modules as well, through hooks that fail where a
    backward pass calls autograd."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def network(config, model, settings):
    dictionary = Dictionary()
    for index in range(SYMBOLS):
        dictionary.add_symbol(f"piece{index}")
    torch.manual_seed(0)
    settings = {**SHAPE, **settings}
    if model is DeqBertModel:
        # Wider still: Anderson's own products, which are no operations of the model, are one in so many.
        wide = dict(encoder_embed_dim=128, encoder_ffn_embed_dim=512)
        settings = dict(deq_allow_nonconvergent=True, deq_monitor_interval=0, **{**settings, **wide})
    task = types.SimpleNamespace(source_dictionary=dictionary, max_positions=lambda: TIME)
    return model.build_model(config(**settings), task).train()


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_that_torch_counts(case):
    model = network(*CASES[case])
    tokens = torch.randint(4, SYMBOLS, (BATCH, TIME))
    masked = torch.rand(BATCH, TIME) < 0.5

    def update():
        returned = model(tokens, masked_tokens=masked, has_padding=False)
        functional.cross_entropy(returned[0], tokens[masked]).backward()
        return output_of(returned)

    update()  # what a backward pass costs is known afterwards, and equilibria are measured once
    with Count() as count:
        output = update()
    assert float(output.operations) == pytest.approx(count.total, rel=ABOUT.get(case, 1e-6))


def test_an_evaluation_that_a_gradient_starts_from_counts_once():
    settings = dict(ode_scheme="theta", ode_theta=0.5, ode_time=2.0, ode_theta_tol=1e-2, encoder_init="plain")
    wide = dict(encoder_embed_dim=128, encoder_ffn_embed_dim=512, encoder_init_std=0.05)
    model = network(*ODE, {**settings, **wide})
    tokens = torch.randint(4, SYMBOLS, (1, TIME))
    model(tokens, has_padding=False)[0].square().mean().backward()
    with Count() as count:
        returned = model(tokens, has_padding=False)
        returned[0].square().mean().backward()
    # One evaluation more would be 7 %.
    assert float(output_of(returned).operations) == pytest.approx(count.total, rel=0.02)
