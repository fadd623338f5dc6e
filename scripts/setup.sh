#!/usr/bin/env bash
# Installs what flexchat needs to build, test and run. The only installer; safe to run again: it installs what
# is missing and nothing else. Debian 12 or newer, Ubuntu 24.04 or newer; as root, or as a user with sudo.
#
#   scripts/setup.sh                everything
#   scripts/setup.sh --build-only   what the program on the CPU needs: neither CUDA nor what only scripts/test.sh
#                                   needs
#   scripts/setup.sh --cuda         the same and the CUDA toolchain: 650 MB to download, 1.2 GB on disk
#
# Distribution packages come from apt. What neither distribution has is taken out of PyPI wheels, which go into
# .deps/python inside the repository: Arrow C++ (for .parquet files) out of pyarrow, and CUDA. No Python code of
# them is ever run. A CUDA toolkit 13 or newer in CUDAToolkit_ROOT or /usr/local/cuda takes the place of the
# wheels marked "toolkit".
set -euo pipefail

# package, or wheel==version | when (build, cuda, toolkit, test) | why; megabytes: download, on disk
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
ca-certificates    | build | secure download of the wheels
python3            | build | runs pip
python3-pip        | build | downloads the wheels
clang              | test  | builds the fuzzers
libclang-rt-dev    | test  | libFuzzer and clang's sanitizers
libomp-dev         | test  | OpenMP for clang
pyarrow==26.0.1             | build   | Arrow C++: reads .parquet files (55, 175 MB)
nvidia-cuda-nvcc==13.0.88   | toolkit | nvcc and ptxas: compile the CUDA kernels (37, 116 MB)
nvidia-nvvm==13.0.88        | toolkit | nvcc's optimizer (62, 141 MB)
nvidia-cuda-crt==13.0.88    | toolkit | nvcc's own headers (0.1, 1 MB)
nvidia-cuda-runtime==13.0.96 | toolkit | CUDA runtime, linked statically (2, 7 MB)
nvidia-cuda-cccl==13.0.85   | toolkit | C++ headers that CUDA's headers include (3, 15 MB)
nvidia-cublas==13.1.0.3     | toolkit | cuBLASLt: matrix products on the GPU (423, 597 MB)
nvidia-cuda-nvrtc==13.0.88  | toolkit | NVRTC: compiles attention masks and scores at run time (90, 228 MB)
nvidia-cuda-cupti==13.0.85  | toolkit | CUPTI: kernel times for profiles (11, 45 MB)
nvidia-nvtx==13.0.85        | toolkit | NVTX: names ranges for NVIDIA's profilers (0.1, 1 MB)
nvidia-cudnn-frontend==1.18.0    | cuda | C++ headers for cuDNN's graphs (2, 9 MB)
nvidia-cudnn-jit-cu13==9.19.0.56 | cuda | cuDNN without its convolutions: its attention is a baseline (17, 34 MB)
"

declare -A wanted=([build]=1 [cuda]=1 [toolkit]=1 [test]=1)
for word in "$@"; do
  case $word in
    --build-only) wanted[cuda]=0 wanted[toolkit]=0 wanted[test]=0 ;;
    --cuda) wanted[test]=0 cuda=1 ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      echo "scripts/setup.sh: unknown option '$word'; allowed: --build-only, --cuda, --help" >&2
      exit 2
      ;;
  esac
done
if ((${cuda:-0})); then wanted[cuda]=1 wanted[toolkit]=1; fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

die() {
  echo "scripts/setup.sh: $*" >&2
  exit 1
}

for tool in apt-get dpkg-query; do
  command -v "$tool" >/dev/null || die "this system has no $tool; needed: Debian 12 or newer, or Ubuntu 24.04 or newer"
done

# ---- what there is --------------------------------------------------------------------------------------
readonly deps=.deps/python

