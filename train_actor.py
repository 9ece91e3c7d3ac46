"""Stage B: the advantage of every candidate step (B.1), then the actor's log-ratio regressed on it
(B.2).

    python train_actor.py --actor runs/demo/base --trees runs/demo/iter1/trees.jsonl \\
        --critic runs/demo/iter1/critic --out runs/demo/iter1/actor

Reads:  trees.jsonl, the critic trained on it, and the actor that drew it (pi_ref).
Writes: OUT.advantages.jsonl, a line per problem, then OUT, an ordinary Hugging Face folder
    {"id": "demo/train/17", "states": [{"node": 0, "mean": 0.53, "gap": 0.41, "actions":
     [{"node": 1, "q": 0.66, "adv": 0.13, "logp_ref": -2.31}]}]}

B.1 has the critic in memory first, then pi_ref; B.2 has the actor alone, and what B.1 stored.

Departures from the paper, by default:
 1. A batch holds whole problems (their trees pack best), so that all actions of a state share a
    batch as in appendix F.1. They need not share a pack: a tree above --budget is cut, so a loss over
    siblings has to raise --budget above the largest tree.

Beyond the paper, off by default:
 2. --kappa K takes Q = (wins + K V) / (n + K): the completions' counts, with the critic as a prior
    that is worth K completions. The paper's Q = V is --kappa inf; --kappa 0 is raw Monte Carlo.
 3. --value_draws K counts V(s) as K more draws in the mean of eq. 13, so that a step has an
    advantage even where it was drawn once and alone. It is meant for label_steps.py --whole_draws.
 4. --by_draws weighs a pair in eq. 12 by its draws, where the paper weighs all unique actions alike.
 5. --likelihood W adds W / beta times the negative log-likelihood of each pair's step, weighted by
    the share of its draws that ended right. Eq. 12 alone only moves what is better or worse than
    the rest of a state; so this term takes the pairs of every state, and --gap is for eq. 12 only.
    (W / beta, since eq. 12's gradient begins as A / beta: W is measured against A.) Iterative RPO
    (arXiv 2404.19733) adds such a term to DPO.
"""

import gc
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from model import LM, load_lm, step_advantages, step_logprobs
from support.cli import UserError, flag, main
from support.distributed import join, rank, shard, world
from support.memory import require_memory
from support.packing import BLOCK, pack_trees, record_tree
from support.records import digest, dump, each_record, read_trees, replace, sha256
from support.report import actor_words, pairs_words, problem_words, trained_tree
from support.scoring import Results, score_trees
from support.stage import Output, fingerprint, read_manifest, stated_by, tokenizer_provenance
from support.training import fit, whole_batches
from train_critic import load_critic, print_unknown, tree_values


@dataclass(frozen=True)
class Settings:
    actor: str = flag("the policy that drew the trees: pi_ref, and where the actor starts")
    trees: str = flag("trees.jsonl from label_steps.py")
    out: str = flag("actor folder to write")
    critic: str = flag("critic folder; not needed with --kappa 0", "")
    beta: float = flag("of eq. 12, the pull to pi_ref: a smaller one asks for more", 0.01)
    gap: float = flag("eq. 12 leaves out states with max A - min A below this", 0.1, least=0)
    lr: float = flag("peak learning rate", 5e-7, most=1)
    passes: int = flag("passes over the pairs", 1)
    batch: int = flag("pairs per optimiser step, in whole problems", 2048)
    kappa: float = flag(
        "completions that the critic's opinion is worth; inf: Q = V", math.inf, least=0
    )
    value_draws: float = flag("how many more draws V(s) is in the mean of eq. 13", 0.0)
    likelihood: float = flag("weight of right steps' likelihood beside eq. 12", 0.0)
    by_draws: bool = flag("a pair weighs as often as it was drawn, not each the same", False)
    may_stay: bool = flag("where there is nothing to train on, write the actor as it is", False)
    budget: int = flag("tokens per pack", 8192, least=256, may_change=True)
    save_minutes: float = flag("minutes between checkpoints", 15.0, may_change=True)
    offload: bool = flag("hold weights, gradients and moments in the host's memory", False)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the order of the problems", 0)
    force: bool = flag("throw an existing output away", False)


