"""Measures the way from text to data-bin, side by side in one run, and the stages of preparing The Pile.

    python -m scripts.benchmark_corpus wiki.train.tokens --pile pile/train/00.jsonl.zst

Routes: the two steps that fairseq's examples describe (sentencepiece writes pieces as text, fairseq-preprocess reads
them), fairseq-preprocess on raw text with this package's dictionary, and `fairseq-implicit binarise --fast`; each with
one and with two processes. Every route runs as its own process on the whole text and on its first lines; the difference
is the speed without the start-up, and both are shown. The files of all routes are compared byte by byte.
"""

import argparse
import filecmp
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import zstandard

import fairseq_implicit
from fairseq_implicit.corpora.cleaning import clean
from fairseq_implicit.corpora.corpus_job import CorpusJob
from fairseq_implicit.corpora.readers import read_source
from fairseq_implicit.corpora.records import Document
from fairseq_implicit.corpora.settings import PrepareSettings
from fairseq_implicit.corpora.sources import Source
from fairseq_implicit.corpora.tokenizer_training import PRESETS, train_tokenizer

PACKAGE = Path(fairseq_implicit.__file__).resolve().parent
ENCODE_TO_TEXT = """
import sentencepiece, sys
processor = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as text, open(sys.argv[3], "w", encoding="utf-8") as pieces:
    for line in text:
        pieces.write(" ".join(processor.encode(line.rstrip("\\n"), out_type=str)) + "\\n")
"""


def seconds(*commands: list) -> float:
    """Wall time of commands that run one after the other."""
    begun = time.perf_counter()
    for command in commands:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
        if result.returncode:
            sys.exit(f"{' '.join(map(str, command))}: {result.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - begun


def preprocess(text: Path, dictionary: Path, output: Path, workers: int, *flags) -> list:
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--srcdict", dictionary]
    return [*command, "--trainpref", text, "--destdir", output, "--workers", workers, *flags]


def routes(model: Path, text: Path, output: Path, workers: int) -> dict[str, list[list]]:
    """The commands of each route from ``text`` to ``output``."""
    pieces, raw = output / "pieces.txt", ["--user-dir", PACKAGE, "--task", "implicit_masked_lm"]
    fast = [sys.executable, "-m", "fairseq_implicit", "binarise", "--fast", "--train", text, "--tokenizer", model]
    return {
        "two steps": [
            [sys.executable, "-c", ENCODE_TO_TEXT, model, text, pieces],
            preprocess(pieces, model.with_name("dict.txt"), output / "two-steps", workers),
        ],
        "fairseq-preprocess on raw text": [preprocess(text, model, output / "raw", workers, *raw)],
        "fast": [[*fast, "--output", output / "fast", "--workers", workers]],
    }


def sentencepiece_alone(model: Path, text: Path, together: int = 10_000) -> float:
    """CPU seconds of sentencepiece's batches: lines in memory to lists of ids, one thread."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = text.read_text(encoding="utf-8").split("\n")
    begun = time.process_time()
    for first in range(0, len(lines), together):
        processor.encode(lines[first : first + together], num_threads=1)
    return time.process_time() - begun


def cpu_seconds(command: list) -> float:
    """CPU time of a command and of the processes that it waited for."""
    before = os.times()
    seconds(command)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def share_of_sentencepiece(model: Path, text: Path, start: Path, work: Path, passes: int = 3) -> str:
    """The speed of ``binarise --fast`` without its start-up as a share of sentencepiece's own.

    CPU time, least of alternating passes: other work of the machine changes the wall time of each in its own way.
    """
    alone, whole, short = [], [], []
    for number in range(passes):
        alone.append(sentencepiece_alone(model, text))
        for file, spent in ((text, whole), (start, short)):
            spent.append(cpu_seconds(*routes(model, file, work / f"{file.stem}-{number}", 1)["fast"]))
    size, net = text.stat().st_size / 1e6, net_seconds(min(whole), min(short))
    if math.isnan(net):
        return "binarise --fast beside sentencepiece alone: take more text than this"
    return (
        f"CPU time, one process: sentencepiece alone {size / min(alone):.1f} MB/s, binarise --fast {size / net:.1f} "
        f"MB/s, {min(alone) / net:.2f} of it (without start-up, least of {passes} alternating passes)"
    )


def bare(path: Path) -> None:
    """The least that reading JSON lines costs: zstandard's stream, lines, json."""
    with open(path, "rb") as file:
        stream = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(file, read_across_frames=True)
        for line in io.BufferedReader(stream, 2**20):
            json.loads(line)


def documents(path: Path) -> Iterator[Document]:
    return (item for item in read_source(Source(str(path))) if isinstance(item, Document))


def cleaned(path: Path) -> None:
    for document in documents(path):
        clean(document.text)


def prepared(path: Path, workers: int = 1) -> float:
    """Prepares one file into one shard; returns the wall time of the merge."""
    with tempfile.TemporaryDirectory(dir=path.parent) as output:
        job = CorpusJob(Path(output), [Source(str(path))], PrepareSettings(), workers)
        job.open()
        fresh = job.prepare(part=0, parts=1)
        begun = time.perf_counter()
        job.merge(fresh=fresh)
        return time.perf_counter() - begun


def stages(path: Path, work: Path, passes: int = 3) -> None:
    """Prints what each stage of the preparation costs beside the bare loop, in one process.

    CPU time, not wall time, and the least of ``passes`` alternating ones, for other work of the machine to matter less.
    """
    copy = work / path.name
    shutil.copyfile(path, copy)
    measured = {"zstandard and json alone": bare, "reader": lambda file: deque(documents(file), 0)}
    measured |= {"reader and cleaning": cleaned, "whole preparation": prepared}
    size = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents(path)) / 1e6
    least = dict.fromkeys(measured, math.inf)
    for _ in range(passes):
        for stage, run in measured.items():
            begun = time.process_time()
            run(copy)
            least[stage] = min(least[stage], time.process_time() - begun)
    first = least["zstandard and json alone"]
    print(f"\n{path.name}: {size:.1f} MB of text, one process\n{'stage':<34}{'CPU s':>10}{'MB/s':>9}{'of bare':>9}")
    for stage, spent in least.items():
        print(f"{stage:<34}{spent:>10.2f}{size / spent:>9.1f}{first / spent:>9.2f}")
    merges = [[prepared(copy, workers) for workers in (1, 2)] for _ in range(passes)]
    one, two = (min(times) for times in zip(*merges, strict=True))
    print(f"merge of its one shard, wall: {one:.2f} s, with two workers {two:.2f} s")


