"""Stage B: the advantage of every candidate step (B.1), then the actor's log-ratio regressed on it
(B.2).

    python train_actor.py --actor runs/demo/base --trees runs/demo/iter1/trees.jsonl \\
        --critic runs/demo/iter1/critic --out runs/demo/iter1/actor

Reads:  trees.jsonl, the critic trained on it, and the actor that drew it (pi_ref).
Writes: OUT.advantages.jsonl, a line a problem, then OUT, an ordinary Hugging Face folder
    {"id": "demo/train/17", "states": [{"node": 0, "mean": 0.53, "gap": 0.41, "actions":
     [{"node": 1, "q": 0.66, "adv": 0.13, "logp_ref": -2.31}]}]}

B.1 holds critic and reference one after the other; B.2 holds the actor alone, with the stored
numbers.

Departures from the paper:
 1. --kappa K takes Q = (wins + K V) / (n + K): the completions' counts with the critic as a prior
    worth K of them. The paper's Q = V is --kappa inf, the default; --kappa 0 is raw Monte Carlo.
 2. A batch holds whole problems (their trees pack best), so all actions of a state share a batch as
    in appendix F.1.
 3. --kept_steps also trains on the kept responses' own steps that were never drawn: balanced
    choice makes many of them wrong, and their states are labelled anyway. They have no draw, so the
    mean of eq. 13 stays that of pi_ref's draws.
 4. --value_draws K counts V(s) as K more draws in the mean of eq. 13, so that a step whose state
    was drawn once has an advantage too; --by_draws weighs a pair by its draws, where the paper
    weighs all unique actions alike. Both are meant for label_steps.py --whole_draws.
 5. --likelihood W adds W / beta times the negative log-likelihood of each pair's step, weighted by
    the share of its draws that ended right (`likelihood_loss`): eq. 12 alone only moves what is
    better or worse than the rest of a state. (W / beta, since eq. 12's gradient begins as A / beta: W
    is measured against A.) So it takes the pairs of every state, and --gap is for eq. 12 only. Both
    are means over all pairs of the batch; those outside the gap count 0 in eq. 12. Iterative RPO
    (arXiv 2404.19733) adds such a term to DPO.
 6. --advantage outcome regresses whole responses on outcome minus mean instead: the baseline
    without steps.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from model import LM, step_advantages, step_logprobs
from support.cli import UserError, flag, main
from support.distributed import from_all, join, own_share, rank, shard
from support.memory import require_memory
from support.packing import BLOCK, pack_trees, record_tree
from support.records import dump, each_record, each_sample, read_trees, replace, sha256
from support.stage import Stage, fingerprint, read_manifest, tokenizer_facts
from support.training import fit, whole_batches
from train_critic import load_critic, tree_values


@dataclass(frozen=True)
class Settings:
    actor: str = flag("the policy that drew the trees: pi_ref, and where the actor starts")
    trees: str = flag("trees.jsonl (with --advantage outcome: samples.jsonl)")
    out: str = flag("actor folder to write")
    critic: str = flag("critic folder; not needed with --kappa 0 or outcome", "")
    kappa: float = flag("completions that the critic's opinion is worth; inf: Q = V", math.inf)
    advantage: str = flag("step: eq. 13; outcome: of whole responses", "step")
    kept_steps: bool = flag("train on kept responses' steps too, drawn or not", False)
    value_draws: float = flag("how many more draws V(s) is in the mean of eq. 13", 0.0)
    by_draws: bool = flag("a pair weighs as often as it was drawn, not each the same", False)
    likelihood: float = flag("weight of right steps' likelihood beside eq. 12", 0.0)
    gap: float = flag(
        "states with max A - min A (V(s) in it with --value_draws) below this: not in eq. 12", 0.1
    )
    may_stay: bool = flag("where there is nothing to train on, write the actor as it is", False)
    beta: float = flag("strength of the KL to pi_ref", 0.01)
    lr: float = flag("peak learning rate", 5e-7)
    passes: int = flag("passes over the pairs", 1)
    batch: int = flag("pairs an optimiser step, in whole problems", 2048)
    budget: int = flag("tokens a pack", 8192)
    save_minutes: float = flag("minutes between checkpoints", 15.0)
    offload: bool = flag("hold weights, gradients and moments in the host's memory", False)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the order of the problems", 0)
    force: bool = flag("throw an existing output away", False)


def actor_loss(logp, logp_ref, adv, beta: float):
    """Eq. 12 for each pair (M,): half the squared distance of the log-ratio to advantage / beta.

    adv .2, beta .1, logp -1.5, logp_ref -2 -> .5 * (2 - .5)^2 = 1.125
    """
    return 0.5 * (adv / beta - (logp - logp_ref)) ** 2  # eq. 12


def likelihood_loss(logp, success):
    """-success * log pi for each pair (M,): no part of the paper. success (M,): success_share.

    logp -1.5, success .5 -> .75
    """
    return -success * logp


def success_share(node: dict) -> float:
    """Of the draws from or through the state that this step leads to, the share that ended right;
    where the step ended the response, its reward."""
    return node["wins"] / max(1, node["n"]) if node["reward"] is None else node["reward"]


def action_values(record: dict, value: list[float] | None, kappa: float):
    """Q of every node (K,): its reward where the step ended the response, else V, counts or both.

    wins 3 of n 4, V .5: kappa inf -> .5, kappa 0 -> .75, kappa 4 -> (3 + 4 * .5) / (4 + 4) = .625
    """
    q = [0.0]  # the prompt is nobody's action
    for v, node in enumerate(record["nodes"][1:], 1):
        if node["reward"] is not None:
            q.append(float(node["reward"]))
        elif kappa == math.inf:
            q.append(value[v])
        else:
            prior = kappa * value[v] if kappa else 0.0
            q.append((node["wins"] + prior) / max(node["n"] + kappa, 1e-9))
    return torch.tensor(q, dtype=torch.float64)


def advantage_states(
    record: dict, q, gap: float, kept_steps=False, value=None, value_draws=0.0
) -> list[dict]:
    """B.1 for one tree: its states of at least this gap and their unique actions (eq. 13, app. F.1).

    q (K,): Q of every node; value: V of every node. Here it is decided which pairs there are, and
    with what advantage. With --likelihood all states are asked for (gap 0), since they train by it;
    which of them train by eq. 12 too `passes_gap` says.
    """
    nodes = record["nodes"]
    drawn = [v for v, node in enumerate(nodes) if node["draws"] > 0]
    states = sorted({nodes[v]["parent"] for v in drawn})  # those with a mean
    actions = drawn
    if kept_steps:
        actions = [v for v, node in enumerate(nodes) if node["parent"] in states]
    if not actions:
        return []
    parent = torch.tensor([states.index(nodes[v]["parent"]) for v in actions])
    draws = torch.tensor([nodes[v]["draws"] for v in actions])
    baseline = None
    if value_draws:
        baseline = torch.tensor([value[v] for v in states], dtype=q.dtype)
    adv, mean, gaps = step_advantages(q[actions], parent, draws, baseline, value_draws)
    chosen = []
    for i, state in enumerate(states):
        if not passes_gap(gaps[i], gap):
            continue
        line = {"node": state, "mean": rounded(mean[i]), "gap": rounded(gaps[i]), "actions": []}
        for j in (parent == i).nonzero()[:, 0].tolist():
            action = {"node": actions[j], "q": rounded(q[actions[j]]), "adv": rounded(adv[j])}
            line["actions"].append(action)
        chosen.append(line)
    return chosen


def passes_gap(gap, least: float) -> bool:
    """Do a state's advantages differ enough for eq. 12 (app. F.1)?"""
    return gap >= least - 1e-9  # .6 - .5 is .0999...


