"""Stage A.3: train the critic V(s) on the trees' success counts (eq. 15).

    python train_critic.py --trees runs/demo/iter1/trees.jsonl --critic_model runs/demo/base \\
        --out runs/demo/iter1/critic

Reads:  trees.jsonl of one or more iterations, and the model that the critic starts from (the last
critic, or any LM).
Writes: critic/, an ordinary model folder with value_head.safetensors beside the weights, and
critic.metrics.json
    {"states": 412, "bce": 0.41, "constant_bce": 0.66, "brier": 0.13, "auc": 0.89,
     "calibration_error": 0.03, "correlation": 0.81, "siblings": 0.86, "sibling_pairs": 901}

min_phi E_s BCE(MC(s), V_phi(s)) with soft targets MC(s) = wins / n.

Departures from the paper:
 1. --states all (the default) trains on every node of the tree that goes on, leaves too, each
    weighted by its n: a leaf's one completion is a noisy target but an unbiased one, and there are
    many. --states labelled is the paper.
 2. Half of the loss reads V at every token of a step (`critic_loss`): a small critic learns from
    that what a step's last token alone teaches slowly. --token_share 0 is the paper.
 3. Small models need more than one pass over the states; --passes 1 is the paper.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import (
    UserError,
    fit,
    flag,
    load_critic,
    pack_hidden,
    pack_trees,
    record_tree,
    replace,
    tree_values,
    whole_batches,
)
from prepare import Stage, main, read_manifest, read_trees, sha256, tokenizer_facts


@dataclass(frozen=True)
class Settings:
    trees: str = flag("trees.jsonl; several, comma separated, train on earlier iterations too")
    critic_model: str = flag("what the critic starts from: a critic, or any language model")
    out: str = flag("critic folder to write")
    states: str = flag("all: every node that goes on, weighted by n; labelled: the paper", "all")
    held_out: str = flag("trees to test on; empty: a tenth of the problems, by hash of the id", "")
    token_share: float = flag("share of the loss read at every token; 0: the paper", 0.5)
    lr: float = flag("peak learning rate", 5e-6)
    passes: int = flag("passes over the states", 1)
    batch: int = flag("states an optimiser step, in whole problems", 512)
    budget: int = flag("tokens a pack", 8192)
    save_every: int = flag("steps between checkpoints", 100)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the order of the problems", 0)
    force: bool = flag("throw an existing output away", False)


def value_loss(logit, target, weight):
    """Eq. 15, sum of weight * BCE(target, sigmoid(logit)), all (M,), soft targets in [0, 1].

    logit 0 (V = .5), target .75, weight 2 -> 2 * -(.75 log .5 + .25 log .5) = 2 * .6931 = 1.3863
    """
    return (
        weight * F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    ).sum()  # eq. 15


def training_nodes(record: dict, states: str) -> list[bool]:
    """Which nodes train the critic: states that go on and were completed at least once."""
    return [
        n["reward"] is None and n["n"] > 0 and (states == "all" or n["labelled"])
        for n in record["nodes"]
    ]


def held_out_by_hash(problem_id: str) -> bool:
    return hashlib.sha256(str(problem_id).encode()).digest()[0] % 10 == 0


def critic_loss(lm, head, pack, target, weight, token_share: float):
    """Eq. 15 on one pack: V read at each state's last token and, token_share of it, at every token.

    A token's target is the MC of the state that its step leads to. Inside a step it only helps to
    learn: where steps begin alike, short ones and topped-up states weigh more, and ends nothing.
    """
    logit = head(pack_hidden(lm, pack).float())[:, 0]  # (N,)
    target, weight = target.to(logit.device), weight.to(logit.device)
    loss = (1 - token_share) * value_loss(logit[pack.last], target, weight)
    if token_share:
        token = ((pack.node >= 0) & (pack.pos > 0)).nonzero()[:, 0]
        node = pack.node[token]
        length = torch.bincount(node, minlength=len(target)).to(logit.device)
        each = (weight / length)[node]
        loss = loss + token_share * value_loss(logit[token], target[node], each)
    return loss


def train(lm, head, records: list[dict], retokenise: bool, s: Settings, work: Path):
    trees = [
        record_tree(r, training_nodes(r, s.states), lm if retokenise else None) for r in records
    ]

    def prepare(batch):
        packs = pack_trees([trees[i] for i in batch], s.budget)
        nodes = [[records[batch[t]]["nodes"][v] for t, v in pack.owner] for pack in packs]
        weight = [[n["n"] if s.states == "all" else 1 for n in row] for row in nodes]
        total = sum(map(sum, weight))  # over the whole batch: the one normaliser
        return [
            (pack, torch.tensor([n["wins"] / n["n"] for n in row]), torch.tensor(w) / total)
            for pack, row, w in zip(packs, nodes, weight)
        ]

    def loss(pack, target, weight):
        return critic_loss(lm, head, pack, target, weight, s.token_share), {}

    counts = [sum(tree.score) for tree in trees]
    batches = whole_batches(counts, s.batch, s.passes, f"critic {s.seed}")
    ids = lambda batch: [records[i]["id"] for i in batch]
    fit({"model": lm.model, "head": head}, batches, prepare, loss, work, s.lr, s.save_every, ids)


def measure(lm, head, records: list[dict], retokenise: bool, budget: int, constant: float) -> dict:
    """How good V is on labelled states of problems that it was not trained on.

    siblings: of the pairs of actions of one state whose MC differ by at least 0.5 (n >= 4, or an
    end), the share that V (at an end: the reward) puts in the right order; 0.5 is chance.
    """
    value = tree_values(lm, head, records, retokenise, budget)
    states = [
        (value[t][v], n["wins"] / n["n"])
        for t, r in enumerate(records)
        for v, n in enumerate(r["nodes"])
        if n["labelled"]
    ]
    v, mc = np.array(states).T

    def bce(p):
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return float(-(mc * np.log(p) + (1 - mc) * np.log(1 - p)).mean())

    bins = np.minimum((v * 10).astype(int), 9)
    groups = [(v[bins == b], mc[bins == b]) for b in range(10)]
    calibration = sum(abs(x.sum() - y.sum()) for x, y in groups) / len(v)
    table = [
        {"states": len(x), "value": float(x.mean()), "mc": float(y.mean())}
        for x, y in groups if len(x)
    ]  # fmt: skip
    losses, rank = 1 - mc, np.unique(v, return_inverse=True)[1]
    rivals = mc.sum() * losses.sum() - (mc * losses).sum()
    tied = np.bincount(rank, losses)
    # failures that V ranks lower than each state; a tie is half of one
    below = (np.cumsum(tied) - tied / 2)[rank] - losses / 2
    auc = (mc * below).sum() / rivals if rivals > 0 else 0.5
    pairs, right = 0, 0.0
    for t, r in enumerate(records):
        kids = {}
        for i, n in enumerate(r["nodes"][1:], 1):
            if n["n"] >= 4 or (n["reward"] is not None and n["n"]):
                kids.setdefault(n["parent"], []).append((n["wins"] / n["n"], value[t][i]))
        for group in kids.values():
            for i, (a, va) in enumerate(group):
                for b, vb in group[:i]:
                    if abs(a - b) >= 0.5:
                        pairs += 1
                        right += 0.5 if va == vb else (a > b) == (va > vb)
    return {
        "states": len(v),
        "bce": bce(v),
        "constant_bce": bce(np.full_like(v, constant)),
        "brier": float(((v - mc) ** 2).mean()),
        "auc": float(auc),
        "calibration_error": float(calibration),
        "correlation": float(np.corrcoef(v, mc)[0, 1]) if v.std() * mc.std() else 0.0,
        "siblings": float(right / max(1, pairs)),
        "sibling_pairs": pairs,
        "bins": table,
    }


def stage(s: Settings):
    if s.token_share > 1:
        raise UserError(f"--token_share {s.token_share}: wanted a share from 0 to 1")
    if s.states not in ("all", "labelled"):
        raise UserError(f"--states {s.states}: wanted all or labelled")
    paths = s.trees.split(",")
    records = [r for path in paths for r in read_trees(path)]
    inputs = {"critic_model": s.critic_model, **{f"trees{i or ''}": p for i, p in enumerate(paths)}}
    inputs |= {"held_out": s.held_out} if s.held_out else {}
    out = Stage(s.out, s, inputs)
    if out.complete:
        return
    lm, head = load_critic(s.critic_model, train=True, dtype=s.dtype)
    out.begin({"trees": sha256(Path(paths[-1]))})
    made = {read_manifest(path).get("facts", {}).get("tokenizer") for path in paths}
    if None in made or len(made) > 1:
        raise UserError(f"{s.trees}: no manifest beside it, or made with different tokenizers")
    retokenise = made != {tokenizer_facts(lm)["tokenizer"]}
    if s.held_out:
        training, testing = records, read_trees(s.held_out)
    else:
        training = [r for r in records if not held_out_by_hash(r["id"])]
        testing = [r for r in records if held_out_by_hash(r["id"])]
    if not training or not testing:
        raise UserError(
            f"{s.trees}: too few problems to hold some out; give more, or --held_out trees"
        )
    n, wins = map(
        sum, zip(*((x["n"], x["wins"]) for r in training for x in r["nodes"] if x["labelled"]))
    )
    if not head.weight.any():  # a new head starts as the constant predictor
        torch.nn.init.constant_(head.bias, math.log((wins + 1) / (n - wins + 1)))
    train(lm, head, training, retokenise, s, out.work)
    metrics = measure(lm, head, testing, retokenise, s.budget, wins / n)
    print(json.dumps({k: round(v, 4) for k, v in metrics.items() if k != "bins"}))

    def write(folder):
        lm.save(folder)
        save_file(head.state_dict(), folder / "value_head.safetensors")

    replace(Path(f"{s.out}.metrics.json"), lambda p: p.write_text(json.dumps(metrics, indent=1)))
    out.finish(write)


if __name__ == "__main__":
    main(stage, Settings, __doc__)
