"""fairseq-preprocess: what it says of its input, and that it is alive."""

import glob
import logging
import os
import threading
import time

from fairseq import binarizer
from fairseq.data.indexed_dataset import best_fitting_int_dtype

from fairseq_implicit.compat.wrapping import wrap

logger = logging.getLogger(__name__)

INTERVAL = 10.0  # seconds between two lines


def register() -> None:
    wrap(binarizer.FileBinarizer, "multiprocess_dataset", multiprocess_dataset)


def multiprocess_dataset(original, input_file, dataset_impl, line_binarizer, output_prefix, **kwargs):
    if os.path.isfile(input_file) and os.path.getsize(input_file) == 0:
        raise ValueError(f"{input_file} is empty: there is nothing to binarise.")
    try:
        with _Progress(input_file, output_prefix, kwargs.get("vocab_size")):
            return original(input_file, dataset_impl, line_binarizer, output_prefix, **kwargs)
    except ValueError as error:  # fairseq's search for a line start ends in "negative seek position"
        if not isinstance(error, UnicodeDecodeError) and "negative seek" not in str(error):
            raise
        offset, line = find_invalid_utf8(input_file)
        raise ValueError(
            f"{input_file} is not valid UTF-8 (byte {offset}, line {line}): convert or clean the text first."
        ) from None


class _Progress:
    """Says every few seconds how many tokens all workers have written; silent for short files.

    The workers are processes that fairseq starts, so their files are what can be watched from here.
    """

    def __init__(self, input_file: str, output_prefix: str, vocabulary: int | None):
        self.input_file = input_file
        self.outputs = glob.escape(output_prefix) + "*.bin"
        self.width = best_fitting_int_dtype(vocabulary)().itemsize
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        start = time.monotonic()
        while not self.done.wait(INTERVAL):
            seconds = time.monotonic() - start
            tokens = sum(map(_size, glob.glob(self.outputs))) // self.width
            logger.info(f"{self.input_file}: {tokens:,} tokens so far, {tokens / seconds:,.0f} per second")


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:  # merged into the first one meanwhile
        return 0


def find_invalid_utf8(path: str) -> tuple[int, int]:
    """Byte offset and line number (from 1) of the first byte of a file that is not UTF-8; (-1, -1) if all of it is."""
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return offset + error.start, number
            offset += len(line)
    return -1, -1
