"""Benchmarks that run on whatever there is, at a size at which their numbers mean nothing: that they run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "sampling.py": "--tasks parity,sorting --replicas 2 --d-model 8 --layers 1 --batch 4 --dtype float32 --steps 8",
    "steps.py": "--settings 8,1,4,1,short --steps 4",
    "convoys.py": "--settings 8,1,4,2 --tasks addition,activity_selection --seconds 0.2",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_benchmarks_run(script):
    """Each prints a row of numbers for everything that it was asked."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL[script].split()]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    rows = [line for line in made.stdout.splitlines() if re.search(r"\d\.\d", line)]
    assert len(rows) == (2 if script == "sampling.py" else 1), made.stdout
