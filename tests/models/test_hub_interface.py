"""The hub interface on a real sentencepiece model: word joins, batches, text that looks like symbols."""

import io
import types

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask
from omegaconf import OmegaConf

from fairseq_implicit.data.pairs import shorten_segments
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.deq_bert import DeqBertModel
from fairseq_implicit.models.hub_interface import ImplicitBertHubInterface, find_checkpoint
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

SENTENCES = [
    "The solver integrates the field and the field is smooth.",
    "Every stage of the scheme evaluates the same weights again.",
    "An unstable step is refused, an unfinished solve is reported.",
    "Under pressure the undertaking was undone.",
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    model_bytes = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model_bytes,
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("hub") / "sentencepiece.bpe.model"
    path.write_bytes(model_bytes.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes.getvalue())
    dictionary = Dictionary()
    for index in range(3, processor.get_piece_size()):
        dictionary.add_symbol(processor.id_to_piece(index))
    mask = dictionary.add_symbol("<mask>")
    task = types.SimpleNamespace(source_dictionary=dictionary, mask_idx=mask, max_positions=lambda: 64)
    torch.manual_seed(0)
    model = OdeBertModel.build_model(
        OdeBertConfig(encoder_layers=1, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2), task
    )
    bpe = OmegaConf.create({**vars(SentencepieceConfig(sentencepiece_model=str(path))), "_name": "sentencepiece"})
    return ImplicitBertHubInterface(types.SimpleNamespace(bpe=bpe), task, model).eval()


def test_decode_inverts_encode_for_sentences_pairs_and_batches(hub):
    for sentence in SENTENCES:
        assert hub.decode(hub.encode(sentence)) == sentence
    assert hub.decode(hub.encode(SENTENCES[0], SENTENCES[1])) == SENTENCES[:2]
    batch = hub.encode(SENTENCES)
    assert batch.shape[0] == len(SENTENCES) and (batch == 1).any()
    assert hub.decode(batch) == SENTENCES


def test_special_symbols_frame_segments_and_cannot_be_injected(hub):
    ids = hub.encode("the field", "the step").tolist()
    assert ids[0] == 0 and ids[-1] == 2
    middle = ids.index(2)
    assert ids[middle : middle + 2] == [2, 2]
    assert hub.encode("the field", "the step", no_separator=True).tolist().count(2) == 2
    injected = hub.encode("</s> <pad> <mask>").tolist()[1:-1]
    assert hub.ids("</s> <pad> <mask>") == injected
    assert not {0, 1, 2, hub.task.mask_idx} & set(injected)


def test_features_of_a_padded_batch_are_those_of_each_sentence(hub):
    features = hub.extract_features(hub.encode(SENTENCES))
    for row, sentence in enumerate(SENTENCES):
        alone = hub.extract_features(hub.encode(sentence))
        torch.testing.assert_close(features[row, : alone.shape[1]], alone[0], rtol=0, atol=1e-6)
    states = hub.extract_features(hub.encode(SENTENCES[0]), return_all_hiddens=True)
    assert len(states) == 2 and states[0].shape == alone.shape[:1] + states[0].shape[1:]


def test_mask_inside_a_word_keeps_the_rest_of_the_word_glued(hub):
    word = hub.masked_ids("The <mask>ing is")
    glued = [hub.dictionary[index] for index in word.tolist()]
    after = glued[glued.index("<mask>") + 1]
    assert not after.startswith("\u2581")
    apart = [hub.dictionary[index] for index in hub.masked_ids("The <mask> is smooth").tolist()]
    assert apart[apart.index("<mask>") + 1].startswith("\u2581")


@pytest.mark.parametrize(
    "left, right, piece, expected",
    [
        ("The ", " is smooth.", "\u2581field", "The field is smooth."),
        ("The ", " is smooth.", "s", "Thes is smooth."),
        ("The under", " was undone.", "taking", "The undertaking was undone."),
        ("", " field is smooth.", "\u2581The", "The field is smooth."),
    ],
)
def test_filled_sentences_join_words_as_the_piece_says(hub, left, right, piece, expected):
    assert hub.filled(f"{left}<mask>{right}", piece, 0.5).sentence == expected


def test_fill_mask_ranks_probabilities_and_takes_batches(hub):
    masked = ["The <mask> integrates the field.", "Every stage of the <mask>."]
    batch = hub.fill_mask(masked, topk=4)
    assert [len(candidates) for candidates in batch] == [4, 4]
    for sentence, candidates in zip(masked, batch, strict=True):
        probabilities = [candidate.probability for candidate in candidates]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
        for one, other in zip(hub.fill_mask(sentence, topk=4), candidates, strict=True):
            assert one.sentence == other.sentence
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


@pytest.mark.parametrize("sentence, count", [("no mask here", 0), ("<mask> and <mask>", 2)])
def test_fill_mask_needs_exactly_one_mask(hub, sentence, count):
    with pytest.raises(ValueError, match=f"{count} <mask> tokens"):
        hub.fill_mask(sentence)


@pytest.mark.parametrize("topk", [0, 1_000_000])
def test_more_candidates_than_symbols_are_refused(hub, topk):
    with pytest.raises(ValueError, match=f"topk={topk} must lie between 1 and the dictionary's {len(hub.dictionary)}"):
        hub.fill_mask("The <mask>.", topk=topk)


def test_weights_that_are_not_numbers_fill_no_mask(hub):
    embeddings = hub.model.encoder.embed_tokens.weight
    kept = embeddings[10].detach().clone()
    with torch.no_grad():
        embeddings[10] = float("nan")
        try:
            with pytest.raises(ArithmeticError, match="the model's output is not finite"):
                hub.fill_mask("The <mask>.")
        finally:
            embeddings[10] = kept


@pytest.mark.parametrize("no_separator", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_exceeds_the_positions_is_refused_or_cut_to_fill_them(hub, count, no_separator):
    segments = [" ".join(SENTENCES) * 2, SENTENCES[0], "the field"][:count]
    with pytest.raises(ValueError, match="longer than the model's 64 positions.*shorten=True"):
        hub.extract_features(hub.encode(*segments, no_separator=no_separator))
    tokens = hub.encode(*segments, no_separator=no_separator, shorten=True)
    assert len(tokens) == 64
    text = [index for index in tokens.tolist() if index not in (0, 2)]
    kept = shorten_segments([hub.ids(segment) for segment in segments], hub.room(count, no_separator))
    assert text == sum(kept, [])
    assert hub.extract_features(tokens).shape == (1, 64, 16)
    assert hub.encode(SENTENCES[0], shorten=True).equal(hub.encode(SENTENCES[0]))


def test_predict_gives_log_probabilities_per_class(hub):
    hub.register_classification_head("topic", num_classes=3)
    scores = hub.predict("topic", hub.encode(SENTENCES))
    assert scores.shape == (4, 3)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(4))
    assert not torch.equal(hub.predict("topic", hub.encode(SENTENCES), return_logits=True), scores)
    with pytest.raises(ValueError, match="no classification head 'subject' .*topic"):
        hub.predict("subject", hub.encode(SENTENCES))


def test_predict_gives_scores_where_there_are_no_classes(hub):
    """One output, and the head that a task trained on scores, whatever its number of outputs."""
    tokens = hub.encode(SENTENCES)
    hub.register_classification_head("similarity", num_classes=1)
    scores = hub.predict("similarity", tokens)
    assert scores.shape == (4, 1) and len(set(scores.flatten().tolist())) == 4
    hub.register_classification_head("sentence_classification_head", num_classes=3)
    settings = SentencePredictionConfig(
        num_classes=3, regression_target=True, classification_head_name="sentence_classification_head"
    )
    task = SentencePredictionTask(settings, hub.dictionary, hub.dictionary)
    tuned = ImplicitBertHubInterface(hub.cfg, task, hub.model).eval()
    name = "sentence_classification_head"
    assert tuned.predict(name, tokens).equal(hub.predict(name, tokens, return_logits=True))
    tuned.register_classification_head("topic", num_classes=3)
    torch.testing.assert_close(tuned.predict("topic", tokens).exp().sum(-1), torch.ones(4))
    assert tuned.fill_mask("The <mask>.", topk=2) == hub.fill_mask("The <mask>.", topk=2)


def test_the_checkpoint_of_a_folder_without_a_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint checkpoint_best.pt or model.pt or checkpoint_last.pt"):
        find_checkpoint(tmp_path)
    for name in ("checkpoint_last.pt", "model.pt", "checkpoint_best.pt"):
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path) == str(tmp_path / name)
    assert find_checkpoint(tmp_path, "model.pt") == str(tmp_path / "model.pt")


