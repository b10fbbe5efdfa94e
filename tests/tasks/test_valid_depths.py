"""The loss at a list of depths, logged beside the ordinary one in the same validation."""

import math

import pytest

from tests.test_distributed import train_on_two_ranks

LOOP = (
    "--arch ode_bert_tiny --encoder-layers 1 --ode-linear-part diagonal --ode-scheme etd2 --ode-steps 4 --ode-time 4 "
    "--ode-random-depth 3 --ode-random-depth-gradient 2"
).split()


VALIDATION = "--task implicit_masked_lm --criterion implicit_masked_lm".split()


def losses(stats, depths):
    return [stats[f"valid_loss_depth_{depth}"] for depth in depths]


@pytest.fixture(scope="module")
def trained(toy_flags, fairseq_train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    run = fairseq_train(
        *toy_flags, *LOOP, "--valid-depths", "1,2,4,8", "--max-update", 6, "--lr", 2e-2, "--save-dir", folder
    )
    return run, str(folder / "checkpoint_last.pt")


def test_each_depth_is_the_checkpoint_opened_at_it(trained, fairseq_validate, toy_data):
    run, path = trained
    stats = run.metrics("valid")[-1]
    found = losses(stats, (1, 2, 4, 8))
    assert found[2] == stats["valid_loss"] and len(set(found)) > 1
    for depth, loss in zip((1, 2, 8), (found[0], found[1], found[3]), strict=True):
        dial = f"{{'ode_steps': {depth}, 'ode_time': {depth}.0, 'valid_depths': None}}"
        alone = fairseq_validate(toy_data, *VALIDATION, "--path", path, "--model-overrides", dial, "--batch-size", 4)
        assert alone["valid_loss"] == pytest.approx(loss, abs=1e-3)
        assert not [name for name in alone if "loss_depth" in name]


def test_a_checkpoint_is_validated_at_other_depths(trained, fairseq_validate, toy_data):
    run, path = trained
    dial = "{'valid_depths': [2, 16]}"
    stats = fairseq_validate(toy_data, *VALIDATION, "--path", path, "--model-overrides", dial, "--batch-size", 64)
    two, sixteen = losses(stats, (2, 16))
    assert two == pytest.approx(run.metrics("valid")[-1]["valid_loss_depth_2"], abs=1e-3) and math.isfinite(sixteen)


def test_training_draws_depths_and_a_resumed_run_draws_the_same(trained, toy_flags, fairseq_train, tmp_path):
    run, _ = trained
    spent = [stats["evaluations"] for stats in run.metrics("train_inner")]
    assert len(set(spent)) > 1 and all(2 <= each <= 12 for each in spent)
    flags = (*toy_flags, *LOOP, "--lr", 2e-2, "--disable-validation", "--save-dir", tmp_path)
    fairseq_train(*flags, "--max-update", 3)
    resumed = fairseq_train(*flags, "--max-update", 6)
    assert [stats["evaluations"] for stats in resumed.metrics("train_inner")] == spent[3:]
    assert resumed.losses() == {update: loss for update, loss in run.losses().items() if update > 3}


def test_two_ranks_log_what_one_process_does(toy_flags, fairseq_train, fork, free_port, tmp_path):
    flags = [*toy_flags, *LOOP, "--optimizer", "nag", "--lr", 0.5, "--clip-norm", 1.0]
    flags += ["--dropout", 0, "--attention-dropout", 0, "--valid-depths", "1,8", "--max-update", 2]
    two = train_on_two_ranks(fairseq_train, fork, free_port(), *flags, "--save-dir", tmp_path / "two")
    one = fairseq_train(*flags, "--update-freq", 2, "--save-dir", tmp_path / "one")
    ours, theirs = (run.metrics("valid")[-1] for run in (one, two))
    assert losses(theirs, (1, 8)) == pytest.approx(losses(ours, (1, 8)), abs=2e-3)
    assert theirs["valid_loss"] == pytest.approx(ours["valid_loss"], abs=2e-3)
    spent = [[stats["evaluations"] for stats in run.metrics("train_inner")] for run in (one, two)]
    assert spent[0] == spent[1]


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--arch deq_bert_tiny --valid-depths 2,30", (2, 30)),
        ("--arch neural_ode_bert_tiny --ode-tolerance 0 --valid-depths 1,3", (1, 3)),
    ],
)
def test_other_families_have_the_dial_too(flags, names, toy_flags, fairseq_train, tmp_path):
    run = fairseq_train(*toy_flags, *flags.split(), "--max-update", 1, "--save-dir", tmp_path, "--no-save")
    assert all(math.isfinite(loss) for loss in losses(run.metrics("valid")[-1], names))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--valid-depths 0,2", "--valid-depths 0,2: give each depth, at least 1, once"),
        ("--valid-depths 2,2", "--valid-depths 2,2: give each depth"),
        (
            "--valid-depths 2 --ode-scheme bosh3 --ode-tolerance 0.1",
            "--valid-depths 2: --ode-tolerance: adaptive steps",
        ),
        ("--valid-depths 2 --criterion masked_lm", "--valid-depths 2 logs nothing with --criterion masked_lm"),
        (
            "--valid-depths 2 --arch roberta_base --encoder-layers 1 --encoder-attention-heads 2",
            "--valid-depths 2: a RobertaModel has one depth only",
        ),
    ],
)
def test_what_has_no_such_depth_is_refused_before_it_trains(flags, sentence, toy_flags, fairseq_train, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        fairseq_train(*toy_flags, *flags.split(), "--max-update", 1, "--save-dir", tmp_path)
