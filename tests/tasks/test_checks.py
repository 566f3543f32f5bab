"""The checker of tasks: a sound task of the user's passes with the right figures, and each broken promise is one line that names it."""

import json
import math
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import BreadthFirstSearch, Curriculum, Invalid, Mixture, Parity, Polynomial, Split, Task, check_task
from elegans.specs import field, spec
from elegans.tasks import counting
from elegans.types import Example, Truth
from running import elegans

BASE, DIGITS = 4, 3


@spec
class Twice(Task):
    """Three digits below 4, `=` and the digits again, unless `broken` says what is wrong with it.

    0 3 1 = 0 3 1     scored: the copy; truth: digit, read where its copy is predicted, and half (the digit is 2 or 3), there too
          . . .
    """

    broken: str = field("nothing", "what is wrong")
    split: Split | None = field(Split(0.5, 0.25), "how contents are divided")

    @property
    def symbols(self):
        return (*("0013" if self.broken == "symbols" else "0123"), "=")

    @property
    def positions(self):
        return 9 if self.broken == "positions" else 2 * DIGITS + 1

    def _arrays(self, key):
        x = jax.random.randint(key, (DIGITS,), 0, BASE)
        tokens = jnp.concatenate([x, jnp.array([BASE]), x])
        scored = jnp.arange(2 * DIGITS + 1) > DIGITS
        return x, {"ids": tokens + 1, "negative": tokens - 1, "floats": tokens * 1.0}.get(self.broken, tokens), scored

    def sample(self, key, data):
        x, tokens, scored = self._arrays(key)
        kind: Literal["binary", "categorical"] = "binary" if self.broken == "kind" else "categorical"
        kind = "colour" if self.broken == "unknown kind" else kind  # type: ignore[assignment]
        late, early = 40 if self.broken == "late" else 0, -9 if self.broken == "early" else 0
        reads = jnp.arange(DIGITS - (self.broken == "reads")) + DIGITS + late + early
        digit = Truth(x, reads, kind, 2 if self.broken == "classes" else BASE)
        scored = {"scored": scored[1:], "marks": scored * 1, "unscored": scored & False}.get(self.broken, scored)
        return Example(tokens, scored, {"digit": digit, "half": Truth((x >= 2).astype(int), jnp.arange(DIGITS) + DIGITS)})

    def batch(self, keys, step, progress, data):
        rows = super().batch(keys, step, progress, data)
        return Example(rows.tokens + (progress > 0.5).astype(int), rows.scored) if self.broken == "batch" else rows

    def content(self, example):
        x = example.tokens[:DIGITS]
        if self.broken == "noise":
            x = jnp.append(x, example.truth["noise"].values[0])
        return {"constant": 0 * x, "float content": x * 0.5, "scalar": x.sum(), "coarse": jnp.minimum(x[:1], 0)}.get(self.broken, x)

    def part(self, example, table):
        own = super().part(example, table)
        return (own + example.truth["coin"].values[0]) % 3 if self.broken == "leak" else 0 * own if self.broken == "one part" else own

    def floor(self):
        return 3.0 if self.broken == "floor" else 0.0

    def plateau(self):
        return 9.0 if self.broken == "plateau" else math.log(BASE)

    def scored_tokens(self):
        return 4.0 if self.broken == "scored tokens" else float(DIGITS)


@spec
class Noisy(Twice):
    """The same with a feature that does not follow from the digits: contents and parts that read it are no cut of the rows."""

    def sample(self, key, data):
        row = super().sample(key, data)
        noise = Truth(jax.random.randint(jax.random.fold_in(key, 1), (1,), 0, 2), jnp.array([DIGITS]))
        return Example(row.tokens, row.scored, {"noise": noise, "coin": noise})


