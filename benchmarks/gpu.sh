#!/usr/bin/env bash
# Everything that needs a GPU, in stages of less than 10 minutes each that can be run one by one:
#
#   benchmarks/gpu.sh OUTDIR                      all of them
#   benchmarks/gpu.sh OUTDIR info build kernels   these
#
# Each stage writes OUTDIR/STAGE.log and its entry of OUTDIR/stages.json; the benchmarks also write their own JSON. A
# stage that fails does not stop the next one. The exit status is the number of failed stages.
#
#   info         the GPU, its driver, torch
#   build        the extension, in place, for this GPU's architecture
#   primitives   tests: the instructions that the kernels use, against the simulator of tests/support/simulator
#   kernels      tests: every kernel at the edges of its tiles, the check before first use
#   ops          tests: the ops under every kernel, streams, graphs, memory, torch.compile
#   suite        tests: the parts of the ordinary suite that run on every device
#   memcheck, racecheck, synccheck, initcheck     every kernel once under that tool of compute-sanitizer
#   bf16, fp16, tf32                              the quick list in that dtype; another run resumes it
#
# or, where a GPU is available for a quarter of an hour only, a choice of nine minutes. `brief` does not build: run
# `build` before, on any machine with the same torch. A folder build/simulator from a test run on the same kind of
# machine saves the first minute.
#
#   benchmarks/gpu.sh OUTDIR brief                info checks blocks list hopper profile
#
#   checks       the tests of `primitives`, `kernels`, `ops`, `suite` and two sanitizers, all at the same time
#   blocks       every kernel with several cuts on the blocks of docs/kernels.md, against chain (also as a CUDA graph) and
#                dense layer; then the blocks with less of a stage each (ablations)
#   list         the quick list in bf16, every kernel, without torch.compile
#   hopper       properties of the hardware that Hopper's kernels rest on (benchmarks/gpu/hopper)
#   profile      Nsight Compute of five kernels
#
# PYTHON (python3) must have torch with CUDA, pytest and what pyproject.toml lists; nvcc comes from CUDA_HOME or PATH.
set -uo pipefail

BRIEF=(info checks blocks list hopper profile)
STAGES=(info build primitives kernels ops suite memcheck racecheck synccheck initcheck bf16 fp16 tf32)
if [ $# -eq 0 ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 64
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- "${STAGES[@]}"
[ "$1" != brief ] || set -- "${BRIEF[@]}"
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=590 # seconds per stage, unless LIMITS has another number
declare -A LIMITS=([info]=20 [checks]=210 [blocks]=80 [list]=105 [hopper]=45 [profile]=75) # brief: 535 in all
export PYTHONUNBUFFERED=1

run_info() {
  nvidia-smi || return
  "$PYTHON" - <<'PY'
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda)
for index in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(index))
PY
  "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" --version
}

run_build() {
  local architecture
  architecture=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return
  LOWRANK_OPS_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$architecture} \
    "$PYTHON" setup.py -q build_ext --inplace || return
  "$PYTHON" -c 'import lowrank_ops; print(lowrank_ops.build_info())'
}

# Without a GPU the tests would be skipped; here that counts as a failure.
ready() {
  "$PYTHON" - <<'PY'
import torch, lowrank_ops
assert torch.cuda.is_available(), "torch sees no GPU"
assert lowrank_ops.build_info()["cuda"], "lowrank_ops was built without CUDA kernels: run the stage `build`"
PY
}

tests() { ready && "$PYTHON" -m pytest -p no:cacheprovider -rfE --tb=short "$@"; }

sanitizer() { # $1: the tool; then its options; last: pytest's -k expression
  # The allocator's cache would hide accesses beyond a tensor; pytest's capture would hide the tool's messages.
  ready && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "${@:1:$#-1}" --error-exitcode 1 \
    --print-limit 20 "$PYTHON" -m pytest -p no:cacheprovider --tb=short -s tests/cuda/test_cuda_kernels.py -k "${*: -1}"
}
OURS=(--kernel-name kernel_substring=lowrank_ops)

benchmark() { ready && "$PYTHON" -m benchmarks.run --device cuda --dtype "$1" --minutes 9 --resume --json "$OUT/$1.json"; }

