"""Configurations and batches of a few thousand weights, and the fairseq models that they are."""

import types

import torch
from transformers import BertConfig, BertModel

from fairseq_implicit.huggingface import DeqBertConfig, NeuralOdeBertConfig, OdeBertConfig

SIZES = dict(
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=32,
    encoder_attention_heads=2,
    max_positions=24,
)
CONFIGS = {"ode_bert": OdeBertConfig, "neural_ode_bert": NeuralOdeBertConfig, "deq_bert": DeqBertConfig}
SYMBOLS, MASK = 45, 44


def tiny_config(family, **options):
    """Of a family, without dropout unless asked for."""
    quiet = dict(dropout=0.0, attention_dropout=0.0)
    return CONFIGS[family](vocab_size=SYMBOLS, mask_token_id=MASK, **{**SIZES, **quiet, **options})


def batch(padded=True):
    """``(3, 12)`` ids; with padding, of 12, 9 and 5 tokens."""
    ids = torch.randint(4, MASK, (3, 12), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 0
    if padded:
        ids[1, 9:] = 1
        ids[2, 5:] = 1
    return ids


def labels_of(ids, every=3):
    """The tokens at each ``every``-th place, -100 elsewhere and at padding."""
    wanted = torch.arange(ids.shape[1]).remainder(every).eq(1) & ids.ne(1)
    return torch.where(wanted, ids, -100)


def fairseq_model(family, **options):
    """fairseq's model of the same options, in fresh weights."""
    from fairseq.data import Dictionary
    from fairseq.models import MODEL_REGISTRY

    import fairseq_implicit.models  # noqa: F401  (registers them)

    dictionary = Dictionary()
    for index in range(MASK - 4):
        dictionary.add_symbol(f"piece{index}")
    dictionary.add_symbol("<mask>")
    model = MODEL_REGISTRY[family]
    quiet = dict(dropout=0.0, attention_dropout=0.0)
    config = model.config_class()(**{**SIZES, **quiet, **options})
    return model.build_model(config, types.SimpleNamespace(source_dictionary=dictionary))


def bert_folder(folder):
    """A BERT of transformers and its tokenizer."""
    from tests.text.test_tokenizer_json import word_piece

    tokenizer = word_piece()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    BertModel(BertConfig(**shape, vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
