"""Training by transformers' Trainer: schedules, resumption, accumulation, and the depth in the log."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.huggingface.tiny import MASK, tiny_config

ROWS = 64


class Rows(torch.utils.data.Dataset):
    """Ids with a mask in two fixed places, so that every batch predicts as many tokens per row."""

    def __init__(self):
        self.ids = torch.randint(4, MASK, (ROWS, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        labels = torch.full((8,), -100)
        labels[[2, 5]] = self.ids[index, [2, 5]]
        return {"input_ids": torch.where(labels >= 0, MASK, self.ids[index]), "labels": labels}


def model_of(family, **options):
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(tiny_config(family, **options))


def trainer_of(model, folder, callback=True, **arguments):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=6,
        logging_steps=1,
        save_strategy="no",
        learning_rate=5e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    callbacks = [model.trainer_callback()] if callback else None
    arguments = TrainingArguments(**{**settings, **arguments})
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)


def lines(trainer, name="loss"):
    return [line[name] for line in trainer.state.log_history if name in line]


DEQ = dict(
    deq_warmup_updates=3,
    deq_warmup_steps=2,
    deq_max_iter=12,
    deq_budget_jitter=3,
    deq_ramp_updates=3,
    deq_start_max_iter=6,
    deq_monitor_interval=2,
    deq_jacobian_weight=0.1,
    deq_jacobian_frequency=0.5,
)


def test_a_deq_goes_through_its_warm_up_and_tells_the_log(tmp_path):
    trainer = trainer_of(model_of("deq_bert", **DEQ), tmp_path, max_steps=8)
    trainer.train()
    budgets = lines(trainer, "depth/evaluation_budget")
    assert budgets[:3] == [2.0] * 3  # the unrolled steps of the warm-up
    assert 3 <= budgets[3] <= 9 and max(budgets[3:]) > 6 and len(set(budgets[3:])) > 2  # the ramp and its jitter
    penalties = lines(trainer, "depth/jacobian_penalty")
    assert 0.0 in penalties and max(penalties) > 0
    radii = lines(trainer, "depth/spectral_radius")
    assert radii[0] > 0 and radii[0] == radii[1] != radii[2]
    assert trainer.model.num_updates == 8


class Reporter(TrainerCallback):
    """Stands for a reporter such as TensorBoard's, which Trainer puts before the callbacks that it is given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_attached_it_tells_every_reporter_once(tmp_path):
    trainer = trainer_of(model_of("deq_bert", **DEQ), tmp_path, max_steps=4)
    reporter = Reporter()
    trainer.callback_handler.callbacks.insert(0, reporter)
    trainer.model.attach_to(trainer)
    trainer.model.attach_to(trainer)
    trainer.train()
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert kinds.count("DepthCallback") == 1
    seen = [line for line in reporter.seen if "loss" in line]
    assert [line["depth/evaluation_budget"] for line in seen] == lines(trainer, "depth/evaluation_budget")
    assert len(seen) == 4 and seen[0]["depth/evaluation_budget"] == 2.0
    assert trainer.model.num_updates == 4


def test_stopped_and_resumed_it_has_the_same_losses(tmp_path):
    whole = trainer_of(model_of("deq_bert", dropout=0.1, **DEQ), tmp_path / "whole")
    whole.train()
    trainer_of(model_of("deq_bert", dropout=0.1, **DEQ), tmp_path / "cut", save_strategy="steps", save_steps=2).train()
    second = trainer_of(model_of("deq_bert", dropout=0.1, **DEQ), tmp_path / "cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert lines(second)[-2:] == lines(whole)[-2:]
    assert lines(second, "depth/evaluation_budget")[-2:] == lines(whole, "depth/evaluation_budget")[-2:]
    assert second.model.num_updates == 6


def test_a_model_that_is_trained_further_stays_past_its_warm_up(tmp_path):
    first = trainer_of(model_of("deq_bert", **DEQ), tmp_path)
    first.train()
    first.save_model(tmp_path / "model")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert tuned.num_updates == 6
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    again = trainer_of(loaded, tmp_path, max_steps=2)
    again.train()
    assert min(lines(again, "depth/evaluation_budget")) > 2 and loaded.num_updates == 8


def test_four_accumulated_batches_are_one_of_four_times_the_size(tmp_path):
    options = dict(ode_coefficients="learned", ode_coefficient_start="ones", ode_consistency_weight=0.25)
    whole = trainer_of(model_of("ode_bert", **options), tmp_path, per_device_train_batch_size=16)
    parts = trainer_of(
        model_of("ode_bert", **options), tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    whole.train()
    parts.train()
    torch.testing.assert_close(torch.tensor(lines(whole)), torch.tensor(lines(parts)), rtol=1e-4, atol=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)
    sums = lines(parts, "depth/consistency")
    assert sums[0] == pytest.approx(0.25)


@pytest.mark.parametrize("family", ["ode_bert", "neural_ode_bert"])
def test_random_steps_are_drawn_by_the_update(family, tmp_path):
    options = dict(ode_random_steps=[1, 4], ode_scheme="euler", ode_tolerance=0.0)
    trainer = trainer_of(model_of(family, **options), tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    evaluations = lines(trainer, "depth/evaluations")
    assert len(set(evaluations)) > 1
    assert all(value == int(value) for value in evaluations)  # one draw for both batches of an update
    again = trainer_of(model_of(family, **options), tmp_path, gradient_accumulation_steps=2)
    again.train()
    assert lines(again, "depth/evaluations") == evaluations


@pytest.mark.parametrize(
    "family, options, needed",
    [
        ("deq_bert", dict(DEQ), True),
        ("deq_bert", dict(deq_monitor_interval=0), False),
        ("ode_bert", dict(ode_random_steps=[1, 2]), True),
        ("ode_bert", {}, False),
    ],
)
def test_a_depth_that_nobody_tells_the_update_says_so_once(family, options, needed, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    trainer = trainer_of(model_of(family, **options), tmp_path, callback=False, max_steps=3)
    with caplog.at_level("WARNING"):
        trainer.train()
        trainer.evaluate()
    said = [record for record in caplog.records if "trainer_callback" in record.message]
    assert len(said) == needed


def test_evaluation_gathers_logits_alone_and_logs_no_depth(tmp_path):
    model = model_of("deq_bert", deq_monitor_interval=0)
    model.config.output_hidden_states = True
    trainer = trainer_of(model, tmp_path, max_steps=2)
    found = []
    trainer.compute_metrics = lambda prediction: found.append(prediction.predictions.shape) or {"rows": 1.0}
    trainer.train()
    metrics = trainer.evaluate()
    assert found == [(ROWS, 8, 45)] and metrics["eval_rows"] == 1.0
    assert not any(name.startswith("depth/") for name in metrics)
