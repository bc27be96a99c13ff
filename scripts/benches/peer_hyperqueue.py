"""HyperQueue as a peer: its LocalCluster with one worker; see ``peers``.

Runs in the peers' own Python. Knows nothing of KohakuRiver. Every task keeps its output in two
files, which is HyperQueue's default and what KohakuRiver does too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import hyperqueue  # type: ignore[import-not-found]  # in the peers' Python only
from hyperqueue.cluster import WorkerConfig  # type: ignore[import-not-found]


def main(cores: int) -> None:
    """Answer each line with the seconds from submitting to the end of the last task."""
    # The cluster writes a table to descriptor 1, which is not the conversation's then.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with hyperqueue.LocalCluster() as cluster:
        cluster.start_worker(WorkerConfig(cores=cores))
        client = cluster.client()
        # One task, so that the worker is known to be there.
        _run(client, 1, Path("ready").absolute())
        print("{}", file=out, flush=True)
        for number, line in enumerate(sys.stdin):
            done = Path(f"done-{number}").absolute()
            seconds = _run(client, json.loads(line)["count"], done)
            print(json.dumps({"seconds": seconds}), file=out, flush=True)


def _run(client: hyperqueue.Client, count: int, done: Path) -> float:
    job = hyperqueue.Job(default_workdir=Path.cwd())
    for _ in range(count):
        job.program(["/bin/true"])
    # wait_for_jobs looks once a second, so the end is taken from a task that goes last.
    job.program(["/bin/sh", "-c", f": >{done}"], priority=-1)
    began = time.perf_counter()
    submitted = client.submit(job)
    while not done.exists():
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    client.wait_for_jobs([submitted])
    client.forget(submitted)
    for file in Path.cwd().glob("*.std*"):
        file.unlink()
    return seconds


if __name__ == "__main__":
    main(int(sys.argv[1]))
