"""Two processes with gloo are one process with twice the batch."""

import pytest
import torch


def train_on_two_ranks(fairseq_train, fork, port, *flags):
    """Runs both ranks in the environment that torchrun gives them; returns rank 0's run."""
    flags = [*flags, "--distributed-world-size", 2, "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
    rendezvous = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2")
    ranks = [fork(fairseq_train, *flags, **rendezvous, RANK=str(rank)) for rank in range(2)]
    return [rank.result() for rank in ranks][0]


def test_two_ranks_equal_one_process_with_twice_the_batch_and_resume(
    toy_flags, fairseq_train, fork, free_port, tmp_path
):
    # Without dropout: one process draws the noise of the second batch after that of the first, two ranks draw both
    # from the same seed. With a linear optimiser: Adam makes large steps of rounding errors.
    flags = (
        toy_flags
        + (
            "--arch ode_bert_gated_tiny --optimizer nag --lr 0.5 --clip-norm 1.0 --dropout 0 --attention-dropout 0 "
            "--sample-break-mode complete --disable-validation --batch-size 64 --save-interval-updates 3"
        ).split()
    )
    two = train_on_two_ranks(
        fairseq_train, fork, free_port(), *flags, "--max-update", 3, "--save-dir", tmp_path / "two"
    )
    resumed = train_on_two_ranks(
        fairseq_train, fork, free_port(), *flags, "--max-update", 9, "--save-dir", tmp_path / "two"
    )
    assert sorted(two.losses()) == [1, 2, 3] and sorted(resumed.losses()) == [4, 5, 6, 7, 8, 9]
    one = fairseq_train(*flags, "--update-freq", 2, "--max-update", 9, "--save-dir", tmp_path / "one")
    assert len(one.metrics("train")) > 1, "the run must cross the end of an epoch"
    for stats, other in zip(
        one.metrics("train_inner"), two.metrics("train_inner") + resumed.metrics("train_inner"), strict=True
    ):
        assert stats["num_updates"] == other["num_updates"]
        for name in ("loss", "gnorm", "wpb", "tokens", "bsz", "accuracy", "evaluations", "state_rms", "gate_mean"):
            assert other[name] == pytest.approx(stats[name], abs=2e-3), (name, stats["num_updates"])
    theirs, ours = (torch.load(tmp_path / run / "checkpoint_last.pt")["model"] for run in ("two", "one"))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-5, rtol=0)
