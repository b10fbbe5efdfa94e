"""The tools around the quickstart: refused flags, tokenizer, entropies, loss curves, questions with a mask."""

import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from torch.utils.tensorboard import SummaryWriter

from fairseq_implicit.commands import pictures
from fairseq_implicit.commands.fill_masks import questions
from fairseq_implicit.commands.plot_losses import plot, read_curves
from fairseq_implicit.corpora.tokenizer_training import train_tokenizer
from fairseq_implicit.evaluation.entropies import Entropies, entropies

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--bogus"], "--bogus"),
        (["--text"], "--text needs a value"),
        (["--text", "no/such/text"], "no/such/text"),
        (["--model", "transformer"], "transformer"),
        (["--arch", "deq_bert_tiny"], "deq_bert_tiny"),
        (["--updates", "0"], "--updates 0"),
        (["--updates", "many"], "--updates many"),
        (["--dictionary", "x"], "--dictionary-size x"),
        (["--continue", "--redo"], "--continue and --redo"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_status_2(tmp_path, flags, named):
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert named in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # refused before anything is made


def test_help_names_every_option():
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--text", "--model", "--arch", "--updates", "--dictionary-size", "--continue", "--redo", "--out"):
        assert flag in text


def words(rng, count):
    syllables = ["ka", "to", "mi", "re", "su", "no", "la", "pe", "vi", "du"]
    return " ".join("".join(rng.choice(syllables, 3)) for _ in range(count))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("\n\n".join(words(rng, 12) for _ in range(300)) + "\n")
    return file


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizer_has_the_size_asked_for_and_is_reproducible(text, tmp_path, kind):
    copy = tmp_path / "elsewhere.txt"
    copy.write_bytes(text.read_bytes())
    for source, name in ((text, "one.model"), (copy, "deep/two.model")):
        train_tokenizer([source], tmp_path / name, 64, {"model_type": kind})
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "deep/two.model").read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one.model"))
    own = [i for i in range(len(pieces)) if not (pieces.is_control(i) or pieces.is_unknown(i))]
    assert len(own) + len(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == 64


def test_tokenizer_refuses_what_cannot_be(text, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text file"):
        train_tokenizer([tmp_path / "missing.txt"], tmp_path / "m.model", 64, {})
    with pytest.raises(ValueError, match="no dictionary of 50000 symbols.*--dictionary-size"):
        train_tokenizer([text], tmp_path / "m.model", 50000, {})
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no text"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "m.model", 64, {})
    with pytest.raises(ValueError, match="--dictionary-size 5 leaves no room"):
        train_tokenizer([text], tmp_path / "m.model", 5, {})
    assert not (tmp_path / "m.model").exists()


@pytest.mark.parametrize(
    "size, sentence", [(50000, r"give more text, or --dictionary-size (\d+) or less"), (16, r"alone need (\d+)")]
)
def test_the_size_that_is_advised_is_the_nearest_that_works(text, tmp_path, size, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        train_tokenizer([text], tmp_path / "m.model", size, {})
    advised = int(re.search(sentence, str(error.value))[1])
    with pytest.raises(ValueError, match=sentence):
        train_tokenizer([text], tmp_path / "m.model", advised + (1 if size > advised else -1), {})
    train_tokenizer([text], tmp_path / "m.model", advised, {})


def test_characters_that_are_left_out_and_rows_that_are_filled_up_are_said(tmp_path, command):
    """A text of many rare characters fits a small dictionary when a share of its characters is enough."""
    rng = np.random.default_rng(0)
    file, model = tmp_path / "text.txt", tmp_path / "m.model"
    lines = ["".join(rng.choice(list("abcdef"), 30)) + chr(0x4E00 + number) for number in range(300)]
    file.write_text("\n".join(lines), encoding="utf-8")
    arguments = ("train-tokenizer", file, "--out", model, "--dictionary", 200, "--character-coverage")
    status, _, said = command(*arguments, 1)
    assert status == 1 and re.search("alone need 3..; .* a lower --character-coverage", said)
    status, _, said = command(*arguments, 0.9)
    assert status == 2 and "--character-coverage 0.9 must lie between 0.98 and 1" in said
    status, output, _ = command(*arguments, 0.98)
    assert status == 0 and "200 symbols in the dictionary, filled up to 256 (a multiple of 64)" in output
    rows = (tmp_path / "dict.txt").read_text().splitlines()
    assert len(rows) == 256 - len(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])


def test_entropies_of_known_sources():
    """A fair source over n symbols has ln n nats; a cycle has none once the token before is known."""
    rng = np.random.default_rng(0)
    eos, first, symbols = 2, 4, 16
    fair = rng.integers(first, first + symbols, (2, 60000))
    fair[:, ::50] = eos
    result = entropies(fair[0], fair[1], first + symbols, eos)
    assert result.unigram == pytest.approx(math.log(symbols), abs=0.01)
    assert result.bigram == pytest.approx(math.log(symbols), abs=0.02)
    cycle = np.tile(np.arange(first, first + symbols), 2000)
    result = entropies(cycle, cycle[:1600], first + symbols, eos)
    assert result.unigram == pytest.approx(math.log(symbols), abs=0.01)
    assert result.bigram < 0.02


def test_bigram_probabilities_sum_to_one():
    """Summed over every possible next token, whether the token before was seen in training or not."""
    train = np.random.default_rng(1).integers(4, 12, 500)
    vocabulary, eos = 14, 2  # 12 and 13 never occur
    for context in (4, 12):
        alone = entropies(train, np.array([eos, context]), vocabulary, eos).bigram
        total = 0.0
        for token in set(range(vocabulary)) - {eos}:
            both = entropies(train, np.array([eos, context, token]), vocabulary, eos).bigram
            total += math.exp(alone - 2 * both)
        assert total == pytest.approx(1.0)


def test_loss_curves_in_nats_with_the_later_record_of_a_resumed_run(tmp_path):
    for first, bits in ((1, 8.0), (3, 6.0)):  # the second writer repeats updates 3 and 4, as after a kill
        with SummaryWriter(str(tmp_path / "log/train_inner")) as writer:
            for update in range(first, first + 4):
                writer.add_scalar("loss", bits, update, walltime=1000.0 * first + update)
    curves = read_curves(str(tmp_path / "log"))
    updates, nats = curves["train_inner"]
    assert updates == [1, 2, 3, 4, 5, 6]
    assert nats == pytest.approx([bits * math.log(2) for bits in (8, 8, 6, 6, 6, 6)])
    picture = tmp_path / "pictures/losses.png"
    pictures.save(plot(curves, Entropies(5.0, 4.0), title="a title"), str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_no_curves_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no losses"):
        read_curves(str(tmp_path))


def test_questions_hide_one_known_word(tmp_path):
    file = tmp_path / "valid.txt"
    sentences = [
        "Return the number of open files in this folder.",
        "Too short.",
        "Has 3 numbers in it, 4 of them there.",
        "lower case begins what is no sentence here.",
    ]
    file.write_text("\n".join(sentences) + "\n")
    (question,) = questions(str(file), lambda word: word in ("number", "open"))
    assert question.answer in ("number", "open")
    assert question.sentence.replace("<mask>", question.answer) == sentences[0]
    assert list(questions(str(file), lambda word: False)) == []
    file.write_text("L’élève très appliqué prépare déjà son examen.\n", encoding="utf-8")
    (question,) = questions(str(file), lambda word: True)
    assert question.answer in ("très", "appliqué", "prépare", "déjà")  # not "son", which is short
