"""The answer in plain words, and the few numbers at the top of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from elegans.figures import style
from elegans.figures.catalogue import LEARNED, Catalogue, Facts
from elegans.figures.contrasts import Pair, shift_text
from elegans.figures.effects import Lead, plural
from elegans.figures.scaling import Scaled
from elegans.figures.within import Against, Effect
from elegans.tasks import Task

MOST_GROUPS = 6  # named in a sentence
FEW_CONTENTS = 50  # held-out contents, below which scores and probes rest on a handful of prompts
VERDICTS = {
    "leads": "the feature leads",
    "lags": "the feature lags behind",
    "no lead": "no lead",
    "undecided": "undecided: the interval leaves the order open",
}
KINDS = {"random": "random directions", "matched": "random steps of equal length", "labels": "directions fitted to random labels"}
QUIETNESS = ("quiet", "loud", "undecided")
MANY_GROUPS = {
    "leads": "{} comes before the loss",
    "lags": "{} comes after the loss",
    "no lead": "{} shows no lead over the loss",
    "undecided": "whether {} comes first is undecided",
}


def answer(
    found: Sequence[Lead], pairs: Sequence[Pair], removed: Sequence[Effect], runs: Catalogue, grid: Sequence[Scaled] = ()
) -> list[str]:
    """A sentence for every task's scaling, feature's lead, curve's contrast and ablation, from their rows; or that there are none."""
    features = dict.fromkeys(lead.feature for lead in found)
    sentences = [_scaling_sentence(task) for task in grid]
    for feature in features:
        groups = [lead for lead in found if lead.feature == feature]
        sentences.append(_lead_sentence(feature, groups) + _loudness(groups))
    several = {name: len({getattr(e, name) for e in removed}) > 1 for name in ("task", "method")}
    sentences += [_ablation_sentence(effect, **several) for effect in removed]
    sentences += _contrast_sentences(pairs)
    return sentences or ["No transition and no ablation was measured in this store.", learned_sentence(runs)]


def learned_sentence(runs: Catalogue) -> str:
    """How many runs learned, and what that means."""
    if not runs.told:
        return "Whether runs learned is not known: no validation loss or exact match was measured."
    return f"{len(runs.learned):,} of {plural(runs.told, 'run')} learned: {LEARNED}."


def few_held_out(tasks: Iterable[Task]) -> str:
    """That little is left to validate and test on, of tasks of few contents; else nothing."""
    said = []
    for task in tasks:
        if task.contents is None:  # too many to be counted
            continue
        sizes = {part: sum(row[part] for row in task.part_sizes()) for part in ("validation", "test")}
        if 0 < min(sizes.values()) < FEW_CONTENTS:
            said.append(f"{task.kind} has {sizes['validation']} to validate on and {sizes['test']} to test on")
    rest = "held-out scores and probes rest on so few distinct prompts, whatever number of rows they count"
    return f"Few contents are held out: {'; '.join(dict.fromkeys(said))}; {rest}." if said else ""


def the(feature: str) -> str:
    """A feature's name in a sentence."""
    return f"the {feature.replace('_', ' ')}"


# ---- scaling


def _scaling_sentence(task: Scaled) -> str:
    """Where the best loss of a task falls."""
    of, way, (value, low, high) = f"The best loss of {task.task.replace('_', ' ')}", "half-way from plateau to floor", task.half
    first, last = (f"{flops:.2g}" for flops in (task.flops.min(), task.flops.max()))
    early = "" if low is not None else f"; some draws of its seeds are past it at {first}"
    late = "" if high is not None else f"; some draws of its seeds do not pass within {last}"
    if task.floor is None or task.plateau is None:
        said = f"{of} cannot be placed between plateau and floor, which are not known."
    elif value is not None:
        said = f"{of} passes {way} {_budgets(value, low, high)} training FLOPs{early}{late}."
    elif task.values["loss"][0][-1] > (task.floor + task.plateau) / 2:
        said = f"{of} is not {way} at {last} training FLOPs, the most that was run."
    else:
        said = f"{of} is past {way} at {first} training FLOPs, the least that was run."
    return said.replace("e+", "e")


