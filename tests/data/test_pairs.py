"""Shortening of sentence pairs: one token after the other from the longer side."""

import numpy as np
import pytest

from fairseq_implicit.data.pairs import shorten_segments


@pytest.mark.parametrize(
    "lengths, room, expected",
    [
        ((5, 3), 8, [5, 3]),
        ((5, 3), 7, [4, 3]),
        ((5, 3), 5, [3, 2]),
        ((100, 3), 60, [57, 3]),
        ((3, 100), 60, [3, 57]),
        ((100, 100), 61, [31, 30]),
        ((100,), 62, [62]),
        ((0, 9), 4, [0, 4]),
        ((9, 2, 7), 12, [5, 2, 5]),
    ],
)
def test_the_longest_gives_first_and_beginnings_stay(lengths, room, expected):
    segments = [list(range(1000 * i, 1000 * i + length)) for i, length in enumerate(lengths)]
    kept = shorten_segments(segments, room)
    assert [len(segment) for segment in kept] == expected
    assert all(segment[: len(part)] == part for segment, part in zip(segments, kept, strict=True))


def test_nothing_is_lost_that_would_fit():
    """Against BERT's loop (``_truncate_seq_pair``), and the sums: no room is wasted, no side is lost to the other."""
    rng = np.random.default_rng(0)
    for first, second, room in zip(*rng.integers(1, 200, (2, 300)), rng.integers(2, 200, 300), strict=True):
        a, b = list(range(first)), list(range(second))
        while len(a) + len(b) > room:
            (a if len(a) > len(b) else b).pop()
        assert shorten_segments([range(first), range(second)], int(room)) == [range(len(a)), range(len(b))]
        assert len(a) + len(b) == min(first + second, room) and a and b


def test_no_room_for_a_token_of_each_is_refused():
    with pytest.raises(ValueError, match="1 tokens are no room for 2 segments"):
        shorten_segments([[1], [2]], 1)
