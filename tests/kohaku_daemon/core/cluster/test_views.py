"""What people are shown: why a task waits, where it stands, how it ended, what needs a look."""

import pytest
from msgspec.structs import replace

from kohaku_daemon.core.cluster.events import RunnerBeat, RunnerGone, RunnerReported, Verb
from kohaku_daemon.core.cluster.records import TaskRecord
from kohaku_daemon.core.cluster.views import (
    brief_task,
    count_reasons,
    describe,
    describe_exit,
    explain_task,
    redact_task,
    view_status,
    view_task,
)
from protocol.ids import NodeName
from protocol.messages.runner import AttemptState
from protocol.models.access import Role
from protocol.models.node import BackendInfo, Claimed, GpuReading, Readings
from protocol.models.target import parse_target
from protocol.models.task import Cause, Exit, Explanation, Mount, NodeVerdict, TaskState
from tests.support.builders import (
    GIB,
    OPERATOR,
    a_cluster,
    a_node,
    a_spec,
    a_submission,
    a_user,
    an_inventory,
)
from tests.support.playbook import Playbook


def live(play: Playbook, number: int) -> TaskRecord:
    return play.engine.state.tasks[play.id(number)]


def explained(play: Playbook, number: int) -> Explanation:
    return explain_task(play.engine.state, live(play, number))


def verdict(node: str, *reasons: str, fits: bool = False, ever: bool = True) -> NodeVerdict:
    return NodeVerdict(NodeName(node), fits, ever, reasons)


def test_a_waiting_task_is_explained_node_by_node() -> None:
    nodes = [a_node("n1"), a_node("n2", draining=True), a_node("n3", an_inventory(1))]
    play = Playbook(a_cluster(nodes))
    play.run(a_submission(a_spec(cores=3)))
    play.tell(a_submission(a_spec(cores=2), request_id="the-next", array=3))
    play.place()
    assert explained(play, 4) == Explanation(
        play.id(4),
        TaskState.QUEUED,
        "waits for room: 1 of 3 nodes could hold it when idle; n2 is out of service",
        ahead=2,
        nodes=(
            verdict("n1", "2 cores wanted, 1 of 4 free"),
            verdict("n2", "the node is draining"),
            verdict("n3", "2 cores wanted, the node has 1", ever=False),
        ),
    )


def test_a_task_that_waits_for_gpus_is_told_whose_task_has_them() -> None:
    play = Playbook(a_cluster([a_node("n1", an_inventory(8, gpus=2))]))
    play.run(a_submission(a_spec(gpus=1)))
    play.run(a_submission(a_spec(gpus=1), request_id="of-bob-1", actor=a_user("bob")))
    play.tell(a_submission(a_spec(gpus=1), request_id="the-next"))
    play.tell(a_submission(a_spec(), request_id="by-index", targets=["n1::1"]))
    play.place()
    alice, bob = f"task {play.id(1)} of ada", f"task {play.id(2)} of bob"
    why = f"1 GPU wanted, 0 of 2 free: GPU 0 is held by {alice}, GPU 1 is held by {bob}"
    assert explained(play, 3).nodes == (verdict("n1", why),)
    assert explained(play, 4).nodes == (verdict("n1", f"GPU 1 is held by {bob}"),)
    assert explained(play, 1).summary == "runs on n1; it holds core 0, GPU 0"


def test_where_a_task_lies_is_told_on_a_machine_of_several_numa_nodes() -> None:
    play = Playbook(a_cluster([a_node("n1", an_inventory(8, gpus=2, numa=2))]))
    play.run(a_submission(a_spec(cores=2, gpus=1), targets=["n1:1"]))
    assert explained(play, 1).summary == (
        "runs on n1; it holds cores 4-5 of NUMA node 1, GPU 1 of NUMA node 1"
    )


def test_a_node_kept_free_for_somebody_else_says_for_whom() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.run(a_submission(a_spec(cores=1)))
    play.tell(a_submission(a_spec(cores=4), request_id="the-big-one"))
    play.tell(a_submission(a_spec(cores=1), request_id="the-small-one"))
    play.place()
    why = f"kept free for task {play.id(2)}, which waits longer or has higher priority"
    assert explained(play, 3).nodes == (verdict("n1", why),)
    assert explained(play, 3).summary == "waits for room: the one node could hold it when idle"
    assert explained(play, 2).nodes == (verdict("n1", "4 cores wanted, 3 of 4 free"),)