def _budgets(value: float, low: float | None, high: float | None) -> str:
    """Where in training FLOPs a crossing lies, as far as its bounds are known."""
    if low is not None and high is not None:
        return f"between {low:.2g} and {high:.2g}"
    return f"beyond {low:.2g}" if low is not None else f"at {high:.2g} or fewer" if high is not None else f"near {value:.2g}"


# ---- lead


def _lead_sentence(feature: str, groups: list[Lead]) -> str:
    if len(groups) == 1:
        return _one_group(groups[0])
    runs, of = sum(g.runs for g in groups), sum(g.of for g in groups)
    parts: list[str] = []
    for verdict in dict.fromkeys([*MANY_GROUPS, *(g.verdict for g in groups)]):
        chosen = [g for g in groups if g.verdict == verdict]
        if chosen:
            named = "; ".join(f"{g.group}: {_interval(g)}" for g in chosen[:MOST_GROUPS])
            more = f"; and {len(chosen) - MOST_GROUPS} more" if len(chosen) > MOST_GROUPS else ""
            clause = MANY_GROUPS.get(verdict, verdict).format("it" if parts else the(feature))
            parts.append(f"{clause} in {len(chosen)} of {len(groups)} groups ({named}{more})")
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}. Leads in decades of steps; {runs} of {plural(of, 'run')} reached both."


def _loudness(groups: list[Lead]) -> str:
    """Whether the feature is quiet or loud, where half-way and change points decided it or could not."""
    counts = Counter(g.loudness for g in groups if g.loudness)
    if not counts:
        return ""
    known = ", ".join(f"{name} in {counts[name]} of {plural(len(groups), 'group')}" for name in QUIETNESS if counts[name])
    said = next(iter(counts)) if len(groups) == 1 else known
    meaning = ": readable before the loss moves" if set(counts) == {"quiet"} else ""
    return f" By half-way points and change points alike, wherever between two recorded steps these were, it is {said}{meaning}."


def _one_group(lead: Lead) -> str:
    where = f" with {lead.group}" if "=" in lead.group else ""
    if lead.mean is None or lead.runs == 0:
        return (
            f"No run{where} reached both the step of {the(lead.feature)} and that of the loss ({lead.missing}): their order is undecided."
        )
    side, sign = ("before", 1) if lead.mean >= 0 else ("after", -1)
    verdict = VERDICTS.get(lead.verdict, lead.verdict)
    n = f"{lead.runs} of {plural(lead.of, 'run')}{where}"
    size = f"{_interval(lead, sign)} decades of steps {side} the loss falls (a factor of {10 ** abs(lead.mean):.2g})"
    return f"In {n}, {the(lead.feature)} is decodable {size}: {verdict}.{_left_out(lead)}"


def _left_out(lead: Lead) -> str:
    """The runs that the mean says nothing of."""
    said = [f"{plural(lead.ahead, 'run')} where it was readable before training, or while the loss never fell"] if lead.ahead else []
    said += [f"{plural(lead.behind, 'run')} where the loss fell and it never was readable"] if lead.behind else []
    return f" The mean leaves out {', and '.join(said)}; the verdict does not." if said else ""


def _interval(lead: Lead, sign: int = 1) -> str:
    """Mean and 95 % interval; with sign -1 a lag is said as a positive number."""
    if lead.mean is None:
        return lead.missing
    if lead.low is None or lead.high is None:
        return f"{_signed(sign * lead.mean)} (no interval)"
    low, high = sorted((sign * lead.low, sign * lead.high))
    return f"{_signed(sign * lead.mean)} [{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    """Two decimals and a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


# ---- contrasts of groups


def _contrast_sentences(pairs: Sequence[Pair]) -> list[str]:
    """A sentence for every curve that comes later in some group of runs than in another, and one for all that nothing is known of."""
    curves = sorted({pair["curve"] for pair in pairs}, key=lambda curve: (curve != "loss", curve))
    told = [curve for curve in curves if any(p["curve"] == curve and p["verdict"] != "undecided" for p in pairs)]
    left = [the(curve) for curve in curves if curve not in told]
    said = [_contrast_sentence(curve, [pair for pair in pairs if pair["curve"] == curve]) for curve in told]
    if left:
        what = " and ".join([*filter(None, [", ".join(left[:-1])]), left[-1]])
        said.append(f"In which of the groups that differ in one field {what} {'comes' if len(left) == 1 else 'come'} later is undecided.")
    return said


