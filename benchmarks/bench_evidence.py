"""Accuracy against sampled tokens, by hand (minutes to hours):

    python tests/bench_evidence.py --level worded --method dapo --seed 0 --out tests/evidence.jsonl
    python tests/bench_evidence.py --plot tests/evidence.jsonl

Every point of every curve is a line of --out, so a run that was stopped loses nothing, and one that is there with the
same settings is not made again:
    {"method": "dapo", "level": "worded", "seed": 0, "split": "test", "settings": {"problems": 25}, "sampled": 25110,
     "trained": 91904, "seconds": 31.2, "greedy": 0.98, "t1": 0.85, "rights": "443"}
sampled: tokens drawn to learn from, samples and completions; trained: tokens that went through a backward pass, those
of the critic too (at most: all nodes of a tree); t1: accuracy at temperature 1; rights: right ones of 4 draws, a digit a
test problem, for paired tests. The prefixes of completions are prefilled once and are not counted.

Levels (the base models share one clean model a level; the seed fixes their misreadings, the problems and all draws):
    short    2 to 4 relations, one wording: the demo        worded   6 relations, each line in one of 32 wordings
    code     functions of 2 to 4 operations                 sparse   as worded, but the base is right in 1 % of its draws
    longcode functions of 6 operations, for one round alone
Methods, each in iterations by the stages that users run, but for the two online ones:
    dapo        run.sh's recipe: the samples are whole trees, the likelihood of right steps stands beside eq. 12
    labels      the same with two completions of every state
    regression  the same as dapo without the likelihood term
    counts      the same as dapo without a critic: kappa 0, so a step that was drawn once in its state has no advantage
    critic      the same as dapo with Q = V: kappa inf
    siblings    the same as dapo without V(s) in the mean of eq. 13: there too a step that was drawn once has no advantage
    siblings_regression   and without the likelihood term
    likelihood  the same as dapo without eq. 12 (--gap 2): the likelihood of right steps alone, and so no critic
    outcome     whole responses: outcome minus mean for A, and the likelihood of right responses beside it
    rft         rejection sampling: that likelihood alone
    paper       run.sh's RECIPE=paper: labels of kept states, Q = V, first steps; 100 problems an iteration
    grpo, rft_online   one optimiser step an iteration of a few problems: group-normalised rewards; right responses alone
    one_dapo, one_likelihood, one_rft, one_outcome   one round of 100 problems, each with settings for that (--tokens 1);
                one_likelihood is one_dapo with the likelihood of right steps and next to nothing beside it (LIKELIHOOD)
    one_counts, one_critic, one_siblings, one_regression, one_labels   one_dapo with the change of the method of that name
Rows that are called "before" are dapo's of commit 036af04, where the likelihood (weight 1) kept to the states that pass
--gap.
Settings come from the trials in tests/tuning.jsonl (--split valid --seed 10 --set ...).
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import support.cli
import support.sampler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import label_steps
import prepare
import sample
import train_actor
import train_critic
from model import LM, step_logprobs
from reward import grade_ids
from support.packing import Tree, pack_trees
from support.records import each_record, read_jsonl
from support.report import sampled_tokens
from support.sampler import draw_key

LEVELS = {  # flags of prepare.py, and the length limit of a response
    "short": ("", 64),
    "worded": ("--steps 6-6 --wordings 32 --clean_size 48000", 96),
    "code": ("--task code", 64),
    "longcode": ("--task code --steps 6-6 --clean_size 32000", 96),
    "sparse": ("--steps 6-6 --wordings 32 --clean_size 48000 --careless 4", 96),
}
BUDGETS = [3_125 * 2**i for i in range(14)]  # where online curves are read


def recipe(which: int) -> dict:
    """The flags of run.sh: 0: the paper's recipe, 1: its own."""
    text, found = (ROOT / "run.sh").read_text(), {}
    for name in ("PROBLEMS", "REPLAY", "SAMPLE", "LABEL", "CRITIC", "ACTOR"):
        values = re.findall(rf'^ +{name}=\$\{{{name}-"?(.*?)"?\}}', text, re.MULTILINE)
        # The paper's recipe says nothing of REPLAY, whose default is 1.
        found[name.lower()] = ["1", *values][-2:][which]
    return found | {"problems": int(found["problems"]), "replay": int(found["replay"])}


