"""When does a transformer with chain of thought grow an iteration head, what needs it, and what does it carry over to other tasks?

    elegans run iteration_heads                              # emergence, with its controls: on a GPU
    elegans run iteration_heads.width --share 1/4            # a part (`PARTS`); its store is runs/iteration_heads.width
    elegans run iteration_heads.width seed=0..4 epochs=300   # cheaper
    elegans run iteration_heads --small                      # two CPU cores, about two minutes; so has every part
    elegans draw runs/iteration_heads.width                  # its figure; of a store that parts share: --study iteration_heads.law

Polynomial iteration s_t = s_(t-1) x_t + 1 mod 11, parity and binary copy of 1 to `length` inputs. The model and its training are those of
Cabannes et al. 2024 ("Iteration Head"): 2 layers, 1 head, no biases, learned positions, a normalised skip path, embedding dropout 0.1;
Adam at 3e-4, batches of 256, passes over 1,024 rows of each length. Ours: rows are split by content, padding is not scored, batches
are shuffled. Means over lengths are of 4 inputs and more where a part measures lengths apart (`evaluate`, `circuit`), else of all.

A part is one question: its docstring says what is run, its cost (structures x runs x steps) and the number to expect. Seeds, rates,
weights of mixtures and ends of curricula are leaves: they share a cohort.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from elegans.figures import Draw, drawing, iteration
from elegans.figures import transfer as figures
from elegans.instruments import AttentionMaps, Circuit, Dynamics, Evaluate, Patch, Probe
from elegans.models import ALiBi, Learned, Positions, Rotary, Sinusoidal
from elegans.studies import Made, Parts
from elegans.studies.iteration_heads.settings import (
    FULL,
    PIECES,
    SMALL,
    Scale,
    after,
    model,
    pair,
    parity,
    polynomial,
    seeded,
    setting,
    sketched,
    taught,
)
from elegans.study import Study
from elegans.sweeps import replace
from elegans.tasks import BinaryCopy, Curriculum, Mixture, Task
from elegans.training import SGD, At, Lion, follow

PUBLISHED = {  # mean test accuracy of 4 and more inputs at epoch 960, by length, of Cabannes et al. 2024 (about 0.03)
    "polynomial, d 32": {5: 1.0, 10: 1.0, 16: 1.0, 20: 1.0, 30: 1.0},
    "polynomial, d 20": {5: 1.0, 10: 1.0, 16: 0.88, 20: 0.62, 30: 0.23},
    "polynomial, d 16": {5: 1.0, 10: 0.38, 16: 0.38, 20: 0.23, 30: 0.03},
    "polynomial, no CoT": {5: 0.1, 10: 0.1, 16: 0.1, 20: 0.1, 30: 0.1},
    "polynomial, 1 layer": {5: 0.87, 10: 0.27, 16: 0.03, 20: 0.03, 30: 0.03},
    "parity, d 32": {5: 1.0, 10: 1.0, 16: 0.93, 20: 1.0, 30: 0.58},
    "parity, no CoT": {5: 1.0, 10: 1.0, 16: 1.0, 20: 1.0, 30: 1.0},
}

PARTS = Parts("iteration_heads", lambda make, small: make(SMALL if small else FULL))


def part(figure: Draw) -> Callable[[Callable[[Scale], Made]], Callable[[bool], Study]]:
    """A part of the study, with the figure of its store, under its function's name."""

    def of(make: Callable[[Scale], Made]) -> Callable[[bool], Study]:
        return PARTS.part(drawing(**{make.__name__: figure}))(make)

    return of


def __getattr__(name: str) -> Study:
    """`study` and `small`: emergence, made when it is asked for."""
    if name in ("study", "small"):
        return dataclasses.replace(PARTS["emergence"](name == "small"), name=f"iteration_heads{'_small' * (name == 'small')}")
    raise AttributeError(f"{__name__} has no {name!r}")


# ---- what must be decided