# ------------------------------------------------------------ B.1: advantages (eq. 13, appendix F.1)


def action_values(record: dict, value: list[float]) -> torch.Tensor:
    """Q(s, a) = r(s, a) + V(s∘a) of every node's step (K,), float64: the reward where the step ended
    the response, else V of the state that it leads to. value: V of every node."""
    q = [0.0]  # node 0 is the prompt, which is nobody's action
    for node, v in zip(record["nodes"][1:], value[1:]):
        q.append(float(v if node["reward"] is None else node["reward"]))
    return torch.tensor(q, dtype=torch.float64)


def advantage_states(
    record: dict, q: torch.Tensor, gap: float, value=None, value_draws=0.0
) -> list[dict]:
    """The states of one tree and their unique actions with their advantages: a `states` list of
    advantages.jsonl, still without logp_ref. States with max A - min A below `gap` are left out.

    q (K,): Q of every node. The actions of a state are the different steps that completions began
    with there; each is one pair, and the mean counts it as often as it was drawn.
    """
    nodes = record["nodes"]
    actions = [v for v, node in enumerate(nodes) if node["draws"] > 0]
    if not actions:
        return []
    states = sorted({nodes[v]["parent"] for v in actions})
    row_of = {state: row for row, state in enumerate(states)}
    parent = torch.tensor([row_of[nodes[v]["parent"]] for v in actions])  # (M,)
    draws = torch.tensor([nodes[v]["draws"] for v in actions])  # (M,)
    if value_draws:
        baseline = torch.tensor([value[v] for v in states], dtype=q.dtype)  # (S,)
        adv, mean, gaps = value_in_the_mean(q[actions], parent, draws, baseline, value_draws)
    else:
        adv, mean, gaps = step_advantages(q[actions], parent, draws)  # eq. 13
    passing = {}  # the states that pass the gap
    for s, m, g in zip(states, mean, gaps):
        if passes_gap(g, gap):
            passing[s] = {"node": s, "mean": rounded(m), "gap": rounded(g), "actions": []}
    for v, a in zip(actions, adv):
        if state := passing.get(nodes[v]["parent"]):
            state["actions"].append({"node": v, "q": rounded(q[v]), "adv": rounded(a)})
    return list(passing.values())


def passes_gap(gap, least: float) -> bool:
    """Do a state's advantages differ enough for eq. 12 (appendix F.1)?"""
    return gap >= least - 1e-9  # .6 - .5 is .0999...


def rounded(x) -> float:
    """A number as advantages.jsonl holds it."""
    return round(float(x), 6)


def advantages(records: list[dict], values: list, s: Settings) -> list[dict]:
    """B.1: the lines of advantages.jsonl, still without logp_ref, of problems with a pair to train on.

    values: V of every node of each record.
    """
    least = 0.0 if s.likelihood else s.gap  # the likelihood term takes the pairs of every state
    lines = []
    for record, value in zip(records, values):
        if s.kappa != math.inf:
            value = counts_and_critic(record, value, s.kappa)
        q = action_values(record, value)
        if states := advantage_states(record, q, least, value, s.value_draws):
            lines.append({"id": record["id"], "states": states})
    return lines


def actions_of(line: dict, gap: float = 0.0) -> dict[int, dict]:
    """{node: action} of a line's states that pass the gap; of all its states without one."""
    found = {}
    for state in line["states"]:
        if passes_gap(state["gap"], gap):
            found |= {action["node"]: action for action in state["actions"]}
    return found


def pair_tree(record: dict, line: dict):
    """The tree of a problem's pairs: exactly the actions are scored."""
    chosen = actions_of(line)
    return record_tree(record, [v in chosen for v in range(len(record["nodes"]))])


