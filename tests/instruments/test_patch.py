"""Patched attention: in the hand-made iteration head, what each patch must leave follows from the circuit."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from elegans.errors import Invalid
from elegans.instruments import Patch
from elegans.instruments.patch import _whole_circuit
from elegans.models.iterator import HEADS
from elegans.models.transformer import Transformer
from elegans.network import Network
from elegans.tasks.sampling import draw_set, prepare
from elegans.training import follow
from iterating import NETWORKS, RUNS, TASK, held_out, measured, without

ROWS = 128
FIND, FETCH = HEADS["iteration_1"], HEADS["iteration_2"]
METRICS = ["loss", "accuracy", "exact_match"]


@pytest.fixture(scope="module")
def patched():
    """Patches of every network, where another run's maps are those of the next one in the list."""
    made = measured(Patch(patterns=("iteration_1", "circuit", "iteration_2", "uniform"), other="seed", examples=ROWS))
    return made.fillna({"layer": -1, "head": -1}).set_index(["run", "source", "layer", "head"]).sort_index()


@pytest.fixture(scope="module")
def rows():
    return held_out(ROWS)


def without_fetching(rows, only_first=False) -> dict[str, float]:
    """By plain loops: the state is combined with what is most frequent among all the tokens seen, `0` winning ties.

    With `only_first` so is the first state alone, and all else is right. The margin of the answers' logits is 20 (of the end's 40),
    so each nat of loss can be written down.
    """
    nats, right = [], []
    for tokens, scored in zip(rows.tokens, rows.scored, strict=True):
        for place in np.flatnonzero(scored):
            seen, before = tokens[:place], tokens[place - 1]
            shares = np.array([(seen == x).mean() for x in (0, 1)])
            ended = int((scored[:place]).sum()) == np.flatnonzero(tokens == 3)[0] - 1  # all states are written
            state = 0 if before == 3 else before
            logits = np.zeros(5)
            if not ended:
                logits[:2] = 20 * shares[[state, 1 - state]]  # s = state xor x
            else:
                logits[:2], logits[4] = 20 * shares[[state, 1 - state]], 40
            whole = only_first and before != 3
            nats.append(0 if whole else np.log(np.exp(logits).sum()) - logits[tokens[place]])
            right.append(whole or logits.argmax() == tokens[place])
    each = np.split(np.array(right), np.cumsum(rows.scored.sum(1))[:-1])
    return {"loss": np.mean(nats), "accuracy": np.mean(right), "exact_match": np.mean([r.all() for r in each])}


def test_a_uniform_map_leaves_the_most_frequent_bit(patched, rows):
    """Chance, for what the head fetched; and a network whose fetching is broken does no better and no worse."""
    expected = without_fetching(rows)
    assert 0 < expected["exact_match"] < 0.7
    for key in (("perfect", "uniform", *FETCH), ("no fetch", "uniform", *FETCH)):
        assert patched.loc[key, METRICS].to_dict() == pytest.approx(expected, rel=1e-4)
    base = patched.loc[("no fetch", "uniform", *FETCH), [f"base_{m}" for m in METRICS]]
    assert base.to_list() == pytest.approx(list(expected.values()), rel=1e-4)


def test_without_the_start_there_is_no_end(patched, rows):
    """Uniform attention in layer 0: no time, so nothing is fetched, and no row ends."""
    row = patched.loc[("perfect", "uniform", *FIND)]
    assert row["exact_match"] == 0
    fetchless = without_fetching(rows)["accuracy"]
    ends = ROWS / rows.scored.sum()  # one `$` a row
    assert row["accuracy"] == pytest.approx(fetchless - ends, abs=1e-6)
    assert patched.loc[("perfect", "uniform", -1, -1), "accuracy"] == pytest.approx(fetchless - ends, abs=1e-6)


