"""The promises of the design under faults, in two hundred worlds of a minute and a half each.

To look at one world: ``pytest tests/simulation -k 'seed and 17'``.
"""

import pytest

from tests.simulation.world import World


@pytest.mark.parametrize("seed", range(200))
def test_every_promise_is_kept(seed: int) -> None:
    world = World(seed)
    try:
        world.play()
    except Exception as error:
        story = "\n".join(world.stage.story[-60:])
        raise AssertionError(f"seed {seed}: {error}\n{story}") from error


def test_the_same_seed_tells_the_same_story() -> None:
    stories = []
    for _ in range(2):
        world = World(7)
        world.play()
        stories.append(world.stage.story)
    assert stories[0] == stories[1]
