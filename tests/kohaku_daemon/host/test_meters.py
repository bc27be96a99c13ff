"""Counting how long things took."""

from kohaku_daemon.host.meters import Durations, Meters


def test_durations_are_counted_cumulatively() -> None:
    durations = Durations()
    for seconds in (0.0005, 0.003, 0.003, 60.0):
        durations.observe(seconds)
    counts = dict(durations.buckets())
    assert (counts["0.001"], counts["0.002"], counts["0.005"]) == (1, 1, 3)
    assert (counts["5.0"], counts["+Inf"]) == (3, 4)
    assert durations.total_s == 60.0065


def test_commits_count_their_rows_too() -> None:
    meters = Meters()
    meters.committed(0.002, 7)
    meters.committed(0.002, 1)
    assert (dict(meters.commits.buckets())["+Inf"], meters.task_rows) == (2, 8)
