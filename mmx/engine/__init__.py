"""Generation: continuous batching over slots, sampling, stop conditions."""

import importlib

_WHERE = {"Engine": "engine", "SamplingParams": "request", "Request": "request",
          "Result": "request", "Event": "request", "TokenLogprob": "request",
          "Timings": "request"}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    # Late, so that settings can be read and checked without importing jax.
    if name in _WHERE:
        return getattr(importlib.import_module(f"mmx.engine.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'mmx.engine' has no attribute '{name}'")
