"""The commands on the depth of a checkpoint: their defaults, tables and pictures, and what they say of wrong input."""

import io
import re
import tarfile

import pytest
import torch

from fairseq_implicit.commands import load, plot_trajectory
from fairseq_implicit.commands.checkpoint_arguments import dial_blocks
from fairseq_implicit.commands.depth_sweep import dial
from fairseq_implicit.depth.diagnostics import Trajectory
from fairseq_implicit.evaluation.depth_dials import settings
from fairseq_implicit.evaluation.masked_lm import Blocks
from fairseq_implicit.evaluation.trajectory import trajectory


@pytest.mark.parametrize(
    "name, family, flags, row",
    [
        ("depth-sweep", "ode", "--schemes euler --steps 2 --tolerances 1e-2", "euler, 2 steps"),
        ("budget-sweep", "deq", "--solvers picard --budgets 2,3", "picard"),
    ],
)
def test_a_sweep_prints_its_rows_and_draws_them(
    depth_checkpoints, toy_data, command, tmp_path, name, family, flags, row
):
    picture = tmp_path / "pictures" / "dial.png"
    arguments = (depth_checkpoints[family], toy_data, "--batches", 1, "--out", picture, *flags.split())
    status, output, errors = command(name, *arguments)
    above, head, trained, *others, below = output.splitlines()
    assert status == 0 and errors == "" and below == f"  {picture}"
    assert above.startswith(f"{depth_checkpoints[family]}: ") and " of valid in " in above and ", cpu, " in above
    assert {"loss", "change", "accuracy", "evaluations", "time"} <= set(head.split())
    assert trained.startswith("as trained ") and " +0.0000 " in trained and trained.endswith(" 1.00")
    assert len(others) == 2 and others[0].startswith(f"{row} ")
    assert picture.stat().st_size > 10000


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--solvers", "newton"], "budget-sweep: --solvers: 'newton' is unknown"),
        (["--budgets", "0"], "budget-sweep: --budgets"),
        (["--tol", "1e-9"], "budget-sweep: --tol"),
    ],
)
def test_a_budget_sweep_names_what_is_wrong(depth_checkpoints, toy_data, command, arguments, sentence):
    status, _, said = command("budget-sweep", depth_checkpoints["deq"], toy_data, "--batches", 1, *arguments)
    assert status == 1 and sentence in said and len(said.splitlines()) == 1


def test_a_trajectory_as_table_picture_and_tensorboard(depth_checkpoints, toy_data, command, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The neural ODE (bosh3, two layers) tries one layer first: two steps of three evaluations, and one to begin with.
    for name, evaluations in (("ode", 4), ("neural", 7)):
        _, found = trajectory(depth_checkpoints[name], Blocks(toy_data, batch_size=16))
        assert found.evaluations.tolist() == [evaluations] * len(found.evaluations) and len(found.times) == 3
        picture, board = tmp_path / f"{name}.png", tmp_path / name
        _, output, _ = command(
            "plot-trajectory", depth_checkpoints[name], toy_data, "--out", picture, "--tensorboard", board
        )
        assert plot_trajectory.table(found) in output
        assert picture.stat().st_size > 10000
        events = EventAccumulator(str(board)).Reload()
        assert [event.step for event in events.Scalars("trajectory/cosine")] == [1, 2]
        assert len(events.Scalars("trajectory/state_rms")) == 3 and events.Tags()["images"] == ["trajectory"]


def made_up(layers=2, batch=5):
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
    figure = plot_trajectory.plot(made_up(), "model")
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mean over the batch", "smallest to largest sample"]
    *curves, samples = figure.axes
    assert all(ticks(panel.xaxis) == ["0", "1", "2"] for panel in curves)
    shown = {int(label) for label in ticks(samples.xaxis)} & set(range(1, 6))
    assert shown == {1, 2, 3, 4, 5} and all(label.isdigit() for label in ticks(samples.yaxis))
    assert [bar.get_x() + bar.get_width() / 2 for bar in samples.patches] == [1, 2, 3, 4, 5]
    assert plot_trajectory.table(made_up()).endswith("evaluations per sample: mean 6.0, 4 to 8")


def test_a_diverged_model_is_a_sentence_and_no_picture(depth_checkpoints, toy_data, command, tmp_path):
    spoilt, picture = tmp_path / "spoilt.pt", tmp_path / "trajectory.png"
    state = torch.load(depth_checkpoints["ode"])
    state["model"]["encoder.depth.fields.1.feed_forward.fc1.weight"][0, 0] = float("nan")
    torch.save(state, spoilt)
    status, _, said = command("plot-trajectory", spoilt, toy_data, "--out", picture)
    assert status == 1 and "plot-trajectory: the state is not finite at depth 2 of 2: the model has diverged" in said
    assert not picture.exists()


def test_the_dial_is_short_unless_all_is_asked_for():
    _, parser = load("depth-sweep")
    for model, counts in (("ode_bert", (7, 16)), ("neural_ode_bert", (9, 25))):
        short, whole = (
            settings({"_name": model}, dial(model, parser.parse_args(["checkpoint", "data", *flags])))
            for flags in ([], ["--all"])
        )
        assert (len(short), len(whole)) == counts
        assert {setting.label for setting in short} <= {setting.label for setting in whole}
    for flags, expected in (([], 4), (["--all"], None), (["--all", "--batches", "2"], 2), (["--batches", "7"], 7)):
        assert dial_blocks(parser.parse_args(["checkpoint", "data", *flags])).limit == expected


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
def test_what_is_no_checkpoint_is_one_sentence(kind, command, tmp_path):
    path, content = tmp_path / "checkpoint_best.pt", HOSTILE[kind]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for name in ("depth-sweep", "plot-trajectory"):
        status, _, said = command(name, path, tmp_path)
        assert status == 1 and re.fullmatch(f"fairseq-implicit {name}: .*checkpoint {path} [^\n]*\n", said)
        assert "weights_only=False" not in said


def test_wrong_input_is_one_sentence(command, tmp_path):
    for name in ("depth-sweep", "budget-sweep", "plot-trajectory"):
        status, _, said = command(name, tmp_path / "none.pt", "data")
        assert status == 1 and said == f"fairseq-implicit {name}: there is no checkpoint {tmp_path / 'none.pt'}\n"
