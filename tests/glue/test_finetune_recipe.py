"""examples/glue: the tables, the ids that reach the model, and the commands of finetune.sh, run in this process."""

import math
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import data_utils
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoTokenizer

from examples.glue import binarise, columns
from fairseq_implicit.commands import transformers_folder
from fairseq_implicit.commands.checkpoint_flags import model_flags
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.ode_bert import OdeBertModel
from tests.huggingface.tiny import bert_folder

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/glue/finetune.sh"
# Stands in for the commands of finetune.sh: writes its arguments down; columns.py is fast and runs.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\0' "$(basename "$0")" "$@" $'\n' >>"$RECORD"
case $1 in
    */columns.py) exec "$PYTHON" "$@" ;;
    -m) case $3 in checkpoint-flags) printf '%s\n' "$FLAGS" ;; precision) echo --bf16 ;; esac ;;
    -c) exit 1 ;;
esac
"""
# The environment is the test's own.
WITHOUT_ENVIRONMENT = """
source() { case $1 in */environment.sh) root=$ROOT ;; *) builtin source "$@" ;; esac; }
. "$0" "$@"
"""


def finetune(folder, *arguments, flags="--arch ode_bert_rk2_tiny"):
    """Runs finetune.sh in ``folder`` and returns its process and the commands it would have run."""
    record, programs = folder / "record", folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("python", "fairseq-train"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    environment = {"ROOT": ROOT, "RECORD": record, "PYTHON": sys.executable, "FLAGS": flags, "CDPATH": folder}
    environment["PATH"] = f"{programs}:/usr/bin:/bin"
    result = subprocess.run(
        ["bash", "-c", WITHOUT_ENVIRONMENT, SCRIPT, *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, env={name: str(value) for name, value in environment.items()},
    )  # fmt: skip
    recorded = record.read_text().split("\0\n\0") if record.exists() else []
    return result, [command.split("\0") for command in recorded if command]


def run(script, monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, argv)])
    capsys.readouterr()
    script.main()
    return capsys.readouterr().out


def write_table(folder, task, rows):
    """train.tsv and dev.tsv of ``(sentence, …, label)`` rows, in the columns of a task."""
    table = columns.TABLES[task]
    folder.mkdir(parents=True, exist_ok=True)
    for name, label_column in (("train.tsv", table.label), ("dev.tsv", table.dev_label or table.label)):
        width = max(*table.sentences, label_column) + 1
        lines = ["\t".join(f"column{i}" for i in range(width))] if table.header else []
        for *sentences, label in rows:
            cells = ["-"] * width
            for column, sentence in zip((*table.sentences, label_column), (*sentences, label), strict=True):
                cells[column] = str(sentence)
            lines.append("\t".join(cells))
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pretrained(toy_flags, fairseq_train, tmp_path_factory):
    """A checkpoint and nothing beside it, as the step by step of the README leaves it; 32 positions."""
    folder = tmp_path_factory.mktemp("pre trained")
    more = ("--disable-validation", "--no-save-optimizer-state")
    fairseq_train(*toy_flags, "--max-update", 2, "--save-dir", folder, *more)
    return folder


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", columns.TABLES)
def test_a_table_becomes_lines_with_the_labels_in_a_fixed_order(task, monkeypatch, capsys, tmp_path):
    table = columns.TABLES[task]
    labels = table.labels or ("5.000", "0", "1.5")
    pair = ["one  sentence", 'another "quoted one'][: len(table.sentences)]
    folder = write_table(tmp_path / "tab les", task, [(*pair, label) for label in labels])
    output = run(columns, monkeypatch, capsys, folder, "--task", task, "--out", tmp_path / "lines")
    assert f"train: {len(labels)} examples" in output and f"valid: {len(labels)} examples" in output
    for split in ("train", "valid"):
        for part, text in enumerate(pair):
            lines = (tmp_path / f"lines/{split}.input{part}").read_text().splitlines()
            assert lines == [" ".join(text.split())] * len(labels)
        written = (tmp_path / f"lines/{split}.label").read_text().splitlines()
        assert written == (list(table.labels) or ["1.0", "0.0", "0.3"])
    if table.labels:
        assert (tmp_path / "lines/classes").read_text().split() == list(table.labels)


@pytest.mark.parametrize(
    "given, task, message",
    [
        ("STS-B", "MRPC", "line 2: '-' is not one of the labels 0, 1: is it the table of another --task"),
        ("STS-B", "CoLA", "line 1: 'column1' is not one of the labels 0, 1"),
        ("RTE", "WNLI", "line 2: 'entailment' is not one of the labels"),
        ("RTE", "STS-B", "has no row with 10 columns"),
        ("QQP", "STS-B", "has no row with 10 columns"),
        ("MNLI", "STS-B", "line 2: 'a sentence' is not a score from 0 to 5"),
        ("CoLA", "SST-2", "starts without a header"),
    ],
)
def test_the_table_of_another_task_is_refused(given, task, message, monkeypatch, capsys, tmp_path):
    table = columns.TABLES[given]
    row = (*["a sentence"] * len(table.sentences), (table.labels or ("2.5",))[0])
    folder = write_table(tmp_path / given, given, [row, row])
    with pytest.raises(SystemExit, match=f"columns: .*{message}"):
        run(columns, monkeypatch, capsys, folder, "--task", task, "--out", tmp_path / "lines")


# --- the commands of finetune.sh --------------------------------------------------------------------------------------

METRICS = {"CoLA": "mcc", "MRPC": "acc_and_f1", "QQP": "acc_and_f1", "STS-B": "pearson_and_spearman"}


@pytest.mark.parametrize("task", columns.TABLES)
def test_each_task_is_judged_by_its_metric_in_folders_of_any_name(task, tmp_path):
    labels = columns.TABLES[task].labels or ("1.5",)
    rows = [(*["text"] * len(columns.TABLES[task].sentences), label) for label in labels]
    write_table(tmp_path / "my $tables", task, rows)
    if task == "MNLI":
        for name in ("dev_matched.tsv", "dev_mismatched.tsv"):
            (tmp_path / "my $tables" / name).write_bytes((tmp_path / "my $tables/dev.tsv").read_bytes())
        (tmp_path / "my $tables/dev.tsv").unlink()
    (tmp_path / "pre trained").mkdir()
    arguments = ("my $tables", task, "pre trained", "a 'quoted' out", "--lr", "1e-3 extra")
    result, commands = finetune(tmp_path, *arguments, flags="--arch a --ode-random-steps '[2, 4]'")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "a 'quoted' out"
    scripts = [Path(command[1]).name for command in commands[:-1]]
    assert scripts == ["columns.py", "binarise.py", "-m", "-m"]
    assert [command[2:4] for command in commands[2:4]] == [
        ["fairseq_implicit", "checkpoint-flags"], ["fairseq_implicit", "precision"]
    ]  # fmt: skip
    assert commands[1][2:] == [f"{out}/lines", "--pretrained", f"{tmp_path}/pre trained", "--out", f"{out}/data-bin"]
    train = commands[-1]
    assert train[:2] == ["fairseq-train", f"{out}/data-bin"]
    flags = dict(pairwise(train[2:]))
    assert flags["--best-checkpoint-metric"] == METRICS.get(task, "accuracy")
    assert "--maximize-best-checkpoint-metric" in flags
    reports = {flag for flag in flags if flag.startswith("--report-")}
    assert reports == ({f"--report-{METRICS[task].replace('_', '-')}"} if task in METRICS else set())
    assert ("--regression-target" in flags) == (task == "STS-B")
    assert flags["--num-classes"] == str(len(columns.TABLES[task].labels) or 1)
    assert flags["--ode-random-steps"] == "[2, 4]" and flags["--save-dir"] == f"{out}/checkpoints"
    assert flags["--valid-subset"] == ("valid,valid1" if task == "MNLI" else "valid")
    assert "--save-on-signal" in flags and "--bf16" in flags and train[-2:] == ["--lr", "1e-3 extra"]


def test_a_training_that_stopped_goes_on_with_its_own_data_or_not_at_all(tmp_path):
    write_table(tmp_path / "tables", "RTE", [("a", "b", "entailment"), ("a", "b", "not_entailment")])
    (tmp_path / "pre").mkdir()
    for resumed in (False, True):
        result, commands = finetune(tmp_path, tmp_path / "tables", "RTE", "pre", "out")
        assert result.returncode == 0, result.stderr
        (tmp_path / "record").unlink()
        assert ("columns.py" in commands[0][1], commands[-1][0]) == (not resumed, "fairseq-train")
        (tmp_path / "out/checkpoints").mkdir(exist_ok=True)
        (tmp_path / "out/checkpoints/checkpoint_last.pt").touch()
    result, commands = finetune(tmp_path, "tables", "QNLI", "pre", "out")
    assert result.returncode == 1 and "out was made from other arguments" in result.stderr and commands == []
    (tmp_path / "out/inputs").unlink()
    result, commands = finetune(tmp_path, "tables", "RTE", "pre", "out")
    assert result.returncode == 1 and "by an earlier version" in result.stderr and commands == []


@pytest.mark.parametrize(
    "tables, task, folder, message",
    [
        ("nowhere", "RTE", "pre", "finetune: nowhere: no such file or folder"),
        ("tables", "RTE", "nowhere else", "finetune: nowhere else: no such file or folder"),
        ("tables", "ABC", "pre", "finetune: unknown task ABC"),
        ("pre", "RTE", "pre", "columns: .*/pre holds no train.tsv"),
    ],
)
def test_what_cannot_be_is_one_sentence(tables, task, folder, message, tmp_path):
    write_table(tmp_path / "tables", "RTE", [("a", "b", "entailment")])
    (tmp_path / "pre").mkdir()
    result, commands = finetune(tmp_path, tables, task, folder, "out")
    assert result.returncode != 0 and re.match(message, result.stderr) and len(result.stderr.splitlines()) == 1
    assert not any("fairseq-train" in command for command in commands)


# --- ids --------------------------------------------------------------------------------------------------------------


def test_the_model_reads_both_sentences_and_what_was_cut_is_counted(pretrained, monkeypatch, capsys, tmp_path):
    long, short = " ".join(["the implicit solver follows the field"] * 9), "the exact mask."
    pairs = [(long, short), (short, long), (long, long), (short, short)]
    rows = [(*pair, label) for pair, label in zip(pairs, ("0", "1", "1", "0"), strict=True)]
    folder = write_table(tmp_path / "tables", "MRPC", rows)
    run(columns, monkeypatch, capsys, folder, "--task", "MRPC", "--out", tmp_path / "lines")
    argv = (tmp_path / "lines", "--pretrained", pretrained, "--out", tmp_path / "bin")
    output = run(binarise, monkeypatch, capsys, *argv)
    bert = ImplicitBertModel.from_pretrained(pretrained)
    whole = [len(bert.ids(first)) + len(bert.ids(second)) for first, second in pairs]
    lost = sum(max(0, length - (32 - 4)) for length in whole)
    assert f"train: 4 pairs, {sum(whole)} tokens of which 0 are unknown; 3 pairs cut to the model's 32" in output
    assert f"the longer sentence first: {lost} tokens left out" in output
    settings = SentencePredictionConfig(
        data=str(tmp_path / "bin"), num_classes=2, init_token=0, separator_token=2, max_positions=32, no_shuffle=True,
        regression_target=False, seed=1,
    )  # fmt: skip
    task = SentencePredictionTask.setup_task(settings)
    dataset = task.load_dataset("train")
    for index, (pair, label) in enumerate(zip(pairs, (0, 1, 1, 0), strict=True)):
        ids = dataset[index]["net_input.src_tokens"]
        assert ids.equal(bert.encode(*pair, shorten=True)) and len(ids) <= 32
        assert all(len(sentence) > 0 for sentence in bert.decode(ids)) and len(bert.decode(ids)) == 2
        assert dataset[index]["target"].tolist() == [label]


def test_a_converted_bert_reads_the_tables_with_its_own_tokenizer(monkeypatch, capsys, tmp_path):
    source = tmp_path / "bert"
    bert_folder(source)
    transformers_folder.from_folder(source, tmp_path / "ours")
    pairs = [("the field is smooth", "Naïve solvers!"), ("unseen words", "the solver")]
    folder = write_table(tmp_path / "tables", "MRPC", [(*pairs[0], "0"), (*pairs[1], "1")])
    run(columns, monkeypatch, capsys, folder, "--task", "MRPC", "--out", tmp_path / "lines")
    run(binarise, monkeypatch, capsys, tmp_path / "lines", "--pretrained", tmp_path / "ours", "--out", tmp_path / "bin")
    theirs = AutoTokenizer.from_pretrained(source)
    bert = ImplicitBertModel.from_pretrained(tmp_path / "ours")
    for part, texts in zip(("input0", "input1"), zip(*pairs, strict=True), strict=True):
        rows = data_utils.load_indexed_dataset(str(tmp_path / "bin" / part / "train"))
        for row, text in zip(rows, texts, strict=True):  # each ends in </s>
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert bert.vocabulary.token_ids[row.numpy()[:-1]].tolist() == expected


def test_single_sentences_are_counted_and_lines_must_belong_together(pretrained, monkeypatch, capsys, tmp_path):
    rows = [(" ".join(["the implicit state"] * 20), "1"), ("the exact state.", "0")]
    folder = write_table(tmp_path / "tables", "SST-2", rows)
    run(columns, monkeypatch, capsys, folder, "--task", "SST-2", "--out", tmp_path / "lines")
    argv = (tmp_path / "lines", "--pretrained", pretrained, "--out")
    output = run(binarise, monkeypatch, capsys, *argv, tmp_path / "bin")
    bert = ImplicitBertModel.from_pretrained(pretrained)
    lost = len(bert.ids(rows[0][0])) - (32 - 2)
    assert f"1 sentences cut to the model's 32 positions: {lost} tokens left out" in output
    with pytest.raises(SystemExit):
        run(binarise, monkeypatch, capsys, *argv, tmp_path / "bin")
    assert "bin exists: remove it" in capsys.readouterr().err
    (tmp_path / "lines/train.label").write_text("1\n")
    with pytest.raises(SystemExit, match="train.label differ in their numbers of lines"):
        run(binarise, monkeypatch, capsys, *argv, tmp_path / "bin2")


# --- the checkpoint that is kept --------------------------------------------------------------------------------------


class Script:
    """Outputs of a fine-tuned model, by epoch and sentence, in place of those of its head."""

    def __init__(self, monkeypatch, outputs):
        self.updates, self.evaluated, forward = 0, {}, OdeBertModel.forward

        def scripted(model, src_tokens, features_only=False, return_all_hiddens=False, **kwargs):
            if model.training:
                self.updates += 1
                return forward(model, src_tokens, features_only, return_all_hiddens, **kwargs)
            symbols = [[model.encoder.dictionary[index] for index in row] for row in src_tokens.tolist()]
            texts = ["".join(row).replace("\u2581", " ") for row in symbols]
            return torch.tensor([outputs(self.updates, text) for text in texts]), {}

        monkeypatch.setattr(OdeBertModel, "forward", scripted)


def recipe(task, rows, pretrained, monkeypatch, capsys, fairseq_train, folder, *flags):
    """finetune.sh to its end, one update an epoch."""
    write_table(folder / "tables", task, rows)
    found = model_flags(str(pretrained / "checkpoint_last.pt"))
    found += ["--finetune-from-model", str(pretrained / "checkpoint_last.pt")]
    extra = ("--max-epoch", "4", "--num-workers", "0", "--no-save-optimizer-state", *flags)
    arguments = (folder / "tables", task, pretrained, folder / "o u t", "--batch-size-valid", "7", *extra)
    result, commands = finetune(folder, *arguments, flags=shlex.join(found))
    assert result.returncode == 0, result.stderr
    run(binarise, monkeypatch, capsys, *commands[1][2:])
    return fairseq_train(*commands[-1][1:], "--batch-size", len(rows))


def best(folder):
    return torch.load(folder / "o u t/checkpoints/checkpoint_best.pt")


def test_a_constant_predictor_is_not_the_best_of_cola(pretrained, fairseq_train, monkeypatch, capsys, tmp_path):
    """Epochs 1 and 3 say 1 to everything: more accurate (70 %) than epoch 2 (65 %), which alone has learnt anything."""
    rows = [("the exact state.", 0)] * 12 + [("the stable implicit state.", 1), ("the implicit state.", 1)] * 14

    def outputs(epoch, text):
        says_1 = epoch != 2 or "stable" in text
        return [0.0, 1.0] if says_1 else [1.0, 0.0]

    Script(monkeypatch, outputs)
    flags = ("--log-format", "json")
    log = recipe("CoLA", rows, pretrained, monkeypatch, capsys, fairseq_train, tmp_path, *flags).metrics("valid")
    truth, predicted = [label for _, label in rows], [int("stable" in text) for text, _ in rows]
    assert [epoch["valid_accuracy"] for epoch in log] == [70.0, 65.0, 70.0, 70.0]
    assert [epoch["valid_mcc"] for epoch in log] == [0.0, round(100 * matthews_corrcoef(truth, predicted), 1), 0.0, 0.0]
    assert best(tmp_path)["optimizer_history"][-1]["num_updates"] == 2
    monkeypatch.undo()
    tuned = ImplicitBertModel.from_pretrained(tmp_path / "o u t/checkpoints")
    assert tuned.predict("sentence_classification_head", tuned.encode("the exact state.")).shape == (1, 2)


def test_the_f1_of_mrpc_is_that_of_the_whole_set(pretrained, fairseq_train, monkeypatch, capsys, tmp_path):
    rng = np.random.default_rng(0)
    rows = [("the exact state", f"{word} state", label) for word, label in zip(
        rng.choice(["stable", "fixed"], 30), rng.integers(0, 2, 30), strict=True
    )]  # fmt: skip
    Script(monkeypatch, lambda epoch, text: [0.0, 1.0 if "stable" in text else -1.0])
    flags = ("--log-format", "json", "--max-epoch", "1")
    (log,) = recipe("MRPC", rows, pretrained, monkeypatch, capsys, fairseq_train, tmp_path, *flags).metrics("valid")
    truth, predicted = [row[-1] for row in rows], [int("stable" in row[1]) for row in rows]
    f1, accuracy = f1_score(truth, predicted), np.mean(np.equal(truth, predicted))
    assert log["valid_acc_and_f1"] == round(50 * (f1 + accuracy), 1)


def test_constant_scores_are_not_the_best_of_sts_b(pretrained, fairseq_train, monkeypatch, capsys, tmp_path, caplog):
    """Epoch 1 ranks the pairs, epoch 2 is constant (no correlation exists), epoch 3 ranks them worse."""
    words = ["stable", "fixed", "deep", "exact", "learned"] * 4
    scores = {"stable": 0.0, "fixed": 1.0, "deep": 3.0, "exact": 4.0, "learned": 5.0}
    rows = [("the state", f"the {word} state", scores[word]) for word in words]
    worse = {"stable": 1.0, "fixed": 0.0, "deep": 3.0, "exact": 5.0, "learned": 4.0}

    def outputs(epoch, text):
        (word,) = [word for word in scores if word in text]
        return [{1: scores[word] ** 2, 2: 1.0}.get(epoch, worse[word])]

    Script(monkeypatch, outputs)
    log = recipe("STS-B", rows, pretrained, monkeypatch, capsys, fairseq_train, tmp_path)
    truth = [scores[word] for word in words]
    squares = [score**2 for score in truth]
    expected = 50 * (pearsonr(squares, truth)[0] + spearmanr(squares, truth)[0])
    kept = best(tmp_path)
    assert kept["optimizer_history"][-1]["num_updates"] == 1
    assert kept["extra_state"]["best"] == pytest.approx(expected, abs=0.06)
    assert "validation pearson_and_spearman is not a number: checkpoint_best.pt stays" in log.text
    assert "pred [" not in log.text and not math.isnan(kept["extra_state"]["best"])
    last = torch.load(tmp_path / "o u t/checkpoints/checkpoint_last.pt")
    assert last["extra_state"]["best"] == kept["extra_state"]["best"]
    monkeypatch.undo()
    tuned = ImplicitBertModel.from_pretrained(tmp_path / "o u t/checkpoints")
    pair = tuned.encode("the state", "the deep state")
    assert tuned.predict("sentence_classification_head", pair).item() != 0.0
    assert len(tuned.fill_mask("the <mask> state", topk=2)) == 2
