"""The shortest useful script, without asyncio: submit, wait, print.

python scripts/examples/submit_and_wait.py [COMMAND...]
"""

from __future__ import annotations

import sys

from protocol.blocking import connect
from protocol.errors import KohakuError
from protocol.messages.stream import LogChunk, Source


def main() -> int:
    """Run a command on the cluster and give its exit status."""
    command = sys.argv[1:] or ["sh", "-c", 'echo "hello from $KOHAKU_NODE"']
    with connect() as cluster:
        submitted = cluster.submit(command)
        (task,) = cluster.wait(submitted)
        for item in cluster.logs(task.id):
            if isinstance(item, LogChunk):
                out = sys.stdout if item.source is Source.STDOUT else sys.stderr
                out.buffer.write(item.data)
        print(f"task {task.id} on {task.node or 'no node'}: {task.reason}", file=sys.stderr)
        return task.exit.status if task.exit is not None else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KohakuError as error:
        sys.exit(f"error: {error.message}\n{error.hint}".rstrip())
