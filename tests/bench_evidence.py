"""Accuracy against sampled tokens, by hand (minutes to hours):

    python tests/bench_evidence.py --level worded --method online --seed 0 --out tests/evidence.jsonl
    python tests/bench_evidence.py --plot tests/evidence.jsonl

Every point of every curve is a line of --out, so a run that was stopped loses nothing, and one that is there is not
made again:
    {"method": "online", "level": "worded", "seed": 0, "settings": {"problems": 3}, "sampled": 25110, "trained": 91904,
     "seconds": 31.2, "greedy": 0.98, "t1": 0.85, "rights": "443"}
sampled: tokens drawn to learn from, samples and completions; trained: tokens that went through a backward pass, those
of the critic too; t1: accuracy at temperature 1; rights: right ones of 4 draws, a digit a test problem, for paired
tests. The trees of prefixes are prefilled once and are not counted, as nowhere else in this project.

Levels (the base models share one clean model a level; the seed fixes their misreadings, the problems and all draws):
    short    2 to 4 relations, one wording: the demo        worded   6 relations, each line in one of 32 wordings
    code     functions of 2 to 4 operations                 sparse   as worded, but the base is right in 2 % of its draws
Methods:
    paper    stages: n1 32, n 6, m 16, Q = V, labelled states, first steps; rates and beta as a small model needs them
    recipe   stages: run.sh's recipe, in smaller iterations where settings say so
    online   DAPO small and often, see `online`: the critic learns from the samples' own outcomes, no completions
    labelled the same with completions from late states     regression   online without the likelihood term
    grpo     tests/bench_baselines.py's
    outcome, rft    the same loop on whole responses: advantages with the likelihood term, and that term alone
Settings come from the trials in tests/tuning.jsonl, 14 a method, made with --split valid --seed 10 --tokens 25000 --set ...
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench_baselines

import label_steps
import prepare
import sample
import train_actor
import train_critic
from model import (
    BLOCK,
    LM,
    Tree,
    pack_trees,
    record_tree,
    step_advantages,
    step_logprobs,
)
from prepare import read_jsonl
from reward import grade_ids
from sample import draw_key
from train_critic import load_critic, tree_values

LEVELS = {  # flags of prepare.py, and the length limit of a response
    "short": ("", 64),
    "worded": ("--steps 6-6 --wordings 32 --clean_size 48000", 96),
    "code": ("--task code", 64),
    "sparse": ("--steps 6-6 --wordings 32 --clean_size 48000 --careless 4", 96),
}
BUDGETS = [12_500 * 2**i for i in range(12)]  # where the curves are read
ONLINE = {
    "problems": 2,  # an iteration
    "n1": 4,  # responses a problem
    "m": 0,  # completions of each chosen state
    "last": 4,  # states at most so many steps before the end of a right response are chosen
    "kappa": 4.0,  # Q = (wins + kappa V) / (n + kappa)
    "lr": 2e-4,
    "critic_lr": 1e-3,
    "replay": 4,  # iterations whose trees train the critic
    "likelihood": 3.0,  # weight of the log-probs of right responses beside A's
    "down": 0.5,  # weight of the steps whose A is below 0
}
OFF = {"m": 0, "kappa": 0.0, "critic_lr": 0.0, "replay": 0, "last": 0}
METHODS = {
    "online": ONLINE,
    "labelled": ONLINE | {"m": 2, "kappa": 1.0},
    "regression": ONLINE | {"likelihood": 0.0, "down": 1.0},
    "outcome": ONLINE | OFF,
    "rft": ONLINE | OFF | {"n1": 2},
    "grpo": {"prompts": 2, "group": 4, "lr": 2e-4},
    "paper": {
        "problems": 300,
        "sample": "--n1 32 --n 6",
        "label": "--m 16",
        "critic": "--lr 1e-3 --passes 8 --batch 128 --states labelled --token_share 0",
        "actor": "--beta 0.05 --lr 1e-4 --passes 4 --batch 256",
    },
    "recipe": {
        "problems": 300,
        "sample": "--n1 8 --n 4",
        "label": "--m 4",
        "critic": "--lr 1e-3 --passes 8 --batch 128",
        "actor": "--kappa 4 --kept_steps --beta 0.1 --lr 1e-4 --passes 4 --batch 256",
    },
}


def evaluate(lm: LM, problems: list[dict], max_new: int, k: int = 4) -> tuple[float, list[int]]:
    """Greedy accuracy, and how many of k draws at temperature 1 are right, a number a problem."""
    trees = prompt_trees(lm, problems)
    rights = []
    for temperature, count in ((0.0, 1), (1.0, k)):
        rows = [
            (j, 0, draw_key("bench", p["id"], i), max_new)
            for j, p in enumerate(problems)
            for i in range(count)
        ]
        drawn = sample.draw(lm, trees, rows, temperature, 512)
        graded = grade_ids(lm, [problems[j] for j, *_ in rows], drawn, unsafe=False)
        right = np.array([g["correct"] for g in graded]).reshape(len(problems), count)
        rights.append(right.sum(1).tolist())
    return sum(rights[0]) / len(problems), rights[1]


def prompt_trees(lm: LM, problems: list[dict]) -> list[Tree]:
    return [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in problems]


# ------------------------------------------------------------ DAPO, small and often


def new_node(parent: int, ids: list[int]) -> dict:
    """right: how many of the draws of this step ended right; the rest is trees.jsonl's."""
    node = {"parent": parent, "ids": ids, "reward": None, "draws": 0, "n": 0, "wins": 0}
    return node | {"right": 0}


