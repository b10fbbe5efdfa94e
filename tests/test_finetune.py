"""fairseq's own sentence_prediction on a pretrained checkpoint, and the clock of schedules across the runs."""

import pytest
import torch

from fairseq_implicit.depth.clock import UpdateCount


@pytest.fixture(scope="module")
def pretrained(toy_flags, fairseq_train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    fairseq_train(*toy_flags, "--max-update", 10, "--save-dir", folder, "--disable-validation")
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def sentences(toy_model, fairseq_preprocess, tmp_path_factory):
    """Two columns, sentence and label: whether the sentence speaks of an implicit thing."""
    folder = tmp_path_factory.mktemp("sentences")
    for split, count in (("train", 64), ("valid", 16)):
        rows = [(f"the {('exact', 'implicit')[i % 2]} state follows the {i % 7} order.", i % 2) for i in range(count)]
        for column in (0, 1):
            text = "\n".join(str(row[column]) for row in rows) + "\n"
            (folder / f"{split}.{('input0', 'label')[column]}").write_text(text, encoding="utf-8")
    for column, flags in (("input0", ["--task", "implicit_masked_lm", "--srcdict", toy_model]), ("label", [])):
        fairseq_preprocess(
            *("--only-source", *flags, "--destdir", folder / "bin" / column),
            *("--trainpref", folder / f"train.{column}", "--validpref", folder / f"valid.{column}"),
        )
    return folder / "bin"


def finetune(fairseq_train, sentences, save_dir, *flags):
    return fairseq_train(
        sentences,
        *"--task sentence_prediction --criterion sentence_prediction --num-classes 2 --init-token 0".split(),
        *"--arch ode_bert_rk2_tiny --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --max-positions 32".split(),
        *"--optimizer adam --lr 1e-2 --lr-scheduler fixed --batch-size 8 --best-checkpoint-metric accuracy".split(),
        *("--maximize-best-checkpoint-metric", "--save-dir", save_dir, *flags),
    )


RESETS = "--reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler".split()


@pytest.mark.parametrize("route", ["restore-file", "finetune-from-model"])
def test_sentence_prediction_end_to_end(pretrained, sentences, fairseq_train, fairseq_validate, tmp_path, route):
    resets = RESETS if route == "restore-file" else []
    run = finetune(fairseq_train, sentences, tmp_path, f"--{route}", pretrained, *resets, "--max-epoch", 6)
    assert "Loaded checkpoint" in run.text
    assert run.metrics("valid")[-1]["valid_accuracy"] == 100.0
    resumed = finetune(fairseq_train, sentences, tmp_path, "--max-epoch", 7)
    assert len(resumed.metrics("train")) == 1
    again = fairseq_validate(
        *(sentences, "--task", "sentence_prediction", "--path", tmp_path / "checkpoint_best.pt", "--batch-size", 8),
        *("--criterion", "sentence_prediction", "--num-classes", 2, "--init-token", 0),
    )
    assert again["valid_accuracy"] == 100.0


def test_pretrained_weights_are_really_loaded(pretrained, sentences, fairseq_train, tmp_path):
    finetune(
        fairseq_train, sentences, tmp_path, "--finetune-from-model", pretrained, "--lr", 0, "--max-update", 1,
        "--disable-validation",
    )  # fmt: skip
    before, after = torch.load(pretrained)["model"], torch.load(tmp_path / "checkpoint_last.pt")["model"]
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert any(name.startswith("classification_heads.") for name in after)


def run_updates(count: UpdateCount, first: int, last: int):
    """What the trainer says during updates ``first`` … ``last - 1``; returns the clock at each."""
    seen = []
    for number in range(first, last):
        count.set_num_updates(number)
        seen.append(count.value)
    return seen


def loaded(state, num_updates: int) -> UpdateCount:
    """What the trainer does with a checkpoint that was saved after ``num_updates`` updates."""
    count = UpdateCount()
    count.set_num_updates(num_updates)
    count.load_state_dict(state)
    return count


def test_the_clock_goes_on_through_resuming_and_fine_tuning():
    pretraining = UpdateCount()
    assert run_updates(pretraining, 0, 100) == list(range(100))
    resumed = loaded(pretraining.state_dict(), 100)
    assert run_updates(resumed, 100, 150) == list(range(100, 150))
    tuning = loaded(resumed.state_dict(), 150)
    assert tuning.value == 150
    assert run_updates(tuning, 0, 20) == list(range(150, 170)), "a new optimiser counts from 0, the clock goes on"
    resumed_tuning = loaded(tuning.state_dict(), 20)
    assert run_updates(resumed_tuning, 20, 30) == list(range(170, 180))
    assert loaded(resumed_tuning.state_dict(), 30).value == 180


def test_the_clock_loads_from_a_checkpoint_without_one():
    count = UpdateCount()
    count.load_state_dict({})
    assert count.value == 0


def test_the_clock_is_found_by_fairseq_and_kept_by_its_trainer(toy_flags, fairseq_train, tmp_path, monkeypatch):
    from fairseq_implicit.families.ode_bert import OdeBertOptions

    clocks = []
    build = OdeBertOptions.build_depth

    def with_clock(options):
        depth = build(options)
        depth.updates = UpdateCount()
        clocks.append(depth.updates)
        return depth

    monkeypatch.setattr(OdeBertOptions, "build_depth", with_clock)
    flags = [*toy_flags, "--disable-validation"]
    fairseq_train(*flags, "--max-update", 4, "--save-dir", tmp_path / "a")
    fairseq_train(
        *flags, "--max-update", 3, "--save-dir", tmp_path / "b", "--finetune-from-model",
        tmp_path / "a" / "checkpoint_last.pt",
    )  # fmt: skip
    fairseq_train(*flags, "--max-update", 5, "--save-dir", tmp_path / "b")
    assert [clock.value for clock in clocks] == [3, 4 + 2, 4 + 4]
