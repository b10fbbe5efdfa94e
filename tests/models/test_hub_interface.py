"""The hub interface on a real sentencepiece model: word joins, batches, text that looks like symbols."""

import io
import types

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from omegaconf import OmegaConf

from fairseq_implicit.models.hub_interface import ImplicitBertHubInterface
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
    assert not {0, 1, 2, hub.task.mask_idx} & set(injected)


def test_features_of_a_padded_batch_are_those_of_each_sentence(hub):
    features = hub.extract_features(hub.encode(SENTENCES))
    for row, sentence in enumerate(SENTENCES):
        alone = hub.extract_features(hub.encode(sentence))
        torch.testing.assert_close(features[row, : alone.shape[1]], alone[0], rtol=0, atol=1e-6)
    states = hub.extract_features(hub.encode(SENTENCES[0]), return_all_hiddens=True)
    assert len(states) == 2 and states[0].shape == alone.shape[:1] + states[0].shape[1:]


def test_mask_inside_a_word_keeps_the_rest_of_the_word_glued(hub):
    word = hub._masked_ids("The ", "ing is")
    glued = [hub.dictionary[index] for index in word.tolist()]
    after = glued[glued.index("<mask>") + 1]
    assert not after.startswith("\u2581")
    apart = [hub.dictionary[index] for index in hub._masked_ids("The ", " is smooth").tolist()]
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
    assert hub._filled(left, right, piece, 0.5).sentence == expected


def test_fill_mask_ranks_probabilities_and_takes_batches(hub):
    masked = ["The <mask> integrates the field.", "Every stage of the <mask>."]
    batch = hub.fill_mask(masked, topk=4)
    assert [len(candidates) for candidates in batch] == [4, 4]
    for sentence, candidates in zip(masked, batch):
        probabilities = [candidate.probability for candidate in candidates]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
        for one, other in zip(hub.fill_mask(sentence, topk=4), candidates):
            assert one.sentence == other.sentence
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


@pytest.mark.parametrize("sentence, count", [("no mask here", 0), ("<mask> and <mask>", 2)])
def test_fill_mask_needs_exactly_one_mask(hub, sentence, count):
    with pytest.raises(ValueError, match=f"{count} <mask> tokens"):
        hub.fill_mask(sentence)


def test_predict_gives_log_probabilities_per_class(hub):
    hub.register_classification_head("topic", num_classes=3)
    scores = hub.predict("topic", hub.encode(SENTENCES))
    assert scores.shape == (4, 3)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(4))
    assert not torch.equal(hub.predict("topic", hub.encode(SENTENCES), return_logits=True), scores)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*model.pt"):
        OdeBertModel.from_pretrained(tmp_path)
    recorded = {
        "cfg": {"task": {"data": str(tmp_path / "gone")}},
        "model": {},
        "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": None,
    }
    torch.save(recorded, tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"no dictionary \(dict.txt\) in"):
        OdeBertModel.from_pretrained(tmp_path)
