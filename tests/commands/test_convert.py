"""The bridge between weight-tied stacks and equilibria, on checkpoints that fairseq-train has just written."""

import re
import shlex

import pytest
import torch

from fairseq_implicit.commands.convert import CONVERSIONS
from fairseq_implicit.evaluation import checkpoints
from fairseq_implicit.evaluation.masked_lm import Blocks, evaluate


def test_the_loss_stays_there_and_back(toy_flags, fairseq_train, toy_data, command, tmp_path):
    flags = "--arch ode_bert_euler_tiny --ode-tied --ode-field post-norm --disable-validation --max-update 3"
    fairseq_train(*toy_flags, *flags.split(), "--save-dir", tmp_path)
    trained, there, back = tmp_path / "checkpoint_last.pt", tmp_path / "deq.pt", tmp_path / "ode.pt"
    for data in ([tmp_path / "nowhere"], [toy_data, "--subset", "tset"]):
        status, output, said = command("convert", trained, there, "--data", *data)
        assert status == 1 and str(data[-1]) in said and output == "" and not there.exists()
    status, output, _ = command("convert", trained, there, "--data", toy_data)
    assert status == 0 and output.startswith(f"wrote {there}: deq_bert\n")
    assert "at the equilibrium of the same cell" in output
    status, output, _ = command("convert", there, back, "--data", toy_data)
    assert status == 0 and output.startswith(f"wrote {back}: ode_bert\n")
    before, cell, after = (evaluate(str(path), Blocks(toy_data)).loss for path in (trained, there, back))
    assert abs(cell - before) < 1e-3 and abs(after - cell) < 1e-3
    assert f"loss {cell:.4f} -> {after:.4f} (" in output
    assert command("convert", there, back)[0] == 2  # it exists by now


def test_it_says_what_it_cannot_read_or_write(depth_checkpoints, monkeypatch, command, tmp_path):
    def refused(source, target):
        status, _, said = command("convert", source, target)
        assert status == 1
        return said

    (tmp_path / "damaged.pt").write_bytes(bytes(4096))
    said = refused(tmp_path / "damaged.pt", tmp_path / "ode.pt")
    assert re.fullmatch(r"fairseq-implicit convert: checkpoint .*damaged\.pt [^\n]*\n", said)
    monkeypatch.setitem(CONVERSIONS, "deq_bert", lambda checkpoint: checkpoint)
    (tmp_path / "file").write_text("")
    said = refused(depth_checkpoints["deq"], tmp_path / "file" / "ode.pt")
    assert re.search(r"convert: .*file/ode\.pt cannot be written: [^\n]*Not a directory", said)

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    said = refused(depth_checkpoints["deq"], tmp_path / "ode.pt")
    assert re.search(r"convert: .*ode\.pt cannot be written: [^\n]*\n$", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.pt", "file"]


def test_what_the_other_family_refuses_is_not_written(toy_flags, fairseq_train, command, tmp_path):
    flags = "--arch lambda_bert_tiny --lambda-norm batch --disable-validation --max-update 1"
    fairseq_train(*toy_flags, *flags.split(), "--save-dir", tmp_path)
    status, _, said = command("convert", tmp_path / "checkpoint_last.pt", tmp_path / "deq.pt", "--tie")
    assert status == 1 and "--lambda-norm: batch" in said and not (tmp_path / "deq.pt").exists()


def test_a_cell_of_its_own_is_refused(depth_checkpoints, command, tmp_path):
    status, _, said = command("convert", depth_checkpoints["deq"], tmp_path / "ode.pt")
    assert status == 1 and "deq_injection is residual" in said


def test_a_stack_is_tied_into_a_cell_that_trains_on(toy_flags, fairseq_train, toy_data, command, tmp_path):
    flags = "--arch ode_bert_euler_tiny --encoder-layers 3 --ode-field post-norm --disable-validation --max-update 2"
    fairseq_train(*toy_flags, *flags.split(), "--save-dir", tmp_path)
    trained, there, stack = tmp_path / "checkpoint_last.pt", tmp_path / "deq.pt", tmp_path / "ode.pt"
    status, output, said = command("convert", trained, there, "--tie", "--data", tmp_path / "nowhere")
    assert status == 1 and "nowhere does not exist" in said and output == "" and not there.exists()
    status, output, _ = command("convert", trained, there, "--tie", "--prelude", 1, "--gain", 1.5, "--data", toy_data)
    assert status == 0 and output.startswith(f"wrote {there}: deq_bert\n") and "at the equilibrium" not in output
    before, after = (evaluate(str(path), Blocks(toy_data)).loss for path in (trained, there))
    assert f"loss {before:.4f} -> {after:.4f} (" in output
    status, output, _ = command("convert", trained, stack, "--tie", "--to", "ode_bert", "--data", toy_data)
    assert status == 0 and output.startswith(f"wrote {stack}: ode_bert\nloss {before:.4f} -> ")
    status, model, _ = command("checkpoint-flags", there)
    more = ("--finetune-from-model", there, "--disable-validation", "--max-update", 1, "--save-dir", tmp_path / "on")
    fairseq_train(*toy_flags, *shlex.split(model), *more)
    depth = torch.load(tmp_path / "on" / "checkpoint_last.pt", weights_only=False)["model"]
    gain = torch.nn.functional.softplus(depth["encoder.depth.cell.injection.raw_gain"])
    assert 1.3 < float(gain) < 1.7 and "encoder.depth.prelude.0.attention.qkv.weight" in depth


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--prelude", "1"], "--prelude, --coda and --gain belong to --tie"),
        (["--to", "deq_bert"], "--to deq_bert needs --tie"),
        (["--tie", "--to", "bert"], "--tie makes deq_bert or ode_bert, not bert"),
        (["--tie", "--prelude", "x"], "argument --prelude"),
        (["--tie", "--prelude", "2"], "a prelude of 2 and a coda of 0 leave none of the 2 blocks"),
        (["--tie", "--to", "ode_bert", "--gain", "1"], "an ode_bert ties all of its blocks"),
        (["--tie"], "ode_scheme is rk2"),
    ],
)
def test_what_cannot_be_tied_is_said(arguments, sentence, depth_checkpoints, command, tmp_path):
    status, _, said = command("convert", depth_checkpoints["ode"], tmp_path / "out.pt", *arguments)
    assert status and sentence in said and not (tmp_path / "out.pt").exists()
    (tmp_path / "folder").mkdir()
    status, _, said = command("convert", tmp_path / "folder", tmp_path / "out.pt", "--tie")
    assert status == 2 and "--tie needs a checkpoint" in said
