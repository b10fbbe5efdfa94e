"""Our models where fairseq expects a RoBERTa: older tasks, criterions of its examples, its own tests."""

import importlib
import shutil
from argparse import Namespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.tasks import LegacyFairseqTask

from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertConfig, NeuralOdeBertModel
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

FAMILIES = [
    (OdeBertModel, OdeBertConfig),
    (NeuralOdeBertModel, NeuralOdeBertConfig),
    (DeqBertModel, DeqBertConfig),
]
SMALL = dict(encoder_layers=1, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)


class FakeTask(LegacyFairseqTask):
    """As fairseq's tests make them: a dictionary, flags, and no max_positions()."""

    def __init__(self, args):
        super().__init__(args)
        self.dictionary = Dictionary()
        for index in range(20):
            self.dictionary.add_symbol(f"piece{index}")
        self.dictionary.add_symbol("<mask>")

    @property
    def source_dictionary(self):
        return self.dictionary

    target_dictionary = source_dictionary


@pytest.mark.parametrize("model, config", FAMILIES, ids=lambda made: made.__name__)
def test_tasks_that_only_know_tokens_per_sample(model, config):
    built = model.build_model(config(**SMALL), FakeTask(Namespace(tokens_per_sample=19)))
    assert built.max_positions() == 19
    with pytest.raises(ValueError, match="FakeTask sets no length of its inputs: give --max-positions"):
        model.build_model(config(**SMALL), FakeTask(Namespace()))
    assert model.build_model(config(**SMALL, max_positions=7), FakeTask(Namespace())).max_positions() == 7


@pytest.mark.parametrize("model, config", FAMILIES, ids=lambda made: made.__name__)
def test_embeddings_stand_where_roberta_has_them(model, config):
    torch.manual_seed(0)
    built = model.build_model(config(**SMALL, max_positions=9), FakeTask(Namespace())).eval()
    assert built.encoder.sentence_encoder.embed_tokens.weight is built.encoder.lm_head.weight
    assert not any("sentence_encoder" in name for name in built.state_dict())
    tokens = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    embedded = built.encoder.sentence_encoder.embed_tokens(tokens)
    plain, given = built(tokens)[0], built(tokens, token_embeddings=embedded)[0]
    assert torch.equal(plain, given)
    assert not torch.equal(plain, built(tokens, token_embeddings=2 * embedded)[0])


@pytest.mark.parametrize("model, config", FAMILIES, ids=lambda made: made.__name__)
@pytest.mark.parametrize("name", ["segments", "segment_labels", "prev_output_tokens", "src_token"])
def test_an_input_that_a_model_does_not_take_is_refused(model, config, name):
    built = model.build_model(config(**SMALL, max_positions=9), FakeTask(Namespace()))
    tokens = torch.tensor([[0, 5, 2]])
    with pytest.raises(TypeError, match=f"^{model.__name__} takes no {name}: train it with a task and an objective"):
        built(tokens, **{name: torch.zeros_like(tokens)})
    built(tokens, src_lengths=torch.tensor([3]))  # what fairseq's tasks send beside the tokens


@pytest.mark.parametrize("model, config", FAMILIES, ids=lambda made: made.__name__)
def test_segments_are_told_apart_where_a_model_has_types_of_them(model, config):
    built = model.build_model(config(**SMALL, max_positions=9, segment_types=2), FakeTask(Namespace())).eval()
    tokens, first = torch.tensor([[0, 5, 2, 6]]), torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        alone = built(tokens)[0]
        assert torch.equal(built(tokens, segments=first)[0], alone)
        assert not torch.allclose(built(tokens, segments=torch.tensor([[0, 0, 1, 1]]))[0], alone, atol=1e-4)
    with pytest.raises(ValueError, match="--segment-types must be at least 0, got -1"):
        model.build_model(config(**SMALL, max_positions=9, segment_types=-1), FakeTask(Namespace()))


@pytest.mark.parametrize("arch", ["ode_bert_rk2_tiny", "neural_ode_bert_tiny", "deq_bert_tiny"])
def test_multilingual_masked_lm_trains(arch, toy_data, fairseq_train, tmp_path):
    for language in ("de", "en"):
        (tmp_path / "bin" / language).mkdir(parents=True)
        for split in ("train", "valid"):
            for suffix in ("bin", "idx"):
                shutil.copy(f"{toy_data}/{split}.{suffix}", tmp_path / "bin" / language)
    shutil.copy(f"{toy_data}/dict.txt", tmp_path / "bin")
    run = fairseq_train(
        tmp_path / "bin",
        *f"--task multilingual_masked_lm --criterion masked_lm --arch {arch} --tokens-per-sample 32".split(),
        *"--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --batch-size 4".split(),
        *"--optimizer adam --max-update 2 --disable-validation --no-save".split(), "--save-dir", tmp_path,
    )  # fmt: skip
    assert sorted(run.losses()) == [1, 2]


@pytest.fixture(scope="module")
def r3f():
    """The criterion of fairseq's rxf example, which its wheel carries."""
    return importlib.import_module("fairseq.examples.rxf.rxf_src.sentence_prediction_r3f").SentencePredictionR3F


@pytest.mark.parametrize("model, config", FAMILIES, ids=lambda made: made.__name__)
def test_r3f_finds_its_embeddings(model, config, r3f):
    torch.manual_seed(0)
    task = FakeTask(Namespace())
    built = model.build_model(config(**SMALL, max_positions=9), task).train()
    built.register_classification_head("sentence_classification_head", 2)
    criterion = r3f(task, 1e-2, 1.0, "normal", "sentence_classification_head", False)
    tokens = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    sample = {
        "net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([4, 3])},
        "target": torch.tensor([[0], [1]]), "ntokens": 7,
    }  # fmt: skip
    loss, sample_size, _ = criterion(built, sample)
    loss.backward()
    gradient = built.encoder.embed_tokens.weight.grad
    assert sample_size == 2 and torch.isfinite(loss) and gradient.isfinite().all() and gradient.abs().sum() > 0
