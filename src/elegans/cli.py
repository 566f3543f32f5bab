"""The command line: parse, call, print. Nothing here imports JAX before a command needs it."""

from __future__ import annotations

import contextlib
import decimal
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    import pyarrow as pa

    from elegans.driver import Work
    from elegans.study import Study

STOPPED = 130  # what a command returns that was interrupted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="A laboratory for the smallest language models. Start with: elegans run carry",
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Dotted fields, such as optim.lr=1e-3,3e-4 or seed=0..4.")
]
With = Annotated[list[Path] | None, typer.Option("--with", metavar="FILE.py", help="Where custom components live.")]
StoreArg = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")]
Device = Annotated[str | None, typer.Option(help="cpu, gpu, gpu:1; default: the fastest.")]
Memory = Annotated[str | None, typer.Option(help="Budget of a cohort, such as 8GiB.")]


@app.command(epilog="Example: elegans tasks")
def tasks(with_: With = None, as_json: Json = False) -> None:
    """List the languages that ship, and those of your own files."""
    from elegans.describe import task_rows

    _load(with_)
    _print(task_rows(), as_json)


@app.command(epilog="Example: elegans show addition length=8 --json")
def show(
    task: Annotated[str, typer.Argument(help="A task's name.")],
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(help="How many examples.", min=0, max=10_000)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the examples.", min=0, max=2**31 - 1)] = 0,
    check: Annotated[bool, typer.Option("--check", help="Also whether its rows are what it promises, with figures.")] = False,
    with_: With = None,
    as_json: Json = False,
) -> None:
    """Show a task: its size, floor, plateau, truth, and examples with their truth drawn in."""
    from elegans.describe import describe_task, draw_task
    from elegans.loading import parse_overrides

    _load(with_)
    found = describe_task(task, parse_overrides(overrides or []), examples, seed, check)
    print(_json(found) if as_json else draw_task(found))
    if check and not as_json:
        import pyarrow as pa

        print()
        _print(pa.Table.from_pylist(found["checks"]), as_json)


@app.command(epilog="Example: elegans run carry optim.lr=1e-3,3e-3 seed=0..4 --store runs/mine")
def run(
    study: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A .py that defines `study`, a .yaml, or a study that ships (or NAME.PART).")
    ],
    overrides: Overrides = None,
    store: Annotated[Path | None, typer.Option(help="Folder to keep results in; default runs/<study>.")] = None,
    device: Device = None,
    memory: Memory = None,
    with_: With = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, and train nothing.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Discard these runs' results and train them anew.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Insist on an unfinished run to go on with.")] = False,
    small: Annotated[bool, typer.Option("--small", help="The study's small version, for two CPU cores.")] = False,
    max_budget: Annotated[float | None, typer.Option(help="Leave out runs of more training FLOPs, such as 1e13.", min=0)] = None,
    best: Annotated[int | None, typer.Option(metavar="N", help="Only the N best so far at each budget, for more seeds.", min=1)] = None,
    share: Annotated[str | None, typer.Option(metavar="I/N", help="The I-th of N parts, for N devices or machines; then merge.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop at a checkpoint after so long; the same command goes on.", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Train, measure and report. Run it again to go on: finished runs are skipped, unfinished ones resume."""
    from elegans.describe import run_summary
    from elegans.driver import prepare
    from elegans.loading import load_study, parse_overrides, parse_share
    from elegans.progress import Display
    from elegans.study import check_study, run_study
    from elegans.training.planner import uncollected

    _load(with_)
    with uncollected():
        found = load_study(study, small)
        folder = store or Path("runs") / found.name
        asked = found.asked(parse_overrides(overrides or []), max_budget, folder, best)
    asked = asked if share is None else asked.share(*parse_share(share))
    options: dict[str, Any] = {"device": device, "memory": memory, "again": again, "resume": resume}
    if plan:
        check_study(asked)
        return _print_plan(prepare(asked.runs, folder, **options, compile_to_measure=False), asked, as_json)
    with Display() as display:
        page = run_study(asked, folder, display, minutes=minutes, **options)
    _print(run_summary(folder, page), as_json)


@app.command(epilog="Example: elegans ls runs/carry")
def ls(store: StoreArg, as_json: Json = False) -> None:
    """List the runs of a store: state, length, and last measurements."""
    from elegans.describe import run_rows
    from elegans.store import Store

    _print(run_rows(Store(store)), as_json)


@app.command(epilog="""Example: elegans sql runs/carry 'select "optim.lr", avg(loss) from runs join metrics using (run) group by all'""")
def sql(store: StoreArg, query: Annotated[str, typer.Argument(help="DuckDB SQL over the store's tables.")], as_json: Json = False) -> None:
    """Ask a store in SQL: runs, metrics, positions, timings, and a table per instrument."""
    from elegans.store import Store

    _print(Store(store).sql(query), as_json)


@app.command(epilog="Example: elegans measure probe runs/carry families=embed,resid")
def measure(
    instrument: Annotated[str, typer.Argument(help="An instrument's name.")],
    store: StoreArg,
    overrides: Overrides = None,
    with_: With = None,
    again: Annotated[bool, typer.Option("--again", help="Also measure what it measured already.")] = False,
    as_json: Json = False,
) -> None:
    """Measure stored networks with an instrument, without training. name=... keeps its rows in a table of that name."""
    from elegans.describe import measure_store
    from elegans.loading import parse_overrides
    from elegans.progress import Display

    _load(with_)
    with Display() as display:
        rows = measure_store(instrument, store, parse_overrides(overrides or []), display, again)
    _print(rows, as_json)


@app.command(epilog="Example: elegans report runs/carry")
def report(store: StoreArg, with_: With = None) -> None:
    """Write the store's report again, and print its path."""
    from elegans import report as pages
    from elegans.store import Store

    _load(with_)
    print(pages.write(Store(store)).resolve())


@app.command(epilog="Example: elegans draw runs/iteration_heads figures")
def draw(
    store: StoreArg,
    folder: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="Where to write them; default STORE/figures.")] = None,
    study: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Whose figures, as for run; default: of the study that ended in the store.")
    ] = None,
    with_: With = None,
) -> None:
    """Draw the figures of a store's study as PNG and PDF, their numbers as CSV where it says which, and print the paths."""
    from elegans.loading import study_of
    from elegans.store import Store
    from elegans.study import draw_study

    _load(with_)
    for file in draw_study(study_of(Store(store), study), store, folder or store / "figures"):
        print(file)


