"""Errors of options: said below, signed by whoever knows the name."""

import pytest

from fairseq_implicit.families.flags import Flags
from fairseq_implicit.options import OptionError, check_choice, named

FLAGS = Flags("ode", total_time="ode_time", stage_norm="rk_norm")


def test_an_error_and_the_options_in_its_sentence_take_the_flags_names():
    with pytest.raises(OptionError) as caught, FLAGS.naming():
        raise OptionError("total_time", "it is long: set `steps` 2 and `stage_norm`, or run `pip install more`.")
    assert str(caught.value) == "--ode-time: it is long: set --ode-steps 2 and --rk-norm, or run `pip install more`."
    assert caught.value.option == "--ode-time"


def test_parts_of_parts_are_named_from_within_outwards_and_once():
    with pytest.raises(OptionError, match="^--ode-adjoint-tol: too small"):
        with FLAGS.naming(), FLAGS.naming(), named("adjoint_{}".format):
            raise OptionError("tol", "too small.")


def test_a_subclass_stays_what_it_is():
    class Special(OptionError):
        pass

    with pytest.raises(Special, match="^--ode-steps: none"), FLAGS.naming():
        raise Special("steps", "none.")


def test_a_choice_is_listed():
    check_choice("solver", "picard", ("picard", "anderson"))
    with pytest.raises(OptionError, match="solver: 'newton' is unknown: choose one of picard, anderson"):
        check_choice("solver", "newton", ("picard", "anderson"))
