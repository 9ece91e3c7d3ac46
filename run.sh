#!/usr/bin/env bash
# Direct Advantage Policy Optimization from one command: problems and base model, then per iteration A.1 sample,
# A.2 label steps, A.3 critic, B.1 advantages and B.2 actor, and an evaluation on the same test problems.
#
#   bash run.sh                                       # embedded problems and model, minutes on a CPU
#   TASK=code RUN=runs/code bash run.sh               # the same, writing small Python functions
#   RECIPE=paper RUN=runs/paper bash run.sh           # the paper's algorithm, in two large iterations
#   RUN=runs/gsm8k BASE=path/or/hub-id TRAIN=gsm8k:train.jsonl TEST=gsm8k:test.jsonl bash run.sh
#                                                     # your model and data, with the paper's settings
#
# Each stage has a variable for its flags (PREPARE, SAMPLE, LABEL, CRITIC, ACTOR, EVALUATE, and LENGTH for all that draw);
# a stage without one keeps its own defaults, the paper's. ITERATIONS: how many; PROBLEMS: new ones in each; REPLAY: the
# critic goes on learning on the trees of so many iterations; SEED: of all of it. Started again, the run goes on where it
# stopped.
# A GPU box:  LAUNCH="torchrun --nproc-per-node 8" trains on eight cards; ENGINE="vllm serve" starts a server with each
# actor for sampling, labelling and evaluation, and ends it before training; SERVER=http://... uses one that is there (each
# iteration's actor must be served there in turn: run.sh stops where another is, and goes on). CRITIC_MODEL: the first critic's start.
set -euo pipefail
cd "$(dirname "$0")"

SEED=${SEED-0}
if [ -n "${RECIPE-}" ] && { [ "$RECIPE" != paper ] || [ -n "${BASE-}${TRAIN-}" ]; }; then
  echo "error: run.sh: RECIPE=$RECIPE; wanted paper or none, and none with BASE or TRAIN, where every default is the paper's" >&2
  exit 2
fi
if [ -z "${BASE-}${TRAIN-}" ]; then # what the embedded model of 0.5M parameters needs instead of the paper's settings
  RUN=${RUN-runs/demo}
  LENGTH=${LENGTH-"--max_new 64"}
  EVALUATE=${EVALUATE-"--samples 8 --batch 512"}
  if [ "${RECIPE-}" = paper ]; then # completions from every state, Q = V, first steps alone; rates of a small model
    ITERATIONS=${ITERATIONS-2} # the embedded problems last for 2; for more: PREPARE="--train_size 5000"
    PROBLEMS=${PROBLEMS-1000} # new training problems an iteration
    SAMPLE=${SAMPLE-"--n1 8 --n 4 --batch 512"}
    LABEL=${LABEL-"--m 4 --batch 512"}
    CRITIC=${CRITIC-"--lr 1e-3 --passes 8 --batch 128"}
    ACTOR=${ACTOR-"--beta 0.05 --lr 1e-4 --passes 4 --batch 256"}
  else # small and often, and no draw wasted: the samples themselves are the trees (README.md, "Where this differs")
    ITERATIONS=${ITERATIONS-4}
    PROBLEMS=${PROBLEMS-25}
    REPLAY=${REPLAY-4}
    SAMPLE=${SAMPLE-"--n1 4 --n 4 --batch 512"}
    LABEL=${LABEL-"--whole_draws --m 0"}
    CRITIC=${CRITIC-"--states all --token_share 0.5 --lr 1e-3 --passes 2 --batch 128"}
    ACTOR=${ACTOR-"--kappa 4 --value_draws 1 --by_draws --likelihood 4 --gap 0.05 --may_stay --beta 0.05 --lr 2e-4 --passes 4 --batch 64"}
  fi
fi
RUN=${RUN-runs/own}
ITERATIONS=${ITERATIONS-1}
PROBLEMS=${PROBLEMS-0} # 0: all of them in each iteration
REPLAY=${REPLAY-1}
LENGTH=${LENGTH-}
LAUNCH=${LAUNCH-stage} # what starts the training stages
PORT=${PORT-8000} # of the server that ENGINE starts

# Python needs 6 seconds to import torch and transformers, and many a stage of the embedded model works for one or two.
# So one process imports them and forks for every stage. (With a GPU or on a Mac, which do not bear a fork, a stage is a
# process of its own, as with LAUNCH.) It reads commands, a line with the number of their words and then a line a word,
# and answers each with its exit code. Ctrl-C, to which bash makes a process behind it deaf, ends it after the stage.
serve_stages='
import os, runpy, signal, subprocess, sys

stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
try:
    import matplotlib.figure, torch
    from transformers import AutoTokenizer, LlamaForCausalLM
except ImportError as e:
    sys.exit(f"error: run.sh: {e}; pip install -r requirements.txt")

codes = os.fdopen(3, "w")
forks = sys.platform == "linux" and not torch.cuda.is_available()
while not stopped and (words := sys.stdin.readline()):
    command = [sys.stdin.readline().rstrip("\n").replace("\x1f", "\n") for _ in range(int(words))]
    if not forks:
        code = subprocess.run([sys.executable, *command], stdin=subprocess.DEVNULL).returncode
    elif child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    else:
        codes.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if stopped:
            raise KeyboardInterrupt
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        sys.exit()
    print(code if code >= 0 else 128 - code, file=codes, flush=True)  # as a shell counts signals
'
pipes=$(mktemp -d)
mkfifo "$pipes/commands" "$pipes/codes"
python -c "$serve_stages" < "$pipes/commands" 3> "$pipes/codes" &
exec 4> "$pipes/commands" 5< "$pipes/codes"
rm -r "$pipes"