def test_what_nobody_can_hold_any_more_says_so() -> None:
    play = Playbook(a_cluster())
    play.tell(a_submission())
    assert explained(play, 1).summary == "waits: no node has joined the cluster"
    play = Playbook(a_cluster([a_node("n1", an_inventory(0))], online=False))
    play.tell(a_submission())
    assert explained(play, 1).summary == "waits: no node there is could ever hold it"


def test_what_a_task_waits_for_while_no_node_is_there() -> None:
    play = Playbook(a_cluster([a_node("n1"), a_node("n2")], online=False))
    play.tell(a_submission(targets=["n1"]))
    play.tell(a_submission(request_id="the-next"))
    assert explained(play, 1).summary == "waits for n1: the node is offline"
    words = "waits: the 2 nodes that could hold it are out of service"
    assert explained(play, 2).summary == words


def test_where_a_task_stands_in_each_state() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    said = []

    def note() -> None:
        said.append(explained(play, 1).summary)

    play.tell(a_submission())
    play.place()
    note()
    play.hear(1, AttemptState.ACCEPTED)
    note()
    play.hear(1, AttemptState.ACCEPTED, note="preparing 43 %")
    note()
    for state in (AttemptState.RUNNING, AttemptState.PAUSED):
        play.hear(1, state)
        note()
    play.kill(1)
    note()
    play.tell(RunnerGone(NodeName("n1"), "its connection closed"))
    note()
    assert said == [
        "ordered, and not confirmed yet, on n1",
        "makes ready on n1",
        "makes ready on n1: preparing 43 %",
        "runs on n1",
        "is held still on n1",
        "is held still on n1; ada has asked for its end",
        "is held still on n1, which is offline; ada has asked for its end",
    ]
    play.hear(1, AttemptState.ENDED, exit_=Exit(Cause.SIGNALLED, signal=9))
    assert describe(play.task(1), a_spec()) == "killed by ada with signal 9"


@pytest.mark.parametrize(
    ("exit_", "words"),
    [
        (Exit(Cause.EXITED, code=0), "exited with 0"),
        (
            Exit(Cause.EXITED, code=0, oom_kills=2),
            "exited with 0; the kernel killed 2 of its processes for memory",
        ),
        (Exit(Cause.SIGNALLED, signal=11), "ended by signal 11"),
        (Exit(Cause.KILLED, signal=15), "killed by ada with signal 15"),
        (Exit(Cause.KILLED, message="it never began"), "killed by ada: it never began"),
        (Exit(Cause.START_FAILED, message="no such file"), "could not be started: no such file"),
        (Exit(Cause.NODE_FAILED, message="it rebooted"), "its node failed: it rebooted"),
        (Exit(Cause.NODE_REMOVED), "its node was removed from the cluster"),
    ],
)
def test_every_end_has_its_sentence(exit_: Exit, words: str) -> None:
    assert describe_exit(exit_, a_spec(), "ada") == words


def test_running_out_of_memory_tells_the_limit_if_there_was_one() -> None:
    exit_ = Exit(Cause.OOM, signal=9)
    limited = describe_exit(exit_, a_spec(memory=64 * 10**6), "")
    assert limited.startswith("ran out of memory: the kernel ended it at its limit of 6")
    assert describe_exit(exit_, a_spec(), "") == (
        "ran out of memory: the kernel ended it at its limit"
    )


def test_a_task_is_shown_with_its_row_its_target_and_on_request_its_history() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission(a_spec(env={"A": "1"}), rows=({"B": "2"}, {"A": "3"})))
    batch = play.kept.batches[play.answer.batch]
    assert view_task(play.task(1), batch).spec.env == {"A": "1", "B": "2"}
    assert view_task(play.task(2), batch).spec.env == {"A": "3"}
    assert view_task(play.task(1), batch).history == ()
    assert view_task(play.task(1), batch, history=True).history == play.task(1).history
    play.tell(a_submission(request_id="over-targets", targets=["n1:0"]))
    batch = play.kept.batches[play.answer.batch]
    assert view_task(play.task(3), batch).target == parse_target("n1:0")


def test_an_asked_end_is_shown_until_it_came() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.run(a_submission())
    (batch,) = play.kept.batches.values()
    play.kill(1)
    assert view_task(play.task(1), batch).kill_asked
    play.hear(1, AttemptState.ENDED)
    assert not view_task(play.task(1), batch).kill_asked


