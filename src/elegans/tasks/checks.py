"""Whether a task keeps what the interface in `base.py` promises, found on drawn rows before any training: shapes, ids, truth, contents."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from elegans.errors import Invalid
from elegans.randomness import Purpose, key_for
from elegans.sources import is_custom, within
from elegans.tasks import counting
from elegans.tasks.base import PARTS, Task
from elegans.tasks.mixture import Several
from elegans.tasks.sampling import TaskData, prepare
from elegans.types import Example, Truth

ROWS = 1024
CLEAR = 20  # expected rows of a part of which at least one must be found: none come with a chance of e^-20
TOLERANCE = 2e-3  # nats: about four standard errors of a plateau counted over 2^16 rows
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # a program that runs once
VALUES = {"binary": "biu", "multilabel": "biu", "categorical": "iu", "number": "biuf"}  # kinds of truth, and of their arrays (NumPy)
WORDS = {"iu": "whole numbers", "b": "truth values", "f": "floats", "biu": "whole numbers", "biuf": "numbers"}

Oracle = Callable[[list[str]], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a check found: the rows that it drew, as NumPy arrays, and a line for everything it looked at.

    A line has `check` (its name), `found` (the figure of these rows), `promised` (what the task says; null: nothing) and a `note`.
    """

    rows: Example
    figures: list[dict[str, Any]]


def check_task(task: Task, rows: int = ROWS, seed: int = 0, oracle: Oracle | None = None) -> Checked:
    """Draw rows of a task, of the unsplit law, and look whether they are what the task promises.

    An `oracle` is an answer from another hand: of the symbols before the first scored token it gives those of the scored tokens.
    Raises `Invalid` with the task, the field to mend, what was found there and what is allowed. One program is compiled.
    """
    if rows < 2:
        raise Invalid("rows", rows, "allowed: 2 or more")
    try:
        for member in task.tasks if isinstance(task, Several) else ():  # whose ids are lost where they are translated
            check_task(dataclasses.replace(member, split=None), rows, seed)
        _check_sizes(task)
        data = prepare(task)
        _check_shapes(task, data)
        drawn = _draw(task, data, jax.random.split(key_for(seed, Purpose.INSTRUMENT), rows))
        check_rows(task, drawn.rows)
        _check_ids(task, "batch.tokens", drawn.others)
        figures = [*_sizes(task, drawn), *_contents(task, drawn), *_truths(drawn.rows)]
        return Checked(drawn.rows, figures + ([] if oracle is None else [_compared(task, drawn.rows, oracle)]))
    except Invalid as error:
        raise error.inside(task.kind) from None


def check_custom(tasks: Iterable[Task]) -> None:
    """Check tasks that hold a class of the user's, one of each structure, once in a process. Raises `Invalid`."""
    custom = {jax.tree.structure(task): task for task in tasks if any(is_custom(type(inner)) for inner in within(task))}
    for task in custom.values():
        _once(task)


@functools.lru_cache
def _once(task: Task) -> None:
    check_task(task)


# ---- what is known without a row


def _check_sizes(task: Task) -> None:
    symbols, positions = task.symbols, task.positions
    if len(symbols) < 2:
        raise Invalid("symbols", symbols, "allowed: two or more")
    for i, symbol in enumerate(symbols):
        if not isinstance(symbol, str) or symbol in symbols[:i]:
            raise Invalid("symbols", symbol, "allowed: texts that differ, one for every token id")
    if not isinstance(positions, int) or positions < 2:
        raise Invalid("positions", positions, "allowed: a whole number, 2 or more")
    floor, plateau = task.floor(), task.plateau()
    for name, nats, most in (("plateau", plateau, math.log(len(symbols))), ("floor", floor, plateau)):
        most = math.log(len(symbols)) if most is None else most
        if nats is not None and not 0 <= nats <= most + TOLERANCE:
            words = "the plateau" if name == "floor" and plateau is not None else "log of the vocabulary"
            raise Invalid(name, nats, f"allowed: 0 to {most:.4g} nats per scored token ({words}), or None")
    if not 0 < task.mean_positions() <= positions:
        raise Invalid("mean_positions", task.mean_positions(), f"allowed: above 0 and at most positions={positions}")


