"""A mixer of a user's own: one class, one configuration, one name, at once in every family."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from fairseq.models import MODEL_REGISTRY
from torch import Tensor, nn

from fairseq_implicit.fields.mixers import MIXERS
from fairseq_implicit.fields.mixers.attention import MultiHeadAttention
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


@pytest.mark.parametrize("family, settings", [("ode_bert", {}), ("neural_ode_bert", {"ode_depth_weights": "linear"}),
                                              ("deq_bert", {})])  # fmt: skip
def test_heads_that_start_at_the_neighbours(task, family, settings):
    """By the positions alone, a head's query is the key of the token that it reads, and it reads that one most."""
    settings = {"mixer": "attention", "encoder_attention_heads": 4, "encoder_embed_dim": 64, **settings}
    network = build(task, family, encoder_position_start="neighbours", **settings).encoder.double()
    positions = network.embed_positions.weight[2:]
    mixers = [module for module in network.modules() if isinstance(module, MultiHeadAttention)]
    assert mixers
    for mixer in mixers:
        queries, keys = ((positions @ part.T).unflatten(1, (4, -1)) for part in mixer.qkv.weight.chunk(3)[:2])
        for head, distance in enumerate((-1, 1, -2, 2)):
            here = torch.arange(4, len(positions) - 4)
            query, key = queries[here, head], keys[:, head]
            torch.testing.assert_close(query, key[here + distance], atol=1e-5, rtol=1e-4)
            assert ((query @ key.T).argmax(1) == here + distance).float().mean() > 0.9
    scale = 0.02 * 64**0.5  # 24 places of a Fourier basis of 64
    torch.testing.assert_close(positions @ positions.T / scale**2, torch.eye(24).double(), atol=1e-5, rtol=0)


def test_on_the_command_line(fairseq_train, toy_flags, tmp_path):
    run = fairseq_train(*toy_flags, "--mixer", "mean", "--max-update", 2, "--save-dir", tmp_path)
    assert len(run.losses()) == 2
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert stored["cfg"]["model"]["mixer"] == "mean"
    assert not [name for name in stored["model"] if ".qkv." in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_name_lists_the_right_ones(task, family):
    with pytest.raises(ValueError, match=f"--mixer: 'median' is unknown: choose one of {', '.join(MIXERS)}"):
        build(task, family, mixer="median")


def test_an_injection_that_it_does_not_take_is_refused(task):
    with pytest.raises(ValueError, match="--deq-qkv-injection: what mixes the tokens here takes nothing in"):
        build(task, "deq_bert", deq_qkv_injection=True)


@pytest.mark.parametrize(
    "other, sentence",
    [
        (dict(mixer="mean", encoder_positions="none"), "12 rows in its embed_positions .* --mixer and --encoder-pos"),
        (dict(mixer="narrow-attention"), r"attention.queries.weight is absent in the checkpoint and of shape"),
        (dict(mixer="attention", attention_qk_norm=True), "query_norm.weight is absent in the checkpoint"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_mixer_is_refused_in_a_sentence(task, other, sentence):
    shape = dict(encoder_attention_heads=2, max_positions=12)
    weights = build(task, "ode_bert", mixer="attention", **shape).state_dict()
    with pytest.raises(ValueError, match=sentence):
        build(task, "ode_bert", **{**shape, **other}).load_state_dict(weights)
