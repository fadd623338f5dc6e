#!/usr/bin/env bash
# From a bare machine to a trained GPT: installs, builds, gathers text found on this machine, trains a
# tokenizer and a small model on it, and generates from the model. A few minutes of training on two cores.
# Everything it makes is under runs/: text and tokenizer in runs/demo, the model in runs/train/demo.
#
#   scripts/demo.sh
#
# DEMO_ITERATIONS: training steps, default 220.
set -euo pipefail

readonly DEMO_ITERATIONS=${DEMO_ITERATIONS:-220}
readonly DEMO_DEPTH=4 DEMO_SEQUENCE_LEN=256 DEMO_VOCAB_SIZE=4096
readonly PLACE_BYTES=6000000     # at most this much from each place, so that no kind of text drowns the others
readonly SMALLEST_TEXT=2000000   # bytes: less is not worth training on
readonly PLACES=(/usr/share/doc /usr/share/common-licenses /usr/share/man /usr/share/perl /usr/share/perl5
  /usr/lib/python3 /usr/lib/python3.* /usr/share/cmake-* /usr/include)

for word in "$@"; do
  case $word in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      echo "scripts/demo.sh: unknown option '$word'; allowed: --help" >&2
      exit 2
      ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

heading() { printf '\n==== %s ====\n' "$*"; }

# "hash  path" of each text file below $1. Files may vanish or be unreadable: those are passed over.
hash_text_files() {
  find "$1" -type f -size +0 -size -1000k ! -name '*.gz' -print0 2>/dev/null |
    { xargs -0 -r grep -IlZ . 2>/dev/null || true; } | { xargs -0 -r md5sum 2>/dev/null || true; }
  find "$1" -type f -size -300k -name '*.gz' ! -name '*.tar.gz' ! -name '*.pdf.gz' ! -name '*.ps.gz' -print0 2>/dev/null |
    { xargs -0 -r md5sum 2>/dev/null || true; }
}

# Writes runs/demo/data/shard_NNN.txt, with a line <|endoftext|> after each file.
gather_text() {
  local list=$1 place path
  for place in "${PLACES[@]}"; do
    if [[ ! -d $place || -L $place ]]; then continue; fi
    # Sorted by hash: equal files are neighbours, and a cut at the limit takes files from everywhere.
    # md5sum puts a backslash in front of a line whose name has special characters: passed over.
    hash_text_files "$place" | LC_ALL=C sort |
      awk '/^[^\\]/ && $1 != last { last = $1; print substr($0, 35) }' |
      { xargs -r -d '\n' stat -c '%s %n' -- 2>/dev/null || true; } |
      awk -v limit="$PLACE_BYTES" -v place="$place" '
        bytes + $1 <= limit { bytes += $1; ++files; print substr($0, index($0, " ") + 1) }
        END { printf "%-28s %6d files %6.1f MB\n", place, files, bytes / 1e6 >"/dev/stderr" }' >>"$list"
  done
  rm -rf runs/demo/data
  mkdir -p runs/demo/data
  # Mixed, the same way each time, so that training meets all kinds of text from the start.
  awk 'BEGIN { srand(1) } { printf "%.6f %s\n", rand(), $0 }' "$list" | LC_ALL=C sort | cut -d ' ' -f 2- |
    while IFS= read -r path; do
      if [[ $path == *.gz ]]; then gzip -dc -- "$path" 2>/dev/null || true; else cat -- "$path" || true; fi
      printf '\n<|endoftext|>\n'
    done | split -C 4000000 -d -a 3 --additional-suffix=.txt - runs/demo/data/shard_
}

heading "install"
scripts/setup.sh --build-only

heading "build"
cmake --preset cpu
cmake --build --preset cpu --target flexchat

heading "text found on this machine"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
gather_text "$scratch/list"
bytes=$(cat runs/demo/data/shard_*.txt | wc -c)
printf '%d shards, %d bytes in runs/demo/data\n' "$(find runs/demo/data -name 'shard_*.txt' | wc -l)" "$bytes"
if ((bytes < SMALLEST_TEXT)); then
  echo "scripts/demo.sh: this machine has only $bytes bytes of text in ${PLACES[*]}; needed: $SMALLEST_TEXT" >&2
  exit 1
fi

heading "tokenizer"
rm -rf runs/demo/tokenizer
build/cpu/flexchat tokenizer train --data runs/demo/data --vocab-size "$DEMO_VOCAB_SIZE" --out runs/demo/tokenizer

heading "training"
rm -rf runs/train/demo
build/cpu/flexchat train base --data runs/demo/data --tokenizer runs/demo/tokenizer --run-id demo \
  --depth "$DEMO_DEPTH" --sequence-len "$DEMO_SEQUENCE_LEN" --num-iterations "$DEMO_ITERATIONS" \
  --device-batch-size 8 --total-batch-size 8192 --eval-every 55 --eval-tokens 65536 --save-every 55 --sample-every 110

heading "sample"
build/cpu/flexchat generate --model runs/train/demo --prompt "The " --max-tokens 64 --temperature 0.8 --top-k 50 --seed 1

if [[ ! -s runs/train/demo/report.html ]]; then
  echo "scripts/demo.sh: the run left no report.html" >&2
  exit 1
fi
printf '\nreport: %s\n' "$PWD/runs/train/demo/report.html"
