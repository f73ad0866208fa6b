"""Programs of a persistent Hopper kernel that keep step, so that they share what they read in L2.

Programs of neighbouring items read the same rows or weights, from memory once if at about the same
time. Their items differ in height, so they drift apart by more than L2 remembers. A program that
begins its next item waits until half of all have begun theirs: those ahead wait for the middle,
those behind for nobody. The wait is bounded, since it is no condition of a right result: a program
may not run at all while another kernel holds its multiprocessor.
"""

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

POLLS = 32  # of about 0.7 us

# One thread of the first block of a program: $0 counts items begun, and behind it each program's;
# $1 is how many there are, which the last ones wait for where fewer than half of the programs have
# one.
_PTX = """{{
  .reg .pred done;
  .reg .b32 thread, rank, program, item, begun, enough, all, polls;
  .reg .b64 own;
  mov.u32 thread, %tid.x;
  and.b32 thread, thread, 127;
  mov.u32 rank, %cluster_ctarank;
  or.b32 thread, thread, rank;
  setp.ne.u32 done, thread, 0;
  @done bra END;
  mov.u32 program, %clusterid.x;
  mul.wide.u32 own, program, 4;
  add.u64 own, own, $0;
  atom.relaxed.gpu.global.add.u32 item, [own + 4], 1;
  mad.lo.u32 enough, item, {programs}, {half};
  ld.global.u32 all, [$1];
  min.u32 enough, enough, all;
  atom.relaxed.gpu.global.add.u32 begun, [$0], 1;
  mov.u32 polls, 0;
  POLL:
  setp.ge.u32 done, begun, enough;
  @done bra END;
  setp.ge.u32 done, polls, {polls};
  @done bra END;
  add.u32 polls, polls, 1;
  nanosleep.u32 100;
  ld.relaxed.gpu.global.u32 begun, [$0];
  bra POLL;
  END:
}}"""


def keep_pace(counts, items, programs: int) -> None:
    """Called by one warpgroup of every block of each program, once an item.

    counts: int32 [1 + programs] in main memory, zero when the kernel begins.
    items: int32, how many there are comes first.
    """
    code = _PTX.format(programs=programs, half=programs // 2, polls=POLLS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def wait(_, *memory):
        # jax's own modules of MLIR, which have no public name.
        ir, llvm = utils.ir, utils.llvm
        pointers = [utils.memref_ptr(one) for one in memory]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), pointers, code, "l,l", has_side_effects=True)

    wait(counts, items)
