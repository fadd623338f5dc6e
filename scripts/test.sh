#!/usr/bin/env bash
# Installs, builds and tests everything, and fails loudly when any step does.
#
#   scripts/test.sh           presets cuda, asan and tsan with their tests, the golden files, the fuzzers
#   scripts/test.sh --quick   preset cpu and the golden files only
#
# The preset cuda is the release build with the CUDA library for every architecture; it needs no GPU, and tests
# that do are skipped without one.
#
# FLEXCHAT_FUZZ_SECONDS: time for each fuzzer, default 20.
# The golden files are taken from ../shared/golden, beside the repository, where there are any.
set -euo pipefail

quick=0
for word in "$@"; do
  case $word in
    --quick) quick=1 ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      echo "scripts/test.sh: unknown option '$word'; allowed: --quick, --help" >&2
      exit 2
      ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
readonly fuzz_seconds=${FLEXCHAT_FUZZ_SECONDS:-20}
unset OMP_NUM_THREADS # the tests choose their thread counts themselves

export ASAN_OPTIONS=halt_on_error=1:detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# oneDNN, Arrow and libgomp are not built for ThreadSanitizer: it sees their memory traffic through the C
# library, but not the barriers that order it.
export TSAN_OPTIONS=halt_on_error=1:atexit_sleep_ms=0:second_deadlock_stack=1:ignore_noninstrumented_modules=1

# The sanitizers' shadow memory has a fixed place, which random addresses of some kernels collide with.
fixed_addresses=()
if setarch -R true 2>/dev/null; then fixed_addresses=(setarch -R); fi

# ---- steps, each with a heading and its time ------------------------------------------------------------
current=""
summary=()

elapsed() { printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); }

step() { # name, command...
  local start=$SECONDS
  current=$1
  shift
  printf '\n==== %s ====\n' "$current"
  "$@"
  summary+=("$(printf 'passed  %7s  %s' "$(elapsed $((SECONDS - start)))" "$current")")
  printf '==== %s: passed in %s ====\n' "$current" "$(elapsed $((SECONDS - start)))"
}

scratch=$(mktemp -d)
on_exit() {
  local status=$?
  rm -rf "$scratch"
  if ((status != 0)); then
    printf '\n==== scripts/test.sh: FAILED in step "%s" (exit code %d) ====\n' "$current" "$status" >&2
  fi
}
trap on_exit EXIT

build() { # preset, ninja targets...
  local preset=$1 targets=()
  shift
  if (($# > 0)); then targets=(--target "$@"); fi
  cmake --preset "$preset"
  cmake --build --preset "$preset" "${targets[@]}"
}

run_tests() { # preset, wrapper words...
  local preset=$1
  shift
  "$@" ctest --preset "$preset" -j "$(nproc)" --no-tests=error 2>&1 | tee "build/$preset/ctest.log"
}

verify_golden() {
  local files=()
  mapfile -t files < <(
    compgen -G '../shared/golden/classic_*.safetensors'
    compgen -G '../shared/golden/modern_*.safetensors'
  )
  if ((${#files[@]} == 0)); then
    echo "../shared/golden has no classic_*.safetensors or modern_*.safetensors" >&2
    return 1
  fi
  "build/$release/flexchat" verify golden "${files[@]}"
}

fuzz_one() { # target
  local target=$1 corpus="$scratch/corpus-$1" log="build/fuzz/$1.log" artifacts="build/fuzz/$1-failures/" seeds
  mkdir -p "$corpus" "$artifacts"
  for seeds in "tests/fuzz/corpus/$target" "tests/fuzz/corpus/${target%_fuzz}"; do
    if [[ -d $seeds ]]; then cp -r "$seeds/." "$corpus/"; fi
  done
  if ! "${fixed_addresses[@]}" "build/fuzz/$target" -max_total_time="$fuzz_seconds" -timeout=30 -rss_limit_mb=4096 \
    -print_final_stats=1 -artifact_prefix="$artifacts" "$corpus" >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    echo "$target failed; the input that did it is in $artifacts, the whole output in $log" >&2
    return 1
  fi
  grep -E 'number_of_executed_units|Done ' "$log" || tail -n 3 "$log"
}

# ---- the run --------------------------------------------------------------------------------------------
release=cuda
setup_words=()
if ((quick)); then
  release=cpu
  setup_words=(--build-only)
fi
step "setup" scripts/setup.sh "${setup_words[@]}"

step "$release: build" build "$release"
step "$release: tests" run_tests "$release"
if [[ -d ../shared/golden ]]; then step "$release: golden files" verify_golden; fi

if ((!quick)); then
  for preset in asan tsan; do
    step "$preset: build" build "$preset"
    step "$preset: tests" run_tests "$preset" "${fixed_addresses[@]}"
  done

  targets=()
  for source in tests/fuzz/*_fuzz.cc; do
    if [[ -f $source ]]; then targets+=("$(basename "$source" .cc)"); fi
  done
  current="fuzz"
  if ((${#targets[@]} == 0)); then
    echo "tests/fuzz has no *_fuzz.cc" >&2
    exit 1
  fi
  step "fuzz: build" build fuzz "${targets[@]}"
  for target in "${targets[@]}"; do step "fuzz: $target for $fuzz_seconds s" fuzz_one "$target"; done
fi

printf '\n==== summary: all steps passed in %s ====\n' "$(elapsed "$SECONDS")"
printf '%s\n' "${summary[@]}"
printf '\n'
sed -n '/tests passed,/,$p' "build/$release/ctest.log"