def rounded(x) -> float:
    """A number as advantages.jsonl holds it."""
    return round(float(x), 6)


def advantages(records: list[dict], values: list, s: Settings) -> list[dict]:
    """The lines of advantages.jsonl, still without logp_ref: of problems with a pair to train on."""
    lines, states, any_right = [], 0, False
    least = 0.0 if s.likelihood else s.gap
    for record, value in zip(records, values):
        q = action_values(record, value, s.kappa)
        found = advantage_states(record, q, least, s.kept_steps, value, s.value_draws)
        if found:
            line = {"id": record["id"], "states": found}
            lines.append(line)
            states += sum(passes_gap(state["gap"], s.gap) for state in found)
            any_right |= any(success_share(record["nodes"][a["node"]]) > 0 for a in pairs(line))
    in_eq12 = sum(len(pairs(line, s.gap)) for line in lines)
    more = sum(len(pairs(line)) for line in lines) - in_eq12
    also = f"; {more} pairs more for the likelihood" if s.likelihood else ""
    print(f"B.1: {states} states with gap >= {s.gap}, {in_eq12} pairs{also}")
    if states or (s.likelihood and any_right):
        return lines
    nothing = f"{s.trees}: no state's advantages differ by --gap {s.gap}"
    nothing += ", and no step ended right" if s.likelihood else ""
    if not s.may_stay:
        raise UserError(f"{nothing}; lower it, or label more; in small iterations --may_stay")
    print(f"{nothing}; the actor stays as it is")
    return []


