"""Presets: one registered model each.

fairseq merges a checkpoint with its model's dataclass only when the stored name is a *registered model*; a named
architecture of another model is not merged and is ignored by hydra. A preset is therefore a subclass with a config
subclass of its own, made from one line of a table.
"""

import dataclasses
import sys
from typing import Any, Dict, Type

from fairseq.models import MODEL_REGISTRY, register_model

from fairseq_implicit.families.bert import SIZES
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.config import ImplicitBertConfig

#: The family of each preset, by their registered names.
FAMILIES: Dict[str, str] = {}


def family_of(name: str) -> str:
    """The family of a registered model; of a family, and of a model of others, its own name."""
    return FAMILIES.get(name, name)


def register_preset(
    name: str, model: Type[ImplicitBertModel], config: Type[ImplicitBertConfig], defaults: Dict[str, Any]
) -> Type[ImplicitBertModel]:
    """Register ``model`` under ``name`` with other defaults.

    Raises:
        ValueError: a default names no field of ``config``, or the name is taken.
    """
    by_name = {field.name: field for field in dataclasses.fields(config)}
    unknown = sorted(set(defaults) - set(by_name))
    if unknown:
        raise ValueError(f"preset {name} sets {', '.join(unknown)}, which {config.__name__} does not have")
    FAMILIES[name] = next(family for family, registered in MODEL_REGISTRY.items() if registered is model)
    stem = "".join(part.capitalize() for part in name.split("_"))
    fields = [
        (key, by_name[key].type, dataclasses.field(default=value, metadata=by_name[key].metadata))
        for key, value in defaults.items()
    ]
    module = model.__module__
    preset_config = dataclasses.make_dataclass(
        f"{stem}Config", fields, bases=(config,), namespace={"__module__": module}
    )
    preset_config.__doc__ = f"Defaults of {name}."
    preset = type(f"{stem}Model", (model,), {"__module__": module, "__doc__": f"The preset {name}."})
    for made in (preset_config, preset):
        # Reachable by name, so that models pickle.
        setattr(sys.modules[module], made.__name__, made)
    return register_model(name, dataclass=preset_config)(preset)


def register_presets(
    prefix: str,
    model: Type[ImplicitBertModel],
    config: Type[ImplicitBertConfig],
    variants: Dict[str, Dict[str, Any]],
    sizes: Dict[str, Dict[str, Any]] = SIZES,
) -> None:
    """Register ``<prefix>[_<variant>]_<size>`` for every variant (``""`` for the family's defaults) and size."""
    for variant, settings in variants.items():
        for size, shape in sizes.items():
            name = "_".join(part for part in (prefix, variant, size) if part)
            register_preset(name, model, config, {**shape, **settings})
