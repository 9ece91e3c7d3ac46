"""The pictures of a run: report.png, tree.png, solution.png. It knows nothing of the algorithm."""

import json
import math
from itertools import count
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from support.page import colour, how_right, short, wrapped
from support.report import TrainedTree, advantage_lines, share_of_nothing
from support.stage import read_manifest

# ------------------------------------------------------------ report.png


def plot_report(run: Path, rows: dict[str, dict]) -> Figure:
    """The course of training, all iterations; rows: {"iter0": its figures in summary.json}."""
    figure = Figure(figsize=(18, 10), layout="constrained")
    (accuracy, critic, pairs), (loss, ratios, key) = figure.subplots(2, 3)
    plot_accuracy(accuracy, rows)
    critic.plot([0, 1], [0, 1], "k:", lw=1)
    critic.set(title="critic on held-out states", xlabel="V(s)", ylabel="MC(s), the success rate")
    pairs.set(title="advantages of the pairs", xlabel="A(s, a)", ylabel="pairs", yscale="log")
    pairs.set_xticks([-1, -0.5, 0, 0.5, 1])
    loss.set(title="loss, 1 being the unmoved actor's", xlabel="share of the training steps")
    loss.axhline(1, color="k", ls=":", lw=1)
    ratios.set(title="mean log-ratio (dashed: A ≤ 0)", xlabel="share of the training steps")
    ratios.axhline(0, color="k", ls=":", lw=1)
    trained = [name for name in rows if name != "iter0"]
    for name, hue in zip(trained, colormaps["viridis"](np.linspace(0, 0.9, len(trained)))):
        folder, style = run / name, {"color": hue, "lw": 1.5}
        key.plot([], [], label=f"iteration {name[4:]}", **style)
        if (file := folder / "critic.metrics.json").exists():
            bins = json.loads(file.read_text())["bins"]
            critic.plot([b["value"] for b in bins], [b["mc"] for b in bins], marker="o", **style)
        states = [state for line in advantage_lines(folder) for state in line["states"]]
        if states:
            adv = [action["adv"] for state in states for action in state["actions"]]
            pairs.hist(adv, bins=41, range=(-1, 1), histtype="step", **style)
        if (file := folder / "actor.work" / "metrics.jsonl").exists():
            steps = [json.loads(text) for text in file.open()]
            made = read_manifest(folder / "actor").get("settings", {})
            likelihood = made.get("likelihood", 0.0) / made.get("beta", 1.0)
            x = np.linspace(0, 1, len(steps))
            loss.plot(x, [share_of_nothing([step], likelihood) for step in steps], **style)
            for kind, dash in (("up", "-"), ("down", "--")):
                ratio = [m[f"ratio_{kind}"] / max(1, m[f"pairs_{kind}"]) for m in steps]
                ratios.plot(x, ratio, dash, **style)
    for axis in (accuracy, critic, pairs, loss, ratios):
        axis.grid(alpha=0.3)
    loss.set_ylim(bottom=0)
    key.axis("off")
    if trained:
        key.legend(loc="center", ncols=1 + len(trained) // 12, frameon=False, fontsize=16)
    return figure


def plot_accuracy(axis, rows: dict[str, dict]):
    """Accuracy of all iterations, and reasoning or mean reward where it is another thing."""
    names = [name.removeprefix("iter") for name in rows]  # strings: categories, not numbers
    greedy = [row["accuracy"] for row in rows.values()]
    ends = np.transpose([row["interval"] for row in rows.values()])  # (2, iterations)
    axis.errorbar(names, greedy, np.abs(ends - greedy), fmt="none", ecolor="C0", capsize=5)
    lines = {"accuracy": "greedy, 95 % interval", "sampled": "temperature 1"}
    lines |= {"reasoning": "reasoning right, greedy", "reward": "mean reward, greedy"}
    lines["reasoning_sampled"] = "reasoning right, temperature 1"
    for key, label in lines.items():
        if any(key in row for row in rows.values()):
            dash = "-" if key in ("accuracy", "sampled") else "--"
            values = [row.get(key, math.nan) for row in rows.values()]
            axis.plot(names, values, dash, marker="o", label=label)
    axis.set(title="right on the test problems", xlabel="iteration", ylim=(0, 1.03))
    axis.legend(loc="lower right", fontsize=12)


# ------------------------------------------------------------ solution.png


def plot_solution(chosen: tuple | None) -> Figure | None:
    """A wrong response, its steps coloured by their advantages, and the best step that was drawn
    where it went wrong; chosen: `clearest_mistake`'s (tree, response)."""
    if chosen is None:
        return None
    tree, response = chosen
    state = tree.nodes[tree.worst(response)]["parent"]
    siblings = [v for v in tree.action if tree.nodes[v]["parent"] == state]
    best = max(siblings, key=lambda v: tree.action[v]["adv"])
    lines = [(text, None) for text in wrapped(tree.nodes[0]["text"], 72, 20)]
    lines += [("", None), ("a wrong response", None), *[("", v) for v in response]]
    lines += [("", None), ("drawn there, too", None), ("", best)]
    shown = [
        short(tree.nodes[v]["text"].rstrip().lstrip("\n"), 72) if v else text for text, v in lines
    ]
    letters = max(24, *(len(text) for text, (_, v) in zip(shown, lines) if v)) + 3
    width = max(letters + 34, *map(len, shown))  # in letters
    figure = Figure(figsize=(0.122 * width, 0.36 * len(lines)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, width), ylim=(len(lines) - 0.5, -0.5))
    words = {"family": "monospace", "va": "center", "parse_math": False}
    for x, text in ((letters, "drawn from here"), (letters + 20, "advantage")):
        axis.text(x, lines.index(("a wrong response", None)), text, color="0.35", **words)
    for y, (text, (_, v)) in enumerate(zip(shown, lines)):
        if v is None:
            axis.text(0, y, text, color="0.35", **words)
            continue
        action = tree.action.get(v)
        fill = colour(action["adv"] if action else None)
        axis.text(0, y, text, bbox={"facecolor": fill, "edgecolor": "none", "pad": 3}, **words)
        axis.text(letters, y, how_right(tree.nodes[v]), **words)
        if action:
            axis.text(letters + 20, y, f"{action['adv']:+.2f}", **words)
    return figure


# ------------------------------------------------------------ tree.png

TREE_KEY = """at a state: how many of the responses drawn from it were right
on a step: how often it was drawn there (kept: only in a sample),
Q = value of the state that it leads to, A = Q - the state's mean""".splitlines()


def plot_tree(trees: list[TrainedTree], most: int = 10) -> Figure | None:
    """A small tree in which most is to be seen: states, and steps coloured by their advantage."""
    tree = telling_tree(trees, most)
    if tree is None:
        return None
    place = layout(tree)
    axis = tree_axes(tree, place)
    draw_heading(axis, tree)
    for v, spot in place.items():
        draw_state(axis, tree, v, spot)
        if v:
            draw_step(axis, tree, v, place[tree.nodes[v]["parent"]], spot)
    return axis.figure


def telling_tree(trees: list[TrainedTree], most: int) -> TrainedTree | None:
    """Of the trees of at most `most` nodes with a right and a wrong end the one that branches most
    tellingly at two states: where the advantages are far apart, and the counts agree."""
    best, found = -1.0, None
    for tree in trees:
        if len(tree.nodes) > most or tree.outcomes() != {True, False}:
            continue
        widths = sorted([0.0, *map(tree.contrast, tree.mean)])
        if widths[-2] > best:
            best, found = widths[-2], tree
    return found


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


LINE = 0.27  # height of a line of text, where a row of the tree is 1
LEFT, RIGHT = -0.2, 0.2  # how far text reaches beyond the first and the last state


def tree_axes(tree: TrainedTree, place: dict):
    """Axes: from one state to the next is 1 to the right, a row 1 down."""
    rows = 1 + max(row for _, row in place.values())
    columns = 1 + max(depth for depth, _ in place.values())
    heading = max(len(wrapped(tree.nodes[0]["text"], 60, 8)), len(TREE_KEY))
    top = -0.55 - LINE * heading
    letters = max(len(step_label(tree, v)) for v in place if v)
    inches = 1.2 + 0.16 * max(15, letters)  # from one state to the next
    width = columns - 1 + RIGHT - LEFT
    figure = Figure(figsize=(inches * width, 1.15 * (rows - 0.5 - top)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(LEFT, columns - 1 + RIGHT), ylim=(rows - 0.5, top))
    return axis


def step_label(tree: TrainedTree, v: int) -> str:
    return short(tree.nodes[v]["text"].strip(), 22)


def draw_heading(axis, tree: TrainedTree):
    """The prompt on the left, what the numbers mean on the right."""
    (left, right), (_, top) = axis.get_xlim(), axis.get_ylim()
    words = {"va": "top", "color": "0.35", "parse_math": False}
    for i, text in enumerate(wrapped(tree.nodes[0]["text"], 60, 8)):
        axis.text(left, top + LINE * i, text, family="monospace", **words)
    for i, text in enumerate(TREE_KEY):
        axis.text(right, top + LINE * i, text, ha="right", **words)


def draw_state(axis, tree: TrainedTree, v: int, spot: tuple):
    """A box: how right the draws from there were, and the mean of Q; at an end the verdict."""
    node, edge = tree.nodes[v], "0.3"
    text = how_right(node) or "kept"
    if node["reward"] is not None:
        edge = colour(2 * node["reward"] - 1)  # orange at 0, green at 1
    if v in tree.mean:
        text += f"\nmean {tree.mean[v]:.2f}"
    box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": edge, "lw": 2}
    axis.text(*spot, text, bbox=box, ha="center", va="center", linespacing=1.4)


def draw_step(axis, tree: TrainedTree, v: int, start: tuple, end: tuple):
    """A line from state to state, the step's text above it and its numbers below."""
    node, action = tree.nodes[v], tree.action.get(v)
    turn = start[0] + 0.23  # where the line turns up or down
    axis.plot([start[0], turn, turn, end[0]], [start[1]] * 2 + [end[1]] * 2, color="0.6", zorder=0)
    fill = colour(action["adv"] if action else None)
    box = {"facecolor": fill, "edgecolor": "none", "pad": 2.5}
    words = {"family": "monospace", "va": "bottom", "bbox": box, "parse_math": False}
    axis.text(turn + 0.03, end[1] - 0.1, step_label(tree, v), **words)
    numbers = f"{node['draws']}x" if node["draws"] else "kept"
    if action:
        numbers += f"  Q {action['q']:.2f}  A {action['adv']:+.2f}"
    axis.text(turn + 0.02, end[1] + 0.1, numbers, va="top")
