"""The options of all mixers as options of a family: ``MIXER_OPTION`` each, with the help of the mixer's own."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_type_hints

from fairseq_implicit.families.flags import flag
from fairseq_implicit.fields.mixers import MIXERS
from fairseq_implicit.fields.mixers.mixer import MixerConfig
from fairseq_implicit.options import named

#: What several mixers have: the options of a family that set it.
SHARED = {
    "heads": "encoder_attention_heads",
    "dropout": "attention_dropout",
    "hidden_dropout": "dropout",
    "norm_eps": "layernorm_eps",
    "no_biases": "no_biases",
}

Options = TypeVar("Options", bound=type)


def _own(mixer: str) -> Iterator[tuple[str, dataclasses.Field]]:
    """The options of a mixer that no other has, under their names in a family."""
    for option in dataclasses.fields(MIXERS[mixer]):
        if option.name not in SHARED:
            yield _name(mixer, option.name), option


def _name(mixer: str, option: str) -> str:
    return SHARED.get(option, f"{mixer.replace('-', '_')}_{option}")


def with_mixer_options(options: Options) -> Options:
    """Adds them to a class that becomes a dataclass. Their types are spelled out: command lines are read by them."""
    for mixer, config in MIXERS.items():
        types = get_type_hints(config)
        for name, option in _own(mixer):
            options.__annotations__[name] = types[option.name]
            setattr(options, name, dataclasses.field(default=option.default, metadata=option.metadata))
    return options


def options_of(mixer: str, options: Any) -> dict[str, Any]:
    """The options of a mixer that a family has; the others keep their defaults."""
    names = ((option.name, _name(mixer, option.name)) for option in dataclasses.fields(MIXERS[mixer]))
    return {option: getattr(options, name) for option, name in names if name in options.__dataclass_fields__}


def mixer_config(mixer: str, options: Any) -> MixerConfig:
    """The mixer's configuration out of a family's options.

    Raises:
        OptionError: an impossible value, under the flag's name.
        ValueError: an option of another mixer.
    """
    known = {name for name, _ in _own(mixer)}
    for other in MIXERS:
        for name, option in _own(other):
            if name in known or name not in options.__dataclass_fields__:
                continue
            if (given := getattr(options, name)) != option.default:
                raise ValueError(
                    f"{flag(name)} {given} belongs to --mixer {other}, and --mixer is {mixer}: leave it out"
                )
    with named(flag_of(mixer)):
        return MIXERS[mixer](**options_of(mixer, options))


def flag_of(mixer: str) -> Callable[[str], str]:
    """The flag of each option of a mixer."""
    return lambda option: flag(_name(mixer, option))
