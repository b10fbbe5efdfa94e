"""Token files as fairseq writes them: opened without reading them, and refused when they are damaged."""

import os
import pickle
import shutil

import numpy as np
import pytest

from fairseq_implicit.text.token_files import MappedTokens


def test_pickle_holds_paths_not_data(toy_data):
    file = MappedTokens(f"{toy_data}/train")
    assert len(pickle.dumps(file)) < 1000
    copy = pickle.loads(pickle.dumps(file))
    assert np.array_equal(copy.slice(5, 20), file.slice(5, 20))


def test_refuses_truncated_and_foreign_files(toy_data, tmp_path):
    folder = tmp_path / "bin"
    shutil.copytree(toy_data, folder)
    os.truncate(folder / "train.bin", 100)
    with pytest.raises(ValueError, match="train.bin has 100 bytes where its index says"):
        MappedTokens(str(folder / "train"))
    os.truncate(folder / "valid.idx", 60)
    with pytest.raises(ValueError, match="valid.idx is truncated"):
        MappedTokens(str(folder / "valid"))
    index = (folder / "test.idx").read_bytes()
    for content in (b"something else entirely, and long enough", b"", index[:17] + b"\x07" + index[18:]):
        (folder / "test.idx").write_bytes(content)
        with pytest.raises(ValueError, match="--dataset-impl mmap"):
            MappedTokens(str(folder / "test"))
    (folder / "test.idx").write_bytes(index[:20])
    with pytest.raises(ValueError, match="test.idx is truncated"):
        MappedTokens(str(folder / "test"))
    os.remove(folder / "valid.bin")
    with pytest.raises(FileNotFoundError, match="valid.bin does not exist"):
        MappedTokens(str(folder / "valid"))
