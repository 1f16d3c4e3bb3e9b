#!/usr/bin/env bash
# One benchmark on the device machine, over the shards of the mini-track; or a mini-track run itself.
#
#   bash benchmarks/session.sh compare --recipes           # any module of benchmarks/ and its arguments
#   bash benchmarks/session.sh minitrack KEY=value ...     # minitrack/run.sh with train_gpt.py
#   bash benchmarks/session.sh sh COMMAND ...              # anything else, with the same environment
#   bash benchmarks/session.sh unpack                      # nothing but what this call carries
#   bash benchmarks/session.sh corpus NAME ...             # NAME, once the shards of the corpus are there (300 s at most)
#
# What the calls of a session carry (benchmarks/carry.sh makes it): .bench with corpus, tokenizers and mini-track; .fa4_1
# and .fa4_2, the halves of FlashAttention 4's wheels, in two calls. All of it, the shards and the compile cache are kept in
# /tmp and are there again while the machine stays warm. Before .bench has come, the shards are those of the validation
# text. What is printed is also in $OUT; so are the rows of `compare`, which go on from .rows/rows.jsonl (carried). No run
# is started that would not end within LIMIT_S (585 s: a command is killed after 600). VOCAB_SIZE picks another tokenizer.
# With MINITRACK_TURN, a mini-track run and those of `compare` are in_turn.py's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=$1 && shift
out=${OUT:-logs} vocab=${VOCAB_SIZE:-1024} id=${RUN_ID:-mini_$(date +%H%M%S)} kept=.rows/rows.jsonl
for word in "$@"; do case $word in VOCAB_SIZE=*) vocab=${word#*=} ;; RUN_ID=*) id=${word#*=} ;; esac; done
cache=${MINITRACK_CACHE:-/tmp/minitrack} wheels=$cache/fa4 bench=$cache/bench
if [[ $name == corpus ]]; then
  until [[ -e $cache/datasets/fineweb10B_sp1024/.complete ]]; do
    if ((SECONDS >= 300)); then echo "error: no shards of .bench after 300 s; did its 'unpack' end well?" >&2 && exit 1; fi
    sleep 1
  done
  name=$1 && shift
fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
mkdir -p "$cache" "$out"

# What this call carries, unpacked; a second process waits until the first one is done.
exec 9> "$cache/lock" && flock 9
for half in .fa4_1 .fa4_2; do if [[ -d $half ]]; then mkdir -p "$cache/wheels" && cp -r "$half"/. "$cache/wheels/"; fi; done
if compgen -G "$cache/wheels/*.half.ab" > /dev/null && [[ ! -d $wheels ]]; then
  large=$(ls "$cache"/wheels/*.half.aa) && large=${large%.half.aa}
  cat "$large".half.aa "$large".half.ab > "$large"
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$wheels" "$cache"/wheels/*.whl
fi
if [[ -d $wheels ]]; then export PYTHONPATH=$wheels:$wheels/nvidia_cutlass_dsl/dsl_packages; fi
if [[ -d .bench && ! -d $bench ]]; then cp -r .bench "$bench"; fi # the next call takes .bench away, also from who still reads it
exec 9>&-

exec 9> "$cache/lock_$vocab" && flock 9  # shards of several tokenizers may be built side by side
if [[ -d $bench ]]; then
  export MINITRACK_CACHE=$cache
  if [[ ! -e $cache/datasets/fineweb10B_sp$vocab/.complete ]]; then
    : > "$cache/nothing.py"  # run.sh builds the shards before it runs a script
    bash "$bench/minitrack/run.sh" "$cache/nothing.py" VOCAB_SIZE="$vocab"
  fi
  mkdir -p "$cache/datasets" && ln -sfn "fineweb10B_sp$vocab" "$cache/datasets/minitrack_sp$vocab" # no FineWeb, says `records check`
  export TOKENIZER_PATH=$cache/tokenizers/fineweb_${vocab}_bpe.model DATA_PATH=$cache/datasets/minitrack_sp$vocab
else
  export MINITRACK_CACHE=$cache/validation
  export TOKENIZER_PATH=$cache/wheels/fineweb_1024_bpe.model DATA_PATH=$MINITRACK_CACHE/datasets/fineweb10B_sp1024
  for split in val train; do
    if [[ ! -e $DATA_PATH/.$split ]]; then
      python3 "$cache/wheels/build_shards.py" "$cache/wheels/val.jsonl.xz" "$TOKENIZER_PATH" "$DATA_PATH" $split
      touch "$DATA_PATH/.$split"
    fi
  done
fi
exec 9>&-

case $name in
  unpack) exit ;;
  sh) exec "$@" ;;
  minitrack)
    if [[ ${MINITRACK_TURN:-} ]]; then script=benchmarks/in_turn.py; else script=train_gpt.py; fi
    RUN_ID=$id bash "$bench/minitrack/run.sh" "$script" "$@" 2>&1 | tee "$out/minitrack.txt"
    cp "$MINITRACK_CACHE/runs/$id/logs/$id"*.{txt,jsonl} "$out/" && exit ;; # EVAL_ONLY and EXPORT_ONLY add a word
  compare)
    if [[ -e $kept ]]; then cp "$kept" "$out/rows.jsonl"; fi
    set -- --out "$out/rows.jsonl" --limit-s $((${LIMIT_S:-585} - SECONDS)) "$@" ;;
  step_time) set -- --limit-s $((${LIMIT_S:-585} - SECONDS)) "$@" ;;
esac
python3 -m "benchmarks.$name" "$@" 2>&1 | tee "$out/$name.txt"
