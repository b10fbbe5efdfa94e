"""Raw text in one step gives the bytes of the two-step route."""

import io
import pickle
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary

from fairseq_implicit.data.data_bin import check_vocabulary_matches
from fairseq_implicit.data.dictionary import VocabularyDictionary
from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMTask
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.vocabulary import word_starts

AWKWARD = [
    "the implicit solver",
    "",
    "   leading and trailing   ",
    "tab\tinside",
    "nul\x00 bell\x07 escape\x1b",
    "next\x85line and no\u00a0break",
    "line\u2028separator, ideographic\u3000space",
    "\u4f60\u597d unknown letters \u4e16\u754c",
    "zero\u200bwidth and \ufeffmark",
    "literal <s> </s> <pad> <unk> <mask> madeupword0001 <<unk>>",
    "\u2581 the sign itself",
    "\U0001f600 caf\u00e9 ﬁ ligature",
]


def dictionary_of(model: str) -> VocabularyDictionary:
    return VocabularyDictionary(SentencePieceVocabulary.open(model))


def text_route(model: str, dictionary: VocabularyDictionary, lines):
    """spm_encode to text, then fairseq's tokenizer and dict.txt: ids of each line."""
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    stream = io.StringIO()
    dictionary.save(stream)
    stream.seek(0)
    plain = Dictionary()
    plain.add_from_file(stream)
    encoded = [" ".join(processor.encode(line, out_type=str)) for line in lines]
    return [plain.encode_line(line, add_if_not_exist=False, append_eos=True).tolist() for line in encoded]


def test_awkward_lines_give_the_ids_of_the_text_route(toy_model):
    dictionary = dictionary_of(toy_model)
    direct = [dictionary.encode_line(line + "\n", add_if_not_exist=False).tolist() for line in AWKWARD]
    for line, ours, theirs in zip(AWKWARD, direct, text_route(toy_model, dictionary, AWKWARD), strict=True):
        assert ours == theirs, line


