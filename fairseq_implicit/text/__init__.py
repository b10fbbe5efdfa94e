"""What a vocabulary is, and the files of its tokens: numpy and the tokenizers' own libraries, no torch, no fairseq.

A new kind of vocabulary is one file beside `sentence_pieces.py` and one entry in `VOCABULARIES`.
"""

from __future__ import annotations

from pathlib import Path

from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.tokenizer_json import TokenizerVocabulary
from fairseq_implicit.text.vocabulary import Vocabulary

#: The kinds of vocabularies, by the name that fairseq's ``--bpe`` has for their tokenizers.
VOCABULARIES: dict[str, type[Vocabulary]] = {
    "sentencepiece": SentencePieceVocabulary,
    "hf_tokenizer": TokenizerVocabulary,
}


def kind_of_file(path: str | Path) -> type[Vocabulary] | None:
    """The kind whose published file has the suffix of ``path``, None when there is none."""
    suffix = Path(path).suffix
    return next((kind for kind in VOCABULARIES.values() if Path(kind.published_names()[0]).suffix == suffix), None)


def vocabulary_beside(folder: str | Path) -> Vocabulary | None:
    """The vocabulary whose files, under their published names, lie in a folder; None when it holds those of no kind.

    Raises:
        ValueError: a file is damaged.
    """
    for kind in VOCABULARIES.values():
        paths = [Path(folder, name) for name in kind.published_names()]
        if all(path.is_file() for path in paths):
            return kind.open(*paths)
    return None
