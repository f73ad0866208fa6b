"""Float64 NumPy reference of the whole model; imports neither jax nor the code under test."""

from tests.reference.lightning import block, dense, recurrent, slopes
from tests.reference.model import Reference

__all__ = ["Reference", "block", "dense", "recurrent", "slopes"]
