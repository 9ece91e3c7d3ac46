"""The paper's findings in small, by hand (about an hour a seed on one thread, and as long once for the wide critic):

    for s in 0 1 2; do python tests/bench_findings.py --seed $s --out tests/findings.jsonl; done
    python tests/bench_findings.py --table tests/findings.jsonl

One iteration of run.sh's RECIPE=paper on the *worded* problems of bench_evidence.py (100 problems, n1 8, n 4, m 4), then
one thing changed a row; whatever lies before the change is shared. A line of --out:
    {"row": "beta 0.1", "seed": 0, "greedy": 0.98, "t1": 0.62, "tokens": 351004, "correlation": 0.51, "siblings": 0.6,
     "sibling_pairs": 5}
correlation, siblings: the critic's, on held-out states of the row's own trees, so with the noise of its own m.
And of some rows what eq. 12 got (`regression_of`), on the pairs that it was trained on and on pairs of other problems:
    {"row": "beta 0.1", "seed": 0, "pairs": {"loss": 0.5, "asked": -1.8, "got": -1.5, "right": 0.3}, "held_out_pairs": ..}
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import support.embedded
import support.records

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_evidence import (
    LEVELS,
    OURS,
    PAPER,
    base_run,
    call,
    evaluate,
    mean_sd,
    online,
    read_rows,
)

import label_steps
import prepare
import sample
import train_actor
import train_critic
from model import LM
from support.attention import pack_hidden
from support.records import each_record, read_jsonl, sha256
from support.stage import read_manifest

CRITIC, ACTOR = PAPER["critic"], PAPER["actor"]
SAMPLE = "--n1 8 --n 4 --batch 512 --limit 100"
ACTORS = {  # rows that train the actor anew on the same trees with the same critic
    "the paper's recipe": ACTOR,
    "beta 0.2": ACTOR.replace("0.05", "0.2"),
    "beta 0.1": ACTOR.replace("0.05", "0.1"),
    "beta 0.025": ACTOR.replace("0.05", "0.025"),
    "kappa 4": f"{ACTOR} --kappa 4",
    "kappa 0: counts alone": f"{ACTOR} --kappa 0",
    "gap 0": f"{ACTOR} --gap 0",
    "gap 0.3": f"{ACTOR} --gap 0.3",
    "all draws in place of unique actions": f"{ACTOR} --by_draws",
    "kept steps too": f"{ACTOR} --kept_steps",
    "likelihood 1": f"{ACTOR} --likelihood 1",
    "kappa 4; beta 0.1": f"{ACTOR.replace('0.05', '0.1')} --kappa 4",
    "kappa 4; beta 0.025": f"{ACTOR.replace('0.05', '0.025')} --kappa 4",
    "kappa 0; beta 0.1": f"{ACTOR.replace('0.05', '0.1')} --kappa 0",
    "kappa 0; beta 0.025": f"{ACTOR.replace('0.05', '0.025')} --kappa 0",
    "half the rate": ACTOR.replace("1e-4", "5e-5"),
    "twice the rate": ACTOR.replace("1e-4", "2e-4"),
    "8 passes": ACTOR.replace("--passes 4", "--passes 8"),
    "batches of 64 pairs": ACTOR.replace("--batch 256", "--batch 64"),
}
CLIPS = {"targets within 1": 1.0, "targets within 2": 2.0}  # bounds of A / beta
BY_TOKEN = {  # beta where log-ratios are means over a step's tokens, 9 on average
    "log-ratios a token; beta 0.25": 0.25,
    "log-ratios a token; beta 0.5": 0.5,
    "log-ratios a token; beta 1": 1.0,
}
REGRESSIONS = [  # rows of which is told, too, what eq. 12 asks and gets
    "the paper's recipe", "beta 0.1", "beta 0.025", "half the rate", "twice the rate", "8 passes",
    "batches of 64 pairs", *CLIPS, *BY_TOKEN,
]  # fmt: skip
BOTH = f"{CRITIC} --states all --token_share 0.5"
CRITICS = {  # rows that train critic and actor anew on the same trees
    "critic: all states": f"{CRITIC} --states all",
    "critic: half of the loss at every token": f"{CRITIC} --token_share 0.5",
    "critic: both": BOTH,
}
LONGER = OURS["critic"].replace("--passes 2", "--passes 8")
LABELS = {  # rows that label the same samples anew: m completions; --kappa 4 in all of them
    "m 2; kappa 4": "--m 2",
    "m 8; kappa 4": "--m 8",
    "m 16; kappa 4": "--m 16",
    "whole draws; m 0; kappa 4": "--m 0 --whole_draws",
    "whole draws; m 4; kappa 4": "--m 4 --whole_draws",
}


def pair_loss(logit, target, weight, pack):
    """Sum over pairs of sibling states of (MC_i - MC_j) * -log sigmoid(logit_i - logit_j), MC_i > MC_j.

    logit, target, weight (M,): of the pack's states; a pair has the smaller weight of the two.
    """
    above = pack.prev[(pack.node >= 0) & (pack.node != pack.node[pack.prev])]  # parent's last token
    siblings = (above[:, None] == above) & (above >= 0)  # roots are not siblings
    better = siblings & (target[:, None] > target)
    i, j = better.nonzero(as_tuple=True)
    part = torch.minimum(weight[i], weight[j]) * (target[i] - target[j])
    return (part * F.softplus(logit[j] - logit[i])).sum()


def with_pair_loss():
    """Critics are trained with the loss on pairs of siblings beside eq. 15."""
    usual = train_critic.critic_loss

    def loss(lm, head, pack, target, weight, token_share):
        logit = head(pack_hidden(lm, pack).float())[pack.last, 0]
        pairs = pair_loss(logit, target, weight, pack)
        return usual(lm, head, pack, target, weight, token_share) + pairs

    return mock.patch.object(train_critic, "critic_loss", loss)


def with_clipped_targets(bound: float):
    """Eq. 12's targets A / beta are cut off at +-bound."""
    usual = train_actor.actor_loss

    def loss(logp, logp_ref, adv, beta):
        return usual(logp, logp_ref, adv.clamp(-bound * beta, bound * beta), beta)

    return mock.patch.object(train_actor, "actor_loss", loss)


