"""A figure of your own: one function from a store to a Matplotlib figure and the numbers in it.

elegans run examples/new_figure.py
elegans draw runs/new_figure --study examples/new_figure.py

A study that has none gets the figures that any store has.
"""

from matplotlib.figure import Figure

import elegans as el

run = el.Run(el.Addition(length=4), el.Transformer(layers=1, d_model=16, heads=2), batch=32, steps=300, label="lr {optim.lr}")


def rates(store):
    """The loss on test rows, of every run, against the learning rate."""
    rows = store.sql("""select "optim.lr" as lr, seed, loss from runs join metrics using (run) where split = 'test' order by all""")
    figure = Figure(figsize=(3, 2), layout="constrained")
    axes = figure.subplots()
    axes.plot(rows["lr"], rows["loss"], ".")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats")
    return figure, rows


study = el.Study(el.grid(run, {"optim.lr": [1e-3, 3e-3, 1e-2], "seed": [0, 1]}), name="new_figure", figures=el.drawing(rates=rates))
