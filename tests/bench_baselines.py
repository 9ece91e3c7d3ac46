"""Baselines at the tokens of a finished run, by hand: python tests/bench_baselines.py runs/demo

Same base model, same training problems, same test problems: online GRPO (16 responses a prompt, no KL, one update a
batch), rejection-sampling SFT on the run's own samples, and outcome-level advantages on them (train_actor.py
--advantage outcome). Prints greedy and T=1 accuracy of each. GRPO uses as many sampled tokens as the run's iterations
did; the two others see iteration 1's samples only, which cost nothing further.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import grade_all
from model import LM, Prefixes, Tree, draw_key, pack_trees, sample, step_logprobs
from prepare import fine_tune, read_jsonl


def accuracy(lm, problems, k=8):
    """(greedy, temperature 1) shares of right responses."""
    lm.model.eval()
    prefixes = Prefixes(lm, [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in problems])
    shares = []
    for temperature, n in ((0.0, 1), (1.0, k)):
        rows = [
            (j, 0, draw_key("bench", p["id"], i), 60)
            for j, p in enumerate(problems)
            for i in range(n)
        ]
        texts = [lm.text(ids) for ids in sample(lm, prefixes, rows, temperature, 512)]
        verdicts = grade_all([problems[j] for j, *_ in rows], texts)
        shares.append(sum(v == "right" for v, _ in verdicts) / len(rows))
    return shares


def grpo(lm, problems, tokens, group=16, prompts=8, lr=3e-4):
    """Policy gradient on group-normalised rewards until `tokens` have been sampled."""
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    used = step = 0
    while used < tokens:
        chunk = [problems[(step * prompts + i) % len(problems)] for i in range(prompts)]
        lm.model.eval()
        prefixes = Prefixes(lm, [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in chunk])
        rows = [
            (j, 0, draw_key("grpo", step, j, i), 60) for j in range(prompts) for i in range(group)
        ]
        drawn = sample(lm, prefixes, rows, 1.0, 512)
        used += sum(map(len, drawn))
        verdicts = grade_all([chunk[j] for j, *_ in rows], [lm.text(ids) for ids in drawn])
        reward = torch.tensor([float(v == "right") for v, _ in verdicts]).view(prompts, group)
        adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        trees = [
            Tree(
                [lm.prompt_ids(p["prompt"]), *drawn[j * group : (j + 1) * group]],
                [-1] + [0] * group,
                [False] + [True] * group,
            )
            for j, p in enumerate(chunk)
        ]
        lm.model.train()
        for pack in pack_trees(trees, 8192):
            weight = torch.stack([adv[t, v - 1] for t, v in pack.owner])
            (-(weight * step_logprobs(lm, pack)).sum() / sum(map(len, drawn))).backward()
        torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
    return used


def sampled_tokens(run):
    """Tokens that the run's iterations drew: samples, and completions by the stage's own count."""
    total = 0
    for folder in run.glob("iter*"):
        if (folder / "samples.jsonl").exists():
            samples = read_jsonl(folder / "samples.jsonl")
            total += sum(len(r["ids"]) for x in samples for r in x["responses"])
            total += sum(x["tokens"] for x in read_jsonl(folder / "trees.jsonl"))
    return total


def main(run):
    base, problems = str(run / "base"), read_jsonl(run / "test.jsonl")
    samples = run / "iter1" / "samples.jsonl"
    budget = sampled_tokens(run)
    print(f"base                 greedy %.3f  T=1 %.3f" % tuple(accuracy(LM(base), problems)))
    actors = sorted(run.glob("iter*/actor"))
    for actor in actors:
        print(
            f"DAPO {actor.parent.name}           greedy %.3f  T=1 %.3f"
            % tuple(accuracy(LM(str(actor)), problems))
        )
    lm = LM(base, train=True)
    train = read_jsonl(run / "train.jsonl")
    used = grpo(lm, train, budget)
    print(f"GRPO, {used} tokens  greedy %.3f  T=1 %.3f" % tuple(accuracy(lm, problems)), flush=True)
    lm = LM(base, train=True)
    trees = [
        Tree([x["prompt_ids"], r["ids"]], [-1, 0], [True, True])
        for x in read_jsonl(samples)
        for r in x["responses"]
        if r["reward"]
    ]
    fine_tune(lm, trees, run / "rft.work", 3e-4, 32, 2, 0, 0.0)
    print("rejection sampling   greedy %.3f  T=1 %.3f" % tuple(accuracy(lm, problems)), flush=True)
    flags = "--advantage outcome --beta 1 --lr 1e-4 --passes 4 --batch 256".split()
    subprocess.run(
        [sys.executable, "train_actor.py", "--actor", base, "--trees", str(samples)]
        + ["--out", str(run / "outcome" / "actor"), *flags],
        check=True,
    )
    lm = LM(str(run / "outcome" / "actor"))
    print("outcome advantages   greedy %.3f  T=1 %.3f" % tuple(accuracy(lm, problems)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
