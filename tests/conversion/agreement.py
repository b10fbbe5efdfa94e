"""A masked-LM model of transformers and the ode_bert that it is: one function, and one gradient for every parameter."""

import torch
from torch.nn import functional

from fairseq_implicit.models.ode_bert import OdeBertConfig
from fairseq_implicit.networks.encoder import Encoder

TOKENS = torch.tensor([[2, 11, 12, 3, 13, 14, 15, 3], [2, 16, 3, 17, 3, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]])
REAL = TOKENS.ne(0)
#: Of each sequence some tokens to predict; -100 elsewhere.
LABELS = torch.where((torch.arange(8) % 3 == 1) & REAL, TOKENS.roll(1, 1), -100)


def random_model(kind, config):
    """In float64, with weights of a size at which every part of it matters."""
    torch.manual_seed(0)
    model = kind(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def network_of(settings, weights, config):
    """The encoder that imported settings and weights are, strictly."""
    options = OdeBertConfig(**{name: value for name, value in settings.items() if name != "_name"})
    options.check()
    network = Encoder(options.network(config.vocab_size, config.pad_token_id), options.build_depth()).double()
    named = {name.removeprefix("encoder."): weight for name, weight in weights.items() if name.startswith("encoder.")}
    network.load_state_dict(named)
    return network


def assert_one_function(theirs, room, segments=None, to=1e-9, duplicates=()):
    """Logits, hidden states, loss and every gradient at real tokens.

    Args:
        theirs: the model, without noise.
        room: the module of :mod:`fairseq_implicit.conversion` that imports it.
        segments: of the batch.
        to: largest difference.
        duplicates: parts of the names of our weights that are one parameter with others.
    """
    config = theirs.config.to_dict()
    ours = network_of(*room.from_transformers(config, theirs.state_dict()), theirs.config)
    expected = theirs(
        TOKENS, attention_mask=REAL.long(), token_type_ids=segments, labels=LABELS, output_hidden_states=True
    )
    found = ours(TOKENS, segments=segments, return_hidden_states=True)

    def close(one, other, message=None):
        torch.testing.assert_close(one, other, rtol=0, atol=to, msg=message)

    close(found.values[REAL], expected.logits[REAL])
    assert len(found.hidden_states) == len(expected.hidden_states)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(one[REAL], other[REAL])
    loss = functional.cross_entropy(found.values.flatten(0, 1), LABELS.flatten())
    close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    # A gradient is a tensor of the parameter's shape: the same renaming brings the two sets side by side.
    given = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in given.values())
    _, gradients = room.from_transformers(config, given)
    gradients.pop("encoder.lm_head.weight", None)  # that of the embeddings
    for name, parameter in ours.named_parameters():
        close(parameter.grad, gradients.pop(f"encoder.{name}"), name)
    assert all(any(part in name for part in duplicates) for name in gradients), list(gradients)
