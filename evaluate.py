r"""Evaluate an actor: accuracy, paired comparison; the report of a run.

    python evaluate.py --actor runs/demo/iter1/actor --problems runs/demo/test.jsonl \
        --out runs/demo/iter1/eval.jsonl --against runs/demo/iter0/eval.jsonl --samples 8
    python evaluate.py --report runs/demo        # table, pictures and a page of a whole run

Reads:  problems (several sets: comma separated), an actor, and another actor's eval.jsonl.
Writes: eval.jsonl, a line a problem (the greedy response), and summary.json beside it
    {"id": "demo/test/17", "text": "..", "prediction": "18", "correct": true,
     "verdict": "right", "finished": true,
     "sampled": [{"text": "..", "prediction": "18", "correct": true}]}
--report loads no model. It writes into the run's folder report.png (the course of training),
solution.png (one response, its steps coloured by advantage), tree.png (one small step tree) and
report.html (all of these and 20 problems to browse, in one file that needs no network).

Accuracy is zero-shot and greedy; mean@k, pass@k (unbiased) and maj@k come from --samples at
temperature 1. Two actors are compared on the same problems: exact McNemar test, paired bootstrap
interval.
"""

import base64
import dataclasses
import json
import math
import textwrap
import warnings
from collections import Counter
from html import escape
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from model import (
    LM,
    Progress,
    UserError,
    flag,
    from_all,
    join,
    rank,
    replace,
    world,
)
from prepare import (
    Stage,
    actor_facts,
    each_record,
    main,
    misfit,
    read_jsonl,
    read_manifest,
    tokenizer_facts,
)
from reward import MAX_ANSWER, exact_number, normalise, split_unit
from sample import Server, alone, respond, work_through
from train_critic import load_critic, tree_values

