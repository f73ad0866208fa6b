"""Checkpoints: both published layouts in and out, orbax, and what a model's tensors are."""

from mmx.checkpoint.conversion import convert
from mmx.checkpoint.hf_export import save_hf
from mmx.checkpoint.load import load_params
from mmx.checkpoint.locate import load_config, locate

__all__ = ["convert", "load_config", "load_params", "locate", "save_hf"]
