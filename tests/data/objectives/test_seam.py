"""A new objective: used by its entry in every family of models, through task, batches and criterion."""

import numpy as np
import pytest

from fairseq_implicit.criterions.implicit_masked_lm import ImplicitMaskedLMCriterion
from fairseq_implicit.data.objectives import OBJECTIVES
from fairseq_implicit.data.objectives.objective import Objective, Sample
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel
from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMConfig, ImplicitMaskedLMTask
from fairseq_implicit.text.vocabulary import PAD


class NextTokens(Objective):
    """Every token from those before it, and itself; nothing follows the last."""

    def __call__(self, tokens, rng):
        return Sample(tokens, np.append(tokens[1:], PAD))


class TwoParts(Objective):
    """The first token of the second half, of a sequence that is read backwards."""

    def __call__(self, tokens, rng):
        second = (np.arange(len(tokens)) >= len(tokens) // 2).astype(np.int64)
        begins = np.diff(second, prepend=0) > 0
        return Sample(tokens[::-1], np.where(begins, tokens, PAD), segments=second)


def task_on(toy_data, monkeypatch, objective):
    monkeypatch.setitem(OBJECTIVES, "test-only", objective)
    cfg = ImplicitMaskedLMConfig(data=toy_data, tokens_per_sample=32, objective="test-only", sample_break_mode="eos")
    cfg.seed = 1
    return ImplicitMaskedLMTask.setup_task(cfg)


@pytest.mark.parametrize("arch", ["ode_bert_euler_tiny", "neural_ode_bert_tiny", "deq_bert_tiny"])
def test_it_trains_every_family(arch, toy_flags, fairseq_train, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "next-tokens", NextTokens)
    counted, reduce_metrics = [], ImplicitMaskedLMCriterion.reduce_metrics

    def counting(logs):
        counted.extend([int(log[name]) for name in ("ntokens", "nsentences", "sample_size")] for log in logs)
        reduce_metrics(logs)

    monkeypatch.setattr(ImplicitMaskedLMCriterion, "reduce_metrics", staticmethod(counting))
    run = fairseq_train(
        *toy_flags, "--arch", arch, "--encoder-layers", 2, "--objective", "next-tokens", "--max-update", 2,
        "--max-valid-steps", 1, "--no-save", "--save-dir", tmp_path,
    )  # fmt: skip
    assert sorted(run.losses()) == [1, 2] and len(run.losses("valid")) == 1
    assert len(counted) >= 3 and all(tokens == rows + targets for tokens, rows, targets in counted)


def test_its_parts_reach_the_models_that_take_them_and_others_refuse(toy_data, monkeypatch):
    task = task_on(toy_data, monkeypatch, TwoParts)
    blocks = task.load_dataset("valid")
    order = blocks.ordered_indices()
    batch = blocks.collater([blocks[index] for index in order[[0, len(order) // 2, -1]]])
    for row, index in zip(batch["net_input"]["src_tokens"], batch["id"].tolist(), strict=True):
        assert row[row.ne(PAD)].tolist() == blocks.blocks[index][::-1].tolist()
    segments, lengths = batch["net_input"]["segments"], batch["net_input"]["src_lengths"]
    assert len(set(lengths.tolist())) > 1
    for row, target, length in zip(segments, batch["target"], lengths.tolist(), strict=True):
        assert row.nonzero().squeeze(1).tolist() == list(range(length // 2, length))
        assert target.ne(PAD).nonzero().tolist() == [[length // 2]]
    small = dict(encoder_layers=1, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)
    model = OdeBertModel.build_model(OdeBertConfig(**small), task)
    with pytest.raises(TypeError, match="^OdeBertModel takes no segments: train it with a task and an objective whose"):
        ImplicitMaskedLMCriterion(None, task)(model, batch)
    other = OdeBertModel.build_model(OdeBertConfig(**small, segment_types=2), task)
    loss, targets, _ = ImplicitMaskedLMCriterion(None, task)(other, batch)
    loss.backward()
    assert targets == 3 and other.encoder.embed_segments.weight.grad.abs().sum(1).gt(0).all()
