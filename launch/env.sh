#!/usr/bin/env bash
# Environment of mmx for one platform: XLA flags, memory, caches, each with its reason.
#
#   . launch/env.sh v6e               # sets it in this shell
#   bash launch/env.sh v6e --dry-run  # prints the exports and sets nothing
#   bash launch/env.sh v6e --list     # prints NAME=VALUE lines, as docker --env-file reads them
#
# The platform is v5e, v5p, v6e, tpu7x, cuda or cpu. A variable that is set already is kept; your
# XLA flags come after these, so that yours win. Also read:
#   MMX_SHARED=/mnt/mmx    keeps compiled programs there, for all hosts and the next start
#   MMX_SLICES=2           slices of a TPU job
#   MMX_CPU_DEVICES=8      devices to simulate on a CPU

# _mmx_out NAME VALUE: shows, lists or exports it, by the caller's $mode.
_mmx_out() {
  case $mode in
    list) printf '%s=%s\n' "$1" "$2" ;;
    show) printf 'export %s=%q\n' "$1" "$2" ;;
    *) export "$1=$2" ;;
  esac
}

# _mmx_set NAME VALUE: unless it is set.
_mmx_set() {
  _mmx_out "$1" "${!1:-$2}"
}

# _mmx_flags NAME FLAG…: before those that are set, each once.
_mmx_flags() {
  local name=$1 flag line=
  shift
  for flag; do
    case " ${!name:-} " in
      *" $flag "*) ;;
      *) line+="$flag " ;;
    esac
  done
  line+=${!name:-}
  _mmx_out "$name" "${line% }"
}

_mmx_platform() {
  local -a flags=()
  # Lines reach the log as they are written, also those before a kill.
  _mmx_set PYTHONUNBUFFERED 1
  # Hosts of a pod come minutes apart: images are pulled, nodes are added.
  _mmx_set MMX_TIMEOUT_S 900
  if [ -n "${MMX_SHARED:-}" ]; then
    # The first step of the whole model compiles for minutes; the next start reads the program.
    _mmx_set JAX_COMPILATION_CACHE_DIR "${MMX_SHARED%/}/compiled"
  fi
  case $1 in
    v5e | v5p | v6e | tpu7x)
      # A missing accelerator is an error at once, not a run on the host's CPU.
      _mmx_set JAX_PLATFORMS tpu,cpu
      # Latency-hiding scheduler and asynchronous gathers are libtpu's defaults: not repeated here.
      if [ "$1" = v5e ]; then
        # Sums of tensor parallelism run beside products; XLA's guide advises it for v5e.
        flags+=(--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true)
      else
        # One group's tokens travel to their experts while another group computes; off by default.
        # For v5e:8x8 the compiler refuses this and the next ("not supported on limited ICI").
        flags+=(--xla_tpu_enable_async_all_to_all=true)
        # The same for exchanges of exact sizes.
        flags+=(--xla_tpu_enable_async_ragged_all_to_all=true)
      fi
      if [ "${MMX_SLICES:-1}" -gt 1 ]; then
        # Gradients cross the slow network between slices while the next layers compute.
        flags+=(--xla_tpu_enable_data_parallel_all_reduce_opt=true)
        # The same where their sizes differ, as those of experts and norms do.
        flags+=(--xla_tpu_data_parallel_opt_different_sized_ops=true)
      fi
      # libtpu reads its flags here; in XLA_FLAGS the host's part of XLA would refuse them.
      _mmx_flags LIBTPU_INIT_ARGS "${flags[@]}"
      ;;
    cuda)
      # As above.
      _mmx_set JAX_PLATFORMS cuda,cpu
      # 134 of an H200's 140 GiB, what `mmx plan` reckons with; NCCL and cuBLAS need the rest.
      # The default, 0.75, leaves a quarter unused.
      _mmx_set XLA_PYTHON_CLIENT_MEM_FRACTION 0.96
      # NCCL says what failed and where, and nothing otherwise.
      _mmx_set NCCL_DEBUG WARN
      # Collectives run beside products; off by default on GPUs.
      flags+=(--xla_gpu_enable_latency_hiding_scheduler=true)
      # A failed collective ends the process, to be started again, in place of a hang.
      flags+=(--xla_gpu_nccl_terminate_on_error=true)
      # GPUs reach their first collective minutes apart, as they compile; the default is 40 s.
      flags+=(--xla_gpu_first_collective_call_terminate_timeout_seconds=600)
      _mmx_flags XLA_FLAGS "${flags[@]}"
      ;;
    cpu)
      # Accelerators of this host are left alone.
      _mmx_set JAX_PLATFORMS cpu
      # Many simulated devices on few cores come late to a collective; 40 s would end the run.
      flags+=(--xla_cpu_collective_call_terminate_timeout_seconds=600)
      if [ -n "${MMX_CPU_DEVICES:-}" ]; then
        # As many devices as the pod to be tried has.
        flags+=("--xla_force_host_platform_device_count=$MMX_CPU_DEVICES")
      fi
      _mmx_flags XLA_FLAGS "${flags[@]}"
      ;;
  esac
}

_mmx_refuse() {
  printf 'env.sh: %s\n' "$1" >&2
  return 2
}

_mmx_env() {
  local platform='' mode=set word
  for word; do
    case $word in
      --help) mode=help ;;
      --dry-run) mode=show ;;
      --list) mode=list ;;
      -*)
        _mmx_refuse "there is no flag '$word'. They are --dry-run, --list and --help."
        return
        ;;
      *) platform+=${platform:+ }$word ;;
    esac
  done
  if [ "$mode" = help ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    return
  fi
  case $platform in
    v5e | v5p | v6e | tpu7x | cuda | cpu) ;;
    *)
      _mmx_refuse "the platform '$platform' is unknown. It is v5e, v5p, v6e, tpu7x, cuda or cpu."
      return
      ;;
  esac
  case ${MMX_SLICES:-1}${MMX_CPU_DEVICES:-1} in
    *[!0-9]*)
      _mmx_refuse "MMX_SLICES and MMX_CPU_DEVICES are whole numbers, as in MMX_SLICES=2."
      return
      ;;
  esac
  _mmx_platform "$platform"
}

_mmx_env "$@"