@torch.no_grad()
def reference_logprobs(lm: LM, records: list[dict], lines: list[dict], budget: int, kept=None):
    """Put log pi_ref(a | s) into every action of the lines. It is computed by B.2's kernel, dtype and
    layout, so that on the CPU log-ratios start at exactly 0.

    kept: the scoring.Results of an earlier start, which need not be computed again.
    """
    trees = [pair_tree(record, line) for record, line in zip(records, lines)]
    score = lambda pack: step_logprobs(lm, pack)
    ids = [line["id"] for line in lines]
    found = score_trees(score, trees, budget, f"{lm.path}: log-prob", ids, BLOCK, kept, lm.paths)
    for line, numbers in zip(lines, found):
        for (_, action), logp in zip(sorted(actions_of(line).items()), numbers):
            action["logp_ref"] = logp


# ------------------------------------------------------------ B.2: the actor (eq. 12)


def actor_loss(logp, logp_ref, adv, beta: float):
    """Eq. 12 for each pair (M,): half the squared distance of the log-ratio to advantage / beta.

    adv .2, beta .1, logp -1.5, logp_ref -2 -> .5 * (2 - .5)^2 = 1.125

    The mean over pairs is the caller's: all pairs of the optimiser step weigh alike, so a state
    weighs as its number of unique actions. (The other reading of E_{s, a}, a mean over states of
    means over their actions, made no difference; see benchmarks/LOG.md.)
    """
    return 0.5 * (adv / beta - (logp - logp_ref)) ** 2  # eq. 12


class Pair(NamedTuple):
    """One action of one state as B.2 trains on it; of a whole pack each field is a tensor (M,)."""

    adv: float  # A(s, a), eq. 13
    logp_ref: float  # log pi_ref(a | s)
    weight: float  # in the mean of eq. 12: 1 / number of pairs of the optimiser step
    in_regression: float  # 1, or 0 where only the likelihood term takes the pair
    success: float  # of the step's draws the share that ended right, for the likelihood term


def train(lm: LM, records: list[dict], lines: list[dict], s: Settings, work: Path):
    """B.2: min_theta 1/2 E (A / beta - log pi_theta / pi_ref)^2 over the pairs."""
    trees = [pair_tree(record, line) for record, line in zip(records, lines)]
    actions = [actions_of(line) for line in lines]
    in_regression = [actions_of(line, s.gap).keys() for line in lines]

    def make_packs(batch: list[int]) -> list[tuple]:
        """(pack, its pairs) of each pack of a batch of problems."""
        total = 0
        for i in batch:
            total += sum(weight_of(records[i]["nodes"][v], s.by_draws) for v in actions[i])
        items = []
        for pack in pack_trees([trees[i] for i in batch], s.budget, BLOCK, world(), lm.paths):
            pairs = []
            for t, v in pack.owner:
                i = batch[t]
                action, node = actions[i][v], records[i]["nodes"][v]
                pair = Pair(
                    adv=action["adv"],
                    logp_ref=action["logp_ref"],
                    weight=weight_of(node, s.by_draws) / total,
                    in_regression=float(v in in_regression[i]),
                    success=success_share(node),
                )
                pairs.append(pair)
            items.append((pack, torch.tensor(pairs).T))
        return items

    def loss(pack, numbers):
        """The pack's share of the batch's mean loss, and its metrics."""
        pair = Pair(*numbers.to(lm.device))  # (M,) each
        logp = step_logprobs(lm, pack)  # (M,), log pi_theta(a | s)
        each = actor_loss(logp, pair.logp_ref, pair.adv, s.beta)  # (M,), eq. 12
        total = (pair.in_regression * pair.weight * each).sum()
        if s.likelihood:
            nll = pair.weight * likelihood_loss(logp, pair.success)
            total = total + s.likelihood / s.beta * nll.sum()
        return total, metrics(logp.detach(), pair, s.beta)

    ids = lambda batch: [lines[i]["id"] for i in batch]
    batches = whole_batches([len(a) for a in actions], s.batch, s.passes, f"actor {s.seed}")
    fit({"model": lm.model}, batches, make_packs, loss, work, s.lr, s.save_minutes, ids)