@part(iteration.emergence)
def emergence(at: Scale) -> Made:
    """Do accuracy and the iteration head appear together, and does neither without chain of thought or with one layer?

    Polynomial, d 32, length 8; 20 seeds with chain of thought and two layers, 20 without it, 20 with one layer. Without chain of
    thought no state is written and the head's pattern is not defined: its peakiness is missing there, not 0.
    Cost: 3 structures x 20 runs x 32,000 steps. Expect (one seed): exact match 0.10 to 1.00 and layer-2 peakiness 0.23 to
    0.96 between epochs 150 and 175.
    """
    arms = setting(at, "CoT"), setting(at, "no CoT", polynomial(at, cot=False)), setting(at, "one layer", of=model(at.d_model, 1))
    maps = AttentionMaps(at="final")
    return seeded(at, *arms), (Circuit(examples=at.examples), Evaluate(own=True, examples=at.examples), maps)


@part(iteration.table(PUBLISHED))
def width(at: Scale) -> Made:
    """How does accuracy fall with the length of the rows and the width of the model, and what do CoT and the second layer change?

    The published table, cell by cell: seven settings at lengths 5, 10, 16, 20 and 30. Cost: 35 structures x 20 runs x 20,000 to
    120,000 steps, about an hour of one H100; `seed=0..4 epochs=500` an eighth of it. Expect `PUBLISHED`: polynomial at d 32 always 1, at
    d 16 down to .03 at length 30, without CoT .1, with one layer .87 to .03; parity without CoT always 1.
    """
    widths, runs = (at.widths if at.small else (32, 20, 16)), []
    for n in at.lengths:
        runs += [setting(at, f"polynomial, d {d}", polynomial(at, n), model(d)) for d in widths]
        runs.append(setting(at, "polynomial, no CoT", polynomial(at, n, False)))
        runs.append(setting(at, "polynomial, 1 layer", polynomial(at, n), model(62, 1)))
        runs.append(setting(at, f"parity, d {at.d_model}", parity(at, n)))
        runs.append(setting(at, "parity, no CoT", parity(at, n, False), model(12)))
    return seeded(at, *sketched(*runs)), (Evaluate(own=True, examples=at.examples, at="final"),)


@part(figures.transfer)
def transfer(at: Scale) -> Made:
    """How much sooner is parity learned after 200 epochs of polynomial iteration than from scratch, and polynomial after parity?

    d 128, length 16; a child starts from its parent's weights at epoch 200, with a new optimiser. Epochs to exact match 0.9 and
    their ratio to scratch, seed by seed, with and without counting the 200. Overriding `seed` would pair children with other seeds'
    parents: leave it. Exact match is of all lengths, 0.9 of which is 0.88 or more of 4 inputs and more (the published ones): their
    three shorter ones are 3 rows of 16; lengths apart would need the weights of all 14,000 recordings, 23 GB.
    Cost: 2 structures x 40 runs x 64,000 and 32,000 steps, half an hour of one H100 or less. Expect: 0.9 after about 20 epochs
    against 615 (30 times; 2.8 times counting the first 200).
    """
    large = at if at.small else dataclasses.replace(at, length=2 * at.length, d_model=4 * at.d_model)
    tasks = {"polynomial": pair(large, 1.0), "parity": pair(large, 0.0)}
    step = round((0.5 if at.small else 0.2) * setting(large, "", tasks["parity"]).length)
    runs = []
    for first, second in (("polynomial", "parity"), ("parity", "polynomial")):
        parent = replace(setting(large, f"{first} from scratch", tasks[first]), "record.weights", At((step,)))
        child = setting(large, f"{second} after {first}", tasks[second], epochs=0.5, every=0.2)
        parents = seeded(at, parent)
        runs += parents + [dataclasses.replace(run, after_step=step) for run in follow(parents, *sketched(child))]
    return runs, ()


@part(iteration.arms)
def finetune(at: Scale) -> Made:
    """Is MLP 2 all that must learn to go from polynomial iteration to parity?

    Parity after polynomial with every weight and with MLP 2 alone (the token of parity keeps its initial vector); both of an
    untrained network as controls, so that what fine-tuning and what transfer save can be compared.
    Cost: 4 structures x 20 to 40 runs x 32,000 steps. Expect from the circuit: MLP 2 alone suffices after polynomial and not without.
    """
    (child,) = sketched(setting(at, "all weights", pair(at, 0.0)))
    alone = dataclasses.replace(child, label="MLP 2 alone", trained=PIECES["MLP 2"])
    control = dataclasses.replace(alone, label="MLP 2 alone, untrained before")
    scratch = dataclasses.replace(child, label="all weights, from scratch")
    return after(taught(at), child, alone) + seeded(at, control, scratch), ()