@pytest.mark.parametrize("source", ["iteration_1", "iteration_2", "uniform", "seed"])
def test_an_idle_head_may_look_anywhere(patched, source):
    for name in ("perfect", "no start", "no fetch"):
        for layer in (0, 1):
            row = patched.loc[(name, source, layer, 1)]
            assert row[METRICS].to_list() == row[[f"base_{m}" for m in METRICS]].to_list()


def test_the_ideal_map_is_the_heads_own(patched):
    for pattern, place in HEADS.items():
        assert patched.loc[("perfect", pattern, *place), "exact_match"] == 1
    for pattern, place in (("iteration_1", FETCH), ("iteration_2", FIND)):  # and no other head's
        assert patched.loc[("perfect", pattern, *place), "exact_match"] < 0.7


def test_the_ideal_map_restores_a_broken_head(patched, rows):
    """Fetching wholly. Finding the start at the states, to the end of the row; EoI is not told to look at itself, and x_1 not fetched."""
    row = patched.loc[("no fetch", "iteration_2", *FETCH)]
    assert (row["exact_match"], row["accuracy"]) == (1, 1) and row["loss"] < 1e-6
    row = patched.loc[("no start", "iteration_1", *FIND)]
    expected = without_fetching(rows, only_first=True)
    assert 0.5 < expected["exact_match"] < 1
    assert row[METRICS].to_dict() == pytest.approx(expected, rel=1e-4)
    assert patched.loc[("no fetch", "iteration_1", *FIND), "exact_match"] < 0.7  # not what it lacks


@pytest.mark.parametrize("name", ["perfect", "no start", "no fetch"])
def test_the_whole_circuit_is_all_that_is_missing(patched, name):
    made = patched.loc[(name, "circuit")]
    assert made.index.tolist() == [(-1, -1)]
    assert (made["exact_match"] == 1).all() and (made["loss"] < 1e-6).all()


def test_a_network_without_a_choice_in_any_layer_is_restored(rows):
    """By the whole circuit alone: one pattern leaves the other layer as it is."""
    blind = without(without(NETWORKS["perfect"], 0), 1)
    made = measured(Patch(patterns=("iteration_2", "circuit"), examples=ROWS), [("perfect", 2, blind)]).set_index("source")
    assert made.loc["circuit", "exact_match"] == 1 and made.loc["circuit", "loss"] < 1e-6
    assert (made["base_exact_match"] == 0).all() and (made.loc["iteration_2", "exact_match"] == 0).all()  # no row ends
    assert made["layer"].isna()[made.index == "circuit"].tolist() == [True]


def test_the_whole_circuit_needs_chain_of_thought_and_two_layers():
    run = RUNS["perfect"]
    one = dataclasses.replace(run, model=Transformer(layers=1, d_model=8, heads=1))
    wordless = dataclasses.replace(run, task=dataclasses.replace(run.task, cot=False))
    for other in (one, wordless):
        with pytest.raises(Invalid, match="circuit"):
            Patch(patterns=("circuit",)).check_names([other])
        Patch(patterns=("circuit",)).check_names([other, run])
        assert "circuit" not in Patch().layouts(other)["patch"].columns()["source"]
    assert "circuit" in Patch().layouts(run)["patch"].columns()["source"]


def test_the_layers_between_keep_their_maps(rows):
    """Of four layers: the first has s_t look at EoI, the last the token before s_t at x_t."""
    maps, asked = jax.device_get(jax.jit(lambda rows: _whole_circuit(RUNS["perfect"], rows, 4))(rows))
    assert not asked[:, 1:3].any() and not maps[:, 1:3].any()
    for n in range(0, ROWS, 16):
        length = int((rows.truth["input"].positions[n] >= 0).sum())
        assert np.argwhere(maps[n, 0, 0]).tolist() == [[length + 1 + t, length + 1] for t in range(1, length + 1)]
        assert np.argwhere(maps[n, 3, 0]).tolist() == [[length + t, t] for t in range(1, length + 1)]
    np.testing.assert_array_equal(maps[:, :, 0].sum(-1), asked)


