"""Draws a plan from a seed.

Each seed uses only some kinds of trouble and some kinds of tasks, chosen by it: worlds that
have a little of everything meet fewer of the corners where two things happen often.

Knows: what is likely, and what can be asked of given machines.
Does not know: how any of it is played.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Final

from tests.simulation.plan import (
    ROUGH_S,
    Act,
    AskAgain,
    Away,
    ClockJump,
    Command,
    Crowd,
    Cut,
    DiskFull,
    Drain,
    EndBatch,
    Explain,
    Flood,
    GpuFault,
    HolderDies,
    HostDies,
    MachinePlan,
    Mute,
    Plan,
    Relabel,
    Remove,
    Repeat,
    RunnerDies,
    Slow,
    StartTrouble,
    Steer,
    Submit,
)

_DOWN_S: Final = (0.1, 0.1, 1.0, 5.0, 15.0, 30.0)
_OFF_S: Final = (0.0, 0.0, 0.0, 0.4, -3.0, 45.0, -90.0, 3600.0)
_JUMP_S: Final = (0.5, -0.5, 8.0, -8.0, 60.0, -60.0, 7200.0, -3600.0)
#: Number of the first submission of a chain; others are below.
_CHAINED: Final = 700


class Dice(Random):
    """Chance, and the moments at which much happens at once.

    Most of what is hard to get right needs two or three things within a second, and things
    drawn evenly over a minute hardly ever meet.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        hot = self.choice((0, 1, 2, 4))
        self._hot = [self.uniform(1.0, ROUGH_S * 0.8) for _ in range(hot)]

    def moment(self) -> float:
        """Choose when something happens."""
        if self._hot and self.random() < 0.6:
            at = self.choice(self._hot) + self.expovariate(1 / self.choice((0.05, 0.5, 4.0)))
            return round(min(at, ROUGH_S * 0.9), 3)
        return round(self.uniform(0.0, ROUGH_S * 0.9), 3)


def draw(seed: int) -> Plan:
    """Draw the world of a seed."""
    dice = Dice(seed)
    machines = _machines(dice)
    submissions = _submissions(dice, machines)
    acts: list[Act] = [*submissions, *_steering(dice, submissions)]
    share = dice.choice((0.1, 0.2, 0.5))
    if dice.random() < 0.06:
        acts.append(_flood(dice, machines, len(submissions)))
    elif dice.random() < 0.06:
        acts.append(Crowd(dice.moment(), len(submissions), 80))
    kinds = [kind for kind in _TROUBLES if dice.random() < share] or [_host_dies, _runner_dies]
    acts += [
        dice.choice(kinds)(dice, dice.moment(), dice.choice(machines))
        for _ in range(dice.choice((0, 3, 6, 12, 20, 30)))
    ]
    for _ in range(dice.choice((0, 1, 3))):
        acts += _knot(dice, machines, dice.choice(submissions))
    acts += [Explain(dice.moment()) for _ in range(dice.randrange(5))]
    off_s = dice.choice(_OFF_S)
    piece = dice.choice((1, 1, 2, 3, 500))
    if dice.random() < 0.2:
        submit = dice.choice(submissions)
        after_s = dice.choice((0.0, 0.02, 0.1, 1.0, 10.0)) * dice.random()
        acts.append(EndBatch(min(submit.at + after_s, ROUGH_S), submit.number))
    if dice.random() < 0.1:
        acts += _chain(dice)
    return Plan(
        seed,
        machines,
        tuple(sorted(acts, key=lambda act: act.at)),
        host_clock_off_s=off_s,
        piece=piece,
    )


# Machines and tasks -----------------------------------------------------------------


def _machines(dice: Dice) -> tuple[MachinePlan, ...]:
    with_gpus = dice.random() < 0.4
    return tuple(
        MachinePlan(
            name=f"n{number + 1}",
            cores=dice.choice((2, 4, 4, 4)),
            numa=dice.choice((1, 2)),
            gpus=dice.choice((0, 2, 4)) if with_gpus else 0,
            zone=dice.choice("aab"),
            clock_off_s=dice.choice(_OFF_S),
        )
        for number in range(dice.choice((1, 2, 2, 3, 3)))
    )


def _submissions(dice: Dice, machines: tuple[MachinePlan, ...]) -> list[Submit]:
    gangs = dice.choice((0.0, 0.0, 0.3))
    return [
        (_gang if dice.random() < gangs else _submission)(dice, machines, number)
        for number in range(dice.randint(2, 8))
    ]


def _flood(dice: Dice, machines: tuple[MachinePlan, ...], number: int) -> Flood:
    """Draw one wide task among small ones that keep every machine busy."""
    cores = sum(machine.cores for machine in machines)
    return Flood(
        dice.uniform(0.0, ROUGH_S * 0.5),
        number,
        # Not ada: what she had before may have cost her turns to come.
        owner=dice.choice(("eve", "bob")),
        cores=max(machine.cores for machine in machines),
        every_s=3.0 / cores,
    )


