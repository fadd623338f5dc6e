#!/usr/bin/env bash
# Checks what only a GPU can: attention's certificate in every dtype, random cases, the golden files, the tests
# that need a device, and NVIDIA's memory and race checkers. Prints one line for each; exit code 1 if any failed.
#
#   scripts/gpu_check.sh [--program build/cuda/flexchat] [--cases 10000] [--out runs/gpu_check/TIME] [CHECK...]
#
# CHECK: only those whose names begin so, e.g. suite random-bf16 racecheck.
# --cases: random cases of attention for each dtype, spread over the cores.
# Golden files are taken from ../shared/golden, beside the repository, where there are any.
set -euo pipefail

program=build/cuda/flexchat cases=10000 out=runs/gpu_check/$(date +%Y%m%d-%H%M%S) wanted=()
while (($# > 0)); do
  case $1 in
    --program | --cases | --out)
      if (($# < 2)); then
        echo "scripts/gpu_check.sh: $1 needs a value" >&2
        exit 2
      fi
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*)
      echo "scripts/gpu_check.sh: unknown option '$1'; allowed: --program, --cases, --out, --help" >&2
      exit 2
      ;;
    *)
      wanted+=("$1")
      shift
      ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
die() {
  echo "scripts/gpu_check.sh: $*" >&2
  exit 2
}
if [[ ! $cases =~ ^[0-9]+$ ]]; then die "--cases: '$cases' is no whole number"; fi
if [[ ! -x $program ]]; then die "--program: there is no program $program; cmake --build --preset cuda makes it"; fi
if [[ -e $out ]]; then die "--out: $out exists already"; fi
program=$(realpath "$program")
tests=$(dirname "$program")
mkdir -p "$out"

table=() failed=0
check() { # name, command...: its output goes to a file of that name
  local name=$1 start=$SECONDS verdict=passed word asked=$((${#wanted[@]} == 0))
  shift
  for word in "${wanted[@]}"; do
    if [[ $name == "$word"* ]]; then asked=1; fi
  done
  if ((!asked)); then return; fi
  if ! "$@" >"$out/$name.txt" 2>&1; then
    verdict=FAILED
    failed=1
  fi
  table+=("$(printf '%-7s %5d s  %s' "$verdict" $((SECONDS - start)) "$name")")
  echo "${table[-1]}"
}

attention() { "$program" verify attention --kernel cuda_mma --device cuda --runs "$out/runs" "$@"; }

random_cases() { # dtype
  local n each i pids=() status=0
  n=$(nproc)
  each=$(((cases + n - 1) / n))
  for ((i = 0; i < n; ++i)); do
    OMP_NUM_THREADS=1 attention --mask causal --random "$each" --forms 96 --seed $((1 + i * each)) --dtype "$1" \
      --run-id "random_$1_$i" &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i" || status=1; done
  return "$status"
}

# Racecheck does not follow bar.arrive, nor one lane's arrival at a barrier in shared memory (mbarrier) for its whole
# warp, and initcheck does not see what bulk copies write. Hopper's kernels have all three, so these two tools look at
# the others: those of f32, and at head dim 80 those of mma.sync. Reads of memory that nobody wrote show everywhere
# when new blocks are full of NaN (poisoned).
poisoned() { FLEXCHAT_POISON=1 "$@"; }
sanitize() { # tool, dtype, options of verify...
  local tool=$1 dtype=$2
  shift 2
  compute-sanitizer --tool "$tool" --error-exitcode 1 "$program" verify attention --kernel cuda_mma --device cuda \
    --dtype "$dtype" --repeats 2 --runs "$out/runs" --run-id "$tool-$dtype" "$@"
}

for dtype in f32 bf16 f16; do check "suite-$dtype" attention --suite --dtype "$dtype" --run-id "suite_$dtype"; done
for dtype in f32 bf16 f16; do check "random-$dtype" random_cases "$dtype"; done
if compgen -G '../shared/golden/classic_*.safetensors' >/dev/null; then
  golden=("$program" verify golden --device cuda --runs "$out/runs"
    ../shared/golden/classic_*.safetensors ../shared/golden/modern_*.safetensors)
  check golden "${golden[@]}"
  check poison-golden poisoned "${golden[@]}"
fi
for name in ops optim backend models verify; do
  if [[ -x $tests/test_$name ]]; then check "test-$name" "$tests/test_$name"; fi
done
for dtype in f32 bf16 f16; do
  check "poison-suite-$dtype" poisoned attention --suite --dtype "$dtype" --run-id "poisoned_$dtype"
done
for name in ops optim models; do
  if [[ -x $tests/test_$name ]]; then check "poison-test-$name" poisoned "$tests/test_$name"; fi
done
if command -v compute-sanitizer >/dev/null; then
  for dtype in f32 bf16; do check "memcheck-attention-$dtype" sanitize memcheck "$dtype" --mask causal; done
  for tool in racecheck initcheck; do
    check "$tool-attention-f32" sanitize "$tool" f32 --mask causal
    check "$tool-attention-bf16" sanitize "$tool" bf16 --mask causal --head-dim 80
  done
  if [[ -x $tests/test_ops ]]; then
    check memcheck-ops compute-sanitizer --tool memcheck --error-exitcode 1 "$tests/test_ops"
  fi
fi

if ((${#table[@]} == 0)); then die "no check's name begins with: ${wanted[*]}"; fi
printf '\n'
printf '%s\n' "${table[@]}"
exit "$failed"
