"""Pretrain, then transfer: what the skill is worth, which weights must learn, and what is forgotten meanwhile.

elegans run examples/forgetting.py
elegans sql runs/forgetting "select run, step, exact_match from evaluate where length is null order by run, step"

Polynomial iteration first, then parity: from scratch, with every weight, and with the MLPs alone. Both tasks are one mixture
with weights of 0 and 1, so that the network knows the symbols of both, and what it was trained on first can be measured.
"""

import dataclasses

import elegans as el

languages = (el.Polynomial(length=4, shortest=1), el.Parity(length=8, shortest=1))
polynomial, parity = (el.Mixture(tasks=languages, weights=weights) for weights in ((1.0, 0.0), (0.0, 1.0)))
parent = el.Run(polynomial, el.Transformer(layers=2, d_model=32, heads=1), el.AdamW(lr=3e-3), batch=32, steps=200)
child = dataclasses.replace(parent, task=parity, record=el.Record(weights=el.LogSpaced(per_decade=3)), label="trained: {trained}")
parents = el.grid(parent, {"seed": [0, 1]})

study = el.Study(
    runs=[
        *el.grid(child, {"seed": [0, 1]}),
        *el.follow(parents, child),
        *el.follow(parents, dataclasses.replace(child, trained=("blocks.*.mlp.*",))),
    ],
    instruments=[el.Evaluate(examples=128)],
    name="forgetting",
    question="Does parity learn sooner after polynomial iteration, and what becomes of that?",
)