def with_token_means():
    """A step's log-prob is the mean over its tokens, not the sum."""
    usual = train_actor.step_logprobs

    def logprobs(lm, pack):
        logp = usual(lm, pack)
        length = torch.bincount(pack.node[pack.node >= 0], minlength=len(logp))
        return logp / length.to(logp.device)

    return mock.patch.object(train_actor, "step_logprobs", logprobs)


def where_first_steps_lead():
    """Critics are trained on the states that Q is of, those that first steps lead to, alone."""

    def nodes(record, states):
        return [node["reward"] is None and node["draws"] > 0 for node in record["nodes"]]

    return mock.patch.object(train_critic, "training_nodes", nodes)


def rescaled(critic: Path, trees: Path):
    """V becomes sigmoid(a + b logit V), a and b fitted on the labelled states that it was not trained on."""
    usual = train_actor.tree_values
    _, held_out = train_critic.split_by_hash(support.records.read_trees(trees))
    logits, n, wins = [], [], []
    values = usual(*train_critic.load_critic(critic), held_out, False, 8192)
    for record, value in zip(held_out, values):
        for node, v in zip(record["nodes"], value):
            if node["labelled"] and node["n"]:
                logits.append(math.log(v / (1 - v)))
                n.append(node["n"])
                wins.append(node["wins"])
    x, n, wins = torch.tensor(logits), torch.tensor(n), torch.tensor(wins)
    target, weight = wins / n, n / n.sum()
    line = torch.tensor([0.0, 1.0], requires_grad=True)
    optimiser = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def step():
        optimiser.zero_grad()
        loss = train_critic.value_loss(line[0] + line[1] * x, target, weight)
        loss.backward()
        return loss

    optimiser.step(step)
    a, b = line.tolist()
    print(f"V rescaled: a {a:.3f}, b {b:.3f}", flush=True)

    def values(lm, head, records, retokenise, budget, kept=None):
        found = usual(lm, head, records, retokenise, budget)
        for record, value in zip(records, found):
            for v, node in enumerate(record["nodes"]):
                if node["reward"] is None:
                    logit = a + b * math.log(value[v] / (1 - value[v]))
                    value[v] = 1 / (1 + math.exp(-logit))
        return found

    return mock.patch.object(train_actor, "tree_values", values)


