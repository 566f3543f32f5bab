"""Attention in one GPU kernel: JAX's own Pallas kernel, made to fit short rows and small heads.

The plain formula writes scores and patterns to memory, forward and backward, and at these sizes that is most of
a training step's traffic. The kernel keeps them in registers. Its products take bfloat16 and add in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elegans.types import Edit, no_edit

BLOCK = 64  # queries and keys of one tile
LEAST_HEAD = 16  # width of the smallest matrix product that the kernel's compiler knows


def serves(dtype: str, edit: Edit) -> bool:
    """Whether the kernel may stand in: bfloat16 on a GPU, and nobody edits what it would keep to itself."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return dtype == "bfloat16" and edit is no_edit and device.platform == "gpu"


def attention(
    q: Float[Array, "position head d_head"],
    k: Float[Array, "position head d_head"],
    v: Float[Array, "position head d_head"],
    interpret: bool = False,
) -> Float[Array, "position head d_head"]:
    """softmax(q k / sqrt(d_head)) v, causal. `interpret` runs the kernel's meaning without a GPU."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    length, _, width = q.shape
    padding = ((0, -length % BLOCK), (0, 0), (0, max(0, LEAST_HEAD - width)))
    q, k, v = (jnp.pad(x, padding)[None] for x in (q, k, v))
    sizes = BlockSizes(**dict.fromkeys(("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), BLOCK))
    z = mha(q, k, v, None, sm_scale=width**-0.5, causal=True, block_sizes=sizes, interpret=interpret)
    return z[0, :length, :, :width]
