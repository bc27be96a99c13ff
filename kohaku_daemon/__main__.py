"""``python -m kohaku_daemon`` is ``kohakud``."""

from kohaku_daemon.cli import run

if __name__ == "__main__":
    run()
