"""checkpoint-flags, score and fill-masks on checkpoints that fairseq-train has just written."""

import re
import shlex

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_implicit.commands import fill_masks
from fairseq_implicit.evaluation.checkpoints import open_checkpoint
from fairseq_implicit.evaluation.masked_lm import Blocks, averages, batches, score
from fairseq_implicit.models.bert import ImplicitBertModel


@pytest.fixture(scope="module")
def trained(toy_flags, fairseq_train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained here")
    flags = (
        "--arch neural_ode_bert_tiny --ode-random-steps 2,4 --ode-scheme rk4 --ode-tolerance 0 --dropout 0.3 "
        "--save-on-signal --activation-fn relu --encoder-embed-dim 32 --no-layernorm-embedding"
    )
    more = ("--max-update", 1, "--save-dir", folder, "--disable-validation")
    fairseq_train(*toy_flags, *flags.split(), *more)
    return folder


def test_the_flags_rebuild_the_model_after_a_shell_has_read_them(trained, command, tmp_path):
    _, printed, _ = command("checkpoint-flags", trained, "--finetune")
    path = trained / "checkpoint_last.pt"
    flags = shlex.split(printed)
    assert flags[-2:] == ["--finetune-from-model", str(path)] and "--dropout" not in flags
    assert shlex.split(command("checkpoint-flags", path)[1]) == flags[:-2]
    parser = options.get_training_parser()
    given = ["data", *"--task sentence_prediction --criterion sentence_prediction --optimizer adam".split(), *flags]
    rebuilt = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, given)).model
    stored = torch.load(path)["cfg"]["model"]
    stored["max_positions"] = 32  # the task's --tokens-per-sample
    differing = {name for name, value in stored.items() if rebuilt[name] != value}
    assert differing == {"dropout", "save_on_signal"} and rebuilt.ode_random_steps == [2, 4]
    (tmp_path / "text.pt").write_text("no checkpoint")
    for wrong, message in ((tmp_path, "there is no checkpoint"), (tmp_path / "text.pt", "text.pt is truncated")):
        status, _, said = command("checkpoint-flags", wrong)
        assert status == 1 and re.search(f"checkpoint-flags: .*{message}", said)


def test_masks_are_filled_for_any_family_without_naming_the_file(trained, command, tmp_path):
    assert "the <mask> state" in command("fill-masks", trained, "the <mask> state", "--candidates", 2)[1]
    bert = ImplicitBertModel.from_pretrained(trained)
    word = next(symbol[1:] for symbol in bert.dictionary.symbols if re.fullmatch("\u2581[a-z]{3,}", symbol))
    assert fill_masks.is_one_piece(bert, word) and not fill_masks.is_one_piece(bert, word + "qzx")
    assert not fill_masks.is_one_piece(bert, "数")
    (tmp_path / "text").write_text(f"Qzx qzx {word} qzx qzx {word} qzx.\nToo short.\n")
    _, output, _ = command("fill-masks", trained, "--text", tmp_path / "text", "--count", 2)
    assert output.count(f"(hidden: {word})") == 1 and "Too short" not in output
    everything = ("the <mask> state", "--text", tmp_path / "text", "--candidates", len(bert.dictionary))
    _, output, _ = command("fill-masks", trained, *everything)
    own, _, taken, filled = output.splitlines()
    assert own == "  the <mask> state" and taken.endswith(f"(hidden: {word})") and f"[{word}] 0." in filled
    (tmp_path / "long").write_text(f"Q{'zx' * 60} qzx {word} qzx qzx {word} qzx.\n")
    assert "fits into the model's 32 positions" in command("fill-masks", trained, "--text", tmp_path / "long")[1]
    status, _, said = command("fill-masks", trained, "the <mask> state", "--candidates", 0)
    assert status == 1 and "fill-masks: topk=0" in said


def test_a_score_counts_all_masks_of_the_validation(depth_checkpoints, toy_data, command):
    """Against fairseq's criterion on the same masks; the symbols of the dictionary are all among as many candidates."""
    path = depth_checkpoints["ode"]
    opened = open_checkpoint(path, toy_data, valid_mask_prob=0.4)
    everything = averages(opened, batches(opened.task, Blocks(toy_data)), "cpu")
    found = score(path, Blocks(toy_data, batch_size=7), 0.4, len(opened.task.dictionary))
    assert found.loss == pytest.approx(everything.loss, rel=1e-5) and found.among == 1.0
    assert 100 * found.first == pytest.approx(everything.accuracy)
    one = score(path, Blocks(toy_data), 0.4, 1)
    assert one.among == one.first == found.first and one.masks == found.masks
    assert found.masks > 2 * score(path, Blocks(toy_data), 0.15, 1).masks
    _, output, _ = command("score", path, toy_data, "--mask-prob", 0.4)
    head, usual, strict, *_ = output.splitlines()
    assert head == f"  40% of valid, {found.masks:,} tokens:" and f" {found.loss:.3f} nats per token" in usual
    hidden = score(path, Blocks(toy_data), 0.4, 5, hidden=True)
    assert f" {hidden.loss:.3f} nats per token" in strict and hidden.loss != found.loss and hidden.masks == found.masks
    assert strict.endswith(f"; {hidden.first:.1%} are the first candidate, {hidden.among:.1%} among the first 5")
    assert re.search(r"bigram entropy +\d\.\d{3} .*\n.*unigram entropy", output)


def test_the_score_of_what_has_diverged_is_one_sentence(depth_checkpoints, toy_data, command, tmp_path):
    state = torch.load(depth_checkpoints["ode"])
    state["model"]["encoder.depth.fields.1.feed_forward.fc1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "spoilt.pt")
    status, output, said = command("score", tmp_path / "spoilt.pt", toy_data)
    assert status == 1 and output == "" and "spoilt.pt is not finite: the training has diverged; lower its --lr" in said
    for wrong, sentence in (
        (("--mask-prob", 2), "--valid-mask-prob must lie between 0 and 1"),
        (("--subset", "x"), "x"),
    ):
        status, _, said = command("score", depth_checkpoints["ode"], toy_data, *wrong)
        assert status == 1 and sentence in said and len(said.splitlines()) == 1