PAPER, OURS = recipe(0) | {"problems": 100}, recipe(1)
WHOLE = OURS | {"label": "", "critic": ""}  # responses: no steps, no critic
OUTCOME = "--advantage outcome --gap 0"
# The likelihood alone, with eq. 12 as a faint pull to pi_ref, which helps where there are many wordings. But of a batch
# that holds nothing right it is the whole step: where many do ("sparse rft" below) --gap 2 leaves it out, at the same
# likelihood / beta.
LIKELIHOOD = "--beta 1e3 --likelihood 1e7"
ONE_DAPO = OURS | {
    "problems": 100,
    "critic": "--states all --token_share 0.9 --lr 1e-3 --passes 8 --batch 32",
    "actor": "--kappa 4 --value_draws 1 --by_draws --likelihood 1 --gap 0.05 --beta 0.0125 "
    "--lr 2e-4 --passes 8 --batch 256",
}


def without_value_draws(settings: dict) -> dict:
    return settings | {"actor": settings["actor"].replace("--value_draws 1 ", "")}


def without_critic(settings: dict) -> dict:
    settings = without_value_draws(settings)
    return settings | {"actor": settings["actor"].replace("--kappa 4", "--kappa 0"), "critic": ""}


REGRESSION = OURS | {"actor": OURS["actor"].replace("--likelihood 4 ", "")}
METHODS = {
    "dapo": OURS,
    "labels": OURS | {"label": "--whole_draws --m 2"},
    "regression": REGRESSION,
    "counts": without_critic(OURS),
    "critic": OURS | {"actor": OURS["actor"].replace("--kappa 4", "--kappa inf")},
    "siblings": without_value_draws(OURS),
    "siblings_regression": without_value_draws(REGRESSION),
    "likelihood": without_critic(OURS | {"actor": OURS["actor"].replace("--gap 0.05", "--gap 2")}),
    "outcome": WHOLE
    | {
        "actor": f"{OUTCOME} --batch 16 --by_draws --beta 0.005 --likelihood 1 --lr 2e-4 --passes 4"
    },
    "rft": WHOLE | {"actor": f"{OUTCOME} --by_draws {LIKELIHOOD} --batch 16 --lr 2e-4 --passes 8"},
    "paper": PAPER,
    "grpo": {"prompts": 2, "group": 4, "lr": 2e-4},
    "rft_online": {"prompts": 2, "group": 2, "lr": 2e-4},
    # one round of 100 problems, each method with its own best settings on worded
    "one_dapo": ONE_DAPO,
    "one_likelihood": OURS
    | {
        "problems": 100,
        "critic": "",
        "actor": f"--kappa 0 --by_draws {LIKELIHOOD} --lr 2e-4 --passes 8 --batch 256",
    },
    "one_rft": WHOLE
    | {
        "problems": 100,
        "actor": f"{OUTCOME} --by_draws {LIKELIHOOD} --batch 64 --lr 4e-4 --passes 8",
    },
    "one_outcome": WHOLE
    | {
        "problems": 100,
        "actor": f"{OUTCOME} --by_draws --beta 0.005 --likelihood 16 --batch 64 --lr 2e-4 --passes 8",
    },
    # and what its parts are worth there, each with its own best beta
    "one_counts": without_critic(ONE_DAPO),
    "one_critic": ONE_DAPO | {"actor": ONE_DAPO["actor"].replace("--kappa 4", "--kappa inf")},
    "one_regression": ONE_DAPO
    | {"actor": ONE_DAPO["actor"].replace("--likelihood 1 ", "").replace("0.0125", "0.025")},
    "one_siblings": without_value_draws(ONE_DAPO),
    "one_labels": ONE_DAPO | {"problems": 25, "label": "--whole_draws --m 2"},
}
ELSEWHERE = {  # flags of the actor that are best, or needed, on other levels
    "sparse outcome": METHODS["outcome"]["actor"] + " --may_stay",
    "sparse rft": "--advantage outcome --by_draws --gap 2 --beta 1e-4 --likelihood 1 --may_stay "
    "--batch 16 --lr 2e-4 --passes 8",
    "code one_dapo": "--kappa 4 --value_draws 1 --by_draws --likelihood 64 --gap 0.05 "
    "--beta 0.025 --lr 2e-4 --passes 4 --batch 64",
    "code one_likelihood": f"--kappa 0 --by_draws {LIKELIHOOD} --lr 2e-4 --passes 4 --batch 64",
    "code one_rft": METHODS["rft"]["actor"],
    "code one_outcome": f"{OUTCOME} --by_draws --beta 0.005 --likelihood 16 --batch 16 "
    "--lr 2e-4 --passes 4",
}