@part(iteration.patching)
def patching(at: Scale) -> Made:
    """What is the accuracy when attention is replaced by the ideal, by a uniform, or by another network's map?

    The runs of `emergence` with CoT, patched while they train: an ideal map says whether attention is all that is missing before the
    jump, a uniform one whether it is needed after it. Cost: 1 structure x 20 runs x 32,000 steps, and 101 x 20 networks
    patched in 13 ways: each layer alone and all at once, or the whole circuit. Expect from layer 2's peakiness after the jump (0.96,
    one seed): its ideal map leaves exact match about where it is, a uniform one about 0. Nothing is known of layer 1, which may tell
    the step by other keys than EoI: what its ideal map, and so the whole circuit, leave is the question.
    """
    patterns = "iteration_1", "iteration_2", "uniform", "circuit"
    return seeded(at, setting(at, "CoT")), (Patch(patterns=patterns, other="final", examples=256),)


# ---- what the authors left open


@part(iteration.law)
def law(at: Scale) -> Made:
    """By which law does the width that a length needs grow?

    Polynomial with CoT at 5 widths x 4 lengths; fitted: exact match = sigmoid(k (log d - log d_half)), d_half = c length^b, with a
    bootstrap over seeds. Cost: 20 structures x 10 runs x 20,000 to 80,000 steps; with `--store runs/iteration_heads.width` only what
    `width` has not. Expect nothing published; the table of `width` puts half-way near d 16 at length 8 and d 20 at length 20, b about 0.3.
    """
    lengths = [n for n in at.lengths if n <= 20]
    runs = [setting(at, f"d {d}, length {n}", polynomial(at, n), model(d)) for d, n in itertools.product(at.widths, lengths)]
    return seeded(at, *sketched(*runs), share=0.5), (Evaluate(own=True, examples=at.examples, at="final"),)


@part(iteration.arms)
def freezing(at: Scale) -> Made:
    """Which weights must, and which need not, change to go from polynomial iteration to parity?

    Each of embeddings, attention 1, MLP 1, attention 2 and MLP 2 alone, and all but it. Cost: 10 structures x 10 runs x 16,000 steps
    and the parents of `finetune` (10 runs x 32,000). Expect nothing published.
    """
    child = sketched(setting(at, "", pair(at, 0.0), epochs=0.5))[0]
    arms = {f"{name} alone": globs for name, globs in PIECES.items()}
    arms |= {f"all but {name}": ("*", *(f"!{glob}" for glob in globs)) for name, globs in PIECES.items()}
    children = [dataclasses.replace(child, label=label, trained=globs) for label, globs in arms.items()]
    return after(taught(at, 0.5), *children), ()


@part(iteration.forgetting)
def forgetting(at: Scale) -> Made:
    """Is polynomial iteration forgotten while parity is learned after it, and what keeps it?

    Every weight, MLP 2 alone, and every weight with a tenth of polynomial rows left in the mix (a leaf); both tasks are measured all along,
    each by itself and length by length.
    Cost: 3 structures x 20, 40 and 20 runs x 16,000 (parents 32,000) steps. Expect nothing published.
    """
    child = setting(at, "all weights", pair(at, 0.0), epochs=0.5, every=0.5)
    kept = dataclasses.replace(child, label="a tenth of polynomial", task=pair(at, 0.1))
    alone = dataclasses.replace(child, label="MLP 2 alone", trained=PIECES["MLP 2"])
    return after(taught(at), child, kept, alone), (Evaluate(apart="tasks", examples=at.examples),)