@app.command(epilog="Example: elegans export runs/carry 3fa1 out/")
def export(
    store: StoreArg, run: Annotated[str, typer.Argument(help="A run's id, or its start.")], folder: Path, with_: With = None
) -> None:
    """Write one run as plain files: weights (safetensors), spec (JSON), metrics (CSV)."""
    from elegans.describe import export_run
    from elegans.store import Store

    _load(with_)
    print(export_run(Store(store), run, folder))


@app.command(epilog="Example: elegans archive runs/quiet_features piece1.tar.xz")
def archive(
    store: StoreArg,
    file: Annotated[Path, typer.Argument(metavar="FILE.tar.xz", help="Where to write it.")],
    weights: Annotated[bool, typer.Option("--weights", help="Also parameters, for instruments: large.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also unfinished cohorts with their last checkpoint, to go on elsewhere: large.")
    ] = False,
) -> None:
    """Write the finished cohorts of a store to one small file."""
    from elegans.archive import archive as write
    from elegans.store import Store

    opened = Store(store)
    with opened.lock() if unfinished else contextlib.nullcontext():
        print(f"{write(opened, file, weights, unfinished)} cohorts in {file}, {file.stat().st_size / 2**20:.1f} MiB")


@app.command(epilog="Example: elegans merge runs/quiet_features piece1.tar.xz piece2.tar.xz")
def merge(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store, made if there is none.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE.tar.xz...", help="Archives.")],
) -> None:
    """Add the cohorts of archives to a store; of one that is in both, what is further on stays."""
    from elegans.archive import merge as add
    from elegans.errors import StoreError
    from elegans.store import Store

    missing = [f for f in files if not f.is_file()]
    if missing:
        raise StoreError(f"{missing[0]}: no such file; give an archive that `elegans archive` wrote")
    opened = Store.create(store)
    with opened.lock():
        print(f"{add(opened, files, lambda line: print(line, file=sys.stderr))} new cohorts in {store}")


@app.command(epilog="Example: elegans bench --replicas 8 --seconds 3")
def bench(
    d_model: Annotated[int, typer.Option(help="Width.")] = 64,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 2,
    batch: Annotated[int, typer.Option(help="Rows.")] = 16,
    replicas: Annotated[str, typer.Option(help="Cohort sizes, such as 1,8.")] = "1,8",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or tensorfloat32.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Time for each.")] = 3.0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure this machine: optimiser steps per second of cohorts on 16-bit addition."""
    from elegans.describe import bench_rows

    _print(bench_rows(d_model, layers, batch, replicas, dtype, seconds, device), as_json)


# ---- printing


def _load(files: Sequence[Path] | None) -> None:
    from elegans.loading import load_module

    for path in files or []:
        load_module(path)


def _print(table: pa.Table, as_json: bool) -> None:
    if as_json:
        print(_json(table.to_pylist()))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name, column in zip(table.column_names, table.columns, strict=True):
        shown.add_column(name, justify="right" if str(column.type) not in ("string", "large_string", "bool") else "left", overflow="fold")
    for row in table.to_pylist():
        shown.add_row(*(_short(v) for v in row.values()))
    width = None if sys.stdout.isatty() else 10_000  # never fold what another program reads
    Console(width=width, highlight=False, markup=False).print(shown)


def _print_plan(work: Work, study: Study, as_json: bool) -> None:
    """A plan; and what its seconds leave out, and where its bytes are above its budget, which no compiling has confirmed."""
    from elegans.describe import plan_rows

    _print(plan_rows(work), as_json)
    if study.instruments:
        names = ", ".join(dict.fromkeys(instrument.kind for instrument in study.instruments))
        print(f"seconds are of compiling and training; instruments come on top: {names}", file=sys.stderr)
    if any(planned.bytes > work.memory for planned in work.new):
        print("bytes are bounds: cohorts above the memory budget are measured when they train, and made smaller", file=sys.stderr)


def _json(value: Any) -> str:
    """JSON that every reader takes: what is no number is null, and what JSON has no word for is text."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, decimal.Decimal):  # DuckDB's sums of whole numbers
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the command line: errors of the user are one line and exit status 2."""
    from elegans.errors import Invalid, StoreError

    usage_error: Any = typer.BadParameter.__base__  # whatever is wrong with the words of a command
    try:
        status = app(standalone_mode=False)
    except (Invalid, StoreError) as error:
        _fail(str(error))
    except usage_error as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        given = _given(getattr(error, "param", None))
        where = error.ctx.command_path if error.ctx else "elegans"
        _fail(f"{error.format_message().rstrip('.')}{given and f', not {given}'}; see {where} --help")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    if status == STOPPED:
        print("elegans: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(status or 0)


def _given(option: Any) -> str:
    """The word after an option on the command line; nothing where there is none."""
    words = sys.argv[1:]
    found = [after for word, after in itertools.pairwise(words) if word in getattr(option, "opts", ())]
    return found[-1] if found else ""


def _fail(words: str) -> NoReturn:
    print(f"elegans: {' '.join(words.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
