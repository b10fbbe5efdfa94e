"""The dial and the trajectory, on checkpoints that fairseq-train has just written."""

import argparse
import io
import re
import tarfile

import pytest
import torch

from fairseq_implicit.depth.diagnostics import Trajectory
from scripts import depth_sweep, plot_trajectory, validation


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
    assert found["as trained"] == found["rk2, 1 step"]
    labels = [f"{scheme}, {steps}" for scheme in ("euler", "rk2") for steps in ("1 step", "2 steps")]
    assert [found[label][1] for label in labels] == [2, 4, 4, 8]
    # Half the time per block, or twice the steps: the same solve, of twice the cost.
    assert found["rk2, layers cut in 2, 1 step"] == pytest.approx(found["rk2, 2 steps"], abs=2e-4)
    assert found["bosh3, tolerance 1e-2"][1] == 8 and picture.stat().st_size > 10000


def test_dial_of_a_continuum(checkpoints, toy_data, monkeypatch, capsys):
    output = run(
        depth_sweep, monkeypatch, capsys, checkpoints["neural"], toy_data, "--schemes", "rk4", "--steps", "1,3",
        "--pairs", "bosh3,tsit5", "--tolerances", "1e-3", "--batches", 2,
    )  # fmt: skip
    found = rows(output)
    assert found["rk4, 1 step"][1] == 4 and found["rk4, 3 steps"][1] == 12
    assert found["bosh3, tolerance 1e-3"][0] == pytest.approx(found["rk4, 3 steps"][0], abs=1e-3)
    assert len(found) == 5


def test_trajectory_as_table_picture_and_tensorboard(checkpoints, toy_data, monkeypatch, capsys, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("ode", "neural"):
        picture, board = tmp_path / f"{name}.png", tmp_path / name
        output = run(
            plot_trajectory, monkeypatch, capsys, checkpoints[name], toy_data, "--out", picture, "--tensorboard", board
        )
        assert "evaluations per sample: mean 4.0, 4 to 4" in output and picture.stat().st_size > 10000
        events = EventAccumulator(str(board)).Reload()
        assert [event.step for event in events.Scalars("trajectory/cosine")] == [1, 2]
        assert len(events.Scalars("trajectory/state_rms")) == 3 and events.Tags()["images"] == ["trajectory"]


def trajectory(layers=2, batch=5):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2 * layers, batch, generator=generator)
    return Trajectory(
        times=[float(place) for place in range(layers + 1)],
        rms=1 + torch.rand(layers + 1, batch, generator=generator),
        cosine=rows[:layers],
        local_error=1e-3 * rows[layers:],
        evaluations=torch.arange(4.0, 4 + batch),
    )


def ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels() if text.get_text()]


def test_a_trajectory_explains_itself():
    """Its bands stand in a legend, its depths are those of the states, its samples and evaluations whole numbers."""
    figure = plot_trajectory.plot(trajectory(), "model")
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mean over the batch", "smallest to largest sample"]
    *curves, samples = figure.axes
    assert all(ticks(panel.xaxis) == ["0", "1", "2"] for panel in curves)
    shown = {int(label) for label in ticks(samples.xaxis)} & set(range(1, 6))
    assert shown == {1, 2, 3, 4, 5} and all(label.isdigit() for label in ticks(samples.yaxis))
    assert [bar.get_x() + bar.get_width() / 2 for bar in samples.patches] == [1, 2, 3, 4, 5]


def test_a_diverged_model_is_a_sentence_and_no_picture(checkpoints, toy_data, monkeypatch, capsys, tmp_path):
    spoilt, picture = tmp_path / "spoilt.pt", tmp_path / "trajectory.png"
    state = torch.load(checkpoints["ode"])
    state["model"]["encoder.depth.fields.1.feed_forward.fc1.weight"][0, 0] = float("nan")
    torch.save(state, spoilt)
    with pytest.raises(SystemExit, match="plot_trajectory: the state is not finite at depth 2 of 2: the model has div"):
        run(plot_trajectory, monkeypatch, capsys, spoilt, toy_data, "--out", picture)
    assert not picture.exists()


def test_the_dial_is_short_unless_all_is_asked_for():
    given = dict(schemes=None, steps=None, splits="1", pairs="bosh3", tolerances=None)
    for model, counts in (("ode_bert", (7, 16)), ("neural_ode_bert", (9, 25))):
        short, whole = (
            depth_sweep.settings(model, {}, argparse.Namespace(**given, all=everything)) for everything in (False, True)
        )
        assert (len(short), len(whole)) == counts
        assert {setting.label for setting in short} <= {setting.label for setting in whole}
    for everything, batches, expected in ((False, None, 4), (True, None, None), (True, 2, 2), (False, 7, 7)):
        assert validation.batch_limit(argparse.Namespace(all=everything, batches=batches)) == expected


def test_a_few_batches_are_spread_over_the_subset(checkpoints, toy_data):
    """Batches go by length: the first ones alone would be the shortest blocks."""
    model, cfg, task = validation.open_checkpoint(checkpoints["ode"], toy_data)
    ids = [sample["id"].tolist() for sample in validation.batches(task, "valid", 1)]
    assert len(ids) > 8 and sorted(sum(ids, [])) == list(range(len(task.dataset("valid"))))
    few = [sample["id"].tolist() for sample in validation.batches(task, "valid", 1, 4)]
    places = [ids.index(one) for one in few]
    steps = [later - earlier for earlier, later in zip(places, places[1:])]
    assert len(places) == 4 and max(steps) - min(steps) <= 1
    assert places[0] >= len(ids) // 8 and places[-1] >= 3 * len(ids) // 4
    whole = validation.batches(task, "valid", 1)[places[1]]["net_input"]["src_tokens"]
    assert torch.equal(whole, validation.batches(task, "valid", 1, 4)[1]["net_input"]["src_tokens"])


def legacy_archive():
    """What torch's message would have the reader load unsafely."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return buffer.getvalue()


HOSTILE = {
    "archive": legacy_archive(),
    "text": b"epoch 3, loss 2.71\n" * 9,
    "zeros": bytes(4096),
    "list": [1, 2],
    "empty": {},
    "foreign": {"cfg": {"model": {"_name": "ode_bert_rk2_tiny"}}, "model": {}},
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_what_is_no_checkpoint_is_one_sentence(kind, monkeypatch, capsys, tmp_path):
    path, content = tmp_path / "checkpoint_best.pt", HOSTILE[kind]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for script, name in ((depth_sweep, "depth_sweep"), (plot_trajectory, "plot_trajectory")):
        with pytest.raises(SystemExit, match=f"^{name}: .*checkpoint {path} [^\n]*$") as raised:
            run(script, monkeypatch, capsys, path, tmp_path)
        assert "weights_only=False" not in str(raised.value)


def test_wrong_input_is_one_sentence(monkeypatch, tmp_path):
    for script in (depth_sweep, plot_trajectory):
        monkeypatch.setattr("sys.argv", ["script", str(tmp_path / "none.pt"), "data"])
        with pytest.raises(SystemExit, match="there is no checkpoint .*none.pt"):
            script.main()
    with pytest.raises(ValueError, match="holds deq_bert_tiny: the dial turns ode_bert and neural_ode_bert only"):
        depth_sweep.settings("deq_bert_tiny", {}, None)
