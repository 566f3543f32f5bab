"""Figures of iteration heads, from rows: learning and attention against epochs, settings beside each other, tables, a fitted law."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy import optimize

from elegans.errors import StoreError
from elegans.figures import style
from elegans.figures.catalogue import COVERAGE, natural
from elegans.figures.lines import (
    Draw,
    Drawn,
    Lines,
    colours,
    draw_lines,
    draw_strips,
    draw_table,
    draw_times,
    exact_match,
    lines,
    moment,
    panels,
    require,
    share_of,
    summary,
)
from elegans.instruments.crossings import Bracket, spanning
from elegans.store import Store

PEAKED, NO_LAYER = 0.5, -1  # share of queries whose attention is mostly on x_t, above which a head fetches it
LEAST = 4  # inputs of the shortest row that counts, as in the authors' figures
COUNTED = f'm.length >= least({LEAST}, "task.length")'
FETCH = f"m.pattern = 'iteration_2' and m.length >= {LEAST}"


def emergence(store: Store) -> Drawn:
    """Exact match and layer-2 peakiness against epochs; and, run by run, where each is half-way."""
    figure, axes = panels(3)
    exact = lines(store, "evaluate", "avg(exact_match)", f"m.length >= {LEAST}")
    last = f"{FETCH} and m.layer = (select max(layer) from circuit c where c.run = m.run)"
    peaked = lines(store, "circuit", "avg(peakiness)", last)
    (_, unit), of, pairs = moment(store), colours(exact), half_ways(exact, peaked)
    draw_lines(axes[0], exact, "exact match", unit, of=of)
    draw_lines(axes[1], peaked, "peakiness of the last layer", unit, of=of)
    axes[0].legend(loc="best", fontsize=5.5)
    for label, found in pairs.items():
        middles = np.array(found).reshape(-1, 2, 2).mean(-1)
        axes[2].plot(middles[:, 0], middles[:, 1], ".", color=of[label], alpha=0.6)
    known = [pair for found in pairs.values() for pair in found]
    if known:
        axes[2].axline((min(a for pair in known for a, _ in pair),) * 2, slope=1, color=style.GREY, linewidth=0.8)
        later = _interval(spanning([(a - d, b - c) for (a, b), (c, d) in known], COVERAGE))
        both = ", ".join(f"{label} {len(found)} of {len(exact[label].runs)}" for label, found in pairs.items())
        axes[2].set_title(f"after the head by\n{later} {unit}s\n({both})", fontsize=5.5)
    axes[2].set(xlabel=f"exact match 0.5 ({unit})", ylabel=f"peakiness 0.5 ({unit})")
    return figure, summary(exact_match=exact, peakiness=peaked)


def half_ways(exact: Mapping[str, Lines], peaked: Mapping[str, Lines]) -> dict[str, list[tuple[Bracket, Bracket]]]:
    """Of every run in which both pass 0.5 for good, the recorded moments between which its exact match and its peakiness do."""
    made: dict[str, list[tuple[Bracket, Bracket]]] = {}
    for label in (label for label in exact if label in peaked):
        accuracy, head = (dict(zip(each.runs, each.brackets(0.5), strict=True)) for each in (exact[label], peaked[label]))
        both = [(accuracy[run], head[run]) for run in accuracy if run in head]
        made[label] = [pair for pair in both if all(math.isfinite(end) for ends in pair for end in ends)]
    return made


def _interval(found: tuple[float, float | None, float | None]) -> str:
    mean, low, high = found
    return f"{mean:.3g}" if low is None or high is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def arms(store: Store) -> Drawn:
    """Every setting's exact match on test rows at the end, and when validation rows passed 0.9."""
    final = lines(store, "metrics", "max(exact_match)", "split = 'test'")
    course = exact_match(store)
    figure, axes = panels(2, 0.7 + 0.17 * len(final), sharey=True)
    draw_strips(axes[0], {label: each.last for label, each in final.items()}, "exact match, test")
    axes[0].set_xlim(-0.03, 1.03)
    draw_times(axes[1], {label: course[label] for label in final}, moment(store)[1])
    return figure, summary(test_exact_match=final, exact_match=course)


def generalisation(store: Store) -> Drawn:
    """Exact match of rows as long as those trained on, at the end of training, and of longer ones, with their share of right tokens."""
    short = lines(store, "metrics", "avg(exact_match)", "split = 'train' and m.step >= 0.9 * r.length")
    exact, tokens = (lines(store, "metrics", f"max({value})", "split = 'test'") for value in ("exact_match", "accuracy"))
    columns = {"exact match, rows in training": short, "exact match, longer rows": exact, "right tokens, longer rows": tokens}
    figure, axes = panels(3, 0.7 + 0.17 * len(exact), sharey=True)
    for each, (title, found) in zip(axes, columns.items(), strict=True):
        draw_strips(each, {label: np.nanmean(line.values, 1).tolist() for label, line in found.items()}, title)
        each.set_xlim(-0.03, 1.03)
    return figure, summary(training_exact_match=short, longer_exact_match=exact, longer_accuracy=tokens)


