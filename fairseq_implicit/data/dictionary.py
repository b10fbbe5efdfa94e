"""fairseq's dictionary over a vocabulary, which encodes raw text by itself.

``fairseq-preprocess`` asks the task for a dictionary and hands every raw line to its ``encode_line``. A dictionary that
owns the tokenizer therefore binarises raw text in one step. The bytes are those of the two-step route (write the pieces
to a text file, binarise that file with the exported ``dict.txt``).
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary

from fairseq_implicit.text.vocabulary import Vocabulary, count_of


class VocabularyDictionary(Dictionary):
    """The rows of a vocabulary. ``<mask>`` is not part of it: the task appends it.

    Attributes:
        vocabulary: what encodes text.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        for symbol in vocabulary.symbols[self.nspecial :]:
            self.add_symbol(symbol, n=count_of(symbol))

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
            line_tokenizer: ignored, the vocabulary tokenises.
            add_if_not_exist: ignored, the dictionary is closed.
            consumer: called with ``(surface, id)`` of every *unknown* piece: fairseq counts them as replaced.
            append_eos: end with ``</s>``.
            reverse_order: right to left.

        Returns:
            ids, ``(length,)`` int32.
        """
        line = line.rstrip("\n")
        ids = self.vocabulary.encode(line)
        if consumer is not None and (ids == self.unk()).any():
            for surface, index in zip(self.vocabulary.split(line), ids.tolist(), strict=True):
                if index == self.unk():
                    consumer(surface, index)
        line_ids = np.full(len(ids) + append_eos, self.eos(), dtype=np.int32)
        line_ids[: len(ids)] = ids[::-1] if reverse_order else ids
        return torch.from_numpy(line_ids)

    def save(self, f) -> None:
        """Writes ``dict.txt`` and, when ``f`` is a path, copies of the tokenizer's files beside it.

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
        for name, content in self.vocabulary.contents.items():
            Path(f).with_name(name).write_bytes(content)
