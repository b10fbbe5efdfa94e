"""Vocabularies of tokenizer.json: the tokenizer's own ids in fairseq's order, for text in and text out."""

import json
import pickle

import numpy as np
import pytest
from fairseq.data import encoders
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fairseq_implicit import text as room
from fairseq_implicit.data.hf_tokenizer import HfTokenizerConfig
from fairseq_implicit.text.tokenizer_json import TokenizerVocabulary
from fairseq_implicit.text.vocabulary import MASK, SPECIAL_SYMBOLS, UNKNOWN, word_starts
from tests.corpora.formats import run_command

LINES = [
    "the field is smooth, and the solver integrates the field",
    "solving smoothly; naïve 東京",
    "smooth fields!",
] * 9
BERT = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(special_tokens=BERT, vocab_size=90))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=0)
    return tokenizer


def byte_pairs():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=ROBERTA, vocab_size=300, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def byte_pairs_and_spaces():
    """As ModernBERT has them: spaces in a row are one token, and the special symbols come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|padding|>"], vocab_size=300, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken(" " * length) for length in (4, 3, 2)])
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", AddedToken("[MASK]", lstrip=True), "[unused0]"])
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(special_tokens=ROBERTA, unk_token="<unk>", vocab_size=80)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


KINDS = {
    "word pieces": word_piece,
    "byte pairs": byte_pairs,
    "byte pairs and spaces": byte_pairs_and_spaces,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return KINDS[kind]()


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return TokenizerVocabulary(tokenizer.to_str().encode())


def test_rows_are_its_ids_in_another_order(vocabulary, tokenizer):
    rows = [*vocabulary.symbols, MASK]
    assert vocabulary.symbols[:4] == list(SPECIAL_SYMBOLS) and len(rows) == len(set(rows))
    assert sorted(vocabulary.token_ids.tolist()) == list(range(tokenizer.get_vocab_size()))
    row_of = np.argsort(vocabulary.token_ids)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for line in (*LINES[:3], "", "unseen WORDS ☃ zq"):
        expected = tokenizer.encode(line, add_special_tokens=False).ids
        assert vocabulary.encode(line).tolist() == row_of[expected].tolist()
    ids, lengths = pickle.loads(pickle.dumps(vocabulary)).encode_lines([line.encode() for line in LINES[:2]])
    assert ids.tolist() == [*vocabulary.encode(LINES[0]), 2, *vocabulary.encode(LINES[1]), 2] and len(lengths) == 2


def test_text_comes_back_and_words_begin(vocabulary, kind):
    for line in ("the field is smooth", "smoothly solving"):
        assert vocabulary.decode(vocabulary.encode(line)) == line
    assert vocabulary.decode(vocabulary.encode("smooth, and")) == "smooth, and"
    begins = word_starts(vocabulary.symbols, vocabulary.surface)
    ids = vocabulary.encode(" the smoothest")  # the space of byte pairs is text
    assert begins[ids].sum() == 2 and begins[ids[0]] and len(ids) > 2
    comma = vocabulary.encode("smooth ,")[-1]
    assert vocabulary.surface(vocabulary.symbols[comma]) in (" ,", ",")


def test_tokens_of_spaces_alone():
    """``dict.txt`` cannot hold them under their own names."""
    tokenizer = byte_pairs_and_spaces()
    vocabulary = TokenizerVocabulary(tokenizer.to_str().encode())
    text = "def  f():\n    the     field"
    pieces = vocabulary.split(text)
    assert [piece for piece in pieces if "␣" in piece] == ["␣␣", "␣␣␣␣", "␣␣␣␣"]
    assert UNKNOWN not in vocabulary.encode(text) and vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.surface("␣␣␣") == "   "
    ids = vocabulary.token_ids[vocabulary.encode(text)].tolist()
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    lines = [line.rsplit(" ", 1) for line in vocabulary.dictionary_text().splitlines()]
    assert [row for row, _ in lines] == vocabulary.symbols[4:]
    with pytest.raises(ValueError, match="the piece '␣␣' collides"):
        tokenizer.add_tokens(["␣␣"])
        TokenizerVocabulary(tokenizer.to_str().encode())


def test_what_looks_like_a_symbol_is_text(vocabulary):
    for text in ("[MASK]", MASK, "[CLS] a", "<s>", "</s>"):
        assert set(vocabulary.encode(text).tolist()).isdisjoint({0, 1, 2, len(vocabulary.symbols)})


def test_text_after_a_mask_is_split_as_there(vocabulary, tokenizer, kind):
    mask = "[MASK]" if kind in ("word pieces", "byte pairs and spaces") else MASK
    after = tokenizer.encode(f"{mask}ly smooth", add_special_tokens=False).tokens[1:]
    assert vocabulary.split("ly smooth", glued=True) == after
    if kind == "unigram":
        assert after != vocabulary.split("ly smooth")


def test_it_is_found_by_its_file_and_in_its_folder(vocabulary, tmp_path, fairseq_preprocess):
    source, folder = tmp_path / "text.txt", tmp_path / "tokenizer"
    source.write_text("\n".join([*LINES, "", "the unseen ☃", ""]), encoding="utf-8")
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(vocabulary.contents["tokenizer.json"])
    assert room.vocabulary_beside(folder).symbols == vocabulary.symbols
    file = folder / "tokenizer.json"
    arguments = ["--train", source, "--valid", source, "--tokenizer", file, "--output", tmp_path / "bin", "--fast"]
    run_command("binarise", *arguments)
    preprocess = ["--only-source", "--srcdict", folder, "--trainpref", source, "--destdir", tmp_path / "slow"]
    fairseq_preprocess("--task", "implicit_masked_lm", *preprocess)
    for name in ("train.bin", "train.idx", "dict.txt", "tokenizer.json"):
        assert (tmp_path / "slow" / name).read_bytes() == (tmp_path / "bin/shard0" / name).read_bytes()
    (tmp_path / "empty").mkdir()
    preprocess[2] = tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match="--srcdict .*empty: the folder holds no .* or tokenizer.json"):
        fairseq_preprocess("--task", "implicit_masked_lm", *preprocess)


def test_fairseqs_own_interface(vocabulary, tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(vocabulary.contents["tokenizer.json"])
    config = HfTokenizerConfig(hf_tokenizer=str(path))
    bpe = encoders.BPE_REGISTRY["hf_tokenizer"](config)
    pieces = bpe.encode("the smoothest field")
    assert pieces.split() == vocabulary.split("the smoothest field")
    assert bpe.decode(pieces) == "the smoothest field"
    assert bpe.is_beginning_of_word("<s>") and not bpe.is_beginning_of_word(pieces.split()[2])


def test_rows_of_another_dictionary(vocabulary):
    symbols = [*SPECIAL_SYMBOLS, *reversed(vocabulary.symbols[4:]), "madeupword0000", MASK]
    other = TokenizerVocabulary(*vocabulary.contents.values(), symbols=symbols)
    assert other.split(LINES[0]) == vocabulary.split(LINES[0])
    assert [symbols[row] for row in other.encode(LINES[0])] == vocabulary.split(LINES[0])
    assert other.token_ids[symbols.index("madeupword0000")] == -1 and other.token_ids[-1] == vocabulary.token_ids[-1]
    with pytest.raises(ValueError, match="dict.txt holds only . of its"):
        TokenizerVocabulary(*vocabulary.contents.values(), symbols=[*SPECIAL_SYMBOLS, "1", "2"])
    assert (other.encode("madeupword0000 <mask>") < len(symbols) - 2).all()


def test_damaged_files_are_refused():
    for content in (b"", b"\xff", b'{"model": 1}'):
        with pytest.raises(ValueError, match="this is no tokenizer"):
            TokenizerVocabulary(content)
    described = json.loads(word_piece().to_str())
    with pytest.raises(ValueError, match="it has no decoder"):
        TokenizerVocabulary(json.dumps({**described, "decoder": None}).encode())
    described["model"]["vocab"]["two words"] = len(described["model"]["vocab"])
    with pytest.raises(ValueError, match="the piece 'two words' contains white space"):
        TokenizerVocabulary(json.dumps(described).encode())
    described = json.loads(byte_pairs().to_str())
    described["model"]["vocab"]["madeupword0000"] = len(described["model"]["vocab"])
    rows = TokenizerVocabulary(json.dumps(described).encode()).symbols  # as RoBERTa's public file has them
    assert rows[-1] == "madeupword0000" and UNKNOWN == rows.index("<unk>")