def table(published: Mapping[str, Mapping[int, float]]) -> Draw:
    """Settings x lengths of the runs, measured at their ends, beside the published ones; grey where there are no rows."""

    def draw(store: Store) -> Drawn:
        length = """r.label || ' @ ' || "task.length" """
        found = lines(store, "evaluate", "avg(exact_match)", COUNTED, by=length)
        columns = sorted(set(store.table("runs")["task.length"].to_pylist()))
        values, theirs = np.full((2, len(published), len(columns)), np.nan)
        texts = np.full(values.shape, "", object)
        for (i, row), (j, n) in itertools.product(enumerate(published), enumerate(columns)):
            theirs[i, j] = published[row].get(n, np.nan)
            if cell := found.get(f"{row} @ {n}"):
                values[i, j], low, high = share_of(cell.last)
                texts[i, j] = f"{values[i, j]:.2f}\n" + (f"{len(cell.runs)} seeds" if low is None else f"{low:.2f}–{high:.2f}")
        seeds = {f"{len(cell.runs)}" for cell in found.values()}
        titles = f"measured, 95 % interval, {' or '.join(sorted(seeds, key=natural))} seeds", "published"
        rows = list(published)
        figure, axes = panels(2, 0.6 + 0.3 * len(rows), sharey=True)
        draw_table(axes[0], values, rows, columns, texts)
        draw_table(axes[1], theirs, rows, columns)
        for each, title in zip(axes, titles, strict=True):
            each.set_title(title)
            each.set_xlabel("inputs of the longest row")
        return figure, summary(test_exact_match=found)

    return draw


def patching(store: Store) -> Drawn:
    """Exact match while training, as it is and with the maps of a layer, or of all, replaced."""
    figure, axes = panels(3, sharey=True)
    base = {"no patch": next(iter(lines(store, "patch", "max(base_exact_match)", by="'no patch'").values()))}
    place = "coalesce('layer ' || (layer + 1), 'all')"
    ideal = "(source = 'iteration_1' and layer = 0 or source = 'iteration_2' and layer = 1 or source = 'circuit')"
    titles = {"ideal": ideal, "uniform": "source = 'uniform'", "its own at the end": "source = 'final'"}
    made = {title: base | lines(store, "patch", "max(exact_match)", where, by=place) for title, where in titles.items()}
    for each, (title, found) in zip(axes, made.items(), strict=True):
        draw_lines(each, found, "exact match" if each is axes[0] else "", moment(store)[1])
        each.set_title(f"attention: {title}")
        each.legend(loc="best", fontsize=5.5)
    return figure, summary(**made)


def sharpening(store: Store) -> Drawn:
    """Exact match, mean attention to x_t, entropy and largest share of the last layer, against epochs."""
    figure, axes = panels(4)
    last = "layer = (select max(layer) from circuit)"
    made = {
        "exact match": exact_match(store),
        "attention to x_t": lines(store, "circuit", "avg(attention)", f"{FETCH} and {last}"),
        "entropy, nats": lines(store, "dynamics", "avg(entropy)", f"m.of = 'attention' and {last}"),
        "largest share": lines(store, "dynamics", "avg(peak)", f"m.of = 'attention' and {last}"),
    }
    for each, (name, found) in zip(axes, made.items(), strict=True):
        draw_lines(each, found, name, moment(store)[1], name != "entropy, nats")
    axes[0].legend(loc="best", fontsize=5.5)
    return figure, summary(**made)


def subtraction(store: Store) -> Drawn:
    """How well the step is read at every site, beside random labels and chance, and the exact match."""
    figure, axes = panels(2)
    found = lines(store, "probe", "avg(accuracy)", "feature = 'step'", by="m.layer || ' ' || m.site")  # embed is of layer -1
    order = ("embed", "attn_out", "resid_mid", "resid")
    along = sorted(found, key=lambda name: (int(name.split()[0]), order.index(name.split()[1].split(".")[0])))
    read = {name.split()[1]: found[name] for name in along}
    level = {
        name: next(iter(lines(store, "probe", f"avg({name})", "feature = 'step'", by="''").values())) for name in ("control", "chance")
    }
    exact = exact_match(store)
    draw_lines(axes[0], read | level, "accuracy of the step", moment(store)[1])
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=5.5)
    draw_lines(axes[1], exact, "exact match", moment(store)[1])
    return figure, summary(step=read, control={"": level["control"]}, chance={"": level["chance"]}, exact_match=exact)


