"""80/10/10 masks: their rates, what they spare, and what they are drawn from."""

import numpy as np
import pytest
from fairseq.data import Dictionary

from fairseq_implicit.data.masking import LONGEST_WORD, Masking
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary

SURFACE = SentencePieceVocabulary.surface


@pytest.fixture(scope="module")
def dictionary():
    """100 pieces of which every third begins a word, some madeupwords, <mask>."""
    made = Dictionary()
    for i in range(100):
        made.add_symbol(("\u2581" if i % 3 == 0 else "") + f"p{i}")
    for i in range(5):
        made.add_symbol(f"madeupword{i:04d}", n=0)
    made.add_symbol("<mask>")
    return made


def sequence(rng, length=1000):
    tokens = rng.integers(3, 104, length)  # <unk> and pieces
    tokens[0] = 0
    tokens[rng.integers(1, length, length // 20)] = 2
    tokens[-1] = 2
    return tokens


def test_rates(dictionary):
    masking = Masking.for_dictionary(dictionary)
    counts = np.zeros(4)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        tokens = sequence(rng)
        source, target = masking.apply(tokens, rng)
        chosen = target != masking.pad
        counts += [
            ((tokens != 0) & (tokens != 2)).sum(),
            chosen.sum(),
            (source[chosen] == masking.mask).sum(),
            (source[chosen] == tokens[chosen]).sum(),
        ]
        assert (target[chosen] == tokens[chosen]).all()
        assert (source[~chosen] == tokens[~chosen]).all()
    maskable, chosen, masked, kept = counts
    assert chosen / maskable == pytest.approx(0.15, abs=0.001)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / 100, abs=0.01)  # a random token may be the same one


def test_special_symbols_are_neither_masked_nor_drawn(dictionary):
    masking = Masking.for_dictionary(dictionary, probability=0.9, random=1.0, leave_unmasked=0.0)
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(50):
        tokens = sequence(rng)
        source, target = masking.apply(tokens, rng)
        special = (tokens == 0) | (tokens == 2)
        assert (target[special] == masking.pad).all() and (source[special] == tokens[special]).all()
        drawn |= set(source[target != masking.pad].tolist())
    assert drawn == set(range(4, 104))


def test_probabilistic_rounding_keeps_short_sequences_at_the_rate(dictionary):
    masking = Masking.for_dictionary(dictionary)
    rng = np.random.default_rng(0)
    tokens = np.array([0, 10, 11, 12, 2])
    chosen = sum((masking.apply(tokens, rng)[1] != masking.pad).sum() for _ in range(20000))
    assert chosen / 60000 == pytest.approx(0.15, abs=0.005)


def test_whole_words_share_one_fate(dictionary):
    masking = Masking.for_dictionary(dictionary, surface=SURFACE, probability=0.3)
    starts = masking.word_starts
    rng = np.random.default_rng(0)
    chosen_words = words = 0
    for _ in range(50):
        tokens = sequence(rng)
        source, target = masking.apply(tokens, rng)
        special = (tokens == 0) | (tokens == 2)
        begins = ~special & (starts[tokens] | np.append(True, special[:-1]))
        for word in np.split(np.arange(len(tokens)), np.flatnonzero(begins | special))[1:]:
            if special[word[0]] or len(word) > LONGEST_WORD:
                continue
            chosen = target[word] != masking.pad
            assert chosen.all() or not chosen.any()
            masked = source[word] == masking.mask
            assert masked.all() or not masked.any()
            words += 1
            chosen_words += chosen[0]
    assert chosen_words / words == pytest.approx(0.3, abs=0.01)


def without_word_spaces(rng, length, longest):
    """A block of paragraphs of up to ``longest`` pieces, of which only the first begins with ▁, each with its </s>."""
    tokens = rng.choice([4 + piece for piece in range(100) if piece % 3], size=length)
    place = 0
    while place < length:
        tokens[place] = 4
        place += int(rng.integers(1, longest))
        tokens[min(place, length) - 1] = 2
    tokens[0] = 0
    return tokens


@pytest.mark.parametrize("length", [17, 129, 513])
def test_whole_words_without_word_spaces_are_spans(dictionary, length):
    """Every block has a target, none is half masked, and the rate is what was asked for."""
    masking = Masking.for_dictionary(dictionary, surface=SURFACE)
    rng = np.random.default_rng(length)
    chosen = maskable = 0
    for _ in range(300):
        tokens = without_word_spaces(rng, length, 300)
        _, target = masking.apply(tokens, rng)
        text = int(((tokens != 0) & (tokens != 2)).sum())
        targets = int((target != masking.pad).sum())
        if text >= 16:
            assert 0 < targets <= max(text / 2, LONGEST_WORD)
        chosen += targets
        maskable += text
    assert chosen / maskable == pytest.approx(0.15, abs=0.012)


def test_spans_are_of_one_to_four_pieces(dictionary):
    masking = Masking.for_dictionary(dictionary, surface=SURFACE, probability=0.05, random=0.0, leave_unmasked=0.0)
    rng = np.random.default_rng(0)
    tokens = np.append(4, np.full(40000, 5))
    chosen = np.append(masking.apply(tokens, rng)[1] != masking.pad, False).astype(int)
    lengths = np.flatnonzero(np.diff(chosen) == -1) - np.flatnonzero(np.diff(chosen) == 1)
    # Some spans touch, so that the mean lies above the spans' own, 2.0, by about the rate.
    assert lengths.mean() == pytest.approx(2.1, abs=0.1)
    assert (lengths > 4).mean() < 0.06


def test_words_of_few_pieces_are_masked_as_they_always_were(dictionary):
    """The draws of a block whose words are short are those of whole words alone."""
    masking = Masking.for_dictionary(dictionary, surface=SURFACE)
    for seed in range(100):
        tokens = sequence(np.random.default_rng(seed), 100)
        tokens[1:-1:6] = 4  # a word begins, so that none is long
        source, target = masking.apply(tokens, np.random.default_rng(seed))

        rng = np.random.default_rng(seed)
        text = (tokens != 0) & (tokens != 2)
        words = np.split(np.arange(100), np.flatnonzero(text & (masking.word_starts[tokens] | ~np.roll(text, 1))))[1:]
        words = [word[text[word]] for word in words]
        count = int(0.15 * len(words) + rng.random())
        fates = rng.random(count)
        order = rng.permutation(len(words))[:count]
        chosen = {int(place): fate for number, fate in zip(order, fates, strict=True) for place in words[number]}
        assert np.flatnonzero(target != masking.pad).tolist() == sorted(chosen)
        masked = [place for place, fate in sorted(chosen.items()) if fate >= 0.2]
        assert (source[masked] == masking.mask).all()


def test_nothing_to_mask(dictionary):
    for surface in (None, SURFACE):
        masking = Masking.for_dictionary(dictionary, surface)
        source, target = masking.apply(np.array([0, 2]), np.random.default_rng(0))
        assert source.tolist() == [0, 2] and target.tolist() == [masking.pad] * 2


@pytest.mark.parametrize(
    "shares, flag",
    [
        (dict(probability=0.0), "--mask-prob"),
        (dict(probability=1.0), "--mask-prob"),
        (dict(leave_unmasked=-0.1), "--leave-unmasked-prob"),
        (dict(random=1.1), "--random-token-prob"),
        (dict(random=0.6, leave_unmasked=0.5), "add up to more than 1"),
    ],
)
def test_refuses_impossible_shares(dictionary, shares, flag):
    with pytest.raises(ValueError, match=flag):
        Masking.for_dictionary(dictionary, **shares)
