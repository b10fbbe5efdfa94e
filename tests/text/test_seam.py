"""A new kind of vocabulary: white-space words, used by masking, token files, the commands and decoding by its entry."""

import numpy as np
import pytest
import torch

from fairseq_implicit import text
from fairseq_implicit.data.byte_pairs import TOKENIZERS
from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMConfig, ImplicitMaskedLMTask
from fairseq_implicit.text.token_files import MappedTokens
from fairseq_implicit.text.vocabulary import EOS, MASK, PAD, UNKNOWN, Vocabulary
from tests.corpora.formats import run_command

TEXT = "the field is smooth\n\nthe solver integrates\tthe unseen field\n<mask> madeupword0000 <pad>\n"


class WhiteSpaceWords(Vocabulary):
    """Words of a list; one that is glued to the word before it has a ``+``."""

    NAME = "list of words"
    FILES = {"words": "words.lst"}

    def _read(self, words):
        return words.decode("utf-8").split()

    def split(self, text, glued=False):
        first, *others = text.split() or [""]
        return [word for word in ("+" * glued + first, *others) if word]

    def surface(self, symbol):
        return symbol[1:] if symbol.startswith("+") else f" {symbol}"


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Path of a list of words, whose kind has its entry."""
    monkeypatch.setitem(text.VOCABULARIES, "words", WhiteSpaceWords)
    path = tmp_path / "words.lst"
    path.write_text("the field is smooth solver integrates +ly\n", encoding="utf-8")
    return path


@pytest.fixture
def data(words, tmp_path, fairseq_preprocess):
    """Data folders of both routes, which are equal."""
    source = tmp_path / "text.txt"
    source.write_text(TEXT * 20, encoding="utf-8")
    arguments = ["--train", source, "--valid", source, "--tokenizer", words, "--output", tmp_path / "bin", "--fast"]
    run_command("binarise", *arguments)
    preprocess = ["--only-source", "--srcdict", words, "--trainpref", source, "--destdir", tmp_path / "slow"]
    fairseq_preprocess("--task", "implicit_masked_lm", *preprocess)
    for name in ("train.bin", "train.idx", "dict.txt", "words.lst"):
        assert (tmp_path / "slow" / name).read_bytes() == (tmp_path / "bin/shard0" / name).read_bytes()
    return str(tmp_path / "bin/shard0")


def test_token_files_hold_its_ids_and_decode(data, words):
    vocabulary, tokens = WhiteSpaceWords.open(words), MappedTokens(f"{data}/train")
    assert tokens.token_count == 20 * (4 + 1 + 1 + 6 + 1 + 3 + 1)
    ids = tokens.slice(0, 17).tolist()
    assert ids[4:6] == [EOS, EOS] and vocabulary.decode(ids[:4]) == "the field is smooth"
    assert ids[13:16] == [UNKNOWN] * 3 and ids.count(UNKNOWN) == 4
    assert vocabulary.decode([*vocabulary.encode("smooth"), *vocabulary.encode("ly", glued=True)]) == "smoothly"


def test_whole_words_are_masked_by_its_beginnings(data):
    config = ImplicitMaskedLMConfig(data=data, tokens_per_sample=64, mask_whole_words=True, mask_prob=0.5, seed=1)
    task = ImplicitMaskedLMTask.setup_task(config)
    assert len(task.dictionary) == 64 and task.dictionary.index(MASK) == 63
    glued = task.dictionary.index("+ly")
    assert np.flatnonzero(~task.objective.word_starts).tolist() == [glued]
    sample = task.load_dataset("valid")[0]
    chosen = sample["target"] != PAD
    assert torch.equal(sample["target"][chosen], torch.from_numpy(task.datasets["valid"].blocks[0])[chosen])
    tokens = np.array([0, *[5, glued] * 50, 2])
    fates = task.objective(tokens, np.random.default_rng(0)).target[1:-1].reshape(50, 2) != PAD
    assert (fates[:, 0] == fates[:, 1]).all() and 0 < fates[:, 0].sum() < 50


def test_the_rows_of_a_dictionary_in_another_order_are_followed(words):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "field", "madeupword0000", "the", MASK]
    vocabulary = WhiteSpaceWords.open(words, symbols=symbols)
    assert vocabulary.encode("the field is <mask> madeupword0000").tolist() == [6, 4, UNKNOWN, UNKNOWN, UNKNOWN]
    assert vocabulary.decode([6, 4, 3, 99]) == "the field <unk> <unk>"


def test_another_list_beside_dict_txt_is_refused(data):
    with open(f"{data}/words.lst", "w", encoding="utf-8") as file:
        file.write("other words\n")
    with pytest.raises(ValueError, match="words.lst does not match the dict.txt beside it .*put the list of words"):
        ImplicitMaskedLMTask.setup_task(ImplicitMaskedLMConfig(data=data, seed=1))


def test_every_kind_has_files_of_its_own():
    names = [name for kind in TOKENIZERS.values() for name in kind.published_names()]
    assert len(set(names)) == len(names)