def heads(store: Store) -> Drawn:
    """By setting, the layer whose head looks most at x_t, if any head is peaked there, and how peaked the sharpest head of all is."""
    require(store, "circuit")
    best = store.sql(f"""select r.label, run, layer, max(y) as y from (select run, layer, head, avg(attention) as y from circuit m
where {FETCH} group by all) join runs r using (run) group by all order by run, y desc""").to_pylist()
    sharp = lines(store, "(select run, step, layer, head, avg(peakiness) as y from circuit m where " + FETCH + " group by all)", "max(m.y)")
    top = {row["run"]: row for row in reversed(best)}.values()  # of each run the layer that looks most
    peaks = {run: y for each in sharp.values() for run, y in zip(each.runs, each.values[:, -1], strict=True)}
    found = {row["run"]: row["layer"] if peaks[row["run"]] > PEAKED else NO_LAYER for row in top}
    layers = [*sorted({row["layer"] for row in best}), NO_LAYER]
    there = {(row["label"], row["layer"]) for row in best} | {(label, NO_LAYER) for label in sharp}
    shares = [[np.mean([found[r] == n for r in sharp[k].runs]) if (k, n) in there else np.nan for n in layers] for k in sharp]
    figure, axes = panels(2, 0.7 + 0.2 * len(sharp), sharey=True)
    peaked = {f"{label} ({len(each.runs)})": each.values[:, -1].tolist() for label, each in sharp.items()}
    draw_table(axes[0], np.array(shares), list(peaked), ["none" if n == NO_LAYER else n + 1 for n in layers])
    axes[0].set_title("share of runs in which\nthis layer looks most at x_t")
    axes[0].set_xlabel("layer")
    draw_strips(axes[1], peaked, "peakiness of the sharpest head")
    axes[1].set_xlim(-0.03, 1.03)
    return figure, summary(peakiness=sharp)


def joint(store: Store) -> Drawn:
    """How peaked the sharpest head is on rows of each task, and the head that is sharpest on both: whether one serves both."""
    peaks = f"select run, step, layer, head, pattern, avg(peakiness) as y from circuit where length >= {LEAST} group by all"
    asked = {
        "sharpest head, polynomial rows": f"select run, step, y from ({peaks}) where pattern = 'polynomial.iteration_2'",
        "sharpest head, parity rows": f"select run, step, y from ({peaks}) where pattern = 'parity.iteration_2'",
        "the same head, rows of either": f"""select run, step, min(y) as y from ({peaks}) where pattern like '%.iteration_2'
group by run, step, layer, head having count(*) = 2""",
    }
    require(store, "circuit")
    made = {title: lines(store, f"({query})", "max(m.y)") for title, query in asked.items()}
    seeds = {label: len(each.runs) for found in made.values() for label, each in found.items()}
    labels = [(label, seeds[label]) for label in sorted(seeds, key=natural)]
    figure, axes = panels(3, 1.0 + 0.2 * len(labels), sharey=True)
    for each, (title, found) in zip(axes, made.items(), strict=True):
        ends = {f"{label} ({n})": found[label].values[:, -1].tolist() if label in found else [] for label, n in labels}
        draw_strips(each, ends, "peakiness", {k: f"{sum(v > PEAKED for v in vs)}/{len(vs)}" if vs else "" for k, vs in ends.items()})
        each.set_xlim(-0.03, 1.03)
        each.set_title(title.replace(", ", "\n"))
    figure.supxlabel(f"right of each row: runs above {PEAKED:g}; the same head: peakiness on the task on which it is less", fontsize=6)
    return figure, summary(**made)


def forgetting(store: Store) -> Drawn:
    """Exact match on rows of the new task and of the parent's, each by itself, against epochs."""
    figure, axes = panels(2)
    tasks = {"parity, the new task": "m.task = 'parity'", "polynomial, the parent's": "m.task <> 'parity'"}
    made = {title: lines(store, "evaluate", "avg(exact_match)", f"{where} and m.length >= {LEAST}") for title, where in tasks.items()}
    new, old = made.values()
    for each, (title, found) in zip(axes, made.items(), strict=True):
        draw_lines(each, found, "exact match", moment(store)[1], of=colours(old))
        each.set_title(title)
    axes[1].legend(loc="best", fontsize=5.5)
    return figure, summary(new=new, old=old)


