"""What a run says of itself: numbers in words, a table, and the report of a run folder. It knows
nothing of the algorithm: it reads the files that the stages wrote."""

import json
import math
import warnings
from itertools import islice
from pathlib import Path
from statistics import pstdev
from typing import NamedTuple

from support.cli import UserError
from support.page import how_right, page, short, wrapped
from support.records import each_record, read_jsonl, replace

# ------------------------------------------------------------ what an iteration learned from


class TrainedTree(NamedTuple):
    """One problem of an iteration: its step tree and what was trained on.

    action    {node: {"q", "adv", ..}} of the steps that were pairs of training
    mean      {node: mean of eq. 13, with V(s) in it by --value_draws} of the states trained on
    value     V of every node, where somebody still has it
    """

    id: str
    nodes: list[dict]
    action: dict[int, dict]
    mean: dict[int, float]
    value: list = ()

    def q(self, v: int) -> float | None:
        """Q of the step that leads to node v, which is V of that state; None if it is not known."""
        if v in self.action:
            return self.action[v]["q"]
        return self.value[v] if self.value else None

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
        return self.nodes[response[-1]]["reward"] == 1

    def outcomes(self) -> set[bool]:
        """{True, False} where some of its whole responses are right and some are not."""
        return {self.right(response) for response in self.responses()}

    def spread(self, steps: list[int]) -> float:
        """How far apart the advantages of some steps are; 0 if none is known."""
        known = [self.action[v]["adv"] for v in steps if v in self.action]
        return max(known) - min(known) if known else 0.0

    def contrast(self, state: int) -> float:
        """How far the actions of a state differ, by their advantages and by their counts alike: the
        smaller of the two. Steps that end the response are left out: they need no critic."""
        on = [v for v in self.action if self.nodes[v]["parent"] == state]
        on = [v for v in on if self.nodes[v]["reward"] is None]
        if not on:
            return 0.0
        counts = [self.nodes[v]["wins"] / self.nodes[v]["n"] for v in on]
        return min(self.spread(on), max(counts) - min(counts))

    def worst(self, response: list[int]) -> int | None:
        """The step with the lowest advantage; None if none is known."""
        known = [v for v in response if v in self.action]
        return min(known, key=lambda v: self.action[v]["adv"], default=None)

    def mistake(self, response: list[int]) -> float:
        """How far its worst step stands out: below 0, and below all of its other steps; 0 if it does
        not, or if it is the last one, whose reward needs no critic to see it."""
        worst = self.worst(response)
        if worst in (None, response[-1]):
            return 0.0
        others = [self.action[v]["adv"] for v in response if v in self.action and v != worst]
        return max(0.0, min([0.0, *others]) - self.action[worst]["adv"])

    def right_beside(self, wrong: list[int]) -> tuple[list[int], int]:
        """Of its right responses the one that goes with a wrong one for longest, and parts from it
        with the best step; and that step."""
        partings = []
        for right in filter(self.right, self.responses()):
            step = next(v for v in right if v not in wrong)
            adv = self.action[step]["adv"] if step in self.action else -1.0
            partings.append((right.index(step), adv, right, step))
        *_, right, step = max(partings)
        return right, step

    def lines(self) -> int:
        """How many lines its prompt and its longest response take."""
        prompt = self.nodes[0]["text"].strip().count("\n") + 1
        return prompt + max(map(len, self.responses()))


def trained_tree(record: dict, states: list[dict], value: list = ()) -> TrainedTree:
    """record: a line of trees.jsonl; states: those of the same problem in the advantages."""
    action = {a["node"]: a for state in states for a in state["actions"]}
    mean = {state["node"]: state["mean"] for state in states}
    return TrainedTree(record["id"], record["nodes"], action, mean, value)


def advantage_lines(folder: Path) -> list[dict]:
    """The lines of the advantages that the actor of an iteration was trained on, if any."""
    path = folder / "actor.advantages.jsonl"
    return read_jsonl(path, may_be_empty=True) if path.exists() else []