class DrawTree:
    """One problem's draws: every step of each is a node, and draws of a node count there.

    The same record as a line of trees.jsonl, but for what is counted: samples too, all of them, and
    completions to their end. A draw at a state is unbiased there, whatever made us draw it.
    """

    def __init__(self, problem: dict, prompt_ids: list[int]):
        self.problem, self.child = problem, {}
        self.nodes = [new_node(-1, prompt_ids)]

    def add(self, v: int, ids: list[int], ends: list[int], reward: float) -> list[int]:
        """Count a response or completion drawn at node v; -> its nodes, a step each."""
        path = []
        for begin, end in zip([0, *ends], ends):
            self.nodes[v]["n"] += 1
            self.nodes[v]["wins"] += reward
            step = ids[begin:end]
            u = self.child.setdefault((v, tuple(step)), len(self.nodes))
            if u == len(self.nodes):
                self.nodes.append(new_node(v, step))
            self.nodes[u]["draws"] += 1
            self.nodes[u]["right"] += reward
            v = u
            path.append(v)
        self.nodes[v]["reward"] = reward
        return path

    def response(self, v: int) -> list[int]:
        ids = []
        while v:
            ids[:0] = self.nodes[v]["ids"]
            v = self.nodes[v]["parent"]
        return ids

    def record(self) -> dict:
        return {"id": self.problem["id"], "prompt_ids": self.nodes[0]["ids"], "nodes": self.nodes}


