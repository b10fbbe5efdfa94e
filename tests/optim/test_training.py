"""The optimisers in ``fairseq-train``: resumed, changed over to and from ``adam``, in half precision, on two ranks."""

import pytest
import torch

from tests.test_distributed import train_on_two_ranks

QUIET = ["--disable-validation", "--dropout", 0.1, "--clip-norm", 0.5, "--weight-decay", 0.01]


def assert_equal_ends(one, other):
    one, other = (torch.load(folder / "checkpoint_last.pt") for folder in (one, other))
    assert all(torch.equal(one["model"][name], weight) for name, weight in other["model"].items())
    states = one["last_optimizer_state"]["state"], other["last_optimizer_state"]["state"]
    assert states[0].keys() == states[1].keys()
    for index, state in states[1].items():
        assert states[0][index]["step"] == state["step"]
        assert torch.equal(states[0][index]["exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("flags", ["fused_adam", "fused_adam --bf16", "stable_adam", "stable_adam --bf16"])
def test_resumed_equals_uninterrupted(toy_flags, fairseq_train, tmp_path, flags):
    flags = [
        *toy_flags, *QUIET, "--update-freq", 2, "--arch", "ode_bert_gated_tiny", "--optimizer", *flags.split(),
        *"--lr-scheduler wsd --warmup-updates 4 --decay-updates 4 --total-num-update 12 --batch-size 8".split(),
    ]  # fmt: skip
    first = fairseq_train(*flags, "--max-update", 6, "--save-dir", tmp_path / "resumed")
    second = fairseq_train(*flags, "--max-update", 12, "--save-dir", tmp_path / "resumed")
    whole = fairseq_train(*flags, "--max-update", 12, "--save-dir", tmp_path / "whole")
    assert {**first.losses(), **second.losses()} == whole.losses() and len(whole.losses()) == 12
    rates = {int(stats["num_updates"]): stats["lr"] for stats in whole.metrics("train_inner")}
    assert rates[2] == 1e-3 and rates[4] == rates[8] == 2e-3 and rates[12] == 0 < rates[11] < rates[9] < 2e-3
    assert_equal_ends(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--memory-efficient-bf16"]])
def test_adam_goes_on_as_fused_adam_and_back(toy_flags, fairseq_train, tmp_path, precision):
    """Without a reset; and the two, with decay for all, differ by the rounding of their sums."""
    flags = [*toy_flags, *QUIET, *precision, "--arch", "ode_bert_gated_tiny"]
    plain = fairseq_train(*flags, "--max-update", 12, "--save-dir", tmp_path / "plain")
    runs = []
    for end, optimizer in ((4, ["adam"]), (8, ["fused_adam", "--decay-all"]), (12, ["adam"])):
        changed = [*flags, "--optimizer", *optimizer]
        runs.append(fairseq_train(*changed, "--max-update", end, "--save-dir", tmp_path / "changing"))
    losses = {number: loss for run in runs for number, loss in run.losses().items()}
    assert sorted(losses) == list(range(1, 13))
    assert losses == pytest.approx(plain.losses(), abs=0.02 if precision else 2e-3)
    ends = [torch.load(tmp_path / run / "checkpoint_last.pt")["last_optimizer_state"] for run in ("plain", "changing")]
    assert [end["param_groups"] for end in ends[:1]] == [end["param_groups"] for end in ends[1:]]
    for index, state in ends[0]["state"].items():
        found = ends[1]["state"][index]
        assert found["step"] == state["step"] == 12
        torch.testing.assert_close(found["exp_avg_sq"], state["exp_avg_sq"], rtol=0.2, atol=1e-6)


def test_the_schedule_ends_with_the_training(toy_flags, fairseq_train):
    flags = [*toy_flags, "--lr-scheduler", "wsd", "--no-save", "--disable-validation"]
    run = fairseq_train(*flags, "--decay-updates", 2, "--max-update", 3)
    assert [stats["lr"] for stats in run.metrics("train_inner")] == [2e-3, pytest.approx(0.000585786, abs=1e-8), 0.0]
    with pytest.raises(ValueError, match="give --max-update or --total-num-update"):
        fairseq_train(*flags, "--max-epoch", 1)


def test_gradients_that_are_no_numbers_end_the_training(toy_flags, fairseq_train, tmp_path):
    for optimizer in ("fused_adam", "stable_adam"):
        with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
            fairseq_train(
                *toy_flags, *QUIET, "--optimizer", optimizer, "--lr", 1e30, "--max-update", 9, "--save-dir", tmp_path
            )


def test_two_ranks_train_as_with_adam(toy_flags, fairseq_train, fork, free_port, tmp_path):
    flags = [*toy_flags, *QUIET, "--max-update", 4, "--no-save"]
    runs = [
        train_on_two_ranks(fairseq_train, fork, free_port(), *flags, "--optimizer", *optimizer)
        for optimizer in (["adam"], ["fused_adam", "--decay-all"])
    ]
    assert sorted(runs[0].losses()) == [1, 2, 3, 4]
    assert runs[1].losses() == pytest.approx(runs[0].losses(), abs=2e-3)