# ------------------------------------------------------------ one point of a curve


def prompt_trees(lm: LM, problems: list[dict]) -> list[Tree]:
    return [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in problems]


def evaluate(lm: LM, problems: list[dict], max_new: int, k: int = 4) -> tuple[float, list[int]]:
    """Greedy accuracy, and how many of k draws at temperature 1 are right, a number a problem."""
    trees, rights = prompt_trees(lm, problems), []
    for temperature, count in ((0.0, 1), (1.0, k)):
        rows = []
        for j, problem in enumerate(problems):
            for i in range(count):
                rows.append(support.sampler.Row(j, 0, draw_key("bench", problem["id"], i), max_new))
        drawn = support.sampler.draw(lm, trees, rows, temperature, 512)
        graded = grade_ids(lm, [problems[row.tree] for row in rows], drawn, unsafe=False)
        right = np.array([g["correct"] for g in graded]).reshape(len(problems), count)
        rights.append(right.sum(1).tolist())
    return sum(rights[0]) / len(problems), rights[1]


# ------------------------------------------------------------ online: one optimiser step an iteration


def online(lm: LM, problems, max_new: int, seed: int, right_only: bool, prompts, group, lr):
    """Endless iterations of a few problems; yields (tokens sampled, tokens trained on) so far.

    GRPO: policy gradient on rewards normalised by each problem's group, no KL. right_only: the mean
    log-likelihood of the right responses' tokens instead.
    """
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    sampled = trained = 0
    for iteration in range(10**9):
        chunk = [problems[(iteration * prompts + i) % len(problems)] for i in range(prompts)]
        rows = []
        for j in range(prompts):
            for i in range(group):
                rows.append(
                    support.sampler.Row(j, 0, draw_key("online", seed, iteration, j, i), max_new)
                )
        drawn = support.sampler.draw(lm, prompt_trees(lm, chunk), rows, 1.0, 512)
        sampled += sum(map(len, drawn))
        graded = grade_ids(lm, [chunk[row.tree] for row in rows], drawn, unsafe=False)
        reward = torch.tensor([float(g["correct"]) for g in graded]).view(prompts, group)
        weight = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        weight = reward if right_only else weight
        trees, tokens = [], 0
        for j, problem in enumerate(chunk):
            responses = drawn[j * group : (j + 1) * group]
            score = [bool(w) for w in weight[j]]
            tokens += sum(len(ids) for ids, s in zip(responses, score) if s or not right_only)
            ids = [lm.prompt_ids(problem["prompt"]), *responses]
            trees.append(Tree(ids, [-1] + [0] * group, [False, *score]))
        if tokens and any(any(tree.score) for tree in trees):
            for pack in pack_trees(trees, 8192):
                each = torch.stack([weight[t, v - 1] for t, v in pack.owner])
                (-(each * step_logprobs(lm, pack)).sum() / tokens).backward()
                trained += len(pack.ids)
            torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        yield sampled, trained


# ------------------------------------------------------------ by the stages


