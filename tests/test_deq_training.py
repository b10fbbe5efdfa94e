"""deq_bert under fairseq-train: phases, resuming in each of them, two processes, dials, hydra's half precision."""

import json
import re
import socket

import pytest
import torch

PHASES = (
    "--arch deq_bert_tiny --encoder-embed-dim 32 --encoder-ffn-embed-dim 96 --deq-cell-norm pre-norm "
    "--deq-warmup-updates 4 --deq-warmup-steps 2 --deq-phantom-updates 4 --deq-phantom-steps 3 "
    "--deq-ramp-updates 6 --deq-start-max-iter 6 --deq-max-iter 16 --deq-budget-jitter 2 "
    "--deq-jacobian-weight 0.1 --deq-jacobian-frequency 0.5 --deq-correction 2,4 --deq-correction-weight 0.3 "
    "--deq-monitor-interval 3 --dropout 0.1 --attention-dropout 0.1 --update-freq 2 --disable-validation"
).split()


@pytest.fixture(scope="module")
def whole(toy_flags, fairseq_train, tmp_path_factory):
    """Twelve updates through all phases, with a checkpoint after every second one."""
    folder = tmp_path_factory.mktemp("whole")
    run = fairseq_train(*toy_flags, *PHASES, "--max-update", 12, "--save-interval-updates", 2, "--save-dir", folder)
    return run, folder


def test_all_phases_run_in_order_and_say_so(whole):
    run, _ = whole
    lines = run.metrics("train_inner")
    assert "equilibrium at update 0: spectral radius" in run.text and "One update with ift costs" in run.text
    budgets = [line["evaluation_budget"] for line in lines]
    assert budgets[:4] == [2, 2, 2, 2]
    assert 4 <= budgets[4] <= 8 and budgets[-1] >= 14
    adjoint = [line["adjoint_residual"] for line in lines]
    # Statistics of the backward pass are those of the batch before: update 9 is the first with an adjoint solve.
    assert adjoint[-1] > 0 and max(adjoint[:8]) == 0
    assert min(line["converged_share"] for line in lines[4:]) >= 0.95
    assert all(line["loss"] > 0 and line["injection_gain"] > 0 for line in lines)


@pytest.mark.parametrize("stopped_at", [2, 6, 10])
def test_resuming_in_any_phase_repeats_the_run_digit_for_digit(whole, toy_flags, fairseq_train, tmp_path, stopped_at):
    run, folder = whole
    start = next(folder.glob(f"checkpoint_*_{stopped_at}.pt"))
    resumed = fairseq_train(*toy_flags, *PHASES, "--max-update", 12, "--save-dir", tmp_path, "--restore-file", start)
    assert resumed.losses() == {number: loss for number, loss in run.losses().items() if number > stopped_at}
    one, other = (torch.load(place / "checkpoint_last.pt") for place in (tmp_path, folder))
    assert all(torch.equal(one["model"][name], weight) for name, weight in other["model"].items())


def test_dials_change_the_solve_and_not_the_weights(whole, toy_data, fairseq_validate, tmp_path):
    _, folder = whole
    common = (toy_data, "--task", "implicit_masked_lm", "--path", folder / "checkpoint_last.pt", "--batch-size", 8)
    exact = fairseq_validate(*common, "--model-overrides", "{'deq_eval_tol': 1e-5, 'deq_eval_max_iter': 60}")
    picard = fairseq_validate(
        *common, "--model-overrides", "{'deq_eval_solver': 'picard', 'deq_eval_tol': 1e-5, 'deq_eval_max_iter': 60}"
    )
    short = fairseq_validate(*common, "--model-overrides", "{'deq_eval_max_iter': 1}")
    assert picard["valid_loss"] == pytest.approx(exact["valid_loss"], abs=2e-3)
    assert exact["valid_residual"] <= 1e-5 < short["valid_residual"]
    assert short["valid_evaluations"] == 1


def test_a_cell_without_equilibrium_ends_the_run_with_its_sentence(toy_flags, fairseq_train, tmp_path):
    flags = [*toy_flags, "--arch", "deq_bert_tiny", "--max-update", 1, "--save-dir", tmp_path, "--disable-validation"]
    weak = "--deq-injection none --deq-initial-state input --deq-max-iter 4 --deq-cell-norm post-norm".split()
    with pytest.raises(
        ValueError, match="--deq-allow-nonconvergent: the cell does not converge.*--deq-injection residual"
    ):
        fairseq_train(*flags, *weak)
    fairseq_train(*flags, *weak, "--deq-allow-nonconvergent")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_equal_one_with_twice_the_batch(toy_flags, fairseq_train, command_line, checkout, tmp_path):
    # Without dropout and random probes, which every rank draws for itself; a linear optimiser.
    flags = [
        *toy_flags, *PHASES, "--optimizer", "nag", "--lr", "0.3", "--dropout", 0, "--attention-dropout", 0,
        "--deq-jacobian-weight", 0, "--batch-size", 16, "--max-update", 9,
    ]  # fmt: skip
    arguments = [
        *flags, "--update-freq", 1, "--user-dir", checkout / "fairseq_implicit", "--cpu", "--distributed-world-size", 2,
        "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--log-format", "json", "--log-interval", 1,
        "--no-epoch-checkpoints", "--num-workers", 0, "--save-dir", tmp_path / "two",
    ]  # fmt: skip
    port = str(free_port())
    ranks = [
        command_line(
            "fairseq-train", *arguments, MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank)
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    two = [json.loads(line) for line in re.findall(r"train_inner \| (\{.*\})", outputs[0])]
    one = fairseq_train(*flags, "--update-freq", 2, "--save-dir", tmp_path / "one").metrics("train_inner")
    assert len(one) == len(two) == 9
    for ours, theirs in zip(one, two, strict=True):
        assert float(theirs["evaluation_budget"]) == ours["evaluation_budget"]
        assert float(theirs["loss"]) == pytest.approx(ours["loss"], abs=2e-3)
    weights = [torch.load(tmp_path / run / "checkpoint_last.pt")["model"] for run in ("two", "one")]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, atol=5e-5, rtol=0)