def trained_trees(folder: Path, most: int = 1000) -> list[TrainedTree]:
    """An iteration's first trees of which some state was trained on."""
    states = {line["id"]: line["states"] for line in advantage_lines(folder)}
    if not states or not (folder / "trees.jsonl").exists():  # of a large run people delete them
        return []
    found = []
    with (folder / "trees.jsonl").open() as lines:  # they may be gigabytes: no more than is used
        for record in map(json.loads, islice(lines, most)):
            if here := states.get(record["id"]):
                found.append(trained_tree(record, here))
    return found


def clearest_mistake(trees: list[TrainedTree], most: int = 12) -> tuple | None:
    """(tree, response): the wrong response whose worst step stands out most, in a problem of at most
    `most` lines that has a right response too; None if there is none.

    One from which a right response parts just there, with a good step, comes before all others.
    """
    best, found = (False, 0.0), None
    for tree in trees:
        if tree.outcomes() != {True, False} or tree.lines() > most:
            continue
        for wrong in tree.responses():
            if tree.right(wrong) or not tree.mistake(wrong):
                continue
            _, step = tree.right_beside(wrong)
            good = step in tree.action and tree.action[step]["adv"] > 0
            there = tree.nodes[step]["parent"] == tree.nodes[tree.worst(wrong)]["parent"]
            score = good and there, tree.mistake(wrong)
            if score > best:
                best, found = score, (tree, wrong)
    return found


# ------------------------------------------------------------ in words


def percents(interval: list[float], sign: str = "") -> str:
    """[0.395, 0.482] -> "[39.5%, 48.2%]"; sign "+": "[+39.5%, +48.2%]" """
    return "[" + ", ".join(f"{x:{sign}.1%}" for x in interval) + "]"


def evaluation_words(name: str, row: dict, against: str) -> list[str]:
    """The lines that evaluate.py prints of a test set; row: the set's figures in summary.json."""

    def both(key: str, unit: str) -> str:
        """A figure of the greedy responses, and of the sampled ones if there are any."""
        greedy, sampled = row[key], row.get(f"{key}_sampled")
        more = "" if sampled is None else f", {sampled:{unit}} at temperature 1"
        return f"{greedy:{unit}} greedy{more}"

    sampled = f", {row['sampled']:.1%} at temperature 1" if "sampled" in row else ""
    interval = f"95 % interval {percents(row['interval'])}"
    lines = [f"{name}: right {row['accuracy']:.1%} greedy ({interval}){sampled}; n {row['n']}"]
    if "reward" in row:
        lines.append(f"  mean reward {both('reward', '.3f')} (right is full reward only)")
    if "reasoning" in row:
        lines.append(f"  reasoning right {both('reasoning', '.1%')} (other right answers are luck)")
    cut_off, unparsed = f"{row['cut_off']:.1%}", f"{row['unparsed']:.1%}"
    lines.append(f"  cut off by the length limit {cut_off}, without an answer {unparsed}")
    if "against" in row:
        greedy = row["against"]["greedy"]
        gain = f"{greedy['difference']:+.1%} {percents(greedy['interval'], '+')}"
        lines.append(f"  greedy {gain}, p {greedy['p']:.2g}, against {against}")
    return lines


def critic_words(metrics: dict) -> str:
    """How good a critic is, and what chance would be; metrics: critic.metrics.json."""
    states, pairs = metrics["states"], metrics["sibling_pairs"]
    found = f"critic's AUC {metrics['auc']:.2f} on {states:,} held-out states (0.5 is chance)"
    found += f"; calibration error {metrics['calibration_error']:.2f} (0 is best)"
    if pairs:
        found += f"; of {pairs:,} pairs of steps from one state {metrics['siblings']:.2f} in order"
        found += " (0.5 is chance)"
    return found


