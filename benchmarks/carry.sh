#!/usr/bin/env bash
# Make here, in the checkout that the session was started in, what calls of the device machine carry (64 MiB each):
#
#   bash benchmarks/carry.sh      # .bench: corpus, tokenizers, mini-track; .fa4_1 and .fa4_2: the wheels, two halves
#
# The device machine has Python 3.12 and torch, and no network. `session.sh` unpacks what it finds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shared=${SHARED:-../shared}
exclude=$(git rev-parse --git-path info/exclude)
mkdir -p .bench .fa4_1 .fa4_2 .rows "$(dirname "$exclude")"
printf '/.bench/\n/.fa4_1/\n/.fa4_2/\n/.rows/\n' >> "$exclude"
cp -r "$shared"/{minitrack,tokenizers,corpus} .bench/
cp "$shared"/minitrack/build_shards.py "$shared"/corpus/val.jsonl.xz "$shared"/tokenizers/fineweb_1024_bpe.model .fa4_1/
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64)
python3 -m pip download -q --no-deps --pre --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  --platform any -d .fa4_1 flash-attn-4 nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-{base,core,cu13} quack-kernels \
  apache-tvm-ffi torch-c-dlpack-ext zstandard brotli pytest pluggy iniconfig pygments packaging
large=$(ls .fa4_1/nvidia_cutlass_dsl_libs_cu13*.whl)
split -n 2 "$large" "$large.half." && rm "$large"
mv .fa4_1/*.half.ab .fa4_1/{zstandard,brotli,pytest,pygments}-*.whl .fa4_2/
du -sm .bench .fa4_1 .fa4_2
