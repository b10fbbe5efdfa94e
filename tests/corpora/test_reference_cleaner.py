"""The pipeline's output equals a second, independent implementation's, in every format and with trouble injected."""

import random
import unicodedata

import pytest

from fairseq_implicit.corpora import cleaning
from tests.corpora.formats import NAUGHTY
from tests.corpora.reference_cleaner import JSON_FORMATS, TEXT_FORMATS, cases, clean, differences

WORDS = [
    "plain",
    "words",
    "déjà",
    "vu",
    "日本語",
    "テスト",
    "ไทย",
    "עברית",
    "Ω",
    "मराठी",
    "👩‍👩‍👧",
    "\t",
    "…",
    "e\u0301",
]


def made_up_texts(seed):
    rng = random.Random(seed)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 40))) for _ in range(60)]
    return texts + [f"{text}\n{text}\n\n{text}" for text in NAUGHTY]


@pytest.fixture(scope="module")
def written():
    return {name: (data, expected) for name, data, expected in cases(made_up_texts(0), 0)}


@pytest.mark.parametrize("name", [*JSON_FORMATS, *TEXT_FORMATS])
def test_pipeline_equals_the_reference(written, tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    data, expected = written[name]
    number, missing, unexpected = differences(name, data, expected, tmp_path / "case")
    assert number > 60 and missing == set() and unexpected == set()


def test_few_characters_among_ascii_are_cleaned_like_the_reference():
    """Every kind of character that composes, reorders or separates, between ASCII and beside one another."""
    odd = [chr(code) for code in range(0x80, 0x30000) if chr(code) != unicodedata.normalize("NFD", chr(code))]
    odd += [chr(code) for code in range(0x80, 0x20000) if unicodedata.combining(chr(code))]
    second = {unicodedata.normalize("NFD", character)[1:2] for character in odd}  # what composes with another one
    special = sorted(second - {""}) + [
        "\x80",
        "\x85",
        "\u2028",
        "\u2029",
        "\u1100",
        "\u1161",
        "\u11a8",
        "\u00e9",
        "\u2013",
    ]
    rng = random.Random(9)
    for _ in range(4000):
        pool = rng.choice((odd, special))
        parts = [rng.choice(pool) if rng.random() < 0.15 else rng.choice("ab <\n\x01") for _ in range(80)]
        text = "".join(parts)
        assert cleaning.clean(text)[0] == clean(text), ascii(text)


def test_reference_knows_the_rules():
    assert clean("a\r\nb\rc\x00\x85d\u2028e\n \u200b\n\ud800f") == "a\nb\nc d\ne\n\ufffdf"
    assert clean("\ufeff\ufeffcafe\u0301 \n\ufeff\n") == "caf\u00e9 " and clean("\u2581\n\u3000") == ""
