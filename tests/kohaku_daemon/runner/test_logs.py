"""What output promises: every byte at its offset, or a line of ours that says how many are gone."""

import asyncio
import errno
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.runner import log_holes
from kohaku_daemon.runner.logs import Outputs, TaskLogs
from protocol.errors import NotFound
from protocol.ids import TaskId
from protocol.messages.stream import LogChunk, LogEnd, OpenLogs, Source

KEY = "7-1"
MIB = 2**20
OUT = (Source.STDOUT,)


def lines(first: int, count: int) -> bytes:
    """Make lines of 16 bytes that say their number, so that an offset says what is there."""
    return b"".join(b"%015d\n" % number for number in range(first, first + count))


def expected(offset: int, length: int) -> bytes:
    first = offset // 16
    return lines(first, length // 16 + 2)[offset - first * 16 :][:length]


def logs_in(root: Path, *, cap: int = 64 * MIB, most: int | None = None) -> TaskLogs:
    return TaskLogs(root, cap=cap, keep_s=3600.0, most=most)


def wanted(
    *,
    sources: tuple[Source, ...] = (Source.STDOUT, Source.STDERR),
    stdout_from: int = 0,
    tail_lines: int = 0,
    follow: bool = False,
) -> OpenLogs:
    return OpenLogs(
        task=TaskId(7),
        sources=sources,
        stdout_from=stdout_from,
        tail_lines=tail_lines,
        follow=follow,
    )


def ended() -> bool:
    return False


async def read(
    logs: TaskLogs, question: OpenLogs, is_live: Callable[[], bool] = ended
) -> tuple[list[LogChunk], LogEnd]:
    async with aclosing(logs.read(KEY, question, is_live)) as items:
        found = [item async for item in items]
    *chunks, end = found
    assert isinstance(end, LogEnd)
    return [chunk for chunk in chunks if isinstance(chunk, LogChunk)], end


async def text(logs: TaskLogs, **question: int) -> bytes:
    chunks, _ = await read(logs, wanted(sources=OUT, **question))  # type: ignore[arg-type]
    return b"".join(chunk.data for chunk in chunks)


def is_ours(chunk: LogChunk) -> bool:
    return b"[kohaku: " in chunk.data


def make(logs: TaskLogs, key: str) -> Outputs:
    """Make both files, as a program does that writes to both."""
    outputs = logs.new_paths(key)
    for path in outputs:
        path.touch(0o600)
    return outputs


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


async def test_both_outputs_are_read_whole_in_small_chunks(tmp_path: Path) -> None:
    logs = logs_in(tmp_path)
    outputs = make(logs, KEY)
    append(outputs.stdout, lines(0, 100_000))
    append(outputs.stderr, b"complaint")
    chunks, end = await read(logs, wanted())
    out = [chunk for chunk in chunks if chunk.source is Source.STDOUT]
    assert b"".join(chunk.data for chunk in out) == lines(0, 100_000)
    assert all(chunk.data == expected(chunk.offset, len(chunk.data)) for chunk in out)
    assert max(len(chunk.data) for chunk in out) <= 48 * 1024
    assert [chunk for chunk in chunks if chunk.source is Source.STDERR] == [
        LogChunk(Source.STDERR, 0, b"complaint")
    ]
    assert end == LogEnd(1_600_000, 9)


async def test_one_output_is_read_alone(tmp_path: Path) -> None:
    logs = logs_in(tmp_path)
    outputs = make(logs, KEY)
    append(outputs.stdout, b"out")
    append(outputs.stderr, b"err")
    assert await read(logs, wanted(sources=(Source.STDERR,))) == (
        [LogChunk(Source.STDERR, 0, b"err")],
        LogEnd(0, 3),
    )


async def test_a_launch_that_wrote_nothing_has_empty_output(tmp_path: Path) -> None:
    logs = logs_in(tmp_path)
    assert os.listdir(tmp_path) == []
    async with aclosing(logs.read(KEY, wanted(), ended, is_known=True)) as items:
        assert [item async for item in items] == [LogEnd(0, 0)]
    append(logs.new_paths(KEY).stderr, b"err")
    # It has written, so it was here: what is not there of it is empty.
    assert await read(logs, wanted(sources=OUT)) == ([], LogEnd(0, 0))
    assert await text(logs, tail_lines=5, stdout_from=3) == b""


async def test_following_may_begin_before_anything_was_written(tmp_path: Path) -> None:
    logs = logs_in(tmp_path)
    looks = 0

    def is_live() -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            append(logs.new_paths(KEY).stdout, lines(0, 3))
        return looks < 5

    question = wanted(follow=True)
    async with aclosing(logs.read(KEY, question, is_live, is_known=True)) as items:
        *chunks, end = [item async for item in items]
    assert [chunk.data for chunk in chunks if isinstance(chunk, LogChunk)] == [lines(0, 3)]
    assert end == LogEnd(48, 0)


async def test_output_of_an_earlier_version_is_read_trimmed_and_removed(tmp_path: Path) -> None:
    """It had a folder for each launch; one that began before an update may still write there."""
    logs = logs_in(tmp_path, cap=MIB)
    folder = tmp_path / KEY
    folder.mkdir()
    append(folder / "stdout", lines(0, 5 * MIB // 16))
    logs.trim(KEY)
    assert (folder / "stdout").stat().st_blocks * 512 <= MIB
    assert sorted(os.listdir(folder)) == ["stdout", "stdout.hole"]
    chunks, end = await read(logs, wanted())
    check_chunks(chunks, end)
    logs.finish(KEY)
    assert logs.sweep(time.time(), live=()) == []
    assert logs.sweep(time.time() + 4000, live=()) == [KEY]
    assert os.listdir(tmp_path) == ["removed"]


@given(
    st.lists(st.sampled_from([b"\n", b"a", b"bc"]), max_size=20).map(b"".join),
    st.integers(1, 12),
    st.integers(-25, 25),
)
def test_tails_and_offsets_are_what_tail_would_show(
    tmp_path_factory: pytest.TempPathFactory, output: bytes, count: int, offset: int
) -> None:
    logs = logs_in(tmp_path_factory.mktemp("logs"))
    append(make(logs, KEY).stdout, output)
    tail = b"".join(output.splitlines(keepends=True)[-count:])
    start = offset if offset >= 0 else max(len(output) + offset, 0)

    async def check() -> None:
        assert await text(logs, tail_lines=count) == tail
        assert await text(logs, stdout_from=offset) == output[start:]
        both = await text(logs, tail_lines=count, stdout_from=offset)
        assert both == output[max(start, len(output) - len(tail)) :]

    asyncio.run(check())


async def test_the_last_lines_are_found_however_far_back(tmp_path: Path) -> None:
    logs = logs_in(tmp_path)
    append(make(logs, KEY).stdout, lines(0, 100_000))
    assert await text(logs, tail_lines=10_000) == lines(90_000, 10_000)


async def test_following_gives_what_is_written_up_to_the_end(tmp_path: Path) -> None:
    logs = logs_in(tmp_path)
    path = make(logs, KEY).stdout
    written = threading.Event()

    def write() -> None:
        for number in range(200):
            append(path, lines(number, 1))
            time.sleep(0.001)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    chunks, end = await read(logs, wanted(follow=True), is_live=lambda: not written.is_set())
    writer.join()
    assert b"".join(chunk.data for chunk in chunks) == lines(0, 200)
    assert len(chunks) > 1
    assert end == LogEnd(3200, 0)


async def test_what_is_there_is_read_without_waiting_for_a_writer_that_goes_on(
    tmp_path: Path,
) -> None:
    logs = logs_in(tmp_path)
    path = make(logs, KEY).stdout
    append(path, lines(0, 10_000))
    first = True
    got = 0
    async with aclosing(logs.read(KEY, wanted(), ended)) as items:
        async for item in items:
            if isinstance(item, LogChunk):
                got += len(item.data)
            if first:
                append(path, lines(10_000, 10))
                first = False
    assert got == 160_000


async def test_a_reader_that_goes_away_leaves_no_file_open(tmp_path: Path) -> None:
    logs = logs_in(tmp_path)
    make(logs, KEY)

    async def follow() -> None:
        await read(logs, wanted(follow=True), is_live=lambda: True)

    async with asyncio.timeout(10):
        for pause_s in (0.0, 0.001, 0.05):
            async with asyncio.TaskGroup() as group:
                job = group.create_task(follow())
                await asyncio.sleep(pause_s)
                job.cancel()
        while list(open_files(tmp_path)):  # noqa: ASYNC110  a thread may just be reading
            await asyncio.sleep(0.01)


def open_files(folder: Path) -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if target.startswith(str(folder)):
            yield target


async def test_a_launch_that_has_no_output_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="output of task 7, attempt 1, is not on its node: it"):
        await read(logs_in(tmp_path), wanted())


@pytest.mark.parametrize("key", ["..", "7", "7-1/..", "7-1-2", "a-1", "", "7-1\n"])
def test_nothing_but_a_key_becomes_a_path(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no key of a launch"):
        logs_in(tmp_path).paths(key)


# -- The cap -------------------------------------------------------------------------------


async def test_the_middle_is_dropped_and_said_so_in_its_place(tmp_path: Path) -> None:
    logs = logs_in(tmp_path, cap=MIB)
    path = make(logs, KEY).stdout
    append(path, lines(0, 5 * MIB // 16))
    before = path.stat()
    logs.trim(KEY)
    after = path.stat()
    assert after.st_size == before.st_size
    assert after.st_blocks * 512 <= MIB

    chunks, end = await read(logs, wanted(sources=OUT))
    (ours,) = filter(is_ours, chunks)
    assert ours.data == (
        b"[kohaku: 4.25 MiB dropped here: the output is capped at 1 MiB,"
        b" see log_cap of the runner]\n"
    )
    assert end.dropped == 4.25 * MIB
    assert end.stdout_end == 5 * MIB
    check_chunks(chunks, end)


def check_chunks(chunks: list[LogChunk], end: LogEnd) -> None:
    """Every byte is the one written at its offset, and nothing is missing but what was said."""
    position = chunks[0].offset
    for chunk in chunks:
        if is_ours(chunk):
            assert chunk.offset > position
        else:
            assert chunk.offset == position
            assert chunk.data == expected(chunk.offset, len(chunk.data))
        position = chunk.offset + len(chunk.data)
    assert position == end.stdout_end


async def test_a_hole_grows_and_is_known_after_a_restart(tmp_path: Path) -> None:
    path = make(logs_in(tmp_path), KEY).stdout
    for part in range(6):
        append(path, lines(part * MIB // 16, MIB // 16))
        logs_in(tmp_path, cap=MIB).trim(KEY)
        assert path.stat().st_blocks * 512 <= MIB
    chunks, end = await read(logs_in(tmp_path, cap=MIB), wanted(sources=OUT))
    assert len(list(filter(is_ours, chunks))) == 1
    assert end.dropped > 4 * MIB
    check_chunks(chunks, end)


async def test_an_output_below_the_cap_is_left_alone(tmp_path: Path) -> None:
    logs = logs_in(tmp_path, cap=MIB)
    path = make(logs, KEY).stdout
    append(path, lines(0, MIB // 16))
    logs.trim(KEY)
    logs.trim("8-1")  # never made
    assert sorted(os.listdir(tmp_path)) == [f"{KEY}.stderr", f"{KEY}.stdout"]
    assert await text(logs) == lines(0, MIB // 16)


async def test_whoever_begins_in_a_hole_is_told_what_is_left_of_it(tmp_path: Path) -> None:
    logs = logs_in(tmp_path, cap=MIB)
    path = make(logs, KEY).stdout
    append(path, lines(0, 5 * MIB // 16))
    logs.trim(KEY)
    for start in (2 * MIB, -3 * MIB):
        chunks, end = await read(logs, wanted(sources=OUT, stdout_from=start))
        assert b"[kohaku: 2.5 MiB dropped here" in chunks[0].data
        check_chunks(chunks[1:], end)

        # Going on after our line, as after any chunk, neither repeats it nor misses a byte.
        after = chunks[0].offset + len(chunks[0].data)
        again, _ = await read(logs, wanted(sources=OUT, stdout_from=after))
        assert again == chunks[1:]


async def test_lines_are_not_searched_for_beyond_a_hole(tmp_path: Path) -> None:
    logs = logs_in(tmp_path, cap=MIB)
    path = make(logs, KEY).stdout
    append(path, lines(0, 5 * MIB // 16))
    logs.trim(KEY)
    assert await text(logs, tail_lines=3) == lines(5 * MIB // 16 - 3, 3)
    chunks, _ = await read(logs, wanted(sources=OUT, tail_lines=1_000_000))
    assert is_ours(chunks[0])
    assert sum(len(chunk.data) for chunk in chunks[1:]) == MIB // 2


async def test_a_reader_never_sees_what_a_hole_has_made_zero(tmp_path: Path) -> None:
    """A writer, a trimmer and a slow reader at once: all that is read was written there."""
    logs = logs_in(tmp_path, cap=256 * 1024)
    path = make(logs, KEY).stdout
    count = 32 * MIB // 16
    written = threading.Event()

    def write() -> None:
        for first in range(0, count, 4096):
            append(path, lines(first, 4096))
            logs.trim(KEY)
        written.set()

    async def slowly() -> AsyncIterator[LogChunk | LogEnd]:
        question = wanted(sources=OUT, follow=True)
        async with aclosing(logs.read(KEY, question, lambda: not written.is_set())) as items:
            async for item in items:
                await asyncio.sleep(0)
                yield item

    writer = threading.Thread(target=write)
    writer.start()
    *chunks, end = [item async for item in slowly()]
    writer.join()
    assert isinstance(end, LogEnd)
    found = [chunk for chunk in chunks if isinstance(chunk, LogChunk)]
    assert len(list(filter(is_ours, found))) >= 1
    assert end.stdout_end == 32 * MIB
    check_chunks(found, end)


async def test_where_no_hole_can_be_punched_nothing_is_lost_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, hole: log_holes.Hole) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(log_holes, "_punch", refuse)
    logs = logs_in(tmp_path, cap=MIB)
    append(make(logs, KEY).stdout, lines(0, 5 * MIB // 16))
    with caplog.at_level(logging.WARNING):
        logs.trim(KEY)
        logs.trim(KEY)
    assert [record.message for record in caplog.records] == [
        f"the file system of {tmp_path} cannot punch holes: outputs grow beyond log_cap"
    ]
    chunks, end = await read(logs, wanted(sources=OUT))
    assert end == LogEnd(5 * MIB, 0)
    check_chunks(chunks, end)


async def test_a_hole_that_could_not_be_punched_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = logs_in(tmp_path, cap=MIB)
    path = make(logs, KEY).stdout
    append(path, lines(0, 5 * MIB // 16))
    logs.trim(KEY)
    hole = path.with_name(f"{KEY}.stdout.hole").read_bytes()
    append(path, lines(5 * MIB // 16, 5 * MIB // 16))

    def fail(path: Path, hole: log_holes.Hole) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(log_holes, "_punch", fail)
        with pytest.raises(OSError, match="Input/output"):
            logs.trim(KEY)
    assert path.with_name(f"{KEY}.stdout.hole").read_bytes() == hole
    chunks, end = await read(logs, wanted(sources=OUT))
    assert end.dropped == 4.25 * MIB
    check_chunks(chunks, end)


async def test_an_output_that_somebody_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    logs = logs_in(tmp_path, cap=MIB)
    path = make(logs, KEY).stdout
    append(path, lines(0, 5 * MIB // 16))
    logs.trim(KEY)
    os.truncate(path, 32)
    logs.trim(KEY)
    assert await text(logs) == lines(0, 2)
    assert await text(logs, stdout_from=-16) == lines(1, 1)
    assert await text(logs, stdout_from=48) == b""


async def test_whoever_follows_an_output_that_is_cut_short_goes_on_where_it_was(
    tmp_path: Path,
) -> None:
    logs = logs_in(tmp_path)
    path = make(logs, KEY).stdout
    append(path, lines(0, 100))
    looks = 0

    def is_live() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:  # all was read
            os.truncate(path, 16)
        if looks == 4:
            append(path, lines(1, 101))
        return looks < 4

    chunks, end = await read(logs, wanted(sources=OUT, follow=True), is_live)
    check_chunks(chunks, end)
    assert end == LogEnd(102 * 16, 0)


# -- How long it is kept -------------------------------------------------------------------


def aged(logs: TaskLogs, key: str, age_s: float, now: float, size: int = 0) -> None:
    outputs = make(logs, key)
    append(outputs.stdout, b"x" * size)
    for path in outputs:
        os.utime(path, (now - age_s, now - age_s))


def test_old_output_goes_unless_its_launch_is_live(tmp_path: Path) -> None:
    logs, now = logs_in(tmp_path), time.time()
    (tmp_path / "not ours").mkdir()
    aged(logs, "1-1", 5000, now)
    aged(logs, "1-2", 5000, now)
    aged(logs, "2-1", 3000, now)
    aged(logs, "3-1", 5000, now)
    append(logs.paths("3-1").stderr, b"still writing")
    assert logs.sweep(now, live={"1-2"}) == ["1-1"]
    left = ["1-2.stderr", "1-2.stdout", "2-1.stderr", "2-1.stdout", "3-1.stderr", "3-1.stdout"]
    assert sorted(os.listdir(tmp_path)) == [*left, "not ours", "removed"]


def test_the_time_is_counted_from_the_end(tmp_path: Path) -> None:
    logs, now = logs_in(tmp_path), time.time()
    aged(logs, "1-1", 5000, now)
    logs.finish("1-1")
    logs.finish("9-1")  # gone already
    assert logs.sweep(now, live=()) == []
    assert logs.sweep(now + 4000, live=()) == ["1-1"]


def test_the_oldest_goes_first_when_there_is_too_much(tmp_path: Path) -> None:
    logs, now = logs_in(tmp_path, most=2_500_000), time.time()
    for number in range(1, 6):
        aged(logs, f"{number}-1", 3000 - number * 100, now, size=1_000_000)
    aged(logs, "6-1", 1, now, size=100_000)
    assert logs.sweep(now, live={"2-1"}) == ["1-1", "3-1", "4-1"]
    assert logs.sweep(now, live={"2-1"}) == []


@pytest.mark.parametrize("again", [False, True], ids=["same run", "after a restart"])
async def test_output_that_was_removed_does_not_pass_for_an_empty_one(
    tmp_path: Path, *, again: bool
) -> None:
    logs = logs_in(tmp_path, most=MIB)
    append(logs.new_paths(KEY).stdout, lines(0, 100_000))
    assert logs.sweep(time.time() + 100, live=()) == [KEY]
    if again:
        logs = logs_in(tmp_path, most=MIB)
    with pytest.raises(NotFound) as refused:
        async with aclosing(logs.read(KEY, wanted(), ended, is_known=True)) as items:
            _ = [item async for item in items]
    assert refused.value.message == (
        "the output of task 7, attempt 1, was removed: its node keeps output for 1h after its "
        "task has ended (log_keep), and 1 MiB in all (log_total)"
    )
    # Its neighbour wrote nothing, which is no loss to be told.
    async with aclosing(logs.read("7-2", wanted(), ended, is_known=True)) as items:
        assert [item async for item in items] == [LogEnd(0, 0)]
    # In another cluster a launch of that name has nothing to do with it.
    logs.new_paths(KEY)
    async with aclosing(logs.read(KEY, wanted(), ended, is_known=True)) as items:
        assert [item async for item in items] == [LogEnd(0, 0)]


def test_what_cannot_be_noted_is_noted_at_a_later_sweep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "removed").mkdir()  # as a disk that takes nothing: it cannot be opened
    logs = logs_in(tmp_path, most=0)
    append(logs.new_paths(KEY).stdout, b"x")
    assert logs.sweep(time.time() + 100, live=()) == [KEY]
    assert "cannot note which output was removed" in caplog.text
    (tmp_path / "removed").rmdir()
    assert logs.sweep(time.time() + 100, live=()) == []
    assert (tmp_path / "removed").read_text() == f"\n{KEY} removed\n"
