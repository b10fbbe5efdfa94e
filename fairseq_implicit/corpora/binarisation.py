"""Text shards to fairseq data-bin folders: ``shard0`` (with the held-out splits) to ``shardN``.

Two routes give the same bytes: fairseq-preprocess, one process per shard, or the fast one, which cuts every shard into
ranges of lines, encodes them by sentencepiece alone and joins the results. Each range and each folder is published in
one step, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_implicit.corpora.durable import publish_folder, read_json, write_json, write_text
from fairseq_implicit.corpora.manifest import MANIFEST, read_manifest
from fairseq_implicit.corpora.ownership import own_folder
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.token_parts import PartWriter, join_parts
from fairseq_implicit.corpora.workers import advance, run_tasks
from fairseq_implicit.text import kind_of_file
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.token_files import MappedTokens
from fairseq_implicit.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

RECORD, LOCK = "binarised.json", ".binarisation.lock"
_IDENTITY = {"model_sha256": str, "texts": dict}
_RECORD = {"identity": _IDENTITY, "counts": {"*": {"lines": int, "tokens": int}}}
# Text of one range, the unit of work and of resuming: large enough for its overhead to vanish, small enough that all
# workers stay busy until the end.
_LARGEST_RANGE, _SMALLEST_RANGE = 64 * 10**6, 10**6
_RANGES_PER_WORKER = 4
# Text that is encoded at once; the arrays of one block stay within a few times this size.
_BLOCK = 2**21


@dataclass(frozen=True)
class ShardText:
    """The text files of one data-bin folder.

    Attributes:
        number: of the shard.
        files: split name to text file.
    """

    number: int
    files: dict[str, Path]


def shards_of_folder(folder: Path) -> list[ShardText]:
    """The shards of a folder that ``prepare-corpus`` has finished.

    Raises:
        CorpusError: the folder is no finished corpus.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CorpusError(
            f"{folder} has no manifest.json, so it is no finished corpus; finish it with prepare-corpus (--merge), "
            "or name text files with --train and --valid."
        )
    names = sorted(manifest["files"])
    for name in names:
        if not (folder / name).is_file():
            raise CorpusError(f"{folder / name} is missing although {folder / MANIFEST} lists it.")
    train = [folder / name for name in names if name.startswith("train.")]
    held_out = {split: folder / f"{split}.txt" for split in ("valid", "test") if f"{split}.txt" in names}
    return shards_of_files(train, held_out)


def shards_of_files(train: list[Path], held_out: dict[str, Path]) -> list[ShardText]:
    """One shard per train file; the held-out splits go to the first.

    Raises:
        CorpusError: a file is missing, or there is none.
    """
    for path in [*train, *held_out.values()]:
        if not path.is_file():
            raise CorpusError(f"The text file {path} does not exist.")
    if not train:
        raise CorpusError("There is no train file to binarise; lower --valid-fraction or give more text.")
    if "valid" not in held_out:
        logger.warning("There is no valid split; fairseq-train then needs --disable-validation.")
    return [ShardText(number, {"train": path} | (held_out if number == 0 else {})) for number, path in enumerate(train)]


def line_ranges(path: Path, size: int) -> list[tuple[int, int]]:
    """Cuts a text file into byte ranges of whole lines, without reading it."""
    total = path.stat().st_size
    bounds = [0]
    with open(path, "rb") as file:
        while bounds[-1] + size < total:
            file.seek(bounds[-1] + size - 1)
            file.readline()
            bounds.append(file.tell())
    if bounds[-1] < total or total == 0:
        bounds.append(total)
    return list(itertools.pairwise(bounds))


def lines_of_range(path: Path, first: int, last: int, block: int = _BLOCK) -> Iterator[list[bytes]]:
    """Blocks of lines of one range, cut at ``\\n``, ``\\r\\n`` and ``\\r`` as fairseq's text files are.

    Raises:
        CorpusError: the text is not UTF-8.
    """
    with open(path, "rb") as file:
        file.seek(first)
        while file.tell() < last:
            start = file.tell()
            data = file.read(min(block, last - start))
            if not data.endswith(b"\n"):
                data += file.readline()
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path} is not UTF-8 at byte {start + error.start} ({error.reason}); clean it with "
                    "prepare-corpus first."
                ) from error
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            lines = data.split(b"\n")
            if not lines[-1]:
                lines.pop()
            advance(consumed=len(data), text=len(data))
            yield lines