def metrics(logp, pair: Pair, beta: float) -> dict:
    """Sums over the pairs of a pack, for metrics.jsonl.

    do_nothing    what eq. 12 would be if the actor had not moved: its loss is healthy below that
    nll           likelihood_loss, whether it is trained on or not
    ratio_up      sum of the log-ratio of the pairs with A > 0, pairs_up how many; ratio_down: A <= 0
    """
    ratio = logp - pair.logp_ref
    up, down = pair.in_regression * (pair.adv > 0), pair.in_regression * (pair.adv <= 0)
    nothing = 0.5 * (pair.in_regression * pair.weight * (pair.adv / beta) ** 2).sum()
    return {
        "do_nothing": nothing,
        "nll": (pair.weight * likelihood_loss(logp, pair.success)).sum(),
        "ratio_up": (ratio * up).sum(), "pairs_up": up.sum(),
        "ratio_down": (ratio * down).sum(), "pairs_down": down.sum(),
    }  # fmt: skip


# ------------------------------------------------------------ beyond the paper (off by default)


def counts_and_critic(record: dict, value: list, kappa: float) -> list[float]:
    """--kappa: V of every node replaced by (wins + kappa V) / (n + kappa).

    wins 3 of n 4, V .5: kappa 0 -> .75, kappa 4 -> (3 + 4 * .5) / (4 + 4) = .625
    """
    mixed = []
    for node, v in zip(record["nodes"], value):
        prior = kappa * v if kappa else 0.0  # with kappa 0 there is no critic, and v is None
        mixed.append((node["wins"] + prior) / max(node["n"] + kappa, 1e-9))
    return mixed


def value_in_the_mean(q, parent, draws, value, value_draws: float):
    """--value_draws: step_advantages with V(s), `value` (S,), as one more action of each state, drawn
    value_draws times. It counts in the gap too, so that the only action of a state has an advantage.

    q [1], draws [1], value [.5], value_draws 1 -> mean .75, adv [.25], gap .5
    """
    states = torch.arange(len(value))
    draws = torch.cat([draws.to(q.dtype), torch.full_like(value, value_draws)])
    found = step_advantages(torch.cat([q, value]), torch.cat([parent, states]), draws)
    adv, mean, gap = found
    return adv[: len(q)], mean, gap


def weight_of(node: dict, by_draws: bool) -> int:
    """Of a pair in the mean of eq. 12: 1, or with --by_draws how often its step was drawn."""
    return max(1, node["draws"]) if by_draws else 1


def likelihood_loss(logp, success):
    """--likelihood: -success * log pi for each pair (M,); success (M,): success_share.

    logp -1.5, success .5 -> .75
    """
    return -success * logp


def success_share(node: dict) -> float:
    """Of the draws from or through the state that this step leads to, the share that ended right;
    where the step ended the response, its reward."""
    return node["wins"] / max(1, node["n"]) if node["reward"] is None else node["reward"]


# ------------------------------------------------------------ the stage


def is_trainable(records: dict[str, dict], lines: list[dict], s: Settings) -> bool:
    """Say how many pairs there are. Without one it is an error, or --may_stay."""
    states = [x for line in lines for x in line["states"] if passes_gap(x["gap"], s.gap)]
    more = sum(len(actions_of(line)) - len(actions_of(line, s.gap)) for line in lines)
    also = f"; {more} pairs more for the likelihood" if s.likelihood else ""
    print(f"B.1: {pairs_words(states, s.gap)}{also}")
    right = False
    if s.likelihood:
        for line in lines:
            nodes = records[line["id"]]["nodes"]
            right |= any(success_share(nodes[v]) > 0 for v in actions_of(line))
    if states or right:
        return True
    nothing = f"{s.trees}: no state's advantages differ by --gap {s.gap}"
    nothing += ", and no step ended right" if s.likelihood else ""
    if not s.may_stay:
        raise UserError(f"{nothing}; lower it, or label more; in small iterations --may_stay")
    print(f"{nothing}; the actor stays as it is")
    return False


def earlier_advantages(s: Settings) -> list[dict] | None:
    """The lines of advantages.jsonl, where an earlier start of this command came to the end of B.1."""
    table, known = Path(f"{s.out}.advantages.jsonl"), read_manifest(s.out).get("advantages")
    if known and table.exists() and sha256(table) == known:
        return list(each_record(table, may_be_empty=True))
    return None


