"""Near duplicates in scripts with and without spaces between words."""

import random

import numpy as np
import pytest

from fairseq_implicit.corpora import near_duplicates

THAI = [chr(code) for code in range(0x0E01, 0x0E2F)] + list("\u0e30\u0e31\u0e32\u0e34\u0e35\u0e36\u0e37\u0e48\u0e49")


@pytest.mark.parametrize(
    "alphabet, joint, words",
    [
        ([chr(code) for code in range(0x4E00, 0x5600)], "", False),
        ([chr(code) for code in range(0x3041, 0x3097)], "", False),
        (THAI, "", False),
        ([f"w{number}" for number in range(2048)], " ", True),
    ],
    ids=["zh", "ja", "th", "en"],
)
def test_near_duplicates_are_found_with_and_without_word_spaces(alphabet, joint, words):
    """1 % of the units (characters, or words where there are spaces) changed: found, and no unrelated pair is."""
    rng = random.Random(len(alphabet))
    vocabulary = alphabet if words else ["".join(rng.choices(alphabet, k=rng.randrange(1, 5))) for _ in range(2000)]
    shares = [1 / (rank + 3) for rank in range(len(vocabulary))]
    originals = [rng.choices(vocabulary, shares, k=200) for _ in range(100)]
    texts, copies = [], []
    for original in originals:
        units = original if words else list("".join(original))
        texts.append(joint.join(units))
        for place in rng.sample(range(len(units)), max(1, len(units) // 100)):
            units[place] = rng.choice(alphabet)
        copies.append(joint.join(units))
    bands = np.array([near_duplicates.band_hashes(text) for text in texts + copies])
    shared = (bands[:, None, :] == bands[None, :, :]).any(axis=2)
    assert shared[np.arange(100), np.arange(100, 200)].mean() >= 0.95
    assert shared[:100, :100].sum() == 100


def test_scripts_with_word_spaces_are_cut_at_them():
    text = " ".join(f"mot{number} 단어{number} слово" for number in range(9))
    assert len(near_duplicates.WORD.findall(text)) == 27
    assert near_duplicates.WORD.findall("GPU\u3067\u5b66\u7fd2 x") == ["GPU", "\u3067", "\u5b66", "\u7fd2", "x"]
