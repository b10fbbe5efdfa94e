"""The dial and the trajectory, on checkpoints that fairseq-train has just written."""

import re

import pytest

from scripts import depth_sweep, plot_trajectory


@pytest.fixture(scope="module")
def checkpoints(toy_flags, fairseq_train, tmp_path_factory):
    """Paths of an ode_bert and of a neural_ode_bert trained with everything that must not stand in the dial's way."""
    found = {}
    for name, flags in (
        ("ode", "--arch ode_bert_rk2_tiny --ode-random-steps 1,2 --ode-gradient checkpoint-step"),
        ("neural", "--arch neural_ode_bert_tiny --ode-scheme bosh3 --ode-local-error 0.1"),
    ):
        folder = tmp_path_factory.mktemp(name)
        fairseq_train(*toy_flags, *flags.split(), "--max-update", 3, "--save-dir", folder)
        found[name] = str(folder / "checkpoint_last.pt")
    return found


def run(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
    capsys.readouterr()
    script.main()
    return capsys.readouterr().out


def rows(output):
    """{setting: (loss, evaluations)} of the printed table."""
    found = {}
    for line in output.splitlines():
        match = re.fullmatch(r"(.+?)\s+([\d.]+)\s+[+-][\d.]+\s+[\d.]+%\s+([\d.]+)\s+[\d.]+", line)
        if match:
            found[match.group(1)] = float(match.group(2)), float(match.group(3))
    return found


def test_dial_of_a_stack(checkpoints, toy_data, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "pictures" / "dial.png"
    output = run(
        depth_sweep, monkeypatch, capsys, checkpoints["ode"], toy_data, "--schemes", "euler,rk2", "--steps", "1,2",
        "--splits", "1,2", "--tolerances", "1e-2", "--batches", 2, "--out", picture,
    )  # fmt: skip
    found = rows(output)
    assert found["as trained"] == found["rk2, 1 steps"]
    assert [found[f"{scheme}, {n} steps"][1] for scheme in ("euler", "rk2") for n in (1, 2)] == [2, 4, 4, 8]
    # Half the time per block, or twice the steps: the same solve, of twice the cost.
    assert found["rk2, layers cut in 2, 1 steps"] == pytest.approx(found["rk2, 2 steps"], abs=2e-4)
    assert found["bosh3, tolerance 1e-2"][1] == 8 and picture.stat().st_size > 10000


def test_dial_of_a_continuum(checkpoints, toy_data, monkeypatch, capsys):
    output = run(
        depth_sweep, monkeypatch, capsys, checkpoints["neural"], toy_data, "--schemes", "rk4", "--steps", "1,3",
        "--pairs", "bosh3,tsit5", "--tolerances", "1e-3", "--batches", 2,
    )  # fmt: skip
    found = rows(output)
    assert found["rk4, 1 steps"][1] == 4 and found["rk4, 3 steps"][1] == 12
    assert found["bosh3, tolerance 1e-3"][0] == pytest.approx(found["rk4, 3 steps"][0], abs=1e-3)
    assert len(found) == 5


def test_trajectory_as_table_picture_and_tensorboard(checkpoints, toy_data, monkeypatch, capsys, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The neural ODE (bosh3, two layers) tries one layer first: two steps of three evaluations, and one to begin with.
    for name, evaluations in (("ode", 4), ("neural", 7)):
        picture, board = tmp_path / f"{name}.png", tmp_path / name
        output = run(
            plot_trajectory, monkeypatch, capsys, checkpoints[name], toy_data, "--out", picture, "--tensorboard", board
        )
        assert f"evaluations per sample: mean {evaluations}.0, {evaluations} to {evaluations}" in output
        assert picture.stat().st_size > 10000
        events = EventAccumulator(str(board)).Reload()
        assert [event.step for event in events.Scalars("trajectory/cosine")] == [1, 2]
        assert len(events.Scalars("trajectory/state_rms")) == 3 and events.Tags()["images"] == ["trajectory"]


def test_wrong_input_is_one_sentence(monkeypatch, tmp_path):
    for script in (depth_sweep, plot_trajectory):
        monkeypatch.setattr("sys.argv", ["script", str(tmp_path / "none.pt"), "data"])
        with pytest.raises(SystemExit, match="there is no checkpoint .*none.pt"):
            script.main()
    with pytest.raises(ValueError, match="holds deq_bert_tiny: the dial turns ode_bert and neural_ode_bert only"):
        depth_sweep.settings("deq_bert_tiny", {}, None)