def outcome_record(sample: dict) -> dict:
    """Whole responses as the actions of one state, for --advantage outcome."""
    root = {"parent": -1, "ids": [], "text": "", "draws": 0, "n": 0, "wins": 0, "reward": None}
    unique = {}
    for response in sample["responses"]:
        ids, reward = response["ids"], response["reward"]
        if ids:
            leaf = unique.setdefault(tuple(ids), root | {"parent": 0, "ids": ids, "reward": reward})
            leaf["draws"] += 1
            leaf["n"] += 1
            leaf["wins"] += reward
    nodes = [root, *unique.values()]
    return {"id": sample["id"], "prompt_ids": sample["prompt_ids"], "nodes": nodes}


def pairs(line: dict, gap: float = 0.0) -> list[dict]:
    """The actions of a line's states that pass the gap; of all states without one."""
    found = []
    for state in line["states"]:
        if passes_gap(state["gap"], gap):
            found += state["actions"]
    return found


def pair_tree(record: dict, line: dict):
    """The tree of a problem's pairs: exactly the actions are scored."""
    chosen = {action["node"] for action in pairs(line)}
    return record_tree(record, [v in chosen for v in range(len(record["nodes"]))])


def actions_by_node(lines: list[dict], gap: float = 0.0) -> list[dict[int, dict]]:
    return [{action["node"]: action for action in pairs(line, gap)} for line in lines]


@torch.no_grad()
def reference_logprobs(lm: LM, records: list[dict], lines: list[dict], budget: int):
    """log pi_ref(a | s) of every action, by B.2's kernel, dtype and layout: on the CPU ratios
    start at exactly 0."""
    trees = [pair_tree(record, line) for record, line in zip(records, lines)]
    actions, found = actions_by_node(lines), []
    for pack, is_used in own_share(pack_trees(trees, budget, align=BLOCK)):
        logp = step_logprobs(lm, pack).tolist()
        found += zip(pack.owner, logp) if is_used else ()
    for (t, v), logp in from_all(found):
        if not math.isfinite(logp):
            raise UserError(f"{lm.path}: log-prob is {logp} in problem {records[t]['id']}")
        actions[t][v]["logp_ref"] = logp


