"""A new language in one short class: copy a word of random letters.

elegans show copy_word length=5 --with examples/new_task.py
elegans run examples/new_task.py
"""

import math

import jax
import jax.numpy as jnp

import elegans as el

LETTERS = "abcdefgh"


@el.spec
class CopyWord(el.Task):
    """`abcd=abcd`: the letters again, in order.

    length=4:  a b c d = a b c d
    scored:              . . . .
    letter     each letter's number, read where its copy is predicted
    """

    length: int = el.field(6, "letters", ge=1, le=256)
    split: el.Split | None = el.field(el.Split(), "how contents are divided")

    @property
    def symbols(self):
        return (*LETTERS, "=")

    @property
    def positions(self):
        return 2 * self.length + 1

    def sample(self, key, data):
        word = jax.random.randint(key, (self.length,), 0, len(LETTERS))
        tokens = jnp.concatenate([word, jnp.array([len(LETTERS)]), word])
        place = jnp.arange(self.length)
        late = el.Truth((word >= 4).astype(int), self.length + place)  # is the letter in e..h?
        return el.Example(tokens, jnp.arange(self.positions) > self.length, {"late": late})

    def content(self, example):
        return example.tokens[: self.length]

    def floor(self):
        return 0.0

    def plateau(self):
        return math.log(len(LETTERS))


run = el.Run(CopyWord(), el.Transformer(layers=2, d_model=32), el.AdamW(lr=3e-3), batch=32, steps=300)
study = el.Study(el.grid(run, {"seed": range(3)}), name="copy_word", question="How fast is copying learned?")
