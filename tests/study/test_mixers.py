"""The comparison of the mixers: everyone is there, at equal parameters."""

import os
import re

import pytest
import yaml
from bert_study import results
from bert_study.plan import StudyError, load
from bert_study.widths import matched_width

from fairseq_implicit.fields.mixers import MIXERS
from tests.conftest import ROOT
from tests.huggingface.tiny import CONFIGS, fairseq_model

FOLDER = os.path.join(ROOT, "examples", "mixers")


@pytest.fixture(scope="module")
def plan():
    return load("mixers", FOLDER)


def test_every_mixer_has_a_row(plan):
    text = open(os.path.join(FOLDER, "models.yaml"), encoding="utf-8").read()
    keys = re.findall(r"^  (\S+):$", text, re.M)
    assert len(set(keys)) == len(keys), "YAML keeps the last of two models of one name"
    rows = yaml.safe_load(text)
    assert {model.flags["mixer"] for model in plan.models.values()} == set(MIXERS)
    assert set(rows["models"]) == set(plan.models)


def test_models_that_differ_in_their_mixer_have_the_same_number_of_parameters(plan):
    counts = {}
    for run in plan.finals(results.best_rates(plan, {})):
        flags = {name.replace("-", "_"): value for name, value in plan.flags(run).items()}
        arch = flags.pop("arch")
        known = {
            name: value for name, value in flags.items() if name in CONFIGS[arch].options_class.__dataclass_fields__
        }
        model = fairseq_model(arch, **{**known, "max_positions": 32})
        counts[run.model.name] = sum(each.numel() for each in model.parameters())
    assert counts.keys() == plan.models.keys()
    for name, count in counts.items():
        assert count == pytest.approx(counts[plan.reference], rel=0.01), name


def test_the_one_rate_is_taken_untried(plan):
    assert plan.trials() == [] and set(results.best_rates(plan, {}).values()) == {6e-3}


def test_a_mixer_of_too_many_parameters_cannot_be_matched(plan):
    base = {**plan.flags(plan.finals({"attention": 1e-3})[0])}
    wide = {**base, "mixer": "wide-attention", "encoder-attention-heads": 16}
    with pytest.raises(ValueError, match="without any feed-forward part it has more parameters than the reference"):
        matched_width(wide, base)
    too_wide = load("mixers", FOLDER, shape={**plan.shape, "encoder-attention-heads": 16})
    with pytest.raises(StudyError, match="model wide-attention: without any feed-forward part"):
        too_wide.flags(too_wide.finals({"wide-attention": 1e-3})[0])
