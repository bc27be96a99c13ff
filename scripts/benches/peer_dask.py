"""dask.distributed as a peer: a scheduler and a worker process per core; see ``peers``.

Runs in the peers' own Python. Knows nothing of KohakuRiver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import distributed  # type: ignore[import-not-found]  # in the peers' Python only


def noop(number: int) -> int:
    """Do nothing."""
    return number


def true(_: int) -> int:
    """Run a program that does nothing."""
    return subprocess.call(["/bin/true"])


def main() -> None:
    """Answer each line with the seconds that submitting and gathering took."""
    work = {"noop": noop, "true": true}
    with (
        distributed.LocalCluster(
            n_workers=os.cpu_count(), threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        print("{}", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            began = time.perf_counter()
            # Pure functions of equal arguments would be computed once.
            futures = client.map(work[asked["work"]], range(asked["count"]), pure=False)
            client.gather(futures)
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
            del futures


if __name__ == "__main__":
    main()