def call(script, flags: str, **paths):
    """Run a stage in this process, silently."""
    sys.argv = [f"{script.__name__}.py", *flags.split()]
    for name, path in paths.items():
        sys.argv += [f"--{name}", str(path)]
    with contextlib.redirect_stdout(io.StringIO()):
        support.cli.main(script.stage, script.Settings, script.__doc__)


def passes(flags: str) -> int:
    return int(re.search(r"--passes (\d+)", flags)[1])


def rounds(run: Path, work: Path, max_new: int, settings: dict, seed: int):
    """Iterations by the stages; yields (actor, tokens sampled, tokens trained on) so far."""
    actor, critic, trees = run / "base", run / "base", []
    problems, sampled, trained, sizes = run / "train.jsonl", 0, 0, []
    total = len(read_jsonl(problems))
    for i in range(10**9):
        it, length = work / f"iter{i + 1}", f" --max_new {max_new} --batch 512 --seed {seed}{i + 1}"
        samples = it / "samples.jsonl"
        first = i * settings["problems"] % (total - settings["problems"] + 1)
        some = f" --first {first} --limit {settings['problems']}"
        call(
            sample, settings["sample"] + length + some, actor=actor, problems=problems, out=samples
        )
        given = {"actor": actor, "trees": samples, "out": it / "actor"}
        size = 0  # tokens that a pass over them trains on
        if not settings["label"]:
            for record in each_record(samples):
                drawn = sum(len(response["ids"]) for response in record["responses"])
                size += len(record["prompt_ids"]) + drawn
        else:
            trees = [*trees, it / "trees.jsonl"][-settings["replay"] :]
            paths = {"actor": actor, "problems": problems, "samples": samples, "out": trees[-1]}
            call(label_steps, settings["label"] + length, **paths)
            for record in each_record(trees[-1]):
                size += len(record["prompt_ids"]) + sum(len(n["ids"]) for n in record["nodes"])
            sizes = [*sizes, size][-settings["replay"] :]
            given["trees"] = trees[-1]
        if settings["critic"]:
            several = ",".join(str(path) for path in trees)
            flags = f"{settings['critic']} --seed {seed}"
            call(train_critic, flags, trees=several, critic_model=critic, out=it / "critic")
            trained += passes(settings["critic"]) * sum(sizes)
            given["critic"] = critic = it / "critic"
        call(train_actor, f"{settings['actor']} --seed {seed}", **given)
        trained += passes(settings["actor"]) * size
        sampled += sampled_tokens(it)
        actor = it / "actor"
        yield actor, sampled, trained


# ------------------------------------------------------------ the curves


def settings_of(method: str, level: str, changes: list[str]) -> dict:
    """The method's settings on a level with NAME=VALUE changes."""
    settings = dict(METHODS[method])
    key = f"{level} {method}"
    if key in ELSEWHERE:
        settings["actor"] = ELSEWHERE[key]
    for change in changes:
        name, _, value = change.partition("=")
        settings[name] = type(settings[name])(value)
    return settings


def base_run(folder: Path, level: str, seed: int, train_size: int = 2000) -> Path:
    """Problems and base model of a level and seed, made if need be."""
    run = folder / f"{level}-{seed}"
    flags = f"{LEVELS[level][0]} --seed {seed} --clean_seed 1 --train_size {train_size}"
    if not (run / "base").exists():
        call(prepare, flags, out=run, clean=folder / "clean")
    return run


