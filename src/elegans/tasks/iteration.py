"""Iterative tasks: a state is updated by one input after another, with the states written out or only the last one."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elegans.errors import Invalid
from elegans.specs import field, spec
from elegans.tasks.base import PATIENCE, SMALL_SPACE, Split, Task, named_sizes
from elegans.tasks.bits import coin_entropy, random_bits
from elegans.tasks.sequences import sequence_content
from elegans.types import Example, Truth

WORD = 2**16  # contents are words below this


@spec
class IterativeTask(Task):
    """A state s_t = F(s_(t-1), x_t) of 0 .. size-1, from s_0 = 0. A subclass says `update`, `opening`, and how inputs are drawn.

    cot:      P x_1 .. x_n : s_1 .. s_n $      scored: s_1 to $         truth read at :, s_1, .. s_(n-1), where s_t is predicted
    no cot:   P x_1 .. x_n : s_n $             scored: s_n and $        truth read at x_1 .. x_n

    Rows are padded with `$` to 2 length + 3 tokens; with `shortest`, a row's n is uniform in shortest..length.
    Truth: `input` x_t and `state` s_t, of every t; and with cot `step`, t - 1 of one t drawn at random for each row, read
    where s_t is predicted (a single read, so that a probe must find t at any position after any n).

    `compat="paper"` is the layout and the scores of Cabannes et al. 2024 ("Iteration Head"): all padding is scored.
    Token ids stay ours: theirs are 64, of which a task uses these symbols alone.
    """

    abstract: ClassVar[bool] = True
    low: ClassVar[int] = 0  # the smallest input
    length: int = field(16, "inputs of the longest row", ge=1, le=4096)
    shortest: int | None = field(None, "inputs of the shortest row; none: every row has `length`", ge=1)
    cot: bool = field(True, "write every state, not only the last")
    compat: Literal["paper"] | None = field(None, "paper: score the padding as well")
    lengths: Literal["balanced"] | None = field(None, "balanced: finite and held-out sets have every length equally often; none: at random")
    final_weight: float | None = field(None, "training loss of the last state relative to another token's; none: as the others", ge=0)
    split: Split | None = field(Split(), "how contents are divided")

    def check(self) -> None:
        if self.shortest is not None and self.shortest > self.length:
            raise Invalid("shortest", self.shortest, f"allowed: at most length={self.length}")

    # ---- what a subclass says

    @property
    def size(self) -> int:
        """How many data symbols there are; inputs and states are among 0 .. size-1."""
        return 2

    @abc.abstractmethod
    def update(self, state: Any, x: Any) -> Any:
        """F(state, x) of arrays of JAX or NumPy that broadcast."""

    def first(self, x: Any) -> Any:
        """s_1 of x_1."""
        return self.update(0, x)

    def inputs(self, key: jax.Array) -> Int[Array, " length"]:
        """Independent inputs, uniform in low .. size-1."""
        if (self.low, self.size) == (0, 2):
            return random_bits(key, self.length)
        return jax.random.randint(key, (self.length,), self.low, self.size)

    # ---- rows

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*map(str, range(self.size)), self.opening or "", ":", "$")

    @property
    def positions(self) -> int:
        return 2 * self.length + 3

    @property
    def spans(self) -> range:
        """The lengths of rows."""
        return range(self.shortest or self.length, self.length + 1)

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        return self._row(key, self._random_length(key))

    def draw(self, key: jax.Array, row: Int[Array, ""], tries: Int[Array, ""], data: Any) -> Example:
        """Balanced: row after row one input longer, and over again; a length of which the part has nothing gives way to a random one.

        So does one that is not found in time: where lengths are cut together one in 27 with a share of 5 %, else one in half a million.
        """
        if self.lengths is None:
            return super().draw(key, row, tries, data)
        key = jax.random.fold_in(key, tries)
        asked = self.spans.start + row % len(self.spans)
        return self._row(key, jnp.where(tries < (4 * PATIENCE if self._apart else PATIENCE), asked, self._random_length(key)))

    def _random_length(self, key: jax.Array) -> Int[Array, ""]:
        return jax.random.randint(jax.random.split(key)[0], (), self.spans.start, self.spans.stop)

    def _row(self, key: jax.Array, n: Int[Array, ""]) -> Example:
        t, p = jnp.arange(self.length), jnp.arange(self.positions)
        x = jnp.where(t < n, self.inputs(jax.random.split(key)[1]), 0)
        state = self._states(x, n)
        answers = n if self.cot else 1  # states written after `:`
        shown = state[(p - n - 2) % self.length] if self.cot else state[-1]
        opening, colon, end = range(self.size, self.size + 3)
        tokens = jnp.select([p == 0, p <= n, p == n + 1, p < n + 2 + answers], [opening, x[(p - 1) % self.length], colon, shown], end)
        scored = (p > n + 1) & ((p <= n + 2 + answers) | (self.compat == "paper"))
        weights = None if self.final_weight is None else jnp.where(p == n + 1 + answers, self.final_weight, 1.0).astype(jnp.float32)
        return Example(tokens, scored, self._truth(key, n, x, state), weights)

    def _states(self, x: Int[Array, " length"], n: Int[Array, ""]) -> Int[Array, " length"]:
        """s_1 .. s_n, and s_n from there on, in log2(length) steps: updates are tables, which compose."""
        every = jnp.arange(self.size)
        table = jnp.broadcast_to(self.update(every, x[:, None]), (self.length, self.size)).at[0].set(self.first(x[0]))
        table = jnp.where(jnp.arange(self.length)[:, None] < n, table, every)
        return jax.lax.associative_scan(lambda f, g: jnp.take_along_axis(g, f, 1, mode="clip"), table)[:, 0]

    def _truth(self, key: jax.Array, n: Int[Array, ""], x: Int[Array, " length"], state: Int[Array, " length"]) -> dict[str, Truth]:
        t = jnp.arange(self.length)
        reads = jnp.where(t < n, t + n + 1 if self.cot else t + 1, -1)
        made = functools.partial(Truth, positions=reads) if self.size == 2 else _categorical(reads, self.size)
        truth = {"input": made(x), "state": made(state)}
        if self.cot:
            step = jax.random.randint(jax.random.fold_in(key, 2), (1,), 0, n)  # 0 and 1 are what `split` made
            truth["step"] = Truth(step, n + 1 + step, "categorical", self.length)
        return truth

    # ---- contents: input sequences

    @property
    def _kinds(self) -> int:
        return self.size - self.low

    def _shorter(self, n: int) -> int:
        """Contents with fewer than n inputs."""
        return sum(self._kinds**m for m in range(self.spans.start, n))

    def content(self, example: Example) -> Int[Array, " words"]:
        n = jnp.argmax(example.tokens == self.size + 1) - 1
        digits = example.tokens[1 : self.length + 1] - self.low
        words = sequence_content(jnp.where(jnp.arange(self.length) < n, digits, 0), self._kinds, WORD)
        if self.contents is None:
            return jnp.append(words, n)
        return jnp.asarray([self._shorter(m) for m in self.spans])[n - self.spans.start] + words  # shorter rows first

    @property
    def contents(self) -> int | None:
        if self._kinds**self.length >= SMALL_SPACE:
            return None
        rows = self._shorter(self.length + 1)
        return rows if rows < SMALL_SPACE else None

    @property
    def _apart(self) -> bool:
        """Whether every length is cut by itself."""
        return self.split is not None and self.split.by is not None

    @property
    def _ranked(self) -> dict[int, int]:
        """Lengths, and the contents of each, that are few enough to be cut exactly."""
        return {n: self._kinds**n for n in self.spans if self._kinds**n < SMALL_SPACE}

    def share_of(self, task: Task) -> float | None:
        """The mean over its lengths, of which a short one has few contents, and each of them in many rows."""
        otherwise, table = super().share_of(task), self.split_table()
        if otherwise is None or not len(table):
            return otherwise
        assert isinstance(task, IterativeTask)
        cut = np.split(table, np.cumsum(list(self._ranked.values())))  # shorter rows first
        shares = {n: float((own == 0).mean()) for n, own in zip(self._ranked, cut, strict=False)}
        return task._mean(lambda n: shares.get(n, otherwise))

    def split_table(self) -> Any:
        if self.split is None or self.split.by is None:
            return super().split_table()
        return self.split.tables(self._ranked) if self._ranked else ()

    def part(self, example: Example, table: Any) -> Int[Array, ""]:
        drawn = super().part(example, table)
        if not self._apart or self.contents is not None or not self._ranked:
            return drawn
        *words, n = self.content(example)  # shorter rows are cut exactly: their rank is their first word
        rank = jnp.asarray([self._shorter(m) for m in self._ranked])[n - self.spans.start] + words[0]
        return jnp.where(n < self.spans.start + len(self._ranked), jnp.asarray(table)[rank], drawn)

    def part_sizes(self) -> list[dict[str, Any]]:
        """Counted over all contents of every length, by `part` itself."""
        if self.split is None or not self._ranked:
            return []
        table, ranked = self.split_table(), self._ranked
        lengths, ranks = np.repeat(list(ranked), list(ranked.values())), np.concatenate([np.arange(c) for c in ranked.values()])
        t, size = jnp.arange(self.length), max(ranked)

        def part_of(row: tuple[Int[Array, ""], Int[Array, ""]]) -> Int[Array, ""]:
            n, rank = row
            digits = rank // jnp.asarray([self._kinds**i for i in range(size)]) % self._kinds + self.low
            x = jnp.where(t < n, jnp.pad(digits, (0, self.length - size)), self.size + 1)  # behind the inputs `:`
            tokens = jnp.concatenate([jnp.full(1, self.size), x, jnp.full(self.length + 2, self.size + 1)])
            return self.part(Example(tokens, jnp.ones(self.positions, bool)), table)

        parts = np.asarray(jax.jit(lambda rows: jax.lax.map(part_of, rows, batch_size=1024))((jnp.asarray(lengths), jnp.asarray(ranks))))
        return [{"length": n} | named_sizes(parts[lengths == n]) for n in ranked]

    def judge(self, tasks: tuple[Task, ...]) -> Task:
        """Where tasks on the same inputs have lengths in common, one cut of all their lengths."""
        kin = [t for t in tasks if isinstance(t, type(self)) and type(t) is type(self) and t.size == self.size]
        if len({n for t in kin for n in t.spans}) == sum(len(t.spans) for t in kin):
            return self
        if any(t.split != self.split for t in kin):
            raise Invalid("split", [t.split for t in kin], f"allowed: one for all tasks of kind {self.kind} that have lengths in common")
        return dataclasses.replace(self, length=max(t.length for t in kin), shortest=min(t.spans.start for t in kin))

    # ---- losses and lengths

    def scored_tokens(self) -> float:
        return self._mean(self._scored)

    def mean_positions(self) -> float:
        return self._mean(lambda n: n + 3 + (n if self.cot else 1))

    def _scored(self, n: int) -> int:
        return self.positions - n - 2 if self.compat == "paper" else (n if self.cot else 1) + 1

    def _mean(self, of: Callable[[int], float]) -> float:
        return sum(map(of, self.spans)) / len(self.spans)

    def floor(self) -> float | None:
        """0: the states, and where they end, follow from the prompt."""
        return 0.0

    def laws(self) -> Float[np.ndarray, "length size"]:
        """The distribution of s_1, s_2, ...: a Markov chain, since inputs are independent."""
        states, x = np.arange(self.size), np.arange(self.low, self.size)
        lands = np.broadcast_to(np.asarray(self.update(states[:, None], x)), (self.size, len(x)))
        chain = (lands[:, :, None] == states).mean(1)
        law = [(np.broadcast_to(np.asarray(self.first(x)), len(x))[:, None] == states).mean(0)]
        while len(law) < self.length:
            law.append(law[-1] @ chain)
        return np.stack(law)

    def plateau(self) -> float | None:
        """A predictor that knows only how far behind `:` it stands: a state by its law, or the end where the row may end.

        With n uniform in a..b, the token t places behind `:`, where it is scored at all, is `$` in the share
        of rows with n < t, and else s_t. Without cot it is s_n, and then `$`.
        """
        laws = self.laws()
        if not self.cot:
            return _entropy(laws[self.spans.start - 1 :].mean(0)) / self.scored_tokens()
        nats = 0.0
        for t in range(1, self.positions):
            rows = [n for n in self.spans if self._scored(n) >= t]  # those with a scored token there
            ended = sum(n < t for n in rows) / max(1, len(rows))
            state = _entropy(laws[t - 1]) if ended < 1 and rows else 0.0
            nats += len(rows) / len(self.spans) * (coin_entropy(ended) + (1 - ended) * state)
        return nats / self.scored_tokens()


def _categorical(reads: Int[Array, " length"], classes: int) -> Callable[[Int[Array, " length"]], Truth]:
    return lambda values: Truth(values, reads, "categorical", classes)


def _entropy(law: Float[np.ndarray, " size"]) -> float:
    """Nats."""
    return sum(-p * math.log(p) for p in law.tolist() if p > 0)


@spec
class BinaryCopy(IterativeTask):
    """The inputs again: s_t = x_t, fair bits.

    length=4, cot:      C 1 0 1 1 : 1 0 1 1 $      truth: input 1 0 1 1 and state 1 0 1 1, read at :, s_1, s_2, s_3
    scored:                         . . . . .
    length=4, no cot:   C 1 0 1 1 : 1 $ $ $ $      the last input
    """

    @property
    def opening(self) -> str | None:
        return "C"

    def update(self, state: Any, x: Any) -> Any:
        del state
        return x


@spec
class Polynomial(IterativeTask):
    """s_t = s_(t-1) x_t + 1 modulo `modulus`, of inputs uniform in 1 .. modulus-1.

    length=4, cot:      F 3 10 7 2 : 3 9 9 8 $      truth: input 3 10 7 2 and state 3 9 9 8, read at :, s_1, s_2, s_3
    scored:                          . . . . .
    length=4, no cot:   F 3 10 7 2 : 8 $ $ $ $

    It starts from s_1 = x_1, or from s_0 = 0, so that s_1 = 1. With `compat="paper"` and no cot, rows begin with `^` (theirs
    have no token of the task there).
    """

    low: ClassVar[int] = 1
    modulus: int = field(11, "inputs and states are below it", ge=3, le=1000)
    start: Literal["x", "zero"] = field("x", "x: s_1 = x_1, as in the authors' code; zero: s_0 = 0, as in their paper")

    @property
    def opening(self) -> str | None:
        return "^" if self.compat == "paper" and not self.cot else "F"

    @property
    def size(self) -> int:
        return self.modulus

    def update(self, state: Any, x: Any) -> Any:
        return (state * x + 1) % self.modulus

    def first(self, x: Any) -> Any:
        return x if self.start == "x" else self.update(0, x)