def pairs_words(states: list[dict], gap: float) -> str:
    """How many pairs there are, and how far their advantages are apart; states: those of the
    advantages that pass the gap."""
    adv = [action["adv"] for state in states for action in state["actions"]]
    found = f"{len(adv):,} pairs of a state and a step, of {len(states):,} states"
    if gap:
        found += f" with gap >= {gap}"
    if adv:
        spread = f"from {min(adv):+.2f} to {max(adv):+.2f}, standard deviation {pstdev(adv):.2f}"
        found += f"; advantages {spread} (near 0: nothing to learn)"
    return found


def share_of_nothing(steps: list[dict], likelihood: float = 0.0) -> float:
    """Eq. 12's loss as a share of what it would be if the actor had not moved, NaN if that is 0.

    steps: lines of metrics.jsonl; likelihood: weight of the nll in their loss, which is taken out
    """
    loss = sum(step["loss"] - likelihood * step["nll"] for step in steps)
    nothing = sum(step["do_nothing"] for step in steps)
    return loss / nothing if nothing else math.nan


def actor_words(steps: list[dict], likelihood: float = 0.0) -> str:
    """How far the actor has come in the last quarter of its training; arguments: as above."""
    if not steps:
        return "nothing to train on"
    late, found = steps[-max(1, len(steps) // 4) :], []
    share = share_of_nothing(late, likelihood)
    if not math.isnan(share):
        found.append(
            f"loss {share:.2f} of the unmoved actor's (1: nothing learned, 0: all learned)"
        )
    for kind, name in (("up", "better"), ("down", "worse")):
        if pairs := sum(step[f"pairs_{kind}"] for step in late):
            ratio = sum(step[f"ratio_{kind}"] for step in late) / pairs
            found.append(f"mean log-ratio of {name} steps {ratio:+.2f}")
    return f"{'; '.join(found)} (last {len(late)} of {len(steps)} training steps)"


def problem_words(trees: list[TrainedTree], most: int = 30) -> list[str]:
    """One whole problem as text: prompt, a right and a wrong response, up to `most` steps of each
    with their numbers.

    It is the one with the clearest mistake; else the first with a right and a wrong response.
    """
    tree, wrong = clearest_mistake(trees) or (None, None)
    if tree is None:
        tree = next((tree for tree in trees if tree.outcomes() == {True, False}), None)
    if tree is None:
        return ["no problem has both a right and a wrong response to show"]
    wrong = wrong or next(r for r in tree.responses() if not tree.right(r))
    lines = [f"One of the problems, {tree.id}:"]
    lines += [f"    {line}" for line in wrapped(tree.nodes[0]["text"], 90, 20)]
    right, _ = tree.right_beside(wrong)
    for name, response in (("right", right), ("wrong", wrong)):
        head = f"a {name} response"
        lines += ["", f"  {head:42}{'Q':>6}{'A':>8}   drawn from there"]
        for v in response[:most]:
            text, q = short(tree.nodes[v]["text"].strip(), 39), tree.q(v)
            action = tree.action.get(v)
            value = "" if q is None else f"{q:.2f}"
            adv = f"{action['adv']:+.2f}" if action else ""
            lines.append(f"    {text:40}{value:>6}{adv:>8}   {how_right(tree.nodes[v])}".rstrip())
        if len(response) > most:
            lines.append(f"    ... and {len(response) - most} more steps")
    lines += [
        "",
        "  (Q: value of the state after the step. A: advantage, Q - the mean Q of the steps",
    ]
    return [*lines, "  drawn there; none where these are too alike to train on.)"]


# ------------------------------------------------------------ the table


def iterations(run: Path, name: str) -> list[Path]:
    """The files of that name in a run's folders iter0, iter1, .., in this order."""
    files = [file for file in run.glob(f"iter*/{name}") if file.parent.name[4:].isdigit()]
    return sorted(files, key=lambda file: int(file.parent.name[4:]))


COLUMNS = ("tokens", "greedy", "T=1", "mean reward", "mean reward, T=1", "reasoning right")
COLUMNS += ("reasoning right, T=1", "greedy gain", "p", "T=1 gain")


def table_row(row: dict) -> dict[str, str]:
    """{column: cell} of one evaluation; row: its figures in summary.json."""
    cells = {"greedy": f"{row['accuracy']:.1%} {percents(row['interval'])}"}
    shares = {"sampled": "T=1", "reasoning": "reasoning right"}
    shares["reasoning_sampled"] = "reasoning right, T=1"
    for key, column in shares.items():
        if key in row:
            cells[column] = f"{row[key]:.1%}"
    for key, column in (("reward", "mean reward"), ("reward_sampled", "mean reward, T=1")):
        if key in row:
            cells[column] = f"{row[key]:.3f}"
    for key, found in row.get("against", {}).items():
        column = {"greedy": "greedy gain", "sampled": "T=1 gain"}[key]
        cells[column] = f"{found['difference']:+.1%} {percents(found['interval'], '+')}"
        if "p" in found:
            cells["p"] = f"{found['p']:.2g}"
    return cells


def table(rows: list[tuple[str, dict]]) -> list[list[str]]:
    """The head and a row per (name, {column: cell}); a column only where some row has a cell."""
    columns = [column for column in COLUMNS if any(column in cells for _, cells in rows)]
    body = [[name, *[cells.get(column, "") for column in columns]] for name, cells in rows]
    return [["", *columns], *body]


TABLE_KEY = """greedy, T=1: share of right responses, decoded greedily and sampled at temperature 1; in [ ] 95 %
intervals; gain: above the first row, on the same problems; p: McNemar's test of the greedy gain"""


def aligned(cells: list[list[str]]) -> list[str]:
    """The rows of a table as lines: the first column begins in line, the others end in line."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        others = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([f"{first:{widths[0]}}", *others]).rstrip())
    return lines


# ------------------------------------------------------------ the report of a run folder

PICTURES = {  # their names, and what the page says above them
    "report.png": "The course of training",
    "tree.png": "A step tree of iteration 1",
    "solution.png": "A wrong response of iteration 1, and what training made of each step",
}


def sampled_tokens(iteration: Path) -> int:
    """How many tokens an iteration drew: its samples, and the completions of their steps."""
    total = 0
    for name in ("samples.jsonl", "trees.jsonl"):
        if (iteration / name).exists():
            for record in each_record(iteration / name):
                total += sum(len(response["ids"]) for response in record.get("responses", ()))
                total += record.get("tokens", 0)
    return total


def report(run: Path):
    """Print the table over iterations, then draw the pictures and write the page."""
    import matplotlib  # it takes half a second, and no stage but this needs it

    from support.pictures import plot_report, plot_solution, plot_tree

    files = iterations(run, "summary.json")
    if not files:
        raise UserError(f"{run}: no iter*/summary.json; run the stages first (python run.py)")
    rows = {f.parent.name: [*json.loads(f.read_text())["sets"].values()][-1] for f in files}
    lines, tokens = [], 0
    for name, row in rows.items():
        tokens += sampled_tokens(run / name)
        drawn = {"tokens": f"{tokens:,}"} if tokens else {}
        lines.append((name, drawn | table_row(row)))
    cells = table(lines)
    print("\n".join([*aligned(cells), TABLE_KEY]))
    trees = trained_trees(run / "iter1")
    pictures, missing = {}, []
    warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
    with matplotlib.rc_context({"font.size": 14}):  # legible at half its size
        figures = plot_report(run, rows), plot_tree(trees), plot_solution(clearest_mistake(trees))
        for name, figure in zip(PICTURES, figures):
            if figure is None:
                missing.append(name)
                (run / name).unlink(missing_ok=True)  # of an earlier report
                continue
            figure.savefig(run / name, dpi=110, bbox_inches="tight", facecolor="white")
            pictures[run / name] = PICTURES[name]
            print(run / name)
    if missing:
        why = "no small problem has both a right response and a wrong one to show"
        why = why if trees else "iter1 has no trees and advantages"
        print(f"not drawn: {', '.join(missing)} ({why})")
    text = page(run, cells, TABLE_KEY, pictures, [*rows], trees)
    replace(run / "report.html", lambda path: path.write_text(text, "utf-8"))
    print(run / "report.html")