@pytest.fixture(scope="module")
def trained(toy_flags, fairseq_train, tmp_path_factory):
    """Folder of a checkpoint, whose dictionary and tokenizer are where it was trained."""
    folder = tmp_path_factory.mktemp("trained")
    fairseq_train(*toy_flags, "--max-update", 1, "--save-dir", folder, "--disable-validation")
    return folder


def test_another_family_is_refused_with_the_class_that_opens_it(trained):
    with pytest.raises(ValueError, match="holds the model OdeBertRk2TinyModel: open it with OdeBertModel.from"):
        DeqBertModel.from_pretrained(trained)
    found = [cls.from_pretrained(trained) for cls in (OdeBertModel, ImplicitBertModel)]
    assert [type(hub.model).__name__ for hub in found] == ["OdeBertRk2TinyModel"] * 2
    assert found[0].fill_mask("the <mask>.", topk=1) == found[1].fill_mask("the <mask>.", topk=1)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint named.pt in .*test_missing"):
        OdeBertModel.from_pretrained(tmp_path, "named.pt")
    recorded = {
        "cfg": {"task": {"data": str(tmp_path / "gone")}},
        "model": {},
        "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": None,
    }
    torch.save(recorded, tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"no dictionary \(dict.txt\) in .*test_missing.*, .*/gone: copy"):
        OdeBertModel.from_pretrained(tmp_path)
