"""Finished cohorts of a store as one small file, and such files back into one store.

A machine lent for minutes trains what it can, its finished cohorts leave as an archive, and the archives of
many such pieces merge into the store that the study goes on from. Files are copied as they are, so that a
cohort is the same bits wherever it was trained. An unfinished one may leave too, with all that going on needs.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from elegans.errors import StoreError
from elegans.files import replacing, rows_digest
from elegans.folder import TABLES, Cohort
from elegans.instruments.noted import Noted
from elegans.store import FORMAT, Store

WEIGHTS = ("state-*", "weights-*")  # what makes a store large


def archive(store: Store, file: Path, weights: bool = False, unfinished: bool = False) -> int:
    """Write the finished cohorts, and what instruments measured of each, to a `.tar.xz`; return their number.

    Without `weights` the parameters stay behind: rows, specs and provenance are all there, but instruments
    have nothing to measure. With `unfinished` the cohorts that have a checkpoint come too, with the last one and their weights, so that
    the same study goes on from there in the store that they merge into; hold the store's lock then. The same cohorts give the same
    bytes. Raises `StoreError` where there is nothing to write.
    """
    cohorts = [c for c in store.cohorts() if c.status()["finished"] or (unfinished and c.status()["step"])]
    if not cohorts:
        raise StoreError(f"{store.path}: no finished cohort to archive{', and no checkpoint' if unfinished else ''}")
    with replacing(file) as temporary, tarfile.open(temporary, "w:xz", preset=6) as tar:
        for path in _files(store, cohorts, weights):
            entry = tarfile.TarInfo(str(path.relative_to(store.path)))  # no time, no owner
            content = path.read_bytes()
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return len(cohorts)


def _files(store: Store, cohorts: list[Cohort], weights: bool) -> Iterator[Path]:
    yield store.path / "format.json"
    if (store.path / "study.json").exists():
        yield store.path / "study.json"
    for cohort in cohorts:
        left = _left(cohort, weights)
        yield from sorted(p for p in cohort.path.rglob("*") if p.is_file() and p.suffix != ".tmp" and p not in left)
        yield from sorted(store.path.glob(f"rows/*/{cohort.id}.parquet"))


def _left(cohort: Cohort, weights: bool) -> set[Path]:
    """What stays behind: of a finished cohort its parameters, unless asked for; of another one, checkpoints but the last."""
    if cohort.status()["finished"]:
        return set() if weights else {p for pattern in WEIGHTS for p in cohort.path.glob(pattern)}
    newest = cohort.newest_state()
    return {path for step, path in cohort.passing().items() if newest and step != newest[0]}


def merge(store: Store, files: list[Path], note: Callable[[str], None]) -> int:
    """Add the cohorts of archives to a store; return how many were new. Those that it has already are left alone.

    Weights that such a cohort lacks come in, since its results are the same. An unfinished cohort of the store gives way to the archive's
    where that is further on, finished or not; an archive's unfinished one that is less far than the store's is left out. A run may come
    in several cohorts, of stores that were planned differently: it counts once. Raises `StoreError` for a file that is no archive, and
    where a cohort was trained twice with different results; nothing of that archive is added then.

    An instrument's rows come in only where they were measured with settings and code of rows that the store has of it (or it has none),
    since a table does not tell them apart. What is left out, and weights that came to a cohort without, `note` is told in a line.
    """
    return sum(_merge(store, file, note) for file in files)


def _merge(store: Store, file: Path, note: Callable[[str], None]) -> int:
    with tempfile.TemporaryDirectory(dir=store.path, prefix=".merge-") as temporary:
        folder = Path(temporary)
        try:
            with tarfile.open(file, "r:xz") as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise StoreError(f"{file}: no archive of a store ({str(error).splitlines()[0]}); make one with `elegans archive`") from None
        if not (folder / "format.json").exists():
            raise StoreError(f"{file}: no archive of a store, format.json is missing; this elegans reads format {FORMAT}")
        have, came = ({c.id: c for c in each.cohorts()} for each in (store, Store(folder)))
        done = [c for c in came.values() if c.status()["finished"] and c.id in have and have[c.id].status()["finished"]]
        for cohort in done:
            if _results(cohort.path) != _results(have[cohort.id].path):
                raise StoreError(f"{file}: cohort {cohort.id} is in {store.path} with other results; keep them in two stores")
        if completed := sum(_add_weights(cohort, have[cohort.id]) for cohort in done):
            note(f"{file}: weights of {completed} cohorts that {store.path} had without come in")
        steps = {c.id: (have[c.id].status()["step"] if c.id in have else -1, c.status()["step"]) for c in came.values()}
        for name, (mine, step) in steps.items():
            if mine > step:
                note(f"{file}: cohort {name} at step {step} is left out: {store.path} has it at step {mine}")
        new = [came[name] for name, (mine, step) in steps.items() if mine < step]
        store.remove([have[c.id] for c in new if c.id in have])
        for cohort in new:
            shutil.move(cohort.path, store.path / "cohorts" / cohort.id)
        if left_out := _add_rows(store, folder):
            said = f"rows of {', '.join(left_out)} are left out: {store.path} has some that were measured with other settings or code"
            note(f"{file}: {said}; measure them again there, or keep two stores")
        if (folder / "study.json").exists() and not (store.path / "study.json").exists():
            shutil.move(folder / "study.json", store.path / "study.json")
    return len(new)


def _add_weights(came: Cohort, cohort: Cohort) -> bool:
    """Move into a cohort of the store the weights that it lacks; whether there were any."""
    missing = [path for pattern in WEIGHTS for path in came.path.glob(pattern) if not (cohort.path / path.name).exists()]
    for path in missing:
        shutil.move(path, cohort.path / path.name)
    return bool(missing)


def _add_rows(store: Store, folder: Path) -> list[str]:
    """Move instruments' rows of an unpacked archive into the store; return the tables of those that stay out, being measured otherwise."""
    here = {table.name: {file.name: Noted.read(file) for file in table.glob("*.parquet")} for table in store.path.glob("rows/*")}
    left_out = set()
    for rows in sorted(folder.glob("rows/*/*.parquet")):
        table, settings = rows.parent.name, Noted.read(rows)
        known = here.get(table, {})
        allowed = [known[rows.name]] if rows.name in known else list(known.values()) or [settings]
        if all(settings.other(one) for one in allowed):
            left_out.add(table)
        elif rows.name not in known:
            (store.path / "rows" / table).mkdir(parents=True, exist_ok=True)
            shutil.move(rows, store.path / "rows" / table / rows.name)
    return sorted(left_out)


def _results(folder: Path) -> dict[str, str]:
    """Digests of a finished cohort's tables."""
    return {t: rows_digest(folder / f"{t}.parquet") for t in TABLES if (folder / f"{t}.parquet").exists()}
