"""fairseq-preprocess: sentences for broken input, and progress."""

import time

from fairseq_implicit.compat import preprocess
from fairseq_implicit.compat.preprocess import find_invalid_utf8


def test_finds_the_first_byte_that_is_not_utf8(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("caf\u00e9\n" * 3, encoding="utf-8")
    bad.write_bytes("caf\u00e9\n".encode() + b"ab\xffc\n")
    assert find_invalid_utf8(good) == (-1, -1)
    assert find_invalid_utf8(bad) == (8, 2)


def test_a_long_file_reports_what_all_workers_have_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preprocess, "INTERVAL", 0.05)
    caplog.set_level("INFO")
    prefix = str(tmp_path / "train [1]")  # as a name, not as a pattern

    def slow(input_file, dataset_impl, binarizer, output_prefix, vocab_size):
        for suffix, tokens in (("", 700), (".pt1", 300)):
            with open(f"{output_prefix}{suffix}.bin", "wb") as stream:
                stream.write(bytes(2 * tokens))  # ids of a small vocabulary take two bytes
        deadline = time.monotonic() + 20
        while "1,000 tokens so far" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)

    preprocess.multiprocess_dataset(slow, "train.txt", "mmap", None, prefix, vocab_size=100)
    assert "train.txt: 1,000 tokens so far" in caplog.text
