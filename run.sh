#!/usr/bin/env bash
# Direct Advantage Policy Optimization from one command: problems and base model, then per iteration A.1 sample,
# A.2 label steps, A.3 critic, B.1 advantages and B.2 actor, and an evaluation on the same test problems.
#
#   bash run.sh                                                      # embedded problems and model, minutes on a CPU
#   TASK=code RUN=runs/code bash run.sh                              # the same, writing small Python functions
#   RUN=runs/gsm8k BASE=path/or/hub-id TRAIN=gsm8k:train.jsonl TEST=gsm8k:test.jsonl SAMPLE= LABEL= CRITIC= ACTOR= \
#     LENGTH= PROBLEMS=0 bash run.sh                                 # your model and data, with the paper's settings
#
# An empty variable leaves the paper's defaults; below is what a model of 0.5M parameters needs instead of them.
# Started again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

RUN=${RUN-runs/demo}          # folder of the run
ITERATIONS=${ITERATIONS-2}    # the embedded problems last for 2 (code: 4); for more: PREPARE="--train_size 5000"
SEED=${SEED-0}
# New training problems an iteration; 0: all of them, each time. Programs take longer to grade than answers.
if [ "${TASK-}" = code ]; then PROBLEMS=${PROBLEMS-500}; else PROBLEMS=${PROBLEMS-1000}; fi
LENGTH=${LENGTH-"--max_new 64"}
SAMPLE=${SAMPLE-"--n1 8 --n 4 --batch 512"}
LABEL=${LABEL-"--m 4 --batch 512"}
CRITIC=${CRITIC-"--lr 1e-3 --passes 8 --batch 128"}
ACTOR=${ACTOR-"--kappa 4 --kept_steps --beta 0.1 --lr 1e-4 --passes 4 --batch 256"}
EVALUATE=${EVALUATE-"--samples 8 --batch 512"}

python prepare.py --out "$RUN" --seed "$SEED" ${TASK:+--task "$TASK"} ${TRAIN:+--train "$TRAIN"} ${TEST:+--test "$TEST"} \
  ${BASE:+--no_make_base} ${PREPARE-}
actor=${BASE:-$RUN/base}
critic=${CRITIC_MODEL:-$actor}
python evaluate.py --actor "$actor" --problems "$RUN/test.jsonl" --out "$RUN/iter0/eval.jsonl" $LENGTH $EVALUATE
for i in $(seq "$ITERATIONS"); do
  it=$RUN/iter$i
  python sample.py --actor "$actor" --problems "$RUN/train.jsonl" --out "$it/samples.jsonl" --seed "$SEED$i" \
    --first $(((i - 1) * PROBLEMS)) --limit "$PROBLEMS" $LENGTH $SAMPLE
  python label_steps.py --actor "$actor" --problems "$RUN/train.jsonl" --samples "$it/samples.jsonl" \
    --out "$it/trees.jsonl" --seed "$SEED$i" $LENGTH $LABEL
  python train_critic.py --trees "$it/trees.jsonl" --critic_model "$critic" --out "$it/critic" --seed "$SEED" $CRITIC
  python train_actor.py --actor "$actor" --trees "$it/trees.jsonl" --critic "$it/critic" --out "$it/actor" \
    --seed "$SEED" $ACTOR
  actor=$it/actor critic=$it/critic
  python evaluate.py --actor "$actor" --problems "$RUN/test.jsonl" --out "$it/eval.jsonl" \
    --against "$RUN/iter0/eval.jsonl" $LENGTH $EVALUATE
done
python evaluate.py --report "$RUN"
