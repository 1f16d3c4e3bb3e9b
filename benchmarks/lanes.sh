#!/usr/bin/env bash
# Jobs on the device machine that run on between its calls: one after the other on each GPU, no call being their limit.
#
#   bash benchmarks/lanes.sh start PLAN      # copies the checkout to $LANES, begins, and returns at once
#   bash benchmarks/lanes.sh wait SECONDS    # at most, for all to end; prints what did; all logs to $OUT/lanes.tgz
#
# A line of PLAN is a GPU, the job's name and the words of session.sh; `both` runs alone, after every line above it:
#
#   0 steps step_time --profile LAYER_BACKEND=triton -- LAYER_BACKEND=plain
#   1 default240 corpus minitrack SEED=42
#   both scaling scaling --ranks 1 2 --windows 4096
#
# $RUN stands for the settings of a mini-track run of 240 s. A job is killed after 560 s. An idle machine goes back after
# 30 s: `wait` again at once.
set -euo pipefail
export LANES=${LANES:-/tmp/lanes}
RUN="MUON_MOMENTUM_WARMUP_STEPS=600 WARMUP_STEPS=2 GPTQ_CALIBRATION_BATCHES=32 CHECKPOINT_EVERY=0 EVAL_STRIDE=64"
begun=$(cat "$LANES/begun" 2> /dev/null || date +%s)
note() { echo "$(($(date +%s) - begun)) s: $*" >> "$LANES/log"; }

run_job() { # GPUS NAME WORDS...
  export OUT=$LANES/out/$2 && mkdir -p "$OUT" && note "begin $2"
  CUDA_VISIBLE_DEVICES=$1 timeout -k 5 560 bash benchmarks/session.sh "${@:3}" > "$OUT/console.txt" 2>&1 && rc=0 || rc=$?
  touch "$LANES/done/$2" && note "end $2, status $rc"
}

run_lane() { # GPU: its lines and those for both, which the first lane runs
  cd "$LANES/checkout"
  local above=()
  while read -r gpu name words; do
    if [[ -z $gpu || $gpu == \#* ]]; then continue; fi
    if [[ $gpu == both ]]; then
      for job in "${above[@]}"; do until [[ -e $LANES/done/$job ]]; do sleep 0.2; done; done
      if [[ $1 == 0 ]]; then eval "run_job 0,1 $name $words"; fi
      until [[ -e $LANES/done/$name ]]; do sleep 0.2; done
    elif [[ $gpu == "$1" ]]; then eval "run_job $1 $name $words"; fi
    above+=("$name")
  done < "$LANES/plan"
  note "lane $1 has nothing left"
}

case $1 in
  start)
    rm -rf "$LANES" && mkdir -p "$LANES"/{checkout,out,done} && date +%s > "$LANES/begun" && cp "$2" "$LANES/plan" && touch "$LANES/log"
    tar c --exclude=./.bench --exclude=./.fa4_? --exclude=./.venv --exclude=./.git . | tar x -C "$LANES/checkout"
    for gpu in 0 1; do
      setsid bash "$LANES/checkout/benchmarks/lanes.sh" lane $gpu > "$LANES/lane$gpu.txt" 2>&1 < /dev/null &
    done ;;
  lane) run_lane "$2" ;;
  wait)
    seen=$(wc -l < "$LANES/log")
    until ((SECONDS >= $2)) || (($(grep -c "has nothing left" "$LANES/log") == 2)); do sleep 0.5; done
    cat "$LANES/log"
    for name in $(tail -n +$((seen + 1)) "$LANES/log" | sed -n 's/.*: end \(.*\), status.*/\1/p'); do
      echo "=== $name" && tail -n 40 "$LANES/out/$name/console.txt" | cut -c1-330
    done
    mkdir -p "${OUT:=logs}" && tar c -C "$LANES" log out | gzip > "$OUT/lanes.tgz" ;;
esac
