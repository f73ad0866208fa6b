"""Checkpoints: both published layouts in and out, orbax, and what a model's tensors are."""

from mmx.checkpoint.load import load_params
from mmx.checkpoint.locate import load_config, locate

__all__ = ["load_config", "load_params", "locate"]