# ------------------------------------------------------------ statistics


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. 8 of 10 -> (0.490, 0.943)"""
    z, p = 1.959964, right / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), (middle + half) / scale


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test. 8 gained, 1 lost -> 2 * (1 + 9) / 2^9 = 0.039"""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def bootstrap(difference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (n,), 10,000 resamples of problems."""
    draw = np.random.default_rng(0).choice
    means = [draw(difference, len(difference)).mean() for _ in range(10_000)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def paired(new: list[float], old: list[float]) -> dict:
    """How far `new` is above `old`, two scores of the same problems in the same order.

    difference, interval    mean of new - old and its bootstrap interval
    gained, lost, p         problems whose score rose, or fell, and McNemar's test of these two
    """
    difference = np.array(new, float) - np.array(old, float)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    figures = {"difference": float(difference.mean()), "interval": bootstrap(difference)}
    return figures | {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def pass_at(k: int, n: int, right: int) -> float:
    """Unbiased chance that one of k draws is right, from n draws with `right` right ones.

    k 2, n 4, right 1 -> 1 - 3 / 6 = 0.5: of the six pairs, three miss the right one
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(sampled: list[dict]) -> bool:
    """Is the most frequent answer right, in most of the responses that give it?

    Equal numbers are one answer, with a unit or without; programs are one if their texts are.
    """

    def vote(response):
        answer = response["prediction"]
        if len(answer) > MAX_ANSWER or "\n" in answer:
            return answer
        answer, _ = split_unit(normalise(answer))
        value = exact_number(answer)
        return answer if value is None else value

    answered = [response for response in sampled if response["prediction"]]
    votes = Counter(vote(response) for response in answered)
    winner = max(votes, key=votes.get, default=None)
    won = [response["correct"] for response in answered if vote(response) == winner]
    return 2 * sum(won) > len(won)


def summarise(lines: list[dict], other: dict[str, dict]) -> dict:
    """The figures of one test set from its lines of eval.jsonl.

    cut_off, unparsed    shares of the greedy responses without an end, and without an answer
    sampled, k           share of right ones among the k responses a problem at temperature 1
    against              the difference to `other`, another actor's lines by id (`paired`)
    """
    n, k = len(lines), len(lines[0]["sampled"])
    right = sum(line["correct"] for line in lines)
    verdicts = Counter(line["verdict"] for line in lines)
    row = {"n": n, "accuracy": right / n, "interval": wilson(right, n)}
    row["cut_off"] = sum(not line["finished"] for line in lines) / n
    row |= {"unparsed": verdicts["no answer"] / n, "verdicts": dict(verdicts)}
    wins = [sum(response["correct"] for response in line["sampled"]) for line in lines]
    if k:
        row |= {"k": k, "sampled": sum(wins) / (n * k)}
        row["maj"] = sum(majority(line["sampled"]) for line in lines) / n
        draws = 2
        while draws <= k:
            row[f"pass@{draws}"] = sum(pass_at(draws, k, w) for w in wins) / n
            draws *= 2
        if "by_critic" in lines[0]:
            row["best_of_k_by_critic"] = sum(line["by_critic"] for line in lines) / n
    if other:
        old = [other[line["id"]] for line in lines]
        greedy = paired([line["correct"] for line in lines], [line["correct"] for line in old])
        row["against"] = {"greedy": greedy}
        if k and len(old[0]["sampled"]) == k:
            before = [sum(r["correct"] for r in line["sampled"]) / k for line in old]
            rates = paired([w / k for w in wins], before)
            row["against"]["sampled"] = {key: rates[key] for key in ("difference", "interval")}
    return row


# ------------------------------------------------------------ the stage


@dataclasses.dataclass(frozen=True)
class Settings:
    actor: str = flag("Hugging Face folder or hub id to evaluate", "")
    problems: str = flag("problem files, comma separated", "")
    out: str = flag(
        "eval.jsonl to write, with summary.json beside it (x.jsonl: x.summary.json)", ""
    )
    against: str = flag("eval.jsonl of another actor on the same problems", "")
    samples: int = flag("responses a problem at temperature 1, beside the greedy one", 0)
    critic: str = flag("critic that picks the best of --samples (with the actor's tokenizer)", "")
    max_new: int = flag("length limit of a response in tokens", 2048)
    batch: int = flag("rows decoded at once, at least 16", 256)
    server: str = flag("URL of a server that serves the actor, or several, comma separated", "")
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the samples", 0)
    report: str = flag("a run folder: print its table and draw its figures, nothing else", "")
    unsafe: bool = flag("run programs even where they cannot be walled off", False)
    force: bool = flag("throw an existing output away", False)


def stage(s: Settings):
    if s.report:
        return report(Path(s.report))
    if s.critic and not s.samples:
        raise UserError("--critic picks the best of --samples; give some")
    if not (s.actor and s.problems and s.out):
        raise UserError("evaluate.py: give --actor, --problems and --out, or --report; see --help")
    needs, paths = ("id", "prompt", "answer or tests"), s.problems.split(",")
    problems = [p for path in paths for p in read_jsonl(path, needs)]
    if len({p["id"] for p in problems}) < len(problems):
        raise UserError(f"{s.problems}: some problem is in two of these files")
    other = {x["id"]: x for x in read_jsonl(s.against)} if s.against else {}
    for name, line in other.items():
        if misfit(line, {"correct": bool, "sampled": [{"correct": bool}]}):
            raise UserError(f"{s.against}: {name}: no line of evaluate.py; pass an eval.jsonl")
    if other and (lacks := [p["id"] for p in problems if p["id"] not in other]):
        raise UserError(f"{s.against}: no problem {lacks[0]}; compare actors on the same problems")
    inputs = {"actor": s.actor} | {f"problems{i or ''}": path for i, path in enumerate(paths)}
    inputs |= {"critic": s.critic} if s.critic else {}
    # --against is no setting of eval.jsonl: a finished evaluation is compared anew at no cost
    out = Stage("evaluate.py", s.out, dataclasses.replace(s, against=""), inputs)
    if not out.complete:
        if s.server or s.critic:  # processes share out one pack's trees, here each has its own
            alone(f"evaluate.py {'--server' if s.server else '--critic'}")
        join()
        lm = LM(s.actor, dtype=s.dtype, weights=not s.server)
        server = Server(s.server, lm) if s.server else None
        critic = load_critic(s.critic, dtype=s.dtype) if s.critic else None
        if critic and tokenizer_facts(critic[0])["tokenizer"] != tokenizer_facts(lm)["tokenizer"]:
            raise UserError(f"{s.critic}: its tokenizer is not the actor's; pass one that has it")
        out.begin(actor_facts(lm, s.max_new) | ({"draws": "server"} if server else {}))
        todo = [p for p in problems if p["id"] not in out.done]
        with Progress("evaluate", len(todo)) as progress:

            def process(chunk: list[dict]) -> list[dict]:
                """Each process answers every world()-th problem."""
                mine = answer(lm, critic, chunk[rank() :: world()], s, progress, server)
                answered = {line["id"]: line for line in from_all(mine)}
                progress.update(len(chunk))
                return [answered[p["id"]] for p in chunk]

            work_through(todo, process, out, server, 64 * world())
        out.finish()
    if rank() > 0:
        return
    lines = {x["id"]: x for x in read_jsonl(s.out)}
    sets = {}
    for p in problems:
        sets.setdefault(str(p.get("source")), []).append(lines[p["id"]])
    if len(sets) > 1:
        sets["pooled"] = list(lines.values())
    figures = {name: summarise(rows, other) for name, rows in sets.items()}
    text = json.dumps({"sets": figures, "against": s.against}, indent=1)
    name = "summary.json" if out.out.name == "eval.jsonl" else f"{out.out.stem}.summary.json"
    replace(out.out.with_name(name), lambda path: path.write_text(text))
    for name, row in figures.items():
        sampled = f", T=1 {row['sampled']:.1%}" if s.samples else ""
        print(
            f"{name}: greedy {row['accuracy']:.1%} {percents(row['interval'])}{sampled}, "
            f"n {row['n']}, cut off {row['cut_off']:.1%}, unparsed {row['unparsed']:.1%}"
        )
        if other:
            greedy = row["against"]["greedy"]
            gain = f"{greedy['difference']:+.1%} {percents(greedy['interval'], '+')}"
            print(f"  greedy {gain}, p {greedy['p']:.2g}, against {s.against}")


def answer(lm: LM, critic, problems: list[dict], s: Settings, progress, server) -> list[dict]:
    """A line of eval.jsonl a problem. A response that was cut off is not right in any case."""
    if not problems:
        return []
    how = {"progress": progress, "server": server}
    drawn = respond(lm, problems, s.samples, "evaluate", s, **how)
    greedy = respond(lm, problems, 1, "evaluate", s, temperature=0.0, **how)
    lines = []
    for problem, (_, (first,)), (_, sampled) in zip(problems, greedy, drawn):
        line = {"id": problem["id"]}
        for name in ("text", "prediction", "correct", "verdict", "finished"):
            line[name] = first[name]
        line["sampled"] = []
        for response in sampled:
            shown = {name: response[name] for name in ("text", "prediction", "correct")}
            line["sampled"].append(shown)
        lines.append(line)
    if critic:
        for line, best in zip(lines, choose(lm, critic, problems, drawn)):
            line["by_critic"] = line["sampled"][best]["correct"]
    return lines


def choose(lm: LM, critic: tuple, problems: list[dict], drawn: list[tuple]) -> list[int]:
    """Of each problem's sampled responses the one with the highest V before its last step."""
    trees, states = [], []  # states: of each sampled response its node, 0 if it has one step
    for problem, (prompt_ids, sampled) in zip(problems, drawn):
        nodes, own = [{"parent": -1, "reward": None}], []
        for response in sampled:
            begin = [0, *lm.step_ends(response["ids"])][-2]  # of the last step
            if begin:
                nodes.append({"parent": 0, "ids": response["ids"][:begin], "reward": None})
            own.append(len(nodes) - 1 if begin else 0)
        trees.append({"id": problem["id"], "prompt_ids": prompt_ids, "nodes": nodes})
        states.append(own)
    best = []
    for own, value in zip(states, tree_values(*critic, trees, False, 8192)):
        best.append(max(range(len(own)), key=lambda k: value[own[k]]))
    return best


# ------------------------------------------------------------ the report: from a run's files


class TrainedTree(NamedTuple):
    """What a folder of an iteration says of one problem: its step tree and what was trained on.

    action    {node: {"q", "adv", ..}} of the steps that were pairs of training
    mean      {node: mean of eq. 13, with V(s) in it by --value_draws} of the states trained on
    """

    id: str
    nodes: list[dict]
    action: dict[int, dict]
    mean: dict[int, float]

    def responses(self) -> list[list[int]]:
        """The whole responses: a list of nodes each, from the first step to the one that ended."""
        found = []
        for v, node in enumerate(self.nodes):
            if node["reward"] is not None:
                path = [v]
                while parent := self.nodes[path[0]]["parent"]:
                    path.insert(0, parent)
                found.append(path)
        return found

    def right(self, response: list[int]) -> bool:
        return self.nodes[response[-1]]["reward"] >= 0.5

    def outcomes(self) -> set[bool]:
        """{True, False} where some of its whole responses are right and some wrong."""
        return {self.right(response) for response in self.responses()}

    def spread(self, path: list[int]) -> float:
        """How far apart the advantages along a path are; 0 if fewer than two are known."""
        known = [self.action[v]["adv"] for v in path if v in self.action]
        return max(known) - min(known) if known else 0.0


def advantage_lines(folder: Path) -> list[dict]:
    """The lines of the advantages that the actor of an iteration was trained on, if any."""
    path = folder / "actor.advantages.jsonl"
    return read_jsonl(path, may_be_empty=True) if path.exists() else []


def trained_trees(folder: Path, most: int = 1000) -> list[TrainedTree]:
    """An iteration's first trees of which some state was trained on; none for whole responses."""
    made = read_manifest(folder / "actor").get("settings", {})
    states = {line["id"]: line["states"] for line in advantage_lines(folder)}
    there = (folder / "trees.jsonl").exists()  # of a large run people delete them
    if made.get("advantage") == "outcome" or not states or not there:
        return []  # an outcome actor's advantages are of other nodes than the trees'
    found = []
    with (folder / "trees.jsonl").open() as lines:  # they may be gigabytes: no more than is used
        for record in map(json.loads, islice(lines, most)):
            here = states.get(record["id"], [])
            action = {a["node"]: a for state in here for a in state["actions"]}
            mean = {state["node"]: state["mean"] for state in here}
            if here:
                found.append(TrainedTree(record["id"], record["nodes"], action, mean))
    return found


def percents(interval: list[float], sign: str = "") -> str:
    """[0.395, 0.482] -> "[39.5%, 48.2%]"; sign "+": "[+39.5%, +48.2%]" """
    return "[" + ", ".join(f"{x:{sign}.1%}" for x in interval) + "]"


PICTURES = {  # their names, and what the page says above them
    "report.png": "The course of training",
    "tree.png": "A step tree of iteration 1",
    "solution.png": "The response of iteration 1 whose advantages are the widest apart",
}
HEAD = ("", "tokens", "greedy", "95 % interval", "T=1", "p vs base", "T=1 gain", "95 % interval")


def sampled_tokens(iteration: Path) -> int:
    """How many tokens an iteration drew: its samples, and the completions of their steps."""
    total = 0
    for name in ("samples.jsonl", "trees.jsonl"):
        if (iteration / name).exists():
            for record in each_record(iteration / name):
                total += sum(len(response["ids"]) for response in record.get("responses", ()))
                total += record.get("tokens", 0)
    return total


def table_row(name: str, row: dict, tokens: int) -> list[str]:
    """The cells of one iteration under HEAD; row: `summarise`'s figures of it; tokens: so far."""
    against = row.get("against", {})
    gain = against.get("sampled")
    return [
        name,
        f"{tokens:,}" if tokens else "",
        f"{row['accuracy']:.1%}",
        percents(row["interval"]),
        f"{row['sampled']:.1%}" if "sampled" in row else "",
        f"{against['greedy']['p']:.2g}" if "greedy" in against else "",
        f"{gain['difference']:+.1%}" if gain else "",
        percents(gain["interval"], "+") if gain else "",
    ]


def report(run: Path):
    """Print the table over iterations, then draw the pictures and write the page."""
    files = [f for f in run.glob("iter*/summary.json") if f.parent.name[4:].isdigit()]
    files.sort(key=lambda path: int(path.parent.name[4:]))
    if not files:
        raise UserError(f"{run}: no iter*/summary.json; run the stages first (bash run.sh)")
    rows = {f.parent.name: [*json.loads(f.read_text())["sets"].values()][-1] for f in files}
    table, tokens = [], 0
    for name, row in rows.items():
        tokens += sampled_tokens(run / name)
        table.append(table_row(name, row, tokens))
    for cells in [HEAD, *table]:
        print("{:8}{:>14}{:>8}{:>17}{:>9}{:>11}{:>10}{:>20}".format(*cells))
    trees = trained_trees(run / "iter1")
    pictures = []
    warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
    with matplotlib.rc_context({"font.size": 14}):  # legible at half its size
        figures = (plot_report(run, rows), plot_tree(trees), plot_solution(trees))
        for name, figure in zip(PICTURES, figures):
            if figure is not None:
                figure.savefig(run / name, dpi=110, bbox_inches="tight", facecolor="white")
                pictures.append(run / name)
                print(run / name)
    text = page(run, table, pictures, [*rows], trees)
    replace(run / "report.html", lambda path: path.write_text(text, "utf-8"))
    print(run / "report.html")


# ------------------------------------------------------------ the report: pictures


def colour(adv: float | None) -> str:
    """Of an advantage: white at 0 to green at 1 and orange at -1, told apart by all eyes; None: grey.

    0.5 -> "#7fceb9", half way from (255, 255, 255) to (0, 158, 115)
    """
    if adv is None:
        return "#eeeeee"
    end = (0, 158, 115) if adv > 0 else (213, 94, 0)
    share = min(1.0, abs(adv))
    return "#" + "".join(f"{int(255 + share * (x - 255)):02x}" for x in end)


def plot_report(run: Path, rows: dict[str, dict]) -> Figure:
    """Accuracy of all iterations; of the first, middle and last: critic, advantages, log-ratios."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    (accuracy, critic), (pairs, ratios) = figure.subplots(2, 2)
    names = [name.removeprefix("iter") for name in rows]  # strings: categories, not numbers
    greedy = [row["accuracy"] for row in rows.values()]
    ends = np.transpose([row["interval"] for row in rows.values()])  # (2, iterations)
    accuracy.plot(names, greedy, marker="o", label="greedy, 95 % interval")
    accuracy.errorbar(names, greedy, np.abs(ends - greedy), fmt="none", ecolor="C0", capsize=5)
    if any("sampled" in row for row in rows.values()):
        sampled = [row.get("sampled", math.nan) for row in rows.values()]
        accuracy.plot(names, sampled, marker="s", label="temperature 1")
    accuracy.set(title="accuracy on the test problems", xlabel="iteration", ylim=(0, 1.03))
    critic.plot([0, 1], [0, 1], "k:", lw=1)
    critic.set(title="critic on held-out states", xlabel="V(s)", ylabel="MC(s), the success rate")
    pairs.set(title="advantages of the pairs", xlabel="A(s, a)", ylabel="pairs", yscale="log")
    ratios.set(title="mean log-ratio in training", xlabel="step", ylabel="log π / π_ref")
    trained = [name for name in rows if name != "iter0"]
    shown = sorted({0, len(trained) // 2, len(trained) - 1}) if trained else []
    for k, i in enumerate(shown):
        folder, style = run / trained[i], {"color": f"C{k}", "label": f"iteration {trained[i][4:]}"}
        if (file := folder / "critic.metrics.json").exists():
            bins = [b for b in json.loads(file.read_text())["bins"] if b["states"]]
            critic.plot([b["value"] for b in bins], [b["mc"] for b in bins], marker="o", **style)
        states = [state for line in advantage_lines(folder) for state in line["states"]]
        if states:
            adv = [action["adv"] for state in states for action in state["actions"]]
            pairs.hist(adv, bins=41, range=(-1, 1), histtype="step", lw=1.5, **style)
        if (file := folder / "actor.work" / "metrics.jsonl").exists():
            steps = [json.loads(text) for text in file.open()]
            for kind, dash, sign in (("up", "-", ">"), ("down", "--", "≤")):
                ratio = [m[f"ratio_{kind}"] / max(1, m[f"pairs_{kind}"]) for m in steps]
                ratios.plot(ratio, dash, color=f"C{k}", label=f"{style['label']}, A {sign} 0")
    for axis in (accuracy, critic, pairs, ratios):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:  # below the axis, where no line is
            where = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
            axis.legend(ncols=2, frameon=False, fontsize=13, **where)
    return figure


def plot_solution(trees: list[TrainedTree]) -> Figure | None:
    """Of all whole responses the one whose advantages are the widest apart, a colour for each."""
    best, path = None, []
    for tree in trees:
        for response in tree.responses():
            known = [v for v in response if v in tree.action]
            if len(known) > 2 and (best is None or tree.spread(response) > best.spread(path)):
                best, path = tree, response
    if best is None:
        return None
    lines = [(text, None) for text in [*wrapped(best.nodes[0]["text"], 72, 20), ""]]
    for v in path:
        adv = best.action[v]["adv"] if v in best.action else None
        step = best.nodes[v]["text"].rstrip().lstrip("\n")  # an indent stays
        lines.append((short(step, 72), adv))
    width = max(len(text) for text, _ in lines)
    figure = Figure(figsize=(0.125 * width + 2, 0.36 * len(lines)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(len(lines) - 0.5, -0.5))
    for y, (text, adv) in enumerate(lines):
        words = {"family": "monospace", "va": "center", "parse_math": False}
        if adv is None:  # the prompt's, or a step that was no pair of training
            axis.text(0, y, text, color="0.35", **words)
        else:
            box = {"facecolor": colour(adv), "edgecolor": "none", "pad": 3}
            axis.text(0, y, text, bbox=box, **words)
            axis.text(1, y, f"A = {adv:+.2f}", ha="right", **words)
    return figure


TREE_KEY = """at a state: how many of the draws from it are right
on a step: how often it was drawn (kept: in a sample only),
Q = value of the state that it leads to,
A = Q - the state's mean""".splitlines()


def plot_tree(trees: list[TrainedTree], most: int = 10) -> Figure | None:
    """The small tree that says most: states with counts and mean, steps with text and advantage.

    Of trees of at most `most` nodes with a right and a wrong end, those with the most states that
    were trained on; of these the one where even the least of the states' best steps stands out.
    """
    small = []
    for tree in trees:
        if len(tree.nodes) <= most and tree.outcomes() == {True, False}:
            best = dict.fromkeys(tree.mean, -1.0)
            for v, action in tree.action.items():
                state = tree.nodes[v]["parent"]
                best[state] = max(best[state], action["adv"])
            small.append((len(best), min(best.values()), tree.id, tree))
    if not small:
        return None
    *_, tree = max(small)
    place = layout(tree)
    rows = 1 + max(row for _, row in place.values())
    columns = 1 + max(depth for depth, _ in place.values())
    prompt = wrapped(tree.nodes[0]["text"], 60, 8)
    above = max(len(prompt), len(TREE_KEY))  # lines of text
    top = -0.55 - 0.27 * above  # a row of the tree is 1, a line of text 0.27
    label = {v: short(tree.nodes[v]["text"].strip(), 22) for v in place if v}
    inches = 1.2 + 0.16 * max(15, *map(len, label.values()))  # from one state to the next
    figure = Figure(figsize=(inches * (columns - 0.55), 1.15 * (rows - 0.5 - top)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(-0.2, columns - 0.75), ylim=(rows - 0.5, top))
    for i, text in enumerate(prompt):
        words = {"family": "monospace", "va": "top", "parse_math": False}
        axis.text(-0.2, top + 0.27 * i, text, color="0.35", **words)
    for i, text in enumerate(TREE_KEY):
        words = {"ha": "right", "va": "top", "color": "0.35"}
        axis.text(columns - 0.8, top + 0.27 * i, text, **words)
    for v, (x, y) in place.items():
        node, action = tree.nodes[v], tree.action.get(v)
        if node["reward"] is not None:
            text, edge = ("right", colour(1)) if node["reward"] >= 0.5 else ("wrong", colour(-1))
        else:
            text, edge = f"{node['wins']:g} of {node['n']} right", "0.3"
            text += f"\nmean {tree.mean[v]:.2f}" if v in tree.mean else ""
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": edge, "lw": 2}
        axis.text(x, y, text, bbox=box, ha="center", va="center", linespacing=1.4)
        if v == 0:
            continue
        before, row = place[node["parent"]]
        turn = before + 0.23  # where the line from the state turns up or down
        axis.plot([before, turn, turn, x], [row, row, y, y], color="0.6", zorder=0)
        box = {
            "facecolor": colour(action["adv"] if action else None),
            "edgecolor": "none",
            "pad": 2.5,
        }
        words = {"family": "monospace", "bbox": box, "parse_math": False}
        axis.text(turn + 0.03, y - 0.1, label[v], va="bottom", **words)
        numbers = f"{node['draws']}x" if node["draws"] else "kept"
        if action:
            numbers += f"  Q {action['q']:.2f}  A {action['adv']:+.2f}"
        axis.text(turn + 0.02, y + 0.1, numbers, va="top")
    return figure


def layout(tree: TrainedTree) -> dict[int, tuple[int, float]]:
    """{node: (steps from the prompt, row)}: a leaf has its own row, a state its steps' middle one."""
    place, free = {}, count()

    def put(v: int, depth: int) -> float:
        below = [u for u, node in enumerate(tree.nodes) if node["parent"] == v]
        rows = [put(u, depth + 1) for u in below]
        place[v] = depth, (rows[0] + rows[-1]) / 2 if rows else next(free)
        return place[v][1]

    put(0, 0)
    return place


def wrapped(text: str, width: int, most: int) -> list[str]:
    """The lines of a text, long ones cut into several; of more than `most` the first ones."""
    lines = []
    for line in visible(text).strip().splitlines():
        lines += textwrap.wrap(line, width) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], "..."]


