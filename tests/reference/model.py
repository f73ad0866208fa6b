"""The whole model in float64 NumPy, token order as the paper writes it, weights by released names.

`tensors` is a dict of the original checkpoint layout (`model.layers.0.self_attn.qkv_proj.weight`,
…, matrices [out, in]); `config` is any object with the fields of `mmx.config.ModelConfig`. The
reference keeps the state of one sequence, so `extend` may be called with any split of it.
Source: MiniMax-01 (arXiv 2501.08313) section 2 and the released modelling code.
"""

import numpy as np

from tests.reference.lightning import recurrent, slopes


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rms_norm(x, weight, eps):
    return weight * (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))


def inv_freq(rotary_dim: int, theta: float) -> np.ndarray:
    """Frequencies as the released code has them: each step rounded to float32."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)


def rope(x_TNH, positions_T, rotary_dim: int, theta: float):
    """Turns pairs (j, j + rotary_dim/2) of the first `rotary_dim` dims; the rest passes.

    The angle is a float32 product, as trained: at long range that rounding is part of the model.
    """
    half = rotary_dim // 2
    angle = positions_T.astype(np.float32)[:, None] * inv_freq(rotary_dim, theta)
    cos, sin = (f(angle.astype(np.float64))[:, None, :] for f in (np.cos, np.sin))
    low, high, rest = np.split(x_TNH, [half, rotary_dim], axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)


class Reference:
    """One sequence through the model; `extend(ids)` returns logits [T, V] of the new tokens."""

    def __init__(self, config, tensors):
        self.config = config
        self.tensors = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
        self.length = 0
        # Per layer: the lightning state [N, H, H], or the rotated keys and the values so far.
        self.states: list = [None] * config.num_layers
        # Smallest lead in probability of the last chosen expert over the next one, so far.
        self.router_margin = np.inf

    def extend(self, ids) -> np.ndarray:
        x_TD = self.tensors["model.embed_tokens.weight"][np.asarray(ids)]
        for layer in range(self.config.num_layers):
            x_TD = self._layer(x_TD, layer)
        self.length += len(ids)
        y_TD = rms_norm(x_TD, self.tensors["model.norm.weight"], self.config.norm_eps)
        return y_TD @ self.tensors["lm_head.weight"].T

    def greedy(self, prompt, count: int):
        """(ids, margins): `count` argmax tokens, and best minus second over the largest logit."""
        logits, ids, margins = self.extend(prompt)[-1], [], []
        for _ in range(count):
            second, best = np.sort(logits)[-2:]
            margins.append((best - second) / np.abs(logits).max())
            ids.append(int(logits.argmax()))
            logits = self.extend(ids[-1:])[-1]
        return ids, np.array(margins)

    def _weight(self, layer, name):
        return self.tensors[f"model.layers.{layer}.{name}.weight"]

    def _layer(self, x_TD, layer):
        c = self.config
        is_lightning = c.layer_types[layer] == "lightning"
        attend = self._lightning if is_lightning else self._softmax
        alpha = c.lightning_alpha if is_lightning else c.softmax_alpha
        beta = c.lightning_beta if is_lightning else c.softmax_beta
        h_TD = rms_norm(x_TD, self._weight(layer, "input_layernorm"), c.norm_eps)
        residual = h_TD if c.postnorm else x_TD
        x_TD = alpha * residual + beta * attend(h_TD, layer)
        g_TD = rms_norm(x_TD, self._weight(layer, "post_attention_layernorm"), c.norm_eps)
        residual = g_TD if c.postnorm else x_TD
        return c.mlp_alpha * residual + c.mlp_beta * self._experts(g_TD, layer)

    def _lightning(self, h_TD, layer):
        c, (length, heads, width) = self.config, (len(h_TD), self.config.num_heads,
                                                  self.config.head_dim)
        fused = silu(h_TD @ self._weight(layer, "self_attn.qkv_proj").T)
        q, k, v = np.split(fused.reshape(length, heads, 3 * width), 3, axis=-1)
        decay = slopes(heads, layer, c.num_layers, c.decay_rule)
        out, self.states[layer] = recurrent(q, k, v, decay, self.states[layer])
        out = rms_norm(out.reshape(length, heads * width), self._weight(layer, "self_attn.norm"),
                       c.lightning_norm_eps)
        gate = sigmoid(h_TD @ self._weight(layer, "self_attn.output_gate").T)
        return (gate * out) @ self._weight(layer, "self_attn.out_proj").T

    def _softmax(self, h_TD, layer):
        c, length = self.config, len(h_TD)
        q, k, v = ((h_TD @ self._weight(layer, f"self_attn.{name}_proj").T)
                   .reshape(length, -1, c.head_dim) for name in "qkv")
        positions = np.arange(self.length, self.length + length)
        q = rope(q, positions, c.rotary_dim, c.rope_theta)
        k = rope(k, positions, c.rotary_dim, c.rope_theta)
        if self.states[layer] is not None:
            k = np.concatenate([self.states[layer][0], k])
            v = np.concatenate([self.states[layer][1], v])
        self.states[layer] = (k, v)
        group = c.num_heads // c.num_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k, optimize=True) / np.sqrt(c.head_dim)
        visible = np.arange(len(k))[None, :] <= positions[:, None]
        weights = softmax(np.where(visible, scores, -np.inf))
        out = np.einsum("nts,snh->tnh", weights, v, optimize=True)
        return out.reshape(length, -1) @ self._weight(layer, "self_attn.o_proj").T

    def _experts(self, g_TD, layer):
        c, name = self.config, "block_sparse_moe"
        probs = softmax(g_TD @ self._weight(layer, f"{name}.gate").T)
        order = np.argsort(-probs, axis=-1, kind="stable")
        chosen = order[:, :c.experts_per_token]
        if c.experts_per_token < c.num_experts:
            last, following = np.take_along_axis(
                probs, order[:, c.experts_per_token - 1:c.experts_per_token + 1], axis=-1).T
            self.router_margin = min(self.router_margin, (last - following).min())
        weights = np.take_along_axis(probs, chosen, axis=-1)
        weights /= weights.sum(-1, keepdims=True)
        out = np.zeros_like(g_TD)
        for e in range(c.num_experts):
            token, place = np.nonzero(chosen == e)
            gate, up, down = (self._weight(layer, f"{name}.experts.{e}.{w}") for w in
                              ("w1", "w3", "w2"))
            hidden = silu(g_TD[token] @ gate.T) * (g_TD[token] @ up.T)
            out[token] += weights[token, place, None] * (hidden @ down.T)
        return out
