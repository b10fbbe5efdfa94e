"""Sentence pairs that must fit into a model's positions."""

from collections.abc import Sequence


def shorten_segments(segments: Sequence[Sequence[int]], room: int) -> list[Sequence[int]]:
    """Shortens a pair (or any number of segments) to ``room`` tokens in all, longest first, at the segments' ends.

    One token after the other is taken from the segment that is the longest then, of equal ones from the last, as BERT
    (arXiv 1810.04805) prepares its pairs: a long segment never pushes a short one out.

    Args:
        segments: token ids of each segment, without special symbols.
        room: tokens that fit.

    Returns:
        the segments, each a beginning of what was given; none loses its last token to another.

    Raises:
        ValueError: not even one token of each segment fits.
    """
    if room < len(segments):
        raise ValueError(
            f"{room} tokens are no room for {len(segments)} segments: the model has too few positions for them"
        )
    lengths = [len(segment) for segment in segments]
    for _ in range(sum(lengths) - room):
        lengths[max(range(len(lengths)), key=lambda index: (lengths[index], index))] -= 1
    return [segment[:length] for segment, length in zip(segments, lengths, strict=True)]