def _check_shapes(task: Task, data: TaskData) -> None:
    keys, step, progress = jax.random.split(jax.random.key(0), 3), jnp.int32(0), jnp.float32(0)
    try:
        row = jax.eval_shape(lambda: task.sample(keys[0], data.prepared))
    except jax.errors.ConcretizationTypeError:
        raise Invalid("sample", task.kind, "allowed: no `if`, `int` or `range` of what is drawn; use jnp.where or jax.lax.cond") from None
    _check_arrays(task, "", row, ())
    drawn = jax.eval_shape(lambda: task.draw(keys[0], step, step, data.prepared))
    _check_arrays(task, "draw.", drawn, ())
    batch = jax.eval_shape(lambda: task.batch(keys, step, progress, data.prepared))
    _check_arrays(task, "batch.", batch, (3,))
    if task.train_share is not None and type(task).content is not Task.content:
        _check_array("content", jax.eval_shape(task.content, row), (1,) if task.contents is not None else None, "iu")
    elif task.train_share is not None and type(task).part is Task.part:
        raise Invalid("content", None, "needed with a split: what makes two rows the same one; or say split=None")


def _check_arrays(task: Task, field: str, row: Any, batch: tuple[int, ...]) -> None:
    """Raises `Invalid` for an example, in shapes or arrays, with further leading axes, that is none of the task's."""
    if not isinstance(row, Example):
        raise Invalid(field.rstrip(".") or "sample", type(row).__name__, "allowed: an elegans.Example")
    shape = (*batch, task.positions)
    _check_array(f"{field}tokens", row.tokens, shape, "iu")
    _check_array(f"{field}scored", row.scored, shape, "b")
    if row.weights is not None:
        _check_array(f"{field}weights", row.weights, shape, "f")
    for name, t in row.truth.items():
        _check_truth(f"{field}truth.{name}", t, batch)


def _check_array(field: str, array: Any, shape: tuple[int, ...] | None, kinds: str) -> None:
    """`shape` None: one axis of any length."""
    if not hasattr(array, "dtype"):
        raise Invalid(field, type(array).__name__, "allowed: an array")
    if array.shape != shape and (shape is not None or len(array.shape) != 1):
        raise Invalid(field, array.shape, f"allowed: the shape {shape or 'of one axis'}")
    if np.dtype(array.dtype).kind not in kinds:
        raise Invalid(field, str(array.dtype), f"allowed: {WORDS[kinds]}")


def _check_truth(field: str, t: Any, batch: tuple[int, ...]) -> None:
    if not isinstance(t, Truth):
        raise Invalid(field, type(t).__name__, "allowed: an elegans.Truth")
    if t.kind not in VALUES:
        raise Invalid(f"{field}.kind", t.kind, f"allowed: {', '.join(VALUES)}")
    reads = getattr(t.positions, "shape", ())[-1:] or (1,)
    labels = getattr(t.values, "shape", ())[-1:] or (1,) if t.kind == "multilabel" else ()
    _check_array(f"{field}.positions", t.positions, (*batch, *reads), "iu")
    _check_array(f"{field}.values", t.values, (*batch, *reads, *labels), VALUES[t.kind])


# ---- rows


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """Rows as NumPy arrays; with a split also the part and, where the task has one, the content of each."""

    rows: Example
    part: Int[np.ndarray, " row"] | None
    content: Int[np.ndarray, "row words"] | None
    others: Int[np.ndarray, "*rows position"]  # tokens of batches at both ends of a run, where they are not rows of `sample`


