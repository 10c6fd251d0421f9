#!/usr/bin/env bash
# Megatron's own pretrain_gpt.py with MuonClip, on a small model and its mock data.
#
#   git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM && pip install kimi-stack
#   MEGATRON=Megatron-LM examples/megatron/run_pretrain_gpt.sh
#
# GPUS is the number of processes; further arguments go to pretrain_gpt.py, e.g. --tensor-model-parallel-size 2
# --use-distributed-optimizer. Any script and flags of yours work the same way: only --use-muonclip is ours.
set -euo pipefail
: "${MEGATRON:?set MEGATRON to a checkout of Megatron-LM}"
[[ -f $MEGATRON/pretrain_gpt.py ]] || { echo "MEGATRON=$MEGATRON has no pretrain_gpt.py" >&2; exit 2; }

export CUDA_DEVICE_MAX_CONNECTIONS=1
cd "$MEGATRON"
exec torchrun --nproc-per-node "${GPUS:-1}" pretrain_gpt.py \
  --use-muonclip --muonclip-tau 100 \
  --num-layers 12 --hidden-size 768 --num-attention-heads 12 --group-query-attention --num-query-groups 4 \
  --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope \
  --untie-embeddings-and-output-weights \
  --seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 4 --global-batch-size 32 --train-iters 200 \
  --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 20 --clip-grad 1.0 --bf16 \
  --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion \
  --mock-data --tokenizer-type NullTokenizer --vocab-size 32767 --split 100,0,0 \
  --eval-iters 0 --eval-interval 1000 --log-interval 10 "$@"
