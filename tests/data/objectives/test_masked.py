"""Masked tokens, words and spans: their rates, what they spare, and what they are drawn from."""

import numpy as np
import pytest
from fairseq.data import Dictionary

from fairseq_implicit.data.objectives import OBJECTIVES
from fairseq_implicit.data.objectives.masked_words import LONGEST_WORD
from fairseq_implicit.data.objectives.objective import MaskRates
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.vocabulary import MASK, PAD


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


def objective(dictionary, name="masked-tokens", **rates):
    return OBJECTIVES[name](dictionary.symbols, SentencePieceVocabulary.surface, MaskRates(**rates))


def masked(objective, tokens, rng):
    """Source and target."""
    sample = objective(tokens, rng)
    assert sample.segments is None
    return sample.source, sample.target


def sequence(rng, length=1000):
    tokens = rng.integers(3, 104, length)  # <unk> and pieces
    tokens[0] = 0
    tokens[rng.integers(1, length, length // 20)] = 2
    tokens[-1] = 2
    return tokens


def test_rates(dictionary):
    masking = objective(dictionary)
    counts = np.zeros(4)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        tokens = sequence(rng)
        source, target = masked(masking, tokens, rng)
        chosen = target != PAD
        counts += [
            ((tokens != 0) & (tokens != 2)).sum(),
            chosen.sum(),
            (source[chosen] == dictionary.index(MASK)).sum(),
            (source[chosen] == tokens[chosen]).sum(),
        ]
        assert (target[chosen] == tokens[chosen]).all()
        assert (source[~chosen] == tokens[~chosen]).all()
    maskable, chosen, hidden, kept = counts
    assert chosen / maskable == pytest.approx(0.15, abs=0.001)
    assert hidden / chosen == pytest.approx(0.8, abs=0.01)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / 100, abs=0.01)  # a random token may be the same one


def test_special_symbols_are_neither_masked_nor_drawn(dictionary):
    masking = objective(dictionary, probability=0.9, random=1.0, leave_unmasked=0.0)
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(50):
        tokens = sequence(rng)
        source, target = masked(masking, tokens, rng)
        special = (tokens == 0) | (tokens == 2)
        assert (target[special] == PAD).all() and (source[special] == tokens[special]).all()
        drawn |= set(source[target != PAD].tolist())
    assert drawn == set(range(4, 104))


def test_probabilistic_rounding_keeps_short_sequences_at_the_rate(dictionary):
    masking = objective(dictionary)
    rng = np.random.default_rng(0)
    tokens = np.array([0, 10, 11, 12, 2])
    chosen = sum((masked(masking, tokens, rng)[1] != PAD).sum() for _ in range(20000))
    assert chosen / 60000 == pytest.approx(0.15, abs=0.005)


def test_whole_words_share_one_fate(dictionary):
    masking = objective(dictionary, "masked-words", probability=0.3)
    starts = masking.word_starts
    rng = np.random.default_rng(0)
    chosen_words = words = 0
    for _ in range(50):
        tokens = sequence(rng)
        source, target = masked(masking, tokens, rng)
        special = (tokens == 0) | (tokens == 2)
        begins = ~special & (starts[tokens] | np.append(True, special[:-1]))
        for word in np.split(np.arange(len(tokens)), np.flatnonzero(begins | special))[1:]:
            if special[word[0]] or len(word) > LONGEST_WORD:
                continue
            chosen = target[word] != PAD
            assert chosen.all() or not chosen.any()
            hidden = source[word] == dictionary.index(MASK)
            assert hidden.all() or not hidden.any()
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
    masking = objective(dictionary, "masked-words")
    rng = np.random.default_rng(length)
    chosen = maskable = 0
    for _ in range(300):
        tokens = without_word_spaces(rng, length, 300)
        _, target = masked(masking, tokens, rng)
        text = int(((tokens != 0) & (tokens != 2)).sum())
        targets = int((target != PAD).sum())
        if text >= 16:
            assert 0 < targets <= max(text / 2, LONGEST_WORD)
        chosen += targets
        maskable += text
    assert chosen / maskable == pytest.approx(0.15, abs=0.012)


def test_spans_are_of_one_to_four_pieces(dictionary):
    masking = objective(dictionary, "masked-words", probability=0.05, random=0.0, leave_unmasked=0.0)
    rng = np.random.default_rng(0)
    tokens = np.append(4, np.full(40000, 5))
    chosen = np.append(masked(masking, tokens, rng)[1] != PAD, False).astype(int)
    lengths = np.flatnonzero(np.diff(chosen) == -1) - np.flatnonzero(np.diff(chosen) == 1)
    # Some spans touch, so that the mean lies above the spans' own, 2.0, by about the rate.
    assert lengths.mean() == pytest.approx(2.1, abs=0.1)
    assert (lengths > 4).mean() < 0.06


@pytest.mark.parametrize("name", ["masked-tokens", "masked-words"])
def test_the_draws_are_those_that_they_always_were(dictionary, name):
    """Of blocks whose words are short: that a checkpoint resumes with the masks that it began with."""
    masking = objective(dictionary, name)
    for seed in range(100):
        tokens = sequence(np.random.default_rng(seed), 100)
        tokens[1:-1:6] = 4  # a word begins, so that none is long
        source, target = masked(masking, tokens, np.random.default_rng(seed))

        rng = np.random.default_rng(seed)
        text = (tokens != 0) & (tokens != 2)
        begins = text & (masking.word_starts[tokens] | ~np.roll(text, 1)) if name == "masked-words" else text
        words = np.split(np.arange(100), np.flatnonzero(begins))[1:]
        words = [word[text[word]] for word in words]
        count = int(0.15 * len(words) + rng.random())
        fates = rng.random(count)
        order = rng.permutation(len(words))[:count]
        chosen = {int(place): fate for number, fate in zip(order, fates, strict=True) for place in words[number]}
        assert np.flatnonzero(target != PAD).tolist() == sorted(chosen)
        hidden = [place for place, fate in sorted(chosen.items()) if fate >= 0.2]
        assert (source[hidden] == dictionary.index(MASK)).all()
        drawn = [place for place, fate in sorted(chosen.items()) if 0.1 <= fate < 0.2]
        assert source[drawn].tolist() == (4 + rng.integers(100, size=len(drawn))).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_spans_need_no_words(dictionary, seed):
    """Every piece begins a word, and yet runs of targets are spans, which only special symbols end early."""
    masking = objective(dictionary, "masked-spans", probability=0.05, random=0.0, leave_unmasked=0.0)
    rng = np.random.default_rng(seed)
    tokens = sequence(rng, 40000)
    tokens[tokens > 3] = 4
    source, target = masked(masking, tokens, rng)
    chosen = target != PAD
    assert chosen.sum() / ((tokens != 0) & (tokens != 2)).sum() == pytest.approx(0.05, abs=0.004)
    assert ((source == dictionary.index(MASK)) == chosen).all() and (target[chosen] == tokens[chosen]).all()
    edges = np.diff(np.concatenate([[0], chosen.astype(int), [0]]))
    lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    assert lengths.mean() == pytest.approx(2.0, abs=0.1) and (lengths > 4).mean() < 0.06


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_mask(dictionary, name):
    source, target = masked(objective(dictionary, name), np.array([0, 2]), np.random.default_rng(0))
    assert source.tolist() == [0, 2] and target.tolist() == [PAD] * 2


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
def test_refuses_impossible_shares(shares, flag):
    with pytest.raises(ValueError, match=flag):
        MaskRates(**shares)
