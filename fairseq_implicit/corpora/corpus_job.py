"""A whole preparation in its output folder: parts, resuming, merging, manifest."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from fairseq_implicit.corpora.counts import Counts
from fairseq_implicit.corpora.durable import read_json, sha256_of, write_json, write_text
from fairseq_implicit.corpora.merging import (
    SPLIT_NAMES,
    add_up,
    find_near_duplicates,
    inputs_digest,
    join_split,
    plan_shards,
    shard_name,
    verify_source,
    write_shard,
)
from fairseq_implicit.corpora.preparation import SourceFiles, identity_of, is_prepared, prepare_source
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.report import report_table
from fairseq_implicit.corpora.settings import PrepareSettings
from fairseq_implicit.corpora.sources import Source
from fairseq_implicit.corpora.workers import run_tasks

logger = logging.getLogger(__name__)

MANIFEST, REPORT, TABLE, CHECKSUMS = "manifest.json", "report.json", "report.txt", "SHA256SUMS"
_REPORTED_PROBLEMS = 1000


@dataclass(frozen=True)
class CorpusJob:
    """One preparation.

    Attributes:
        output: folder of the result; the intermediate files live in ``output/work`` until the merge has ended.
        sources: all input files, in sorted order, the same on every machine.
        settings: the choices.
        workers: processes of this machine.
    """

    output: Path
    sources: list[Source]
    settings: PrepareSettings
    workers: int

    @property
    def work(self) -> Path:
        return self.output / "work"

    def description(self) -> dict:
        """What must be equal for two runs to belong to one preparation."""
        return {
            "settings": self.settings.as_dict() | {"strict": False},
            "fingerprint": self.settings.fingerprint(),
            "sources": [[source.name, source.split] for source in self.sources],
        }

    def open(self) -> bool:
        """Creates or checks the output folder; returns True when it holds this very corpus, finished.

        Raises:
            CorpusError: the folder belongs to another preparation.
        """
        manifest = read_json(self.output / MANIFEST)
        if manifest is not None:
            self._same(manifest["job"], "a finished corpus")
            changed = [s for s in manifest["sources"] if s["size"] and s != identity_of(Source(s["name"], s["split"]))]
            if changed:
                logger.warning("%s changed after %s was prepared from it.", changed[0]["name"], self.output)
            shutil.rmtree(self.work, ignore_errors=True)
            return True
        self.work.mkdir(parents=True, exist_ok=True)
        job = read_json(self.work / "job.json")
        if job is None:
            write_json(self.work / "job.json", self.description())
        else:
            self._same(job, "an unfinished corpus")
        return False

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

    def prepare(self, part: int, parts: int) -> None:
        """Reads this part's share of the sources: those whose number is ``part`` modulo ``parts``."""
        mine = [source for number, source in enumerate(self.sources) if number % parts == part]
        # Another run's pipe may have been another text.
        todo = [s for s in mine if s.is_pipe or not is_prepared(s, self.settings, self.work)]
        logger.info("part %d/%d: %d files, %d of them already read", part, parts, len(mine), len(mine) - len(todo))
        # Pipes are read in this process, since workers have no standard input. Of the files the largest come first: a
        # long last one would leave the other workers idle.
        pipes, files = [s for s in todo if s.is_pipe], [s for s in todo if not s.is_pipe]
        for sources, workers in ((pipes, 1), (sorted(files, key=lambda s: -_size(s)), self.workers)):
            tasks = [(source, self.settings, self.work) for source in sources]
            for _ in run_tasks(prepare_source, tasks, workers, sum(map(_size, sources)), "reading"):
                pass

    def merge(self, part: int = 0, parts: int = 1) -> Counts | None:
        """Writes the shards; with ``parts`` above 1 only this part's, and the folder stays unfinished.

        Raises:
            CorpusError: sources are not read yet, or an intermediate file does not match its checksum.
        """
        missing = [source for source in self.sources if not is_prepared(source, self.settings, self.work)]
        if missing:
            raise CorpusError(
                f"--merge: {len(missing)} of {len(self.sources)} input files are not read yet or have changed since, "
                f"the first is {missing[0].name}; run the missing --part again."
            )
        files = [SourceFiles.of(source, self.work) for source in self.sources]
        # Shards of an interrupted merge are only reused for the very same intermediate files.
        folder = self.work / f"merge-{inputs_digest(files)}"
        folder.mkdir(exist_ok=True)
        mine = [file for number, file in enumerate(files) if number % parts == part]
        total = sum(file.segments.stat().st_size for file in mine)
        tasks = [(file,) for file in mine]
        for fault in run_tasks(verify_source, tasks, self.workers, total, "verifying"):
            if fault is not None:
                raise CorpusError(fault)
        if self.settings.drop_near_duplicates:
            find_near_duplicates(files, self.settings, folder)
        counts, problems, problems_total = Counts(), [], 0
        for file in files:
            record = read_json(file.record)
            counts.add(Counts.from_dict(record["counts"]))
            problems += record["problems"][: max(0, _REPORTED_PROBLEMS - len(problems))]
            problems_total += record["problems_total"]
        shards = plan_shards(files, self.settings)
        tasks = [(shard, files, self.settings, self.output, folder) for shard in shards if shard.number % parts == part]
        size = counts.bytes_read - counts.dropped_bytes.total() - counts.bytes_removed + counts.copies_bytes
        for shard_counts in run_tasks(write_shard, tasks, self.workers, size, "merging"):
            counts.add(shard_counts)
        if parts > 1:
            return None
        add_up(counts)
        self._finish(counts, problems, problems_total, len(shards), folder)
        return counts

    def _finish(self, counts: Counts, problems: list[dict], total: int, shards: int, folder: Path) -> None:
        outputs: dict[str, dict] = {}
        for number in range(shards):
            facts = read_json(folder / f"shard.{number:05d}.json")["files"]
            if "train" in facts:
                outputs[shard_name("train", number)] = facts["train"]
        for split in SPLIT_NAMES[:2]:
            facts = join_split(split, list(range(shards)), folder, self.output)
            if facts is not None:
                outputs[f"{split}.txt"] = facts
        write_json(
            self.output / REPORT,
            {"counts": counts.as_dict(), "problems": problems, "problems_total": total, "files": outputs},
        )
        write_text(self.output / TABLE, report_table(counts, problems, total, shards))
        write_text(self.output / CHECKSUMS, "".join(f"{v['sha256']}  {k}\n" for k, v in sorted(outputs.items())))
        write_json(
            self.output / MANIFEST,
            {"job": self.description(), "sources": [identity_of(source) for source in self.sources], "files": outputs},
        )
        for left_over in self.output.glob("*.part-*"):  # of killed runs
            left_over.unlink(missing_ok=True)
        shutil.rmtree(self.work)

    def verify(self) -> None:
        """Compares the finished shards with the manifest.

        Raises:
            CorpusError: a shard is missing or differs.
        """
        for name, facts in read_json(self.output / MANIFEST)["files"].items():
            path = self.output / name
            if not path.is_file() or sha256_of(path) != facts["sha256"]:
                raise CorpusError(
                    f"{path} is missing or differs from its checksum in {self.output / MANIFEST}; remove the folder "
                    "and prepare the corpus again."
                )


def _size(source: Source) -> int:
    return max(identity_of(source)["size"], 0)
