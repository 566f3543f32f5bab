"""Helpers of the tests that run commands: `elegans(...)` calls the command line in this process."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

import jax.monitoring

_COMPILED = [0]


def _count(event: str, duration: float, **details: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED[0] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@dataclass
class Answer:
    """What a command did."""

    status: int
    out: str
    err: str
    compiled: int


def elegans(*words: object) -> Answer:
    """Run `elegans WORDS` and catch what it prints."""
    from elegans import cli

    out, err, before = io.StringIO(), io.StringIO(), _COMPILED[0]
    with mock.patch.object(sys, "argv", ["elegans", *map(str, words)]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            status: int = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Answer(status, out.getvalue(), err.getvalue(), _COMPILED[0] - before)
