"""What a task is: a language whose rows can be drawn on the device, with the truth behind each row."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import Array, Int, UInt32

from elegans.errors import Invalid
from elegans.randomness import keyed_hash
from elegans.specs import Spec, field, spec, structure
from elegans.tasks import counting
from elegans.types import AnyArray, Example

SMALL_SPACE = 2**16  # spaces with fewer contents are ranked and cut exactly
PATIENCE = 64  # redraws after which a held-out example may differ in what a set keeps fixed (its length, its task)
PARTS = ("train", "validation", "test")


@spec
class Split(Spec):
    """Which contents are for training, validation and test: decided by a keyed hash of the content itself.

    Small spaces are cut in exact shares. With `by="length"` every length of row that has fewer than 2**16 contents is cut
    by itself, whatever the other lengths are (longer ones by the hash, in its shares), so that none is without test rows by chance:
    of 3 contents or more each part has at least one; of 2 one is for training and one for test; one alone is for training.
    """

    train: float = structure(0.9, "share of contents to train on", gt=0, lt=1)
    validation: float = structure(0.05, "share of contents to select on", gt=0, lt=1)
    key: int = field(0, "another key cuts the same contents otherwise", ge=0)
    by: Literal["length"] | None = field(None, "length: every length of row is cut by itself; none: all together")

    def check(self) -> None:
        if self.train + self.validation >= 1:
            raise Invalid("validation", self.validation, f"with train={self.train:g} nothing is left for test")

    def cut(self, hashes: UInt32[AnyArray, "..."]) -> Int[AnyArray, "..."]:
        """Part numbers (0 train, 1 validation, 2 test) of 32-bit hashes."""
        first, second = (np.uint32(min(int(share * 2**32), 2**32 - 1)) for share in (self.train, self.train + self.validation))
        return (hashes >= first).astype(np.int32) + (hashes >= second).astype(np.int32)

    def table(self, contents: int) -> Int[np.ndarray, " content"]:
        """Part of each of `contents` ranked contents, in exact shares. Raises `Invalid` if a part is empty."""
        sizes = np.array([round(self.train * contents), round(self.validation * contents)])
        sizes = np.append(sizes, contents - sizes.sum())
        if (sizes <= 0).any():
            raise Invalid(
                "split", f"{contents} contents", f"{PARTS[int(sizes.argmin())]} would be empty: lengthen the task or say split=none"
            )
        return _dealt(self._hashes(np.arange(contents)[:, None]), sizes)

    def tables(self, contents: Mapping[int, int]) -> Int[np.ndarray, " content"]:
        """Part of each ranked content of every length, from the contents of each: length after length, each cut by itself."""
        words = [np.stack([np.arange(many), np.full(many, length)], 1) for length, many in contents.items()]
        hashes = np.split(self._hashes(np.concatenate(words)), np.cumsum(list(contents.values()))[:-1])
        return np.concatenate([_dealt(own, self.sizes(len(own))) for own in hashes])

    def sizes(self, contents: int) -> Int[np.ndarray, "3"]:
        """Contents of each part of a length that is cut by itself: validation and test rounded, the rest for training."""
        if contents < 3:
            return np.array([1, 0, contents - 1])
        held_out = [round(share * contents) for share in (self.validation, 1 - self.train - self.validation)]
        sizes = np.array([contents - sum(held_out), *held_out])
        for part in np.flatnonzero(sizes == 0):
            sizes[[sizes.argmax(), part]] += (-1, 1)
        return sizes

    def _hashes(self, words: Int[np.ndarray, "content words"]) -> UInt32[np.ndarray, " content"]:
        with jax.ensure_compile_time_eval():
            return np.asarray(keyed_hash(jax.numpy.asarray(words), self.key))


def _dealt(hashes: UInt32[np.ndarray, " content"], sizes: Int[np.ndarray, "3"]) -> Int[np.ndarray, " content"]:
    """Parts of these sizes, in the order of the hashes."""
    parts = np.empty(len(hashes), np.int32)
    parts[np.argsort(hashes, kind="stable")] = np.repeat(np.arange(3), sizes)
    return parts


def named_sizes(parts: Int[np.ndarray, " content"]) -> dict[str, int]:
    """How many contents are of each part, by its name."""
    return dict(zip(PARTS, np.bincount(parts, minlength=3).tolist(), strict=True))


@spec
class Task(Spec):
    """A language. A new task is one class with `symbols`, `positions` and `sample`, and what it knows of its loss.

    `symbols` is the vocabulary as text, `positions` the number of tokens in a row. `sample` draws one
    example from a key. The rest has defaults: no floor known, no split, batches of independent examples.
    """

    abstract: ClassVar[bool] = True
    scheduled: ClassVar[bool] = False  # whether batches change over the run, so that no finite set could stand for them
    split: Split | None = field(None, "how contents are divided; none: memorisation tasks")

    @property
    @abc.abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """The text of every token id."""

    @property
    @abc.abstractmethod
    def positions(self) -> int:
        """Tokens in a row."""

    @abc.abstractmethod
    def sample(self, key: jax.Array, data: Any) -> Example:
        """One example, drawn on the device. `data` is what `prepare` returned."""

    @property
    def candidates(self) -> Bool[Array, " vocab"] | None:
        """Which symbols a prediction may be, where the model knows more than the task's; None: all."""
        return None

    def prepare(self) -> Any:
        """Arrays that every example needs, made once on the host (a matrix, a corpus); `()` if none."""
        return ()

    def batch(self, keys: jax.Array, step: Any, progress: Any, data: Any) -> Example:
        """A batch, one key an example. Override it for text, finite sets, curricula and ordered data.

        `progress` runs from 0 to 1 over the run.
        """
        del step, progress
        return jax.vmap(lambda key: self.sample(key, data))(keys)

    def draw(self, key: jax.Array, row: Int[Array, ""], tries: Int[Array, ""], data: Any) -> Example:
        """Row `row` of a held-out or finite set, after the split has refused `tries` of them. Override it for sets that keep a balance."""
        del row
        return self.sample(jax.random.fold_in(key, tries), data)

    def content(self, example: Example) -> Int[Array, " words"]:
        """What makes two examples the same one for the split: int words; one word below `contents` if that is small."""
        raise NotImplementedError(f"{type(self).__name__} has a split but defines no content()")

    @property
    def contents(self) -> int | None:
        """How many contents there are, or None where that is 2**16 or more."""
        return None

    @property
    def opening(self) -> str | None:
        """The symbol that begins every row, or None where rows begin otherwise."""
        return None

    def floor(self) -> float | None:
        """Irreducible loss of the unsplit law, nats per scored token; None where it is unknown."""
        return None

    def plateau(self) -> float | None:
        """Best loss that sees only the output position, nats per scored token; None where it is unknown."""
        return None

    def scored_tokens(self) -> float:
        """Mean number of scored tokens in a row; estimated from 4,096 rows unless a task says it exactly."""
        return float(counting.rows(self, 4096)[1][:, 1:].sum(1).mean())  # nothing predicts the first token

    def mean_positions(self) -> float:
        """Mean number of tokens before padding, the context that FLOP budgets count."""
        return float(self.positions)

    def attends(self, example: Example) -> dict[str, Int[Array, " position"]]:
        """Where the heads of a known circuit look in a row, by a name of yours: for every token the position of the token
        that should get its attention, -1 where the circuit says nothing. See `instruments/patterns.py`."""
        del example
        return {}

    @cached_property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def text(self, tokens: Any) -> str:
        """A row as text. Symbols of one character are joined, others are separated by spaces."""
        words = [self.symbols[int(t)] for t in tokens]
        return ("" if all(len(s) == 1 for s in self.symbols) else " ").join(words)

    # ---- splits, for the engine

    @cached_property
    def train_share(self) -> float | None:
        """The least share of drawn rows that are for training; None: there is no split, and all are."""
        return self.share_of(self)

    def share_of(self, task: Task) -> float | None:
        """`train_share` of a task whose parts this one decides, see `judge`."""
        del task
        return None if self.split is None else self.split.train

    def judge(self, tasks: tuple[Task, ...]) -> Task:
        """The task that decides the parts of this one's rows where they are mixed with those of `tasks`."""
        del tasks
        return self

    def split_table(self) -> Any:
        """The part of each content, where the space is small enough to be cut exactly."""
        if self.split is not None and self.split.by is not None:
            raise Invalid("split.by", self.split.by, f"allowed: none, since {self.kind} knows no lengths of rows")
        if self.split is None or self.contents is None:
            return ()
        return self.split.table(self.contents)

    def part_sizes(self) -> list[dict[str, Any]]:
        """How many distinct contents each part has: `train`, `validation` and `test` of each `length`, none where the task
        has one length. Lengths of 2**16 contents or more are left out: the hash cuts them in about the split's shares.

        Raises `Invalid` where a part would be empty.
        """
        table = self.split_table()
        return [{"length": None} | named_sizes(table)] if len(table) else []

    def part(self, example: Example, table: Any) -> Int[Array, ""]:
        """The part (0 train, 1 validation, 2 test) that one example belongs to."""
        content = self.content(example)
        assert self.split is not None
        if self.contents is not None:
            return jax.numpy.asarray(table)[content[0]]
        return jax.numpy.asarray(self.split.cut(keyed_hash(content, self.split.key)))
