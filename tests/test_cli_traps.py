"""fairseq-train, -validate and -hydra-train with the flags that used to be traps."""

import runpy

import pytest
import torch
from fairseq import options


def test_trains_and_validates(toy_flags, fairseq_train, fairseq_validate, tmp_path, toy_data):
    run = fairseq_train(*toy_flags, "--max-update", 12, "--save-dir", tmp_path)
    losses = run.losses()
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] < losses[1]
    again = fairseq_validate(
        *(toy_data, "--task", "implicit_masked_lm", "--path", tmp_path / "checkpoint_best.pt", "--batch-size", 4)
    )
    valid = run.metrics("valid")[-1]
    assert again["valid_loss"] == valid["valid_loss"]
    assert again["valid_accuracy"] == valid["valid_accuracy"]
    assert "tokens = " in run.text and "separators of documents" in run.text


def test_model_overrides_change_the_scheme_of_a_checkpoint(
    toy_flags, fairseq_train, fairseq_validate, tmp_path, toy_data
):
    fairseq_train(*toy_flags, "--max-update", 6, "--save-dir", tmp_path, "--disable-validation")

    def validate(overrides):
        return fairseq_validate(
            *(toy_data, "--task", "implicit_masked_lm", "--path", tmp_path / "checkpoint_last.pt", "--batch-size", 4),
            *("--model-overrides", repr(overrides)),
        )

    assert validate({})["valid_evaluations"] == 4
    assert validate({"ode_scheme": "rk4"})["valid_evaluations"] == 8
    assert validate({"ode_steps": 3})["valid_evaluations"] == 12


def test_bf16_tensorboard_and_update_freq(toy_flags, fairseq_train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fairseq_train(
        *toy_flags,
        "--bf16",
        "--update-freq",
        2,
        "--max-update",
        4,
        "--save-dir",
        tmp_path / "ck",
        "--tensorboard-logdir",
        tmp_path / "tb",
    )
    weights = torch.load(tmp_path / "ck" / "checkpoint_last.pt")["model"]
    weight = weights["encoder.embed_tokens.weight"]  # saved in float32, whatever it was trained in
    assert torch.equal(weight, weight.bfloat16().float())
    assert [stats["bsz"] for stats in run.metrics("train_inner")] == [8.0] * 4
    names = set(run.metrics("train_inner")[-1])
    events = EventAccumulator(str(tmp_path / "tb" / "train_inner"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("loss", "ppl", "accuracy", "evaluations", "state_rms", "block1/state_rms"):
        assert name in names and name in tags


def test_every_break_mode_and_whole_words(toy_flags, fairseq_train, tmp_path):
    for mode in ("none", "complete", "complete_doc", "eos"):
        run = fairseq_train(
            *toy_flags,
            "--sample-break-mode",
            mode,
            "--mask-whole-words",
            "--pad-to-multiple",
            8,
            "--max-update",
            2,
            "--no-save",
            "--save-dir",
            tmp_path,
            "--disable-validation",
        )
        assert sorted(run.losses()) == [1, 2]


def test_shards_and_worker_processes(toy_flags, toy_data, fairseq_train, tmp_path):
    sharded = [f"{toy_data}:{toy_data}"] + toy_flags[1:]
    run = fairseq_train(
        *sharded,
        "--num-workers",
        1,
        "--data-buffer-size",
        2,
        "--max-epoch",
        2,
        "--batch-size",
        64,
        "--no-save",
        "--save-dir",
        tmp_path,
    )
    assert len(run.metrics("train")) == 2


@pytest.mark.parametrize(
    "flags, error, sentence",
    [
        (["--fp16"], ValueError, "--fp16 needs a GPU"),
        (["--memory-efficient-fp16"], ValueError, "--fp16 needs a GPU"),
        (["--criterion", "cross_entropy"], ValueError, "cross_entropy does not divide by the masked tokens"),
        (["--criterion", "label_smoothed_cross_entropy"], ValueError, "pass --criterion implicit_masked_lm"),
        (["--amp"], ValueError, "--amp needs a GPU"),
        (["--tpu"], ValueError, "--tpu needs torch_xla"),
        (["--restore-file", "typo.pt"], FileNotFoundError, "--restore-file typo.pt does not exist"),
        (["--finetune-from-model", "typo.pt"], ValueError, "typo.pt does not exist"),
        (["--max-tokens", "16"], ValueError, "lower --tokens-per-sample 32"),
        (["--distributed-world-size", "2"], ValueError, "--ddp-backend legacy_ddp"),
    ],
)
def test_refused_in_one_sentence(toy_flags, fairseq_train, tmp_path, flags, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        fairseq_train(*toy_flags, "--max-update", 1, "--no-save", "--save-dir", tmp_path, *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--bf16", "--memory-efficient-bf16"])
def test_emulated_bfloat16_is_refused_unless_insisted_on(toy_flags, fairseq_train, tmp_path, monkeypatch, flag):
    flags = [*toy_flags, flag, "--max-update", 1, "--disable-validation", "--no-save", "--save-dir", tmp_path]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    assert len(fairseq_train(*flags).losses()) == 1  # the whole suite insists
    monkeypatch.setenv("FAIRSEQ_IMPLICIT_EMULATED_BF16", "0")
    with pytest.raises(ValueError, match="--bf16 is emulated on this CPU.*FAIRSEQ_IMPLICIT_EMULATED_BF16=1") as caught:
        fairseq_train(*flags)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert len(fairseq_train(*flags).losses()) == 1


def test_two_silent_copies_of_a_job_are_refused(toy_flags, fairseq_train, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="pass --distributed-world-size 2"):
        fairseq_train(*toy_flags, "--max-update", 1, "--no-save", "--save-dir", tmp_path)


def test_validation_without_a_task_is_refused(toy_data):
    with pytest.raises(ValueError, match="fairseq-validate needs --task"):
        options.parse_args_and_arch(options.get_validation_parser(), [toy_data, "--path", "x.pt"])


def test_non_finite_gradients_are_named(toy_flags, fairseq_train, tmp_path):
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        fairseq_train(*toy_flags, "--lr", 1e30, "--max-update", 5, "--no-save", "--save-dir", tmp_path)


def test_prints_the_path_for_user_dir(checkout, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fairseq_implicit"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("fairseq_implicit", run_name="__main__")
    assert capsys.readouterr().out == f"{checkout / 'fairseq_implicit'}\n"


def test_hydra_with_the_recipe_of_the_examples(toy_data, command_line, checkout, tmp_path):
    process = command_line(
        "fairseq-hydra-train", "--config-dir", checkout / "examples" / "pretraining", "--config-name", "ode_bert",
        f"common.user_dir={checkout / 'fairseq_implicit'}", f"task.data={toy_data}", f"hydra.run.dir={tmp_path}",
        f"checkpoint.save_dir={tmp_path / 'ck'}", "model._name=ode_bert_rk4_tiny", "model.ode_scheme=rk4",
        "common.cpu=true", "common.log_interval=1", "optimization.max_update=2", "optimization.update_freq=[1]",
        "task.tokens_per_sample=32", "+task.mask_whole_words=true", "dataset.batch_size=2",
    )  # fmt: skip
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    state = torch.load(tmp_path / "ck" / "checkpoint_last.pt")
    model = state["cfg"]["model"]
    assert (model["_name"], model["ode_scheme"], model["encoder_layers"]) == ("ode_bert_rk4_tiny", "rk4", 2)
    assert state["optimizer_history"][-1]["num_updates"] == 2
    weight = state["model"]["encoder.embed_tokens.weight"]
    assert torch.equal(weight, weight.bfloat16().float())
