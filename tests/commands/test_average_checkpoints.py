"""The mean of checkpoints: against NumPy, through fairseq-validate, and what is refused."""

import copy
import re

import numpy as np
import pytest
import torch

from fairseq_implicit.commands.average_checkpoints import average


@pytest.fixture(scope="module")
def trained(toy_flags, fairseq_train, tmp_path_factory):
    """Folder of a deq_bert (it has integer buffers) with a checkpoint of each of its five updates."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--arch deq_bert_tiny --deq-ramp-updates 2 --deq-start-max-iter 3 --deq-max-iter 4 --disable-validation"
    fairseq_train(*toy_flags, *flags.split(), "--max-update", 5, "--save-interval-updates", 1, "--save-dir", folder)
    return folder


def read(path):
    return torch.load(path, weights_only=True)


def test_last_three_of_a_folder_are_averaged(trained, command, tmp_path, toy_data, fairseq_validate):
    mean = tmp_path / "mean.pt"
    status, printed, _ = command("average-checkpoints", trained, "--last", 3, "--output", mean)
    assert status == 0
    assert sorted(re.findall(r"checkpoint_\w+", printed)) == ["checkpoint_1_3", "checkpoint_1_4", "checkpoint_last"]
    found, parts = read(mean), [read(trained / f"checkpoint_1_{number}.pt") for number in (3, 4, 5)]
    assert found["model"].keys() == parts[0]["model"].keys() and found["last_optimizer_state"] is None
    moved = 0
    for name, tensor in found["model"].items():
        values = [part["model"][name].numpy() for part in parts]
        if tensor.is_floating_point():
            expected = np.mean([value.astype(np.float64) for value in values], axis=0).astype(np.float32)
            np.testing.assert_array_max_ulp(tensor.numpy(), expected, maxulp=1)
            moved += not np.array_equal(values[0], values[2])
        else:
            assert np.array_equal(tensor.numpy(), values[2])
    assert moved > 5 and any(not tensor.is_floating_point() for tensor in found["model"].values())
    # One tensor under two names is stored once, as in the checkpoints themselves.
    places, own = ({t.untyped_storage().data_ptr() for t in c["model"].values()} for c in (found, parts[2]))
    assert len(places) == len(own)
    at_mean, at_third = (
        fairseq_validate(toy_data, "--task", "implicit_masked_lm", "--path", path, "--batch-size", 4)["valid_loss"]
        for path in (mean, trained / "checkpoint_1_3.pt")
    )
    assert at_mean < at_third


def test_halves_sum_in_float64(trained, tmp_path):
    """1 and four times 2⁻²⁴: each alone is lost beside 1 in float32, their sum is not."""
    checkpoint = read(trained / "checkpoint_last.pt")
    paths = []
    for number in range(5):
        changed = copy.deepcopy(checkpoint)
        changed["optimizer_history"][-1]["num_updates"] = number
        for tensor in changed["model"].values():
            tensor.fill_(number) if not tensor.is_floating_point() else tensor.fill_(1.0 if number == 0 else 2.0**-24)
        paths.append(str(tmp_path / f"{number}.pt"))
        torch.save(changed, paths[-1])
    mean = average(paths[::-1])["model"]  # the order of the names decides nothing
    expected = np.float32((1 + 2.0**-22) / 5)
    assert expected != np.float32(np.float32(1) / 5)
    for tensor in mean.values():
        assert (tensor == (float(expected) if tensor.is_floating_point() else 4)).all()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: c["cfg"]["model"].update(_name="ode_bert_rk2_tiny"), "name is 'deq_bert_tiny' in the one and 'ode"),
        (lambda c: c["cfg"]["model"].update(deq_max_iter=9), "deq_max_iter is 4 in the one and 9 in the other"),
        (lambda c: c["model"].popitem(), "and None in the other"),
        (lambda c: c["extra_state"]["ImplicitMaskedLMTask"].update(dictionary="x"), "with different dictionaries"),
        (lambda c: c.pop("cfg"), "is no checkpoint of fairseq-train"),
    ],
)
def test_different_models_are_refused(trained, command, tmp_path, change, sentence):
    checkpoint = read(trained / "checkpoint_last.pt")
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "other.pt")
    paths = trained / "checkpoint_last.pt", tmp_path / "other.pt"
    status, _, said = command("average-checkpoints", *paths, "--output", tmp_path / "mean.pt")
    assert status == 1 and sentence in said and len(said.splitlines()) == 1
    assert not (tmp_path / "mean.pt").exists()


def test_another_dropout_is_the_same_model(trained, tmp_path):
    checkpoint = read(trained / "checkpoint_last.pt")
    checkpoint["cfg"]["model"]["dropout"] = 0.5
    torch.save(checkpoint, tmp_path / "other.pt")
    average([str(trained / "checkpoint_last.pt"), str(tmp_path / "other.pt")])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["FOLDER", "--last", 9], "holds checkpoints of 5 updates; train with --keep-interval-updates 9"),
        (["FOLDER/none.pt"], "there is no checkpoint FOLDER/none.pt"),
        (["text.pt"], "text.pt is truncated or is no checkpoint"),
    ],
)
def test_what_cannot_be_averaged_is_one_sentence(trained, command, monkeypatch, tmp_path, arguments, sentence):
    (tmp_path / "text.pt").write_text("no checkpoint")
    monkeypatch.chdir(tmp_path)
    arguments = [str(argument).replace("FOLDER", str(trained)) for argument in arguments]
    status, _, said = command("average-checkpoints", *arguments, "--output", tmp_path / "mean.pt")
    assert status == 1 and sentence.replace("FOLDER", str(trained)) in said
    for wrong in ([trained], ["text.pt", "--last", 2], [trained, "--last", 0], ["text.pt", "--output", "text.pt"]):
        assert command("average-checkpoints", "--output", "mean.pt", *wrong)[0] == 2


def test_an_output_that_cannot_be_written_and_a_folder_that_is_not_there(trained, command, tmp_path):
    target = tmp_path / "no folder" / "mean.pt"
    status, _, said = command("average-checkpoints", trained, "--last", 2, "--output", target)
    assert status == 1 and re.search("average-checkpoints: .*mean.pt cannot be written: ", said)
    assert list(tmp_path.iterdir()) == []
    status, _, said = command("average-checkpoints", tmp_path / "none", "--last", 2, "--output", tmp_path / "mean.pt")
    assert status == 2 and "there is no folder" in said