def online(lm: LM, base: str, problems: list[dict], max_new: int, method: str, settings, seed: int):
    """Endless iterations of a few problems, one optimiser step of the actor each; yields (sampled, trained) so far.

    1. n1 responses a problem, all of them counted in its tree, each step a node.
    2. `labelled` only. Of a problem with right and wrong responses, a right one: at each of its states that is at most
       `last` steps before the end, m completions. Deep states are the cheap ones and the ones where a draw says most
       about a step: at base, two of three completions of a last step are right, one of six responses is.
    3. The critic goes on learning from the trees of the last few iterations, a pass over them.
    4. A = Q(s, a) - V(s) for every step drawn, Q = (wins + kappa V) / (n + kappa), V(s) the mean of Q over the draws at s
       and of the critic's V as one draw more: a state drawn once has a baseline too.
    5. One step of eq. 12. At a log-ratio of 0 its gradient is that of -A log pi / beta, and AdamW does not see the scale:
       beta drops out. Beside it the likelihood of right responses (no part of the paper): what was drawn and is right
       becomes likelier throughout, where A pushes only what is better than the rest, and half as much down as up.
    """
    rng, optimiser = random.Random(f"online {seed}"), adamw(lm.model.parameters(), settings["lr"])
    whole = method in ("outcome", "rft")
    critic = head = None
    if settings["kappa"]:
        critic, head = load_critic(base, train=True, new=True)
        critic_optimiser = adamw(
            [*critic.model.parameters(), *head.parameters()], settings["critic_lr"]
        )
    recent, sampled, trained, count = [], 0, 0, settings["problems"]
    for iteration in range(10**9):
        chunk = [problems[(iteration * count + i) % len(problems)] for i in range(count)]
        trees = [DrawTree(p, lm.prompt_ids(p["prompt"])) for p in chunk]

        right = [[] for _ in trees]  # paths of the right responses
        roots = [(t, 0) for t in range(count) for _ in range(settings["n1"])]
        for t, v, ids, reward in draw(lm, trees, roots, max_new, (seed, "sample", iteration)):
            sampled += len(ids)
            path = trees[t].add(v, ids, [len(ids)] if whole else lm.step_ends(ids), reward)
            if reward:
                right[t].append(path)
        asked = []
        for t, paths in enumerate(right):
            if settings["m"] and 0 < len(paths) < settings["n1"]:  # all right: nothing to learn
                states = [0, *rng.choice(paths)[:-1]]
                # the last step only says what the one before it found
                asked += [
                    (t, v) for v in states[-settings["last"] : -1] for _ in range(settings["m"])
                ]
        if asked:
            for t, v, ids, reward in draw(lm, trees, asked, max_new, (seed, "label", iteration)):
                sampled += len(ids)
                trees[t].add(v, ids, lm.step_ends(ids), reward)
        records = [tree.record() for tree in trees]
        values = [[0.0] * len(r["nodes"]) for r in records]
        if critic:
            recent = (recent + records)[-settings["replay"] * count :]
            if not head.weight.any():  # a new head starts as the constant predictor
                wins = sum(r["nodes"][0]["wins"] for r in records)
                n = sum(r["nodes"][0]["n"] for r in records)
                torch.nn.init.constant_(head.bias, math.log((wins + 1) / (n - wins + 1)))
            for batch in np.array_split(
                rng.sample(range(len(recent)), len(recent)), -(-len(recent) // 16)
            ):
                trained += critic_step(critic, head, [recent[i] for i in batch], critic_optimiser)
            values = tree_values(critic, head, records, False, 8192)
        if method == "rft":
            actions = [{v: 1.0 for v, n in enumerate(r["nodes"]) if n["reward"]} for r in records]
        else:
            actions = [advantages(r, v, settings["kappa"]) for r, v in zip(records, values)]
            actions = [weighed(r, a, settings) for r, a in zip(records, actions)]
        trained += actor_step(lm, records, actions, optimiser, per_token=method == "rft")
        yield sampled, trained


def draw(
    lm: LM, trees: list[DrawTree], asked: list[tuple], max_new: int, what: tuple
) -> list[tuple]:
    """A draw from each (tree, node) asked for, graded; -> (tree, node, token ids, reward)"""
    rows, wanted = [], set(asked)
    for number, (t, v) in enumerate(asked):
        rows.append((t, v, draw_key(*what, t, v, number), max_new - len(trees[t].response(v))))
    prefixes = []
    for t, tree in enumerate(trees):
        prefixes.append(
            record_tree(tree.record(), [(t, v) in wanted for v in range(len(tree.nodes))])
        )
    drawn = sample.draw(lm, prefixes, rows, 1.0, 512)
    responses = [trees[t].response(v) + ids for (t, v), ids in zip(asked, drawn)]
    graded = grade_ids(lm, [trees[t].problem for t, _ in asked], responses, unsafe=False)
    return [(t, v, ids, int(g["correct"])) for (t, v), ids, g in zip(asked, drawn, graded)]


def adamw(parameters, lr: float):
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def apply(optimiser):
    torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
    optimiser.step()
    optimiser.zero_grad()


def critic_step(critic, head, records: list[dict], optimiser) -> int:
    """One step of eq. 15 on every state that was drawn from; -> tokens trained on."""
    trees = [record_tree(r, train_critic.training_nodes(r, "all")) for r in records]
    packs = pack_trees(trees, 8192)
    nodes = [[records[t]["nodes"][v] for t, v in pack.owner] for pack in packs]
    total = sum(n["n"] for row in nodes for n in row)
    for pack, row in zip(packs, nodes):
        target = torch.tensor([n["wins"] / n["n"] for n in row])
        weight = torch.tensor([n["n"] / total for n in row])
        train_critic.critic_loss(critic, head, pack, target, weight, 0.5).backward()
    apply(optimiser)
    return sum(len(pack.ids) for pack in packs)


def advantages(
    record: dict, value: list[float], kappa: float, gap: float = 0.05
) -> dict[int, float]:
    """{node: A} of every step drawn at a state where something is to be learnt (max |A| >= gap)."""
    nodes = record["nodes"]
    q = train_actor.action_values(record, value, kappa)
    drawn = range(1, len(nodes))
    # the critic's V(s) is one more draw at s
    known = sorted({nodes[v]["parent"] for v in drawn})
    own = [value[s] for s in known] if kappa else []
    parent = torch.tensor([known.index(nodes[v]["parent"]) for v in drawn] + [*range(len(own))])
    draws = torch.tensor([nodes[v]["draws"] for v in drawn] + [1] * len(own))
    every = torch.cat([q[1:], torch.tensor(own, dtype=q.dtype)])
    adv = step_advantages(every, parent, draws)[0][: len(drawn)].tolist()
    most = {}
    for v, a in zip(drawn, adv):
        most[nodes[v]["parent"]] = max(most.get(nodes[v]["parent"], 0.0), abs(a))
    return {v: a for v, a in zip(drawn, adv) if most[nodes[v]["parent"]] >= gap}


def weighed(record: dict, adv: dict[int, float], settings: dict) -> dict[int, float]:
    """{node: weight of a draw of it}: A, less of it where it is below 0, and the likelihood of right ones."""
    weight = {v: a if a > 0 else settings["down"] * a for v, a in adv.items()}
    for v, node in enumerate(record["nodes"]):
        if v and node["right"] and settings["likelihood"]:
            more = settings["likelihood"] * node["right"] / node["draws"]
            weight[v] = weight.get(v, 0.0) + more
    return weight


def actor_step(lm: LM, records: list[dict], actions: list[dict], optimiser, per_token: bool) -> int:
    """One step of eq. 12 at a log-ratio of 0, an action as often as it was drawn; -> tokens trained on."""
    chosen = [i for i, a in enumerate(actions) if a]
    trees = [
        record_tree(records[i], [v in actions[i] for v in range(len(records[i]["nodes"]))])
        for i in chosen
    ]
    if not trees:
        return 0
    draws = [{v: records[i]["nodes"][v]["draws"] for v in actions[i]} for i in chosen]
    total = sum(sum(row.values()) for row in draws)
    if per_token:
        total = sum(
            len(records[i]["nodes"][v]["ids"]) * n
            for i, row in zip(chosen, draws)
            for v, n in row.items()
        )
    trained = 0
    for pack in pack_trees(trees, 8192, align=BLOCK):
        weight = torch.tensor([actions[chosen[t]][v] * draws[t][v] for t, v in pack.owner])
        (-(weight * step_logprobs(lm, pack)).sum() / total).backward()
        trained += len(pack.ids)
    apply(optimiser)
    return trained


# ------------------------------------------------------------ DAPO by its stages


def call(script, flags: str, **paths) -> str:
    """Run a stage in this process; -> what it printed."""
    sys.argv = [f"{script.__name__}.py", *flags.split()]
    for name, path in paths.items():
        sys.argv += [f"--{name}", str(path)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        prepare.main(script.stage, script.Settings, script.__doc__)
    return printed.getvalue()


def rounds(run: Path, work: Path, max_new: int, settings: dict, seed: int):
    """Iterations by the stages; yields (actor, sampled, trained) so far."""
    actor, critic = run / "base", run / "base"
    sampled = trained = 0
    for i in range(99):
        it, problems, length = (
            work / f"iter{i + 1}",
            run / "train.jsonl",
            f" --max_new {max_new} --batch 512 ",
        )
        first = f"--first {i * settings['problems']} --limit {settings['problems']} --seed {seed}{i + 1}"
        samples, trees = it / "samples.jsonl", it / "trees.jsonl"
        call(
            sample, settings["sample"] + length + first, actor=actor, problems=problems, out=samples
        )
        label = settings["label"] + length + f"--seed {seed}{i + 1}"
        call(label_steps, label, actor=actor, problems=problems, samples=samples, out=trees)
        flags = f"{settings['critic']} --seed {seed}"
        call(train_critic, flags, trees=trees, critic_model=critic, out=it / "critic")
        actor_flags = f"{settings['actor']} --seed {seed}"
        call(
            train_actor,
            actor_flags,
            actor=actor,
            trees=trees,
            critic=it / "critic",
            out=it / "actor",
        )
        sampled += sum(len(r["ids"]) for x in read_jsonl(samples) for r in x["responses"])
        for record in read_jsonl(trees):
            sampled += record["tokens"]
            size = len(record["prompt_ids"]) + sum(len(n["ids"]) for n in record["nodes"])
            for which in ("critic", "actor"):
                words = settings[which].split()
                trained += int(words[words.index("--passes") + 1]) * size  # at most: all of a tree
        actor, critic = it / "actor", it / "critic"
        yield actor, sampled, trained


# ------------------------------------------------------------ the curves


def settings_of(method: str, changes: list[str]) -> dict:
    """The method's settings with NAME=VALUE changes."""
    settings = dict(METHODS[method])
    for change in changes:
        name, _, value = change.partition("=")
        settings[name] = type(settings[name])(value)
    return settings


def curve(args):
    prepared, max_new = LEVELS[args.level]
    folder = Path(args.runs)
    run = folder / f"{args.level}-{args.seed}"
    flags = f"{prepared} --seed {args.seed} --clean_seed 1 --train_size {args.train_size}"
    if not (run / "base").exists():
        call(prepare, flags, out=run, clean=folder / "clean")
    train = read_jsonl(run / "train.jsonl")
    test = read_jsonl(run / f"{args.split}.jsonl")[: args.tests]
    settings = settings_of(args.method, args.set)
    about = {"method": args.method, "level": args.level, "seed": args.seed, "split": args.split}
    about |= {"settings": settings}
    out = Path(args.out)
    there = read_rows(out) if out.exists() else []
    done = [r for r in there if all(r[k] == v for k, v in about.items())]
    if done and max(r["sampled"] for r in done) >= args.tokens:
        return print(f"{about}: there already")
    spent, begin = 0.0, time.perf_counter()

    def write(sampled, trained, lm):
        nonlocal spent
        before = time.perf_counter()
        greedy, rights = evaluate(lm, test, max_new)
        row = {
            **about,
            "sampled": sampled,
            "trained": trained,
            "seconds": round(before - begin - spent, 1),
        }
        row |= {
            "greedy": round(greedy, 4),
            "t1": round(sum(rights) / 4 / len(test), 4),
            "rights": "".join(map(str, rights)),
        }
        if not any(r["sampled"] == sampled for r in done):
            with out.open("a") as f:
                f.write(json.dumps(row) + "\n")
                f.flush()
                os.fsync(f.fileno())
        spent += time.perf_counter() - before
        print({k: v for k, v in row.items() if k not in ("rights", "settings")}, flush=True)

    base = str(run / "base")
    lm = LM(base, train=True)
    write(0, 0, lm)
    if args.method in ("paper", "recipe"):
        work = folder / f"{args.method}-{args.level}-{args.seed}"
        for actor, sampled, trained in rounds(run, work, max_new, settings, args.seed):
            write(sampled, trained, LM(str(actor)))
            if sampled >= args.tokens:
                return None
    if args.method == "grpo":
        steps = bench_baselines.grpo(
            lm, train, args.tokens, max_new=max_new, seed=args.seed, **settings
        )
    else:
        steps = online(lm, base, train, max_new, args.method, settings, args.seed)
    budgets = [b for b in BUDGETS if b < args.tokens] + [args.tokens]
    for sampled, trained in steps:
        if sampled >= budgets[0]:
            write(sampled, trained, lm)
            budgets = [b for b in budgets if b > sampled]
            if not budgets:
                return None
    return None


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------ the figure and the table

STYLE = {  # method: what the figure calls it, colour, line
    "online": ("DAPO, small and often, critic of the samples", "C3", "-"),
    "labelled": ("the same with completions", "C1", "-"),
    "regression": ("the same without the likelihood term", "C8", "-"),
    "grpo": ("GRPO", "C0", "-"),
    "outcome": ("outcome advantages, small and often", "C2", "--"),
    "rft": ("rejection sampling, small and often", "C4", "--"),
    "recipe": ("DAPO, large iterations (Q from counts and critic)", "C5", "o-"),
    "paper": ("DAPO, large iterations (Q = V: the paper)", "C7", "o-"),
}


def curves(rows: list[dict]) -> dict:
    """{(level, method): {seed: [(sampled, t1, greedy, rights)]}}, points in the order of tokens."""
    found = {}
    for row in sorted(rows, key=lambda r: r["sampled"]):
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


def at(points: list[tuple], budget: float) -> float:
    """T=1 accuracy at a budget, between points by log tokens; nan beyond the curve's end."""
    tokens, t1 = [x for x, *_ in points[1:]], [y for _, y, *_ in points[1:]]
    if not tokens or not tokens[0] * 0.7 <= budget <= tokens[-1] * 1.05:
        return math.nan
    return float(np.interp(math.log(budget), np.log(tokens), t1))


def mean_sd(numbers: list[float], scale: float, digits: int) -> str:
    if np.isnan(numbers).any():
        return "-"
    spread = f" ± {np.std(numbers, ddof=1) * scale:.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers) * scale:.{digits}f}{spread}"


def plot(path: Path):
    """evidence.png beside the working directory's README: T=1 accuracy against sampled tokens; and the tables."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = curves(read_rows(path))
    levels = [level for level in LEVELS if any(key[0] == level for key in found)]
    figure, axes = plt.subplots(
        1, len(levels), figsize=(5.2 * len(levels), 5.4), sharey=True, squeeze=False
    )
    for level, axis in zip(levels, axes[0]):
        for method, (name, color, line) in STYLE.items():
            seeds = found.get((level, method))
            if not seeds:
                continue
            every = [points[1:] for points in seeds.values()]  # without the base
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
        axis.set_xticks([b for b in BUDGETS if b <= axis.get_xlim()[1]])
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
        handles.values(), handles.keys(), loc="lower center", ncol=2, fontsize=13, frameon=False
    )
    figure.tight_layout(rect=(0, 0.07 + 0.05 * math.ceil(len(handles) / 2), 1, 1))
    figure.savefig("evidence.png", dpi=80)

    print(
        "| level | method | seeds | tokens to 60 % | 80 % | 90 % | T=1 at 12,500 | at 25,000 | at 50,000 | at the end | tokens there |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for level in levels:
        for method, (name, *_) in STYLE.items():
            seeds = found.get((level, method))
            if seeds:
                all_points = list(seeds.values())
                cells = [
                    mean_sd([reached(p, share) for p in all_points], 1e-3, 0)
                    for share in (0.6, 0.8, 0.9)
                ]
                cells = [c if c == "-" else f"{c} k" for c in cells]
                cells += [
                    mean_sd([at(p, budget) for p in all_points], 100, 1)
                    for budget in (12.5e3, 25e3, 50e3)
                ]
                cells.append(mean_sd([p[-1][1] for p in all_points], 100, 1))
                cells.append(f"{np.mean([p[-1][0] for p in all_points]):,.0f}")
                print(f"| {level} | {name} | {len(seeds)} | {' | '.join(cells)} |")
    print("\n| level | points of T=1, by seed | 12,500 tokens | 25,000 | 50,000 |")
    print("| --- | --- | --- | --- | --- |")
    for level in levels:
        compare(level, found)


PAIRS = (
    ("online", "grpo"),
    ("online", "rft"),
    ("online", "outcome"),
    ("regression", "grpo"),
    ("labelled", "online"),
)


def compare(level: str, found: dict):
    """Differences at the budgets that both methods reach: paired by problem, seeds pooled.

    p says how sure the difference of these very policies is; how much it changes from seed to seed
    is beside it.
    """
    for method, rival in PAIRS:
        ours, theirs = found.get((level, method), {}), found.get((level, rival), {})
        cells = []
        for i in (1, 2, 3):  # 12.5, 25 and 50 thousand tokens
            pairs = [
                (ours[s][i], theirs[s][i])
                for s in sorted(ours.keys() & theirs.keys())
                if len(ours[s]) > i and len(theirs[s]) > i
            ]
            if not pairs:
                cells.append("-")
                continue
            difference = np.concatenate([(a[3] - b[3]) / 4 for a, b in pairs])
            z = difference.mean() / max(difference.std(ddof=1) / len(difference) ** 0.5, 1e-9)
            p = math.erfc(abs(z) / math.sqrt(2))
            per_seed = [100 * (a[1] - b[1]) for a, b in pairs]
            spread = f"{min(per_seed):+.1f} to {max(per_seed):+.1f}"
            cells.append(f"{100 * difference.mean():+.1f} ({spread}; p {p:.1g})")
        print(f"| {level} | {method} - {rival} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--level", default="worded", choices=LEVELS)
    parser.add_argument("--method", default="online", choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=200_000, help="to sample at least")
    parser.add_argument("--split", default="test", choices=("test", "valid"))
    parser.add_argument("--tests", type=int, default=150, help="problems of it")
    parser.add_argument("--train_size", type=int, default=2000)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the method's settings"
    )
    parser.add_argument("--runs", default="runs/evidence")
    parser.add_argument("--out", default="tests/evidence.jsonl")
    parser.add_argument("--plot", help="draw evidence.png from these rows and print the table")
    args = parser.parse_args()
    if args.plot:
        plot(Path(args.plot))
    else:
        curve(args)