@pytest.mark.parametrize("options", [dict(byte_fallback=True), dict(normalization_rule_name="identity")])
def test_other_kinds_of_models_agree_with_the_text_route(toy_text, tmp_path, options):
    sentencepiece.SentencePieceTrainer.train(
        input=str(toy_text["train"]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=400,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    model = str(tmp_path / "m.model")
    dictionary = dictionary_of(model)
    direct = [dictionary.encode_line(line, add_if_not_exist=False).tolist() for line in AWKWARD]
    assert direct == text_route(model, dictionary, AWKWARD)


@pytest.mark.parametrize("workers", [1, 2])
def test_binarised_files_are_identical(toy_text, toy_model, fairseq_preprocess, tmp_path, workers):
    raw = tmp_path / "raw.txt"
    raw.write_text(
        toy_text["train"].read_text(encoding="utf-8") + "\n".join(AWKWARD) + "\n", encoding="utf-8", newline=""
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=toy_model)
    pieces = tmp_path / "pieces.txt"
    with raw.open(encoding="utf-8") as lines, pieces.open("w", encoding="utf-8", newline="") as out:
        for line in lines:
            out.write(" ".join(processor.encode(line.rstrip("\n"), out_type=str)) + "\n")
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--only-source", "--workers", workers]
    fairseq_preprocess(
        "--task", "implicit_masked_lm", "--srcdict", toy_model, "--trainpref", raw, "--destdir", one, *common
    )
    fairseq_preprocess("--srcdict", one / "dict.txt", "--trainpref", pieces, "--destdir", two, *common)
    for name in ("train.bin", "train.idx"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / "sentencepiece.bpe.model").read_bytes() == Path(toy_model).read_bytes()


def test_literal_special_symbols_are_text(toy_model):
    dictionary = dictionary_of(toy_model)
    special = {dictionary.bos(), dictionary.pad(), dictionary.eos()}
    for line in ("<s> </s> <pad> <mask>", "<s>\x01</s>", "\t<pad>\t"):
        ids = dictionary.encode_line(line, append_eos=False)
        assert not special & set(ids.tolist())


def test_size_with_mask_is_a_multiple_of_64(toy_model):
    dictionary = dictionary_of(toy_model)
    assert (len(dictionary) + 1) % 64 == 0
    stream = io.StringIO()
    dictionary.save(stream)
    stream.seek(0)
    plain = Dictionary()
    plain.add_from_file(stream)
    plain.add_symbol("<mask>")  # all that sentence_prediction does
    assert len(plain) == len(dictionary) + 1
    assert plain.index("<mask>") == len(dictionary)


def test_pickles_and_encodes_alike(toy_model):
    dictionary = dictionary_of(toy_model)
    copy = pickle.loads(pickle.dumps(dictionary))
    line = "the learned stage follows the exact state."
    assert torch.equal(copy.encode_line(line), dictionary.encode_line(line))


def test_reports_unknown_pieces_only(toy_model):
    dictionary = dictionary_of(toy_model)
    seen = []
    ids = dictionary.encode_line("the \u4e16\u754c state", consumer=lambda piece, index: seen.append((piece, index)))
    assert seen == [("\u4e16\u754c", dictionary.unk())]
    assert (ids == dictionary.unk()).sum() == 1


def test_a_line_of_ten_megabytes(toy_model):
    dictionary = dictionary_of(toy_model)
    line = "the learned stage follows the exact state. " * 40
    times = 10_000_000 // len(line)
    one = dictionary.encode_line(line, append_eos=False)
    many = dictionary.encode_line(line * times, append_eos=False)
    assert torch.equal(many, one.repeat(times))


def _train(toy_text, tmp_path, **options):
    sentencepiece.SentencePieceTrainer.train(
        input=str(toy_text["train"]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return str(tmp_path / "m.model")


@pytest.mark.parametrize(
    "symbol, sentence", [("<mask>", "collides"), ("a\u3000b", "white space"), ("<pad>", "collides")]
)
def test_refuses_pieces_that_fairseq_cannot_hold(toy_text, tmp_path, symbol, sentence):
    model = _train(toy_text, tmp_path, user_defined_symbols=[symbol])
    with pytest.raises(ValueError, match=f"--srcdict {re.escape(model)}: .*{sentence}"):
        ImplicitMaskedLMTask.load_dictionary(model)


def test_refuses_missing_and_broken_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="--srcdict .*absent.model: there is no such sentencepiece model"):
        ImplicitMaskedLMTask.load_dictionary(str(tmp_path / "absent.model"))
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="--srcdict .*broken.model: this is no sentencepiece model"):
        ImplicitMaskedLMTask.load_dictionary(str(tmp_path / "broken.model"))


def test_refuses_a_model_that_does_not_match_dict_txt(toy_text, toy_model, toy_data, tmp_path):
    other = _train(toy_text, tmp_path)
    symbols = Dictionary.load(f"{toy_data}/dict.txt").symbols
    check_vocabulary_matches(symbols, SentencePieceVocabulary.open(toy_model), toy_data)
    with pytest.raises(ValueError, match="does not match the dict.txt"):
        check_vocabulary_matches(symbols, SentencePieceVocabulary.open(other), toy_data)


def test_does_not_overwrite_another_dictionary(toy_text, toy_model, tmp_path):
    path = str(tmp_path / "bin" / "dict.txt")
    dictionary_of(toy_model).save(path)
    dictionary_of(toy_model).save(path)
    with pytest.raises(FileExistsError, match="belongs to another dictionary"):
        dictionary_of(_train(toy_text, tmp_path)).save(path)


def test_words_start_at_the_sign(toy_model):
    dictionary = dictionary_of(toy_model)
    dictionary.add_symbol("<mask>")
    starts = word_starts(dictionary.symbols, SentencePieceVocabulary.surface)
    for index, symbol in enumerate(dictionary.symbols):
        special = index < 4 or symbol == "<mask>" or symbol.startswith("madeupword")
        assert starts[index] == (special or symbol.startswith("\u2581"))
    plain = Dictionary()
    plain.add_symbol("word")
    with pytest.raises(ValueError, match="no symbol of dict.txt begins a word"):
        word_starts(plain.symbols, SentencePieceVocabulary.surface)
