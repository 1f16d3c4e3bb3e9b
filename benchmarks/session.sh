#!/usr/bin/env bash
# One benchmark on the device machine, over the shards of the mini-track.
#
#   bash benchmarks/session.sh compare --recipes        # any module of benchmarks/ and its arguments
#
# .bench (carried) holds copies of shared/minitrack, shared/corpus and shared/tokenizers. Shards and the compile cache lie
# in /tmp and are there again while the machine stays warm. What is printed is also in $OUT; so are the rows of `compare`,
# which go on from .rows/rows.jsonl (carried). No run is started that would not end within 585 s: a command is killed
# after 600. VOCAB_SIZE picks another tokenizer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=$1 && shift
out=${OUT:-logs} vocab=${VOCAB_SIZE:-1024} kept=.rows/rows.jsonl
export MINITRACK_CACHE=${MINITRACK_CACHE:-/tmp/minitrack} PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$MINITRACK_CACHE/inductor}
mkdir -p "$MINITRACK_CACHE" "$out"
: > "$MINITRACK_CACHE/nothing.py"  # run.sh builds the shards before it runs a script
bash .bench/minitrack/run.sh "$MINITRACK_CACHE/nothing.py" VOCAB_SIZE="$vocab"
export DATA_PATH=$MINITRACK_CACHE/datasets/fineweb10B_sp$vocab
export TOKENIZER_PATH=$MINITRACK_CACHE/tokenizers/fineweb_${vocab}_bpe.model
case $name in
  compare)
    if [[ -e $kept ]]; then cp "$kept" "$out/rows.jsonl"; fi
    set -- --out "$out/rows.jsonl" --limit-s $((585 - SECONDS)) "$@" ;;
  step_time) set -- --limit-s $((585 - SECONDS)) "$@" ;;
esac
python3 -m "benchmarks.$name" "$@" 2>&1 | tee "$out/$name.txt"
