"""The fuzzing targets of scripts/fuzz.py on a few examples each, and the inputs that fuzzing has found."""

import runpy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "fuzz.py"), run_name="fuzz")


@pytest.mark.parametrize("name", FUZZ["TARGETS"])
def test_a_few_examples_of_each_target(name):
    few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    few(FUZZ["TARGETS"][name])()


@pytest.mark.parametrize("name", FUZZ["RAW"])
def test_what_fuzzing_begins_from(name):
    target, seeds = FUZZ["RAW"][name]
    for content in seeds():
        target(content)
        target(content[:-7])