def _contrast_sentence(curve: str, pairs: Sequence[Pair]) -> str:
    """By how much a transition comes later in one group of runs than in another, where that is decided."""
    what = "the loss falls" if curve == "loss" else f"{the(curve)} becomes readable"
    told = sorted((p for p in pairs if p["verdict"] != "undecided"), key=lambda p: -abs(p["half"] or 0))
    said = [f"with {p['group']} than with {p['other']} {shift_text(p, 'half')}, {p['verdict']}" for p in told[:MOST_GROUPS]]
    said += [f"and {plural(len(told) - MOST_GROUPS, 'pair')} more"] if len(told) > MOST_GROUPS else []
    said += [f"undecided in {plural(len(pairs) - len(told), 'other pair')}"] if len(told) < len(pairs) else []
    return f"By how many decades of steps {what} later, half-way point against half-way point: {'; '.join(said)}."


# ---- ablation


def _ablation_sentence(effect: Effect, task: bool, method: bool) -> str:
    """What removing a feature's direction does in the runs that learned, beside that same run's random directions."""
    who = f"{the(effect.feature)}{f' of {the(effect.task)}' if task else ''}{f' ({effect.method})' if method else ''}"
    if effect.base is None or effect.left is None:
        return f"Whether the network uses {who} is not measured: none of the {plural(effect.of, 'ablated run')} learned."
    bounds = "" if effect.low is None else f" [{effect.low:.2f}, {effect.high:.2f}]"
    runs = f"In the {effect.runs} of {plural(effect.of, 'run')} that learned" if effect.of > 1 else "In one run, which learned"
    said = f"{runs}, removing the direction of {who} takes exact match from {effect.base:.2f} to {effect.left:.2f}{bounds}"
    compared = [_against(a, effect.runs) for a in effect.against if a.control in KINDS]
    if not compared:
        return f"{said}; no random direction was removed for comparison."
    return f"{said}; within a run that is {' and '.join(compared)}: {effect.verdict}."


def _against(control: Against, runs: int) -> str:
    bounds = "(no interval)" if control.low is None else f"[{_signed(control.low)}, {_signed(control.high or 0.0)}]"
    once = control.control == "labels"  # a run has one such direction for each of the feature's
    often = "" if once or runs == 1 else f"in {control.beyond} of {plural(runs, 'run')} more than every draw"
    return f"{_signed(control.mean)} {bounds} more than {KINDS[control.control]} take" + (f" ({often})" if often else "")


# ---- key numbers


def key_numbers(runs: Catalogue) -> list[tuple[str, str, str]]:
    """Value, name and note of the few numbers at the top. What was not measured says so."""
    facts = list(runs.facts.values())
    counts = {state: sum(f.state == state for f in facts) for state in ("finished", "unfinished", "diverged")}
    states = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    numbers = [(f"{len(facts):,}", "runs", states)]
    numbers.append(
        (f"{len(runs.learned):,} of {runs.told:,}" if runs.told else "not measured", "learned", "last validation loss past half-way")
    )
    best = min((f for f in facts if f.loss is not None), key=lambda f: (f.loss, f.id), default=None)
    value = "not measured" if best is None or best.loss is None else style.precise(best.loss)
    numbers.append((value, "best validation loss", _bounds(best)))
    test = best and best.test_exact_match
    numbers.append(("not measured" if test is None else f"{test:.3f}", "its test exact match", f"run {best.id}" if best else ""))
    sizes = [f.row["parameters"] for f in facts if f.row["parameters"] is not None]
    span = "not known" if not sizes else f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    numbers.append((span, "parameters", ""))
    flops = [f.row["flops_per_step"] * f.row["length"] for f in facts if None not in (f.row["flops_per_step"], f.row["length"])]
    numbers.append((f"{sum(flops):.2g}".replace("e+", "e") if flops else "not known", "training FLOPs", "planned, all runs together"))
    return numbers


def _bounds(best: Facts | None) -> str:
    if best is None:
        return ""
    known = [f"{kind} {value:.3g}" for kind, value in (("floor", best.floor), ("plateau", best.plateau)) if value is not None]
    return ", ".join(["nats per scored token", *known])