def half_of(trees: Path, which: int) -> Path:
    """Every other problem of the trees, as trees.jsonl with a manifest of its own."""
    half = trees.with_name(f"half{which}.jsonl")
    lines = trees.read_bytes().splitlines(keepends=True)
    half.write_bytes(b"".join(lines[which::2]))
    manifest = json.loads(Path(f"{trees}.manifest.json").read_text()) | {"output": sha256(half)}
    Path(f"{half}.manifest.json").write_text(json.dumps(manifest))
    return half


def cross_fitted(critics: list[Path]):
    """V of every other problem by the critic that has not seen it: critics[i] saw half i."""
    usual = train_actor.tree_values

    def values(lm, head, records, retokenise, budget, kept=None):
        found = [None] * len(records)
        for i, critic in enumerate(critics):
            other = slice(1 - i, None, 2)
            lm, head = train_critic.load_critic(critic)
            found[other] = usual(lm, head, records[other], retokenise, budget)
        return found

    return mock.patch.object(train_actor, "tree_values", values)


def wide_model(folder: Path) -> Path:
    """As the clean model, but of twice the width: 1.7M parameters in place of 0.5M."""
    flags = {"steps": "6-6", "wordings": 32, "clean_size": 48000, "clean_seed": 1}
    s = prepare.Settings(out=str(folder / "wide"), clean=str(folder / "wide"), **flags)
    wide = functools.partial(support.embedded.new_model, width=256)
    with mock.patch.object(prepare, "new_model", wide):
        prepare.clean_model(folder / "wide/work", support.embedded.TASKS["math"], s)
    return folder / "wide/math-6-6-32-48000-1"


def labels_where_unsure(critic: Path, low: float):
    """From now on only the states that the critic finds between low and 1 - low get completions."""
    usual, (lm, head) = label_steps.plant, train_critic.load_critic(critic)

    def plant(sampled, cut, whole_draws):
        tree = usual(sampled, cut, whole_draws)
        record = {"id": sampled["id"], "prompt_ids": tree.prompt_ids, "nodes": tree.nodes}
        (values,) = train_critic.tree_values(lm, head, [record], False, 8192)
        for v, value in enumerate(values):
            tree.to_label[v] &= low <= value <= 1 - low
        return tree

    return mock.patch.object(label_steps, "plant", plant)


def labels_by_bisection(trees: Path):
    """From now on only the states that a search for a wrong kept response's first wrong step visits,
    and the prompt, get completions.

    The search halves the response's states: where a completion was right the first wrong step comes
    later, else before. It reads the counts of trees, in which every kept state has completions, so
    the draws of the states that it visits, which the tree's own key fixes, are the same ones.
    """
    usual = label_steps.plant
    records = {record["id"]: record for record in support.records.read_trees(trees)}

    def plant(sampled, cut, whole_draws):
        tree, visited = usual(sampled, cut, whole_draws), {0}
        nodes = records[sampled["id"]]["nodes"]  # numbered as the tree's, new ones behind those
        for k in sampled["kept"]:
            response = sampled["responses"][k]
            if response["reward"] == 1:
                continue
            states, begin = [0], 0
            for end in response["ends"][:-1]:
                states.append(tree.child[states[-1], tuple(response["ids"][begin:end])])
                begin = end
            # states[low] was right at times, or is the prompt; what comes at states[high] is wrong
            low, high = 0, len(states)
            while high - low > 1:
                middle = (low + high) // 2
                visited.add(states[middle])
                if nodes[states[middle]]["wins"] > 0:
                    low = middle
                else:
                    high = middle
        for v in range(len(tree.nodes)):
            tree.to_label[v] &= v in visited
        return tree

    return mock.patch.object(label_steps, "plant", plant)


