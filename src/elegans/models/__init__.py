"""Models for one sequence; the batch and the cohort are transforms of them."""

from elegans.models.base import Component, Context, Model, Sizes
from elegans.models.transformer import MLP, Attention, LayerNorm, Learned, Norm, Positions, RMSNorm, Rotary, SwiGLU, Transformer

__all__ = [
    "MLP",
    "Attention",
    "Component",
    "Context",
    "LayerNorm",
    "Learned",
    "Model",
    "Norm",
    "Positions",
    "RMSNorm",
    "Rotary",
    "Sizes",
    "SwiGLU",
    "Transformer",
]
