"""Opening a data folder written by fairseq-preprocess: every way in which it can be wrong gets one sentence."""

import itertools
import os
from collections.abc import Callable, Sequence

from fairseq import utils
from fairseq.data import Dictionary

from fairseq_implicit.text import vocabulary_beside
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.token_files import MappedTokens
from fairseq_implicit.text.vocabulary import Vocabulary, are_text

_PREPROCESS = (
    "fairseq-preprocess --user-dir fairseq_implicit --task implicit_masked_lm --only-source --srcdict spm.model "
    "--trainpref train.txt --validpref valid.txt --destdir"
)


def data_folders(data: str) -> list[str]:
    """Splits the ``data`` argument at ``:`` into the folders of its shards.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: an empty name, as a trailing ``:`` leaves it.
    """
    folders = utils.split_paths(data)
    for folder in folders:
        if not folder:
            raise ValueError(f"the data argument {data!r} names an empty folder: remove the '{os.pathsep}' too many.")
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"the data folder {os.path.abspath(folder)} does not exist: make it with {_PREPROCESS} {folder}"
            )
    return folders


def read_dictionary(path: str) -> Dictionary:
    """A ``dict.txt``.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return Dictionary.load(path)
    except OSError:
        raise
    except Exception as error:  # fairseq's own have several kinds, the plain one among them
        raise ValueError(f"{path} is no dictionary or damaged: {error}") from None


def load_dictionary(folders: list[str]) -> Dictionary:
    """``dict.txt`` of the first folder, compared with the tokenizer beside it and with the other folders'.

    Raises:
        FileNotFoundError: the first folder has no ``dict.txt``.
        ValueError: the tokenizer or another shard does not match it.
    """
    path = os.path.join(folders[0], "dict.txt")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"the data folder {folders[0]} has no dict.txt: make it with {_PREPROCESS} {folders[0]}"
        )
    dictionary = read_dictionary(path)
    if vocabulary := vocabulary_beside(folders[0]):
        check_vocabulary_matches(dictionary.symbols, vocabulary, folders[0])
    for folder in folders[1:]:
        other = os.path.join(folder, "dict.txt")
        if os.path.isfile(other) and read_dictionary(other).symbols != dictionary.symbols:
            raise ValueError(f"{other} differs from {path}: binarise all shards with one --srcdict.")
    return dictionary


def check_vocabulary_matches(symbols: Sequence[str], vocabulary: Vocabulary, folder: str) -> None:
    """Compares a folder's tokenizer with the rows of the ``dict.txt`` that the data there was binarised with.

    Raises:
        ValueError: their pieces differ.
    """
    rows, pieces = (
        [symbol for symbol, text in zip(each, are_text(each), strict=True) if text]
        for each in (symbols, vocabulary.symbols)
    )
    if rows != pieces:
        pairs = enumerate(zip(rows, pieces, strict=False))
        row = next((i for i, (a, b) in pairs if a != b), min(len(rows), len(pieces)))
        raise ValueError(
            f"{' and '.join(vocabulary.contents)} does not match the dict.txt beside it in {folder} "
            f"({len(pieces)} and {len(rows)} pieces, first difference at number {row}): put the {vocabulary.NAME} "
            "there that the data was binarised with."
        )


def surface_of_symbols(folder: str) -> Callable[[str], str]:
    """What text each symbol of a folder's ``dict.txt`` stands for; sentencepiece's say it without their model."""
    vocabulary = vocabulary_beside(folder)
    return vocabulary.surface if vocabulary else SentencePieceVocabulary.surface


def open_split(folder: str, split: str, combine: bool) -> list[MappedTokens]:
    """The token files of a split: ``split``, and with ``combine`` also ``split1``, ``split2`` and so on.

    Raises:
        FileNotFoundError: the folder has no such split.
        ValueError: a file is truncated or all of them are empty.
    """
    files = []
    for number in itertools.count():
        prefix = os.path.join(folder, split + (str(number) if number else ""))
        if number > 0 and not (combine and os.path.isfile(prefix + ".idx")):
            break
        if number == 0 and not os.path.isfile(prefix + ".idx"):
            if os.path.isfile(prefix + ".bin") or _was_interrupted(folder):
                raise FileNotFoundError(
                    f"{folder} has no {split}.idx: fairseq-preprocess ended before it had written it (stopped, killed "
                    "or out of disk space); run the same command again."
                )
            flag = {"train": "--trainpref", "valid": "--validpref"}.get(split, "--testpref")
            instead = ", or train with --disable-validation" if split == "valid" else ""
            raise FileNotFoundError(f"{folder} has no {split}.idx: pass {flag} to fairseq-preprocess{instead}.")
        files.append(MappedTokens(prefix))
    if sum(file.token_count for file in files) == 0:
        raise ValueError(f"{os.path.join(folder, split)}.bin holds no tokens: the text it was made from is empty.")
    return files


def _was_interrupted(folder: str) -> bool:
    """Whether the last run that ``preprocess.log`` tells of did not come to its end."""
    try:
        with open(os.path.join(folder, "preprocess.log"), encoding="utf-8", errors="replace") as log:
            text = log.read()
    except OSError:
        return False
    return text.rfind("Namespace(") > text.rfind("Wrote preprocessed data to")
