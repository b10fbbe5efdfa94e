"""Entry points of torch.hub, one per model family:

    torch.hub.load("path/to/this/checkout", "ode_bert", source="local", path="folder", checkpoint_file="model.pt")

`path` is the checkpoint's folder, of which `checkpoint_best.pt`, `model.pt` or `checkpoint_last.pt` is taken when none
is named. The dictionary and the tokenizer are looked for there, then in the data folder that the checkpoint names;
further keywords override fields of the model (`ode_scheme="rk4"`).
"""

dependencies = ["torch", "fairseq", "sentencepiece"]

from fairseq_implicit.models import DeqBertModel, NeuralOdeBertModel, OdeBertModel  # noqa: E402


def ode_bert(path, checkpoint_file=None, **overrides):
    """A trained ODE-BERT behind the hub interface (encode, decode, extract_features, fill_mask, predict)."""
    return OdeBertModel.from_pretrained(path, checkpoint_file, **overrides)


def neural_ode_bert(path, checkpoint_file=None, **overrides):
    """A trained neural-ODE BERT behind the same interface."""
    return NeuralOdeBertModel.from_pretrained(path, checkpoint_file, **overrides)


def deq_bert(path, checkpoint_file=None, **overrides):
    """A trained DEQ-BERT behind the same interface."""
    return DeqBertModel.from_pretrained(path, checkpoint_file, **overrides)
