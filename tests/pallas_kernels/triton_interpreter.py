"""Triton's interpreter for kernels of this package, without torch: NumPy buffers in its place.

Set TRITON_INTERPRET=1 before `triton` is imported; `install()` then makes `triton_gpu.launch`
interpret on the CPU, gradients too.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels.lightning_attention import triton_gpu

_BFLOAT16 = np.dtype(jnp.bfloat16)
# XLA calls back from several threads, and the interpreter keeps a program's place in a global.
_ONE_AT_A_TIME = threading.Lock()


class _Buffer:
    """The little that the interpreter asks of a torch tensor."""

    def __init__(self, array):
        self.array = np.require(array, requirements=["C", "W"])
        self.dtype = self.array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data


def install():
    # Buffers lie on the host already: nothing to copy there and back.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    triton_gpu.launch = launch

    # It takes arrays of one number for numbers, which NumPy 2.4 no longer does.
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched

    # It holds bfloat16 as integers, multiplies those, and cuts off where a GPU rounds.
    def values(handle):
        is_bfloat16 = handle.dtype.scalar == tl.bfloat16
        return handle.data.view(_BFLOAT16).astype(np.float32) if is_bfloat16 else handle.data

    def cast(self, source, target):
        data = values(source)
        if target.scalar == tl.bfloat16:
            data = data.astype(np.float32).astype(_BFLOAT16).view(np.uint16)
        else:
            data = data.astype(interpreter._get_np_dtype(target))
        return interpreter.TensorHandle(data, target.scalar)

    def dot(self, a, b, total, *options):
        data = np.matmul(values(a), values(b), dtype=np.float32) + total.data
        return interpreter.TensorHandle(data, total.dtype.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpreterBuilder.create_dot = dot


def launch(kernel, *arguments, out_shape, grid, config, aliases=None, **constants):
    """Stands for `triton_gpu.launch`; programs run one after another."""
    places = [i for i, x in enumerate(arguments) if isinstance(x, (jax.Array, np.ndarray))]

    def run(*arrays):
        given = list(arguments)
        for place, array in zip(places, arrays, strict=True):
            given[place] = _Buffer(np.array(array))
        # Outputs begin as NaN, so that what a kernel leaves out is seen.
        written = [_Buffer(np.full(x.shape, np.nan, x.dtype)) for x in out_shape]
        for source, target in (aliases or {}).items():
            written[target] = given[places[source]]
        with _ONE_AT_A_TIME:
            kernel.run(*given, *written, grid=grid, warmup=False, **constants)
        return [x.array for x in written]

    return jax.pure_callback(run, list(out_shape), *(arguments[i] for i in places))
