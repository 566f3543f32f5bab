"""The query behind each figure: what the report runs, and shows, so that every number can be had again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

FEATURES = "select feature, count(distinct run) as runs from probe where accuracy is not null group by feature order by feature"
LEAD = 'select * from lead order by feature, "group"'
TRANSITION = 'select run, "group", feature, loss_step, feature_step, lead from transition order by feature, run'
CONTRAST = 'select * from contrast where runs + other_runs > 0 order by curve, field, "group", other'
SCALING = "select * from scaling order by task, flops"
SCALING_FIT = "select * from scaling_fit where quantity = 'half' order by task"
SITES = """with ends as (select run, feature, site, step, avg(accuracy) as accuracy from probe
  where accuracy is not null group by run, feature, site, step qualify step = max(step) over (partition by run, feature))
select feature, arg_max(site, mean) as site
from (select feature, site, avg(accuracy) as mean from ends group by feature, site)
group by feature order by feature"""

PATTERNS = "select distinct pattern from circuit order by pattern"


def quoted(value: str) -> str:
    """A string literal of SQL."""
    return "'" + value.replace("'", "''") + "'"


def among(runs: Sequence[str], everyone: int) -> str:
    """A condition on the column `run`; nothing to ask where it is every run."""
    return "true" if len(runs) == everyone else f"run in ({', '.join(quoted(run) for run in sorted(runs))})"


def curves(split: str) -> str:
    """Metrics of one split."""
    return f"select run, step, loss, accuracy, exact_match from metrics where split = {quoted(split)} order by run, step"


def positions(where: str) -> str:
    """Mean loss by position and step, at steps that at least half of the runs reach."""
    return f"""select step, position, avg(loss) as loss, count(distinct run) as runs
from positions where split = 'validation' and {where}
group by step, position qualify 2 * runs >= max(runs) over ()
order by step, position"""


def probe_map(feature: str, where: str, left_out: Collection[tuple[str, str]] = ()) -> str:
    """Mean over runs and token positions, by step, site and bit; null for a control that was not measured."""
    control, untrained = ("null" if ("probe", name) in left_out else f"avg({name})" for name in ("control", "untrained"))
    return f"""select step, site, family, layer, "index", avg(accuracy) as accuracy, {control} as control,
  avg(chance) as chance, {untrained} as untrained, count(distinct run) as runs
from probe where feature = {quoted(feature)} and {where}
group by step, site, family, layer, "index" order by step, layer, site, "index\""""


def probe_curves(sites: dict[str, str], where: str) -> str:
    """Accuracy of each run at each feature's site, mean over bits and positions."""
    pairs = ", ".join(f"({quoted(feature)}, {quoted(site)})" for feature, site in sites.items())
    return f"""select run, step, feature, avg(accuracy) as accuracy, avg(chance) as chance
from probe where (feature, site) in ({pairs}) and {where}
group by run, step, feature order by feature, run, step"""


def ablation(where: str = "true") -> str:
    """What was left after every removal, at the last step measured."""
    return f"""select run, feature, method, direction, draw, exact_match, loss, base_exact_match, base_loss
from ablate where {where}
qualify step = max(step) over (partition by run, feature, method)
order by feature, method, direction, run, draw"""


def attention(run: str) -> str:
    """The maps of one run."""
    return f"""select step, layer, head, query, key, query_label, key_label, attention, length
from attention where run = {quoted(run)} order by step, layer, head, query, key"""


def circuit(pattern: str, where: str) -> str:
    """Scores of each run and head against a pattern, mean over lengths of at least 4 where there are any."""
    return f"""select run, step, layer, head, avg(attention) as attention, avg(peakiness) as peakiness,
  avg(invariance) as invariance, avg(chance) as chance
from (select * from circuit where pattern = {quoted(pattern)} and {where}
  qualify coalesce(length >= 4, true) or max(length) over (partition by run) < 4)
group by run, step, layer, head order by run, step, layer, head"""


def loss_curves(where: str) -> str:
    """Validation loss of some runs."""
    return f"select run, step, loss from metrics where split = 'validation' and {where} order by run, step"