def open_tokenizer(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer's file, whose suffix says its kind; of another one it must be sentencepiece's.

    Raises:
        CorpusError: the file is missing, is no tokenizer, or has a piece that dict.txt cannot hold.
    """
    try:
        return (kind_of_file(path) or SentencePieceVocabulary).open(path)
    except (FileNotFoundError, ValueError) as error:
        raise CorpusError(f"--tokenizer {error}") from error


_vocabularies: dict[str, Vocabulary] = {}


def encode_range(path: Path, first: int, last: int, part: Path, model: Path, digest: str, dtype: np.dtype) -> Path:
    """Encodes one range of a text file into one part, unless it is there; returns the part."""
    if PartWriter.is_complete(part, dtype):
        advance(consumed=last - first)
        return part
    # Loading a model takes as long as encoding a megabyte: each worker keeps its last one.
    if digest not in _vocabularies:
        _vocabularies.clear()
        _vocabularies[digest] = open_tokenizer(model)
    writer = PartWriter(part, f".part-{os.getpid()}")
    for lines in lines_of_range(path, first, last):
        writer.write(*_vocabularies[digest].encode_lines(lines))
    writer.close()
    return part


@dataclass(frozen=True)
class Binarisation:
    """Binarises shards into ``output/shardK``.

    Attributes:
        shards: what to binarise.
        model: the sentencepiece model.
        output: parent folder of the data-bin folders.
        workers: processes.
    """

    shards: list[ShardText]
    model: Path
    output: Path
    workers: int

    def folder(self, shard: ShardText) -> Path:
        return self.output / f"shard{shard.number}"

    def _parts(self, shard: ShardText, digest: str) -> Path:
        return self.output / "work" / f"shard{shard.number}.{digest[:12]}"

    def run(self, fast: bool, part: int = 0, parts: int = 1) -> list[dict]:
        """Binarises the shards whose number is ``part`` modulo ``parts``; those that are done are kept.

        Returns:
            the records of this part's shards: lines and tokens by split.

        Raises:
            CorpusError: a folder was made from other text or another model, or fairseq-preprocess failed.
        """
        if os.pathsep in str(self.output.resolve()):
            raise CorpusError(
                f"--output {self.output} contains '{os.pathsep}', which separates the data folders of fairseq-train; "
                "choose another folder."
            )
        vocabulary = open_tokenizer(self.model)
        digest = hashlib.sha256(b"".join(vocabulary.contents.values())).hexdigest()
        mine = [shard for shard in self.shards if shard.number % parts == part]
        with own_folder(self.output, LOCK, part, parts):
            todo = [shard for shard in mine if not self._is_done(shard, digest)]
            for shard in mine:
                if shard not in todo:  # a run that was killed while it removed them
                    shutil.rmtree(self._parts(shard, digest), ignore_errors=True)
            if fast:
                self._run_fast(todo, vocabulary, digest)
            else:
                self._run_fairseq(todo, digest)
            write_text(self.output / "data-bin.txt", self.data_argument() + "\n")
            if parts == 1:
                for left_over in self.output.glob("data-bin.txt.part-*"):
                    left_over.unlink()
        return [read_json(self.folder(shard) / RECORD, _RECORD) for shard in mine]

    def data_argument(self) -> str:
        """The data argument of fairseq-train: all shards, joined by ``:``."""
        return os.pathsep.join(str(self.folder(shard).resolve()) for shard in self.shards)

    def _identity(self, shard: ShardText, digest: str) -> dict:
        texts = {
            split: {"path": str(path.resolve()), "bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
            for split, path in shard.files.items()
        }
        return {"model_sha256": digest, "texts": texts}

    def _is_done(self, shard: ShardText, digest: str) -> bool:
        folder = self.folder(shard)
        record = read_json(folder / RECORD, _RECORD)
        if record is None:
            if folder.exists():
                raise CorpusError(
                    f"{folder} exists but was not made by this command; give another --output or remove it."
                )
            return False
        if record["identity"] != self._identity(shard, digest):
            raise CorpusError(
                f"{folder} was binarised from another text or with another --tokenizer; give another --output or "
                "remove it."
            )
        return True

    def _run_fast(self, shards: list[ShardText], vocabulary: Vocabulary, digest: str) -> None:
        work = self.output / "work"
        tasks, parts = [], {}
        text = sum(path.stat().st_size for shard in shards for path in shard.files.values())
        size = min(_LARGEST_RANGE, max(_SMALLEST_RANGE, text // (self.workers * _RANGES_PER_WORKER)))
        for shard in shards:
            folder = self._parts(shard, digest)
            # Parts of an interrupted run are only reused for the very same text.
            identity = self._identity(shard, digest)
            if read_json(folder / RECORD, _IDENTITY) != identity:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_json(folder / RECORD, identity)
            for split, path in shard.files.items():
                ranges = line_ranges(path, size)
                names = [folder / f"{split}.{first}-{last}" for first, last in ranges]
                parts[shard.number, split] = names
                common = (self.model, digest, vocabulary.dtype)
                tasks += [(path, first, last, name, *common) for (first, last), name in zip(ranges, names, strict=True)]
        total = sum(last - first for _, first, last, *_ in tasks)
        waiting = {shard.number: sum(len(parts[shard.number, split]) for split in shard.files) for shard in shards}
        by_part = {name: shard for shard in shards for split in shard.files for name in parts[shard.number, split]}
        # Results come in any order: a shard is joined as soon as its last part is there.
        for name in run_tasks(encode_range, tasks, self.workers, total, "binarising"):
            shard = by_part[name]
            waiting[shard.number] -= 1
            if not waiting[shard.number]:
                self._join(shard, {split: parts[shard.number, split] for split in shard.files}, vocabulary, digest)
        if work.is_dir() and not any(work.iterdir()):  # other machines may still be at their shards
            work.rmdir()

    def _join(self, shard: ShardText, parts: dict[str, list[Path]], vocabulary: Vocabulary, digest: str) -> None:
        temporary = self._temporary(shard)
        temporary.mkdir()
        counts = {}
        for split, names in parts.items():
            lines, tokens = join_parts(names, temporary / split, vocabulary.dtype)
            counts[split] = {"lines": lines, "tokens": tokens}
        (temporary / "dict.txt").write_text(vocabulary.dictionary_text(), encoding="utf-8")
        for name, content in vocabulary.contents.items():
            (temporary / name).write_bytes(content)
        self._publish(shard, temporary, counts, digest)
        for names in parts.values():
            shutil.rmtree(names[0].parent, ignore_errors=True)

    def _temporary(self, shard: ShardText) -> Path:
        folder = self.folder(shard)
        for left_over in folder.parent.glob(f"{folder.name}.part"):
            shutil.rmtree(left_over)
        return folder.with_name(f"{folder.name}.part")

    def _publish(self, shard: ShardText, temporary: Path, counts: dict, digest: str) -> None:
        write_json(temporary / RECORD, {"identity": self._identity(shard, digest), "counts": counts})
        publish_folder(temporary, self.folder(shard))

    def _run_fairseq(self, shards: list[ShardText], digest: str) -> None:
        if not shards:
            return
        together = min(self.workers, len(shards))
        with ThreadPoolExecutor(together) as pool:
            runs = [pool.submit(self._preprocess, shard, max(1, self.workers // together), digest) for shard in shards]
            for run in runs:
                run.result()

    def _preprocess(self, shard: ShardText, workers: int, digest: str) -> None:
        temporary = self._temporary(shard)
        package = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "fairseq_cli.preprocess", "--user-dir", str(package)]
        command += ["--task", "implicit_masked_lm", "--only-source", "--srcdict", str(self.model)]
        command += ["--destdir", str(temporary), "--workers", str(workers)]
        for split, path in shard.files.items():
            command += [f"--{split}pref", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["no message"]
            raise CorpusError(f"fairseq-preprocess failed on {shard.files['train']}: {lines[-1]}")
        counts = {}
        for split in shard.files:
            written = MappedTokens(str(temporary / split))
            counts[split] = {"lines": len(written.line_lengths), "tokens": written.token_count}
        self._publish(shard, temporary, counts, digest)