def mixing(store: Store) -> Drawn:
    """Parity alone: exact match against epochs, and when it passed 0.9."""
    alone = lines(store, "evaluate", "max(exact_match)", "m.length is null")
    figure, axes = panels(2)
    draw_lines(axes[0], alone, "exact match, parity alone", moment(store)[1])
    draw_times(axes[1], alone, moment(store)[1])
    for name in axes[1].get_yticklabels():
        name.set_color(colours(alone)[name.get_text()])  # the key to both panels
    return figure, summary(parity=alone)


# ---- the law of length and width


@dataclasses.dataclass(frozen=True)
class Law:
    """exact match = sigmoid(k (log d - log d_half)), d_half = c length^b."""

    c: float
    b: float
    k: float

    def half(self, length: Any) -> Any:
        """The width at which half of the rows are right."""
        return self.c * np.asarray(length, float) ** self.b

    def share(self, d: Any, length: Any) -> Any:
        """Exact match."""
        return 1 / (1 + np.exp(np.clip(-self.k * (np.log(d) - np.log(self.half(length))), -50, 50)))


def fit_law(d: Float[np.ndarray, " run"], length: Float[np.ndarray, " run"], share: Float[np.ndarray, " run"]) -> Law:
    """By least squares of shares."""

    def law(p: np.ndarray) -> Law:
        return Law(float(np.exp(p[0])), float(p[1]), float(np.exp(p[2])))

    start = np.array([np.log(d).mean(), 0.0, 1.0])
    return law(optimize.least_squares(lambda p: law(p).share(d, length) - share, start, bounds=([-5, -5, -3], [10, 5, 5])).x)


def law(store: Store, draws: int = 200) -> Drawn:
    """Exact match against width at every length, and the fitted width that a length needs, with a bootstrap over runs of each cell."""
    require(store, "evaluate")
    query = f"""select "model.d_model" as d, "task.length" as n, avg(m.exact_match) as y from runs r join evaluate m using (run)
where {COUNTED} and r.task = 'polynomial' and "task.cot" and "model.layers" = 2 group by run, d, n order by all"""
    d, n, y = (np.array(store.sql(query)[name].to_pylist(), float) for name in ("d", "n", "y"))
    if not d.size:
        raise StoreError(f"{store.path}: no polynomial iteration with two layers to draw a law of")
    cells = [np.nonzero((d == a) & (n == b))[0] for a, b in sorted(set(zip(d, n, strict=True)))]
    generator, best = np.random.default_rng(0), fit_law(d, n, y)
    picks = [np.concatenate([generator.choice(cell, len(cell)) for cell in cells]) for _ in range(draws)]
    fits = [fit_law(d[i], n[i], y[i]) for i in picks]
    low, high = np.quantile([fit.b for fit in fits], [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    figure, axes = panels(2)
    widths, lengths = np.geomspace(d.min(), d.max(), 50), np.unique(n)
    for colour, length in zip(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(lengths))), lengths, strict=True):
        axes[0].plot(widths, best.share(widths, length), color=colour, label=f"{length:g} inputs")
        axes[0].plot(d[n == length], y[n == length], ".", color=colour, alpha=0.6, markersize=4, markeredgewidth=0)
    axes[0].legend(loc="best", fontsize=5.5)
    axes[0].set(xscale="log", xlabel="d_model", ylabel="exact match, test", ylim=(-0.03, 1.03))
    along = np.geomspace(lengths.min(), lengths.max(), 50)
    every = np.quantile([fit.half(along) for fit in fits], [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    axes[1].fill_between(along, *every, color=style.BLUE, alpha=0.2, linewidth=0)
    axes[1].plot(along, best.half(along), color=style.BLUE)
    axes[1].set(xscale="log", yscale="log", xlabel="inputs of the longest row", ylabel="d_model, half are right")
    axes[1].set_ylim(d.min() / 2, 2 * d.max())  # what lies beyond the widths of the runs is extrapolated
    axes[1].axhspan(d.min(), d.max(), color=style.GREY, alpha=0.12, linewidth=0)
    axes[1].text(0.03, 0.97, "grey: widths of the runs", transform=axes[1].transAxes, va="top", fontsize=5.5, color=style.GREY)
    widths = np.unique(d)
    for axis, ticks in ((axes[0].xaxis, widths), (axes[1].xaxis, lengths), (axes[1].yaxis, [d.min() / 2, *widths, 2 * d.max()])):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes[1].set_title(f"exponent {best.b:.2f} [{low:.2f}, {high:.2f}]")
    return figure, pa.Table.from_pylist([{"c": best.c, "b": best.b, "b_low": float(low), "b_high": float(high), "k": best.k}])
