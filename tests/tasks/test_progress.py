"""Tokens to date and the share of the peak: over updates, workers, kills and checkpoints that do not know."""

import pytest
import torch
from fairseq.logging import meters, metrics

from fairseq_implicit import machine
from fairseq_implicit.tasks import progress
from fairseq_implicit.tasks.progress import Progress


def test_tokens_to_date_go_on_after_a_stop(toy_flags, fairseq_train, tmp_path):
    flags = [*toy_flags, "--update-freq", 2, "--disable-validation", "--save-dir", tmp_path]
    first = fairseq_train(*flags, "--max-update", 3).metrics("train_inner")
    second = fairseq_train(*flags, "--max-update", 5).metrics("train_inner")
    seen = 0
    for line in first + second:
        seen += line["wpb"]
        assert line["tokens"] == seen
    assert [line["num_updates"] for line in first + second] == [1, 2, 3, 4, 5] and "mfu" in second[-1]
    # from the weights alone it begins again
    fresh = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
    (again,) = fairseq_train(*flags, *fresh, "--max-update", 1, "--no-save").metrics("train_inner")
    assert again["tokens"] == again["wpb"]


def test_a_checkpoint_that_does_not_know_its_tokens(toy_flags, fairseq_train, tmp_path):
    flags = [*toy_flags, "--disable-validation", "--save-dir", tmp_path]
    fairseq_train(*flags, "--max-update", 1)
    path = tmp_path / "checkpoint_last.pt"
    state = torch.load(path)
    del state["extra_state"]["ImplicitMaskedLMTask"]["tokens"]
    torch.save(state, path)
    (line,) = fairseq_train(*flags, "--max-update", 2).metrics("train_inner")
    assert "tokens" not in line and "wpb" in line


def test_the_share_of_the_peak_over_all_devices(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress.distributed_utils, "get_data_parallel_world_size", lambda: 2)
    own, batches = Progress(peak_tflops=3.0), [{"operations": 1e11, "ntokens": 7}, {"operations": 2e11, "ntokens": 5}]
    own.tokens = 100
    metrics.reset()
    with metrics.aggregate(new_root=True) as found:
        own.log(batches)  # its interval has no beginning
        meter = found["mfu"]
        start = meter.start
        own.log(batches)
        assert found["tokens"].smoothed_value == 124
        assert meter.n == pytest.approx(100 * 0.3 / (3.0 * 2)) and meter.start == start
    with metrics.aggregate(new_root=True) as found:
        own.log([{"loss": 1.0, "ntokens": 3}])  # a model of fairseq's own says nothing of its operations
        assert "mfu" not in found and found["tokens"].smoothed_value == 127


def test_the_peak_is_measured_in_the_precision_of_the_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(progress, "matrix_product_speed", lambda *about: asked.append(about) or 5e12)
    model = torch.nn.Linear(2, 2).bfloat16()
    measured = Progress(None)
    measured.begin(model)
    measured.begin(model)  # the next epoch
    Progress(1.0).begin(model)
    assert asked == [(torch.device("cpu"), torch.bfloat16)]


def test_a_matrix_product_is_fast_and_takes_the_time_it_may():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    speed = machine.matrix_product_speed(torch.device("cpu"), torch.float32, seconds=0.02)
    assert 1e7 < speed < 1e15 and torch.equal(torch.get_rng_state(), state)
    # emulated, one product may take longer than all: it is not repeated
    assert machine.matrix_product_speed(torch.device("cpu"), torch.bfloat16, seconds=0.0) > 1e6


@pytest.mark.parametrize("peak", ["0", "-1", "nan", "inf"])
def test_a_peak_that_is_none(toy_flags, fairseq_train, tmp_path, peak):
    with pytest.raises(ValueError, match="--peak-tflops must be a positive number"):
        fairseq_train(*toy_flags, "--peak-tflops", peak, "--max-update", 1, "--no-save", "--save-dir", tmp_path)
