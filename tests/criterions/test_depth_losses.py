"""Penalties and corrected states train under criterions that know nothing of them."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from fairseq.data import Dictionary
from torch.nn import functional

from fairseq_implicit.criterions.depth_losses import WithDepthLosses
from fairseq_implicit.criterions.implicit_masked_lm import ImplicitMaskedLMCriterion
from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertConfig, NeuralOdeBertModel

QUIET = dict(
    encoder_layers=1, encoder_embed_dim=8, encoder_ffn_embed_dim=16, encoder_attention_heads=2, dropout=0.0,
    attention_dropout=0.0, max_positions=16,
)  # fmt: skip
CORRECTED = dict(
    deq_jacobian_weight=0.5, deq_correction="2,4", deq_correction_weight=0.7, deq_max_iter=8, deq_tol=1e-6,
    deq_allow_nonconvergent=True, deq_monitor_interval=0,
)  # fmt: skip


@pytest.fixture
def task():
    dictionary = Dictionary()
    for index in range(20):
        dictionary.add_symbol(f"piece{index}")
    dictionary.add_symbol("<mask>")
    labels = SimpleNamespace(nspecial=4)
    return SimpleNamespace(
        source_dictionary=dictionary, target_dictionary=dictionary, label_dictionary=labels, cfg=None
    )  # fmt: skip


@pytest.fixture
def deq(task):
    torch.manual_seed(0)
    return DeqBertModel.build_model(DeqBertConfig(**QUIET, **CORRECTED), task).train()


@pytest.fixture
def batch():
    tokens = torch.randint(4, 24, (3, 7), generator=torch.Generator().manual_seed(1))
    target = torch.full_like(tokens, 1)
    target[0, 2] = target[1, 5] = target[2, 0] = 9
    return {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": 21, "nsentences": 3}


def loss_and_gradients(criterion, model, sample):
    torch.manual_seed(5)  # of the estimate of the Jacobian
    model.zero_grad()
    loss, sample_size, logged = criterion(model, sample)
    (loss / sample_size).backward()
    return float(loss), {name: weight.grad for name, weight in model.named_parameters()}, float(logged["loss"])


def test_fairseqs_masked_lm_trains_as_our_own_criterion(deq, task, batch):
    ours, expected, logged = loss_and_gradients(ImplicitMaskedLMCriterion(None, task), deq, batch)
    theirs = MaskedLmLoss(MaskedLmConfig(), task)
    found, gradients, also_logged = loss_and_gradients(WithDepthLosses(theirs), deq, batch)
    bare, _, _ = loss_and_gradients(theirs, deq, batch)
    assert found == pytest.approx(ours, rel=1e-6) and bare == pytest.approx(logged, rel=1e-6) == also_logged
    assert abs(found - bare) > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_sentence_prediction_pays_penalties_and_judges_corrected_states(deq, task, batch):
    deq.register_classification_head("sentence_classification_head", 2)
    sample = {**batch, "target": torch.tensor([[0], [1], [1]])}
    criterion = SentencePredictionCriterion(SentencePredictionConfig(), task)
    torch.manual_seed(5)
    scores, extra = deq(**batch["net_input"], classification_head_name="sentence_classification_head")
    output = extra["output"]
    expected = functional.cross_entropy(scores, sample["target"].squeeze(1), reduction="sum")
    assert [round(weight, 4) for weight, _ in output.auxiliary] == [0.56, 0.7]
    for weight, other in output.auxiliary:
        expected = expected + weight * functional.cross_entropy(other, sample["target"].squeeze(1), reduction="sum")
    expected = expected + 3 * output.penalties["jacobian_penalty"]
    found, _, _ = loss_and_gradients(WithDepthLosses(criterion), deq, sample)
    assert found == pytest.approx(float(expected), rel=1e-5)


class Twice(torch.nn.Module):
    """Calls the model for clean and for noisy inputs, as r3f does."""

    def forward(self, model, sample):
        first, _ = model(**sample["net_input"], features_only=True)
        other, _ = model(**sample["net_input"], features_only=True)
        return (first - other).square().sum(), 3, {"loss": 0.0}


def test_a_criterion_that_calls_the_model_twice_pays_once(task, batch):
    torch.manual_seed(0)
    config = NeuralOdeBertConfig(**QUIET, ode_kinetic_energy=2.0)
    model = NeuralOdeBertModel.build_model(config, task).train()
    energy = model(**batch["net_input"], features_only=True)[1]["output"].penalties["kinetic_energy"]
    loss, _, _ = WithDepthLosses(Twice())(model, batch)
    assert float(loss) == pytest.approx(3 * float(energy), rel=1e-5) and float(energy) > 0


def test_corrected_states_of_two_calls_are_refused(deq, batch):
    with pytest.raises(ValueError, match="Twice calls the model 2 times .* leave --deq-correction out"):
        WithDepthLosses(Twice())(deq, batch)


def test_models_without_a_depth_are_left_alone(batch):
    class Plain(torch.nn.Module):
        def forward(self, src_tokens, features_only):
            return src_tokens.float(), None

    loss, size, log = WithDepthLosses(Twice())(Plain(), batch)
    assert (float(loss), size, log) == (0.0, 3, {"loss": 0.0})


def test_fairseq_train_pays_and_logs_them(toy_flags, fairseq_train, tmp_path):
    flags = [
        *toy_flags, *"--arch neural_ode_bert_tiny --criterion masked_lm --max-update 2 --disable-validation".split(),
        "--no-save", "--save-dir", tmp_path,
    ]  # fmt: skip
    free, paid = (fairseq_train(*flags, "--ode-kinetic-energy", weight) for weight in (0, 50))
    assert free.losses()[1] == paid.losses()[1] and free.losses()[2] != paid.losses()[2]
    assert all(stats["kinetic_energy"] > 0 for stats in paid.metrics("train_inner"))
