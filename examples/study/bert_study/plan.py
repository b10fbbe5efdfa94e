"""What a study runs, read from YAML and checked once: models, shape, training flags, seeds and learning-rate grid."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import yaml

Flags = dict[str, Any]

WEIGHTS = ("own", "shared")
GOALS = ("below", "within")


class StudyError(Exception):
    """One sentence for the user: which file, key or flag is at fault and what to do."""


@dataclass(frozen=True)
class Model:
    """One row of the study.

    Attributes:
        name: the key in models.yaml; folders are called after it.
        label: how the report calls it.
        arch: the fairseq architecture.
        flags: what sets it apart, by flag name without dashes.
        depth: layers, in multiples of the study's.
        weights: ``own``: a set for each layer; ``shared``: one set, its feed-forward part widened to the parameters of
            the study's layers together.
        shares: flags whose values are shares of the updates.
        matched: the feed-forward part is as wide as gives the model the parameters of the study's reference.
    """

    name: str
    label: str
    arch: str
    flags: Flags = dataclasses.field(default_factory=dict)
    depth: int = 1
    weights: str = "own"
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    matched: bool = False

    def __post_init__(self):
        if self.weights not in WEIGHTS:
            raise StudyError(f"model {self.name}: weights {self.weights!r} must be one of {', '.join(WEIGHTS)}")
        if not isinstance(self.depth, int) or self.depth < 1:
            raise StudyError(f"model {self.name}: depth {self.depth!r} must be a whole number of at least 1")


@dataclass(frozen=True)
class Comparison:
    """``model`` against ``reference``, on the terms that are equal; ``goal`` is what was hoped for.

    ``below``: the loss lies below, the whole confidence interval included. ``within``: it is at most ``margin`` times
    the reference's loss above it.
    """

    model: str
    reference: str
    terms: str
    goal: str | None = None
    margin: float = 0.0

    def __post_init__(self):
        if self.goal is not None and self.goal not in GOALS:
            raise StudyError(
                f"comparison of {self.model} with {self.reference}: goal {self.goal!r} must be one of "
                f"{', '.join(GOALS)}"
            )


@dataclass(frozen=True)
class Grid:
    """Learning rates, each tried for ``updates`` updates with ``seed``, which no final run uses; or, for none, the one
    rate of all final runs."""

    rates: tuple[float, ...]
    updates: int
    seed: int = 100


@dataclass(frozen=True)
class Further:
    """More seeds for the models of the comparisons that matter most."""

    seeds: tuple[int, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One training: a model with a learning rate, a seed and a length."""

    model: Model
    rate: float
    seed: int
    updates: int
    trial: bool = False  # of the grid

    @property
    def name(self) -> str:
        return f"{self.model.name}/{'grid' if self.trial else f'seed{self.seed}'}-lr{self.rate:g}"


