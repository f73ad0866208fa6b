"""MiniMax-Text-01 in JAX.

Shape letters in names: B batch, T query time, S key time, N heads, K key/value heads, H head dim,
D model width, F expert width, E experts, C chunk, V vocabulary, L layers, R repeats of a layer
pattern.
"""

__version__ = "0.1.0"