def short(text: str, most: int) -> str:
    """The text on one line, or its beginning and three dots where it is longer than `most`
    characters."""
    text = " ".join(visible(text).splitlines())
    return text if len(text) <= most else text[: most - 3] + "..."


def visible(text: str) -> str:
    """The text with control characters, lone surrogates and the like as U+FFFD."""
    return "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)


# ------------------------------------------------------------ the report: the page

# No script runs and nothing is fetched, whatever a model wrote: all text is escaped, and the policy
# forbids both should some escape have been forgotten.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 0 1rem 4rem;
  color: #222; background: #fff; overflow-wrap: anywhere }
pre, table { font: 14px/1.5 ui-monospace, monospace; margin: 0 }
pre { white-space: pre-wrap; unicode-bidi: isolate }
th, td { text-align: right; padding: 0 .6rem; white-space: nowrap }
img { width: max(100%, 44rem); max-width: 88rem }
details { border-top: 1px solid #ccc; padding: .4rem 0 }
summary { cursor: pointer }
h3 { font-size: 1rem; margin: .8rem 0 .2rem }
.wide { overflow-x: auto }
.pair { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.step { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem;
  padding: .1rem .4rem; margin-bottom: 2px }
.right { border-left: 5px solid #009e73; padding-left: .5rem }
.wrong { border-left: 5px solid #d55e00; padding-left: .5rem }
.step span, .note { font-size: 14px }
</style>
"""
EXPLAINED = """Each step is coloured by its advantage A: green is better than the state's average step,
orange is worse, grey was not trained on. "3 of 4 right": of the draws from the state after the
step. Q is the value that training gave that state: the critic's V, the counts, or both (--kappa).
A = Q - the mean Q of what was drawn at the state before (eq. 13; with --value_draws its V counts,
too)."""


def page(run: Path, table, pictures: list[Path], iterations: list[str], trees) -> str:
    """report.html: the table, the pictures inside it, ten test and ten training problems."""
    problems = {}
    for name in ("train.jsonl", "test.jsonl"):
        if (run / name).exists():
            problems |= {p["id"]: p for p in read_jsonl(run / name, ("id", "prompt"))}
    title = f"Direct Advantage Policy Optimization: {safe(run.resolve().name)}"
    parts = [PAGE, f"<title>{title}</title><h1>{title}</h1><div class='wide'><table>"]
    for cells in [HEAD, *table]:
        parts.append("<tr>" + "".join(f"<td>{safe(cell)}" for cell in cells))
    parts.append("</table></div>")
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f"<img alt='{picture.name}' src='data:image/png;base64,{data}'>"
        parts.append(f"<h2>{PICTURES[picture.name]}</h2><div class='wide'>{image}</div>")
    parts += test_part(run, iterations, problems)
    both = [tree for tree in trees if tree.outcomes() == {True, False}][:10]
    if both:
        parts.append(f"<h2>Training problems</h2><p class='note'>{safe(EXPLAINED)} ")
        parts.append("The first problems of iteration 1 that have a right and a wrong response.")
    for tree in both:
        shown = "open" if tree is both[0] else ""
        parts.append(f"<details {shown}><summary>{safe(str(tree.id))}</summary>")
        parts.append(question_html(problems.get(tree.id, {"prompt": tree.nodes[0]["text"]})))
        parts.append("<div class='pair'>")
        for wanted in (True, False):
            responses = [r for r in tree.responses() if tree.right(r) == wanted]
            parts.append(f"<div><h3>{'a right' if wanted else 'a wrong'} response</h3>")
            parts += [step_html(tree, v) for v in max(responses, key=tree.spread)]
            parts.append("</div>")
        parts.append("</div></details>")
    return "\n".join(parts)


def test_part(run: Path, iterations: list[str], problems: dict[str, dict]) -> list[str]:
    """Ten test problems with the greedy responses of the first actor and of the last, side by side."""
    evaluated = {}
    for name in {iterations[0]: None, iterations[-1]: None}:  # one, if there is no other
        file = run / name / "eval.jsonl"
        if not file.exists():
            return []
        evaluated[name] = {line["id"]: line for line in read_jsonl(file)}
    before, after = evaluated[iterations[0]], evaluated[iterations[-1]]
    groups = {(True, False): [], (False, True): [], (False, False): [], (True, True): []}
    for problem, line in after.items():
        if problem in before:
            groups[before[problem]["correct"], line["correct"]].append(problem)
    chosen = []
    for turn in range(10):
        for group in groups.values():
            chosen += group[turn : turn + 1]
    names = safe(" and ".join(evaluated))
    parts = [f"<h2>Test problems</h2><p class='note'>Greedy responses of {names}, "]
    parts.append("in turns of problems lost, gained, wrong both times and right both times: ")
    parts.append("no fair sample, the table above is.")
    for problem in chosen[:10]:
        verdicts = " → ".join(lines[problem]["verdict"] for lines in evaluated.values())
        shown = "open" if problem == chosen[0] else ""
        parts.append(f"<details {shown}><summary>{safe(f'{problem}: {verdicts}')}</summary>")
        parts.append(question_html(problems.get(problem, {})) + "<div class='pair'>")
        for name, lines in evaluated.items():
            line, sampled = lines[problem], lines[problem]["sampled"]
            facts = [line["verdict"]] + ([] if line["finished"] else ["cut off"])
            if sampled:
                right = sum(response["correct"] for response in sampled)
                facts.append(f"{right} of {len(sampled)} right at temperature 1")
            parts.append(f"<div><h3>{safe(name)}: {safe(', '.join(facts))}</h3>")
            parts.append(f"<div class='{'right' if line['correct'] else 'wrong'}'>")
            parts.append(pre_html(line["text"]) + "</div></div>")
        parts.append("</div></details>")
    return parts


def question_html(problem: dict) -> str:
    """Prompt and gold answer of a problem, or its tests."""
    text = ""
    if "prompt" in problem:
        text += f"<h3>prompt</h3>{pre_html(problem['prompt'])}"
    if problem.get("answer") is not None:
        text += f"<h3>gold answer</h3>{pre_html(str(problem['answer']))}"
    if problem.get("tests"):
        text += f"<h3>tests</h3>{pre_html(short(json.dumps(problem['tests']), 1000))}"
    return text


def safe(text: str) -> str:
    """Text for the page: nothing of it is read as HTML."""
    return escape(visible(text))


def pre_html(text: str) -> str:
    return f"<pre>{safe(text)}</pre>"


def step_html(tree: TrainedTree, v: int) -> str:
    """One step of a training problem's response: its text, what is known of it, and its colour."""
    node, action = tree.nodes[v], tree.action.get(v)
    known = [f"{node['wins']:g} of {node['n']} right"] if node["n"] else []
    known += [f"Q {action['q']:.2f}", f"A {action['adv']:+.2f}"] if action else []
    shade = colour(action["adv"] if action else None)
    numbers = f"<span>{' · '.join(known)}</span>"
    text = pre_html(node["text"].rstrip())
    return f"<div class='step' style='background:{shade}'>{text}{numbers}</div>"


if __name__ == "__main__":
    main(stage, Settings, __doc__)