def partial_results(out: Output, name: str, s: Settings, **made_from) -> Results:
    """What an earlier start of B.1 had computed when it was stopped, if it was made from the same."""
    made_from |= {"trees": out.manifest["inputs"]["trees"], "budget": s.budget, "dtype": s.dtype}
    return Results(out.work / name, made_from)


def critic_values(
    records: list[dict], s: Settings, out: Output, provenance: dict, processes: int
) -> list[list]:
    """V of every node of every record. The critic is gone from memory when the actor comes."""
    critic, value_head = load_critic(s.critic, train=world() > 1, dtype=s.dtype)
    if world() > 1:
        shard(critic, value_head, processes=processes)
    critic.codec.date = out.date
    retokenise = tokenizer_provenance(critic)["tokenizer"] != provenance["tokenizer"]
    if retokenise:
        print_unknown(critic, records)
    by = {"critic": out.manifest["inputs"]["critic"], "date": out.date if retokenise else None}
    kept = partial_results(out, "values.jsonl", s, **by)
    return tree_values(critic, value_head, records, retokenise, s.budget, kept)


def stage(s: Settings):
    if s.kappa > 0 and not s.critic:
        raise UserError("--critic is missing; give one, or --kappa 0 for raw Monte Carlo values")
    if s.value_draws and s.kappa == 0:
        raise UserError(f"--value_draws {s.value_draws} needs V: a critic, and --kappa above 0")
    records = read_trees(s.trees)
    inputs = {"actor": s.actor, "trees": s.trees, **({"critic": s.critic} if s.critic else {})}
    output = Output("train_actor.py", s.out, s, inputs)
    if output.complete:
        return
    join(s.offload)
    processes = require_memory(s.actor, s.budget, s.offload, records)
    tokenizer = load_lm(s.actor, weights=False)
    tokenizer.codec.date = output.date
    provenance = tokenizer_provenance(tokenizer)
    expects = {"actor": fingerprint(s.actor), **provenance}
    expects |= {"step": stated_by(s.trees, "step", "line")}
    of_trees = {"trees": sha256(Path(s.trees))}  # which the critic was trained on
    with output.open(provenance, expects, prefers=of_trees) as out:
        # B.1
        lines = earlier_advantages(s)
        values = [[None] * len(record["nodes"]) for record in records]
        if lines is None and s.kappa > 0:
            values = critic_values(records, s, out, provenance, processes)
            gc.collect()  # sharded modules know each other in circles
        lm = load_lm(s.actor, train=True, dtype=s.dtype)
        shard(lm, None, s.offload, processes)
        of_id = {record["id"]: record for record in records}
        table = Path(f"{s.out}.advantages.jsonl")
        if lines is None:
            lines = advantages(records, values, s)
            lines = lines if is_trainable(of_id, lines, s) else []
            by = {"actor": out.manifest["inputs"]["actor"], "pairs": digest(str(lines))}
            kept = partial_results(out, "logp_ref.jsonl", s, **by)
            reference_logprobs(lm, [of_id[line["id"]] for line in lines], lines, s.budget, kept)
            if rank() == 0:
                replace(table, lambda p: p.write_bytes(b"".join(dump(line) for line in lines)))
        if rank() == 0:
            out.write_manifest(advantages=sha256(table))
            for name in ("values.jsonl", "logp_ref.jsonl"):  # the table has them now
                (out.work / name).unlink(missing_ok=True)

        # B.2
        train(lm, [of_id[line["id"]] for line in lines], lines, s, out.work)
        if rank() == 0:
            steps = list(map(json.loads, (out.work / "metrics.jsonl").open()))
            print(f"B.2: {actor_words(steps, s.likelihood / s.beta)}")
            values_of, trees = dict(zip(of_id, values)), []
            for line in lines:
                value = values_of[line["id"]] if s.kappa == math.inf else ()  # only there Q is V
                trees.append(trained_tree(of_id[line["id"]], line["states"], value))
            print("\n".join(problem_words(trees)))
        out.save(lm.save)


if __name__ == "__main__":
    main(stage, Settings, __doc__)
