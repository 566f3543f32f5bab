"""Take a trained run in hand: score it, read its attention, and intervene.

elegans run carry --store runs/carry
python examples/look_inside.py runs/carry
"""

import sys

import jax.numpy as jnp

import elegans as el

store = el.open(sys.argv[1])
best = store.sql("select run from metrics where split = 'test' order by exact_match desc, run limit 1")["run"][0].as_py()
network = el.load(store, best)
row = network.examples(1).tokens[0]
print(network.task.text(row), "->", network.task.text(network.complete(row[: row.tolist().index(3) + 1].tolist())))

logits, trace = network.trace(row[:-1])
print("sites:", " ".join(trace.sites))
print("attention of layer 0, head 0, last query:", jnp.round(trace["pattern.0"][0, -1], 2))
without_attention_1 = {"attn_out.1": jnp.zeros_like}  # nothing of the second attention reaches the residual stream
print("unedited", network.score(), "without attention 1", network.score(edit=without_attention_1))
print("without head 0 there", network.score(edit={"z.1.0": jnp.zeros_like}))
