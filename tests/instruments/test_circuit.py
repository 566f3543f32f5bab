"""Where heads look: the hand-made iteration head has exact scores, and its idle heads have those of uniform attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans.errors import Invalid
from elegans.instruments import AttentionMaps, Circuit, Dynamics
from elegans.instruments.attention import labels_of
from elegans.instruments.circuit import summary
from elegans.instruments.patterns import EVERYWHERE, maps_of, names_of, targets
from elegans.models.iterator import HEADS, IDLE_HEADS
from elegans.models.transformer import Transformer
from elegans.randomness import Purpose, key_for
from elegans.specs import spec
from elegans.tasks import Addition, BinaryCopy, Curriculum, Mixture, Parity
from elegans.tasks.sampling import draw_set, prepare
from elegans.training import Run
from elegans.training.vectors import ravel
from elegans.types import Example, Truth
from iterating import NETWORKS, RUNS, TASK, held_out, measured

PLACES = [(layer, head) for layer in (0, 1) for head in (0, 1)]
ROWS = 128


# ---- patterns


def test_patterns_of_a_row_drawn_by_hand():
    """`P 1 0 1 : 1 1 0 $`, padded: positions 0 to 8; queries after the one that predicts `$` count nowhere."""
    reads = Truth(jnp.array([1, 0, 1, 0]), jnp.array([4, 5, 6, -1]))
    tokens = jnp.array(["01P:$".index(c) for c in "P101:110$$$"])
    row = Example(tokens, (jnp.arange(11) >= 5) & (jnp.arange(11) <= 8), {"input": reads, "state": reads})
    found = {name: t.tolist() for name, t in jax.jit(lambda row: targets(Parity(length=4, shortest=1), row))(row).items()}
    no = -1
    assert found == {
        "iteration_1": [no, no, no, no, no, 4, 4, 4, no, no],  # the states, to the last, which predicts `$`
        "iteration_2": [no, no, no, no, 1, 2, 3, no, no, no],
        "previous": [no, 0, 1, 2, 3, 4, 5, 6, no, no],
        "self": [no, 1, 2, 3, 4, 5, 6, 7, no, no],
        "first": [no, 0, 0, 0, 0, 0, 0, 0, no, no],
        "uniform": [no, *[EVERYWHERE] * 7, no, no],
        "induction": [no, no, no, 2, no, 4, 6, 3, no, no],  # after the last earlier token of the same symbol
    }


def test_a_rows_iteration_is_that_of_its_task():
    """In a mixture: a token before the row, the reads under the task's name, and nothing where the states are not written."""
    tokens = jnp.zeros(9, int)  # `<parity>P10:11$$`, were it one

    def found(name, *reads):
        truth = {"other.input": Truth(jnp.zeros(3, int), jnp.full(3, -1)), name: Truth(jnp.zeros(2, int), jnp.array(reads))}
        made = jax.jit(lambda row: targets(TASK, row))(Example(tokens, jnp.arange(9) >= 5, truth))
        return [made[n].tolist() for n in ("iteration_1", "iteration_2")]

    no = -1
    assert found("parity.input", 4, 5) == [[no] * 5 + [4, 4, no], [no] * 4 + [2, 3, no, no]]
    assert found("input", 3, 4) == [[no] * 4 + [3, 3, no, no], [no] * 3 + [1, 2, no, no, no]]  # without that token
    assert found("input", 1, 2) == [[no] * 8] * 2  # read at the inputs themselves


MIXED = Mixture(tasks=(TASK, BinaryCopy(length=3, shortest=1, split=None)), weights=(0.3, 0.7))


@pytest.fixture(scope="module")
def mixed():
    """The rows that a run of it is measured on, with what patterns say of them."""

    def made():
        rows = draw_set(MIXED, "test", key_for(0, Purpose.INSTRUMENT), ROWS, prepare(MIXED))
        return rows.tokens, jax.vmap(lambda row: targets(MIXED, row))(rows)

    return jax.device_get(jax.jit(made)())


