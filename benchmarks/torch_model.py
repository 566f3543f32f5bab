"""The default Transformer of elegans in plain PyTorch, with the rows it is trained on: the peers' side of `peers.py`.

Pre-RMSNorm, rotary positions in the half-split layout, SwiGLU, untied, no biases. The master weights are
float32. In bfloat16 the weights and the residual stream are cast by hand, as elegans does it, without autocast.
Everything here is written to be quick in PyTorch: fused queries, keys and values, one product for both halves of
SwiGLU, vectorised sampling, logits only where the loss is scored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

PLUS, EQUALS, EOS = 2, 3, 4
VOCAB = 5
EPS = 1e-5  # RMSNorm
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
ATTENTIONS = ("sdpa", "math")  # PyTorch's fused kernel, or two products and a softmax


# ---- the model


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, EPS).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: Tensor, kernel: str) -> Tensor:
    """Causal attention over [batch, head, position, d_head]."""
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~causal, float("-inf")).softmax(-1).to(v.dtype) @ v


class Block(nn.Module):
    def __init__(self, d: int, heads: int, kernel: str):
        super().__init__()
        hidden = 2 * -(-(8 * d // 3) // 2)
        self.heads, self.kernel = heads, kernel
        self.ln1, self.ln2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = linear(rms_norm(x, self.ln1), self.qkv).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a, c = qkv[:2].chunk(2, -1)  # queries and keys are turned together
        q, k = torch.cat([a * cos - c * sin, a * sin + c * cos], -1)
        z = attend(q, k, qkv[2], causal, self.kernel)
        x = x + linear(z.transpose(1, 2).reshape(b, t, d), self.out)
        gate, value = linear(rms_norm(x, self.ln2), self.up).chunk(2, -1)
        return x + linear(F.silu(gate) * value, self.down)


class Decoder(nn.Module):
    cos: Tensor
    sin: Tensor
    causal: Tensor

    def __init__(self, d: int, layers: int, heads: int, positions: int, dtype: torch.dtype = torch.float32, kernel: str = "sdpa"):
        super().__init__()
        self.dtype = dtype
        self.embed, self.unembed = nn.Embedding(VOCAB, d), nn.Linear(d, VOCAB, bias=False)
        self.blocks = nn.ModuleList(Block(d, heads, kernel) for _ in range(layers))
        self.ln_final = nn.Parameter(torch.ones(d))
        e = d // heads
        angles = torch.as_tensor(np.outer(np.arange(positions), 10_000.0 ** (-np.arange(0, e, 2) / e)))
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.register_buffer("causal", torch.ones(positions, positions).tril().bool(), persistent=False)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Logits after each token from `first` on."""
        x = self.embed(tokens).to(self.dtype)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, self.causal)
        return linear(rms_norm(x[:, first:], self.ln_final), self.unembed).float()

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats per scored token of rows of addition: from `=` to the end."""
        length = (rows.shape[1] - 4) // 3
        logits = self(rows[:, :-1], 2 * length)
        return F.cross_entropy(logits.reshape(-1, VOCAB), rows[:, 2 * length + 1 :].reshape(-1))


def metrics(model: Decoder, rows: Tensor) -> dict[str, Tensor]:
    """What elegans records of every batch: loss, accuracy per scored token, share of rows that are right throughout."""
    length = (rows.shape[1] - 4) // 3
    logits, answers = model(rows[:, :-1], 2 * length), rows[:, 2 * length + 1 :]
    right = logits.argmax(-1) == answers
    loss = F.cross_entropy(logits.reshape(-1, VOCAB), answers.reshape(-1))
    return {"loss": loss, "accuracy": right.float().mean(), "exact_match": right.all(1).float().mean()}


def load(model: Decoder, params: Any) -> None:
    """Copy the tree of weights of an elegans Transformer into the module."""

    def put(target: Tensor, *values: Any) -> None:
        target.data.copy_(torch.as_tensor(np.array(np.concatenate(values))))

    def rows(w: Any) -> Any:  # [head, d_model, d_head] as nn.Linear has it
        return np.asarray(w).transpose(0, 2, 1).reshape(-1, w.shape[1])

    put(model.embed.weight, np.asarray(params["embed"]["W_E"]))
    put(model.unembed.weight, np.asarray(params["unembed"]["W_U"]).T)
    put(model.ln_final, params["ln_final"]["w"])
    for block, p in zip(model.blocks, params["blocks"], strict=True):
        attn, mlp = p["attn"], p["mlp"]
        put(block.ln1, p["ln1"]["w"])
        put(block.ln2, p["ln2"]["w"])
        put(block.qkv.weight, rows(attn["W_Q"]), rows(attn["W_K"]), rows(attn["W_V"]))
        put(block.out.weight, np.asarray(attn["W_O"]).reshape(-1, attn["W_O"].shape[2]).T)
        put(block.up.weight, np.asarray(mlp["W_gate"]).T, np.asarray(mlp["W_in"]).T)
        put(block.down.weight, np.asarray(mlp["W_out"]).T)


def optimizer(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=fused or None)


# ---- rows of addition, least significant bit first: x + y = z $


def sample_rows(batch: int, length: int, device: str) -> Tensor:
    """A batch of rows, drawn on the device in a few vectorised operations."""
    xy = torch.randint(0, 2**length, (batch, 2), device=device)
    place = torch.arange(length + 1, device=device)
    x, y = (((xy[:, i, None] >> place[:-1]) & 1) for i in (0, 1))
    z = (xy.sum(1, keepdim=True) >> place) & 1
    plus, equals, end = (torch.full((batch, 1), t, device=device) for t in (PLUS, EQUALS, EOS))
    return torch.cat([x, plus, y, equals, z, end], 1)


class AdditionRows(IterableDataset):
    """Rows one by one, in Python, as a research code draws them."""

    def __init__(self, length: int):
        self.length = length

    def __iter__(self) -> Iterator[Tensor]:
        n = self.length
        while True:
            x, y = random.getrandbits(n), random.getrandbits(n)
            bits = [[(v >> i) & 1 for i in range(width)] for v, width in ((x, n), (y, n), (x + y, n + 1))]
            yield torch.tensor([*bits[0], PLUS, *bits[1], EQUALS, *bits[2], EOS])


def optimise(model: Decoder, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One clipped optimiser step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def losses(model: Decoder, batches: list[Tensor]) -> list[float]:
    """The losses of optimiser steps on given rows."""
    steps, found = optimizer(model, fused=False), []
    for rows in batches:
        loss = model.loss(rows)
        optimise(model, steps, loss)
        found.append(loss.item())
    return found