def test_the_maps_of_another_run(patched):
    """`no fetch` has the maps of `untrained` next to it, `no start` those of `no fetch`, whose layer 0 is whole."""
    assert patched.loc[("no start", "seed", *FIND), "exact_match"] == 1
    np.testing.assert_allclose(
        patched.loc[("perfect", "seed", *FIND), METRICS].to_list(), patched.loc[("perfect", "uniform", *FIND), METRICS].to_list(), rtol=1e-5
    )


def test_no_map_teaches_an_untrained_network(patched):
    assert (patched.loc["untrained", "exact_match"] < 0.4).all() and (patched.loc["untrained", "loss"] > 0.8).all()


def test_the_maps_of_a_runs_end():
    """A run that was broken halfway gets its last maps; at its end nothing changes."""
    networks = [("perfect", 1, NETWORKS["no fetch"]), ("perfect", 2, NETWORKS["perfect"])]
    made = measured(Patch(patterns=("iteration_2",), other="final", examples=ROWS), networks)
    final = made[made["source"] == "final"].fillna(-1).set_index(["step", "layer", "head"]).sort_index()
    assert final.loc[(1, *FETCH), "exact_match"] == 1 > final.loc[(1, *FETCH), "base_exact_match"]
    assert (final.loc[2]["exact_match"] == 1).all() and (final.loc[2]["loss"] == final.loc[2]["base_loss"]).all()


def test_partners():
    runs = {run.id: run for run in RUNS.values()}
    a, b, c, d = runs
    networks = [(a, 0), (b, 0), (c, 0), (a, 2), (b, 2), (d, 2)]
    assert Patch().partners(networks, runs) is None
    assert Patch(other="final").partners(networks, runs) == [3, 4, 2, 3, 4, 5]
    assert Patch(other="seed").partners(networks, runs) == [1, 2, 0, 4, 5, 3]
    longer = {a: dataclasses.replace(runs[a], steps=3), b: runs[b]}  # differs in more than its seed
    assert Patch(other="seed").partners([(a, 0), (b, 0)], longer) == [None, None]


def test_runs_whose_parents_differ_in_seeds_alone_are_partners():
    parents = [dataclasses.replace(RUNS["perfect"], seed=seed) for seed in (5, 6)]
    others = [dataclasses.replace(parents[0], steps=3)]  # its length tells it apart
    runs = {run.id: run for run in [RUNS["perfect"], *follow(parents + others, RUNS["perfect"])]}
    assert Patch(other="seed").partners([(i, 2) for i in runs], runs) == [None, 2, 1, None]


def test_without_a_partner_there_are_no_rows_of_it():
    networks = [("perfect", 1, NETWORKS["no fetch"]), ("perfect", 2, NETWORKS["perfect"])]
    assert set(measured(Patch(patterns=("iteration_2",), other="seed", examples=ROWS), networks)["source"]) == {"iteration_2"}


def test_losses_of_held_out_rows_know_no_weights_of_training() -> None:
    """Patched, or by `Network.score`: rows whose last state trains five times as hard are scored as any."""
    weighted = dataclasses.replace(RUNS["no fetch"], task=dataclasses.replace(TASK, final_weight=5.0))
    found = []
    for run in (RUNS["no fetch"], weighted):
        rows = draw_set(run.task, "test", jax.random.key(1), 32, prepare(run.task))
        patch = functools.partial(Patch(patterns=("uniform",), examples=32).apply, run, data=prepare(run.task), key=jax.random.key(2))
        patched = jax.jit(patch)(NETWORKS["no fetch"])
        found.append((patched, Network(run, 2, NETWORKS["no fetch"]).score(32)))
        assert (rows.weights is None) == (run is RUNS["no fetch"])
    assert jax.tree.all(jax.tree.map(np.array_equal, *found))
    with pytest.raises(Invalid, match=r"^count: -1 is not allowed; allowed: 1 or more$"):
        Network(weighted, 2, NETWORKS["no fetch"]).examples(-1)
