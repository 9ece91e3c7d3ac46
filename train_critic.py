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

Departures from the paper, by default:
 1. A tenth of the problems, by hash of the id, never trains the critic: `critic.metrics.json` is
    about these. (--held_out TREES tests on others and trains on all.)
 2. A batch holds whole problems, whose states share their tokens' forward pass.
 3. The value head has a bias, which starts at the mean success: before the first step V is the
    constant predictor. --critic_model may be any language model; its own head is not used.

Beyond the paper, off by default:
 4. --states all trains on every node of the tree that goes on, leaves too, each weighted by its n: a
    leaf's one completion is a noisy target but an unbiased one, and there are many. --batch counts
    the nodes that train: at the paper's settings a problem has about 900 nodes, 120 of them
    labelled states, so give --batch 4096 for as many labelled states per step.
 5. --token_share 0.5 reads V at every token of a step for half of the loss: a small critic learns
    from that what a step's last token alone teaches slowly.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import LM, load_lm, step_values
from support.attention import pack_hidden
from support.cli import UserError, flag, main
from support.distributed import join, rank, shard, whole_state, world
from support.memory import require_memory
from support.packing import pack_trees, record_tree
from support.records import read_trees, replace, sha256
from support.report import critic_words
from support.scoring import score_trees
from support.stage import Output, stated_by, tokenizer_provenance
from support.stats import auc, calibration, siblings
from support.training import fit, whole_batches


@dataclass(frozen=True)
class Settings:
    trees: str = flag("trees.jsonl; those of earlier iterations before it, comma separated")
    critic_model: str = flag("what the critic starts from: a critic, or any language model")
    out: str = flag("critic folder to write")
    states: str = flag("labelled: the paper; all: every node that goes on, by its n", "labelled")
    held_out: str = flag("trees to test on; empty: a tenth of the problems, by hash of the id", "")
    token_share: float = flag(
        "share of the loss read at every token, not at a step's last", 0.0, most=1
    )
    lr: float = flag("peak learning rate", 5e-6, most=1)
    passes: int = flag("passes over the states", 1)
    batch: int = flag("trained nodes per optimiser step, in whole problems", 512)
    budget: int = flag("tokens per pack", 8192, least=256, may_change=True)
    save_minutes: float = flag("minutes between checkpoints", 15.0, may_change=True)
    offload: bool = flag("hold weights, gradients and moments in the host's memory", False)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the order of the problems", 0)
    force: bool = flag("throw an existing output away", False)


# ------------------------------------------------------------ a critic, and V of trees


def load_critic(path, train=False, dtype="", new: bool = False) -> tuple[LM, torch.nn.Linear]:
    """A decoder and its value head; new=True: a language model may become one, from a head of 0."""
    file = Path(path) / "value_head.safetensors"
    if not new and not file.exists():
        raise UserError(f"{path}: no value_head.safetensors, so no critic; run train_critic.py")
    lm = load_lm(path, train, dtype=dtype)
    value_head = torch.nn.Linear(lm.config.hidden_size, 1).to(lm.device)
    if file.exists():
        try:
            value_head.load_state_dict(load_file(file))
        except (RuntimeError, SafetensorError) as e:
            why = str(e).splitlines()[-1].strip()
            raise UserError(f"{file}: broken or of another model ({why})") from e
    else:
        torch.nn.init.zeros_(value_head.weight)
        torch.nn.init.zeros_(value_head.bias)
    return lm, value_head


def print_unknown(lm: LM, records: list[dict]):
    """Say that a critic with another tokenizer reads the trees' texts, and how much it can read."""
    tokens = [i for record in records for ids in record_tree(record, [], lm).ids for i in ids]
    other = f"{lm.path}: its tokenizer is not the actor's, so it reads the trees' texts"
    print(f"{other}; {lm.codec.unknown(tokens)} of {len(tokens)} tokens are unknown to it")


