"""Makes a world that breaks a promise smaller while it still breaks the same one.

Greedy: what can be left out is left out, the largest parts first, until nothing more can or
the time is up. Which promise is broken has to stay the same, or one bug would be shrunk into
another.

Knows: plans, and that any part of one can be left out.
Does not know: what is checked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from tests.simulation.draw import draw
from tests.simulation.plan import Act, MachinePlan, Plan, Submit
from tests.simulation.stage import BrokenPromise
from tests.simulation.world import REAL, Cast, World

#: Seconds of computing that shrinking may take.
SHRINK_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A world that breaks a promise."""

    plan: Plan
    #: Which promise, the same for every world that breaks it alike.
    rule: str
    text: str
    story: tuple[str, ...]

    def __str__(self) -> str:
        acts = "\n".join(f"  {brief(act)}" for act in self.plan.acts)
        machines = "\n".join(f"  {brief(machine)}" for machine in self.plan.machines)
        story = "\n".join(f"  {line}" for line in self.story[-120:])
        return (
            f"seed {self.plan.seed}: {self.text}\n"
            f"what is left of its machines:\n{machines}\n"
            f"what is left of its happenings, quiet from {self.plan.rough_s:g} s on:\n{acts}\n"
            f"what happened:\n{story}\n"
            f"again: scripts/test tests/simulation --simulation-seed {self.plan.seed}"
        )


def brief(part: Act | MachinePlan) -> str:
    """Write a part of a plan without what goes without saying."""
    said = [
        f"{one.name}={value}"
        for one in fields(part)
        if one.name != "at" and (value := getattr(part, one.name)) != one.default
    ]
    at = f"{part.at:9.3f}  " if not isinstance(part, MachinePlan) else ""
    return f"{at}{type(part).__name__}({', '.join(said)})"


def try_seed(seed: int, cast: Cast = REAL) -> Failure | None:
    """Play one seed; give how it fails, if it does."""
    return try_plan(draw(seed), cast)


def try_plan(plan: Plan, cast: Cast = REAL) -> Failure | None:
    """Play one plan; give how it fails, if it does.

    Anything that is raised counts: an engine must not raise whatever happens.
    """
    world = World(plan, cast)
    try:
        world.play()
    except BrokenPromise as broken:
        return Failure(plan, broken.rule, world.named(str(broken)), tuple(world.story()))
    except Exception as error:  # whatever it is, it is what we look for
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = where.tb_frame.f_code.co_qualname if where is not None else ""
        text = f"{type(error).__name__} in {place}: {error}"
        return Failure(plan, f"{type(error).__name__} in {place}", text, tuple(world.story()))
    return None


def shrink(failure: Failure, cast: Cast = REAL, *, within_s: float = SHRINK_S) -> Failure:
    """Give the smallest world found that fails alike."""
    until = time.monotonic() + within_s
    progress = True
    while progress:
        progress = False
        for plan in _smaller(failure.plan):
            if time.monotonic() > until:
                return failure
            found = try_plan(plan, cast)
            if found is not None and found.rule == failure.rule:
                failure, progress = found, True
                break
    return failure


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Give smaller plans, those that leave out most first."""
    for share in (0.25, 0.5, 0.75, 0.9):
        rough_s = round(plan.rough_s * share, 1)
        acts = tuple(act for act in plan.acts if act.at < rough_s)
        if rough_s >= 1.0 and len(acts) < len(plan.acts):
            yield replace(plan, acts=acts, rough_s=rough_s)
    size = len(plan.acts)
    while size > 0:
        for begin in range(0, len(plan.acts), size):
            yield replace(plan, acts=plan.acts[:begin] + plan.acts[begin + size :])
        size //= 2
    for machine in plan.machines[1:]:
        yield _without(plan, machine)
    if plan.host_clock_off_s:
        yield replace(plan, host_clock_off_s=0.0)
    for index, machine in enumerate(plan.machines):
        for simpler in _simpler_machines(machine):
            machines = (*plan.machines[:index], simpler, *plan.machines[index + 1 :])
            yield replace(plan, machines=machines)
    for index, act in enumerate(plan.acts):
        for easier in _simpler(act):
            yield replace(plan, acts=(*plan.acts[:index], easier, *plan.acts[index + 1 :]))


def _without(plan: Plan, machine: MachinePlan) -> Plan:
    def is_elsewhere(act: Act) -> bool:
        if isinstance(act, Submit):
            return not any(target.split(":")[0] == machine.name for target in act.targets)
        return machine.name not in {getattr(act, "node", ""), getattr(act, "machine", "")}

    return replace(
        plan,
        machines=tuple(one for one in plan.machines if one != machine),
        acts=tuple(filter(is_elsewhere, plan.acts)),
    )


def _simpler_machines(machine: MachinePlan) -> Iterator[MachinePlan]:
    plain = MachinePlan(machine.name)
    for change in ({"clock_off_s": 0.0}, {"gpus": 0}, {"numa": 1}, {"zone": "a"}):
        simpler: MachinePlan = replace(machine, **change)
        if simpler != machine and simpler != plain:
            yield simpler


#: What of a happening may be taken back to nothing, by its name.
_PLAIN: Final[dict[str, Any]] = {
    "array": 0, "cores": 1, "gib": 0, "gpus": 0, "zone": "", "priority": 0, "retries": 0,
    "time_limit_s": 0.0, "gang": False, "requeue_on_lost": False, "step": 0, "apart_s": 0.0,
    "after": (), "killed_after_s": -1.0, "reboot": False, "times": 1,
}  # fmt: skip


def _simpler(act: Act) -> Iterator[Act]:
    for name, plain in _PLAIN.items():
        if getattr(act, name, plain) != plain:
            yield replace(act, **{name: plain})
    if isinstance(act, Submit):
        if len(act.targets) > 1:
            yield replace(act, targets=act.targets[:1])
        if act.array > 1:
            yield replace(act, array=act.array - 1)
        if act.command.codes != (0,):
            yield replace(act, command=replace(act.command, codes=(0,)))
        if act.command.on_term != -1:
            yield replace(act, command=replace(act.command, on_term=-1))
