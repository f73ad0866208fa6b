"""Operations and bytes read from the text of compiled programs."""

import pytest

from mmx.plan import hlo
from tests.plan.hlo_programs import LOOP, program

DOTS = {
    "plain": ("f32[8,16]{1,0}", "f32[16,32]{1,0}", "f32[8,32]{1,0} dot(%a, %b), "
              "lhs_contracting_dims={1}, rhs_contracting_dims={0}", "tf32", 2 * 8 * 16 * 32),
    "exact": ("f32[8,16]{1,0}", "f32[16,32]{1,0}", "f32[8,32]{1,0} dot(%a, %b), "
              "lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
              "operand_precision={highest,highest}", "f32", 2 * 8 * 16 * 32),
    "batch": ("bf16[4,8,16]{2,1,0}", "bf16[4,16,32]{2,1,0}", "f32[4,8,32]{2,1,0} dot(%a, %b), "
              "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
              "rhs_contracting_dims={1}", "bf16", 2 * 4 * 8 * 16 * 32),
    "tpu": ("s8[8,16]{1,0:T(8,128)(4,1)}", "s8[16,32]{1,0}", "s32[8,32]{1,0} convolution(%a, %b), "
            "dim_labels=bf_io->bf", "s8", 2 * 8 * 16 * 32),
    "tpu transposed": ("bf16[8,16]{1,0}", "bf16[32,16]{1,0}", "bf16[32,8]{1,0} "
                       "convolution(%a, %b), dim_labels=bf_oi->fb", "bf16", 2 * 8 * 16 * 32),
    "tpu batch": ("bf16[16,256,512]{2,1,0}", "bf16[16,512,128]{2,1,0}", "bf16[16,256,128]{2,1,0} "
                  "convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, "
                  "dim_labels=0bf_0io->0bf", "bf16", 2 * 16 * 256 * 512 * 128),
    "image": ("f32[1,8,8,3]{3,2,1,0}", "f32[3,3,3,16]{3,2,1,0}", "f32[1,8,8,16]{3,2,1,0} "
              "convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
              "tf32", 2 * 22 * 22 * 3 * 16),
    "cublas": ("bf16[8,16]{1,0}", "bf16[16,32]{1,0}", "(bf16[8,32]{1,0}, s8[64]{0}) "
               'custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
               '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":'
               '["1"],"rhs_contracting_dimensions":["0"]}}}', "bf16", 2 * 8 * 16 * 32),
    "cublas exact": ("f32[8,16]{1,0}", "f32[16,32]{1,0}", "(f32[8,32]{1,0}, s8[64]{0}) "
                     'custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
                     '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions"'
                     ':["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{'
                     '"operand_precision":["HIGHEST","HIGHEST"]}}}', "f32", 2 * 8 * 16 * 32),
    "pallas": ("bf16[8,16]{1,0}", "bf16[16,32]{1,0}", 'bf16[8,32]{1,0} custom-call(%a, %b), '
               'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{'
               '"body":"TUzv","cost_estimate":{"flops":"777","transcendentals":"0",'
               '"bytes_accessed":"99"}}}', "kernel", 777),
}


@pytest.mark.parametrize("name", DOTS)
def test_operations_of_products(name):
    a, b, line, kind, flops = DOTS[name]
    text = program(f"%a = {a} parameter(0)\n%b = {b} parameter(1)\n%c = {line}")
    assert hlo.dots_by_type(text) == {kind: flops}
    assert hlo.dots(text) == flops


def moved(lines, before=""):
    return hlo.bytes_accessed(program(lines, before))


SLICED = """%take (w: bf16[5,64,32], i: s32[], x: bf16[8,64]) -> bf16[8,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,64,32]{2,1,0} dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,64,32}
  %v = bf16[64,32]{1,0} bitcast(%s)
  %x = bf16[8,64]{1,0} parameter(2)
  ROOT %d = bf16[8,32]{1,0} dot(%x, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%as_seen (w: bf16[5,64,32]) -> bf16[5,64,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  ROOT %c = bf16[5,64,32]{2,0,1} copy(%w)
}

%take_seen (w: bf16[5,64,32], i: s32[]) -> bf16[1,64,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %v = bf16[5,64,32]{2,0,1} fusion(%w), kind=kLoop, calls=%as_seen
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = bf16[1,64,32]{2,1,0} dynamic-slice(%v, %i, %z, %z), dynamic_slice_sizes={1,64,32}
}

%put (w: bf16[5,64,32], u: bf16[64,32], i: s32[]) -> bf16[5,64,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %u = bf16[64,32]{1,0} parameter(1)
  %v = bf16[1,64,32]{2,1,0} bitcast(%u)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %r = bf16[5,64,32]{2,1,0} dynamic-update-slice(%w, %v, %i, %z, %z)
}

%last (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  ROOT %b = bf16[] parameter(1)
}

%strew (w: bf16[5,64,32], i: s32[8,1], u: bf16[8,32]) -> bf16[320,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %v = bf16[320,32]{1,0} bitcast(%w)
  %i = s32[8,1]{1,0} parameter(1)
  %u = bf16[8,32]{1,0} parameter(2)
  ROOT %r = bf16[320,32]{1,0} scatter(%v, %i, %u), update_window_dims={1}, to_apply=%last
}
"""