def curve(args):
    folder, max_new = Path(args.runs), LEVELS[args.level][1]
    run = base_run(folder, args.level, args.seed, args.train_size)
    train = read_jsonl(run / "train.jsonl")
    test = read_jsonl(run / f"{args.split}.jsonl")[: args.tests]
    settings = settings_of(args.method, args.level, args.set)
    about = {"method": args.method, "level": args.level, "seed": args.seed, "split": args.split}
    about |= {"settings": settings}
    out = Path(args.out)
    there = read_rows(out) if out.exists() else []
    done = [row for row in there if all(row[k] == v for k, v in about.items())]
    if done and max(row["sampled"] for row in done) >= args.tokens:
        print(f"{args.method} {args.level} {args.seed}: there already")
        return
    spent, begin = 0.0, time.perf_counter()

    def write(sampled, trained, lm):
        nonlocal spent
        if any(old["sampled"] == sampled for old in done):
            return
        before = time.perf_counter()
        greedy, rights = evaluate(lm, test, max_new)
        row = about | {"sampled": sampled, "trained": trained}
        row["seconds"] = round(before - begin - spent, 1)
        row |= {"greedy": round(greedy, 4), "t1": round(sum(rights) / 4 / len(test), 4)}
        row["rights"] = "".join(map(str, rights))
        with out.open("a") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())
        spent += time.perf_counter() - before
        print({k: v for k, v in row.items() if k not in ("rights", "settings")}, flush=True)

    lm = LM(run / "base", train=True)
    write(0, 0, lm)
    if args.method in ("grpo", "rft_online"):
        steps = online(lm, train, max_new, args.seed, args.method == "rft_online", **settings)
        budgets = [b for b in BUDGETS if b < args.tokens] + [args.tokens]
        for sampled, trained in steps:
            if sampled >= budgets[0]:
                write(sampled, trained, lm)
                budgets = [b for b in budgets if b > sampled]
                if not budgets:
                    break
        return
    work = folder / args.work / f"{args.method}-{args.level}-{args.seed}"
    for actor, sampled, trained in rounds(run, work, max_new, settings, args.seed):
        write(sampled, trained, LM(actor))
        if sampled >= args.tokens:
            return


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------ the figure and the table

STYLE = {  # method: what the figure calls it, colour, line
    "dapo": ("DAPO, run.sh's recipe", "C3", "o-"),
    "before": ("its form before", "C3", "o:"),
    "labels": ("the same with completions", "C1", "o-"),
    "regression": ("the same without the likelihood term", "C8", "o-"),
    "counts": ("the same without a critic, κ = 0", "C5", "o-"),
    "critic": ("the same with Q = V, κ = ∞", "C6", "o-"),
    "siblings": ("the same without V(s) in the mean of eq. 13", "C2", "o:"),
    "siblings_regression": ("and without the likelihood term", "C8", "o:"),
    "likelihood": ("the same without eq. 12: the likelihood alone", "k", "o-"),
    "outcome": ("outcome advantages and likelihood", "C2", "s--"),
    "rft": ("rejection sampling, as many iterations", "C4", "s--"),
    "paper": ("DAPO, the paper's recipe", "C7", "o-"),
    "grpo": ("GRPO, online", "C0", "-"),
    "rft_online": ("rejection sampling, online", "C9", "-"),
}
# The others are in the tables alone.
IN_FIGURE = ("dapo", "likelihood", "outcome", "rft", "paper", "grpo", "rft_online")
ROUND_NAMES = {
    "one_dapo": "DAPO",
    "one_likelihood": "the same, likelihood of right steps alone",
    "one_rft": "rejection sampling",
    "one_outcome": "outcome advantages and likelihood",
    "one_counts": "DAPO without a critic, κ = 0",
    "one_critic": "DAPO with Q = V, κ = ∞",
    "one_siblings": "DAPO without V(s) in the mean of eq. 13",
    "one_regression": "DAPO without the likelihood term",
    "one_labels": "DAPO of 25 problems with completions",
}
READ = (6_250, 12_500, 25_000, 50_000)  # tokens at which the tables are read


def curves(rows: list[dict]) -> dict:
    """{(level, method): {seed: [(sampled, t1, greedy, rights)]}}, points in the order of tokens."""
    found, made = {}, {}
    for row in sorted(rows, key=lambda r: r["sampled"]):
        name, how = f"{row['method']} {row['level']} {row['seed']}", (row["split"], row["settings"])
        if made.setdefault(name, how) != how:
            raise SystemExit(f"{name}: rows of two settings, which are no one curve")
        seeds = found.setdefault((row["level"], row["method"]), {})
        rights = np.array([*row["rights"]], int)
        point = (max(row["sampled"], 1), row["t1"], row["greedy"], rights)
        seeds.setdefault(row["seed"], []).append(point)
    return found


