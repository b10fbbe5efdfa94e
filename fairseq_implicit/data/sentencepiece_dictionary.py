"""A fairseq dictionary made from a sentencepiece model, which encodes raw text by itself.

``fairseq-preprocess`` asks the task for a dictionary and hands every raw line to its ``encode_line``. A dictionary that
owns the sentencepiece model therefore binarises raw text in one step. The bytes are those of the two-step route
(write the pieces to a text file, binarise that file with the exported ``dict.txt``).
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from fairseq.data import Dictionary
from fairseq.tokenizer import tokenize_line

MASK = "<mask>"
MODEL_FILE_NAME = "sentencepiece.bpe.model"  # the name that fairseq's hub looks for beside a checkpoint
WORD_START = "\u2581"

# Characters that Python's ``\s`` counts as white space or that sentencepiece treats in its own way. A line without them
# takes the fast route (sentencepiece ids, then one table look-up), which is then provably equal to the text route.
_UNUSUAL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\xa0\u1680\u2000-\u200f\u2028-\u202f\u205f\u3000\ufeff\t]")


class SentencePieceDictionary(Dictionary):
    """fairseq dictionary with the pieces of a sentencepiece model, in the model's order.

    Ids: ``<s> <pad> </s> <unk>`` are 0 to 3 as everywhere in fairseq, then every piece of the model that is neither a
    control nor the unknown piece, then ``madeupword`` rows. ``<mask>`` is not part of it: the task appends it.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.model_proto: bytes | None = None
        self._ids = np.zeros(0, dtype=np.int32)
        self._processor = None

    @classmethod
    def from_model(cls, path: str, pad_to_multiple: int = 64) -> "SentencePieceDictionary":
        """Reads a sentencepiece model.

        Args:
            path: the ``.model`` file.
            pad_to_multiple: ``madeupword`` rows are appended until the size *with* the task's ``<mask>`` is a multiple
                of this (matrix multiplications over the vocabulary are faster then). They are written to ``dict.txt``,
                so that tasks that read it and only append ``<mask>`` agree on the size.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no sentencepiece model, or has a piece that fairseq's text format cannot hold.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--srcdict {path}: there is no such sentencepiece model.")
        dictionary = cls()
        dictionary.model_proto = Path(path).read_bytes()
        try:
            processor = dictionary.processor
        except RuntimeError as error:
            raise ValueError(f"--srcdict {path} is not a readable sentencepiece model ({error}).") from None
        ids = np.full(processor.get_piece_size(), dictionary.unk(), dtype=np.int32)
        for piece_id in range(processor.get_piece_size()):
            if processor.is_control(piece_id) or processor.is_unknown(piece_id):
                continue
            piece = processor.id_to_piece(piece_id)
            _refuse_piece(path, piece, dictionary)
            ids[piece_id] = dictionary.add_symbol(piece)
        dictionary._ids = ids
        made_up = 0
        while pad_to_multiple > 1 and (len(dictionary) + 1) % pad_to_multiple:
            dictionary.add_symbol(f"madeupword{made_up:04d}", n=0)
            made_up += 1
        return dictionary

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """The sentencepiece processor, built on first use in every process."""
        if self._processor is None:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_proto)
        return self._processor

    def __getstate__(self):
        return {**self.__dict__, "_processor": None}

    def encode_line(
        self,
        line: str,
        line_tokenizer: Callable | None = None,
        add_if_not_exist: bool = False,
        consumer: Callable[[str, int], None] | None = None,
        append_eos: bool = True,
        reverse_order: bool = False,
    ) -> torch.IntTensor:
        """Encodes one line of raw text.

        Args:
            line: raw text; an empty line gives a lone ``</s>`` (fairseq's document separator).
            line_tokenizer: ignored, sentencepiece tokenises.
            add_if_not_exist: ignored, the dictionary is closed.
            consumer: called with ``(surface, id)`` of every *unknown* piece: fairseq counts them as replaced.
            append_eos: end with ``</s>``.
            reverse_order: right to left.

        Returns:
            ids, ``(length,)`` int32.
        """
        line = line.rstrip("\n")
        if _UNUSUAL.search(line):
            # White space inside a piece would vanish in the text route (fairseq splits at any ``\s``): do the same.
            surfaces = tokenize_line(" ".join(self.processor.encode(line, out_type=str)))
            ids = np.array([self._piece_index(piece) for piece in surfaces], dtype=np.int32)
        else:
            surfaces = None
            ids = self._ids[np.array(self.processor.encode(line), dtype=np.int64)]
        if consumer is not None and (ids == self.unk()).any():
            surfaces = surfaces or self.processor.encode(line, out_type=str)
            for surface, index in zip(surfaces, ids.tolist()):
                if index == self.unk():
                    consumer(surface, index)
        if reverse_order:
            ids = ids[::-1]
        if append_eos:
            ids = np.append(ids, np.int32(self.eos()))
        return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int32))

    def _piece_index(self, piece: str) -> int:
        """Id of a piece's surface; text that merely looks like a special symbol is unknown text, not that symbol."""
        index = self.index(piece)
        return index if index >= self.nspecial else self.unk()

    def save(self, f) -> None:
        """Writes ``dict.txt`` and, when ``f`` is a path, a copy of the model beside it (``sentencepiece.bpe.model``).

        Raises:
            FileExistsError: the folder already holds another dictionary, and so probably data binarised with it.
        """
        if not isinstance(f, str):
            super().save(f)
            return
        if os.path.exists(f) and Dictionary.load(f).symbols != self.symbols:
            raise FileExistsError(
                f"{f} belongs to another dictionary, and data binarised with it cannot be mixed with this one: "
                "choose another --destdir or remove the folder."
            )
        super().save(f)
        if self.model_proto is not None:
            Path(f).with_name(MODEL_FILE_NAME).write_bytes(self.model_proto)


def _refuse_piece(path: str, piece: str, dictionary: Dictionary) -> None:
    """Raises ValueError on a piece that dict.txt cannot hold or that would collide with a special symbol."""
    if piece == "" or re.search(r"\s", piece):
        raise ValueError(
            f"--srcdict {path}: the piece {piece!r} contains white space, which fairseq's dict.txt cannot hold: "
            "train the sentencepiece model on text without control characters."
        )
    if piece in dictionary or piece == MASK or piece.startswith("madeupword"):
        raise ValueError(
            f"--srcdict {path}: the piece {piece!r} collides with a symbol of fairseq's own: train the sentencepiece "
            "model without it among user_defined_symbols."
        )


def check_model_matches(dictionary: Dictionary, model_path: str) -> None:
    """Compares the sentencepiece model beside the data with the dictionary that the data was binarised with.

    Raises:
        ValueError: their pieces differ.
    """
    pieces = SentencePieceDictionary.from_model(model_path, pad_to_multiple=1).symbols
    symbols = [symbol for symbol in dictionary.symbols if not symbol.startswith("madeupword") and symbol != MASK]
    if symbols != pieces:
        row = next((i for i, (a, b) in enumerate(zip(symbols, pieces)) if a != b), min(len(symbols), len(pieces)))
        raise ValueError(
            f"{model_path} does not match the dict.txt beside it ({len(pieces)} and {len(symbols)} symbols, first "
            f"difference at id {row}): put the model there that the data was binarised with."
        )


def word_starts(dictionary: Dictionary) -> np.ndarray:
    """Which ids begin a word, ``(len(dictionary),)`` bool: pieces that begin with ``▁``, and all special symbols.

    Raises:
        ValueError: no piece begins with ``▁``, so the dictionary is not sentencepiece's.
    """
    starts = np.array([symbol.startswith(WORD_START) for symbol in dictionary.symbols])
    if not starts.any():
        raise ValueError(
            "--mask-whole-words needs a sentencepiece dictionary, but no symbol of dict.txt begins with '▁'."
        )
    starts[: dictionary.nspecial] = True
    for index, symbol in enumerate(dictionary.symbols):
        if symbol == MASK or symbol.startswith("madeupword"):
            starts[index] = True
    return starts