def _draw(task: Task, data: TaskData, keys: Shaped[Array, " row"]) -> _Drawn:
    split, by_content = task.train_share is not None, type(task).content is not Task.content

    def draw(keys: Shaped[Array, " row"], data: TaskData) -> tuple[Any, ...]:
        rows = jax.vmap(lambda key: task.sample(key, data.prepared))(keys)
        part = jax.vmap(lambda row: task.part(row, data.table))(rows) if split else None
        content = jax.vmap(task.content)(rows) if split and by_content else None
        others = rows.tokens[:0]
        if type(task).batch is not Task.batch:
            others = jax.vmap(lambda progress: task.batch(keys, jnp.int32(0), progress, data.prepared))(jnp.array([0.0, 1.0])).tokens
        return rows, part, content, others

    return _Drawn(*jax.tree.map(np.asarray, jax.jit(draw, compiler_options=QUICK)(keys, data)))


def check_rows(task: Task, rows: Example) -> None:
    """Raises `Invalid` where rows that were drawn, with a leading axis, hold shapes, ids, truth or positions that the task has not."""
    _check_arrays(task, "", rows, rows.tokens.shape[:1])
    _check_ids(task, "tokens", np.asarray(rows.tokens))
    if task.opening is not None and (rows.tokens[:, 0] != task.symbols.index(task.opening)).any():
        raise Invalid("opening", task.opening, "allowed: the symbol of token 0 of every row, or None")
    for name, t in rows.truth.items():
        positions, values = np.asarray(t.positions), np.asarray(t.values)[np.asarray(t.positions) >= 0]
        last = task.positions - 2  # what is read predicts a token
        _refuse(f"truth.{name}.positions", positions[(positions < -1) | (positions > last)], f"0 to {last}, or -1 for a value not there")
        if t.kind == "number":
            _refuse(f"truth.{name}.values", values[~np.isfinite(values)], "finite numbers")
        else:
            most = (t.classes or task.vocab_size) - 1 if t.kind == "categorical" else 1
            hint = "" if t.kind == "categorical" else "; say kind='categorical' with classes=..., or kind='number'"
            _refuse(f"truth.{name}.values", values[(values < 0) | (values > most)], f"0 to {most}, since its kind is {t.kind}{hint}")


def _check_ids(task: Task, field: str, tokens: Int[np.ndarray, "*rows position"]) -> None:
    _refuse(field, tokens[(tokens < 0) | (tokens >= task.vocab_size)], f"0 to {task.vocab_size - 1}, one id for each of `symbols`")


def _refuse(field: str, wrong: Shaped[np.ndarray, "..."], allowed: str) -> None:
    if wrong.size:
        raise Invalid(field, wrong.ravel()[0].item(), f"allowed: {allowed}")


def _counts(rows: Example) -> Any:
    """Marks of tokens that count: token 0 has nothing before it."""
    return rows.scored & (np.arange(rows.scored.shape[1]) > 0)


# ---- figures, and what only many rows show


def _line(check: str, found: float | None, promised: float | None = None, note: str | None = None) -> dict[str, Any]:
    plain = [None if v is None else float(v) for v in (found, promised)]
    return {"check": check, "found": plain[0], "promised": plain[1], "note": note}


def _sizes(task: Task, drawn: _Drawn) -> Iterator[dict[str, Any]]:
    tokens, scored = np.asarray(drawn.rows.tokens), _counts(drawn.rows)
    if not scored.any():
        raise Invalid("scored", "no token", "allowed: at least one token after the first")
    many = scored.sum(1)
    said = task.scored_tokens() if type(task).scored_tokens is not Task.scored_tokens else None
    if said is not None and abs(many.mean() - said) > 6 * many.std() / math.sqrt(len(many)) + 1e-6 * said:
        raise Invalid("scored_tokens", said, f"allowed: the mean of rows, {many.mean():.4g} of {len(many)} drawn")
    yield _line("rows", len(tokens))
    yield _line("positions", tokens.shape[1], task.positions)
    yield _line("token ids", len(np.unique(tokens)), task.vocab_size, "that occur, of the vocabulary")
    yield _line("scored tokens", many.mean(), said, "mean of a row")
    yield _line("rows scored", scored.any(1).mean(), 1.0, "share with a scored token")
    yield _line("floor", None, task.floor(), "nats per scored token")
    yield _line(
        "plateau", counting.of_rows(tokens, scored, task.vocab_size).plateau, task.plateau(), "nats per scored token; counted by position"
    )