# All at the same time, as nothing is timed. Their logs are printed one after the other.
run_checks() {
  local failed=0 job
  declare -A jobs
  ready || return
  # Builds the simulator once, or every worker would compile it. One thread per worker, or they would slow each other.
  "$PYTHON" -c "from tests.support.simulator import building; building.build()" || return
  export OMP_NUM_THREADS=1
  tests -n "${WORKERS:-8}" tests/cuda/test_cuda_kernels.py tests/cuda/test_cuda.py tests/ops/test_ops.py tests/ops/test_autograd.py \
    -k "cuda and not sanitized" >"$OUT/check_tests.log" 2>&1 &
  jobs[tests]=$!
  for job in memcheck racecheck; do
    sanitizer "$job" "${OURS[@]}" "test_sanitized and bfloat16 and (sm80_1 or sm80_2 or persistent)" >"$OUT/check_$job.log" 2>&1 &
    jobs[$job]=$!
  done
  for job in racecheck memcheck tests; do
    wait "${jobs[$job]}" || failed=$((failed + 1))
    echo "-- $job"
    tail -n 60 "$OUT/check_$job.log"
  done
  return "$failed"
}

run_hopper() {
  ready || return
  local program=build/hopper
  if [ ! -x "$program" ] || [ -n "$(find benchmarks/gpu/hopper -type f -newer "$program")" ]; then
    mkdir -p build
    "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" --threads 0 -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a \
      -o "$program" benchmarks/gpu/hopper/*.cu || return
  fi
  "$program" | tee "$OUT/hopper.jsonl"
}

PROFILED=(tucker_conv2d_sm90a_64x64 cp_conv2d_sm90a_112x64 tucker_conv2d_sm80_128x64 cp_conv2d_sm80_64x128 lowrank_linear_sm80_64x128)
run_profile() {
  ready || return
  ncu --clock-control none --set full --import-source no --kernel-name "regex:(block|sm90a)_kernel" --force-overwrite \
    --export "$OUT/profile" "$PYTHON" -m benchmarks.gpu.kernels --profile "${PROFILED[@]}" || return
  ncu --import "$OUT/profile.ncu-rep" --page details >"$OUT/profile.txt"
  ncu --import "$OUT/profile.ncu-rep" --page source --csv | gzip >"$OUT/profile_source.csv.gz"
  grep -E "block_kernel|sm90a_kernel|Duration|Throughput|Registers Per|Issue Slots|Eligible|No Eligible" "$OUT/profile.txt"
}

run_stage() {
  case $1 in
    info) run_info ;;
    build) run_build ;;
    primitives) tests tests/cuda/test_cuda_kernels.py -k "multiply_add or load_matrices or copies or conversions" ;;
    kernels) tests tests/cuda/test_cuda_kernels.py -k "not (multiply_add or load_matrices or copies or conversions)" ;;
    ops) tests tests/cuda/test_cuda.py ;;
    suite) tests tests/ops/test_ops.py tests/ops/test_autograd.py -k cuda ;;
    # initcheck has to watch torch's kernels, too: they wrote the memory that ours read.
    initcheck) sanitizer initcheck test_sanitized ;;
    memcheck | racecheck | synccheck) sanitizer "$1" "${OURS[@]}" test_sanitized ;;
    checks) run_checks ;;
    blocks) ready && "$PYTHON" -m benchmarks.gpu.kernels --dtype bfloat16 tf32 --seconds 1.5 --ablations \
      --json "$OUT/blocks.json" ;;
    list)
      ready && "$PYTHON" -m benchmarks.run --device cuda --dtype bf16 --peers chain merged dense graph kernels \
        --seconds 0.4 --minutes 1.5 --json "$OUT/list.json"
      ;;
    hopper) run_hopper ;;
    profile) run_profile ;;
    bf16) benchmark bfloat16 ;;
    fp16) benchmark float16 ;;
    tf32) benchmark tf32 ;;
    *)
      echo "benchmarks/gpu.sh: unknown stage '$1', known are: brief ${STAGES[*]} ${BRIEF[*]:1}"
      return 64
      ;;
  esac
}

# Keeps one entry per stage: that of its latest run.
record() {
  "$PYTHON" - "$OUT" "$@" <<'PY'
import json, pathlib, sys
folder, stage, code, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
lines = (folder / f"{stage}.log").read_text(errors="replace").strip().splitlines()
file = folder / "stages.json"
stages = json.loads(file.read_text()) if file.exists() else {}
stages[stage] = {"exit": code, "seconds": seconds, "last_line": lines[-1] if lines else ""}
file.write_text(json.dumps(stages, indent=1) + "\n")
PY
}

if [ "${1:-}" = --stage ]; then # one stage in a process of its own, so that `timeout` can end all of its processes
  run_stage "$2"
  exit
fi
failed=0
for stage in "$@"; do
  echo "== $stage"
  start=$SECONDS
  timeout --kill-after=5 "${LIMITS[$stage]:-$LIMIT}" bash "$0" "$OUT" --stage "$stage" 2>&1 | tee "$OUT/$stage.log"
  code=${PIPESTATUS[0]}
  record "$stage" "$code" $((SECONDS - start))
  [ "$code" -eq 0 ] || failed=$((failed + 1))
  echo "== $stage: exit $code after $((SECONDS - start)) s"
done
exit "$failed"