def regression_of(actor: Path, base: Path, records: list[dict], lines: list[dict], beta: float):
    """What eq. 12 asks of the pairs in lines of advantages.jsonl, and what the actor got.

    -> {"loss": share of doing nothing's, "asked", "got": mean log-ratio of steps with A <= 0,
    "right": of those with A > 0}
    """
    logp = []
    for path in (base, actor):
        train_actor.reference_logprobs(LM(path), records, lines, 8192)
        actions = [action for line in lines for action in train_actor.pairs(line)]
        logp.append(torch.tensor([action["logp_ref"] for action in actions]))
    adv = torch.tensor([action["adv"] for action in actions])
    ratio, down = logp[1] - logp[0], adv <= 0
    loss = train_actor.actor_loss(logp[1], logp[0], adv, beta).mean()
    nothing = train_actor.actor_loss(logp[0], logp[0], adv, beta).mean()
    numbers = {"loss": loss / nothing, "asked": (adv[down] / beta).mean()}
    numbers |= {"got": ratio[down].mean(), "right": ratio[~down].mean()}
    return {name: round(float(number), 3) for name, number in numbers.items()}


def pairs_of(critic: Path, trees: Path) -> tuple[list[dict], list[dict]]:
    """The problems of trees that have a pair to train on, and their lines of advantages.jsonl, by
    the paper's Q = V and gap."""
    records = support.records.read_trees(trees)
    values = train_actor.tree_values(*train_critic.load_critic(critic), records, False, 8192)
    s = train_actor.Settings(actor="", trees=str(trees), out="")
    lines = train_actor.advantages(records, values, s)
    known = {record["id"]: record for record in records}
    return [known[line["id"]] for line in lines], lines


def regressions(work: Path, base: Path, out: Path, seed: int):
    """A line of --out for each of REGRESSIONS: its eq. 12 on its pairs, and on those of other problems."""
    known = {line["row"] for line in read_rows(out) if "pairs" in line and line["seed"] == seed}
    missing = [name for name in REGRESSIONS if name not in known]
    if not missing:
        return
    first, pairs = work / "the paper's recipe", {}
    for kind, at in (("pairs", first), ("held_out_pairs", work / "held out")):
        pairs[kind] = pairs_of(first / "critic", at / "trees.jsonl")
    for name in missing:
        actor, line = work / name / "actor", {"row": name, "seed": seed}
        beta = read_manifest(actor)["settings"]["beta"]
        with with_token_means() if name in BY_TOKEN else contextlib.nullcontext():
            for kind, (records, lines) in pairs.items():
                line[kind] = regression_of(actor, base, records, lines, beta)
        add(out, line)


def add(out: Path, line: dict):
    with out.open("a") as f:
        f.write(json.dumps(line) + "\n")
    print(line, flush=True)


