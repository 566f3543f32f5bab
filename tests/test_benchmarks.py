"""Benchmarks that run on whatever there is, at a size at which their numbers mean nothing: that they run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elegans as el

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


@pytest.mark.slow
def test_the_cost_of_a_store_is_that_of_its_timings_and_runs(tmp_path):
    run = el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2), batch=4, steps=6, record=el.Record(evaluate=el.At()))
    store = el.train([*el.grid(run, {"steps": [6, 9], "seed": range(2)}), el.replace(run, "batch", 8)], tmp_path)
    command = [sys.executable, str(ROOT / "benchmarks" / "cost.py"), str(store.path), "--together", "2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}).stdout
    rows = {cells[0]: cells[1:] for line in said.splitlines() if (cells := [c.strip() for c in line.strip("|").split("|")])[1:]}
    assert [rows[name][:2] for name in ("8, 1, 4", "8, 1, 8", "all")] == [["1", "4"], ["1", "1"], ["2", "5"]]
    (flops, spent, hours) = (
        store.sql("""select (select sum(flops_per_step * length) from runs) as flops,
      sum(training) as spent, sum(seconds) / 7200 as hours from timings""")
        .to_pylist()[0]
        .values()
    )
    assert float(rows["all"][-1]) == pytest.approx(flops / spent, rel=0.06)  # it says two digits
    assert f"{5 / hours:,.0f} runs per hour of a device (cpu)" in said
