"""MiniMax-Text-01 in JAX.

`mmx.load("nano")` gives a language model object; see `mmx.lm`.

Shape letters in names: B batch, T query time, S key time, N heads, K key/value heads, H head dim,
D model width, F expert width, E experts, C chunk, V vocabulary, L layers, R repeats of a layer
pattern.
"""

__version__ = "0.1.0"
__all__ = ["LM", "load"]


def __getattr__(name: str):
    # Late, so that `import mmx` does not import jax.
    if name in __all__:
        from mmx import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'mmx' has no attribute '{name}'")
