"""Training of sentencepiece models on a seeded sample of a corpus, in the sizes that the field uses."""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from fairseq_implicit.corpora.cleaning import wrap_line
from fairseq_implicit.corpora.durable import write_bytes, write_text
from fairseq_implicit.corpora.manifest import read_manifest
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary

# sentencepiece's <unk>, <s>, </s> fall away in fairseq's dictionary; <s>, <pad>, </s>, <unk> and <mask> are added.
_ADDED_BY_FAIRSEQ = 5
_DROPPED_BY_FAIRSEQ = 3
_LARGEST_SAMPLE = 10_000_000  # paragraphs
_LONGEST_LINE = 2**20  # bytes; sentencepiece leaves longer lines out of the training in silence
_SAMPLE_BLOCK = 2**16

# A piece with white space cannot stand in dict.txt: everything that Python's \s matches becomes a plain space, and the
# other control characters go.
_OTHER_SPACE = re.compile(r"[^\S ]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")


@dataclass(frozen=True)
class TokenizerPreset:
    """One published choice of sentencepiece options.

    Attributes:
        dictionary_size: rows of the embedding: pieces, fairseq's four symbols and ``<mask>``; a multiple of 64.
        options: sentencepiece's own options.
    """

    dictionary_size: int
    options: dict


PRESETS = {
    # google-research/albert, README: lower-cased, marks of punctuation as own pieces
    "albert-30k": TokenizerPreset(
        30016,
        {
            "model_type": "unigram",
            "character_coverage": 0.99995,
            "normalization_rule_name": "nmt_nfkc_cf",
            "user_defined_symbols": ["(", ")", '"', "-", ".", "–", "£", "€"],
        },
    ),
    # CamemBERT (Martin et al. 2020, section 4.2): 32k pieces, cased
    "bert-32k": TokenizerPreset(32000, {"model_type": "unigram", "character_coverage": 0.9995}),
    # XLM-R (Conneau et al. 2020, section 3): 250k pieces over 100 languages
    "xlm-250k": TokenizerPreset(
        250048, {"model_type": "unigram", "character_coverage": 0.9995, "train_extremely_large_corpus": True}
    ),
    # LLaMA (Touvron et al. 2023, section 2.1): byte-pair encoding, single digits, bytes for unknown characters
    "bpe-32k": TokenizerPreset(
        32000,
        {
            "model_type": "bpe",
            "character_coverage": 0.99995,
            "byte_fallback": True,
            "split_digits": True,
            "normalization_rule_name": "identity",
        },
    ),
}


def text_files(inputs: list[Path]) -> list[Path]:
    """Expands folders of ``prepare-corpus`` to their train shards.

    Raises:
        FileNotFoundError: an input is missing, or a folder holds no finished corpus.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            manifest = read_manifest(path)
            if manifest is None:
                raise FileNotFoundError(f"{path} has no manifest.json: it is no finished corpus of prepare-corpus")
            files += [path / name for name in sorted(manifest["files"]) if name.startswith("train.")]
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such text file")
    return files


def sampled_lines(files: list[Path], sample_size: int, seed: int) -> Iterator[str]:
    """Lines of text for training, in file order.

    Args:
        files: UTF-8 text.
        sample_size: bytes to take; a larger corpus gives blocks of 64 KiB at places drawn with ``seed``, without
            reading the rest.
        seed: of the drawing.
    """
    sizes = [path.stat().st_size for path in files]
    blocks = [(number, start) for number, size in enumerate(sizes) for start in range(0, size, _SAMPLE_BLOCK)]
    count = max(1, sample_size // _SAMPLE_BLOCK)
    if len(blocks) > count:
        blocks = sorted(random.Random(seed).sample(blocks, count))
    for number, start in blocks:
        with open(files[number], "rb") as file:
            # A block owns the lines that begin in it.
            if start:
                file.seek(start - 1)
                file.readline()
            while file.tell() < start + _SAMPLE_BLOCK and (line := file.readline()):
                yield from _training_lines(line.decode("utf-8", "replace"))


def _training_lines(line: str) -> Iterator[str]:
    line = _CONTROLS.sub("", _OTHER_SPACE.sub(" ", line.rstrip("\r\n")))
    for piece in wrap_line(line, _LONGEST_LINE):
        if piece and not piece.isspace():
            yield piece


def _advice(error: str) -> str:
    """What to do about an error of sentencepiece, in rows of the embedding and in flags of the command."""
    beside_pieces = _ADDED_BY_FAIRSEQ - _DROPPED_BY_FAIRSEQ
    if few := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        least = int(few[1]) + beside_pieces
        return (
            f"its characters alone need {least}; give --dictionary-size {least} or more, or leave rare characters out "
            "with a lower --character-coverage"
        )
    if many := re.search(r"value <= (\d+)", error):
        most = int(many[1]) + beside_pieces
        return f"it has {most} at most; give more text, or --dictionary-size {most} or less"
    if "sentences_.empty()" in error:
        return "it holds no text"
    return error.rsplit("] ", 1)[-1].strip() or error  # what follows the C++ condition


def _refuse_second_model(out: Path) -> None:
    """Raises FileExistsError where ``dict.txt`` beside ``out`` is that of another model."""
    dictionary = out.with_name("dict.txt")
    if not dictionary.is_file():
        return
    rows = dictionary.read_bytes()
    for other in sorted(set(out.parent.glob("*.model")) - {out}):
        with contextlib.suppress(ValueError):  # no model
            if SentencePieceVocabulary.open(other).dictionary_text().encode() == rows:
                raise FileExistsError(
                    f"{dictionary} belongs to {other.name}: give --out another folder, for each model has its dict.txt "
                    "beside it"
                )


def train_tokenizer(
    inputs: list[Path],
    out: Path,
    dictionary_size: int,
    options: dict,
    sample_size: int = 500 * 10**6,
    seed: int = 1,
    threads: int = 4,
) -> None:
    """Writes a sentencepiece model to ``out`` and fairseq's ``dict.txt`` beside it, both durably.

    The same text gives the same bytes, wherever the files lie.

    Args:
        inputs: text files, or folders of ``prepare-corpus``.
        out: the ``.model`` file.
        dictionary_size: rows of the embedding.
        options: sentencepiece options, as in `PRESETS`.
        sample_size: bytes of text to train on.
        seed: of the sample.
        threads: of the training; part of the result, because the sums of the EM steps depend on their number.

    Raises:
        FileNotFoundError: an input is missing.
        FileExistsError: the ``dict.txt`` of another model lies beside ``out``.
        ValueError: the text does not suffice for so many pieces.
    """
    _refuse_second_model(out)
    files = text_files(inputs)
    pieces = dictionary_size - _ADDED_BY_FAIRSEQ + _DROPPED_BY_FAIRSEQ
    if pieces <= _DROPPED_BY_FAIRSEQ:
        raise ValueError(f"--dictionary-size {dictionary_size} leaves no room for a piece of text: give some thousands")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sampled_lines(files, sample_size, seed),  # file names would be stored in the model
            model_writer=model,
            vocab_size=pieces,
            input_sentence_size=_LARGEST_SAMPLE,
            shuffle_input_sentence=True,
            max_sentence_length=_LONGEST_LINE,
            num_threads=threads,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(
            f"{', '.join(map(str, inputs))} gives no dictionary of {dictionary_size} symbols: {_advice(str(error))}"
        ) from None
    # Refuses a model that fairseq's dictionary could not hold before anything is written.
    vocabulary = SentencePieceVocabulary(model.getvalue())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_name("dict.txt"), vocabulary.dictionary_text())
    write_bytes(out, model.getvalue())