@pytest.mark.parametrize(
    ("actor", "sees"),
    [
        (a_user("ada"), True),
        (a_user("bob"), False),
        (a_user("ada", Role.VIEWER), False),
        (OPERATOR, True),
        (a_user("root", Role.ADMIN), True),
    ],
)
def test_who_sees_commands_and_variables(actor: object, sees: bool) -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission(a_spec(env={"TOKEN": "secret"}, workdir="/home/ada", cores=2)))
    (batch,) = play.kept.batches.values()
    # No node here would let it have one, so it is put in afterwards.
    mounts = (Mount("/home/ada/data", "/data"),)
    task = view_task(play.task(1), replace(batch, spec=replace(batch.spec, mounts=mounts)))
    shown = redact_task(task, actor)  # type: ignore[arg-type]
    assert (shown == task) == sees
    assert ("secret" in repr(shown)) == sees
    assert ("/home/ada" in repr(shown)) == sees
    assert shown.spec.cores == 2


def test_a_row_of_a_list_is_small_whatever_the_task_is() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission(a_spec(command=("sh", "-c", "x" * 50_000), env={"A": "y" * 50_000})))
    (batch,) = play.kept.batches.values()
    brief = brief_task(view_task(play.task(1), batch))
    assert len(repr(brief)) < 3000
    assert brief.spec.command[:2] == ("sh", "-c")
    assert brief.spec.command[2].endswith("x\N{HORIZONTAL ELLIPSIS}")
    mounts = tuple(Mount("/" + "s" * 4000, f"/{number}") for number in range(4))
    large = replace(batch, spec=a_spec(mounts=mounts))
    assert len(repr(brief_task(view_task(play.task(1), large)))) < 1500
    play.tell(a_submission(request_id="a-short-one"))
    batch = play.kept.batches[play.answer.batch]
    short = view_task(play.task(2), batch)
    assert brief_task(short) is short


def test_the_cluster_at_a_glance() -> None:
    sick = an_inventory(2, backends=(BackendInfo("docker", False, "no daemon answers"),))
    nodes = [a_node("n1", an_inventory(gpus=2)), a_node("n2", sick), a_node("n3", draining=True)]
    play = Playbook(a_cluster(nodes))
    play.run(a_submission(a_spec(cores=2, memory=GIB, gpus=1)))
    play.tell(a_submission(a_spec(cores=4), request_id="the-next"))
    faulty = Readings(gpus=(GpuReading("GPU-1", fault="fell off the bus"),))
    play.tell(RunnerBeat(NodeName("n1"), faulty))
    play.tell(RunnerGone(NodeName("n3"), "the link broke"))
    status = view_status(play.engine.state, "1.0", 5.0, {"failed": 7})
    assert status.nodes == {"online": 2, "offline": 1}
    assert status.draining == 1
    assert status.tasks == {"running": 1, "queued": 1, "failed": 7}
    assert status.capacity == Claimed(tasks=512, cores=6, memory=16 * GIB, gpus=2)
    assert status.claimed == Claimed(tasks=1, cores=2, memory=GIB, gpus=1)
    assert status.problems == (
        "node n1: GPU GPU-1 is out of service: fell off the bus",
        "node n2: backend docker: no daemon answers",
        "node n3 is offline",
    )


def test_an_empty_cluster_says_how_to_let_a_node_in() -> None:
    (problem,) = view_status(a_cluster().state, "1.0", 5.0, {}).problems
    assert problem == "no node has joined; let one in with: kohaku node join-token"


def test_steering_shows_up_in_the_history() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.run(a_submission())
    play.steer(Verb.KILL, 1)
    change = play.task(1).history[-1]
    assert (change.cause, change.actor, change.state) == ("end asked for", "ada", "running")


def test_waiting_tasks_are_counted_by_what_they_wait_for() -> None:
    play = Playbook(a_cluster([a_node("n1"), a_node("n2", draining=True)]))
    first = a_submission(a_spec(cores=4))
    play.run(first)
    play.tell(a_submission(a_spec(cores=4), request_id="request-2", array=2))
    play.tell(a_submission(a_spec(), request_id="request-3", targets=["n2"]))
    play.tell(a_submission(a_spec(), request_id="request-4", after=(play.id(1),), array=3))
    play.tell(a_submission(a_spec(), request_id="request-5", gang=True, array=4))
    play.run(a_submission(a_spec(cores=0, retries=1), request_id="request-6"))
    play.place()
    last = max(play.kept.tasks)
    node = play.kept.tasks[last].node
    failed = play.report(last, AttemptState.ENDED, exit_=Exit(Cause.EXITED, code=1))
    play.tell(RunnerReported(node, (failed,)))
    assert count_reasons(play.engine.state) == {
        "room": 2, "node": 1, "after": 3, "gang": 4, "retry": 1,
    }  # fmt: skip
