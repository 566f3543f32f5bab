"""kill -9 at random moments, checkpoint writes included, then the same command: the same bytes as undisturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUDY = """
import elegans as el
run = el.Run(
    el.Addition(length=4), el.Transformer(layers=1, d_model=16, heads=2), el.AdamW(lr=3e-3), batch=8, steps=600,
    record=el.Record(weights=el.LogSpaced(per_decade=3), examples=32),
)
study = el.Study(el.grid(run, {"steps": [600, 300], "seed": [0, 1]}), name="victim")
"""
REPRODUCIBLE = ("metrics.parquet", "positions.parquet", "spec.json", "plan.json", "status.json")


def command(folder: Path, store: str) -> list[str]:
    return [sys.executable, "-m", "elegans.cli", "run", str(folder / "victim.py"), "--store", str(folder / store), "--device", "cpu"]


def start(folder: Path, store: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(folder, store), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )


def contents(store: Path) -> dict[str, bytes]:
    """Every reproducible file of the store's cohorts, by its path inside the store."""
    files = [p for p in (store / "cohorts").rglob("*") if p.suffix == ".safetensors" or p.name in REPRODUCIBLE]
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def wait_for_training(store: Path, process: subprocess.Popen) -> None:
    """Until the cohort's status or first part shows that steps are being done, or the process ends."""
    while process.poll() is None and not list(store.glob("cohorts/*/*-*.parquet")):
        time.sleep(0.01)


def survive(folder: Path, kills: int, seed: int) -> int:
    """Kill until `kills` are done, restarting from nothing whenever a store is complete; return kills that left temporary files."""
    reference = contents(folder / "undisturbed")
    dice, done, torn, attempt = random.Random(seed), 0, 0, 0
    while done < kills:
        store = folder / f"killed{attempt}"
        process = start(folder, store.name)
        wait_for_training(store, process)
        time.sleep(dice.uniform(0, 1.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.communicate()
        torn += bool(list(store.rglob("*.tmp")))
        if process.returncode == 0 or done == kills:
            assert subprocess.run(command(folder, store.name), capture_output=True, check=False).returncode == 0
            found = contents(store)
            assert found.keys() == reference.keys()
            assert [name for name in found if found[name] != reference[name]] == []
            attempt += 1
    return torn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "victim.py").write_text(STUDY)
    process = start(tmp_path, "undisturbed")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert len(contents(tmp_path / "undisturbed")) > 8
    return tmp_path


def test_two_kills(folder):
    survive(folder, 2, seed=1)


@pytest.mark.slow
def test_twenty_kills(folder):
    survive(folder, 20, seed=2)
