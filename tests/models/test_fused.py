"""Where kernels stand in for formulas."""

import jax

from elegans.models import fused
from elegans.types import no_edit


def test_only_unedited_bfloat16_rows_on_a_gpu_are_served(monkeypatch):
    """An edit may want to see what kernels skip, and float32 promises more than their products keep."""

    class Gpu:
        platform = "gpu"

    assert not fused.serves("bfloat16", no_edit)  # here is no GPU
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert fused.serves("bfloat16", no_edit)
    assert not fused.serves("float32", no_edit)
    assert not fused.serves("bfloat16", lambda site, x: x)