is_installed() { [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

dist_info() { # name==version: the folder that pip leaves for it
  local name=${1%%==*}
  echo "${name//-/_}-${1##*==}.dist-info"
}

wheel_complete() { # name==version: is every file there that the wheel put below its own folder?
  local path record
  record=$deps/$(dist_info "$1")/RECORD
  [[ -f $record ]] || return 1
  while IFS= read -r path; do
    if [[ $path != ../* && ! -e $deps/$path ]]; then return 1; fi
  done < <(sed -E 's/,[^,]*,[^,]*$//; s/^"(.*)"$/\1/' "$record")
}

# Is there a whole CUDA toolkit, 13 or newer, where cmake/cuda.cmake looks for one?
readonly toolkit=${CUDAToolkit_ROOT:-/usr/local/cuda}
has_toolkit() {
  local file version
  for file in bin/nvcc include/{cuda_runtime,cublasLt,nvrtc}.h include/nvtx3/nvToolsExt.h; do
    if [[ ! -e $toolkit/$file ]]; then return 1; fi
  done
  version=$(sed -n 's/^#define CUDA_VERSION //p' "$toolkit/include/cuda.h") && ((version >= 13000)) &&
    compgen -G "$toolkit/lib*/libcudart_static.a" >/dev/null && compgen -G "$toolkit/lib*/libcublasLt.so.*" >/dev/null
}

missing=() missing_wheels=() table_wheels=()
printf '%-33s %-8s %s\n' package state why
while IFS='|' read -r package when why; do
  read -r package <<<"$package"
  read -r when <<<"$when"
  read -r why <<<"$why"
  if [[ -z $package ]]; then continue; fi
  state=present
  if [[ $package == *==* ]]; then
    table_wheels+=("$(dist_info "$package")")
    if ! wheel_complete "$package"; then
      if ((!wanted[$when])); then
        state=skipped
      elif [[ $when == toolkit ]] && has_toolkit; then
        state=system
        why+=" (is in $toolkit)"
      else
        state=missing
        missing_wheels+=("$package")
      fi
    fi
  elif ! is_installed "$package"; then
    if ((wanted[$when])); then
      state=missing
      missing+=("$package")
    else
      state=skipped
    fi
  fi
  printf '%-33s %-8s %s\n' "$package" "$state" "$why"
done <<<"$PACKAGES"

# ---- distribution packages ------------------------------------------------------------------------------
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

# ---- wheels ---------------------------------------------------------------------------------------------
# The distribution's interpreter: the wheels exist for its version, which some other python3 may not promise.
python=/usr/bin/python3

if ((${#missing_wheels[@]} > 0)); then
  # A wheel that the table no longer has, or has in another version, would leave its files behind.
  for path in "$deps"/*.dist-info; do
    if [[ -d $path && " ${table_wheels[*]} " != *" ${path##*/} "* ]]; then
      echo "removing $deps: it has ${path##*/}, which is not in the table"
      rm -rf "$deps"
      exec scripts/setup.sh "$@"
    fi
  done
  echo "installing with pip into $deps: ${missing_wheels[*]}"
  fresh=.deps/python.new-$$
  trap 'rm -rf "$fresh"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-input --no-deps --no-compile \
    --only-binary :all: --target "$fresh" "${missing_wheels[@]}" ||
    die "pip could not download: ${missing_wheels[*]} (is PyPI reachable from here?)"
  # Wheels share folders, so that their files are merged into what is there; what says that a wheel is
  # complete comes last.
  mkdir -p "$deps" "$fresh.info"
  trap 'rm -rf "$fresh" "$fresh.info"' EXIT
  for wheel in "${missing_wheels[@]}"; do
    info=$(dist_info "$wheel")
    [[ -d $fresh/$info ]] || die "pip reported success, but the wheel $wheel has no $info"
    rm -rf "${deps:?}/$info"
    mv "$fresh/$info" "$fresh.info/"
  done
  cp -a --link --force "$fresh/." "$deps/"
  mv "$fresh.info"/* "$deps/"
  for wheel in "${missing_wheels[@]}"; do
    wheel_complete "$wheel" || die "the wheel $wheel is incomplete in $deps"
  done
fi

echo "setup: everything is in place"
