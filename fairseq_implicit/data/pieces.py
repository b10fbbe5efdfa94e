"""How text becomes the symbols of ``dict.txt`` and returns: sentencepiece models and GPT-2's byte pairs.

fairseq's encoders read the files. What is added here is what they leave open: where a word starts, text that looks like
a special symbol, and symbols of the dictionary that stand for no text.
"""

from collections.abc import Sequence
from typing import Protocol

import sentencepiece
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import GPT2BPE
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE

from fairseq_implicit.data.sentencepiece_dictionary import MODEL_FILE_NAME, WORD_START

#: The files of each ``--bpe`` under the names that models are published with, by fairseq's flag.
FILES: dict[str, dict[str, str]] = {
    "sentencepiece": {"sentencepiece_model": MODEL_FILE_NAME},
    "gpt2": {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"},
}


class Pieces(Protocol):
    """A tokenizer whose pieces are the symbols of a dictionary."""

    def split(self, text: str, glued: bool = False) -> list[str]:
        """The symbols of a text; ``glued`` text continues the word before it."""

    def surface(self, symbol: str) -> str:
        """The text that one symbol stands for, with its leading space where it starts a word."""

    def join(self, symbols: Sequence[str]) -> str:
        """The text of symbols: the inverse of :meth:`split`."""


class SentencePieces:
    """Pieces of a sentencepiece model, of which those with a ``▁`` start a word."""

    def __init__(self, bpe: SentencepieceBPE, dictionary: Dictionary):
        self.processor: sentencepiece.SentencePieceProcessor = bpe.sp
        self._continuing = None

    def split(self, text: str, glued: bool = False) -> list[str]:
        processor = self._glued if glued else self.processor
        # fairseq's text format splits at any white space, so a piece such as U+0085 never reached the training data.
        return " ".join(processor.encode(text, out_type=str)).split()

    @property
    def _glued(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the word start that sentencepiece puts before every text."""
        if self._continuing is None:
            from sentencepiece import sentencepiece_model_pb2

            proto = sentencepiece_model_pb2.ModelProto()
            proto.ParseFromString(self.processor.serialized_model_proto())
            proto.normalizer_spec.add_dummy_prefix = False
            self._continuing = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        return self._continuing

    def surface(self, symbol: str) -> str:
        return symbol.replace(WORD_START, " ")

    def join(self, symbols: Sequence[str]) -> str:
        return "".join(map(self.surface, symbols)).strip()


class BytePairs:
    """GPT-2's byte pairs, whose symbols are the numbers of ``encoder.json``. The text itself holds the spaces.

    Raises:
        ValueError: the files do not belong together.
    """

    def __init__(self, bpe: GPT2BPE, dictionary: Dictionary):
        self.encoder = bpe.bpe
        known = self.encoder.encoder
        if any("".join(pair) not in known for pair in self.encoder.bpe_ranks) or any(
            byte not in known for byte in self.encoder.byte_decoder
        ):
            raise ValueError("encoder.json lacks pieces that vocab.bpe forms: they belong to different models")
        if not any(str(number) in dictionary for number in known.values()):
            raise ValueError(
                "dict.txt holds none of the numbers of encoder.json: it belongs to a model with another tokenizer"
            )

    def split(self, text: str, glued: bool = False) -> list[str]:
        return [str(number) for number in self.encoder.encode(text)]

    def surface(self, symbol: str) -> str:
        return self.join([symbol])

    def join(self, symbols: Sequence[str]) -> str:
        # A character may be spread over several symbols; what is no number (<unk>, madeupword0000) stands for itself.
        text = bytearray()
        for symbol in symbols:
            piece = self.encoder.decoder.get(int(symbol)) if symbol.isascii() and symbol.isdigit() else None
            text += symbol.encode() if piece is None else bytes(self.encoder.byte_decoder[byte] for byte in piece)
        return text.decode("utf-8", errors="replace")


#: The tokenizer of each ``--bpe``, made from fairseq's encoder and the dictionary.
PIECES: dict[str, type[Pieces]] = {"sentencepiece": SentencePieces, "gpt2": BytePairs}
