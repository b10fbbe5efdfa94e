"""A mixer of a user's own: one class, one configuration, one name, at once in every family."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from fairseq.models import MODEL_REGISTRY
from torch import Tensor, nn

from fairseq_implicit.fields.mixers import MIXERS
from fairseq_implicit.fields.mixers.mixer import Mix, Mixer, MixerConfig
from fairseq_implicit.layout import UNPADDED, Layout

FAMILIES = {
    "ode_bert": [
        dict(ode_scheme="euler", ode_field="post-norm"),
        dict(ode_scheme="rk4", ode_field="macaron", ode_coefficients="learned"),
        dict(ode_scheme="theta", ode_theta=0.5),
    ],
    "neural_ode_bert": [dict(), dict(ode_depth_weights="linear", ode_gradient="adjoint"), dict(ode_field="parallel")],
    "deq_bert": [dict(), dict(deq_cell_norm="post-norm", deq_gradient="phantom-2"), dict(deq_weight_norm=True)],
}
SHAPE = dict(encoder_layers=2, encoder_embed_dim=10, encoder_ffn_embed_dim=16, dropout=0.1)


class Mean(Mixer):
    """A projection of the mean of all real tokens."""

    def __init__(self, dim: int):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def residual_projections(self) -> Iterator[nn.Linear]:
        yield self.out

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        tokens = layout.sizes(x)[:, None, None] / x.shape[2]

        def mix(z: Tensor, added: Tensor | None = None) -> Tensor:
            return self.out(layout.keep(z).sum(1, keepdim=True) / tokens).expand_as(z)

        return mix


@dataclass(frozen=True)
class MeanConfig(MixerConfig):
    def build(self, dim: int, dropout_policy: str) -> Mean:
        return Mean(dim)


@pytest.fixture(autouse=True)
def mean(monkeypatch):
    monkeypatch.setitem(MIXERS, "mean", MeanConfig)


def build(task, family, **settings):
    torch.manual_seed(0)
    model = MODEL_REGISTRY[family]
    return model.build_model(model.config_class()(**{**SHAPE, "mixer": "mean", **settings}), task)


@pytest.mark.parametrize(
    "family, settings", [(family, settings) for family, each in FAMILIES.items() for settings in each], ids=str
)
def test_every_family_takes_it_by_its_name(task, tokens, family, settings):
    model = build(task, family, **settings)
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    assert mixers and all(isinstance(mixer, Mean) for mixer in mixers)
    logits, extra = model.train()(tokens)
    (logits[tokens.ne(1)].square().mean() + sum(extra["output"].penalties.values())).backward()
    reached = [parameter.grad is not None and parameter.grad.any() for parameter in mixers[0].parameters()]
    assert all(reached) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.no_grad():
        together = model(tokens, features_only=True)[0]
        changed = tokens.clone()
        changed[0, 5] += 1
        assert not torch.allclose(model(changed, features_only=True)[0][0, 9], together[0, 9], atol=1e-6)
        for row, length in enumerate((12, 9, 5)):
            alone = model(tokens[row : row + 1, :length], features_only=True)[0]
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=2e-3)


def test_the_starts_of_its_projections_are_those_of_any_residual_branch(task):
    wide = dict(encoder_embed_dim=64, encoder_layers=3)
    for family, start, std in (
        ("ode_bert", "depth-scaled", 0.02 / 6**0.5),
        ("neural_ode_bert", "depth-scaled", 0.02 / 6**0.5),
        ("deq_bert", "depth-scaled", 0.02 / 2**0.5),
        ("ode_bert", "identity", 0.0),
        ("deq_bert", "identity", 0.0),
    ):
        model = build(task, family, encoder_init=start, **wide)
        weights = torch.cat([each.out.weight.flatten() for each in model.modules() if isinstance(each, Mean)])
        assert weights.std().item() == pytest.approx(std, rel=0.05, abs=1e-12), (family, start)


def test_on_the_command_line(fairseq_train, toy_flags, tmp_path):
    run = fairseq_train(*toy_flags, "--mixer", "mean", "--max-update", 2, "--save-dir", tmp_path)
    assert len(run.losses()) == 2
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert stored["cfg"]["model"]["mixer"] == "mean"
    assert not [name for name in stored["model"] if ".qkv." in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_name_lists_the_right_ones(task, family):
    with pytest.raises(ValueError, match="--mixer: 'median' is unknown: choose one of attention, mean"):
        build(task, family, mixer="median")


def test_an_injection_that_it_does_not_take_is_refused(task):
    with pytest.raises(ValueError, match="--deq-qkv-injection: what mixes the tokens here takes nothing in"):
        build(task, "deq_bert", deq_qkv_injection=True)
