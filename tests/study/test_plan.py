"""The plan of a study: what it runs, with which flags, and what it refuses."""

import os

import pytest
import yaml
from bert_study.plan import StudyError, arguments, load

from tests.conftest import ROOT

STUDY, MIXERS = (os.path.join(ROOT, "examples", name) for name in ("study", "mixers"))

SMALL = {
    "about": "two models",
    "models": ["euler", "rk2", "deq"],
    "reference": "euler",
    "dictionary": 64,
    "updates": 20,
    "validations": 2,
    "seeds": [1, 2],
    "grid": {"rates": [1e-3, 2e-3], "updates": 4},
    "shape": {"encoder-layers": 2, "encoder-embed-dim": 8, "encoder-ffn-embed-dim": 16, "encoder-attention-heads": 2},
    "training": {"tokens-per-sample": 16, "batch-size": 4},
}


@pytest.fixture
def folder(tmp_path):
    """A folder with the project's models and the size ``own``, which a test may change first."""

    def write(**changes):
        values = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        models = os.path.join(STUDY, "models.yaml")
        (tmp_path / "models.yaml").write_bytes(open(models, "rb").read())
        return str(tmp_path)

    return write


def test_grid_and_final_runs(folder):
    plan = load("own", folder())
    assert [run.name for run in plan.trials()] == [
        f"{model}/grid-lr{rate}" for model in ("euler", "rk2", "deq") for rate in ("0.001", "0.002")
    ]
    # Seed by seed, so that a study that is cut short still compares; a model without a rate is left out.
    assert [run.name for run in plan.finals({"euler": 2e-3, "deq": 1e-3})] == [
        "euler/seed1-lr0.002", "deq/seed1-lr0.001", "euler/seed2-lr0.002", "deq/seed2-lr0.001",
    ]  # fmt: skip
    assert {run.seed for run in plan.trials()}.isdisjoint(plan.seeds)


def test_further_seeds(folder):
    plan = load("own", folder(further={"seeds": [3], "models": ["rk2"]}))
    runs = [(run.seed, run.model.name) for run in plan.finals({"euler": 1e-3, "rk2": 1e-3})]
    assert runs == [(1, "euler"), (1, "rk2"), (2, "euler"), (2, "rk2"), (3, "rk2")]
    assert plan.seeds_of("rk2") == (1, 2, 3) and plan.seeds_of("euler") == (1, 2)


def test_flags_of_a_run(folder):
    plan = load("own", folder())
    flags = {run.model.name: plan.flags(run) for run in plan.finals(dict.fromkeys(plan.models, 1e-3))}
    assert flags["rk2"] == {
        **SMALL["shape"], **SMALL["training"], "ode-scheme": "rk2", "arch": "ode_bert", "lr": 1e-3, "seed": 2,
        "max-update": 20, "total-num-update": 20,
    }  # fmt: skip
    # One layer with the matrices of two: 4·8² + 2·8·f = 2 (4·8² + 2·8·16).
    assert flags["deq"]["encoder-ffn-embed-dim"] == 48
    assert flags["deq"]["deq-warmup-updates"] == 2  # a tenth
    assert arguments({"a": True, "b": False, "c": None, "d": 1e-3, "e": 512, "f": "x"}) == [
        "--a", "--d", "0.001", "--e", "512", "--f", "x",
    ]  # fmt: skip


def test_twins_of_equal_cost_have_more_layers(folder):
    plan = load("own", folder(models=["euler", "euler-4x"]))
    run = plan.finals({"euler-4x": 1e-3})[0]
    assert plan.flags(run)["encoder-layers"] == 8 and plan.evaluated_sets(run.model) == 8


@pytest.mark.parametrize("size, folder", [("smoke", STUDY), ("cpu", STUDY), ("gpu", STUDY), ("mixers", MIXERS)])
def test_the_sizes_of_the_project(size, folder):
    """Every flag they name is one of fairseq-train's, every comparison names models that exist."""
    from fairseq import options

    import fairseq_implicit.models  # noqa: F401

    plan = load(size, folder)
    catalogue = yaml.safe_load(open(os.path.join(folder, "models.yaml"), encoding="utf-8"))
    for comparison in catalogue["comparisons"]:
        assert {comparison["model"], comparison["reference"]} <= set(catalogue["models"])
    for run in plan.trials() or plan.finals(dict.fromkeys(plan.models, 1e-3)):
        words = [
            "DATA",
            "--task",
            "implicit_masked_lm",
            "--criterion",
            "implicit_masked_lm",
            *arguments(plan.flags(run)),
        ]
        parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
        assert parsed.arch == run.model.arch and parsed.lr == [run.rate]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(models=["euler", "rk9"]), "names the model rk9, which models.yaml does not have"),
        (dict(reference="tied-euler"), "the reference tied-euler must be one of the models"),
        (dict(updates=21), "21 updates do not divide into 2 validations"),
        (dict(updates=0), "updates 0 must be a whole number"),
        (dict(seeds=[]), "at least one seed"),
        (dict(seeds=[1, 100]), "the grid's seed 100 is also a seed of the final runs"),
        (dict(further={"seeds": [100], "models": ["rk2"]}), "the grid's seed 100 is also a seed of the final runs"),
        (dict(further={"seeds": [3], "models": ["rk4"]}), "further seeds for rk4, which is none of the models"),
        (dict(grid={"updates": 4}), "at least one seed and one learning rate"),
        (dict(grid={"updates": 0, "rates": [1e-3, 2e-3]}), "a grid of 0 updates cannot choose among 2 rates"),
        (dict(update=3), "own.yaml: update is no key of it; the keys are"),
        (dict(shape=None), "own.yaml: shape is missing"),
    ],
)
def test_refusals(folder, changes, sentence):
    with pytest.raises(StudyError, match=sentence):
        load("own", folder(**changes))


def test_refuses_a_file_that_is_missing_or_no_yaml(folder, tmp_path):
    with pytest.raises(StudyError, match="absent.yaml: No such file"):
        load("absent", folder())
    (tmp_path / "own.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(StudyError, match="own.yaml is not YAML"):
        load("own", str(tmp_path))
