"""Batches: all samples are in one, and none is in the making when the process ends."""

import threading

import numpy as np
import pytest
import torch
from fairseq.data import data_utils
from fairseq.data.iterators import BufferedIterator

from fairseq_implicit.compat.batches import finish_buffers


class Endless:
    """Batches that are always in the making, as a run that stops inside an epoch leaves them."""

    def __len__(self):
        return 10**9

    def __iter__(self):
        while True:
            yield [torch.full((32, 32), 1.0)[i:].clone() for i in range(32)]


def test_buffers_are_finished_at_exit():
    before = threading.active_count()
    buffers = [BufferedIterator(size, Endless()) for size in (1, 10)]
    for buffer in buffers:
        next(buffer)
    assert threading.active_count() == before + 2
    finish_buffers()
    assert threading.active_count() == before


def test_a_process_that_stops_inside_an_epoch_ends_in_peace(checkout):
    import subprocess
    import sys

    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import fairseq_implicit.models; from test_batches import Endless\n"
        "from fairseq.data.iterators import BufferedIterator\n"
        "buffer = BufferedIterator(10, Endless()); [next(buffer) for _ in range(30)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(checkout), str(checkout / "tests" / "compat")], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("limits", [dict(max_sentences=4), dict(max_sentences=13), dict(max_tokens=50)])
def test_no_sample_is_left_out(multiple, limits):
    rng = np.random.default_rng(0)
    for count in (1, 5, 8, 29):
        sizes = np.sort(rng.integers(1, 20, count))
        batches = data_utils.batch_by_size(
            np.arange(count), sizes.__getitem__, sizes, required_batch_size_multiple=multiple, **limits
        )
        assert np.concatenate(batches).tolist() == list(range(count))
        assert all(len(batch) <= limits.get("max_sentences", count) for batch in batches)
        assert all(len(batch) * sizes[batch].max() <= limits.get("max_tokens", 10**9) for batch in batches)


def test_nothing_makes_no_batches():
    assert data_utils.batch_by_size([], lambda i: 1, max_sentences=4, required_batch_size_multiple=8) == []