@part(iteration.sharpening)
def sharpening(at: Scale) -> Made:
    """Do attention maps go on sharpening after accuracy has saturated, and does weight decay do it?

    Twice the epochs of `emergence`, without and with weight decay 0.1 (a leaf). Cost: 1 structure x 40 runs x 64,000 steps.
    Expect nothing published. Peakiness saturates with accuracy by its definition (a > 0.5): the mean of a and the entropy tell.
    """
    arms = [replace(setting(at, f"weight decay {w:g}", epochs=2, every=2), "optim.weight_decay", w) for w in (0.0, 0.1)]
    return seeded(at, *arms), (Circuit(examples=at.examples), Dynamics(examples=at.examples))


@part(iteration.subtraction)
def subtraction(at: Scale) -> Made:
    """Where can the step t be read: does MLP 1 subtract positions, and does it before or with the jump in accuracy?

    The runs of `emergence` with CoT; linear probes of `step` (one read a row, at any position after any length, so that t is no
    function of the position) before and after every component. Cost: 1 structure x 20 runs x 32,000 steps, 101 x 20 networks probed at 7
    sites. Expect from the circuit: below 1 at the embedding, whose position bounds t, and near 1 from attention 1 on, linearly after MLP 1.
    """
    probe = Probe(features=("step",), families=("embed", "attn_out", "resid_mid", "resid"), fit=2 * at.examples, test=at.examples)
    return seeded(at, setting(at, "CoT")), (probe,)


@part(iteration.heads)
def excess(at: Scale) -> Made:
    """With more layers and heads than needed, where is x_t fetched?

    2, 3 or 4 layers of 1, 2 or 4 heads; every head of every layer scored against both patterns. Cost: 9 structures x 10 runs x
    32,000 steps. Expect nothing published.
    """
    layers, heads = ((2, 3), (1, 2)) if at.small else ((2, 3, 4), (1, 2, 4))
    arms = [setting(at, f"{n} layers, {h} heads", of=model(at.d_model, n, h)) for n, h in itertools.product(layers, heads)]
    return seeded(at, *sketched(*arms), share=0.5), (Circuit(examples=at.examples, at="final"),)


@part(iteration.arms)
def positions(at: Scale) -> Made:
    """How many coordinates must know of positions for polynomial iteration, and must they be learned?

    Positions on the first 1, 2, 4, 8, 16 or all coordinates, learned or frozen as they were drawn. Cost: 12 structures x 10 runs x 32,000
    steps. Expect nothing published on polynomial.
    """
    dims = (2, None) if at.small else (1, 2, 4, 8, 16, None)
    arms = [setting(at, f"{n or 'all'} dimensions", of=model(at.d_model, position=Learned(dims=n))) for n in dims]
    arms += [dataclasses.replace(run, label=f"{run.label}, frozen", trained=("*", "!pos_embed.*")) for run in arms]
    return seeded(at, *sketched(*arms), share=0.5), ()


@part(iteration.arms)
def optimiser(at: Scale) -> Made:
    """How do optimiser, batch, learning rate, weight decay and the order of rows move the jump?

    AdamW in batches of 64, 256 and 1,024 rows, and of 256 in the authors' order (short to long, not shuffled), learning rates 1e-4 to
    3e-3 and weight decay 0 or 0.1; in batches of 256, Lion at 1e-5 to 3e-4 and SGD with momentum 0.9 at 0.01 to 0.3, without weight
    decay. Rates and decay are leaves. Cost: 6 structures, four x 80 runs (8 settings of 10 seeds) x 8,000 to 128,000 steps and two x 40
    runs x 32,000. Expect nothing published.
    """
    rates, batches = ((at.lr, at.lr / 3), (at.batch, 4 * at.batch)) if at.small else ((1e-4, 3e-4, 1e-3, 3e-3), (64, 256, 1024))
    made = []
    for batch, order in [(b, None) for b in batches] + [(at.batch, "short_to_long")]:
        run = replace(setting(dataclasses.replace(at, batch=batch), f"batch {batch}{', short to long' if order else ''}"), "order", order)
        for lr, decay in itertools.product(rates, (0.0, 0.1)):
            named = dataclasses.replace(run, label=f"{run.label}, lr {lr:g}{', decay 0.1' if decay else ''}")
            made.append(replace(replace(named, "optim.lr", lr), "optim.weight_decay", decay))
    others = {"Lion": (Lion(clip=None), (1e-5, 3e-5, 1e-4, 3e-4)), "SGD": (SGD(clip=None), (0.01, 0.03, 0.1, 0.3))}
    for name, (optim, all_rates) in others.items():
        for lr in all_rates[2:] if at.small else all_rates:
            made.append(dataclasses.replace(setting(at, f"{name}, lr {lr:g}"), optim=dataclasses.replace(optim, lr=lr)))
    return seeded(at, *sketched(*made), share=0.5), ()


