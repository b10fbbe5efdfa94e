"""Fine-tunes a folder of transformers (of `fairseq-implicit export`, say) on a GLUE task with transformers' Trainer.

    fairseq-implicit export quickstart/embedded/ode_bert_euler_tiny my-bert
    python examples/glue/trainer.py my-bert GLUE_FOLDER/SST-2 --task SST-2 --out runs/sst2

Tables, labels and metrics are those of finetune.sh, with equal batch, updates and learning rate the recipe is, too. The
best weights by the task's metric are kept in OUT. From a checkout: PYTHONPATH=. in front.
"""

import argparse
import json
import os
import sys

import numpy as np
from columns import TABLES, Table, examples
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from fairseq_implicit.huggingface.modeling import ImplicitBertPreTrainedModel  # registers the families, too

#: In per cent, by task; all others are judged by their accuracy.
METRICS = {
    "CoLA": ("mcc", matthews_corrcoef),
    "MRPC": ("acc_and_f1", lambda truth, guess: (accuracy_score(truth, guess) + f1_score(truth, guess)) / 2),
    "QQP": ("acc_and_f1", lambda truth, guess: (accuracy_score(truth, guess) + f1_score(truth, guess)) / 2),
    "STS-B": ("corr", lambda truth, guess: (pearsonr(truth, guess)[0] + spearmanr(truth, guess)[0]) / 2),
}


def encoded(path: str, table: Table, split: str, tokenizer) -> list[dict]:
    """The rows of a table, of a pair that is too long the longer sentence cut first."""
    return [
        {
            **tokenizer(*texts, truncation="longest_first"),
            "labels": table.labels.index(target) if table.labels else float(target),
        }
        for texts, target in examples(path, table, split)[0]
    ]


def setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:  # a word
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER", help="as save_pretrained writes it, with its tokenizer")
    parser.add_argument("tables", metavar="TABLES", help="folder with train.tsv and dev.tsv")
    parser.add_argument("--task", required=True, choices=sorted(TABLES))
    parser.add_argument("--out", required=True, metavar="OUT")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--updates", type=int, default=20935)
    parser.add_argument("--evaluations", type=int, default=10, help="during the training, evenly spread")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--set",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help="options of the model's configuration to change: dropout=0.1 ode_scheme=rk4",
    )
    options = parser.parse_args()
    table = TABLES[options.task]
    dev = next(
        (name for name in ("dev.tsv", "dev_matched.tsv") if os.path.isfile(f"{options.tables}/{name}")), "dev.tsv"
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    try:
        train = encoded(f"{options.tables}/train.tsv", table, "train", tokenizer)
        valid = encoded(f"{options.tables}/{dev}", table, "valid", tokenizer)
    except (OSError, ValueError) as error:
        sys.exit(f"trainer: {error}")
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=max(len(table.labels), 1), **dict(options.set)
    )
    name, metric = METRICS.get(options.task, ("accuracy", accuracy_score))

    def judged(prediction: EvalPrediction) -> dict[str, float]:
        guess = prediction.predictions.argmax(-1) if table.labels else np.squeeze(prediction.predictions, -1)
        return {name: 100 * float(metric(prediction.label_ids, guess))}

    interval = max(options.updates // options.evaluations, 1)
    arguments = TrainingArguments(
        options.out,
        max_steps=options.updates,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.lr,
        warmup_steps=options.updates * 6 // 100,
        weight_decay=0.1,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=interval,
        save_steps=interval,
        logging_steps=interval,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=name,
        seed=options.seed,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=valid,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=judged,
    )
    if isinstance(model, ImplicitBertPreTrainedModel):
        model.attach_to(trainer)
    trainer.train()
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)
    print(json.dumps({"task": options.task, name: trainer.evaluate()[f"eval_{name}"], "examples": len(valid)}))


if __name__ == "__main__":
    main()
