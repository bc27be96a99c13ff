"""Environments and registries: reading, making, spreading, entering."""

from __future__ import annotations

from typing import cast

from kohaku_daemon.core.cluster.environments import (
    find_environment,
    presences,
    show_environment,
    view_environment,
)
from kohaku_daemon.core.cluster.events import (
    CreateAsked,
    DeleteAsked,
    PackAsked,
    PullAsked,
    RegistryRemoveAsked,
    RegistrySetAsked,
)
from kohaku_daemon.core.cluster.registries import view_registries
from kohaku_daemon.host.handlers.rows import fit
from kohaku_daemon.host.parts import Call, Parts
from protocol.errors import KohakuError
from protocol.messages.environment import (
    CreateEnvironment,
    EnvironmentList,
    EnvironmentResult,
    ListEnvironments,
    ListRegistries,
    OneEnvironment,
    OneRegistry,
    OpenShell,
    PullEnvironment,
    Pulling,
    RegistryList,
    SetRegistry,
)
from protocol.messages.stream import Ticket
from protocol.models.environment import Environment, RegistryAccount


async def list_rows(parts: Parts, after: str = "") -> list[Environment]:
    """Give the environments whose names come after one, by name, with how far each work is."""
    state = parts.state
    shown = await parts.loop.read(
        lambda: [
            show_environment(state, name) for name in sorted(state.environments) if name > after
        ]
    )
    return [parts.workshop.with_progress(one) for one in shown if one is not None]


async def list_environments(call: Call, params: ListEnvironments) -> EnvironmentList:
    """Give a page of environments."""
    rows = await list_rows(call.parts, params.after)
    count = fit(rows)
    return EnvironmentList(tuple(rows[:count]), more=count < len(rows))


async def show(call: Call, params: OneEnvironment) -> EnvironmentResult:
    """Give one environment, with where its newest version is."""
    state = call.parts.state

    def view() -> Environment:
        record = find_environment(state, params.environment)
        return view_environment(record, presences(state, record))

    shown = await call.parts.loop.read(view)
    return EnvironmentResult(call.parts.workshop.with_progress(shown))


async def create(call: Call, params: CreateEnvironment) -> EnvironmentResult:
    """Begin to make an environment."""
    await call.parts.workshop.check()
    event = CreateAsked(call.actor, params.environment, params.image)
    return EnvironmentResult(cast("Environment", await call.ask(event)))


async def pack(call: Call, params: OneEnvironment) -> EnvironmentResult:
    """Begin to pack an environment."""
    await call.parts.workshop.check()
    event = PackAsked(call.actor, params.environment)
    return EnvironmentResult(cast("Environment", await call.ask(event)))


async def pull(call: Call, params: PullEnvironment) -> Pulling:
    """Bring the newest version to nodes."""
    event = PullAsked(call.actor, params.environment, params.nodes)
    return cast("Pulling", await call.ask(event))


async def shell(call: Call, params: OpenShell) -> Ticket:
    """Give a ticket to run a command in an environment."""
    parts = call.parts
    outcome = "ok"
    try:
        await parts.workshop.enter(params.environment)
        return parts.shells.ticket(params, call.actor.user)
    except KohakuError as error:
        outcome = error.code
        raise
    finally:
        if call.audit is not None:
            parts.loop.audit(call.audit, outcome)


async def delete(call: Call, params: OneEnvironment) -> EnvironmentResult:
    """Remove an environment."""
    event = DeleteAsked(call.actor, params.environment)
    return EnvironmentResult(cast("Environment", await call.ask(event)))


async def list_registries(call: Call, params: ListRegistries) -> RegistryList:
    """Give the names the cluster has at registries."""
    state = call.parts.state
    return RegistryList(await call.parts.loop.read(lambda: view_registries(state)))


async def set_registry(call: Call, params: SetRegistry) -> RegistryList:
    """Take a name at a registry."""
    event = RegistrySetAsked(call.actor, params.registry, params.username, params.password)
    return RegistryList(cast("tuple[RegistryAccount, ...]", await call.ask(event)))


async def remove_registry(call: Call, params: OneRegistry) -> RegistryList:
    """Forget a name at a registry."""
    event = RegistryRemoveAsked(call.actor, params.registry)
    return RegistryList(cast("tuple[RegistryAccount, ...]", await call.ask(event)))