def net_seconds(whole: float, start: float) -> float:
    """Of ``whole`` seconds those that are not start-up; nan where they drown in how the start-up varies."""
    return whole - start if whole - start > 0.25 * start else math.nan


def row(route: str, workers: int, size: float, whole: float, start: float, first: tuple[float, float]) -> str:
    """A line of the table.

    Args:
        size: of the text in MB.
        whole: seconds with the whole text.
        start: seconds with a few lines.
        first: ``whole`` and ``start`` of the first route, which the ratios are over.
    """
    net, reference = net_seconds(whole, start), net_seconds(*first)
    speed, ratio = ("–" if "nan" in one else one for one in (f"{size / net:.2f}", f"{reference / net:.1f}x"))
    return (
        f"{route:<34}{workers:>10}{whole:>9.1f}{size / whole:>8.2f}{f'{first[0] / whole:.1f}x':>8}{speed:>10}{ratio:>8}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8 text, for example WikiText-2's wiki.train.tokens")
    parser.add_argument("--pile", type=Path, help="a .jsonl.zst file to measure the preparation on")
    parser.add_argument("--dictionary-size", type=int, default=4096)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        work = Path(name)
        model = work / "tokenizer" / "spm.model"
        try:
            train_tokenizer([arguments.text], model, arguments.dictionary_size, PRESETS["bert-32k"].options, 10**6)
        except (OSError, ValueError) as error:
            sys.exit(f"benchmark_corpus: {error}")
        start = work / "start.txt"
        start.write_text("one line\n" * 2)
        size = arguments.text.stat().st_size / 1e6
        shown = f"{size:.1f} MB" if size >= 1 else f"{1e3 * size:.1f} kB"
        print(
            f"text {shown}, unigram dictionary of {arguments.dictionary_size}; {platform.machine()}, "
            f"{os.cpu_count()} core{'s' if os.cpu_count() != 1 else ''}, sentencepiece {sentencepiece.__version__}"
        )
        print(share_of_sentencepiece(model, arguments.text, start, work))
        print(f"\n{'route':<34}{'processes':>10}{'wall s':>9}{'MB/s':>8}{'ratio':>8}{'MB/s net':>10}{'ratio':>8}")
        for workers in arguments.workers:
            measured = {}
            for text, label in ((start, "start"), (arguments.text, "whole")):
                for route, commands in routes(model, text, work / f"{label}{workers}", workers).items():
                    (work / f"{label}{workers}").mkdir(exist_ok=True)
                    measured[route, label] = seconds(*commands)
            first = measured["two steps", "whole"], measured["two steps", "start"]
            for route in ("two steps", "fairseq-preprocess on raw text", "fast"):
                walls = measured[route, "whole"], measured[route, "start"]
                print(row(route, workers, size, *walls, first))
            whole = work / f"whole{workers}"
            for other in (whole / "raw", whole / "fast" / "shard0"):
                for file in ("train.bin", "train.idx"):
                    if not filecmp.cmp(whole / "two-steps" / file, other / file, shallow=False):
                        sys.exit(f"{other / file} differs from the two-step route's")
        print("\nnet: without start-up (–: too little of it to measure, take more text); all files are equal")
        if arguments.pile:
            stages(arguments.pile, work)


if __name__ == "__main__":
    main()