def _command(dice: Dice, longest_s: float = 40.0) -> Command:
    lasts_s = round(min(dice.expovariate(1 / 9.0), longest_s), 3) + 0.01
    codes = dice.choice(((0,), (0,), (0,), (3,), (3, 0), (1, 1, 0), (-9,), (-9, 0)))
    return Command(lasts_s, codes, dice.choice((-1, -1, -1, 0, 143, -2, -2)))


def _submission(dice: Dice, machines: tuple[MachinePlan, ...], number: int) -> Submit:
    roomy = dice.choice(machines)
    command = _command(dice)
    killed_after_s = round(dice.uniform(0, 30), 3) if dice.random() < 0.15 else -1.0
    if dice.random() < 0.2:
        # Never ends by itself, and is left alone until the books were compared with the truth.
        command = replace(command, lasts_s=0.0)
        killed_after_s = dice.choice((killed_after_s, ROUGH_S * 2))
        killed_after_s = ROUGH_S * 2 if killed_after_s < 0 else killed_after_s
    submit = Submit(
        at=dice.moment(),
        number=number,
        owner=dice.choice(("ada", "ada", "bob")),
        command=command,
        cores=dice.choice((0, 1, 1, 1, roomy.cores // 2, roomy.cores)),
        gib=dice.choice((0, 0, 0, 1, 3, roomy.gib)),
        gpus=dice.randint(0, roomy.gpus) if dice.random() < 0.5 else 0,
        zone=roomy.zone if dice.random() < 0.2 else "",
        priority=dice.choice((0, 0, 0, 0, 5, -3)),
        killed_after_s=killed_after_s,
    )
    submit = replace(submit, **_wishes(dice, number))  # type: ignore[arg-type]
    if dice.random() < 0.65:
        return replace(submit, array=dice.choice((0, 0, 1, 2, 3, 4)))
    return replace(submit, targets=_targets(dice, machines, submit))


def _wishes(dice: Dice, number: int) -> dict[str, object]:
    """Choose what is asked for beyond running once."""
    wishes: dict[str, object] = {}
    if number and dice.random() < 0.2:
        wishes["after"] = tuple({dice.randrange(number) for _ in range(dice.choice((1, 1, 2)))})
        wishes["after_first"] = dice.random() < 0.5
    if dice.random() < 0.15:
        wishes["time_limit_s"] = float(dice.choice((1, 3, 8, 20)))
    if dice.random() < 0.3:
        wishes["retries"] = dice.choice((1, 1, 2))
    if dice.random() < 0.3:
        wishes["requeue_on_lost"] = True
    return wishes


def _gang(dice: Dice, machines: tuple[MachinePlan, ...], number: int) -> Submit:
    """Draw a gang that idle machines could hold."""
    cores = dice.choice((1, 1, 2))
    most = sum(machine.cores // cores for machine in machines)
    return Submit(
        dice.moment(),
        number,
        dice.choice(("ada", "bob")),
        _command(dice),
        cores=cores,
        array=dice.randint(min(2, most), most),
        gang=True,
        time_limit_s=dice.choice((0.0, 0.0, 5.0)),
    )


def _targets(dice: Dice, machines: tuple[MachinePlan, ...], submit: Submit) -> tuple[str, ...]:
    """Choose where its tasks have to be."""
    places = [
        place
        for machine in machines
        if submit.cores <= machine.cores
        and submit.gpus <= machine.gpus
        and submit.zone in {"", machine.zone}
        for place in _places(machine, submit)
    ]
    return tuple(dice.choices(places, k=dice.randint(1, 3)))


def _places(machine: MachinePlan, submit: Submit) -> list[str]:
    name = machine.name
    places = [name]
    fits_numa = (
        submit.cores <= machine.cores // machine.numa and submit.gib <= machine.gib // machine.numa
    )
    if fits_numa:
        places += [f"{name}:{node}" for node in range(machine.numa)]
    if submit.gpus:
        indices = ",".join(map(str, range(machine.gpus - submit.gpus, machine.gpus)))
        places += [f"{name}::{indices}"]
    return places


def _steering(dice: Dice, submissions: list[Submit]) -> list[Act]:
    acts: list[Act] = []
    for _ in range(dice.choice((0, 0, 2, 6))):
        submit = dice.choice(submissions)
        verb = dice.choice(("kill", "pause", "pause", "resume", "retry"))
        at = dice.choice((submit.at + dice.expovariate(1 / 8.0), dice.moment()))
        acts.append(
            Steer(min(at, ROUGH_S), verb, submit.number, dice.randrange(max(submit.size, 1)))
        )
    for _ in range(dice.choice((0, 0, 0, 2))):
        submit = dice.choice(submissions)
        acts.append(
            AskAgain(
                min(submit.at + dice.choice((0.0, 0.01, 0.1, 20.0)), ROUGH_S),
                submit.number,
                dice.randint(1, 50),
                dice.random() < 0.3,
            )
        )
    return acts


def _knot(dice: Dice, machines: tuple[MachinePlan, ...], submit: Submit) -> list[Act]:
    """Draw several things that happen to one task and one machine in close succession."""
    named = submit.targets[0].split(":")[0] if submit.targets else ""
    machine = next((one for one in machines if one.name == named), dice.choice(machines))
    begin = submit.at + dice.choice((0.05, 0.1, 0.3, 2.0, 8.0))
    acts: list[Act] = []
    for _ in range(dice.randint(2, 4)):
        at = min(begin + dice.expovariate(1 / dice.choice((0.05, 0.5, 5.0))), ROUGH_S * 0.95)
        if dice.random() < 0.4:
            verb = dice.choice(("kill", "kill", "pause", "resume", "retry"))
            index = dice.randrange(submit.size)
            acts.append(Steer(at, verb, submit.number, index))
            if dice.random() < 0.5:
                after_s = dice.choice((0.2, 0.3, 2.0)) + 0.2 * dice.random()
                apart_s = dice.choice((0.0, 30.0))
                acts.append(HolderDies(at + after_s, submit.number, index, 0, apart_s))
        else:
            kind = dice.choice((_host_dies, _runner_dies, _runner_dies, _cut, _slow, _mute, _away))
            acts.append(kind(dice, at, machine))
    return acts


def _chain(dice: Dice) -> list[Act]:
    """Draw a batch that waits in vain, and a host that dies when it falls."""
    first = Submit(dice.moment(), _CHAINED, "ada", Command(dice.choice((0.5, 2.0)), (3,)), cores=0)
    then = Submit(first.at, _CHAINED + 1, "ada", Command(1.0), array=4, after=(_CHAINED,))
    over = first.at + first.command.lasts_s + dice.uniform(0.0, 0.3)
    return [first, then, HostDies(over, dice.randrange(20), dice.choice(_DOWN_S))]


# Troubles ---------------------------------------------------------------------------


def _host_dies(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return HostDies(at, dice.randrange(12), dice.choice(_DOWN_S))


def _runner_dies(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return RunnerDies(
        at,
        machine.name,
        dice.randrange(10),
        dice.choice(_DOWN_S),
        reboot=dice.random() < 0.2,
    )


def _cut(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Cut(
        at,
        machine.name,
        host_notices_s=dice.choice((0.001, 0.1, 3.0, 12.0)),
        runner_notices_s=dice.choice((0.001, 0.1, 3.0, 12.0)),
        loses=dice.random() < 0.5,
        apart_s=dice.choice((0.0, 0.0, 5.0, 15.0, 35.0)),
    )


def _slow(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Slow(
        at,
        machine.name,
        dice.choice(("host", "runner")),
        dice.choice((0.5, 3.0, 8.0, 20.0)),
        dice.choice((0.1, 1.0, 5.0)),
    )


def _repeat(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Repeat(at, machine.name, dice.choice((1.0, 10.0)))


def _mute(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Mute(at, machine.name, dice.choice((5.0, 25.0, 45.0)))


def _clock_jump(dice: Dice, at: float, machine: MachinePlan) -> Act:
    name = dice.choice(("host", machine.name))
    return ClockJump(at, name, dice.choice(_JUMP_S))


def _gpu_fault(dice: Dice, at: float, machine: MachinePlan) -> Act:
    if not machine.gpus:
        return _runner_dies(dice, at, machine)
    return GpuFault(
        at,
        machine.name,
        dice.randrange(machine.gpus),
        dice.choice((5.0, 20.0)),
        gone=dice.random() < 0.3,
    )


def _disk_full(dice: Dice, at: float, machine: MachinePlan) -> Act:
    name = dice.choice(("host", machine.name))
    return DiskFull(at, name, dice.choice((0.5, 5.0, 20.0)))


def _start_trouble(dice: Dice, at: float, machine: MachinePlan) -> Act:
    how = dice.choice(("clean", "before", "after"))
    return StartTrouble(at, machine.name, how, dice.choice((1, 8)))


def _away(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Away(at, machine.name, dice.choice((0.05, 0.5, 3.0, 12.0)))


def _drain(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Drain(at, machine.name, dice.choice((2.0, 15.0, 40.0)))


def _relabel(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Relabel(at, machine.name, dice.choice((2.0, 20.0)))


def _remove(dice: Dice, at: float, machine: MachinePlan) -> Act:
    return Remove(
        at,
        machine.name,
        dice.random() < 0.6,
        dice.choice((0.5, 8.0, 25.0)),
    )


_TROUBLES: Final[tuple[Callable[[Dice, float, MachinePlan], Act], ...]] = (
    _host_dies, _host_dies, _runner_dies, _runner_dies, _cut, _cut, _slow, _repeat, _mute,
    _clock_jump, _gpu_fault, _disk_full, _start_trouble, _away, _drain, _relabel,
    _remove,
)  # fmt: skip
