"""The hand-made iteration head is what it says: right at every length, for any table, by the heads it names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans.errors import Invalid
from elegans.models.iterator import HEADS, IDLE_HEADS, iterator
from elegans.tasks import Addition, Parity
from elegans.training.step import scores
from iterating import COPY, MOD, XOR, Polynomial5, drawn

CASES = {
    "parity": (Parity(length=6, shortest=1, split=None), XOR),
    "padding scored": (Parity(length=5, shortest=2, split=None, compat="paper"), XOR),
    "polynomial": (Polynomial5(length=5), MOD),
}


@pytest.fixture(scope="module", params=CASES)
def outputs(request):
    """A task, its network, rows, logits, and the pattern of every layer [row, layer, head, query, key]."""
    task, table = CASES[request.param]
    model, params = iterator(task, table)
    rows = drawn(task, 512)

    def one(tokens):
        logits, trace = model.apply(params, tokens[:-1])
        return logits, jnp.stack([trace["pattern.0"], trace["pattern.1"]])

    return task, model, params, rows, *jax.device_get(jax.jit(jax.vmap(one))(rows.tokens))


def test_iterates_exactly_and_is_an_ordinary_transformer(outputs):
    task, model, params, rows, logits, _ = outputs
    loss, metrics = jax.jit(scores)(logits, rows)
    assert metrics["exact_match"] == 1 and loss < 1e-6
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), task.vocab_size, task.positions))
    assert jax.tree.map(jax.typeof, params) == jax.tree.map(jax.typeof, made)


def test_each_head_looks_where_it_says_and_nowhere_else(outputs):
    """By plain loops over the rows: EoI, x_t, or everything alike."""
    _, _, _, rows, _, maps = outputs
    for n in range(0, len(rows.tokens), 16):
        reads = rows.truth["input"].positions[n]
        for t, q in enumerate(reads[reads >= 0], 1):
            for name, target in (("iteration_1", reads[0]), ("iteration_2", t)):
                layer, head = HEADS[name]
                np.testing.assert_array_equal(maps[n, layer, head, q], np.eye(maps.shape[-1])[target])
            for layer, head in IDLE_HEADS:
                np.testing.assert_allclose(maps[n, layer, head, q, : q + 1], 1 / (q + 1), rtol=1e-6)


def test_the_first_state_can_have_a_rule_of_its_own():
    """s_1 = x_1, as if there were no state before it."""
    task = Polynomial5(length=3)
    model, params = iterator(task, MOD, first=np.arange(5))
    tokens = jnp.array([5, 3, 2, 6, 3, (3 * 2 + 1) % 5, 7])
    logits = jax.jit(model.apply)(params, tokens)[0]
    np.testing.assert_array_equal(logits.argmax(-1)[3:6], tokens[4:])
    other = iterator(task, MOD)[1]
    assert logits[3].argmax() != jax.jit(model.apply)(other, tokens)[0][3].argmax() == (0 * 3 + 1) % 5


def test_only_the_last_mlp_depends_on_the_task():
    xor, copy = (iterator(CASES["parity"][0], table)[1] for table in (XOR, COPY))
    same = jax.tree.map(np.array_equal, xor, copy)
    differ = [jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal]
    assert differ == ["['blocks'][1]['mlp']['W_out']"]


@pytest.mark.parametrize("wrong", [Parity(length=4, cot=False), Addition(length=4)])
def test_refuses_other_rows(wrong):
    with pytest.raises(Invalid, match="hand-made iteration head"):
        iterator(wrong, XOR)
