"""The blocks of a binarised split: every token exactly once per epoch, in every break mode.

fairseq's ``complete`` modes make a line that is longer than a block into one over-long block, which the trainer then
skips: on text with one paragraph per line most of the corpus is lost in silence. Here a long line is cut.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_implicit.text.token_files import MappedTokens
from fairseq_implicit.text.vocabulary import BOS, MASK

logger = logging.getLogger(__name__)

BREAK_MODES = ("none", "complete", "complete_doc", "eos")
_LINES_AT_ONCE = 1 << 20  # bounds the temporary arrays to some 50 MB whatever the size of the split


@dataclass(frozen=True)
class BlockIndex:
    """Where the blocks of one split lie in its flat token file, and what became of every token.

    Attributes:
        starts: first token of each block, ``(blocks,)`` int64.
        lengths: tokens of each block, ``(blocks,)`` int32, at most the block size.
        tokens: tokens in the split.
        separators: lone ``</s>`` of blank lines, which ``complete_doc`` and ``eos`` leave out: they mark the borders
            of documents and hold no text.
        lines: lines in the split, blank ones included.
        lines_split: lines that were longer than a block and were cut.
    """

    starts: np.ndarray
    lengths: np.ndarray
    tokens: int
    separators: int
    lines: int
    lines_split: int

    @property
    def tokens_in_blocks(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def check_conservation(self, name: str) -> None:
        """Logs the count of ``name`` and makes sure that it adds up.

        Raises:
            RuntimeError: tokens in the split ≠ tokens in blocks + separators.
        """
        if self.tokens != self.tokens_in_blocks + self.separators:
            raise RuntimeError(
                f"{name}: {self.tokens} tokens became {self.tokens_in_blocks} in blocks and {self.separators} "
                "separators, which does not add up: this is a defect of the block index, please report it."
            )
        logger.info(
            f"{name}: {self.tokens:,} tokens = {self.tokens_in_blocks:,} in {len(self):,} blocks "
            f"+ {self.separators:,} separators of documents; {self.lines:,} lines, {self.lines_split:,} of them split; "
            f"mean block {self.tokens_in_blocks / max(len(self), 1):.1f} tokens"
        )


def cut_blocks(line_lengths: np.ndarray, block_size: int, break_mode: str) -> BlockIndex:
    """Cuts a split into blocks of at most ``block_size`` tokens.

    Args:
        line_lengths: tokens of each line with its ``</s>``, ``(lines,)``; 1 is a blank line.
        block_size: most tokens of a block (without the ``<s>`` that is put before each).
        break_mode: ``none``: blocks are full and end anywhere. ``complete``: whole lines are packed as long as they
            fit. ``complete_doc``: the same, but a blank line ends the block. ``eos``: one line per block. In the last
            three a line longer than a block is cut: into full blocks and a remainder that is packed with what follows
            (``complete*``), or into parts of equal length (``eos``).

    Raises:
        ValueError: unknown break mode, or a block size below 1.
    """
    if break_mode not in BREAK_MODES:
        raise ValueError(f"--sample-break-mode {break_mode} is not one of {', '.join(BREAK_MODES)}.")
    if block_size < 1:
        raise ValueError(f"--tokens-per-sample must be at least 2 (<s> and one token), not {block_size + 1}.")
    tokens = int(line_lengths.sum(dtype=np.int64))
    lines = len(line_lengths)
    split = int((line_lengths > block_size).sum())
    if break_mode == "none":
        starts = np.arange(0, tokens, block_size, dtype=np.int64)
        lengths = np.minimum(tokens - starts, block_size).astype(np.int32)
        return BlockIndex(starts, lengths, tokens, separators=0, lines=lines, lines_split=split)
    separators = 0 if break_mode == "complete" else int((line_lengths == 1).sum())
    if break_mode == "eos":
        starts, lengths = _one_line_per_block(line_lengths, block_size)
    else:
        starts, lengths = _packed_lines(line_lengths, block_size, by_document=break_mode == "complete_doc")
    return BlockIndex(starts, lengths, tokens, separators, lines, split)


def _one_line_per_block(line_lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    starts, lengths = [], []
    offset = 0
    for first in range(0, len(line_lengths), _LINES_AT_ONCE):
        sizes = line_lengths[first : first + _LINES_AT_ONCE].astype(np.int64)
        line_starts = offset + np.cumsum(sizes) - sizes
        offset += int(sizes.sum())
        text = sizes > 1
        part_starts, part_sizes = _cut_lines(line_starts[text], sizes[text], block_size, equal_parts=True)
        starts.append(part_starts)
        lengths.append(part_sizes.astype(np.int32))
    return _concatenate(starts, np.int64), _concatenate(lengths, np.int32)


def _cut_lines(
    line_starts: np.ndarray, sizes: np.ndarray, block_size: int, equal_parts: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts every line into ``ceil(size / block_size)`` parts; returns starts and sizes of all parts in order."""
    count = -(-sizes // block_size)
    line = np.repeat(np.arange(len(sizes)), count)
    rank = np.arange(len(line)) - np.repeat(np.cumsum(count) - count, count)
    if equal_parts:
        begin = rank * sizes[line] // count[line]
        end = (rank + 1) * sizes[line] // count[line]
    else:
        begin = rank * block_size
        end = np.minimum(begin + block_size, sizes[line])
    return line_starts[line] + begin, end - begin


def _packed_lines(line_lengths: np.ndarray, block_size: int, by_document: bool) -> tuple[np.ndarray, np.ndarray]:
    """Greedy packing of line parts, a bounded number of lines at a time; the last open block is carried over."""
    starts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    offset, document = 0, 0
    carried = tuple(np.zeros(0, dtype=np.int64) for _ in range(3))
    for first in range(0, len(line_lengths), _LINES_AT_ONCE):
        sizes = line_lengths[first : first + _LINES_AT_ONCE].astype(np.int64)
        line_starts = offset + np.cumsum(sizes) - sizes
        offset += int(sizes.sum())
        documents = np.full(len(sizes), document, dtype=np.int64)
        if by_document:
            blank = sizes == 1
            documents += np.cumsum(blank)
            document = int(documents[-1])
            line_starts, sizes, documents = line_starts[~blank], sizes[~blank], documents[~blank]
        part_starts, part_sizes = _cut_lines(line_starts, sizes, block_size, equal_parts=False)
        parts = (part_starts, part_sizes, np.repeat(documents, -(-sizes // block_size)))
        parts = tuple(np.concatenate(pair) for pair in zip(carried, parts, strict=True))
        last = first + _LINES_AT_ONCE >= len(line_lengths)
        begin, end, resume_at = _pack(parts[1], parts[2], block_size, last)
        ends = np.append(0, np.cumsum(parts[1]))
        starts.append(parts[0][begin])
        lengths.append((ends[end] - ends[begin]).astype(np.int32))
        carried = tuple(part[resume_at:] for part in parts)
    return _concatenate(starts, np.int64), _concatenate(lengths, np.int32)


def _pack(sizes: np.ndarray, documents: np.ndarray, block_size: int, last: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """First and past-the-last part of each block, and the part at which the still open block begins."""
    count = len(sizes)
    if count == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0
    ends = np.cumsum(sizes)
    following = np.searchsorted(ends, ends - sizes + block_size, side="right")
    following = np.minimum(following, np.searchsorted(documents, documents, side="right"))
    # Where a block begins depends on where the one before it ended: this chain is the one sequential step. A list of
    # Python integers is the fastest way to walk it, one step per block and not per line.
    successor = following.tolist()
    begin = []
    at = 0
    while at < count and (last or successor[at] < count):
        begin.append(at)
        at = successor[at]
    begin = np.array(begin, dtype=np.int64)
    return begin, following[begin] if len(begin) else begin, at


def _concatenate(pieces: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=dtype)


class Blocks:
    """The blocks of one or more token files, as sequences with ``<s>``.

    Args:
        files: the token files of a split.
        indices: the blocks of each file.
        symbols: the rows of the dictionary, ``<mask>`` included.

    Attributes:
        sizes: tokens of each block with its ``<s>``, ``(blocks,)`` int32.
    """

    def __init__(self, files: Sequence[MappedTokens], indices: Sequence[BlockIndex], symbols: Sequence[str]):
        self.files = list(files)
        self.starts = np.concatenate([index.starts for index in indices])
        self.sizes = np.concatenate([index.lengths for index in indices]).astype(np.int32) + 1
        self._first_of_file = np.cumsum([0] + [len(index) for index in indices])
        self._symbols = len(symbols)
        self._mask = symbols.index(MASK)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:
        """Ids of a block, ``(length,)`` int64.

        Raises:
            ValueError: it holds an id that the dictionary does not have.
        """
        file = int(np.searchsorted(self._first_of_file, number, side="right")) - 1
        text = self.files[file].slice(int(self.starts[number]), int(self.sizes[number]) - 1)
        largest = int(text.max())
        if largest >= self._symbols or (text == self._mask).any():
            raise ValueError(
                f"{self.files[file].prefix}.bin holds the id {max(largest, self._mask)}, which is no token of the "
                f"dictionary ({self._symbols} symbols with <mask>): the data was binarised with another dict.txt."
            )
        return np.append(BOS, text)

    def drawn(self, count: int = 64) -> Iterator[np.ndarray]:
        """About so many blocks, drawn evenly from all."""
        return (self[number] for number in range(0, len(self), max(1, len(self) // count)))
