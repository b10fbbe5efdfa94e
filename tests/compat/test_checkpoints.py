"""Checkpoints: only inert data is read, every other file gets one sentence, names are changed only if they exist."""

import argparse
import collections
import io
import os
import pickle
import shutil
import tarfile

import numpy as np
import omegaconf
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.distributed.utils import _split_tensors_from_obj
from fairseq.file_io import PathManager

import fairseq_implicit.models  # noqa: F401


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


@pytest.mark.parametrize("keep", [0, 20, 300, 20_000])
def test_refuses_a_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "cut.pt"
    torch.save({"model": {"weight": torch.zeros(10_000)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut.pt is truncated or is no checkpoint .* --restore-file") as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(caught.value)


def test_refuses_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("not a checkpoint, only notes\n" * 20, encoding="utf-8")
    with pytest.raises(ValueError, match="notes.pt is truncated or is no checkpoint"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


@pytest.fixture
def written(tmp_path):
    """A checkpoint that has just been written, and an older one under the name that a restart looks for."""
    source, last = tmp_path / "checkpoint_1_7.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new" * 100)
    last.write_bytes(b"old")
    return source, last


def test_a_second_name_takes_no_space_and_no_time(written, monkeypatch):
    source, last = written
    monkeypatch.setattr(shutil, "copyfile", lambda *names: pytest.fail("a full disk would have no room for this"))
    for _ in range(2):  # the second time, both names are of one file already
        assert PathManager.copy(str(source), str(last), overwrite=True)
        assert last.read_bytes() == b"new" * 100
        assert sorted(os.listdir(last.parent)) == ["checkpoint_1_7.pt", "checkpoint_last.pt"]
    # fairseq writes beside a checkpoint and renames, so the other name keeps what it had
    checkpoint_utils.torch_persistent_save({"model": {}}, str(source))
    assert last.read_bytes() == b"new" * 100


def test_a_copy_is_whole_at_every_moment_without_links(written, monkeypatch):
    source, last = written

    def no_links(*names):
        raise OSError("this file system has none")

    def interrupted(src, dst):
        with open(dst, "wb") as stream:
            stream.write(b"ne")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(source), str(last), overwrite=True)
    assert last.read_bytes() == b"old"
    assert PathManager.copy(str(source), str(last), overwrite=True)
    assert last.read_bytes() == b"new" * 100
    assert sorted(os.listdir(last.parent)) == ["checkpoint_1_7.pt", "checkpoint_last.pt"]


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))


def flipped(path):
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"weight") - 4] ^= 0x40  # the length of a string
    path.write_bytes(data)


@pytest.mark.parametrize(
    "make",
    [
        tar,
        flipped,
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: path.write_text("everything here is text\n" * 9, encoding="utf-8"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({}, path),
        lambda path: torch.save(torch.zeros(2), path),
    ],
    ids=["tar", "flipped bit", "zeros", "text", "list", "empty dict", "tensor"],
)
def test_what_is_no_checkpoint_is_said_in_one_sentence(make, tmp_path):
    path = tmp_path / "other.pt"
    make(path)
    with pytest.raises(ValueError, match="other.pt is truncated or is no checkpoint") as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.fixture(scope="module")
def trained(toy_flags, fairseq_train, tmp_path_factory):
    """A checkpoint of ode_bert after two updates."""
    folder = tmp_path_factory.mktemp("trained")
    fairseq_train(*toy_flags, "--max-update", 2, "--save-dir", folder, "--disable-validation")
    return folder / "checkpoint_last.pt"


def overridden(checkpoint, **overrides):
    return checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint), overrides)["cfg"]


def test_fields_are_overridden_by_name(trained):
    cfg = overridden(trained, ode_scheme="rk4", tokens_per_sample=16, seed=5, data="elsewhere")
    assert (cfg.model.ode_scheme, cfg.task.tokens_per_sample, cfg.common.seed) == ("rk4", 16, 5)
    assert cfg.task.data == "elsewhere"


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("ode_schema", "'ode_schema' is no field of the ode_bert_rk2_tiny in .*: 'ode_scheme' is one"),
        ("deq_tol", "'deq_tol' is no field of the ode_bert_rk2_tiny"),  # of another family
        ("tokens_per_smaple", "'tokens_per_sample' is one"),
    ],
)
def test_a_name_that_changes_nothing_is_refused(trained, name, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        overridden(trained, **{name: 1})
    assert "\n" not in str(caught.value)


def test_a_field_younger_than_the_checkpoint_is_overridden(trained, tmp_path):
    state = torch.load(trained)
    del state["cfg"]["model"]["ode_steps"]
    torch.save(state, tmp_path / "old.pt")
    assert overridden(tmp_path / "old.pt", ode_steps=3).model.ode_steps == 3


def test_flags_of_validation_and_names_of_the_hub_pass(trained):
    known = dict(
        path="x.pt", batch_size=4, cpu=True, user_dir=None, num_workers=0, bpe="sentencepiece", bpe_codes="c",
        sentencepiece_model="m", load_checkpoint_heads=True, generation_args=None, task="implicit_masked_lm",
        arch="ode_bert",
    )  # fmt: skip
    overridden(trained, **known)


def test_validation_names_the_unknown_override(trained, fairseq_validate, toy_data):
    with pytest.raises(ValueError, match="'ode_schema' is no field"):
        fairseq_validate(
            *(toy_data, "--task", "implicit_masked_lm", "--path", trained, "--batch-size", 4),
            *("--model-overrides", "{'ode_schema': 'rk4'}"),
        )
