"""What holds of every cleaned text, and that nothing else changes."""

import io
import random
import re
import time
import unicodedata

import pytest
import sentencepiece

from fairseq_implicit.corpora import cleaning
from fairseq_implicit.corpora.cleaning import clean, split_text, wrap_line
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.quality import quality_check
from tests.corpora.formats import NAUGHTY


@pytest.mark.parametrize(
    "raw, expected, change",
    [
        ("a\r\nb", "a\nb", "CRLF line ends"),
        ("a\rb", "a\nb", "lone carriage returns"),
        ("a\n\n \t\n\u200b\nb\n", "a\nb", "blank lines folded"),
        ("a\u0085b\x1cc", "a b c", "control characters removed"),
        ("a\x00b\x9fc\x7f", "abc", "control characters removed"),
        ("a\u2028b\fc", "a\nb\nc", "control characters removed"),
        ("cafe\u0301", "caf\u00e9", "Unicode NFC"),
        ("\ufeffa", "a", "byte order mark removed"),
        ("a\ud800b", "a\ufffdb", "unpaired surrogates replaced"),
    ],
)
def test_each_change_is_made_and_named(raw, expected, change):
    text, changes = clean(raw)
    assert text == expected and change in changes


@pytest.mark.parametrize("text", ["plain", "a\tb  c ", "  indented\n    code", "日本語　全角", "Ω≈ç", "x\u00a0y"])
def test_clean_text_is_left_alone(text):
    assert clean(text) == (text, [])


def random_text(rng):
    alphabet = "ab \t\n\r\x00\x0b\x0c\x1d\x85\u00a0\u200b\u200d\u2028\u2029\u3000\ufeff\ufffd\u2581e\u0301\ud83d語"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))


def test_properties_of_cleaned_text():
    rng = random.Random(0)
    for _ in range(3000):
        text, _ = clean(random_text(rng))
        assert clean(text) == (text, [])
        assert unicodedata.is_normalized("NFC", text)
        text.encode("utf-8")
        assert not any(unicodedata.category(c) == "Cc" and c not in "\t\n" for c in text)
        assert not {"\u2028", "\u2029"} & set(text)
        assert text == "" or all(line.strip() for line in text.split("\n"))


def marks_only(character):
    return all(map(unicodedata.combining, unicodedata.normalize("NFD", character)))


def test_runs_of_combining_marks_are_stream_safe():
    """UAX #15, section 13: at most 30 marks in a row; shorter runs and every other character stay."""
    marks = [chr(code) for code in range(0x110000) if marks_only(chr(code))]
    assert set(marks) == cleaning._MARKS
    rng = random.Random(3)
    for _ in range(2000):
        raw = rng.choice("ae\u0958\ufb2c\u1100") + "".join(rng.choices(marks, k=rng.randrange(100)))
        raw = raw[: rng.randrange(1, 101)] + rng.choice("xe\u4e00") + "".join(rng.choices(marks, k=rng.randrange(33)))
        text, changes = clean(raw)
        runs = [len(run) for run in re.findall(f"[{''.join(marks)}]+", text)]
        assert max(runs, default=0) <= 30
        assert clean(text) == (text, []) and unicodedata.is_normalized("NFC", text)
        without = text.replace("\u034f", "")
        assert sorted(unicodedata.normalize("NFD", without)) == sorted(
            unicodedata.normalize("NFD", raw.replace("\u034f", ""))
        )
        if "long runs of combining marks divided" not in changes:
            assert text == unicodedata.normalize("NFC", raw)
    assert clean("a" + 30 * "\u0301")[0] == "\u00e1" + 29 * "\u0301"
    assert clean("x" + 31 * "\u0301") == (
        "x" + 30 * "\u0301" + "\u034f\u0301",
        ["long runs of combining marks divided"],
    )


def test_time_is_linear_in_a_run_of_combining_marks():
    """Eight times the text takes 64 times as long where ordering the marks is quadratic."""

    def seconds(length):
        text = "a" + "\u0301\u0316\u0327" * length
        spent = []
        for _ in range(3):
            begun = time.process_time()
            clean(text)
            spent.append(time.process_time() - begun)
        return min(spent)

    assert seconds(8 * 1500) < 25 * seconds(1500)


def test_no_line_of_a_clean_text_encodes_to_nothing():
    """A line without pieces would be a lone end mark, fairseq's document separator."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 50),
        model_writer=model,
        vocab_size=9,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    lines = [line for character in characters for line in clean(f"a\n{character}\nb")[0].split("\n")]
    assert [line for line, ids in zip(lines, processor.encode(lines), strict=True) if not ids] == []


def test_splitting_loses_only_line_feeds_and_spaces_at_cuts():
    rng = random.Random(1)
    for _ in range(500):
        lines = [rng.choice([*NAUGHTY, "x" * 50, "word " * 12, "語" * 30]) for _ in range(rng.randrange(1, 8))]
        text, _ = clean("\n".join(lines))
        pieces = split_text(text, 40)
        assert all(0 < len(piece.encode()) <= 40 for piece in pieces)
        assert "".join(pieces).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
        assert all(line.strip() for piece in pieces for line in piece.split("\n"))
    assert split_text("aa\nbb\ncc", 5) == ["aa\nbb", "cc"]


def test_wrapping_prefers_spaces_and_keeps_characters_whole():
    assert wrap_line("one two three", 8) == ["one two", "three"]
    assert wrap_line("語" * 7, 10) == ["語語語", "語語語", "語"]
    assert wrap_line("short", 100) == ["short"]
    long = "lorem ipsum " * 1000
    pieces = wrap_line(long, 64)
    assert " ".join(pieces).rstrip() == long.rstrip() and max(map(len, pieces)) <= 64


def test_quality_filters_are_datatroves_and_name_themselves(datatrove):
    """The wiring: a verdict is a truth value or a pair of it and a reason."""

    class Short:
        def filter(self, document):
            return (False, "too_long") if len(document.text) > 20 else True

    class NoBraces:
        def filter(self, document):
            return "{" not in document.text

    datatrove(GopherQualityFilter=Short, C4QualityFilter=NoBraces)
    check = quality_check(("gopher-quality", "c4"))
    assert [check(text) for text in ("fine", "x" * 30, "a { b")] == [None, "quality gopher-quality", "quality c4"]
    with pytest.raises(CorpusError, match="--quality-filter best is unknown; choose from gopher-quality"):
        quality_check(("best",))


def test_quality_filter_that_fails_on_any_text_is_refused_at_the_start(datatrove):
    class WithoutModel:
        def filter(self, document):
            raise LookupError("no model\nof sentences")

    datatrove(C4QualityFilter=WithoutModel)
    with pytest.raises(CorpusError, match=r"--quality-filter c4: .* plain sentence already \(LookupError: no model"):
        quality_check(("c4",))
