"""RoBERTa's published form (a Namespace, GPT-2's byte pairs, dict.txt by frequency) through converter and hub."""

import argparse
import json
import sys

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.models.roberta import RobertaModel

from examples.glue import binarise
from fairseq_implicit.commands.checkpoint_flags import model_flags
from fairseq_implicit.commands.convert import convert
from fairseq_implicit.evaluation.checkpoints import write
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.ode_bert import OdeBertModel

BYTE_PAIRS = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
MERGES = "t h|th e|Ġ the|Ġ s|o l|Ġs ol|v e|Ġsol ve|Ġsolve r|i n|Ġ f|Ġf i|e l|Ġfi el|Ġfiel d|in g".split("|")
TEXTS = ["The solver integrates the field.", "naïve 数 😀 solving", "  two  spaces, and\na line", "<mask> </s> <pad>"]


def write_byte_pairs(folder):
    """encoder.json, vocab.bpe and a dict.txt in another order, with a made-up word, as the published files have."""
    pieces = list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in MERGES]
    (folder / "encoder.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "dict.txt").write_text("".join(f"{number} 1\n" for number in order) + "madeupword0000 0\n")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as the archives of RoBERTa unpack, with random weights."""
    folder = tmp_path_factory.mktemp("roberta published")
    write_byte_pairs(folder)
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    dictionary.add_symbol("<mask>")
    arguments = argparse.Namespace(
        arch="roberta_base", task="masked_lm", criterion="masked_lm", data="/gone", encoder_layers=2,
        encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2, max_positions=64,
        tokens_per_sample=64, sample_break_mode="none",
    )  # fmt: skip
    torch.manual_seed(0)
    task = argparse.Namespace(source_dictionary=dictionary)
    model = RobertaModel.build_model(argparse.Namespace(**vars(arguments)), task)
    with torch.no_grad():
        model.encoder.lm_head.bias.normal_()
    state = {
        "args": arguments,
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, folder / "model.pt")
    return folder


@pytest.fixture(scope="module")
def theirs(published):
    files = {flag: str(published / name) for flag, name in BYTE_PAIRS.items()}
    return RobertaModel.from_pretrained(str(published), "model.pt", str(published), bpe="gpt2", **files).eval()


@pytest.fixture(scope="module")
def converted(published):
    write(convert(str(published / "model.pt"))[1], str(published / "ode_bert.pt"))
    return published / "ode_bert.pt"


@pytest.fixture(scope="module")
def ours(converted):
    return OdeBertModel.from_pretrained(converted.parent, converted.name)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_fairseqs_roberta(ours, theirs, text):
    ids = ours.encode(text)
    assert ids.equal(theirs.encode(text))
    assert ours.decode(ids) == text
    pair = ours.encode(text, TEXTS[0])
    assert pair.equal(theirs.encode(text, TEXTS[0])) and ours.decode(pair) == [text, TEXTS[0]]


@pytest.mark.parametrize("masked", ["The <mask> integrates the field.", "<mask> solver", "solv<mask> the field"])
def test_masks_are_filled_as_by_fairseqs_roberta(ours, theirs, masked):
    expected = theirs.fill_mask(masked, topk=5)
    filled = ours.fill_mask(masked, topk=5)
    assert [one.token for one in filled] == [token for _, _, token in expected]
    torch.testing.assert_close(
        [one.probability for one in filled], [probability for _, probability, _ in expected], rtol=0, atol=1e-6
    )
    everything = ours.fill_mask(masked, topk=len(ours.dictionary))
    assert "madeupword0000" in {one.token for one in everything}, "a symbol that is no number must not stop the rest"


def test_features_agree(ours, theirs):
    tokens = ours.encode(TEXTS[0])
    torch.testing.assert_close(ours.extract_features(tokens), theirs.extract_features(tokens), rtol=0, atol=1e-5)


def test_files_may_be_named_and_stand_elsewhere(converted, ours, tmp_path):
    moved = tmp_path / "ode_bert.pt"
    moved.write_bytes(converted.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no dictionary \(dict.txt\)"):
        OdeBertModel.from_pretrained(tmp_path, moved.name, bpe="gpt2")
    found = OdeBertModel.from_pretrained(tmp_path, moved.name, str(converted.parent), bpe="gpt2")
    assert found.encode(TEXTS[0]).equal(ours.encode(TEXTS[0]))
    files = {flag: str(converted.parent / name) for flag, name in BYTE_PAIRS.items()}
    (tmp_path / "dict.txt").write_bytes((converted.parent / "dict.txt").read_bytes())
    found = OdeBertModel.from_pretrained(tmp_path, moved.name, **files)
    assert found.encode(TEXTS[0]).equal(ours.encode(TEXTS[0]))


def test_what_does_not_belong_together_is_refused(converted, tmp_path):
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):
        (tmp_path / name).write_bytes((converted.parent / name).read_bytes())
    (tmp_path / "model.pt").write_bytes(converted.read_bytes())
    with pytest.raises(ValueError, match="'bytes' is not supported: choose sentencepiece or hf_tokenizer or gpt2"):
        OdeBertModel.from_pretrained(tmp_path, bpe="bytes")
    with pytest.raises(ValueError, match="not the files of one tokenizer"):
        OdeBertModel.from_pretrained(tmp_path, bpe="gpt2", sentencepiece_model="spm.model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer \(sentencepiece.bpe.model\)"):
        OdeBertModel.from_pretrained(tmp_path, bpe="sentencepiece")
    rows = (tmp_path / "dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("".join(f"piece{row}\n" for row in rows))
    with pytest.raises(ValueError, match="holds none of the numbers"):
        OdeBertModel.from_pretrained(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ValueError, match="belong to different models"):
        OdeBertModel.from_pretrained(tmp_path)


def test_the_published_checkpoint_itself_is_sent_to_the_converter(published):
    with pytest.raises(ValueError, match="fairseq-implicit convert"):
        ImplicitBertModel.from_pretrained(published, "model.pt")


def test_the_dial_says_which_model_it_is(published, command):
    """Such a checkpoint names it by its --arch alone."""
    status, _, said = command("depth-sweep", published / "model.pt", "data")
    assert status == 1 and "the checkpoint holds roberta_base: the dial turns" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("place", ["no/such/folder/out.pt", "full"])
def test_a_failing_save_is_one_sentence(published, command, monkeypatch, tmp_path, place):
    if place == "full":
        monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("unexpected pos 64 vs 0")))
    status, _, said = command("convert", published / "model.pt", tmp_path / place)
    assert status == 1 and "cannot be written" in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_glue_recipe_takes_them(converted, fairseq_train, monkeypatch, tmp_path):
    """Ids of the hub in the data folder, the converted weights under the flags, and the result opens with its files."""
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/classes").write_text("0\n1\n")
    pairs = [("the solver", "solves " * 60), ("naïve 数 😀", "the field")]
    for split in ("train", "valid"):
        for part, column in (("input0", 0), ("input1", 1)):
            (tmp_path / f"lines/{split}.{part}").write_text("".join(f"{pair[column]}\n" for pair in pairs))
        (tmp_path / f"lines/{split}.label").write_text("0\n1\n")
    source = tmp_path / "public"  # only the converted weights, not those they were made from
    source.mkdir()
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):
        (source / name).write_bytes((converted.parent / name).read_bytes())
    (source / "model.pt").write_bytes(converted.read_bytes())
    argv = [str(tmp_path / "lines"), "--pretrained", str(source), "--out", str(tmp_path / "bin")]
    monkeypatch.setattr(sys, "argv", ["binarise", *argv])
    binarise.main()
    log = fairseq_train(
        *(tmp_path / "bin", *model_flags(str(source / "model.pt")), "--finetune-from-model", source / "model.pt"),
        *"--task sentence_prediction --criterion sentence_prediction --num-classes 2 --init-token 0".split(),
        *"--separator-token 2 --optimizer adam --lr 0 --batch-size 1 --required-batch-size-multiple 1".split(),
        *("--max-update", 2, "--save-dir", tmp_path / "tuned"),
    )
    assert "Loaded checkpoint" in log.text and log.metrics("valid")[-1]["valid_nll_loss"] > 0
    tuned = ImplicitBertModel.from_pretrained(tmp_path / "tuned")
    ours = OdeBertModel.from_pretrained(source)
    for pair in pairs:
        tokens = tuned.encode(*pair, shorten=True)
        assert tokens.equal(ours.encode(*pair, shorten=True)) and len(tokens) <= 64
        torch.testing.assert_close(tuned.extract_features(tokens), ours.extract_features(tokens))
    assert tuned.predict("sentence_classification_head", tokens).shape == (1, 2)
