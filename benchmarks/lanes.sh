#!/usr/bin/env bash
# Jobs on the device machine that run on between its calls: one after the other in each lane, no call being their limit.
#
#   bash benchmarks/lanes.sh start PLAN      # copies the checkout to $LANES, begins, and returns at once
#   bash benchmarks/lanes.sh add PLAN        # more lines; a lane that has ended begins again with those that are new to it
#   bash benchmarks/lanes.sh wait SECONDS    # at most, for all to end; prints what did, and the last line of what goes on;
#                                            # all logs to $OUT/lanes.tgz
#
# A line of PLAN is a lane, the job's name and the words of session.sh. A lane is a GPU, 0, 1, 2 ..., or a second list for it,
# 0b, 1b ...: their runs compile beside each other and train in turn (in_turn.py). `all` has all GPUs that PLAN names at
# `start`, and runs alone, after every line above it:
#
#   0 steps step_time --profile LAYER_BACKEND=triton -- LAYER_BACKEND=plain
#   1 seed_42 corpus minitrack SEED=42
#   1b seed_0 corpus minitrack SEED=0
#   all scaling scaling --ranks 1 2 --windows 4096
#
# $RUN stands for the settings of a mini-track run of 240 s, $SHORT for those of 500 steps. A job is killed after 1200 s. An
# idle machine goes back after 30 s: `wait` again at once.
set -euo pipefail
export LANES=${LANES:-/tmp/lanes} LIMIT_S=1180
RUN="MUON_MOMENTUM_WARMUP_STEPS=600 WARMUP_STEPS=2 GPTQ_CALIBRATION_BATCHES=32 CHECKPOINT_EVERY=0 EVAL_STRIDE=64"
SHORT="ITERATIONS=500 MAX_WALLCLOCK_SECONDS=0 MUON_MOMENTUM_WARMUP_STEPS=100 EMA_DECAY=0.98 WARMUP_STEPS=2 \
  GPTQ_CALIBRATION_BATCHES=16 CHECKPOINT_EVERY=0 EVAL_STRIDE=0 TRAIN_LOG_EVERY=100"
begun=$(cat "$LANES/begun" 2> /dev/null || date +%s)
note() { echo "$(($(date +%s) - begun)) s: $*" >> "$LANES/log"; }

run_job() { # GPUS NAME WORDS...
  export OUT=$LANES/out/$2 MINITRACK_TURN=$LANES/turn$1 && mkdir -p "$OUT" && note "begin $2"
  if [[ $1 == *,* ]]; then unset MINITRACK_TURN; fi
  CUDA_VISIBLE_DEVICES=$1 timeout -k 5 1200 bash benchmarks/session.sh "${@:3}" > "$OUT/console.txt" 2>&1 < /dev/null 8>&- && rc=0 || rc=$?
  touch "$LANES/done/$2" && note "end $2, status $rc"
}

lanes_of() { awk 'NF && !/^#/ && $1 != "all" { print $1 }' "$1" | sort -u; } # PLAN

start_lanes() { # reads their names; a lane's processes go through the plan one after the other
  while read -r lane; do
    setsid bash "$LANES/checkout/benchmarks/lanes.sh" lane "$lane" "$(mktemp "$LANES/running/XXXXXX")" \
      > "$LANES/lane$lane.txt" 2>&1 < /dev/null &
  done
}

run_lane() { # LANE: those of its lines and of those for all, which the first lane runs, that have not been run
  cd "$LANES/checkout"
  local gpus && gpus=$(tr -d b < "$LANES/lanes" | sort -nu | paste -sd,)
  local above=()
  while read -r lane name words; do
    if [[ -z $lane || $lane == \#* ]]; then continue; fi
    if [[ $lane == all ]]; then
      for job in "${above[@]}"; do until [[ -e $LANES/done/$job ]]; do sleep 0.2; done; done
      if [[ $1 == $(head -n 1 "$LANES/lanes") && ! -e $LANES/done/$name ]]; then eval "run_job $gpus $name $words"; fi
      until [[ -e $LANES/done/$name ]]; do sleep 0.2; done
    elif [[ $lane == "$1" && ! -e $LANES/done/$name ]]; then eval "run_job ${lane%b} $name $words"; fi
    above+=("$name")
  done < "$LANES/plan"
  note "lane $1 has nothing left"
}

case $1 in
  start)
    rm -rf "$LANES" && mkdir -p "$LANES"/{checkout,out,done,running} && date +%s > "$LANES/begun" && cp "$2" "$LANES/plan" && touch "$LANES/log"
    lanes_of "$2" > "$LANES/lanes"
    tar c --exclude=./.bench --exclude=./.fa4_? --exclude=./.venv --exclude=./.git . | tar x -C "$LANES/checkout"
    start_lanes < "$LANES/lanes" ;;
  lane) exec 8> "$LANES/lock$2" && flock 8 && run_lane "$2" && rm "$3" ;;
  add) cat "$2" >> "$LANES/plan" && lanes_of "$2" | start_lanes ;;
  wait)
    seen=$(cat "$LANES/seen" 2> /dev/null || echo 0)  # lines of the log that the call before this one showed
    until ((SECONDS >= $2)) || ! compgen -G "$LANES/running/*" > /dev/null; do sleep 0.5; done
    log=$(cat "$LANES/log")
    echo "$log" && echo "$log" | wc -l > "$LANES/seen"
    for name in $(echo "$log" | tail -n +$((seen + 1)) | sed -n 's/.*: end \(.*\), status.*/\1/p'); do
      echo "=== $name" && tail -n 40 "$LANES/out/$name/console.txt" | cut -c1-330
    done
    for out in "$LANES"/out/*; do
      if [[ ! -e $LANES/done/${out##*/} ]]; then echo "... ${out##*/}: $(tail -n 1 "$out/console.txt" | cut -c1-200)"; fi
    done
    mkdir -p "${OUT:=logs}" && tar c -C "$LANES" log out | gzip > "$OUT/lanes.tgz" ;;
esac
