"""Microseconds of a device's kernels, from JAX's profiler."""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

PAUSE, GAP = 0.02, 0.009  # seconds between callables, and those without a kernel that part them


def kernel_times(callables: Sequence[Callable[[], Any]], repeats: int = 3) -> list[tuple[collections.Counter, collections.Counter]]:
    """Of each callable the microseconds of every kernel that it runs once, by name, and how often; nothing on a CPU."""
    for call in callables:
        jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for call in callables:
                for _ in range(repeats):
                    out = call()
                jax.block_until_ready(out)
                time.sleep(PAUSE)
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found: list[tuple[collections.Counter, collections.Counter]] = []
    last = float("-inf")
    for begin, spent, name in _on_streams(events):
        if begin - last > 1e6 * GAP:
            found.append((collections.Counter(), collections.Counter()))
        found[-1][0][name] += spent / repeats
        found[-1][1][name] += 1 / repeats
        last = begin + spent
    if found and len(found) != len(callables):
        raise RuntimeError(f"{len(callables)} callables left {len(found)} traces: the machine was too busy, try again")
    return found or [(collections.Counter(), collections.Counter()) for _ in callables]


def _on_streams(events: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """Begin, microseconds and name of all that ran on a GPU's streams, in order."""
    named = [e for e in events if e.get("ph") == "M"]
    devices = {e["pid"] for e in named if e["name"] == "process_name" and "GPU" in e["args"]["name"]}
    streams = {(e["pid"], e["tid"]) for e in named if e["name"] == "thread_name" and "Stream" in e["args"]["name"]}
    ran = [e for e in events if e.get("ph") == "X" and e["pid"] in devices and (e["pid"], e["tid"]) in streams]
    return sorted((e["ts"], e["dur"], e["name"]) for e in ran)
