"""Cleans a corpus and writes it as numbered text shards with train, valid and test splits.

    fairseq-implicit prepare-corpus pile/train --valid-input pile/val.jsonl.zst --output prepared --workers 8

The same command again goes on after an interruption; the result is the same for any number of workers and parts.
"""

import argparse
import logging
import os
import re
import sys
from pathlib import Path

from fairseq_implicit.commands.values import byte_size, component_weight, part_from_environment, part_of
from fairseq_implicit.corpora import hub
from fairseq_implicit.corpora.corpus_job import LOCK, TABLE, CorpusJob, verify_corpus
from fairseq_implicit.corpora.filters import warn_of_unknown_components
from fairseq_implicit.corpora.ownership import own_folder
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.quality import QUALITY_FILTERS, quality_check
from fairseq_implicit.corpora.records import TEXT_FIELDS
from fairseq_implicit.corpora.settings import DEFAULT_DROPPED_ANNOTATIONS, PILE_EPOCHS, PrepareSettings
from fairseq_implicit.corpora.sources import BOUNDARIES, STANDARD_INPUT, Source, find_sources

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every one that decides the output is a field of `PrepareSettings`."""
    defaults = PrepareSettings()
    parser.add_argument(
        "inputs",
        nargs="*",
        help="files, folders, '-' for standard input, or hf://OWNER/NAME; formats: The Pile (.jsonl[.zst|.gz|.zst.tar])"
        ", OSCAR 2019 to 23.01, parquet, plain text",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--valid-input", action="append", default=[], help="input that goes to valid.txt as a whole")
    parser.add_argument("--test-input", action="append", default=[], help="input that goes to test.txt as a whole")

    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, default=1, help="processes on this machine")
    work.add_argument(
        "--part", type=part_of, help="read only part i/n of the files (default: from SLURM or torchrun variables)"
    )
    work.add_argument("--merge", action="store_true", help="merge the parts that were read into the final shards")
    work.add_argument("--strict", action="store_true", help="stop at the first damaged file or record")
    work.add_argument(
        "--compress-work",
        action="store_true",
        help="compress the intermediate files, which else take as much room as the text; a third slower",
    )
    work.add_argument(
        "--max-loss",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="fail with status 4 when more than this share of the documents, of their bytes or of the input files' "
        "bytes could not be read (1: never)",
    )
    work.add_argument(
        "--verify", action="store_true", help="compare a finished --output with its checksums; needs no input"
    )

    download = parser.add_argument_group("Hugging Face hub")
    download.add_argument(
        "--hub-folder", type=Path, default=Path("corpora"), help="where repositories are downloaded to"
    )
    download.add_argument("--hub-files", action="append", default=[], help="pattern of files to take, repeatable")
    download.add_argument("--hub-revision", help="branch, tag or commit")
    download.add_argument("--download-only", action="store_true", help="download, then stop")

    output = parser.add_argument_group("output")
    output.add_argument("--shard-size", type=byte_size, default=defaults.shard_size, help="text per shard (4GB)")
    output.add_argument(
        "--valid-fraction", type=float, help=f"share of valid.txt ({defaults.valid_fraction}; 0 with --valid-input)"
    )
    output.add_argument("--test-fraction", type=float, help="share of test.txt (0)")
    output.add_argument("--seed", type=int, default=defaults.seed, help="changes order and split")
    output.add_argument(
        "--buckets", type=int, default=defaults.buckets, help="hash ranges merged one at a time; more need less memory"
    )

    text = parser.add_argument_group("documents")
    text.add_argument(
        "--document-boundary",
        choices=BOUNDARIES,
        default=defaults.boundary,
        help="what ends a document in plain text; auto: blank lines if there are any, else one document per line in "
        "compressed files (OSCAR 2019) and one per file otherwise",
    )
    text.add_argument(
        "--encoding",
        default=defaults.encoding,
        help="encoding of all text and JSON files (gb18030, latin-1, utf-16-le, ...); default: UTF-8, or UTF-16 where "
        "a byte order mark says so; text in another encoding is reported and not kept",
    )
    text.add_argument(
        "--text-field",
        action="append",
        default=[],
        metavar="NAME",
        help="field or column with the text, repeatable, the first one that is there counts "
        f"({', '.join(TEXT_FIELDS)})",
    )
    text.add_argument("--min-document-size", type=byte_size, default=defaults.min_document_size)
    text.add_argument(
        "--max-document-size", type=byte_size, default=defaults.max_document_size, help="split longer ones (0: never)"
    )
    text.add_argument(
        "--max-line-size", type=byte_size, default=defaults.max_line_size, help="wrap longer lines (0: never)"
    )
    text.add_argument("--keep-duplicates", action="store_true", help="keep documents with equal text")
    text.add_argument("--drop-near-duplicates", action="store_true", help="MinHash removal (14 bands of 8)")
    text.add_argument(
        "--quality-filter", action="append", default=[], choices=sorted(QUALITY_FILTERS), help="needs datatrove"
    )
    text.add_argument("--sample", type=float, default=defaults.sample, help="share of the documents to keep")
    text.add_argument(
        "--held-out-sample",
        type=float,
        default=defaults.held_out_sample,
        help="share of the documents of --valid-input and --test-input to keep",
    )
    text.add_argument("--documents-per-file", type=int, default=0, help="read only the first ones of each file")

    pile = parser.add_argument_group("The Pile")
    pile.add_argument("--include-component", action="append", default=[], help="pile_set_name to keep, repeatable")
    pile.add_argument("--exclude-component", action="append", default=[], help="pile_set_name to drop, repeatable")
    pile.add_argument(
        "--component-weight",
        action="append",
        default=[],
        type=component_weight,
        metavar="NAME=W",
        help="write its documents W times (0.5: every other one)",
    )
    pile.add_argument(
        "--pile-epochs",
        action="store_true",
        help="weights of The Pile's paper; its files contain them already, and removing duplicates takes them away",
    )

    oscar = parser.add_argument_group("OSCAR")
    oscar.add_argument(
        "--drop-annotation",
        action="append",
        help=f"label that drops a document (default: {', '.join(DEFAULT_DROPPED_ANNOTATIONS)}; 'none' keeps all)",
    )
    oscar.add_argument("--only-unannotated", action="store_true", help="drop every labelled document (most of them)")
    oscar.add_argument("--language", action="append", default=[], help="document language to keep, repeatable")
    oscar.add_argument("--min-language-probability", type=float, default=0.0)
    oscar.add_argument("--min-harmful-perplexity", type=float, default=0.0, help="23.01: drop below it")
    oscar.add_argument("--drop-category", action="append", default=[], help="23.01: block-list category to drop")


def settings_from(arguments: argparse.Namespace) -> PrepareSettings:
    """Checks the options and makes the settings of them.

    Raises:
        CorpusError: an option is out of range, or two contradict each other.
    """
    annotations = arguments.drop_annotation
    if annotations is None:
        annotations = DEFAULT_DROPPED_ANNOTATIONS
    elif "none" in annotations:
        annotations = ()
    weights = dict(PILE_EPOCHS) if arguments.pile_epochs else {}
    valid_fraction, test_fraction = arguments.valid_fraction, arguments.test_fraction
    if valid_fraction is None:
        valid_fraction = 0.0 if arguments.valid_input else PrepareSettings.valid_fraction
    return PrepareSettings(
        boundary=arguments.document_boundary,
        encoding="" if arguments.encoding.lower() in ("utf-8", "utf8") else arguments.encoding.lower(),
        text_fields=tuple(arguments.text_field),
        shard_size=arguments.shard_size,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction or 0.0,
        seed=arguments.seed,
        buckets=arguments.buckets,
        keep_duplicates=arguments.keep_duplicates,
        drop_near_duplicates=arguments.drop_near_duplicates,
        include_components=tuple(sorted(arguments.include_component)),
        exclude_components=tuple(sorted(arguments.exclude_component)),
        component_weights=weights | dict(arguments.component_weight),
        drop_annotations=tuple(sorted(annotations)),
        only_unannotated=arguments.only_unannotated,
        languages=tuple(sorted(arguments.language)),
        min_language_probability=arguments.min_language_probability,
        min_harmful_perplexity=arguments.min_harmful_perplexity,
        drop_categories=tuple(sorted(arguments.drop_category)),
        min_document_size=arguments.min_document_size,
        max_document_size=arguments.max_document_size,
        max_line_size=arguments.max_line_size,
        quality_filters=tuple(arguments.quality_filter),
        sample=arguments.sample,
        held_out_sample=arguments.held_out_sample,
        documents_per_file=arguments.documents_per_file,
        strict=arguments.strict,
        compress_work=arguments.compress_work,
    )


def _local(inputs: list[str], arguments: argparse.Namespace) -> list[str]:
    """Replaces repositories of the hub by their local folders."""
    local = []
    for name in inputs:
        if name.startswith(hub.PREFIX) or (_REPOSITORY.fullmatch(name) and not os.path.exists(name)):
            try:
                folder = hub.download(name, arguments.hub_folder, tuple(arguments.hub_files), arguments.hub_revision)
            except CorpusError as error:
                if name.startswith(hub.PREFIX):
                    raise
                raise CorpusError(f"There is no local file or folder {name}, and on the hub: {error}") from error
            local.append(str(folder))
        else:
            local.append(name)
    return local


def _sources(arguments: argparse.Namespace) -> list[Source]:
    sources: list[Source] = []
    for inputs, split in ((arguments.inputs, ""), (arguments.valid_input, "valid"), (arguments.test_input, "test")):
        found, passed_over = find_sources(_local(inputs, arguments), split)
        sources += found
        for name in passed_over:
            logger.info("%s is no corpus file and is not read", name)
    held_out = {source.name for source in sources if source.split}
    # A folder usually contains its own val and test files; they are not training data then.
    return sorted(
        (source for source in sources if source.split or source.name not in held_out), key=lambda s: (s.name, s.split)
    )


def _verify(output: Path) -> int:
    logger.info("%s: all %d files are as their checksums say", output, verify_corpus(output))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Runs one command; returns the exit status.

    Raises:
        CorpusError: with the sentence for the user.
    """
    if arguments.workers < 1:
        raise CorpusError(f"--workers {arguments.workers} must be at least 1.")
    if not 0 <= arguments.max_loss <= 1:
        raise CorpusError(f"--max-loss {arguments.max_loss} must lie in [0, 1].")
    settings = settings_from(arguments)
    warn_of_unknown_components(settings)
    quality_check(settings.quality_filters)
    if arguments.download_only:
        _local(arguments.inputs + arguments.valid_input + arguments.test_input, arguments)
        return 0
    sources = _sources(arguments)
    if arguments.verify and not sources:
        return _verify(arguments.output)
    if not sources:
        raise CorpusError("No input is given; name files, folders, '-' or hf://OWNER/NAME.")
    part, parts = arguments.part or ((0, 1) if arguments.merge else part_from_environment(os.environ))
    pipe = next((source.name for source in sources if source.is_pipe), None)
    if parts > 1 and pipe is not None:
        name = "The standard input" if pipe == STANDARD_INPUT else f"The pipe {pipe}"
        raise CorpusError(f"{name} cannot be divided into {parts} parts; give files, or --part 0/1.")
    job = CorpusJob(arguments.output, sources, settings, arguments.workers, arguments.max_loss)
    finished = job.is_finished()
    if arguments.verify:
        return _verify(arguments.output)
    if not finished or job.work.exists():
        with own_folder(arguments.output, LOCK, part, parts):
            finished = job.is_finished()  # by the process for which this one would have had to wait
            if not finished:
                job.open()
                return _prepare(job, arguments, part, parts)
            job.remove_left_overs()
    logger.info("%s is complete, nothing to do", arguments.output)
    if pipe is not None:
        name = "the standard input" if pipe == STANDARD_INPUT else pipe
        logger.warning("%s was not read; give another --output for another text", name)
    return 0


def _prepare(job: CorpusJob, arguments: argparse.Namespace, part: int, parts: int) -> int:
    fresh = set()
    if not arguments.merge:
        fresh = job.prepare(part, parts)
        if parts > 1:
            logger.info("part %d/%d is read; when all are, run the same command with --merge", part, parts)
            return 0
    counts = job.merge(part, parts, fresh)
    if counts is None:
        logger.info("shards of part %d/%d are written; when all are, run --merge without --part", part, parts)
        return 0
    sys.stdout.write((arguments.output / TABLE).read_text(encoding="utf-8"))
    return 0
