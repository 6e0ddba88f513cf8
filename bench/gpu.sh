#!/usr/bin/env bash
# Build, test and bench the GPU kernels on a machine with an NVIDIA GPU: one command, no network, the best evidence first.
#
#   bench/gpu.sh [short|full|test|sanitize|bench|dry-run]    (default: full; the build comes first, if it is out of date)
#
# short     4 minutes: facts (rates, clocks), every kernel once against its reference, the sizes of bench/targets.py,
#           the decode step, a PPO step, the rollout's and the trainer's tests
# full      8 minutes: short, then the ops' tests, two runs with the same bits, memcheck, the remaining sizes
# test      smoke, all tests on CUDA tensors, no spills in the binary, every op twice: the same bits
# sanitize  compute-sanitizer's memcheck and racecheck on small sizes
# bench     facts, and every figure of full
# dry-run   every step of full on a CPU, at tiny sizes: whether it runs, not how fast. Nothing is built, and tests are
#           only collected.
#
# Results in ${OUT:-bench/results}, written as they come: <gpu>.md and .json (ops), <gpu>-facts.json, <gpu>-decode.json,
# <gpu>-ppo.json, and all output in <gpu>.log. MINUTES bounds the whole, no step outlives its own limit, and steps for
# which no time is left are skipped. PYTHON (python3) has torch with CUDA, triton, transformers, pytest, setuptools,
# pybind11 and ninja; nvcc compiles. docs/gpu.md says how to bring prebuilt extensions instead.
# Exit status: 1 where a step failed (the later ones run all the same), 2 where nothing can run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

what=${1:-full} python=${PYTHON:-python3} out=${OUT:-bench/results} device=cuda
case $what in
short) minutes=4 ;;
full) minutes=8 ;;
test | sanitize | bench) minutes=9.5 ;;
dry-run) minutes=20 device=cpu ;;
-h | --help)
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' bench/gpu.sh
  exit 0
  ;;
*)
  echo "bench/gpu.sh: short, full, test, sanitize, bench or dry-run, not '$what'" >&2
  exit 2
  ;;
esac
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export RLHF_FAST_SIMT= # kernels compiled for the CPU are not looked at here
unset RLHF_FAST_BACKEND
[[ $device == cpu ]] || unset TRITON_INTERPRET

# One start of Python prints the GPU's name, its compute capability, the suffix of extensions, and the test workers.
probe='
import importlib.util, re, sys, sysconfig
for needed in ("torch", "triton", "transformers", "pytest"):
    if importlib.util.find_spec(needed) is None:
        sys.exit(f"bench/gpu.sh: {sys.executable} has no {needed}; install it, or name another by PYTHON")
import torch
if sys.argv[1] == "cpu":
    name, capability = "dry-run", (9, 0)
elif torch.cuda.is_available():
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
else:
    sys.exit(f"bench/gpu.sh: torch {torch.__version__} sees no CUDA device, and there is nothing to do without one")
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), "%d%d" % capability, sysconfig.get_config_var("EXT_SUFFIX"))
print(8 if importlib.util.find_spec("xdist") and sys.argv[1] == "cuda" else 0)
'
found=$("$python" -c "$probe" "$device") || exit 2
{ read -r gpu capability suffix; read -r workers; } <<<"$found"

mkdir -p "$out" || exit 2
log=$out/$gpu.log summary=() results=() failed=0 started=$SECONDS
whole=$("$python" -c "print(round(60 * float('${MINUTES:-$minutes}')))") || exit 2
: >"$log"

dry() { [[ $device == cpu ]]; }

# step NAME LIMIT COMMAND...: run it, its output to the log, no longer than LIMIT seconds or what is left of the whole.
step() {
  local name=$1 limit=$2 start=$SECONDS left=$((whole - SECONDS + started)) status=0 before
  shift 2
  if ((left < 15)); then
    summary+=("$name: not started, the time is over")
    failed=1
    return 1
  fi
  dry && limit=$((4 * limit)) # other processes may have the CPU
  ((limit < left)) || limit=$left
  printf '\n### %s (at %d s, at most %d s)\n' "$name" $((SECONDS - started)) "$limit" | tee -a "$log"
  before=$(wc -l <"$log")
  timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 || status=$? # pytest ends with its summary then
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
  tail -n "+$((before + 1))" "$log" | tail -n 25
  return "$status"
}

