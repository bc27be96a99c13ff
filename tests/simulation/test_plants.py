"""The simulation finds bugs that were planted on purpose, each within so many seeds."""

from __future__ import annotations

import pytest

from tests.simulation.plants import PLANTS, Plant
from tests.simulation.shrink import Failure, shrink, try_plan, try_seed


def _find(plant: Plant) -> Failure:
    for seed in range(plant.within):
        failure = try_seed(seed, plant.cast)
        if failure is not None:
            return failure
    raise AssertionError(f"{plant} was not found in {plant.within} seeds")


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_a_planted_bug_is_found_and_named_by_its_seed(plant: Plant) -> None:
    failure = _find(plant)
    assert try_seed(failure.plan.seed) is None, "this seed fails without the bug, too"
    again = try_seed(failure.plan.seed, plant.cast)
    assert again == failure
    assert f"seed {failure.plan.seed}: {failure.rule}" in str(failure)


def test_a_failure_is_shrunk_to_what_it_takes() -> None:
    """An answer before the commit takes one submission and nothing else."""
    plant = next(one for one in PLANTS if str(one) == "AnswersEarly")
    found = _find(plant)
    small = shrink(found, plant.cast)
    assert small.rule == found.rule
    assert len(small.plan.acts) == 1
    assert len(small.plan.machines) == 1
    assert try_plan(small.plan) is None
