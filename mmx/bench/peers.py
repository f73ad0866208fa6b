"""Public kernels beside ours in the same rounds, where they are installed."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence

from mmx.bench.cases import Case, some_slopes
from mmx.bench.timing import Run
from mmx.config import ModelConfig
from mmx.errors import UserError, nearest

# Peer -> what must be importable, and the command that installs it.
_NEEDS = {
    "fla": (("torch", "fla"), "pip install torch flash-linear-attention"),
    "transformers": (("torch", "transformers"), "pip install torch 'transformers>=5.17,<6'"),
}
_OF = {"kernels": ("fla",), "period": ("transformers",), "decode": ("transformers",)}


def check(names: Sequence[str], bench: str) -> tuple[str, ...]:
    """Returns the peers that take part in `bench`.

    Raises UserError for one that is unknown, not importable, or has no part in it.
    """
    for name in names:
        if name not in _NEEDS:
            raise UserError(f"There is no peer '{name}'.", f"Peers are {', '.join(_NEEDS)}.",
                            nearest(name, _NEEDS))
        if name not in _OF[bench]:
            raise UserError(f"The peer '{name}' has no part in 'mmx bench {bench}'.",
                            f"It takes --peers={','.join(_OF[bench])}.", "Leave it out.")
        modules, command = _NEEDS[name]
        for module in modules:
            try:
                if importlib.util.find_spec(module) is None:
                    raise ImportError("it is not installed")
                importlib.import_module(module)
            except Exception as error:
                raise UserError(f"The peer '{name}' cannot run: the module '{module}' cannot be "
                                f"imported ({str(error).splitlines()[0] if str(error) else error}"
                                ").", "A named peer is never left out in silence.",
                                f"Install it: {command}.") from None
    return tuple(names)


def fla(config: ModelConfig, seed: int) -> Callable[[Case], dict[str, Callable[[], Run]]]:
    """FLA's `chunk_simple_gla` for forward, and for forward and backward: S_t = λ S_{t-1} + k_t^T
    v_t with a constant log decay per head and scale 1 is lightning attention.
    """
    def runs(case: Case) -> dict[str, Callable[[], Run]]:
        if case.operation not in ("lightning_forward", "lightning_train", "context"):
            return {}
        return {"fla": lambda: _fla_run(config, case, seed)}
    return runs


def _fla_run(config: ModelConfig, case: Case, seed: int) -> Run:
    import numpy as np
    import torch

    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    B, T, N, H = (case.dims[name] for name in ("batch", "tokens", "heads", "head_dim"))
    train = case.operation == "lightning_train"
    source = torch.Generator("cuda").manual_seed(seed)

    def draw():
        return torch.randn(B, T, N, H, generator=source, device="cuda",
                           dtype=getattr(torch, case.dtype), requires_grad=train)

    q, k, v = draw(), draw(), draw()
    do = draw().detach() if train else None
    slopes = np.asarray(some_slopes(config, config.num_layers // 2, N))
    decay = torch.tensor(-slopes, device="cuda", dtype=torch.float32)

    def call(count):
        for _ in range(count):
            out, _state = chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0)
            if train:
                torch.autograd.grad(out, (q, k, v), do)
        torch.cuda.synchronize()
    return Run(call)