@dataclass(frozen=True)
class Plan:
    """A study of one size."""

    size: str
    about: str
    dictionary: int
    shape: Flags
    training: Flags
    updates: int
    validations: int
    seeds: tuple[int, ...]
    grid: Grid
    models: dict[str, Model]
    comparisons: tuple[Comparison, ...]
    reference: str
    further: Further = Further()
    jobs: int = 1
    threads: int = 1
    rounds: int = 20

    def __post_init__(self):
        if self.reference not in self.models:
            raise StudyError(
                f"{self.size}.yaml: the reference {self.reference} must be one of the models: every ratio is over it"
            )
        if self.grid.seed in self.seeds + self.further.seeds:
            raise StudyError(
                f"{self.size}.yaml: the grid's seed {self.grid.seed} is also a seed of the final runs, whose learning "
                "rate would then be chosen on themselves: take another"
            )
        for key in ("dictionary", "updates", "validations", "jobs", "threads", "rounds"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise StudyError(f"{self.size}.yaml: {key} {value!r} must be a whole number of at least 1")
        if self.updates % self.validations:
            raise StudyError(
                f"{self.size}.yaml: {self.updates} updates do not divide into {self.validations} validations: the last "
                "one must fall on the last update"
            )
        unknown = [name for name in self.further.models if name not in self.models]
        if unknown:
            raise StudyError(f"{self.size}.yaml: further seeds for {unknown[0]}, which is none of the models")
        if not self.seeds or not self.grid.rates:
            raise StudyError(f"{self.size}.yaml: name at least one seed and one learning rate")
        if not self.grid.updates and len(self.grid.rates) > 1:
            raise StudyError(f"{self.size}.yaml: a grid of 0 updates cannot choose among {len(self.grid.rates)} rates")

    def trials(self) -> list[Run]:
        """The learning-rate grid: every rate for every model, the same number of updates for all."""
        return [
            Run(model, rate, self.grid.seed, self.grid.updates, trial=True)
            for model in self.models.values()
            for rate in (self.grid.rates if self.grid.updates else ())
        ]

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds of a model's final runs."""
        return self.seeds + (self.further.seeds if name in self.further.models else ())

    def finals(self, rates: dict[str, float]) -> list[Run]:
        """The runs that are compared, seed by seed, so that a study cut short still compares."""
        return [
            Run(model, rates[name], seed, self.updates)
            for seed in self.seeds + self.further.seeds
            for name, model in self.models.items()
            if name in rates and seed in self.seeds_of(name)
        ]

    def evaluated_sets(self, model: Model) -> int:
        """Sets of weights that the depth consists of: an evaluation of the field uses one of them."""
        return 1 if model.weights == "shared" else self.shape["encoder-layers"] * model.depth

    def flags(self, run: Run) -> Flags:
        """Every flag of fairseq-train that makes this run what it is; folders and logging excepted."""
        own = self._shape(run.model)
        if run.model.matched:
            from bert_study.widths import matched_width

            reference = self._shape(self.models[self.reference])
            try:
                own["encoder-ffn-embed-dim"] = matched_width(own, reference)
            except ValueError as error:
                raise StudyError(f"model {run.model.name}: {error}") from error
        own.update({flag: round(share * run.updates) for flag, share in run.model.shares.items()})
        return {
            **own,
            "lr": run.rate,
            "seed": run.seed,
            "max-update": run.updates,
            "total-num-update": run.updates,
        }

    def _shape(self, model: Model) -> Flags:
        """The flags that all runs of a model have."""
        from fairseq_implicit.families.deq_bert import matched_ffn_dim

        shape = dict(self.shape)
        layers, dim, ffn = (shape[f"encoder-{key}"] for key in ("layers", "embed-dim", "ffn-embed-dim"))
        if model.weights == "shared":
            shape["encoder-ffn-embed-dim"] = matched_ffn_dim(layers, dim, ffn)
        shape["encoder-layers"] = layers * model.depth
        return {**shape, **self.training, **model.flags, "arch": model.arch}


def arguments(flags: Flags) -> list[str]:
    """Flags as words of a command line; true stands alone, false and null are left out."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return words


def load(size: str, folder: str, **overrides: Any) -> Plan:
    """The plan ``folder/size.yaml`` over the models of ``folder/models.yaml``; ``overrides`` go over its keys.

    Raises:
        StudyError: a file is missing or not YAML, a key is missing, unknown or has no meaning.
    """
    catalogue = _read(os.path.join(folder, "models.yaml"))
    given = _read(os.path.join(folder, f"{size}.yaml"))
    rows = catalogue.get("models", {})
    wanted = given.pop("models", None) or list(rows)
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise StudyError(f"{size}.yaml names the model {unknown[0]}, which models.yaml does not have")
    models = {name: _build(Model, f"models.yaml, model {name}", {"name": name, **rows[name]}) for name in wanted}
    comparisons = tuple(
        _build(Comparison, "models.yaml, comparison", row)
        for row in catalogue.get("comparisons", [])
        if row.get("model") in models and row.get("reference") in models
    )
    where = f"{size}.yaml"
    grid = given.get("grid") or {}
    given["grid"] = _build(Grid, f"{where}, grid", {**grid, "rates": tuple(map(float, grid.get("rates") or ()))})
    given["seeds"] = tuple(given.get("seeds") or ())
    further = {key: tuple(values) for key, values in (given.get("further") or {}).items()}
    given["further"] = _build(Further, f"{where}, further", further)
    return _build(Plan, where, {"size": size, "models": models, "comparisons": comparisons, **given, **overrides})


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} must hold keys and values")
    return found


def _build(kind, where: str, values: dict[str, Any]):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise StudyError(f"{where}: {unknown[0]} is no key of it; the keys are {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise StudyError(f"{where}: {missing[0]} is missing")
    return kind(**values)
