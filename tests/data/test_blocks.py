"""Every token is in exactly one block, in every break mode."""

import itertools
import logging

import numpy as np
import pytest

from fairseq_implicit.data import blocks
from fairseq_implicit.data.blocks import BREAK_MODES, BlockIndex, cut_blocks


def lines_of(rng, count):
    """Lengths of random lines: blank ones, ordinary ones, some far longer than a block."""
    kinds = rng.choice(3, size=count, p=[0.2, 0.7, 0.1])
    return np.where(kinds == 0, 1, np.where(kinds == 1, rng.integers(2, 40, count), rng.integers(40, 700, count)))


def slow_blocks(lengths, size, mode):
    """The definition, one line at a time: list of (start, length)."""
    found, position = [], 0
    open_start, open_length = None, 0

    def close():
        nonlocal open_start, open_length
        if open_length:
            found.append((open_start, open_length))
        open_start, open_length = None, 0

    for length in map(int, lengths):
        if mode in ("complete_doc", "eos") and length == 1:
            close()
            position += 1
            continue
        if mode == "eos":
            parts = -(-length // size)
            edges = [i * length // parts for i in range(parts + 1)]
        else:
            edges = list(range(0, length, size)) + [length]
        for begin, end in itertools.pairwise(edges):
            if mode == "eos" or open_length + end - begin > size:
                close()
            if open_start is None:
                open_start = position + begin
            open_length += end - begin
        position += length
    close()
    return found


@pytest.mark.parametrize("mode", BREAK_MODES)
@pytest.mark.parametrize("size", [1, 2, 7, 63, 511])
def test_every_token_once(mode, size):
    rng = np.random.default_rng(size)
    lengths = lines_of(rng, 500).astype(np.int32)
    index = cut_blocks(lengths, size, mode)
    covered = np.zeros(lengths.sum(), dtype=int)
    for start, length in zip(index.starts, index.lengths, strict=True):
        assert 1 <= length <= size
        covered[start : start + length] += 1
    separator = np.zeros(len(covered), dtype=bool)
    if mode in ("complete_doc", "eos"):
        separator[np.cumsum(lengths)[lengths == 1] - 1] = True
    assert (covered == ~separator).all()
    assert index.separators == separator.sum()
    assert index.tokens == lengths.sum() == index.tokens_in_blocks + index.separators
    assert index.lines_split == (lengths > size).sum()
    assert index.starts.dtype == np.int64


@pytest.mark.parametrize("mode", BREAK_MODES[1:])
@pytest.mark.parametrize("at_once", [1, 3, 17, 1 << 20])
def test_equals_the_definition_however_many_lines_at_once(monkeypatch, mode, at_once):
    monkeypatch.setattr(blocks, "_LINES_AT_ONCE", at_once)
    lengths = lines_of(np.random.default_rng(3), 120)
    for size in (5, 63):
        index = cut_blocks(lengths, size, mode)
        assert list(zip(index.starts.tolist(), index.lengths.tolist(), strict=True)) == slow_blocks(lengths, size, mode)


def test_short_lines_make_the_blocks_of_fairseq():
    from fairseq.data.token_block_utils_fast import _get_slice_indices_fast

    lengths = np.random.default_rng(0).integers(2, 30, 300).astype(np.int64)
    for mode in ("none", "complete"):
        theirs = _get_slice_indices_fast(lengths, mode, 64, 1)
        ours = cut_blocks(lengths, 64, mode)
        assert np.array_equal(theirs, np.stack([ours.starts, ours.starts + ours.lengths], 1))


def test_documents_are_not_mixed():
    index = cut_blocks(np.array([4, 4, 1, 4, 1, 1, 4, 4]), 100, "complete_doc")
    assert index.starts.tolist() == [0, 9, 15]
    assert index.lengths.tolist() == [8, 4, 8]
    assert index.separators == 3


def test_more_tokens_than_int32_holds():
    lengths = np.full(5, 2**30, dtype=np.int32)
    for mode in ("none", "complete", "eos"):
        index = cut_blocks(lengths, 2**29, mode)
        assert index.tokens == index.tokens_in_blocks == 5 * 2**30
        assert index.starts[-1] == 5 * 2**30 - 2**29


def test_nothing_to_cut():
    for mode in BREAK_MODES:
        assert len(cut_blocks(np.zeros(0, dtype=np.int32), 8, mode)) == 0
    assert len(cut_blocks(np.ones(4, dtype=np.int32), 8, "complete_doc")) == 0


def test_logs_the_count_and_refuses_one_that_does_not_add_up(caplog):
    index = cut_blocks(np.array([4, 1, 30]), 10, "complete_doc")
    with caplog.at_level(logging.INFO, logger=blocks.__name__):
        index.check_conservation("train")
    assert "35 tokens = 34 in 4 blocks + 1 separators" in caplog.text
    assert "3 lines, 1 of them split" in caplog.text
    with pytest.raises(RuntimeError, match="does not add up"):
        BlockIndex(index.starts, index.lengths, 36, 1, 3, 1).check_conservation("train")


def test_refuses_unknown_mode_and_empty_blocks():
    with pytest.raises(ValueError, match="--sample-break-mode sentence"):
        cut_blocks(np.array([3]), 8, "sentence")
    with pytest.raises(ValueError, match="--tokens-per-sample must be at least 2"):
        cut_blocks(np.array([3]), 0, "none")
