"""report. It knows nothing of the algorithm."""

import json
import math
import warnings
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from support.cli import UserError
from support.page import colour, page, short, wrapped
from support.records import each_record, read_jsonl, replace
from support.stage import read_manifest


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
    titles = {path: PICTURES[path.name] for path in pictures}
    text = page(run, [HEAD, *table], titles, [*rows], trees)
    replace(run / "report.html", lambda path: path.write_text(text, "utf-8"))
    print(run / "report.html")


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
