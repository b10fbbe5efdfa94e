"""sentencepiece models: unigram and byte-pair pieces of text, of which those with ``▁`` begin a word.

The ids are byte for byte those of fairseq's text route (pieces written as text, split at white space, looked up in
``dict.txt``), without the text: that route spends its time in a Python loop over pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import sentencepiece

from fairseq_implicit.text.vocabulary import UNKNOWN, Vocabulary

WORD_START = "\u2581"
MODEL_FILE = "sentencepiece.bpe.model"  # the name that fairseq's hub interface looks for beside a checkpoint

# White space other than the plain space. A known piece never contains it, but the surface of an unknown one can where
# the model's normalisation leaves it, and then fairseq's text route cuts the surface there.
_UNUSUAL_SPACE = re.compile(r"[^\S ]")


class SentencePieceVocabulary(Vocabulary):
    """The pieces of a sentencepiece model that are neither controls nor the unknown piece."""

    NAME = "sentencepiece model"
    FILES = {"sentencepiece_model": MODEL_FILE}

    def __init__(self, model: bytes, symbols: Sequence[str] | None = None):
        super().__init__(model, symbols=symbols)
        self._table = self.ids(self._pieces)  # row of every id of the model

    def _read(self, *contents: bytes) -> list[str]:
        (model,) = contents
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
            pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"this is no sentencepiece model ({error}).") from error
        self._pieces = pieces
        return [p for n, p in enumerate(pieces) if not (processor.is_control(n) or processor.is_unknown(n))]

    def split(self, text: str, glued: bool = False) -> list[str]:
        processor = self._continuing if glued else self._processor
        pieces = processor.encode(text, out_type=str)
        return " ".join(pieces).split() if self._may_cut(text) else pieces

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the word start that sentencepiece puts before every text."""
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
        proto.ParseFromString(self._processor.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @staticmethod
    def surface(symbol: str) -> str:
        return symbol.replace(WORD_START, " ")

    def encode(self, text: str, glued: bool = False) -> np.ndarray:
        if glued or self._may_cut(text):
            return self.ids(self.split(text, glued))
        return self._table[self._processor.encode(text, return_type="numpy")]

    def _may_cut(self, text: str) -> bool:
        """Whether white space inside an unknown piece may cut it. Most models make all white space a plain one."""
        return bool(_UNUSUAL_SPACE.search(text) and _UNUSUAL_SPACE.search(self._processor.normalize(text)))

    def _encode(self, lines: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        arrays = self._processor.encode(lines, return_type="numpy", num_threads=1)
        flat = self._table[np.concatenate(arrays)] if arrays else np.zeros(0, dtype=self.dtype)
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        unknown = np.flatnonzero(flat == UNKNOWN)
        if len(unknown):
            ends = np.cumsum(lengths)
            texts = {int(n): lines[n].decode() for n in np.unique(np.searchsorted(ends, unknown, side="right"))}
            replaced = {n: self.ids(self.split(text)) for n, text in texts.items() if self._may_cut(text)}
            if replaced:
                parts = np.split(flat, ends[:-1])
                for number, ids in replaced.items():
                    parts[number] = ids
                    lengths[number] = len(ids)
                flat = np.concatenate(parts)
        return flat, lengths