def test_bytes_of_slices_not_of_what_is_sliced():
    """Of five stacked matrices one is read, or written; 4 bytes are the index."""
    one = 64 * 32 * 2
    assert moved("""%w = bf16[5,64,32]{2,1,0} parameter(0)
        %i = s32[] parameter(1)
        %x = bf16[8,64]{1,0} parameter(2)
        %f = bf16[8,32]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%take""", SLICED) == \
        one + 4 + 8 * 64 * 2 + 8 * 32 * 2
    assert moved("""%w = bf16[5,64,32]{2,1,0} parameter(0)
        %u = bf16[64,32]{1,0} parameter(1)
        %i = s32[] parameter(2)
        %f = bf16[5,64,32]{2,1,0} fusion(%w, %u, %i), kind=kLoop, calls=%put""", SLICED) == \
        2 * one + 4
    assert moved("""%w = bf16[5,64,32]{2,1,0} parameter(0)
        %i = s32[] parameter(1)
        %f = bf16[1,64,32]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%take_seen""", SLICED) == \
        2 * one + 4
    assert moved("""%w = bf16[5,64,32]{2,1,0} parameter(0)
        %i = s32[8,1]{1,0} parameter(1)
        %u = bf16[8,32]{1,0} parameter(2)
        %f = bf16[320,32]{1,0} fusion(%w, %i, %u), kind=kInput, calls=%strew""", SLICED) == \
        3 * 8 * 32 * 2 + 8 * 4


def test_bytes_of_a_tpus_on_chip_memory_do_not_count():
    lines = """%p = f32[256]{0:T(256)} parameter(0)
        %s = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%p)
        %d = f32[256]{0:T(256)S(1)} copy-done(%s)
        %n = f32[256]{0:T(256)S(1)} negate(%d)
        %c = f32[256]{0:T(256)} copy(%n)"""
    assert moved(lines) == 2 * 1024
    # On a GPU the same number names ordinary memory: read and written by each of three lines.
    assert moved(lines.replace(":T(256)", ":").replace("{0:}", "{0}")) == 6 * 1024


def test_the_heaviest_lines_come_first():
    text = program("""%p = f32[64]{0} parameter(0)
        %z = s32[] constant(0)
        %in = (s32[], f32[64]{0}) tuple(%z, %p)
        %w = (s32[], f32[64]{0}) while(%in), condition=%inner_condition, body=%inner_body
        %y = f32[64]{0} get-tuple-element(%w), index=1
        %c = f32[64]{0} copy(%y), metadata={op_name="jit(f)/cut" stack_frame_id=1}""", LOOP)
    (first, told), (second, named) = hlo.heaviest(text, 2)
    assert (first, second) == (2 * 2 * 256, 2 * 256)  # from 0 to 3 by 2: twice
    assert told == "all-reduce -> f32[64] in inner_body (r)"
    assert named == "copy -> f32[64] in main (jit(f)/cut)"
    assert sum(size for size, _ in hlo.heaviest(text, 99)) == hlo.bytes_accessed(text)


def test_a_kernel_in_a_fusion_moves_what_it_says():
    """XLA wraps a kernel so that is given a part of an array by its address."""
    fused = """%f (p: f32[4,64]) -> f32[4,64] {
  %p = f32[4,64]{1,0} parameter(0)
  ROOT %k = f32[4,64]{1,0} custom-call(%p), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(step)/kernel_cost_flops_5_bytes_7/lightning_decode/mpmd_map"}
}"""
    assert moved("""%a = f32[4,64]{1,0} parameter(0)
        %c = f32[4,64]{1,0} fusion(%a), kind=kCustom, calls=%f""", fused) == 7


def test_kernels_are_named_by_their_scope_and_counted_as_often_as_they_run():
    paths = {"a": "jit(step)/while/body/closed_call/shard_map/jit(_call)/hit_experts/pallas_call",
             "b": "jit(step)/jit(_product)/kernel_cost_flops_5_bytes_7/experts_product/mpmd_map",
             "c": "jit(step)/while/body/pallas_call", "d": "jit(step)/top_k"}
    targets = {"a": "tpu_custom_call", "b": "mosaic_gpu_v2", "c": "triton_kernel_call",
               "d": "TopK"}
    calls = "\n".join(f'%{name} = f32[64]{{0}} custom-call(%p), '
                      f'custom_call_target="{targets[name]}", '
                      f'metadata={{op_name="{path}" stack_frame_id=1}}'
                      for name, path in paths.items())
    assert hlo.kernels(program(f"%p = f32[64]{{0}} parameter(0)\n{calls}")) == {
        "experts_product": 1, "hit_experts": 1, "kernel": 1}
    body = LOOP.replace("ROOT %t = (s32[], f32[64]{0}) tuple", f"""{calls.splitlines()[0].replace(
        "%p", "%x")}
  ROOT %t = (s32[], f32[64]{{0}}) tuple""")
    text = program("""%p = f32[64]{0} parameter(0)
        %z = s32[] constant(0)
        %in = (s32[], f32[64]{0}) tuple(%z, %p)
        %w = (s32[], f32[64]{0}) while(%in), condition=%inner_condition, body=%inner_body
        %y = f32[64]{0} get-tuple-element(%w), index=1""", body)
    assert hlo.kernels(text) == {"hit_experts": 2}