def train(lm: LM, records: list[dict], lines: list[dict], s: Settings, work: Path):
    """B.2: min_theta 1/2 E (A / beta - log pi_theta / pi_ref)^2 over the pairs."""
    trees = [pair_tree(record, line) for record, line in zip(records, lines)]
    actions, with_gap = actions_by_node(lines), actions_by_node(lines, s.gap)
    batches = whole_batches([len(a) for a in actions], s.batch, s.passes, f"actor {s.seed}")

    def weight(node) -> int:
        return max(1, node["draws"]) if s.by_draws else 1

    def make_packs(batch):
        total = 0  # of the whole batch's weights: the one normaliser of the step
        for i in batch:
            total += sum(weight(records[i]["nodes"][v]) for v in actions[i])
        items = []
        for pack in pack_trees([trees[i] for i in batch], s.budget, align=BLOCK):
            adv, logp_ref, part, success, in_eq12 = [], [], [], [], []  # part: of the weights
            for t, v in pack.owner:
                action, node = actions[batch[t]][v], records[batch[t]]["nodes"][v]
                adv.append(action["adv"])
                logp_ref.append(action["logp_ref"])
                part.append(weight(node) / total)
                success.append(success_share(node))
                in_eq12.append(float(v in with_gap[batch[t]]))
            items.append((pack, torch.tensor([adv, logp_ref, part, success, in_eq12])))
        return items

    def loss(pack, numbers):
        adv, logp_ref, part, success, in_eq12 = numbers.to(lm.device)  # (M,) each
        logp = step_logprobs(lm, pack)  # (M,)
        regression = (in_eq12 * part * actor_loss(logp, logp_ref, adv, s.beta)).sum()
        nll = (part * likelihood_loss(logp, success)).sum()
        ratio, up, down = (logp - logp_ref).detach(), in_eq12 * (adv > 0), in_eq12 * (adv <= 0)
        return regression + s.likelihood / s.beta * nll, {
            "do_nothing": 0.5 * (in_eq12 * part * (adv / s.beta) ** 2).sum(), "nll": nll.detach(),
            "ratio_up": (ratio * up).sum(), "pairs_up": up.sum(),
            "ratio_down": (ratio * down).sum(), "pairs_down": down.sum(),
        }  # fmt: skip

    ids = lambda batch: [lines[i]["id"] for i in batch]
    fit({"model": lm.model}, batches, make_packs, loss, work, s.lr, s.save_minutes, ids)


def stage(s: Settings):
    if s.advantage not in ("step", "outcome"):
        raise UserError(f"--advantage {s.advantage}: wanted step or outcome")
    by_steps = s.advantage == "step"
    if by_steps and s.kappa > 0 and not s.critic:
        raise UserError("--critic is missing; give one, or --kappa 0 for raw Monte Carlo values")
    if s.value_draws and not (by_steps and s.kappa > 0):
        raise UserError(f"--value_draws {s.value_draws} needs V: --advantage step and --kappa > 0")
    records = read_trees(s.trees) if by_steps else list(each_sample(s.trees))
    inputs = {"actor": s.actor, "trees": s.trees, **({"critic": s.critic} if s.critic else {})}
    out = Stage("train_actor.py", s.out, s, inputs)
    if out.complete:
        return
    join(s.offload)
    require_memory(s.actor, s.budget, s.offload)
    facts = tokenizer_facts(LM(s.actor, weights=False))
    out.begin(facts, {"actor": fingerprint(s.actor), "trees": sha256(Path(s.trees)), **facts})
    if not by_steps:
        records = [outcome_record(r) for r in records]

    # B.1, unless an earlier start came to its end
    table, lines = Path(f"{s.out}.advantages.jsonl"), None
    known = read_manifest(s.out).get("advantages")
    if known and table.exists() and sha256(table) == known:
        lines = list(each_record(table, may_be_empty=True))
    values = [None] * len(records)
    if lines is None and by_steps and s.kappa > 0:
        critic, value_head = load_critic(s.critic, dtype=s.dtype)
        retokenise = tokenizer_facts(critic)["tokenizer"] != facts["tokenizer"]
        values = tree_values(critic, value_head, records, retokenise, s.budget)
        del critic, value_head  # memory holds the critic and the actor one after the other
    lm = LM(s.actor, train=True, dtype=s.dtype)
    shard(lm, offload=s.offload)
    of_id = {record["id"]: record for record in records}
    if lines is None:
        lines = advantages(records, values, s)
        reference_logprobs(lm, [of_id[line["id"]] for line in lines], lines, s.budget)
        if rank() == 0:
            replace(table, lambda p: p.write_bytes(b"".join(dump(line) for line in lines)))
    if rank() == 0:
        out.manifest["advantages"] = sha256(table)
    out.start()

    # B.2
    train(lm, [of_id[line["id"]] for line in lines], lines, s, out.work)
    out.finish(lm.save)


if __name__ == "__main__":
    main(stage, Settings, __doc__)
