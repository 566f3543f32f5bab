"""Models for one sequence; the batch and the cohort are transforms of them."""

from elegans.models.base import Component, Context, FeedForward, Mixer, Model, Norm, Sizes
from elegans.models.norms import LayerNorm, RMSNorm
from elegans.models.positions import ALiBi, Learned, Positions, Rotary, Sinusoidal
from elegans.models.transformer import MLP, Attention, FixedAttention, GivenAttention, SwiGLU, Transformer

__all__ = [
    "MLP",
    "ALiBi",
    "Attention",
    "Component",
    "Context",
    "FeedForward",
    "FixedAttention",
    "GivenAttention",
    "LayerNorm",
    "Learned",
    "Mixer",
    "Model",
    "Norm",
    "Positions",
    "RMSNorm",
    "Rotary",
    "Sinusoidal",
    "Sizes",
    "SwiGLU",
    "Transformer",
]