def main(args):
    folder, max_new = Path(args.runs), LEVELS["worded"][1]
    length, work = f" --max_new {max_new}", folder / "findings" / str(args.seed)
    run = base_run(folder, "worded", args.seed)
    test, out = read_jsonl(run / "test.jsonl")[:150], Path(args.out)
    there = {(row["row"], row["seed"]) for row in (read_rows(out) if out.exists() else [])}
    base = {"actor": run / "base"}
    labelled = base | {"problems": run / "train.jsonl", "samples": work / "samples.jsonl"}
    seed = f" --seed {args.seed}"

    def draw(name: str, label: str, actor=None, some="") -> int:
        """Samples and trees of a row, samples of its own with `actor`; -> tokens drawn."""
        given = labelled | ({"actor": actor} if actor else {})
        if actor:
            given["samples"] = work / name / "samples.jsonl"
        problems = {k: v for k, v in given.items() if k != "samples"}
        call(sample, SAMPLE + some + length + seed, **problems, out=given["samples"])
        trees = work / name / "trees.jsonl"
        call(label_steps, f"{label} --batch 512" + length + seed, **given, out=trees)
        tokens = sum(record["tokens"] for record in each_record(trees))
        for record in each_record(given["samples"]):
            tokens += sum(len(response["ids"]) for response in record["responses"])
        return tokens

    def row(name, at: str, critic: str, actor: str, tokens: int, start=None, critic_model=None,
            of="the paper's recipe"):  # fmt: skip
        """Critic of folder `at`, or without flags the one of row `of`; actor, evaluation and a line
        of --out."""
        if (name, args.seed) in there:
            return
        trees, made, trained = work / at / "trees.jsonl", work / name / "critic", work / name
        if critic:
            model = critic_model or run / "base"
            call(train_critic, critic + seed, trees=trees, critic_model=model, out=made)
        else:
            made = work / of / "critic"
        call(train_actor, actor + seed, actor=start or run / "base", trees=trees, critic=made,
             out=trained / "actor")  # fmt: skip
        measured = json.loads(Path(f"{made}.metrics.json").read_text())
        greedy, rights = evaluate(LM(trained / "actor"), test, max_new)
        line = {"row": name, "seed": args.seed, "greedy": round(greedy, 4)}
        line |= {"t1": round(sum(rights) / 4 / len(test), 4), "tokens": tokens}
        for key in ("correlation", "siblings", "sibling_pairs"):  # None: there was no pair
            line[key] = None if measured[key] is None else round(measured[key], 3)
        add(out, line)

    first = "the paper's recipe"
    tokens = draw(first, "--m 4")
    for name, flags in ACTORS.items():
        row(name, first, CRITIC if name == first else "", flags, tokens)
    for name, bound in CLIPS.items():
        with with_clipped_targets(bound):
            row(name, first, "", ACTOR, tokens)
    for name, beta in BY_TOKEN.items():
        with with_token_means():
            row(name, first, "", ACTOR.replace("0.05", str(beta)), tokens)
    for name, flags in CRITICS.items():
        row(name, first, flags, ACTOR, tokens)
    with where_first_steps_lead():
        row("critic: where first steps lead alone", first, CRITIC, ACTOR, tokens)
    with_counts = f"{ACTOR} --kappa 4"
    row("critic: both; kappa 4", first, "", with_counts, tokens, of="critic: both")
    name = "critic: both, and pairs of siblings"
    with with_pair_loss():
        row(name, first, BOTH, ACTOR, tokens)
    row(f"{name}; kappa 4", first, "", with_counts, tokens, of=name)
    of, names = "critic: both", {"critic: both": ACTOR, "critic: both; kappa 4": with_counts}
    names = {f"{name}; V rescaled on held-out problems": flags for name, flags in names.items()}
    if any((name, args.seed) not in there for name in names):
        with rescaled(work / of / "critic", work / first / "trees.jsonl"):
            for name, flags in names.items():
                row(name, first, "", flags, tokens, of=of)
    name = "critic: both; kappa 4; m 4 where a bisection asks"
    if (name, args.seed) not in there:
        with labels_by_bisection(work / first / "trees.jsonl"):
            fewer = draw(name, "--m 4")
        row(name, name, BOTH, with_counts, fewer)
    name = "critic: both; kappa 4; cross-fitted by halves"
    if (name, args.seed) not in there:
        trees, halves = work / first / "trees.jsonl", []
        for i in (0, 1):
            halves.append(work / name / f"critic{i}")
            call(train_critic, BOTH + seed, trees=half_of(trees, i), held_out=half_of(trees, 1 - i),
                 critic_model=run / "base", out=halves[i])  # fmt: skip
        with cross_fitted(halves):
            row(name, first, "", with_counts, tokens, of="critic: both")
    clean = next(path for path in (folder / "clean").iterdir() if path.name.startswith("math-6-6"))
    name = "critic from another model (the clean one)"
    row(name, first, CRITIC, ACTOR, tokens, critic_model=clean)
    wide, name = wide_model(folder), "critic of twice the width"
    row(name, first, CRITIC, ACTOR, tokens, critic_model=wide)
    name = f"{name}: both"
    row(name, first, BOTH, ACTOR, tokens, critic_model=wide)
    row(f"{name}; kappa 4", first, "", with_counts, tokens, of=name)
    for name, flags in LABELS.items():
        if (name, args.seed) not in there:
            row(name, name, LONGER, with_counts, draw(name, flags))
    for low in (0.1, 0.2):
        name = f"whole draws; m 4 where the critic of m 0 says {low} to {1 - low}; kappa 4"
        if (name, args.seed) not in there:
            with labels_where_unsure(work / "whole draws; m 0; kappa 4/critic", low):
                tokens = draw(name, "--m 4 --whole_draws")
            row(name, name, LONGER, with_counts, tokens)
    draw("held out", "--m 4", run / "base", " --first 100 --limit 20")
    regressions(work, run / "base", out, args.seed)
    # An actor that GRPO has trained, as the start of an iteration.
    grpo, name = work / "grpo", "GRPO base"
    if (name, args.seed) in there:
        return
    lm = LM(run / "base", train=True)
    for spent, _ in online(
        lm, read_jsonl(run / "train.jsonl")[200:], max_new, args.seed, False, 2, 4, 2e-4
    ):
        if spent >= 12_500:
            break
    lm.save(grpo)
    greedy, rights = evaluate(lm, test, max_new)
    before = {"row": "GRPO base, before", "seed": args.seed, "greedy": round(greedy, 4)}
    before |= {"t1": round(sum(rights) / 4 / len(test), 4), "tokens": spent}
    add(out, before)
    row(name, name, CRITIC, ACTOR, draw(name, "--m 4", actor=grpo), start=grpo)


