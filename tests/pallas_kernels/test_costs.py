"""Costs of GPU kernels, from their calls to the plan's reading of a compiled program."""

import jax
import jax.numpy as jnp

from mmx.plan import hlo_bytes, hlo_flops, hlo_text
from pallas_kernels import costs

TEXT = """HloModule m
ENTRY %main (x: f32[1000,1000]) -> f32[10] {
  %x = f32[1000,1000]{1,0} parameter(0)
  ROOT %k = f32[10]{0} custom-call(%x), custom_call_target="mosaic", metadata={op_name="NAME"}
}
"""


def read(name):
    module = hlo_text.parse(TEXT.replace("NAME", name))
    place = module.computations[module.entry]
    return (hlo_bytes.moved(module, place, place.root),
            dict(hlo_flops.counted(place, place.root)))


def test_a_program_keeps_what_the_call_says():
    def f(x):
        with costs.kernel_cost(2e12, 3e9):
            return jnp.sin(x)

    module = hlo_text.parse(jax.jit(f).lower(jnp.ones(3)).compile().as_text())
    lines = [line for place in module.computations.values() for line in place.lines]
    assert (2e12, 3e9) in {line.kernel_cost for line in lines}


def test_a_plan_counts_what_is_said_in_place_of_whole_operands():
    assert read("jit(f)/kernel_cost_flops_12_bytes_34/k") == (34, {"kernel": 12})
    assert read("jit(f)/k") == (4000040, {})
    # The innermost of several.
    assert read("kernel_cost_flops_1_bytes_2/kernel_cost_flops_3_bytes_4/k")[0] == 4