def _contents(task: Task, drawn: _Drawn) -> Iterator[dict[str, Any]]:
    if drawn.part is None:
        return
    rows, shares = len(drawn.part), [(drawn.part == i).mean() for i in range(3)]
    if drawn.content is not None:
        many = len(np.unique(drawn.content, axis=0))
        if many == 1:
            raise Invalid("content", drawn.content[0].tolist(), "allowed: what varies from row to row")
        if task.contents is not None:
            wrong = drawn.content[(drawn.content < 0) | (drawn.content >= task.contents)]
            _refuse("content", wrong, f"0 to {task.contents - 1}, since contents={task.contents}")
        yield _line("contents", many, task.contents, "that differ")
    alike = _alike(task, drawn.rows)
    for i, part in enumerate(PARTS):
        many = len(np.unique(alike[drawn.part == i]))
        yield _line(f"prompts of {part}", many, None, "that differ, of those drawn: probes and scores know no more")
    if drawn.content is not None and (drawn.content != drawn.content[alike]).any():
        raise Invalid("content", "two of one row", "allowed: the same for rows of the same prompt")
    leaks = len(np.unique(alike[drawn.part != drawn.part[alike]]))
    if leaks:
        raise Invalid("part", f"{leaks} prompts in two parts", "allowed: one part of the split for rows of the same prompt")
    split = task.split
    asked = [None] * 3 if split is None else [split.train, split.validation, 1 - split.train - split.validation]
    for part, share, wanted in zip(PARTS, shares, asked, strict=True):
        if share == 0 and wanted is not None and wanted * rows > CLEAR:
            raise Invalid("split", f"no {part} row", f"allowed: a share of {wanted:.3g} of {rows} rows drawn; give more contents")
        yield _line(f"share of {part}", share, wanted, "of rows")
    yield _line("rows alike", rows - len(np.unique(alike)), None, "whose prompt was drawn before")
    yield _line("leaks", leaks, 0.0, "prompts in two parts of the split")


def _alike(task: Task, rows: Example) -> Int[np.ndarray, " row"]:
    """For each row the first that is the same one: in all tokens, or in those not scored where the others follow from them (floor 0)."""
    scored = _counts(rows)
    kept = np.where(scored, -1, rows.tokens) if task.floor() == 0 else rows.tokens
    _, first, inverse = np.unique(kept, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _truths(rows: Example) -> Iterator[dict[str, Any]]:
    """Of every feature the share of its reads that rows have, and where they are."""
    for name, t in rows.truth.items():
        positions = np.asarray(t.positions)
        there = positions >= 0
        seen = positions[there]
        where = f"at {seen.min()} to {seen.max()}" if len(seen) else "nowhere"
        values = np.unique(np.asarray(t.values)[there])
        span = f", values {values[0]:g} to {values[-1]:g}" if len(values) else ""
        share = there.mean() if there.size else None
        yield _line(f"truth.{name}", share, None, f"{t.kind}{span}, {there.shape[1]} reads {where}; share that rows have")


def _compared(task: Task, rows: Example, oracle: Oracle) -> dict[str, Any]:
    for tokens, scored in zip(rows.tokens, _counts(rows), strict=True):
        symbols = [task.symbols[i] for i in tokens]
        prompt, expected = symbols[: int(scored.argmax())], [s for s, counts in zip(symbols, scored, strict=True) if counts]
        answer = list(oracle(list(prompt))) if scored.any() else expected
        if answer != expected:
            raise Invalid("oracle", " ".join(map(str, answer)), f"after {' '.join(prompt)} the task has {' '.join(expected)}")
    return _line("oracle", len(rows.tokens), len(rows.tokens), "rows with its answer")
