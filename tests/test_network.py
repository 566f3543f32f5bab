"""A network in hand: what it shows, and edits of what goes through it."""

import jax
import numpy as np
import pytest

import elegans as el


def test_edits_of_other_shapes_are_refused_and_a_network_shows_no_weights():
    task, model = el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2)
    params = model.init(jax.random.key(0), task.vocab_size, task.positions)
    network = el.Network(el.Run(task, model, steps=1), 0, params)
    assert "Addition(length=3)" in repr(network) and len(repr(network)) < 200
    tokens = network.examples(2).tokens
    for wrong, said in ((lambda x: x[:2], r"shape \(2, 8\)"), (lambda x: None, "None")):
        with pytest.raises(el.Invalid, match=rf"edit of resid\.0: '{said}'"):
            network.trace(tokens, edit=lambda site, x, wrong=wrong: wrong(x) if site == "resid.0" else x)
    logits, _ = network.trace(tokens, edit=lambda site, x: 0 * x if site == "resid.0" else x)
    assert logits.shape == (2, task.positions, task.vocab_size)
    for site, allowed in (("resid.00", "embed, "), ("z.0.2", "heads 0 to 1 of z.0"), ("resid.0.0", "heads of ")):
        with pytest.raises(el.Invalid, match=rf"site: '{site}' .*{allowed}"):
            network.score(8, edit={site: lambda x: x})
    with pytest.raises(el.Invalid, match=r"edit of z\.0\.1: 'shape \(2,\)'"):
        network.trace(tokens, edit={"z.0.1": lambda z: z[0, :2]})


def test_edits_by_name_do_what_a_function_of_all_sites_does():
    task, model = el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2)
    network = el.Network(el.Run(task, model, steps=1), 0, model.init(jax.random.key(0), task.vocab_size, task.positions))
    tokens = network.examples(2).tokens

    def function(site, x):
        x = x.at[:, 1].multiply(2) if site == "z.0" else x
        return -x if site == "mlp_out.0" else x

    named = {"z.0.1": lambda z: 2 * z, "mlp_out.0": lambda x: -x}
    for rows in (tokens, tokens[0]):
        (a, traced), (b, _), (plain, _) = (network.trace(rows, edit) for edit in (named, function, {}))
        assert np.array_equal(a, b) and not np.allclose(a, plain)
        assert np.array_equal(traced["z.0.1"], 2 * network.trace(rows)[1]["z.0.1"])
