"""Opening a data folder written by fairseq-preprocess: every way in which it can be wrong gets one sentence."""

import itertools
import os

from fairseq import utils
from fairseq.data import Dictionary

from fairseq_implicit.data.mapped_tokens import MappedTokens
from fairseq_implicit.data.sentencepiece_dictionary import MODEL_FILE_NAME, check_model_matches

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


def load_dictionary(folders: list[str]) -> Dictionary:
    """``dict.txt`` of the first folder, compared with the sentencepiece model beside it and with the other folders'.

    Raises:
        FileNotFoundError: the first folder has no ``dict.txt``.
        ValueError: the sentencepiece model or another shard does not match it.
    """
    path = os.path.join(folders[0], "dict.txt")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"the data folder {folders[0]} has no dict.txt: make it with {_PREPROCESS} {folders[0]}"
        )
    dictionary = Dictionary.load(path)
    model_path = os.path.join(folders[0], MODEL_FILE_NAME)
    if os.path.isfile(model_path):
        check_model_matches(dictionary, model_path)
    for folder in folders[1:]:
        other = os.path.join(folder, "dict.txt")
        if os.path.isfile(other) and Dictionary.load(other).symbols != dictionary.symbols:
            raise ValueError(f"{other} differs from {path}: binarise all shards with one --srcdict.")
    return dictionary


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