build() {
  local made=rlhf_fast/_cuda$suffix
  if [[ -f $made && -z $(find csrc setup.py -newer "$made" -print -quit) ]] &&
    "$python" -c 'import torch, rlhf_fast._cpu, rlhf_fast._cuda' 2>>"$log"; then
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

written() { # the results of a bench step: those of an earlier run go, those of this one are printed at the end
  rm -f "$out/$1.json" "$out/$1.md"
  results+=("$out/$1.json")
}

facts() {
  written "$gpu-facts"
  step "facts" 40 "$python" -m rlhf_fast.bench.gpu_facts --device "$device" --save "$out/$gpu-facts.json"
}

smoke() {
  local few=(--processes 8 --sizes 2)
  dry && few=(--processes 1 --sizes 1)
  step "smoke: every kernel against its reference" 70 \
    "$python" -m rlhf_fast.bench.checks.smoke --device "$device" "${few[@]}"
}

pytests() { # NAME LIMIT ARGUMENT...: tests in parallel, to their end whatever fails
  local name=$1 limit=$2 parallel=(-n 0)
  shift 2
  ((workers)) && parallel=(-n "$workers")
  dry && parallel+=(--collect-only)
  step "$name" "$limit" "$python" -m pytest -o addopts=-q -p no:cacheprovider "${parallel[@]}" "$@"
}

rollout() {
  local selected="(cuda or gpu) and not cpu"
  dry && selected=cpu
  pytests "tests: rollout and trainer" 90 tests/test_gpu_rollout.py tests/test_decode_graphs.py \
    tests/test_prompt_attention.py tests/test_merged_linears.py tests/test_packed_graphs.py -k "$selected"
}

tests() { # seconds for the ops' tests, and which of them
  pytests "tests: ops on CUDA tensors" "$1" tests/test_ops.py tests/test_cuda_graphs.py tests/test_cuda_decode.py \
    tests/test_cuda_rows.py tests/test_decode_attention.py tests/test_varlen_attention.py \
    tests/test_layer_gradients.py -k "$2"
}

spills() {
  pytests "tests: no spill in the binary" 60 tests/test_cuda_resources.py::test_no_kernel_spills
}

hashes() {
  local run few=(--small) lines
  dry && few=(--small --sizes 1 --op gae --op sample_tokens)
  lines=$(mktemp -d)
  for run in 1 2; do # shellcheck disable=SC2016
    step "hashes: every op, strict, run $run" 90 env RLHF_FAST_STRICT=1 bash -c \
      '"$0" -m rlhf_fast.bench.checks.output_hashes "${@:2}" >"$1"; status=$?; grep FAULT "$1"; exit $status' \
      "$python" "$lines/$run" --device "$device" "${few[@]}"
  done
  step "hashes: the same bits in two runs" 10 diff "$lines/1" "$lines/2"
  rm -r "$lines"
}

sanitize() { # seconds for each tool, then pairs TOOL BACKEND
  local limit=$1 sanitizer=()
  shift
  if ! dry && ! command -v compute-sanitizer >/dev/null; then
    summary+=("sanitize: compute-sanitizer is not installed")
    return
  fi
  while (($#)); do
    dry || sanitizer=(compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all)
    # torch's cache would hide a read beyond a tensor's end
    step "sanitize: $1, $2" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" \
      "$python" -m rlhf_fast.bench.checks.output_hashes --device "$device" --small --sizes 2 \
      $(dry && echo --op swiglu || echo --backend "$2")
    shift 2
  done
}

targets() {
  written "$gpu"
  local selected=(--targets --device cuda --seconds 0.3)
  dry && selected=(--targets --device cpu --small --op gae --op token_logprobs --seconds 0.01)
  step "bench: the target list" 130 "$python" -m pytest -o addopts=-q -p no:cacheprovider bench/test_bench_ops.py \
    "${selected[@]}" --compile-seconds 0 --deadline 110 --save-table "$out/$gpu.md"
}

decode() {
  written "$gpu-decode"
  step "bench: decode step" 80 "$python" -m rlhf_fast.bench.decode_step --device "$device" $(dry && echo --tiny) \
    --deadline 60 --save "$out/$gpu-decode.json"
}

ppo() {
  written "$gpu-ppo"
  step "bench: PPO step" 70 "$python" -m rlhf_fast.bench.ppo_step --device "$device" $(dry && echo --tiny) \
    --dtype bfloat16 --deadline 55 --save "$out/$gpu-ppo.json"
}

remaining() { # torch.compile's seconds for a case
  written "$gpu-large"
  local left=$((whole - SECONDS + started - 20)) selected=(--device cuda --seconds 0.5)
  dry && selected=(--device cpu --small --op swiglu --seconds 0.01)
  step "bench: every op's large sizes" "$((left + 15))" "$python" -m pytest -o addopts=-q -p no:cacheprovider \
    bench/test_bench_ops.py "${selected[@]}" --compile-seconds "$1" \
    --deadline "$((left > 20 ? left - 10 : 1))" --save-table "$out/$gpu-large.md"
}

dry || build
quick="(triton or cuda) and (truth or gradient or graph)"
case $what in
short) facts; smoke; targets; decode; ppo; rollout ;;
full | dry-run)
  facts; smoke; targets; decode; ppo; rollout
  tests 120 "$quick"; hashes; sanitize 70 memcheck cuda; remaining 0
  dry && spills
  ;;
test) smoke; rollout; spills; tests 300 "triton or cuda"; hashes ;;
sanitize) sanitize 120 memcheck cuda racecheck cuda memcheck triton racecheck triton ;;
bench) facts; targets; decode; ppo; remaining 20 ;;
esac

echo
present=()
for file in "${results[@]}"; do [[ -f $file ]] && present+=("$file"); done
if ((${#present[@]})); then
  "$python" -m rlhf_fast.bench.report "${present[@]}"
  {
    printf '# %s\n\nMade by `bench/gpu.sh %s`. Its steps:\n\n' "$gpu" "$what"
    printf -- '- %s\n' "${summary[@]}"
    echo
    "$python" -m rlhf_fast.bench.report --markdown "${present[@]}"
  } >"$out/$gpu.md"
fi
printf '%s\n' "" "$gpu, all output in $log:" "${summary[@]}"
exit "$failed"
