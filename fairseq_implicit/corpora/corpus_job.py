"""A whole preparation in its output folder: parts, resuming, merging, manifest."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fairseq_implicit.corpora.counts import COUNTS, Counts
from fairseq_implicit.corpora.durable import read_json, sha256_of, write_json, write_text
from fairseq_implicit.corpora.manifest import JOB, MANIFEST, read_manifest
from fairseq_implicit.corpora.merging import (
    SPLIT_NAMES,
    ShardJoin,
    ShardRange,
    add_up,
    find_near_duplicates,
    inputs_digest,
    join_split,
    pieces_of,
    plan_shards,
    shard_name,
    verify_source,
    write_piece,
)
from fairseq_implicit.corpora.preparation import SourceFiles, identity_of, is_prepared, prepare_source
from fairseq_implicit.corpora.problems import CorpusError, NothingWritten, TooMuchLost
from fairseq_implicit.corpora.report import report_table
from fairseq_implicit.corpora.settings import PrepareSettings
from fairseq_implicit.corpora.sources import Source
from fairseq_implicit.corpora.workers import run_tasks

logger = logging.getLogger(__name__)

REPORT, TABLE, CHECKSUMS, LOCK = "report.json", "report.txt", "SHA256SUMS", ".preparation.lock"
_REPLACED = "replaced.json"
_REPORT = {"counts": COUNTS, "problems": [{"sentence": str}], "problems_total": int}
_REPORTED_PROBLEMS = 1000
# Shards are cut into pieces where there are fewer than this number of them for each worker.
_PIECES_PER_WORKER = 4


@dataclass(frozen=True)
class CorpusJob:
    """One preparation.

    Attributes:
        output: folder of the result; the intermediate files live in ``output/work`` until the merge has ended.
        sources: all input files, in sorted order, the same on every machine.
        settings: the choices.
        workers: processes of this machine.
        max_loss: largest share of documents or bytes that may be unreadable; 1 allows everything.
    """

    output: Path
    sources: list[Source]
    settings: PrepareSettings
    workers: int
    max_loss: float = 1.0

    @property
    def work(self) -> Path:
        return self.output / "work"

    def description(self) -> dict:
        """What must be equal for two runs to belong to one preparation."""
        return {
            "settings": self.settings.deciding(),
            "fingerprint": self.settings.fingerprint(),
            "sources": [[source.name, source.split] for source in self.sources],
        }

    def is_finished(self) -> bool:
        """True when the output folder holds this very corpus, finished and not to be made again.

        It is made again when a file that could not be read in full has changed since, or when nothing came out.

        Raises:
            CorpusError: the folder belongs to another preparation, or the corpus lacks more than is allowed now.
        """
        manifest = read_manifest(self.output)
        if manifest is None:
            return False
        self._same(manifest["job"], "a finished corpus")
        # A pipe has no size by which a change could be seen.
        changed = [s for s in manifest["sources"] if s["size"] and s != identity_of(Source(s["name"], s["split"]))]
        damaged = manifest.get("damaged", [])
        if any([source["name"], source["split"]] in damaged for source in changed) or not manifest["files"]:
            return False
        if changed:
            logger.warning("%s changed after %s was prepared from it.", changed[0]["name"], self.output)
        report = read_json(self.output / REPORT, _REPORT)
        if report is not None:
            self._check_losses(Counts.from_dict(report["counts"]), report["problems"], report["problems_total"])
        return True

    def open(self) -> None:
        """Creates or checks the unfinished output folder.

        Raises:
            CorpusError: the folder belongs to another preparation.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            # The old shards stay until new ones take their places. Of several parts one finds the manifest.
            (self.output / MANIFEST).rename(self.work / _REPLACED)
            logger.info("%s is made again from all of its input files", self.output)
        job = read_json(self.work / "job.json", JOB)
        if job is None:
            write_json(self.work / "job.json", self.description())
        else:
            self._same(job, "an unfinished corpus")

    def _same(self, other: dict, what: str) -> None:
        mine = self.description()
        # A setting that did not exist then had its default.
        settings = PrepareSettings().as_dict() | other["settings"]
        for name, value in mine["settings"].items():
            if settings[name] != value:
                raise CorpusError(
                    f"{self.output} holds {what} made with {name.replace('_', '-')} = {settings[name]!r} "
                    f"instead of {value!r}; give another --output, or remove the folder to start again."
                )
        if other["sources"] != mine["sources"]:
            raise CorpusError(
                f"{self.output} holds {what} made from {len(other['sources'])} other input files than the "
                f"{len(mine['sources'])} given now; give another --output, or remove the folder to start again."
            )

    def remove_left_overs(self) -> None:
        """Removes the intermediate files of a run that was killed when the corpus was finished but for that."""
        shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self, part: int, parts: int) -> set[SourceFiles]:
        """Reads this part's share of the sources: those whose number is ``part`` modulo ``parts``.

        Returns:
            the intermediate files that were written now.
        """
        mine = [source for number, source in enumerate(self.sources) if number % parts == part]
        # Another run's pipe may have been another text.
        todo = [s for s in mine if s.is_pipe or not is_prepared(s, self.settings, self.work)]
        logger.info("part %d/%d: %d files, %d of them already read", part, parts, len(mine), len(mine) - len(todo))
        # Pipes are read side by side: a command that feeds two of them (`tee`) goes on when both are read. Of the files
        # the largest come first: a long last one would leave the other workers idle.
        pipes, files = [s for s in todo if s.is_pipe], [s for s in todo if not s.is_pipe]
        written: set[SourceFiles] = set()
        for sources, workers in ((pipes, len(pipes)), (sorted(files, key=lambda s: -_size(s)), self.workers)):
            tasks = [(source, self.settings, self.work) for source in sources]
            written |= set(run_tasks(prepare_source, tasks, workers, sum(map(_size, sources)), "reading"))
        return written

    def merge(self, part: int = 0, parts: int = 1, fresh: Collection[SourceFiles] = ()) -> Counts | None:
        """Writes the shards; with ``parts`` above 1 only this part's, and the folder stays unfinished.

        Args:
            part, parts: the shards whose number is ``part`` modulo ``parts``.
            fresh: intermediate files that this process has just written, whose checksums need no second look.

        Raises:
            CorpusError: sources are not read yet, or an intermediate file does not match its checksum.
            TooMuchLost: more of the input was unreadable than is allowed.
            NothingWritten: no document is left to be written.
        """
        missing = [source for source in self.sources if not is_prepared(source, self.settings, self.work)]
        if missing:
            raise CorpusError(
                f"--merge: {len(missing)} of {len(self.sources)} input files are not read yet or have changed since, "
                f"the first is {missing[0].name}; run the missing --part again."
            )
        files = [SourceFiles.of(source, self.work) for source in self.sources]
        counts, problems, problems_total, damaged = Counts(), [], 0, []
        for source, file in zip(self.sources, files, strict=True):
            record = file.read_record()
            counts.add(Counts.from_dict(record["counts"]))
            problems += record["problems"][: max(0, _REPORTED_PROBLEMS - len(problems))]
            problems_total += record["problems_total"]
            if record["problems_total"]:
                damaged.append([source.name, source.split])
        self._check_losses(counts, problems, problems_total)
        # Shards of an interrupted merge are only reused for the very same intermediate files, made in the same way.
        folder = self.work / f"merge-{inputs_digest(files)}-{self.settings.fingerprint()[:8]}"
        folder.mkdir(exist_ok=True)
        mine = [file for number, file in enumerate(files) if number % parts == part and file not in fresh]
        total = sum(file.segments.stat().st_size for file in mine)
        tasks = [(file,) for file in mine]
        for fault in run_tasks(verify_source, tasks, self.workers, total, "verifying"):
            if fault is not None:
                raise CorpusError(fault)
        if self.settings.drop_near_duplicates:
            find_near_duplicates(files, folder)
        shards = plan_shards(files, self.settings)
        size = counts.bytes_read - counts.dropped_bytes.total() - counts.bytes_removed + counts.copies_bytes
        counts.add(self._write_shards([s for s in shards if s.number % parts == part], files, folder, size))
        if parts > 1:
            return None
        add_up(counts)
        self._finish(counts, problems, problems_total, damaged, len(shards), folder)
        return counts

    def _write_shards(self, shards: list[ShardRange], files: list[SourceFiles], folder: Path, size: int) -> Counts:
        """Writes shards; where there are few of them, several workers write one together."""
        counts, unfinished = Counts(), []
        for shard in shards:
            finished = ShardJoin(shard, [shard], self.output, folder).finished()
            if finished is None:
                unfinished.append(shard)
            else:
                counts.add(finished)
        pieces = 1
        if len(unfinished) < _PIECES_PER_WORKER * self.workers and self.workers > 1:
            pieces = -(-_PIECES_PER_WORKER * self.workers // max(len(unfinished), 1))
        joins = {s.number: ShardJoin(s, pieces_of(s, pieces), self.output, folder) for s in unfinished}
        tasks = [(p, files, self.settings, folder) for s in unfinished for p in pieces_of(s, pieces)]
        try:
            for piece, piece_counts in run_tasks(write_piece, tasks, self.workers, size, "merging"):
                shard_counts = joins[piece.number].take(piece, piece_counts)
                if shard_counts is not None:
                    counts.add(shard_counts)
        except BaseException:
            for join in joins.values():
                join.discard()
            raise
        return counts

    def _check_losses(self, counts: Counts, problems: list[dict], problems_total: int) -> None:
        first = f"the first of {problems_total} problems: {problems[0]['sentence']}" if problems else ""
        if self.settings.strict and problems_total:
            raise CorpusError(f"--strict: {self.output} is made of damaged input files, {first}")
        for what, share in counts.losses().items():
            if share > self.max_loss:
                raise TooMuchLost(
                    f"--max-loss {self.max_loss}: {share:.3g} of the {what} could not be read, {first} Mend the input "
                    "files and run the same command again, or allow more."
                )

    def _finish(
        self, counts: Counts, problems: list[dict], total: int, damaged: list[list[str]], shards: int, folder: Path
    ) -> None:
        outputs: dict[str, dict] = {}
        for number in range(shards):
            facts = read_json(folder / f"shard.{number:05d}.json", {"files": dict})["files"]
            if "train" in facts:
                outputs[shard_name("train", number)] = facts["train"]
        train_files = len(outputs)
        for split in SPLIT_NAMES[:2]:
            facts = join_split(split, list(range(shards)), folder, self.output)
            if facts is not None:
                outputs[f"{split}.txt"] = facts
        write_json(
            self.output / REPORT,
            {"counts": counts.as_dict(), "problems": problems, "problems_total": total, "files": outputs},
        )
        write_text(self.output / TABLE, report_table(counts, problems, total, train_files))
        write_text(self.output / CHECKSUMS, "".join(f"{v['sha256']}  {k}\n" for k, v in sorted(outputs.items())))
        replaced = read_manifest(self.work, _REPLACED)
        for name in replaced["files"] if replaced is not None else ():
            if name not in outputs:
                (self.output / name).unlink(missing_ok=True)
        for left_over in [*self.output.glob("*.part-*"), *self.output.glob(f"{LOCK}.*")]:  # of killed runs
            left_over.unlink(missing_ok=True)
        if not outputs:
            raise NothingWritten(
                f"Nothing was written to {self.output}: of {counts.documents_read} documents none is left, and "
                f"{total} problems of input files were met; see {self.output / TABLE}."
            )
        write_json(
            self.output / MANIFEST,
            {
                "job": self.description(),
                "sources": [identity_of(source) for source in self.sources],
                "damaged": damaged,
                "files": outputs,
            },
        )
        shutil.rmtree(self.work)


def verify_corpus(output: Path) -> int:
    """Compares the shards of a finished corpus with its manifest; returns their number.

    Raises:
        CorpusError: the corpus is not finished, or a shard is missing or differs.
    """
    manifest = read_manifest(output)
    if manifest is None:
        raise CorpusError(f"--verify: {output} is not finished; run the same command without it first.")
    for name, facts in manifest["files"].items():
        path = output / name
        if not path.is_file() or sha256_of(path) != facts["sha256"]:
            raise CorpusError(
                f"{path} is missing or differs from its checksum in {output / MANIFEST}; remove the folder and prepare "
                "the corpus again."
            )
    return len(manifest["files"])


def _size(source: Source) -> int:
    return max(identity_of(source)["size"], 0)
