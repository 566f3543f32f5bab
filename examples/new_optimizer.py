"""Another optimiser: an elementwise optax transformation (weights are one vector there); and another schedule: one function of t in 0..1.

elegans run examples/new_optimizer.py optim.lr=1e-4,3e-4,1e-3
"""

import optax

import elegans as el


@el.spec
class AdaBelief(el.Optimizer):
    """AdaBelief (Zhuang et al. 2020), from optax."""

    b1: float = el.field(0.9, "decay of the gradient's mean", ge=0, lt=1)
    b2: float = el.field(0.999, "decay of its distance from the mean, squared", ge=0, lt=1)

    def transform(self, lr, matrices):
        return optax.adabelief(lr, self.b1, self.b2)


@el.spec
class Parabola(el.Schedule):
    """(1 - t)^2 after the warm-up."""

    def shape(self, t):
        return (1 - t) ** 2


run = el.Run(
    el.Addition(length=4),
    el.Transformer(layers=1, d_model=16, heads=2),
    AdaBelief(lr=3e-4, schedule=Parabola(warmup=0.1)),
    batch=32,
    steps=300,
)
study = el.Study(el.grid(run, {"optim.lr": [1e-4, 1e-3], "seed": [0, 1]}), name="ada_belief")
