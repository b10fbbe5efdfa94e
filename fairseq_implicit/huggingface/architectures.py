"""Where the layers of transformers' encoders are, and what is particular about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedConfig

from fairseq_implicit.options import OptionError


@dataclass(frozen=True)
class Architecture:
    """One family of encoders.

    Attributes:
        layers: path of the list of layers in the encoder.
        group: path of the list inside each entry, where the entries are groups of layers that are passed repeatedly.
        beside: path of a module between two layers that reads the encoder's input as well; "" for none.
        width: how many things a layer returns as a tuple, its state first; 0: the state alone.
        first_norm: path in a layer of the norm that ends its first sum; "" where layers begin with a norm instead.
    """

    layers: str = "encoder.layer"
    group: str = ""
    beside: str = ""
    width: int = 0
    first_norm: str = "attention.output.LayerNorm"


_BERT = Architecture()
#: By the `model_type` of the configuration. A family with a plain list of layers can also be named by hand.
ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": Architecture("transformer.layer", first_norm="sa_layer_norm"),
    "albert": Architecture("encoder.albert_layer_groups", group="albert_layers", first_norm="attention.LayerNorm"),
    "deberta-v2": Architecture(beside="encoder.conv", width=2),
    "modernbert": Architecture("layers", first_norm=""),
}
REFUSED = {
    "is_encoder_decoder": "an encoder-decoder model: solve the depth of an encoder",
    "is_decoder": "a decoder, whose cache holds one key and value per layer and not one per evaluation",
    "add_cross_attention": "a model with cross attention, whose other input no solver knows",
}


@dataclass(frozen=True)
class Encoder:
    """An encoder found in a model.

    Attributes:
        module: the module whose ``forward`` takes the attention mask and calls the layers.
        layers: its layers, each once, in order.
        beside: what stands between layers, see :class:`Architecture`.
        calls: how many calls of ``layers`` and ``beside`` one pass makes.
        architecture: how it is built.
    """

    module: nn.Module
    layers: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]
    calls: int
    architecture: Architecture

    @property
    def config(self) -> PreTrainedConfig | None:
        """Its configuration; ``None`` of a module that has none."""
        return config_of(self.module)


def find_encoder(model: nn.Module, layers: str | None = None) -> Encoder:
    """The encoder in ``model``.

    Args:
        model: an encoder of :data:`ARCHITECTURES`, or a model that holds one.
        layers: path of the list of layers, for a model of another kind.

    Raises:
        OptionError: there is none, more than one, or one that cannot be solved.
    """
    for config in {id(config): config for module in model.modules() if (config := config_of(module))}.values():
        _refuse(config)
    if layers is not None:
        entries = _submodule(model, layers)
        if not isinstance(entries, nn.ModuleList) or not len(entries):
            raise OptionError("layers", f"{layers!r} is no list of layers (torch.nn.ModuleList) of this model.")
        return _encoder(model, Architecture(layers, first_norm=""))
    found = [(module, one) for module in model.modules() if (one := _architecture(module)) is not None]
    if len(found) > 1:
        raise OptionError("layers", f"the model holds {len(found)} encoders: solve the depth of each by itself.")
    if not found:
        raise OptionError(
            "layers",
            f"no encoder was found in {type(model).__name__}: known are {', '.join(ARCHITECTURES)}; of another encoder "
            "name the list of layers, such as layers='encoder.layer'.",
        )
    return _encoder(*found[0])


def config_of(module: nn.Module) -> PreTrainedConfig | None:
    """The configuration that ``module`` was made by; ``None`` where it has none of transformers'."""
    config = vars(module).get("config")
    return config if isinstance(config, PreTrainedConfig) else None


def _refuse(config: PreTrainedConfig) -> None:
    said = config.to_dict()
    for name, sentence in REFUSED.items():
        if said.get(name):
            raise OptionError("model", f"{config.model_type} is {sentence} ({name} is set).")


def _architecture(module: nn.Module) -> Architecture | None:
    config = config_of(module)
    architecture = None if config is None else ARCHITECTURES.get(config.model_type)
    if architecture is None or _submodule(module, architecture.layers) is None:
        return None
    return architecture


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _encoder(module: nn.Module, architecture: Architecture) -> Encoder:
    entries = _list(module, architecture.layers)
    beside = tuple(_beside(module, architecture.beside))
    calls = len(entries) + len(beside)
    if architecture.group:
        groups = [_list(entry, architecture.group) for entry in entries]
        config = config_of(module)
        assert config is not None  # an architecture with groups was found by it
        entries, calls = [layer for group in groups for layer in group], config.num_hidden_layers * len(groups[0])
    for layer in (*entries, *beside):
        if "forward" in vars(layer):
            raise OptionError(
                "model",
                f"the forward of a {type(layer).__name__} was replaced (as by accelerate, when it spreads a model over "
                "devices): solve the depth before that.",
            )
    return Encoder(module, tuple(dict.fromkeys(entries)), beside, calls, architecture)


def _list(module: nn.Module, path: str) -> list[nn.Module]:
    """All entries of a list of modules; one that stands in it twice is passed twice."""
    return list(cast(nn.ModuleList, module.get_submodule(path)))


def _beside(module: nn.Module, path: str) -> Iterator[nn.Module]:
    if path and (found := _submodule(module, path)) is not None:
        yield found
