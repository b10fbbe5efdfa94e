"""Near-duplicate removal by MinHash signatures and locality-sensitive hashing.

Broder 1997 (resemblance of documents), Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4 (bands).
Shingles are 5 words, signatures 14 bands of 8 minima, the choice of FineWeb (Penedo et al. 2024, section 3.4): two
documents of resemblance s share a band with probability 1 − (1 − s⁸)¹⁴, a half at s = 0.72. In a script that is written
without spaces between words, every character counts as a word.

A document is dropped when another one that precedes it shares a band with it. The order is held-out splits first, then
the document key, so the result depends neither on the order of the files nor on the number of workers, and one pass per
band over sorted arrays is all that it takes.
"""

from __future__ import annotations

import re
import zlib

import numpy as np

#: Raise it with every change of `band_hashes`: signatures of two versions cannot be compared.
VERSION = 2
BANDS, ROWS, SHINGLE = 14, 8, 5
# Documents with fewer words have no meaningful resemblance; exact deduplication takes care of them.
SHORTEST = 20
SIGNATURE = np.dtype([("rank", "u1"), ("key", ">u8", 2), ("bands", "<u8", BANDS)])

# Scripts without word spaces: those of Unicode's line breaking classes ID, CJ and SA (UAX #14; ideographs, kana, Thai,
# Lao, Myanmar, Khmer, Tai) but Hangul. Whole blocks, for \w leaves out the vowel signs.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3005-\u3007\u3040-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_WORD = re.compile(r"\w+")
_random = np.random.Generator(np.random.PCG64(20210101))
_MULTIPLIERS = _random.integers(1, 2**63, size=BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
_ADDENDS = _random.integers(0, 2**63, size=BANDS * ROWS, dtype=np.uint64)
_BAND_MULTIPLIERS = _random.integers(1, 2**63, size=(BANDS, ROWS), dtype=np.uint64) | np.uint64(1)
_WORD_MULTIPLIERS = _random.integers(1, 2**63, size=SHINGLE, dtype=np.uint64) | np.uint64(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)
# Shingles hashed at once: 112 permutations of this many 64-bit numbers stay within the processor's second cache.
_SHINGLE_BLOCK = 512


def band_hashes(text: str) -> np.ndarray | None:
    """One 64-bit hash per band, ``(BANDS,)`` uint64, or None for a text of fewer than `SHORTEST` words."""
    pattern = _ASCII_WORD if text.isascii() else WORD
    words = np.array([zlib.crc32(word.encode()) for word in pattern.findall(text.lower())], dtype=np.uint64)
    if len(words) < SHORTEST:
        return None
    count = len(words) - SHINGLE + 1
    shingles = np.zeros(count, dtype=np.uint64)
    for position, multiplier in enumerate(_WORD_MULTIPLIERS):
        shingles += words[position : position + count] * multiplier
    shingles = np.unique(shingles)
    shingles ^= shingles >> _SHIFT
    shingles *= _MIX
    minima = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    values = np.empty((min(len(shingles), _SHINGLE_BLOCK), BANDS * ROWS), dtype=np.uint64)
    for start in range(0, len(shingles), _SHINGLE_BLOCK):
        block = shingles[start : start + _SHINGLE_BLOCK, None]
        hashed = np.multiply(block, _MULTIPLIERS, out=values[: len(block)])
        hashed += _ADDENDS
        np.minimum(minima, hashed.min(axis=0), out=minima)
    # Multiply-shift hashing: the high half of a·x + b modulo 2⁶⁴ is a nearly universal hash of x.
    minima >>= _SHIFT
    rows = minima.reshape(BANDS, ROWS) * _BAND_MULTIPLIERS
    hashes = rows.sum(axis=1, dtype=np.uint64)
    return (hashes ^ (hashes >> _SHIFT)) * _MIX


def signature(rank: int, key: bytes, bands: np.ndarray) -> bytes:
    """One row of dtype `SIGNATURE`; ``rank`` orders the splits (test 0, valid 1, train 2)."""
    row = np.zeros((), dtype=SIGNATURE)
    row["rank"], row["key"], row["bands"] = rank, np.frombuffer(key, dtype=">u8"), bands
    return row.tobytes()


def keys_to_drop(signatures: np.ndarray) -> np.ndarray:
    """Keys of the documents that have a predecessor in some band.

    Args:
        signatures: ``(documents,)`` of dtype `SIGNATURE`, in any order, exact duplicates included.

    Returns:
        the keys, ``(dropped, 2)`` uint64, sorted. Exact duplicates share a key and count as one document here.
    """
    keys, ranks = signatures["key"].astype(np.uint64), signatures["rank"]
    order = np.lexsort((ranks, keys[:, 1], keys[:, 0]))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    order = order[first]  # one row per key, with the rank of the split that keeps it
    order = order[np.argsort(ranks[order], kind="stable")]
    keys, bands = keys[order], signatures["bands"][order]
    dropped = np.zeros(len(keys), dtype=bool)
    for band in range(BANDS):
        # A stable sort keeps the documents of one band value in their own order, so the first of each run survives.
        by_value = np.argsort(bands[:, band], kind="stable")
        values = bands[by_value, band]
        dropped[by_value[1:][values[1:] == values[:-1]]] = True
    result = keys[dropped]
    return result[np.lexsort((result[:, 1], result[:, 0]))]


class KeySet:
    """Membership of 16-byte keys in the sorted result of `keys_to_drop`."""

    def __init__(self, keys: np.ndarray):
        self._keys = keys

    def __contains__(self, key: bytes) -> bool:
        high, low = (int.from_bytes(half, "big") for half in (key[:8], key[8:]))
        start = int(np.searchsorted(self._keys[:, 0], np.uint64(high), side="left"))
        while start < len(self._keys) and int(self._keys[start, 0]) == high:
            if int(self._keys[start, 1]) == low:
                return True
            start += 1
        return False
