"""When a small transformer learns addition, does it know the carry before its loss says so?

    elegans run carry

10 transformers (2 layers, d_model 32) learn 6-bit addition at two learning rates, five seeds each; 700
steps. Linear probes read first_operand and carry at every block and read position at log-spaced steps;
the carry's direction is ablated at the end; the lead is the distance, in decades of training steps,
between the probe's rise and the fall of the loss.

Cost: under 4 minutes on two CPU cores, compiling included.
Expect: exact match above 0.95 in most runs; the ablation of the carry destroys exact match and random
directions do not; the lead with its interval is in the report.
"""

from elegans.instruments import Ablate, Probe, Transition
from elegans.models import Transformer
from elegans.study import Study
from elegans.sweeps import grid
from elegans.tasks import Addition
from elegans.training import AdamW, Constant, LogSpaced, Record, Run

run = Run(
    task=Addition(length=6),
    model=Transformer(layers=2, d_model=32, heads=4),
    optim=AdamW(lr=3e-3, schedule=Constant(warmup_steps=50)),
    batch=64,
    steps=700,
    record=Record(evaluate=LogSpaced(per_decade=10), weights=LogSpaced(per_decade=5), examples=256),
    label="lr={optim.lr} seed={seed}",
)

study = Study(
    name="carry",
    question=__doc__.splitlines()[0],
    runs=grid(run, {"optim.lr": [3e-3, 1e-2], "seed": range(5)}),
    instruments=(Probe(fit=384, test=384), Ablate(fit=384, test=128, draws=8, at="final"), Transition()),
)
