"""The one table between a family's flags and the options of its configurations."""

import contextlib
import dataclasses
from typing import Any

from fairseq_implicit.options import named


class Flags:
    """How the options of the parts are called on the command line.

    Args:
        prefix: of every option that the table does not name: option ``steps`` is flag ``--PREFIX-steps``.
        fields: option to field of the family's dataclass.
    """

    def __init__(self, prefix: str, **fields: str):
        self.prefix = prefix
        self.fields = fields

    def field(self, option: str) -> str:
        """The field of the family's dataclass that sets ``option``."""
        return self.fields.get(option, f"{self.prefix}_{option}")

    def flag(self, option: str) -> str:
        """The flag that sets ``option``; of a flag itself, that flag."""
        return option if option.startswith("--") else flag(self.field(option))

    def naming(self) -> contextlib.AbstractContextManager:
        """Within it an option's error names the flag."""
        return named(self.flag)

    def options(self, cls: type, cfg: Any) -> dict[str, Any]:
        """The options of the configuration ``cls`` that ``cfg`` has a flag for."""
        names = {option.name: self.field(option.name) for option in dataclasses.fields(cls)}
        return {option: getattr(cfg, name) for option, name in names.items() if name in cfg.__dataclass_fields__}


def flag(field: str) -> str:
    """``--ode-steps`` of the field ``ode_steps``."""
    return "--" + field.replace("_", "-")
