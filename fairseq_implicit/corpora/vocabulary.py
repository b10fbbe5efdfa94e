"""fairseq's token ids of a sentencepiece model, without fairseq.

The rows are those of ``fairseq-preprocess --srcdict spm.model`` with this package's task: ``<s> <pad> </s> <unk>``,
every piece that is neither a control nor the unknown piece in the model's order, then ``madeupword`` rows up to a
multiple of 64 counting the ``<mask>`` that the task appends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from fairseq_implicit.corpora.problems import CorpusError

SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
EOS, UNKNOWN = 2, 3
MASK = "<mask>"
# The name that fairseq's hub interface looks for beside a checkpoint.
MODEL_FILE_NAME = "sentencepiece.bpe.model"
# fairseq stores ids of smaller vocabularies in 16 bits.
_UINT16_LIMIT = 65500


@dataclass(frozen=True)
class Vocabulary:
    """Pieces and ids.

    Attributes:
        model: the serialised sentencepiece model.
        symbols: all rows, special symbols and ``madeupword`` rows included, without ``<mask>``.
        ids: fairseq id of every sentencepiece id, ``(pieces,)`` int32.
        made_up: number of ``madeupword`` rows at the end.
    """

    model: bytes
    symbols: list[str]
    ids: np.ndarray
    made_up: int

    @classmethod
    def from_model(cls, path: Path, pad_to_multiple: int = 64) -> Vocabulary:
        """Reads a ``.model`` file.

        Raises:
            CorpusError: the file is missing, is no sentencepiece model, or has a piece that dict.txt cannot hold.
        """
        if not path.is_file():
            raise CorpusError(
                f"--tokenizer {path}: there is no such sentencepiece model; make it with train-tokenizer."
            )
        model = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
            pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise CorpusError(f"--tokenizer {path} is no sentencepiece model ({error}).") from error
        symbols = list(SPECIAL_SYMBOLS)
        taken = {*symbols, MASK}
        ids = np.full(len(pieces), UNKNOWN, dtype=np.int32)
        for number, piece in enumerate(pieces):
            if processor.is_control(number) or processor.is_unknown(number):
                continue
            if not piece or re.search(r"\s", piece):
                raise CorpusError(
                    f"--tokenizer {path}: the piece {piece!r} contains white space, which fairseq's dict.txt cannot "
                    "hold; train the model on text without control characters."
                )
            if piece in taken or piece.startswith("madeupword"):
                raise CorpusError(
                    f"--tokenizer {path}: the piece {piece!r} collides with a symbol of fairseq's own; train the model "
                    "without it among its user-defined symbols."
                )
            ids[number] = len(symbols)
            symbols.append(piece)
            taken.add(piece)
        made_up = -(len(symbols) + 1) % pad_to_multiple
        symbols += [f"madeupword{number:04d}" for number in range(made_up)]
        return cls(model, symbols, ids, made_up)

    @property
    def dtype(self) -> np.dtype:
        """Integer type of the ids in ``.bin``."""
        return np.dtype(np.uint16 if len(self.symbols) < _UINT16_LIMIT else np.uint32)

    def dictionary_text(self) -> str:
        """Content of fairseq's dict.txt."""
        rows = self.symbols[len(SPECIAL_SYMBOLS) :]
        real = len(rows) - self.made_up
        return "".join(f"{symbol} {1 if number < real else 0}\n" for number, symbol in enumerate(rows))