def reached(points: list[tuple], share: float) -> float:
    """Tokens at which a curve first has this accuracy at T=1, between points by log tokens; nan: never."""
    for (x0, y0, *_), (x1, y1, *_) in pairwise(points):
        if y1 >= share:
            part = (share - y0) / (y1 - y0) if y1 > y0 else 1.0
            return x0 ** (1 - part) * x1**part if x0 > 1 else x1 * max(0.0, part)
    return math.nan


def point_at(points: list[tuple], budget: float) -> tuple | None:
    """The last point within a budget (and 10 % of it), from the first iteration on; None if there is
    none, or if the curve ends well before."""
    within = [point for point in points if 1 < point[0] <= 1.1 * budget]
    return within[-1] if within and points[-1][0] >= 0.9 * budget else None


def at(points: list[tuple], budget: float) -> float:
    """T=1 accuracy within a budget; nan beyond the curve's end."""
    found = point_at(points, budget)
    return found[1] if found else math.nan


def mean_sd(numbers: list[float], scale: float, digits: int, unit: str = "") -> str:
    """Of the seeds that got there; how many they are, if not all."""
    known = [scale * x for x in numbers if not math.isnan(x)]
    if not known:
        return "-"
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    some = f" ({len(known)} of {len(numbers)})" if len(known) < len(numbers) else ""
    return f"{np.mean(known):.{digits}f}{spread}{unit}{some}"


