"""What a stored run was made with, and that a change is named."""

from pathlib import Path

import elegans as el
from elegans.sources import code_of, compare
from elegans.tasks import BreadthFirstSearch

FOUR = Path(__file__).parent / "data" / "four.g6"


def test_a_file_that_a_task_reads_is_part_of_a_run(tmp_path):
    path = tmp_path / "graphs.g6"
    path.write_bytes(FOUR.read_bytes())
    run = el.Run(task=BreadthFirstSearch(vertices=4, graphs=str(path)), model=el.Transformer(layers=1, d_model=8, heads=2), steps=1)
    before = code_of(run)
    assert compare(run.id, before, code_of(run)) is None
    path.write_bytes(FOUR.read_bytes().splitlines(keepends=True)[0])
    found = compare(run.id, before, code_of(run))
    assert found is not None and f"file {path}" in str(found) and run.id in str(found)


def test_runs_that_read_no_file_name_none():
    run = el.Run(task=el.Addition(length=4), model=el.Transformer(layers=1, d_model=8, heads=2), steps=1)
    assert set(code_of(run)) == {"numerics", "classes"}