@part(iteration.generalisation)
def generalisation(at: Scale) -> Made:
    """Trained on rows of 1 to 8 inputs, which position encodings iterate 9 to 16?

    Learned, sinusoidal and rotary positions, none, and ALiBi with the published slope for one head (2^-8, nearly none) and with 1/2.
    Held-out rows are the long ones (a curriculum that stays in its first stage), fresh rows of 1 to 8 are trained on: `metrics` has
    both. Cost: 5 structures x 20 runs (ALiBi 40) x 32,000 steps. Expect: learned positions fail, since those beyond 19 are never trained.
    """
    longer = dataclasses.replace(polynomial(at, 2 * at.length), shortest=at.length + 1)
    task = Curriculum(tasks=(polynomial(at), longer), ends=(1.0,))
    kinds: dict[str, Positions | None] = {"learned": Learned(), "sinusoidal": Sinusoidal(), "rotary": Rotary(), "none": None}
    kinds |= {"ALiBi": ALiBi(), "ALiBi, slope 1/2": ALiBi(span=1.0)}
    arms = [setting(at, name, task, model(at.d_model, position=kind)) for name, kind in kinds.items()]
    return seeded(at, *sketched(*arms)), ()


@part(iteration.arms)
def curricula(at: Scale) -> Made:
    """Do curricula of lengths (a quarter, a half, all) or of tasks (copy, parity, polynomial) bring the jump forward?

    Fresh rows; stages end at 10 % and 20 % or at 20 % and 40 % of the run, or at once (the control), which is a leaf; with earlier stages
    kept in the mix and without. Cost: 4 structures x 60 runs x 32,000 steps. Expect nothing published.
    """
    stages: dict[str, tuple[Task, ...]] = {
        "lengths": tuple(polynomial(at, max(1, at.length // n)) for n in (4, 2, 1)),
        "tasks": (parity(at, kind=BinaryCopy), parity(at), polynomial(at)),
    }
    arms = []
    for name, keep, ends in itertools.product(stages, (False, True), (0.0, 0.1, 0.2)):
        label = f"{name}{', kept' if keep else ''}, {f'to {2 * ends:g}' if ends else 'at once'}"
        arms.append(setting(at, label, Curriculum(tasks=stages[name], ends=(ends, 2 * ends), keep=keep)))
    return seeded(at, *sketched(*arms)), ()


@part(iteration.joint)
def joint(at: Scale) -> Made:
    """Trained on polynomial and parity at once, told apart by the first token: does one head serve both?

    Shares of polynomial 1, 0.5 and 0 (a leaf) with 1 and 2 heads. Rows of each task are scored apart: a head that serves both is peaked on
    rows of either. Cost: 2 structures x 60 runs x 32,000 steps. Expect nothing published.
    """
    mixtures = {w: pair(at, w) for w in (1.0, 0.5, 0.0)}
    arms = [setting(at, f"{w:.0%} polynomial, {h} heads", task, model(at.d_model, heads=h)) for h in (1, 2) for w, task in mixtures.items()]
    return seeded(at, *arms), (Circuit(examples=at.examples, at="final"),)


@part(iteration.mixing)
def mixing(at: Scale) -> Made:
    """Does copying in the mix help parity, and how much of it is best?

    Shares 0 to 0.9 of binary copy, the rest parity (the authors' mix): a leaf. Cost: 1 structure x 120 runs x 32,000 steps. Expect nothing
    published in numbers.
    """
    tasks = parity(at, kind=BinaryCopy), parity(at)
    arms = [setting(at, f"{w:g} copy", Mixture(tasks=tasks, weights=(w, 1 - w))) for w in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)]
    return seeded(at, *arms), (Evaluate(task=parity(at), examples=at.examples),)
