#!/usr/bin/env bash
# Installs what flexchat needs to build, test and run. The only installer; safe to run again: it installs what
# is missing and nothing else. Debian 12 or newer, Ubuntu 24.04 or newer; as root, or as a user with sudo.
#
#   scripts/setup.sh                everything
#   scripts/setup.sh --build-only   without the packages that only scripts/test.sh needs
#
# Distribution packages come from apt. Arrow C++ (for .parquet files) is in neither distribution: its headers
# and libraries are taken out of the pyarrow wheel, which goes into .deps/python inside the repository. No
# Python code of it is ever run.
set -euo pipefail

readonly PYARROW_VERSION=26.0.1

# package | when (build, test) | why
readonly PACKAGES="
g++                | build | compiles everything
cmake              | build | describes the build
ninja-build        | build | runs the build
pkg-config         | build | finds Highway and PCRE2
libdnnl-dev        | build | oneDNN: matrix products on the CPU
libhwy-dev         | build | Highway: SIMD for element-wise kernels and reductions
libpcre2-dev       | build | PCRE2: splits text into pieces for the tokenizer
nlohmann-json3-dev | build | JSON: configurations, run records, checkpoints' metadata
libcli11-dev       | build | CLI11: splits the command line into options
libfmt-dev         | build | fmt: text formatting
libgtest-dev       | build | GoogleTest: the test programs are part of the build
libbenchmark-dev   | build | Google Benchmark: the microbenchmarks are part of the build
git                | build | run records name the commit
ca-certificates    | build | secure download of the Arrow libraries
python3            | build | runs pip
python3-pip        | build | downloads the pyarrow wheel, which holds the Arrow C++ libraries
clang              | test  | builds the fuzzers
libclang-rt-dev    | test  | libFuzzer and clang's sanitizers
libomp-dev         | test  | OpenMP for clang
"

build_only=0
for word in "$@"; do
  case $word in
    --build-only) build_only=1 ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      echo "scripts/setup.sh: unknown option '$word'; allowed: --build-only, --help" >&2
      exit 2
      ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

die() {
  echo "scripts/setup.sh: $*" >&2
  exit 1
}

for tool in apt-get dpkg-query; do
  command -v "$tool" >/dev/null || die "this system has no $tool; needed: Debian 12 or newer, or Ubuntu 24.04 or newer"
done

# ---- distribution packages ------------------------------------------------------------------------------
is_installed() { [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

missing=()
printf '%-19s %-10s %s\n' package state why
while IFS='|' read -r package when why; do
  read -r package <<<"$package"
  read -r when <<<"$when"
  read -r why <<<"$why"
  if [[ -z $package ]]; then continue; fi
  state=present
  if ! is_installed "$package"; then
    if [[ $when == test ]] && ((build_only)); then
      state=skipped
    else
      state=missing
      missing+=("$package")
    fi
  fi
  printf '%-19s %-10s %s\n' "$package" "$state" "$why"
done <<<"$PACKAGES"

apt_get() {
  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      die "installing packages (${missing[*]}) needs root: run this as root, or install sudo"
    as_root=(sudo)
  fi
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -qq \
    -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
}

if ((${#missing[@]} > 0)); then
  echo "installing with apt: ${missing[*]}"
  apt_get update || echo "scripts/setup.sh: apt-get update reported errors; going on with what it got" >&2
  apt_get install --no-install-recommends "${missing[@]}" ||
    die "apt-get could not install: ${missing[*]} (on Ubuntu the component 'universe' must be enabled)"
  for package in "${missing[@]}"; do
    is_installed "$package" || die "apt-get reported success, but $package is not installed"
  done
fi

# ---- Arrow C++ ------------------------------------------------------------------------------------------
readonly deps=.deps/python

arrow_complete() {  # $1: the folder
  [[ -d $1/pyarrow-$PYARROW_VERSION.dist-info && -f $1/pyarrow/include/arrow/api.h &&
    -f $1/pyarrow/include/parquet/arrow/reader.h ]] &&
    compgen -G "$1/pyarrow/libarrow.so.*" >/dev/null && compgen -G "$1/pyarrow/libparquet.so.*" >/dev/null
}

# The distribution's interpreter: the wheel exists for its version, which some other python3 may not promise.
python=/usr/bin/python3
if arrow_complete "$deps"; then
  printf '%-19s %-10s %s\n' "pyarrow $PYARROW_VERSION" present "Arrow C++: reads .parquet files ($deps)"
else
  printf '%-19s %-10s %s\n' "pyarrow $PYARROW_VERSION" missing "Arrow C++: reads .parquet files ($deps)"
  echo "installing with pip into $deps: pyarrow==$PYARROW_VERSION"
  fresh=.deps/python.new-$$
  trap 'rm -rf "$fresh"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-input --no-deps --no-compile \
    --only-binary :all: --target "$fresh" "pyarrow==$PYARROW_VERSION" ||
    die "pip could not download pyarrow $PYARROW_VERSION (is PyPI reachable from here?)"
  arrow_complete "$fresh" || die "the pyarrow $PYARROW_VERSION wheel lacks the Arrow C++ headers or libraries"
  rm -rf "$deps"
  mv "$fresh" "$deps"
fi

echo "setup: everything is in place"
