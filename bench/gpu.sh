#!/usr/bin/env bash
# Build, test and bench the GPU kernels on a machine with an NVIDIA GPU: one command, no network, under 10 minutes.
#
#   bench/gpu.sh [all|test|sanitize|bench]        (default: all; the build comes first and is skipped where it is up to date)
#
# test      test_ops.py on CUDA tensors by Triton and CUDA, capture in CUDA graphs, no spills, a strict run of every op,
#           twice: the same bits
# sanitize  compute-sanitizer's memcheck and racecheck on small sizes
# bench     pytest bench -k ops --device cuda: the sizes of bench/targets.py, then every op's own
#
# Results: ${OUT:-bench/results}/<gpu>.md and .json, and all output in <gpu>.log. MINUTES (9.5) bounds the whole, and no
# step outlives its own limit. PYTHON (python3) has torch with CUDA, triton, transformers, pytest, setuptools, pybind11 and
# ninja; nvcc compiles. Exit status: 1 where a step failed (the later ones run all the same), 2 where nothing can run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

what=${1:-all} python=${PYTHON:-python3} out=${OUT:-bench/results}
case $what in all | test | sanitize | bench) ;;
-h | --help)
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' bench/gpu.sh
  exit 0
  ;;
*)
  echo "bench/gpu.sh: all, test, sanitize or bench, not '$what'" >&2
  exit 2
  ;;
esac
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 RLHF_FAST_SIMT=
unset TRITON_INTERPRET RLHF_FAST_BACKEND

# One start of Python prints the GPU's name, its compute capability, the suffix of extensions, and the test workers.
probe='
import importlib.util, re, sys, sysconfig
for needed in ("torch", "triton", "transformers", "pytest"):
    if importlib.util.find_spec(needed) is None:
        sys.exit(f"bench/gpu.sh: {sys.executable} has no {needed}; install it, or name another by PYTHON")
import torch
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: torch {torch.__version__} sees no CUDA device, and there is nothing to do without one")
name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print(name, "%d%d" % torch.cuda.get_device_capability(), sysconfig.get_config_var("EXT_SUFFIX"))
print(8 if importlib.util.find_spec("xdist") else 0)
'
found=$("$python" -c "$probe") || exit 2
{ read -r gpu capability suffix; read -r workers; } <<<"$found"

mkdir -p "$out" || exit 2
log=$out/$gpu.log summary=() failed=0 started=$SECONDS
whole=$("$python" -c "print(round(60 * float('${MINUTES:-9.5}')))") || exit 2
: >"$log"

# step NAME LIMIT COMMAND...: run it, its output to the log, no longer than LIMIT seconds or what is left of the whole.
step() {
  local name=$1 limit=$2 start=$SECONDS left=$((whole - SECONDS + started)) status=0
  shift 2
  if ((left < 15)); then
    summary+=("$name: not started, the time is over") failed=1
    return 1
  fi
  ((limit < left)) || limit=$left
  printf '\n### %s (at most %d s)\n' "$name" "$limit" | tee -a "$log"
  timeout -s INT -k 10 "$limit" "$@" >"$log.step" 2>&1 || status=$? # pytest ends with its summary then
  cat "$log.step" >>"$log"
  if ((status == 0)); then
    summary+=("$name: ok, $((SECONDS - start)) s")
    return 0
  fi
  failed=1
  if ((status == 124 || status == 137)); then
    summary+=("$name: INTERRUPTED after $((SECONDS - start)) s")
  else
    summary+=("$name: FAILED ($status), $((SECONDS - start)) s")
  fi
  tail -n 25 "$log.step"
  return "$status"
}

build() {
  local made=rlhf_fast/_cuda$suffix
  if [[ -f $made && -z $(find csrc setup.py -newer "$made" -print -quit) ]]; then
    summary+=("build: up to date")
    return
  fi
  export RLHF_FAST_CUDA=1 RLHF_FAST_REQUIRE_EXT=1
  export RLHF_FAST_CUDA_ARCHS=${RLHF_FAST_CUDA_ARCHS:-$capability}
  # shellcheck disable=SC2016
  step build 240 bash -c '
    "$0" -m pip install --no-build-isolation --no-deps -e . || {
      echo "pip could not install; building in place"
      "$0" setup.py build_ext --inplace
    }' "$python"
}

tests() { # seconds for test_ops.py and test_cuda_graphs.py, and which of their tests
  local parallel=()
  ((workers)) && parallel=(-n "$workers")
  step "tests: no spill in the binary" 60 "$python" -m pytest -o addopts=-q -p no:cacheprovider \
    tests/test_cuda_resources.py::test_no_kernel_spills
  step "tests: ops on CUDA tensors" "$1" "$python" -m pytest -o addopts=-q -p no:cacheprovider "${parallel[@]}" --maxfail=20 \
    tests/test_ops.py tests/test_cuda_graphs.py -k "$2"
  local run
  for run in 1 2; do # shellcheck disable=SC2016
    step "tests: every op, strict, run $run" 60 env RLHF_FAST_STRICT=1 bash -c \
      '"$0" -m rlhf_fast.bench.checks.output_hashes --device cuda >"$1"; status=$?; grep FAULT "$1"; exit $status' \
      "$python" "$out/$gpu-run$run.txt"
  done
  step "tests: the same bits in two runs" 10 diff "$out/$gpu-run1.txt" "$out/$gpu-run2.txt" &&
    rm "$out/$gpu-run1.txt" "$out/$gpu-run2.txt"
}

sanitize() { # seconds for each tool and backend
  if ! command -v compute-sanitizer >/dev/null; then
    summary+=("sanitize: compute-sanitizer is not installed")
    return
  fi
  local tool backend
  for backend in cuda triton; do
    for tool in memcheck racecheck; do # torch's cache would hide a read beyond a tensor's end
      step "sanitize: $tool, $backend" "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$python" -m rlhf_fast.bench.checks.output_hashes --device cuda --backend "$backend" --small --sizes 3
    done
  done
}

bench() { # torch.compile's seconds for a case
  local left=$((whole - SECONDS + started - 30))
  step "bench: ops" "$((left + 25))" "$python" -m pytest -o addopts=-q -p no:cacheprovider bench -k ops --device cuda \
    --seconds 0.7 --compile-seconds "$1" --deadline "$((left > 20 ? left - 20 : 1))" --save-table "$out/$gpu.md"
}

build
case $what in
  all) tests 150 "(triton or cuda) and (truth or gradient or graph)"; sanitize 25; bench 0 ;;
  test) tests 300 "triton or cuda" ;;
  sanitize) sanitize 120 ;;
  bench) bench 20 ;;
esac

echo
if [[ $what == all || $what == bench ]] && [[ -f $out/$gpu.json ]]; then
  "$python" -m rlhf_fast.bench.report "$out/$gpu.json"
fi
rm -f "$log.step"
printf '%s\n' "" "$gpu, all output in $log:" "${summary[@]}"
exit "$failed"
