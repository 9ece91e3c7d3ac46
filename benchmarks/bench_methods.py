"""README's table of results, by hand (a DAPO run of two iterations takes about four minutes of one core):

    python benchmarks/bench_methods.py --methods demo outcome rejection grpo --seeds 0 1 2 3 4
    python benchmarks/bench_methods.py --table
    python benchmarks/bench_methods.py --trials --methods outcome grpo --tasks math parity

Every row of --out is one actor: method, task, seed, iteration, sampled tokens, and what evaluate.py says of it on 500 test
problems with four responses each at temperature 1 (rights: how many of the four are right, a digit per problem, for
paired tests; reasoned: the same of parity's reasoning). A row that is there is not made again. The methods are run.py's
recipes of these names, and grpo, which is here. The base models of a task share one clean model (--clean_seed 1); the
seed fixes what they misread, the problems and all draws. --trials is how the settings were chosen: one iteration per row
of TRIALS (two of outcome advantages), on seed 10, which no table reports, and the validation problems.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import run
from model import load_lm, step_logprobs
from reward import grade_ids
from support import cli
from support.packing import Tree, pack_trees
from support.records import read_jsonl, replace
from support.report import sampled_tokens
from support.sampler import Row, Sampler, draw_key
from support.stats import paired

# Of each method five settings; the first one is what runs, run.py's recipe or GRPO's setting here.
TRIALS = {
    "demo": [
        "--beta 0.1 --lr 1.5e-4 --passes 4",
        "--beta 0.1 --lr 3e-4 --passes 4",
        "--beta 0.07 --lr 2e-4 --passes 4",
        "--beta 0.15 --lr 2e-4 --passes 4",
        "--beta 0.1 --lr 2e-4 --passes 8",
    ],
    "outcome": [
        "--beta 0.1 --lr 2e-4 --passes 4 --batch 256",
        "--beta 0.05 --lr 2e-4 --passes 4 --batch 256",
        "--beta 0.2 --lr 2e-4 --passes 4 --batch 256",
        "--beta 0.1 --lr 4e-4 --passes 4 --batch 256",
        "--beta 0.05 --lr 4e-4 --passes 4 --batch 128",
    ],
    "rejection": [
        "--lr 4e-4 --passes 2 --batch 64",
        "--lr 2e-4 --passes 4 --batch 64",
        "--lr 1e-3 --passes 2 --batch 64",
        "--lr 2e-4 --passes 2 --batch 256",
        "--lr 4e-4 --passes 4 --batch 256",
    ],
    "grpo": [
        "--lr 2e-4 --prompts 16 --group 8",
        "--lr 4e-4 --prompts 16 --group 8",
        "--lr 4e-4 --prompts 32 --group 8",
        "--lr 2e-4 --prompts 8 --group 8",
        "--lr 6e-4 --prompts 32 --group 16",
    ],
}
NAMES = {
    "demo": "DAPO",
    "outcome": "outcome advantages",
    "rejection": "rejection sampling",
    "grpo": "GRPO, online",
}


def recipe_run(method: str, task: str, seed: int, runs: Path, trial: str | None):
    """Run a recipe; yields (iteration, tokens sampled so far, its eval.jsonl). A trial ends after one iteration."""
    folder, base = runs / f"{method}-{task}-{seed}", runs / f"demo-{task}-{seed}" / "base"
    flags = {"task": task, "seed": seed, "evaluate": "--samples 4"}
    flags["prepare"] = f"--clean_seed 1 --clean {runs / 'clean'}"
    if method != "demo" and base.exists():
        flags["base"] = str(base)  # the same one, without making it again
    if trial is not None:
        # Outcome advantages are chosen by their second iteration: what is best after one breaks in it.
        flags |= {"actor": trial, "iterations": 2 if method == "outcome" else 1}
        flags["evaluate"] += f" --problems {folder / 'valid.jsonl'}"
        flags["force"] = "train_actor" if (folder / "iter1" / "actor").exists() else ""
    run.stage(run.Settings(run=str(folder), recipe=method, **flags))
    tokens = 0
    for i in range(flags.get("iterations", run.RECIPES[method]["iterations"]) + 1):
        tokens += sampled_tokens(folder / f"iter{i}") if i else 0
        yield i, tokens, folder / f"iter{i}" / "eval.jsonl"


def grpo_run(task: str, seed: int, runs: Path, budgets: list[int], trial: str | None):
    """Online GRPO up to each number of tokens: policy gradient on rewards normalised within the group of a problem's
    responses, no KL, one optimiser step per iteration of a few problems."""
    base, words = runs / f"demo-{task}-{seed}", (trial or TRIALS["grpo"][0]).split()
    lr, prompts, group = float(words[1]), int(words[3]), int(words[5])
    lm = load_lm(base / "base", train=True)
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    problems = read_jsonl(base / "train.jsonl")
    tokens, reached, iteration = 0, 0, 0
    while reached < len(budgets):
        chunk = [problems[(iteration * prompts + i) % len(problems)] for i in range(prompts)]
        rows = []
        for j in range(prompts):
            keys = [draw_key("online", seed, iteration, j, i) for i in range(group)]
            rows += [Row(j, 0, key, 64) for key in keys]
        asked = [lm.prompt_ids(problem["prompt"]) for problem in chunk]
        drawn = Sampler(lm, 512).draw([Tree([ids], [-1], [True]) for ids in asked], rows, 1.0)
        tokens += sum(map(len, drawn))
        graded = grade_ids(lm, [chunk[row.tree] for row in rows], drawn, unsafe=False)
        reward = torch.tensor([float(g["reward"]) for g in graded]).view(prompts, group)
        weight = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        trees, scored = [], sum(map(len, drawn))
        for j, ids in enumerate(asked):
            responses = drawn[j * group : (j + 1) * group]
            score = [bool(w) for w in weight[j]]
            trees.append(Tree([ids, *responses], [-1] + [0] * group, [False, *score]))
        if any(any(tree.score) for tree in trees):
            for pack in pack_trees(trees, 8192):
                each = torch.stack([weight[t, v - 1] for t, v in pack.owner])
                (-(each * step_logprobs(lm, pack)).sum() / scored).backward()
            torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        iteration += 1
        if tokens >= budgets[reached]:
            reached += 1
            out = runs / f"grpo-{task}-{seed}" / f"iter{reached}"
            replace(out / "actor", lm.save)
            tested = base / ("valid.jsonl" if trial else "test.jsonl")
            words = f"--actor {out / 'actor'} --problems {tested} --out {out / 'eval.jsonl'}"
            words = f"{words} --samples 4 --max_new 64 --batch 512 --force".split()
            evaluate.stage(cli.parse(evaluate.Settings, evaluate.__doc__, words, "evaluate.py"))
            yield reached, tokens, out / "eval.jsonl"


def figures(path: Path) -> dict:
    lines = read_jsonl(path)
    found = {"greedy": np.mean([line["correct"] for line in lines])}
    rights = [sum(r["correct"] for r in line["sampled"]) for line in lines]
    found |= {"sampled": np.mean(rights) / 4, "rights": "".join(map(str, rights))}
    if "reasoned" in lines[0]:
        reasoned = [sum(r["reasoned"] for r in line["sampled"]) for line in lines]
        found |= {"reasoning": np.mean([line["reasoned"] for line in lines])}
        found |= {
            "reasoning_sampled": np.mean(reasoned) / 4,
            "reasoned": "".join(map(str, reasoned)),
        }
    return {k: v if isinstance(v, str) else round(float(v), 4) for k, v in found.items()}


def table(rows: list[dict]):
    """Mean ± standard deviation over seeds of the last iteration, in %, and DAPO's lead over each rival, paired."""
    of = {}
    for row in rows:  # later iterations take the place of earlier ones
        of[row["task"], row["method"], row["iteration"], row["seed"]] = row
    for task in dict.fromkeys(row["task"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            for i in range(3):
                found = [r for (t, m, k, _), r in of.items() if (t, m, k) == (task, method, i)]
                if not found or (i == 0 and method != "demo"):
                    continue
                cells = [NAMES[method] if i else "base model", str(i), str(len(found))]
                cells.append(f"{np.mean([r['tokens'] for r in found]) / 1000:.0f} k")
                for name in ("greedy", "sampled", "reasoning", "reasoning_sampled"):
                    values = [100 * r[name] for r in found if name in r]
                    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                    cells.append(f"{np.mean(values):.1f}{spread}" if values else "")
                lead, name = "", "reasoned" if task == "parity" else "rights"
                pairs = [
                    (of[task, "demo", i, r["seed"]], r)
                    for r in found
                    if method != "demo" and (task, "demo", i, r["seed"]) in of
                ]
                if pairs:
                    ours, theirs = ([int(d) / 4 for p in pairs for d in p[k][name]] for k in (0, 1))
                    test = paired(ours, theirs)
                    lead = f"{100 * test['difference']:+.1f} (p {test['p']:.1g})"
                print("| " + " | ".join([task, *cells, lead]) + " |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["demo"], choices=NAMES)
    parser.add_argument("--tasks", nargs="+", default=["math", "parity", "code"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "methods.jsonl")
    parser.add_argument("--table", action="store_true", help="print --out's table, run nothing")
    parser.add_argument("--trials", action="store_true", help="how the settings were chosen")
    s = parser.parse_args()
    rows = [json.loads(line) for line in s.out.open()] if s.out.exists() else []
    if s.table:
        return table([row for row in rows if "trial" not in row])
    jobs = [(c, b, a, None) for a in s.seeds for b in s.tasks for c in s.methods]
    if s.trials:
        jobs = [(c, b, 10, trial) for b in s.tasks for c in s.methods for trial in TRIALS[c]]
    for method, task, seed, trial in jobs:
        about = {"method": method, "task": task, "seed": seed} | ({"trial": trial} if trial else {})
        if any(about.items() <= row.items() for row in rows):
            continue
        if method == "grpo":  # as many tokens as DAPO's iterations took
            ours = {"method": "demo", "task": task, "seed": seed}
            budgets = {r["tokens"] for r in rows if ours.items() <= r.items() and r["iteration"]}
            made = grpo_run(task, seed, s.runs, sorted(budgets), trial)
        else:
            made = recipe_run(method, task, seed, s.runs, trial)
        for i, tokens, path in made:
            rows.append(about | {"iteration": i, "tokens": tokens} | figures(path))
            with s.out.open("a") as f:
                f.write(json.dumps(rows[-1]) + "\n")


if __name__ == "__main__":
    main()
