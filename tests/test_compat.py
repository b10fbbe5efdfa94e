"""What compat closes: the safe list, the exit of short runs, hidden errors."""

import argparse
import collections
import io
import pickle
import threading

import numpy as np
import omegaconf
import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.data.iterators import BufferedIterator
from fairseq.distributed.utils import _split_tensors_from_obj
from fairseq.nan_detector import NanDetector

from fairseq_implicit import compat


def saved(state) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream


def test_loads_what_fairseq_puts_into_checkpoints_and_broadcasts():
    cfg = omegaconf.OmegaConf.create({"task": {"data": "bin", "rates": [0.1, 0.2]}, "none": None})
    state = {
        "args": argparse.Namespace(arch="legacy", lr=[0.1]),
        "best": np.float64(0.5),
        "others": [np.float32(1), np.int64(2), np.int32(3), np.bool_(True)],
        "counts": collections.defaultdict(int),  # torch itself allows empty ones only
        "cfg": cfg,
        "model": {"weight": torch.ones(2)},
    }
    loaded = torch.load(saved(state))  # weights_only by default
    assert loaded["args"].lr == [0.1] and loaded["best"] == 0.5 and loaded["cfg"] == cfg
    tensors = []
    placeheld = torch.load(saved(_split_tensors_from_obj(state, tensors)))
    assert placeheld["model"]["weight"].index == 0 and len(tensors) == 1


def test_numpy_scalars_of_numpy_1_files_load():
    data = pickle.dumps(np.float64(2.5), protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    archive = saved(2.5)
    from zipfile import ZipFile

    rewritten = io.BytesIO()
    with ZipFile(archive) as source, ZipFile(rewritten, "w") as target:
        for item in source.infolist():
            target.writestr(item, data if item.filename.endswith("data.pkl") else source.read(item))
    rewritten.seek(0)
    assert torch.load(rewritten) == 2.5


class Foreign:
    """A type that nobody allowed."""


def test_refuses_a_checkpoint_with_code_in_it(tmp_path):
    path = str(tmp_path / "foreign.pt")
    torch.save({"model": {}, "extra": Foreign()}, path)
    with pytest.raises(ValueError, match=r"foreign.pt holds the type .*Foreign outside the safe list") as caught:
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert caught.value.__suppress_context__ and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 20, 300])
def test_refuses_a_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "cut.pt"
    torch.save({"model": {"weight": torch.zeros(100)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut.pt is truncated or is no checkpoint .* --restore-file") as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(caught.value)


def test_refuses_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("not a checkpoint, only notes\n" * 20, encoding="utf-8")
    with pytest.raises(ValueError, match="notes.pt is truncated or is no checkpoint"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_registering_twice_wraps_once():
    before = options.parse_args_and_arch, checkpoint_utils.load_checkpoint
    compat.register()
    assert (options.parse_args_and_arch, checkpoint_utils.load_checkpoint) == before


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
    compat.finish_buffers()
    assert threading.active_count() == before


def test_a_process_that_stops_inside_an_epoch_ends_in_peace(checkout):
    import subprocess
    import sys

    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import fairseq_implicit; from test_compat import Endless\n"
        "from fairseq.data.iterators import BufferedIterator\n"
        "buffer = BufferedIterator(10, Endless()); [next(buffer) for _ in range(30)]"
    )
    done = subprocess.run([sys.executable, "-c", script, str(checkout), str(checkout / "tests")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


class ReturnsStructure(torch.nn.Module):
    """A module that returns neither a tensor nor a tuple, as a depth does."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return {"state": self.linear(x), "statistics": {}}


def test_nan_detector_survives_structured_outputs(caplog):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ReturnsStructure()

        def forward(self, x):
            return [{}, self.inner(x)["state"].sum(dim=-1)][1]

    model = Outer()
    with NanDetector(model):
        model(torch.full((3, 2), float("nan"))).sum().backward()
    assert "NaN detected in output of inner.linear" in caplog.text


def test_finds_the_first_byte_that_is_not_utf8(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("caf\u00e9\n" * 3, encoding="utf-8")
    bad.write_bytes("caf\u00e9\n".encode() + b"ab\xffc\n")
    assert compat.find_invalid_utf8(good) == (-1, -1)
    assert compat.find_invalid_utf8(bad) == (8, 2)


def flags(**changed):
    values = dict(
        distributed_world_size=2,
        distributed_backend="gloo",
        ddp_backend="legacy_ddp",
        distributed_init_method=None,
        distributed_rank=0,
        distributed_no_spawn=False,
        device_id=0,
    )
    return argparse.Namespace(**{**values, **changed})


def test_processes_on_cpus_under_torchrun(monkeypatch):
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1"), ("WORLD_SIZE", "3"), ("RANK", "2")):
        monkeypatch.setenv(name, value)
    namespace = flags()
    compat.launch_on_cpu(namespace)
    assert (namespace.distributed_init_method, namespace.distributed_rank) == ("env://", 2)
    assert namespace.distributed_world_size == 3 and namespace.distributed_no_spawn


@pytest.mark.parametrize(
    "changed, sentence",
    [
        (dict(ddp_backend="pytorch_ddp"), "--ddp-backend legacy_ddp"),
        (dict(distributed_backend="nccl"), "--distributed-backend gloo"),
        ({}, "torchrun --nproc_per_node 2"),
    ],
)
def test_refuses_launches_that_cannot_work_on_cpus(monkeypatch, changed, sentence):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=sentence):
        compat.launch_on_cpu(flags(**changed))


def test_a_copy_is_whole_at_every_moment(tmp_path, monkeypatch):
    import shutil

    from fairseq.file_io import PathManager

    source, last = tmp_path / "checkpoint_1_7.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new" * 100)
    last.write_bytes(b"old")

    def interrupted(src, dst):
        with open(dst, "wb") as stream:
            stream.write(b"ne")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(source), str(last), overwrite=True)
    assert last.read_bytes() == b"old"
    assert PathManager.copy(str(source), str(last), overwrite=True)
    assert last.read_bytes() == b"new" * 100
    assert not (tmp_path / "checkpoint_last.pt.tmp").exists()
