"""The budget sweep and the bridge, on checkpoints that fairseq-train has just written."""

import re

import pytest

from scripts import convert_tied, deq_budget_sweep, validation


def run(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
    capsys.readouterr()
    script.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def equilibrium(toy_flags, fairseq_train, tmp_path_factory):
    """Path of a deq_bert trained with a schedule and a correction, which must not stand in the dial's way."""
    folder = tmp_path_factory.mktemp("deq")
    flags = "--arch deq_bert_tiny --deq-ramp-updates 2 --deq-start-max-iter 10 --deq-correction 4 --disable-validation"
    fairseq_train(*toy_flags, *flags.split(), "--max-update", 3, "--save-dir", folder)
    return str(folder / "checkpoint_last.pt")


def test_sweep_prints_a_table_and_a_picture(equilibrium, toy_data, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "pictures" / "budget.png"
    output = run(
        deq_budget_sweep, monkeypatch, capsys, equilibrium, toy_data, "--budgets", "1,2,12", "--batches", 2,
        "--tol", "1e-5", "--out", picture,
    )  # fmt: skip
    rows = re.findall(
        r"^(as trained|picard|anderson|broyden) +(\d+) +([\d.]+) .* ([\d.]+) +([\d.e+-]+) +\d+%", output, re.M
    )
    assert len(rows) == 10
    found = {(solver, int(budget)): (float(loss), float(residual)) for solver, budget, loss, _, residual in rows}
    for solver in ("picard", "anderson", "broyden"):
        assert found[solver, 1][1] > found[solver, 2][1] > found[solver, 12][1]
        assert found[solver, 12][0] == pytest.approx(found["as trained", 30][0], abs=2e-3)
    assert picture.stat().st_size > 10000


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--solvers", "newton"], "--solvers: 'newton' is unknown"),
        (["--budgets", "0"], "--budgets"),
        (["--tol", "1e-9"], "--tol"),
    ],
)
def test_sweep_names_what_is_wrong(equilibrium, toy_data, monkeypatch, capsys, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(deq_budget_sweep, monkeypatch, capsys, equilibrium, toy_data, "--batches", 1, *arguments)


def test_bridge_prints_that_the_loss_stays(toy_flags, fairseq_train, toy_data, monkeypatch, capsys, tmp_path):
    flags = "--arch ode_bert_euler_tiny --ode-tied --ode-field post-norm --disable-validation --max-update 3"
    fairseq_train(*toy_flags, *flags.split(), "--save-dir", tmp_path)
    there, back = tmp_path / "deq.pt", tmp_path / "ode.pt"
    output = run(convert_tied, monkeypatch, capsys, tmp_path / "checkpoint_last.pt", there, "--data", toy_data)
    change = float(re.search(r"\(([+-][\d.]+) nats", output).group(1))
    assert abs(change) < 1e-3 and "at the equilibrium of the same cell" in output
    output = run(convert_tied, monkeypatch, capsys, there, back, "--data", toy_data)
    assert "ode_bert" in output and abs(float(re.search(r"\(([+-][\d.]+) nats", output).group(1))) < 1e-3
    with pytest.raises(SystemExit):
        run(convert_tied, monkeypatch, capsys, there, back)


def test_bridge_says_what_it_cannot_read_or_write(equilibrium, monkeypatch, capsys, tmp_path):
    (tmp_path / "damaged.pt").write_bytes(bytes(4096))
    with pytest.raises(SystemExit, match=r"^convert_tied: checkpoint .*damaged\.pt [^\n]*$"):
        run(convert_tied, monkeypatch, capsys, tmp_path / "damaged.pt", tmp_path / "ode.pt")
    monkeypatch.setattr(convert_tied, "tied_from_deq", lambda checkpoint: checkpoint)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^convert_tied: .*file/ode\.pt cannot be written: [^\n]*Not a directory"):
        run(convert_tied, monkeypatch, capsys, equilibrium, tmp_path / "file" / "ode.pt")

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(validation.torch, "save", full)
    with pytest.raises(SystemExit, match=r"^convert_tied: .*ode\.pt cannot be written: [^\n]*$"):
        run(convert_tied, monkeypatch, capsys, equilibrium, tmp_path / "ode.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.pt", "file"]


def test_bridge_refuses_a_cell_of_its_own(equilibrium, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="deq_injection is residual"):
        run(convert_tied, monkeypatch, capsys, equilibrium, tmp_path / "ode.pt")