def table(path: Path):
    rows, regression = {}, {}
    for line in read_rows(path):
        kind = regression if "pairs" in line else rows
        kind.setdefault(line["row"], []).append(line)
    print(
        "| one thing changed | seeds | tokens | greedy | T = 1 | points more than the first row, by seed "
        "| critic's correlation | siblings |"
    )
    print("| --- " * 8 + "|")
    first = {line["seed"]: line["t1"] for line in rows["the paper's recipe"]}
    for name, lines in rows.items():
        cells = [name, str(len(lines)), f"{np.mean([line['tokens'] for line in lines]):,.0f}"]
        for key in ("greedy", "t1"):
            cells.append(mean_sd([line[key] for line in lines], 100, 1))
        gains = [100 * (line["t1"] - first[line["seed"]]) for line in lines]
        cells.append(", ".join(f"{gain:+.1f}" for gain in gains))
        known = [line["correlation"] for line in lines if "correlation" in line]
        cells.append(f"{np.mean(known):.2f}" if known else "")
        pairs = sum(line.get("sibling_pairs", 0) for line in lines)
        right = sum(
            line["siblings"] * line["sibling_pairs"] for line in lines if line.get("siblings")
        )
        cells.append(f"{right / pairs:.2f} of {pairs}" if pairs else "")
        print(f"| {' | '.join(cells)} |")
    print(
        "\n| one thing changed | T = 1 | loss of doing nothing's, trained pairs | asked | got "
        "| of steps with A > 0 | other problems: loss | asked | got | of steps with A > 0 |"
    )
    print("| --- " * 10 + "|")
    for name, lines in regression.items():
        cells = [name, f"{100 * np.mean([line['t1'] for line in rows[name]]):.1f}"]
        for kind in ("pairs", "held_out_pairs"):
            for key in ("loss", "asked", "got", "right"):
                cells.append(f"{np.mean([line[kind][key] for line in lines]):.2f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="runs/evidence")
    parser.add_argument("--out", default="tests/findings.jsonl")
    parser.add_argument("--table", help="print the table of these rows")
    args = parser.parse_args()
    if args.table:
        table(Path(args.table))
    else:
        main(args)