def plot(path: Path):
    """evidence.png beside the working directory's README: T=1 accuracy against sampled tokens; and the tables."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = curves(read_rows(path))
    levels = [level for level in LEVELS if any((level, method) in found for method in STYLE)]
    figure, axes = plt.subplots(
        1, len(levels), figsize=(5.2 * len(levels), 5.4), sharey=True, squeeze=False
    )
    for level, axis in zip(levels, axes[0]):
        for method in IN_FIGURE:
            (name, color, line), seeds = STYLE[method], found.get((level, method))
            if not seeds:
                continue
            every = []
            for points in seeds.values():  # without the base, which has drawn nothing
                every.append([point for point in points if point[0] > 1])
            tokens, middle, low, high = [], [], [], []
            for i in range(max(map(len, every))):
                here = [points[i] for points in every if len(points) > i]
                if 2 * len(here) <= len(every):  # one seed that went on alone is no mean
                    break
                t1 = [100 * point[1] for point in here]
                tokens.append(np.mean([point[0] for point in here]))
                middle.append(np.mean(t1))
                low.append(min(t1))
                high.append(max(t1))
            axis.plot(tokens, middle, line, color=color, lw=2.5, ms=7, label=name)
            axis.fill_between(tokens, low, high, color=color, alpha=0.15, lw=0)
        axis.set_xscale("log")
        ticks = [b for b in BUDGETS if b <= axis.get_xlim()[1]]
        axis.set_xticks(ticks[:: 1 + len(ticks) // 6])
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}k")
        axis.minorticks_off()
        axis.set_title(level, fontsize=17)
        axis.set_xlabel("sampled tokens", fontsize=15)
        axis.tick_params(labelsize=13)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right at temperature 1, %", fontsize=15)
    handles = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncol=3, fontsize=14, frameon=False
    )
    figure.tight_layout(rect=(0, 0.02 + 0.06 * math.ceil(len(handles) / 3), 1, 1))
    figure.savefig("evidence.png", dpi=80)

    shown = " | ".join(f"{budget:,}" for budget in READ)
    print(f"| level | method | seeds | tokens to 60 % | 80 % | 90 % | T=1 at {shown} |")
    print("| --- " * (6 + len(READ)) + "|")
    for level in levels:
        for method, (name, *_) in STYLE.items():
            every = list(found.get((level, method), {}).values())
            if every:
                cells = []
                for share in (0.6, 0.8, 0.9):
                    reach = [reached(points, share) for points in every]
                    cells.append(mean_sd(reach, 1e-3, 0, " k"))
                for budget in READ:
                    cells.append(mean_sd([at(points, budget) for points in every], 100, 1))
                print(f"| {level} | {name} | {len(every)} | {' | '.join(cells)} |")
    print(f"\n| level | how far DAPO is ahead of | at {shown} |")
    print("| --- " * (2 + len(READ)) + "|")
    for level in levels:
        compare(level, found)
    print("\n| level | one round | seeds | tokens | greedy | T=1 | DAPO ahead |")
    print("| --- " * 7 + "|")
    for level in LEVELS:
        compare_rounds(level, found)


def paired_test(difference: np.ndarray) -> tuple[float, float]:
    """The standard error of the mean of these differences, a problem each, and the two-sided p of a
    normal test that it is 0."""
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return error, math.erfc(abs(difference.mean()) / max(error, 1e-9) / math.sqrt(2))


def difference_cell(pairs: list[tuple]) -> str:
    """How far the first points of these pairs, a pair a seed, are ahead of the second: paired by
    problem, seeds pooled.

    p says how sure the difference of these very policies is; how much it changes from seed to seed
    is beside it.
    """
    if not pairs:
        return "-"
    difference = np.concatenate([(a[3] - b[3]) / 4 for a, b in pairs])
    _, p = paired_test(difference)
    by_seed = [100 * (a[1] - b[1]) for a, b in pairs]
    spread = f"{min(by_seed):+.1f} to {max(by_seed):+.1f}"
    chance = f"p {p:.1g}" if p else "p < 1e-300"
    return f"{100 * difference.mean():+.1f} ({spread}; {chance})"


def compare(level: str, found: dict):
    """Differences at the budgets that both methods reach."""
    ours = found.get((level, "dapo"), {})
    for rival in [method for method in STYLE if method != "dapo"]:
        theirs = found.get((level, rival), {})
        cells = []
        for budget in READ:
            pairs = []
            for seed in sorted(ours.keys() & theirs.keys()):
                own, other = point_at(ours[seed], budget), point_at(theirs[seed], budget)
                if own and other:
                    pairs.append((own, other))
            cells.append(difference_cell(pairs))
        if any(cell != "-" for cell in cells):
            print(f"| {level} | {STYLE[rival][0]} | {' | '.join(cells)} |")


def compare_rounds(level: str, found: dict):
    """One round of each method: accuracy, and how far DAPO's is ahead."""
    ends = {}  # of each method the points of its seeds after the round
    for method in ROUND_NAMES:
        seeds = found.get((level, method), {})
        ends[method] = {seed: points[-1] for seed, points in seeds.items()}
    ours = ends["one_dapo"]
    for method, theirs in ends.items():
        if theirs:
            tokens = np.mean([point[0] for point in theirs.values()])
            t1 = mean_sd([point[1] for point in theirs.values()], 100, 1)
            greedy = mean_sd([point[2] for point in theirs.values()], 100, 1)
            both = sorted(ours.keys() & theirs.keys()) if theirs is not ours else []
            ahead = difference_cell([(ours[seed], theirs[seed]) for seed in both])
            name = ROUND_NAMES[method]
            print(
                f"| {level} | {name} | {len(theirs)} | {tokens:,.0f} | {greedy} | {t1} | {ahead} |"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--level", default="worded", choices=LEVELS)
    parser.add_argument("--method", default="dapo", choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=200_000, help="to sample at least")
    parser.add_argument("--split", default="test", choices=("test", "valid"))
    parser.add_argument("--tests", type=int, default=150, help="problems of it")
    parser.add_argument("--train_size", type=int, default=2000)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the method's settings"
    )
    parser.add_argument("--runs", default="runs/evidence")
    parser.add_argument("--work", default="work", help="folder in it for the stages' files")
    parser.add_argument("--out", default="tests/evidence.jsonl")
    parser.add_argument("--plot", help="draw evidence.png from these rows and print the table")
    args = parser.parse_args()
    if args.plot:
        plot(Path(args.plot))
    else:
        curve(args)
