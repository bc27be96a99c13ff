"""The process backend keeps the promises of a backend, in each of its forms."""

from tests.kohaku_daemon.backends.conformance import Conformance


class TestProcess(Conformance):
    """All of it."""
