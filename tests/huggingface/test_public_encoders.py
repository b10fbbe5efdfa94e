"""The page examples/public_encoders: its command on a tiny encoder, and its snippet."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PAGE = Path(__file__).resolve().parent.parent.parent / "examples" / "public_encoders"


@pytest.fixture
def dial():
    spec = importlib.util.spec_from_file_location("dial", PAGE / "dial.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """A random BERT whose vocabulary is that of the page's pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(re.findall(r"\w+|[^\w\s]", (PAGE / "pairs.tsv").read_text(encoding="utf-8"))))
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    config = transformers.BertConfig(**shape, vocab_size=len(vocabulary), max_position_embeddings=16)
    transformers.BertModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_one_row_per_way_and_the_first_one_is_the_plain_model(dial, folder, capsys):
    dial.main([folder, "--limit", "12"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + len(dial.WAYS)
    costs = {row[0].removeprefix("| "): float(row[1]) for row in rows[2:]}
    assert rows[2][3] == "1.000" and costs["Euler: the plain model"] == 2 and costs["RK4, 2 sub-steps"] == 16
    assert {row[3] for row in rows[3:]} != {"1.000"}


def test_no_weights_at_hand_is_one_sentence(dial, capsys, monkeypatch):
    monkeypatch.setattr(dial, "PACKAGE", "no_such_package")
    dial.main([])
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("skipped: no model folder was given")


def test_the_snippet_of_the_page_runs_as_it_stands(folder, tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (PAGE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert 'from_pretrained("model")' in snippet
    exec(compile(snippet.replace('from_pretrained("model")', f"from_pretrained({folder!r})"), "README", "exec"), {})