BROKEN = {
    "symbols": ("symbols", "'0'"),
    "positions": ("tokens", "(7,)", "(9,)"),
    "ids": ("tokens", "5", "0 to 4"),
    "negative": ("tokens", "-1", "0 to 4"),
    "floats": ("tokens", "float32", "whole numbers"),
    "scored": ("scored", "(6,)", "(7,)"),
    "marks": ("scored", "int32", "truth values"),
    "unscored": ("scored", "no token"),
    "kind": ("truth.digit.values", "0 to 1", "binary", "kind='categorical'"),
    "unknown kind": ("truth.digit.kind", "'colour'", "categorical"),
    "classes": ("truth.digit.values", "0 to 1", "categorical"),
    "reads": ("truth.digit.values", "(3,)", "(2,)"),
    "late": ("truth.digit.positions", "43", "0 to 5"),
    "early": ("truth.digit.positions", "-6", "-1"),
    "batch": ("batch.tokens", "5", "0 to 4"),
    "constant": ("content", "[0, 0, 0]", "varies"),
    "float content": ("content", "float32", "whole numbers"),
    "scalar": ("content", "()", "one axis"),
    "one part": ("split", "no validation row", "0.25"),
    "floor": ("floor", "3.0", "1.386"),
    "plateau": ("plateau", "9.0", "1.609"),
    "scored tokens": ("scored_tokens", "4.0", "3 of"),
    "noise": ("content", "two of one row"),
    "leak": ("part", "prompts in two parts"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_promise_is_one_line_that_names_task_and_field(broken) -> None:
    task = (Noisy if broken in ("noise", "leak") else Twice)(broken=broken)
    name, *said = BROKEN[broken]
    with pytest.raises(Invalid) as caught:
        check_task(task, rows=200)
    assert str(caught.value).startswith(f"{task.kind}.{name}: ") and "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)


@pytest.fixture(scope="module")
def sound():
    return check_task(Twice(), rows=600, oracle=lambda prompt: prompt[:-1])


def test_the_figures_of_a_sound_task_are_those_of_its_rows(sound) -> None:
    found = {line["check"]: (line["found"], line["promised"]) for line in sound.figures}
    prompts = [tuple(row[:DIGITS]) for row in sound.rows.tokens.tolist()]
    assert len(prompts) == 600 and found["positions"] == (7, 7) and found["scored tokens"] == (3, 3) and found["oracle"] == (600, 600)
    assert found["contents"] == (len(set(prompts)), None) and found["rows alike"] == (600 - len(set(prompts)), None)
    assert found["leaks"] == (0, 0) and found["floor"] == (None, 0)
    assert found["plateau"] == (pytest.approx(math.log(4), abs=0.02), math.log(4))
    shares = [found[f"share of {part}"] for part in ("train", "validation", "test")]
    assert sum(share for share, _ in shares) == pytest.approx(1) and [asked for _, asked in shares] == [0.5, 0.25, 0.25]
    assert all(abs(share - asked) < 0.25 for share, asked in shares)
    digit = next(line for line in sound.figures if line["check"] == "truth.digit")
    assert digit["found"] == 1 and "values 0 to 3" in digit["note"] and "at 3 to 5" in digit["note"]


def test_an_oracle_that_disagrees_is_shown_with_both_answers() -> None:
    with pytest.raises(Invalid, match=r"^twice\.oracle: '(\d) (\d) (\d)' is not allowed; after \3 \2 \1 = the task has \3 \2 \1$"):
        check_task(Twice(), rows=50, oracle=lambda prompt: prompt[-2::-1])


@pytest.mark.parametrize(
    "task",
    [
        Mixture(tasks=(Parity(length=5), Polynomial(length=3, modulus=5))),
        pytest.param(Curriculum(tasks=(Parity(length=5, cot=False), Parity(length=6))), marks=pytest.mark.slow),
        pytest.param(BreadthFirstSearch(vertices=5), marks=pytest.mark.slow),  # its plateau is counted over many rows
    ],
    ids=lambda task: task.kind,
)
def test_tasks_that_ship_keep_their_promises(task) -> None:
    lines = {line["check"]: line for line in check_task(task).figures}
    assert lines["leaks"]["found"] == 0 and {"share of test", "truth.task" if hasattr(task, "tasks") else "contents"} <= set(lines)
    assert isinstance(task, Mixture) or abs(lines["plateau"]["found"] - task.plateau()) < 0.05  # a mixture's sees the task as well


def test_rows_are_counted_alike_wherever_they_are_from() -> None:
    tokens = np.array([[9, 0, 1], [9, 1, 0]])
    counted = counting.of_rows(tokens, np.array([[False, True, True]] * 2), 10)
    assert (counted.scored, counted.end) == (2, 3) and counted.plateau == pytest.approx(math.log(2) + 0.25)


# ---- where it is asked


BAD_FILE = """
import jax, jax.numpy as jnp, elegans as el

@el.spec
class Beyond(el.Task):
    "Ids of another vocabulary."
    @property
    def symbols(self): return ("a", "b")
    @property
    def positions(self): return 5
    def sample(self, key, data):
        return el.Example(jax.random.randint(key, (5,), 0, 2) + 2, jnp.arange(5) > 2)

run = el.Run(Beyond(), el.Transformer(layers=1, d_model=8, heads=2), steps=3)
study = el.Study([el.replace(run, "task", el.Mixture(tasks=(Beyond(), el.Parity(length=5)))), run], instruments=[el.Probe()])
"""


def test_a_broken_task_is_refused_before_anything_is_written(tmp_path) -> None:
    (tmp_path / "beyond.py").write_text(BAD_FILE)
    for words in (("run", tmp_path / "beyond.py", "--store", tmp_path / "store"), ("show", "beyond", "--with", tmp_path / "beyond.py")):
        answer = elegans(*words)
        assert answer.status == 2 and len(answer.err.splitlines()) == 1 and answer.out == ""
        assert "tokens: " in answer.err and "0 to 1" in answer.err
    assert not (tmp_path / "store").exists()


def test_show_prints_what_was_checked() -> None:
    shown = json.loads(elegans("show", "addition", "length=4", "--check", "--json").out)
    assert len(shown["examples"]) == 3 and {line["check"] for line in shown["checks"]} >= {"leaks", "plateau", "truth.carry"}
    text = elegans("show", "addition", "length=4", "--check", "--examples", 0).out
    assert "share of validation" in text and "carry" in text


def test_truth_stands_under_its_token_however_wide_it_is():
    """Several labels are written as bits, and columns are as wide as the widest cell."""
    for words, name in ((("breadth_first_search", "vertices=5"), "adjacency"), (("majority", "length=10"), "running_count")):
        shown = json.loads(elegans("show", *words, "--examples", 1, "--json").out)["examples"][0]["truth"]
        text = elegans("show", *words, "--examples", 1).out.splitlines()
        header = next(line for line in text if line.startswith(" "))
        (line,) = (line for line in text if line.split()[:1] == [name])
        values = dict(zip(shown[name]["positions"], shown[name]["values"], strict=True))
        wanted = ["".join(map(str, v)) if isinstance(v, list) else f"{v:g}" for p, v in sorted(values.items()) if p >= 0]
        assert line.split()[1:] == wanted and len(header.split()) > len(wanted)
        assert {m.start() for m in re.finditer(r"\S+", line)} - {0} <= {m.start() for m in re.finditer(r"\S+", header)}
