"""The loss is fairseq's; what the depth adds enters the gradient and the log, and never the logged loss."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics, progress_bar

from fairseq_implicit.compat.outputs import for_fairseq
from fairseq_implicit.criterions.implicit_masked_lm import ImplicitMaskedLMCriterion
from fairseq_implicit.networks.output import ModelOutput

PAD, VOCABULARY = 1, 11


class FixedModel(torch.nn.Module):
    """Returns stored logits at the masked positions, as the models of the package do."""

    def __init__(self, logits, **reported):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.reported = reported
        self.seen = "nothing"

    def forward(self, src_tokens, masked_tokens=None, **unused):
        self.seen = masked_tokens
        select = (lambda x: x) if masked_tokens is None else (lambda x: x[masked_tokens])
        auxiliary = [(weight, select(logits)) for weight, logits in self.reported.get("auxiliary", [])]
        return for_fairseq(ModelOutput(select(self.logits), **{**self.reported, "auxiliary": auxiliary}))


@pytest.fixture
def criterion():
    return ImplicitMaskedLMCriterion(None, SimpleNamespace(target_dictionary=Dictionary()))


def batch(masked=((0, 1), (1, 0), (1, 3))):
    torch.manual_seed(0)
    tokens = torch.randint(4, VOCABULARY, (2, 4))
    target = torch.full_like(tokens, PAD)
    for position in masked:
        target[position] = tokens[position]
    return {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": 8, "nsentences": 2}


def logits(seed=1):
    return torch.randn(2, 4, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(scores, sample):
    """Sum of -log softmax at the masked positions."""
    total = 0.0
    for row, column in (sample["target"] != PAD).nonzero().tolist():
        weights = scores[row, column].exp()
        total -= (weights[sample["target"][row, column]] / weights.sum()).log()
    return total


def logged(*outputs):
    metrics.reset()
    with metrics.aggregate() as meters:
        ImplicitMaskedLMCriterion.reduce_metrics(list(outputs))
    return meters.get_smoothed_values()


def test_loss_and_accuracy_by_hand(criterion):
    sample, scores = batch(), logits()
    loss, sample_size, output = criterion(FixedModel(scores), sample)
    assert loss.item() == pytest.approx(by_hand(scores, sample).item(), abs=1e-12)
    assert sample_size == 3
    correct = sum(scores[i, j].argmax() == sample["target"][i, j] for i, j in ((0, 1), (1, 0), (1, 3)))
    values = logged(output)
    assert values["loss"] == pytest.approx(loss.item() / 3 / math.log(2), abs=5e-4)
    assert values["ppl"] == pytest.approx(2 ** values["loss"], abs=0.01)
    assert values["accuracy"] == pytest.approx(100 * correct.item() / 3, abs=0.01)


def test_equals_fairseqs_criterion_on_fairseqs_roberta(toy_data):
    from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
    from fairseq.data import Dictionary
    from fairseq.models.roberta import RobertaModel, base_architecture

    from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMConfig, ImplicitMaskedLMTask

    task = ImplicitMaskedLMTask(
        ImplicitMaskedLMConfig(data=toy_data, tokens_per_sample=32, seed=1), Dictionary.load(f"{toy_data}/dict.txt")
    )
    blocks = task.load_dataset("valid")
    sample = blocks.collater([blocks[i] for i in range(6)])
    torch.manual_seed(0)
    args = SimpleNamespace(
        encoder_layers=1, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2, max_positions=32
    )
    base_architecture(args)
    model = RobertaModel.build_model(args, task).eval()
    theirs = MaskedLmLoss(MaskedLmConfig(tpu=False), task)(model, sample)
    ours = ImplicitMaskedLMCriterion(None, task)(model, sample)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert {key: ours[2][key] for key in theirs[2]} == theirs[2]


def test_penalties_and_auxiliary_states_enter_the_gradient_only(criterion):
    sample, scores, other = batch(), logits(), logits(2).requires_grad_()
    penalty = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    plain = criterion(FixedModel(scores), sample)[2]
    model = FixedModel(scores, penalties={"consistency": penalty}, auxiliary=[(0.5, other)], statistics={"residual": 2})
    loss, sample_size, output = criterion(model, sample)
    expected = by_hand(scores, sample) + 0.5 * by_hand(other, sample) + 3 * 0.25
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    assert penalty.grad == 3  # fairseq divides by the sample size
    assert other.grad.abs().sum() > 0
    assert output["loss"] == plain["loss"]
    values = logged(output, output)
    assert values["consistency"] == 0.25 and values["residual"] == 2
    assert values["auxiliary_loss"] == pytest.approx(0.5 * by_hand(other, sample).item() / 3 / math.log(2), abs=5e-4)


def test_statistics_are_averaged_over_batches_and_may_be_summed_across_workers(criterion):
    sample = batch()
    outputs = [criterion(FixedModel(logits(), statistics={"evaluations": n}), sample)[2] for n in (4, 6, 8)]
    separate = logged(*outputs)
    summed = {key: sum(output[key] for output in outputs) for key in outputs[0]}
    assert separate["evaluations"] == 6
    assert logged(summed) == separate
    assert ImplicitMaskedLMCriterion.logging_outputs_can_be_summed() is True
    ignored = {key: 0 * value for key, value in outputs[0].items()}  # a dummy batch of a rank that ran out of data
    assert logged(*outputs, ignored) == separate


def test_a_batch_without_masks(criterion):
    sample = batch(masked=())
    model = FixedModel(logits(), statistics={"evaluations": 1})
    loss, sample_size, output = criterion(model, sample)
    assert model.seen is None  # as fairseq does on a CPU
    assert loss.item() == 0 and sample_size == 0
    loss.backward()
    values = logged(output)
    assert values["loss"] == 0 and values["evaluations"] == 1
    assert values["loss"] == values["loss"]


def test_head_runs_at_masked_positions_only(criterion):
    sample = batch()
    model = FixedModel(logits())
    criterion(model, sample)
    assert torch.equal(model.seen, sample["target"] != PAD)


def test_half_precision_logits_are_summed_in_float32(criterion):
    sample, scores = batch(), logits().float()
    loss, _, _ = criterion(FixedModel(scores.bfloat16()), sample)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(scores.bfloat16().double(), sample).item(), rel=1e-6)


def test_refuses_a_statistic_with_a_taken_name(criterion):
    with pytest.raises(ValueError, match="'loss', which is taken"):
        criterion(FixedModel(logits(), statistics={"loss": 1.0}), batch())
    twice = FixedModel(logits(), statistics={"x": 1.0}, penalties={"x": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="'x', which is taken"):
        criterion(twice, batch())


def test_text_bars_show_few_statistics_and_json_all(criterion, caplog):
    statistics = {"evaluations": 4, "state_rms": 1.5}
    statistics.update({f"block{i}/state_rms": 1.0 for i in range(12)})
    values = logged(criterion(FixedModel(logits(), statistics=statistics), batch())[2])
    assert set(statistics) < set(values)
    with caplog.at_level(logging.INFO, logger=progress_bar.logger.name):
        for name in ("simple", "json"):
            progress_bar.progress_bar([0], log_format=name, epoch=1).print(dict(values), tag="train", step=1)
    text, json = [record.getMessage() for record in caplog.records]
    assert "state_rms 1.5" in text and "block" not in text
    assert all(name in json for name in statistics)