@torch.no_grad()
def tree_values(
    lm: LM, value_head, records: list[dict], retokenise: bool, budget: int, kept=None
) -> list[list]:
    """V of every node of trees.jsonl lines, one pass over each tree; the reward where a step ended.

    kept: the scoring.Results of an earlier start, which need not be computed again.
    """
    trees = []
    for record in records:
        goes_on = [node["reward"] is None for node in record["nodes"]]
        trees.append(record_tree(record, goes_on, lm if retokenise else None))

    def score(pack):
        return torch.sigmoid(step_values(lm, value_head, pack))

    ids = [record["id"] for record in records]
    found = score_trees(score, trees, budget, f"{lm.path}: V", ids, 1, kept, lm.paths)
    values = []
    for record, numbers in zip(records, found):
        numbers = iter(numbers)
        rewards = [node["reward"] for node in record["nodes"]]
        values.append([next(numbers) if r is None else float(r) for r in rewards])
    return values


# ------------------------------------------------------------ A.3: the critic (eq. 15)


def value_loss(logit, target, weight):
    """Eq. 15, sum of weight * BCE(target, sigmoid(logit)), all (M,), soft targets in [0, 1].

    logit 0 (V = .5), target .75, weight 2 -> 2 * -(.75 log .5 + .25 log .5) = 2 * .6931 = 1.3863
    """
    bce = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return (weight * bce).sum()  # eq. 15


def training_nodes(record: dict, states: str = "labelled") -> list[bool]:
    """Which nodes train the critic: the states that A.2 completed; with --states all every one that
    goes on and that a draw came through."""
    chosen = []
    for node in record["nodes"]:
        known = node["reward"] is None and node["n"] > 0
        chosen.append(known and (states == "all" or node["labelled"]))
    return chosen