def test_patterns_of_a_mixture_are_there_for_rows_of_each_task_apart(mixed):
    """A row's first token tells its task."""
    tokens, made = mixed
    of_parity = tokens[:, 0] == MIXED.symbols.index("P")
    assert 0 < of_parity.sum() < ROWS and len(made) == 2 * 3 + 5
    for name in ("iteration_1", "iteration_2"):
        np.testing.assert_array_equal(made[f"parity.{name}"], np.where(of_parity[:, None], made[name], -1))
        np.testing.assert_array_equal(made[f"binary_copy.{name}"], np.where(of_parity[:, None], -1, made[name]))
    assert "parity.iteration_2" not in names_of(Run(MIXED.tasks[0], Transformer(layers=1, d_model=8, heads=1), steps=1))
    lone = Curriculum(tasks=MIXED.tasks, ends=(0.5,))  # held-out rows are of the last task alone
    assert names_of(Run(lone, Transformer(layers=1, d_model=8, heads=1), steps=1))[:3] == ("iteration_1", "iteration_2", "first")


def test_a_head_is_scored_on_the_rows_of_each_task_by_plain_loops(mixed):
    """On an untrained network: what the query before s_t gives to x_t, places read off the text."""
    model = Transformer(layers=1, d_model=8, heads=2, init_std=0.5)
    run = Run(MIXED, model, steps=1)
    params = model.init(jax.random.key(0), MIXED.vocab_size, MIXED.positions)
    asked = "iteration_2", "parity.iteration_2", "binary_copy.iteration_2"
    instrument = Circuit(patterns=asked, examples=ROWS, by_length=False)
    (table,) = instrument._over({run.id: run}, [(run.id, 1, np.asarray(ravel(params)))], lambda *_: None)
    made = table.to_pandas().set_index(["pattern", "head"])["attention"]
    maps = np.asarray(jax.jit(lambda: maps_of(run, params, jnp.asarray(mixed[0])))())[:, 0]
    found = {"P": [], "C": []}
    for text, attention in zip(map(MIXED.text, mixed[0]), maps, strict=True):
        length = text.index(":") - 1
        found[text[0]] += [attention[:, length + t, t] for t in range(1, length + 1)]
    for head in (0, 1):
        for name, values in zip(asked, (found["P"] + found["C"], found["P"], found["C"]), strict=True):
            assert made[name, head] == pytest.approx(np.mean(values, 0)[head], rel=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_the_last_state_of_a_row_without_an_end_predicts_nothing(padding):
    """`P10:11`, padded or not: s_2 is no query."""
    tokens = jnp.zeros(6 + padding, int)
    truth = {"input": Truth(jnp.array([1, 0]), jnp.array([3, 4]))}
    row = Example(tokens, jnp.array([0, 0, 0, 0, 1, 1, 0][: len(tokens)], bool), truth)
    made = jax.jit(lambda row: targets(TASK, row))(row)
    no = -1
    assert made["iteration_1"].tolist() == [no] * 4 + [3] + [no] * padding
    assert made["iteration_2"].tolist() == [no] * 3 + [1, 2] + [no] * padding


@spec
class WithCircuit(Addition):
    """Addition that says where its circuit looks: always two tokens back."""

    def attends(self, example):
        return {"two_back": jnp.maximum(jnp.arange(self.positions) - 2, -1)}


def test_a_task_names_patterns_of_its_own():
    run = Run(WithCircuit(length=3), Transformer(layers=1, d_model=8, heads=1), steps=1)
    assert names_of(run)[0] == "two_back" and "iteration_1" not in names_of(run)
    assert "iteration_1" not in names_of(Run(Parity(length=4, cot=False), run.model, steps=1))
    with pytest.raises(Invalid, match=r"nowhere.*two_back, .*uniform"):
        Circuit(patterns=("nowhere",)).check_names([run])
    bare = Run(run.task, Transformer(layers=1, d_model=8, heads=1, attention=None), steps=1)
    with pytest.raises(Invalid, match="no attention"):
        Circuit().layouts(bare)


# ---- scores


@pytest.fixture(scope="module")
def circuit():
    return measured(Circuit(examples=ROWS)).set_index(["run", "layer", "head", "pattern", "length"]).sort_index()


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_iteration_head_has_exact_scores(circuit, length):
    for pattern, own in HEADS.items():
        for place in PLACES:
            row = circuit.loc[("perfect", *place, pattern, length)]
            last = pattern == "iteration_1"  # its queries are s_1 .. s_L, those of the other EoI, s_1 .. s_(L-1)
            uniform = np.mean([1 / (length + t + 1 + last) for t in range(1, length + 1)])
            other = last / length  # of the head that fetches x_t: from s_L, what comes after the last input, EoI
            expected = 1 if place == own else uniform if place in IDLE_HEADS else other
            assert row["peakiness"] == pytest.approx(0 if place in IDLE_HEADS else expected)
            assert row["attention"] == pytest.approx(expected, abs=1e-6) and row["chance"] == pytest.approx(uniform)
            assert row["invariance"] == pytest.approx(1, abs=1e-5)
    # Queries 1 .. 2 length + 1 count; one of them, EoI, looks at itself, and one at the token before it, EoI.
    for pattern in ("self", "previous"):
        assert circuit.loc[("perfect", 0, 0, pattern, length), "peakiness"] == pytest.approx(1 / (2 * length + 1))
    assert circuit.loc[("perfect", 0, 0, "first", length), "peakiness"] == 0
    assert (circuit.loc[[("perfect", *place, "uniform", length) for place in IDLE_HEADS], "attention"] > 1 - 1e-5).all()


def test_a_broken_head_scores_as_an_idle_one_and_an_untrained_network_near_chance(circuit):
    columns = ["attention", "peakiness", "invariance"]
    flat = circuit.loc["perfect"].loc[1, 1][columns]
    np.testing.assert_allclose(circuit.loc["no fetch"].loc[1, 0][columns], flat, atol=1e-6)
    np.testing.assert_allclose(circuit.loc["no start"].loc[0, 0][columns], flat, atol=1e-6)
    np.testing.assert_allclose(circuit.loc["no start"].loc[1, 0][columns], flat, atol=1e-6)  # no time to look at
    untrained = circuit.loc["untrained"].reset_index()
    mine = untrained[untrained["pattern"].isin(HEADS)]
    assert mine["peakiness"].max() < 0.5 and np.abs(mine["attention"] - mine["chance"]).max() < 0.25
    assert untrained["invariance"].between(0.5, 0.9999).any()  # its attention depends on what it reads


def test_lengths_together_and_one_pattern():
    made = measured(Circuit(examples=ROWS, by_length=False, patterns=("iteration_2",)))
    assert len(made) == len(NETWORKS) * 4 and made["length"].isna().all()
    assert made.set_index(["run", "layer", "head"])["peakiness"].loc[("perfect", 1, 0)] == 1


def test_scores_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    a, chance = rng.random((9, 1, 1, 2, 5)).astype(np.float32), rng.random((9, 2, 5)).astype(np.float32)
    counted = rng.random((9, 2, 5)) < 0.4
    counted[:, 1, 3] = False
    counted[0, 1, 4], counted[1:, 1, 4] = True, False  # a lone row says nothing of invariance
    made = jax.jit(summary)(a, chance, counted)
    for p in (0, 1):
        values = [a[:, 0, 0, p, q][counted[:, p, q]] for q in range(5)]
        every = np.concatenate(values)
        assert float(made["attention"][0, 0, p]) == pytest.approx(every.mean(), rel=1e-5)
        assert float(made["peakiness"][0, 0, p]) == pytest.approx((every > 0.5).mean(), rel=1e-5)
        spread = np.mean([v.std() for v in values if len(v) > 1])
        assert float(made["invariance"][0, 0, p]) == pytest.approx(1 - spread, rel=1e-5)
        assert float(made["chance"][0, 0, p]) == pytest.approx(chance[:, p][counted[:, p]].mean(), rel=1e-5)
    nothing = jax.jit(summary)(a, chance, counted & False)
    assert all(np.isnan(v).all() for v in nothing.values())


# ---- maps


def test_maps_are_drawn_with_their_tokens():
    made = measured(AttentionMaps(length=3, examples=ROWS)).set_index(["run", "layer", "head"]).sort_index()
    head = made.loc[("perfect", *HEADS["iteration_2"])].set_index(["query_label", "key_label"])["attention"]
    assert [head[q, k] for q, k in ((":", "x1"), ("s1", "x2"), ("s2", "x3"), ("s3", ":"))] == [1] * 4
    assert [head[q, ":"] for q in ("s1", "s2")] == [0, 0]
    start = made.loc[("perfect", *HEADS["iteration_1"])].set_index(["query_label", "key_label"])["attention"]
    assert [start[q, ":"] for q in (":", "s1", "s2", "s3")] == [1] * 4
    assert (made["length"] == 3).all() and (made["key"] <= made["query"]).all() and made["query"].max() == 2 * 3 + 1
    totals = made.reset_index().groupby(["run", "layer", "head", "query"])["attention"].sum()
    np.testing.assert_allclose(totals, 1, atol=1e-5)
    idle = made.loc[("perfect", *IDLE_HEADS[0])]
    np.testing.assert_allclose(idle["attention"], 1 / (idle["query"] + 1), rtol=1e-5)


def test_tokens_without_a_name_have_their_position():
    labels = labels_of(Run(Addition(length=3), Transformer(layers=1, d_model=8, heads=1), steps=1), 0)
    assert labels == ["#0", "#1", "#2", "+", "#4", "#5", "#6", "=", *["#8", "#9", "#10", "#11"]]


def test_a_length_that_a_task_has_not():
    for task, allowed in ((TASK, r"1\.\.4"), (Addition(length=3), "none")):
        with pytest.raises(Invalid, match=f"length.*{allowed}"):
            AttentionMaps(length=9).layouts(Run(task, Transformer(layers=1, d_model=8, heads=1), steps=1))


# ---- dynamics


@pytest.fixture(scope="module")
def dynamics():
    return dict(list(measured(Dynamics(examples=ROWS)).groupby("of")))


@pytest.fixture(scope="module")
def rows():
    """What the instruments drew."""
    return held_out(ROWS)


def test_sharpness_of_hard_and_of_uniform_attention(dynamics, rows):
    sizes = np.arange(1, TASK.positions)[None].repeat(ROWS, 0)[rows.scored[:, 1:]]
    made = dynamics["attention"].set_index(["run", "layer", "head"]).sort_index()
    np.testing.assert_allclose(made["uniform"], np.log(sizes).mean(), rtol=1e-5)
    for place in HEADS.values():
        row = made.loc[("perfect", *place)]
        assert row["entropy"] == 0 and row["peak"] == 1
    for place in IDLE_HEADS:
        row = made.loc[("perfect", *place)]
        assert row["entropy"] == pytest.approx(np.log(sizes).mean(), rel=1e-5)
        assert row["peak"] == pytest.approx((1 / sizes).mean(), rel=1e-5)
    assert made.loc["untrained", "entropy"].between(0.5, np.log(sizes).mean()).all()


def test_norms_of_named_arrays(dynamics):
    made = dynamics["weights"].set_index(["run", "array"])["norm"]
    for name, params in NETWORKS.items():
        for path, w in jax.tree_util.tree_leaves_with_path(params):
            dotted = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
            assert made[name, dotted] == pytest.approx(np.linalg.norm(np.asarray(w).ravel()), rel=1e-5)


def test_loss_by_length_and_position_adds_up(dynamics, rows):
    made = dynamics["loss"].set_index(["run", "length", "position"])["loss"].sort_index()
    lengths = (rows.truth["input"].positions >= 0).sum(1)
    for n in (1, 2, 3, 4):
        assert made["untrained", n].index.tolist() == list(range(n + 2, 2 * n + 3))  # s_1 .. s_n and the end
    assert made["perfect"].max() < 1e-6
    model, params = RUNS["untrained"].model, NETWORKS["untrained"]
    logits = jax.device_get(jax.jit(jax.vmap(lambda t: model.apply(params, t[:-1])[0]))(rows.tokens))
    for n, p in ((1, 3), (4, 7)):
        chosen = logits[lengths == n, p - 1].astype(np.float64)
        nats = np.log(np.exp(chosen).sum(1)) - np.take_along_axis(chosen, rows.tokens[lengths == n, p][:, None], 1)[:, 0]
        assert made["untrained", n, p] == pytest.approx(nats.mean(), rel=1e-5)
