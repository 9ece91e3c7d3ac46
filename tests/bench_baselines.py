"""Baselines at the tokens of a finished run, by hand: python tests/bench_baselines.py runs/demo

Same base model, same training problems, same test problems: online GRPO (16 responses a prompt, no KL, one update a
batch), rejection-sampling SFT on the run's own samples, and outcome-level advantages on them (train_actor.py
--advantage outcome). Prints greedy and T=1 accuracy of each. GRPO uses as many sampled tokens as the run's iterations
did; the two others see iteration 1's samples only, which cost nothing further.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import LM, Tree, pack_trees, step_logprobs
from prepare import fine_tune, read_jsonl
from reward import grade_ids
from sample import draw, draw_key


def accuracy(lm, problems, k=8):
    """(greedy, temperature 1) shares of right responses."""
    prompts = [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in problems]
    shares = []
    for temperature, n in ((0.0, 1), (1.0, k)):
        rows = [
            (j, 0, draw_key("bench", p["id"], i), 60)
            for j, p in enumerate(problems)
            for i in range(n)
        ]
        drawn = draw(lm, prompts, rows, temperature, 512)
        graded = grade_ids(lm, [problems[j] for j, *_ in rows], drawn, unsafe=False)
        shares.append(sum(g["correct"] for g in graded) / len(rows))
    return shares


def grpo(lm, problems, tokens, group=16, prompts=8, lr=3e-4, max_new=60, seed=None):
    """Policy gradient on group-normalised rewards until `tokens` have been sampled.

    Yields the tokens sampled and trained on so far after each step, for a curve. seed: of the draws.
    """
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    used = trained = step = 0
    while used < tokens:
        chunk = [problems[(step * prompts + i) % len(problems)] for i in range(prompts)]
        trees = [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in chunk]
        rows = [
            (j, 0, draw_key("grpo", step, j, i, *([] if seed is None else [seed])), max_new)
            for j in range(prompts)
            for i in range(group)
        ]
        drawn = draw(lm, trees, rows, 1.0, 512)
        used += sum(map(len, drawn))
        graded = grade_ids(lm, [chunk[j] for j, *_ in rows], drawn, unsafe=False)
        reward = torch.tensor([float(g["correct"]) for g in graded]).view(prompts, group)
        adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        trees = [
            Tree(
                [lm.prompt_ids(p["prompt"]), *drawn[j * group : (j + 1) * group]],
                [-1] + [0] * group,
                [False] + [True] * group,
            )
            for j, p in enumerate(chunk)
        ]
        for pack in pack_trees(trees, 8192):
            weight = torch.stack([adv[t, v - 1] for t, v in pack.owner])
            (-(weight * step_logprobs(lm, pack)).sum() / sum(map(len, drawn))).backward()
            trained += len(pack.ids)
        torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        yield used, trained


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
    samples, train = run / "iter1" / "samples.jsonl", read_jsonl(run / "train.jsonl")

    def show(name, lm):
        print(
            f"{name:<32} greedy {{:.3f}}  T=1 {{:.3f}}".format(*accuracy(lm, problems)), flush=True
        )

    show("base", LM(base))
    for actor in sorted(run.glob("iter*/actor")):
        show(f"DAPO {actor.parent.name}", LM(str(actor)))
    lm = LM(base, train=True)
    for used, _ in grpo(lm, train, sampled_tokens(run)):
        pass
    show(f"GRPO, {used} tokens", lm)
    lm = LM(base, train=True)
    shutil.rmtree(run / "rft.work", ignore_errors=True)
    right = [
        Tree([x["prompt_ids"], r["ids"]], [-1, 0], [True, True])
        for x in read_jsonl(samples)
        for r in x["responses"]
        if r["reward"]
    ]
    fine_tune(lm, right, run / "rft.work", 3e-4, 32, 2, 0, 0.0)
    show("rejection-sampling SFT", lm)
    flags = "--advantage outcome --beta 0.05 --lr 1e-4 --passes 4 --batch 256".split()  # noqa: SIM905
    paths = ["--actor", base, "--trees", samples, "--out", run / "outcome" / "actor"]
    subprocess.run([sys.executable, ROOT / "train_actor.py", *paths, *flags], check=True)
    show("outcome advantages", LM(str(run / "outcome" / "actor")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