def split_by_hash(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """(training, held out): a tenth by the hash of the id, so a problem stays on its side in every
    iteration; of few problems, where that would be none, those with the smallest hash, on which a
    later iteration may train."""

    def place(record):
        return hashlib.sha256(str(record["id"]).encode()).digest()[0] % 10

    least = min(place(record) for record in records)
    training = [record for record in records if place(record) > least]
    return training, [record for record in records if place(record) == least]


def train(lm, value_head, records: list[dict], retokenise: bool, s: Settings, work: Path):
    """A.3: min_phi E_s BCE(MC(s), V_phi(s)), the mean over all states of an optimiser step."""
    trees = []
    for record in records:
        chosen = training_nodes(record, s.states)
        trees.append(record_tree(record, chosen, lm if retokenise else None))

    def make_packs(batch: list[int]) -> list[tuple]:
        """(pack, MC of its states, their weights in the mean) of each pack of a batch of problems."""
        items, total = [], 0
        for pack in pack_trees([trees[i] for i in batch], s.budget, 1, world(), lm.paths):
            states = [records[batch[t]]["nodes"][v] for t, v in pack.owner]
            target = torch.tensor([node["wins"] / node["n"] for node in states])  # MC(s)
            weight = torch.tensor([node["n"] if s.states == "all" else 1 for node in states])
            total += int(weight.sum())
            items.append((pack, target, weight))
        return [(pack, target, weight / total) for pack, target, weight in items]

    def loss(pack, target, weight):
        """The pack's share of the batch's mean loss, and no metrics of its own."""
        target, weight = target.to(lm.device), weight.to(lm.device)  # (M,)
        logit = value_head(pack_hidden(lm, pack).float())[:, 0]  # (N,), of V at every token
        of_states = value_loss(logit[pack.last], target, weight)  # V(s) at the state's last token
        if not s.token_share:
            return of_states, {}
        of_tokens = every_token_loss(logit, pack, target, weight)
        return (1 - s.token_share) * of_states + s.token_share * of_tokens, {}

    sizes = [sum(tree.score) for tree in trees]
    batches = whole_batches(sizes, s.batch, s.passes, f"critic {s.seed}")
    ids = lambda batch: [records[i]["id"] for i in batch]
    modules = {"model": lm.model, "head": value_head}
    fit(modules, batches, make_packs, loss, work, s.lr, s.save_minutes, ids)


# ------------------------------------------------------------ beyond the paper (off by default)


def every_token_loss(logit, pack, target, weight):
    """--token_share: eq. 15 with V read at every token of a step, not at its last one alone.

    logit (N,) of V at every token; target, weight (M,): MC of each scored node, and its weight.

    A token's target is the MC of the state that its step leads to, its weight the state's divided by
    the step's length. Inside a step that is no estimate of anything, only help in learning: of steps
    that begin alike short ones weigh more, and those that end the response not at all. The prompt
    is the root's step; its first token knows nothing and is left out.
    """
    token = ((pack.node >= 0) & (pack.pos > 0)).nonzero()[:, 0]
    node = pack.node[token]
    length = torch.bincount(node, minlength=len(target)).to(logit.device)
    return value_loss(logit[token], target[node], (weight / length)[node])


# ------------------------------------------------------------ how good it is


def measure(
    lm, value_head, records: list[dict], retokenise: bool, budget: int, constant: float
) -> dict:
    """How good V is on labelled states of problems that it was not trained on."""
    value = tree_values(lm, value_head, records, retokenise, budget)
    v, mc = [], []
    for record, values in zip(records, value):
        for node, x in zip(record["nodes"], values):
            if node["labelled"] and node["n"]:
                v.append(x)
                mc.append(node["wins"] / node["n"])
    v, mc = np.array(v), np.array(mc)

    def bce(p):
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return float(-(mc * np.log(p) + (1 - mc) * np.log(1 - p)).mean())

    error, bins = calibration(v, mc)
    in_order, pairs = siblings(records, value)
    return {
        "states": len(v),
        "bce": bce(v),
        "constant_bce": bce(np.full_like(v, constant)),
        "brier": float(((v - mc) ** 2).mean()),
        "auc": auc(v, mc),
        "calibration_error": error,
        "correlation": float(np.corrcoef(v, mc)[0, 1]) if v.std() * mc.std() else 0.0,
        "siblings": in_order,
        "sibling_pairs": pairs,
        "bins": bins,
    }


def stage(s: Settings):
    if s.states not in ("all", "labelled"):
        raise UserError(f"--states {s.states}: wanted all or labelled")
    paths = s.trees.split(",")
    records = [r for path in paths for r in read_trees(path)]
    inputs = {"critic_model": s.critic_model, **{f"trees{i or ''}": p for i, p in enumerate(paths)}}
    inputs |= {"held_out": s.held_out} if s.held_out else {}
    output = Output("train_critic.py", s.out, s, inputs)
    if output.complete:
        return
    join(s.offload)
    processes = require_memory(s.critic_model, s.budget, s.offload, records)
    lm, value_head = load_critic(s.critic_model, train=True, dtype=s.dtype, new=True)
    if lm.head is not lm.model.get_input_embeddings().weight:
        lm.head.requires_grad_(False)  # V does not use it
    lm.codec.date = output.date
    every = [*paths, s.held_out] if s.held_out else paths
    made = {(stated_by(path, "tokenizer"), stated_by(path, "step", "line")) for path in every}
    (tokenizer, step), *others = made
    with output.open({"trees": sha256(Path(paths[-1])), "step": step}) as out:
        if others or not tokenizer:
            wrong = "no manifest beside it, or made with different tokenizers or different --step"
            raise UserError(f"{s.trees}: {wrong}")
        retokenise = tokenizer != tokenizer_provenance(lm)["tokenizer"]
        if retokenise:
            print_unknown(lm, records)
        if s.held_out:
            training, testing = records, read_trees(s.held_out)
        else:
            training, testing = split_by_hash(records)
        if not training or not testing:
            raise UserError(
                f"{s.trees}: too few problems to hold some out; give more, or --held_out trees"
            )
        n = wins = 0
        for record in training:
            for node in record["nodes"]:
                if node["labelled"]:
                    n, wins = n + node["n"], wins + node["wins"]
        if not value_head.weight.any():  # a new head starts as the constant predictor
            torch.nn.init.constant_(value_head.bias, math.log((wins + 1) / (n - wins + 1)))
        shard(lm, value_head, s.offload, processes)
        out.write_manifest()
        train(lm, value_head, training, retokenise, s, out.work)
        metrics = measure(lm, value_head, testing, retokenise, s.budget, wins / n)
        print(f"A.3: {critic_words(metrics)}")

        def write(folder):
            lm.save(folder)
            state = whole_state(value_head)
            if rank() == 0:
                save_file(state, folder / "value_head.safetensors")

        if rank() == 0:
            text = json.dumps(metrics, indent=1)
            replace(Path(f"{s.out}.metrics.json"), lambda p: p.write_text(text))
        out.save(write)


if __name__ == "__main__":
    main(stage, Settings, __doc__)