# Run a stage: `stage sample.py FLAGS` does what `python sample.py FLAGS` does.
stage() {
  local code break=$'\n' mark=$'\037' # a word with a line break travels on one line
  (trap '' PIPE && printf '%s\n' $# "${@//$break/$mark}" >&4 2> /dev/null) || true # it may have ended already
  read -r code <&5 || code=1
  if [ "$code" -gt 128 ] && [ "$code" != 130 ]; then
    echo "error: run.sh: signal $((code - 128)) ended $1 (9: perhaps for want of memory); the same command goes on" >&2
  fi
  return "$code"
}
# On Ctrl-C, which the stage gets too, wait for what it says last.
trap 'exec 4>&-; read -r <&5 || true; exit 130' INT

# Start a server of model $1 and wait until it answers, if ENGINE is set.
start_engine() {
  if [ -z "${ENGINE-}" ]; then return; fi
  SERVER=http://127.0.0.1:$PORT
  mkdir -p "$RUN"
  $ENGINE "$1" --port "$PORT" > "$RUN/engine.log" 2>&1 4>&- 5<&- &
  engine=$!
  trap 'kill $engine 2> /dev/null || true' EXIT
  until python -c "import urllib.request as r; r.urlopen('$SERVER/v1/models')" 2> /dev/null; do
    if ! kill -0 $engine 2> /dev/null; then
      echo "error: run.sh: the engine ended, see $RUN/engine.log" >&2
      exit 1
    fi
    sleep 2
  done
}

# End it, so that training has the memory: only a process that has ended frees all of it.
end_engine() {
  if [ -z "${ENGINE-}" ]; then return; fi
  kill $engine 2> /dev/null || true
  wait $engine || true
  trap - EXIT
}

# Evaluate an actor: by the server, or here, on all cards.
evaluate() {
  if [ -n "${SERVER-}" ]; then
    stage evaluate.py --server "$SERVER" "$@"
  else
    $LAUNCH evaluate.py "$@"
  fi
}

headline() { printf '\n== %s\n' "$*"; }

headline "Problems and base model"
eval "prepare=(${PREPARE-})" # which may hold words in quotes, as of --instruction
case "${PREPARE-}" in
  *--demos*) fine_tune=$LAUNCH ;;
  *) fine_tune=stage ;;
esac
$fine_tune prepare.py --out "$RUN" --seed "$SEED" ${TASK:+--task "$TASK"} ${TRAIN:+--train "$TRAIN"} ${TEST:+--test "$TEST"} \
  ${BASE:+--no_make_base} ${prepare[@]+"${prepare[@]}"}
actor=${BASE:-$RUN/base}
if [ -z "${BASE-}" ] && [ ! -d "$actor" ]; then
  echo "error: run.sh: no model for these problems; give BASE=path/or/hub-id, or PREPARE=\"--base MODEL --demos NAME:PATH\"" >&2
  exit 2
fi
critic=${CRITIC_MODEL:-$actor} trees=()
headline "Iteration 0: evaluate the base model"
start_engine "$actor"
evaluate --actor "$actor" --problems "$RUN/test.jsonl" --out "$RUN/iter0/eval.jsonl" $LENGTH ${EVALUATE-}
for i in $(seq "$ITERATIONS"); do
  it=$RUN/iter$i
  headline "Iteration $i, A.1: sample responses"
  stage sample.py --actor "$actor" --problems "$RUN/train.jsonl" --out "$it/samples.jsonl" --seed $((1000 * SEED + i)) \
    --first $(((i - 1) * PROBLEMS)) --limit "$PROBLEMS" ${SERVER:+--server "$SERVER"} $LENGTH ${SAMPLE-}
  headline "Iteration $i, A.2: label their steps"
  stage label_steps.py --actor "$actor" --problems "$RUN/train.jsonl" --samples "$it/samples.jsonl" \
    --out "$it/trees.jsonl" --seed $((1000 * SEED + i)) ${SERVER:+--server "$SERVER"} $LENGTH ${LABEL-}
  end_engine
  headline "Iteration $i, A.3: train the critic"
  trees+=("$it/trees.jsonl")
  if [ ${#trees[@]} -gt "$REPLAY" ]; then trees=("${trees[@]:1}"); fi
  $LAUNCH train_critic.py --trees "$(IFS=, && echo "${trees[*]}")" --critic_model "$critic" --out "$it/critic" --seed "$SEED" ${CRITIC-}
  headline "Iteration $i, B: advantages, train the actor"
  $LAUNCH train_actor.py --actor "$actor" --trees "$it/trees.jsonl" --critic "$it/critic" --out "$it/actor" \
    --seed "$SEED" ${ACTOR-}
  actor=$it/actor critic=$it/critic
  headline "Iteration $i: evaluate"
  start_engine "$actor"
  evaluate --actor "$actor" --problems "$RUN/test.jsonl" --out "$it/eval.jsonl" --against "$RUN/iter0/eval.jsonl" \
    $LENGTH ${EVALUATE-}
done
end_engine
headline "Report"
stage evaluate.py --report "$RUN"
headline "Next, on the same trees: no gap, so that eq. 12 takes every step (README.md has more to change)"
cat << END
python train_actor.py --actor ${BASE:-$RUN/base} --trees $RUN/iter1/trees.jsonl --critic $RUN/iter1/critic --out $RUN/all/actor \\
  --seed $SEED ${ACTOR-} --gap 0
python evaluate.py --actor $RUN/all/actor --problems $RUN/test.jsonl --out $RUN/all/eval.jsonl \\
  --against $RUN/iter1/eval.jsonl $LENGTH ${EVALUATE-}
END
