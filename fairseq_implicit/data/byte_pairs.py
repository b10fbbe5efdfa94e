"""GPT-2's byte pairs, as RoBERTa's public weights have them, through fairseq's encoder."""

import json
from collections.abc import Iterable, Sequence

from fairseq.data.encoders.gpt2_bpe_utils import Encoder

from fairseq_implicit.text import VOCABULARIES
from fairseq_implicit.text.vocabulary import UNKNOWN, Vocabulary


class BytePairVocabulary(Vocabulary):
    """Byte pairs whose symbols are the numbers of ``encoder.json``. The text itself holds the spaces."""

    NAME = "file of GPT-2's byte pairs"
    FILES = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}

    def __init__(self, encoder_json: bytes, vocab_bpe: bytes, symbols: Sequence[str] | None = None):
        super().__init__(encoder_json, vocab_bpe, symbols=symbols)
        if (self.ids(map(str, self.encoder.encoder.values())) == UNKNOWN).all():
            raise ValueError(
                "dict.txt holds none of the numbers of encoder.json: it belongs to a model with another tokenizer"
            )

    def _read(self, encoder_json: bytes, vocab_bpe: bytes) -> list[str]:
        known = json.loads(encoder_json)
        merges = vocab_bpe.decode("utf-8").split("\n")[1:-1]  # a line of the version first
        self.encoder = Encoder(encoder=known, bpe_merges=[tuple(merge.split()) for merge in merges])
        if any("".join(pair) not in known for pair in self.encoder.bpe_ranks) or any(
            byte not in known for byte in self.encoder.byte_decoder
        ):
            raise ValueError("encoder.json lacks pieces that vocab.bpe forms: they belong to different models")
        return [str(number) for number in sorted(known.values())]

    def split(self, text: str, glued: bool = False) -> list[str]:
        return [str(number) for number in self.encoder.encode(text)]

    def surface(self, symbol: str) -> str:
        return self.join([symbol])

    def join(self, symbols: Iterable[str]) -> str:
        # A character may be spread over several symbols; what is no number (<unk>, madeupword0000) stands for itself.
        text = bytearray()
        for symbol in symbols:
            piece = self.encoder.decoder.get(int(symbol)) if symbol.isascii() and symbol.isdigit() else None
            text += symbol.encode() if piece is None else bytes(self.encoder.byte_decoder[byte] for byte in piece)
        return text.decode("utf-8", errors="replace")


#: The vocabularies of a model's folder, by ``--bpe``: those of text, and this one.
TOKENIZERS: dict[str, type[Vocabulary]] = {**VOCABULARIES, "gpt2": BytePairVocabulary}
