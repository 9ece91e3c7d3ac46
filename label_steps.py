"""Stage A.2: m completions from every state of the kept responses give its Monte Carlo value.

    python label_steps.py --actor runs/demo/base --problems runs/demo/train.jsonl \\
        --samples runs/demo/iter1/samples.jsonl --out runs/demo/iter1/trees.jsonl

Reads:  samples.jsonl, its problems, and the actor that drew it.
Writes: trees.jsonl, a step tree a problem (node 0: the prompt; tokens: generated for it)
    {"id": "demo/train/17", "prompt_ids": [1, 9], "tokens": 812, "nodes": [
     {"parent": -1, "ids": [], "text": "", "draws": 0, "n": 16, "wins": 9, "reward": null,
      "labelled": true}]}

Samples choose the states, completions measure them. A kept response was kept because of its
outcome, so its own steps come in with no draw, no n and no win. A completion from s counts in n and
wins of s; then it walks down: as long as its next step leads to another kept state, that node's
draws, n and wins go up too; the first step that leaves the kept responses becomes (or meets) a
leaf, which is counted, and the walk ends. So a completion is an unbiased draw at every state that
it passes, and the children's draws of a labelled state sum to its n.

Departures from the paper:
 1. States that several kept responses share are labelled once.
 2. A completion counts at the deeper kept states that it passes, so those need fewer of their own:
    only m - n.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from model import LM, UserError, flag, record_tree
from prepare import Stage, actor_facts, main, read_jsonl, read_samples, sha256
from reward import grade_ids
from sample import Prefixes, draw_key, draw_rows


@dataclass(frozen=True)
class Settings:
    actor: str = flag("the policy that drew the samples, pi_ref")
    problems: str = flag("the problems that the samples are of")
    samples: str = flag("samples.jsonl from sample.py")
    out: str = flag("trees.jsonl to write")
    m: int = flag("completions a state", 16)
    max_new: int = flag("length limit of a whole response in tokens", 2048)
    batch: int = flag("rows decoded at once", 256)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the draws", 0)
    unsafe: bool = flag("run programs even where they cannot be walled off", False)
    force: bool = flag("throw an existing output away", False)


class StepTree:
    """One problem's nodes while they are counted; depth: response tokens up to a node."""

    def __init__(self, prompt_ids: list[int]):
        self.prompt_ids = prompt_ids
        root = {"parent": -1, "ids": [], "text": "", "draws": 0, "n": 0, "wins": 0}
        self.nodes = [root | {"reward": None, "labelled": False}]
        self.child, self.depth, self.tokens = {}, [0], 0
        self.kept = [True]  # states: a kept response goes on from here
        self.open = [[]]  # a node's children that are states

    def step(self, parent: int, ids: list[int], reward: int | None) -> int:
        """The child of `parent` by the step `ids`, made if need be; reward None: it goes on."""
        v = self.child.setdefault((parent, tuple(ids)), len(self.nodes))
        if v == len(self.nodes):
            new = {"parent": parent, "ids": ids, "reward": reward, "n": 0, "wins": 0}
            self.nodes.append(self.nodes[0] | new)
            self.kept.append(False)
            self.depth.append(self.depth[parent] + len(ids))
            self.open.append([])
        elif reward is None:  # a response was cut off here by its length, another goes on
            self.nodes[v]["reward"] = None
        return v

    def keep(self, ids: list[int], ends: list[int], reward: int):
        """Put a kept response's steps in, uncounted."""
        v = 0
        for a, b in zip([0, *ends], ends):
            u = self.step(v, ids[a:b], reward if b == ends[-1] else None)
            if b != ends[-1] and not self.kept[u]:
                self.kept[u] = True
                self.open[v].append(u)
            v = u

    def complete(self, v: int, ids: list[int], cut, reward: int):
        """Count one completion drawn at node v, and go on at every kept state that it passes.

        cut: LM.step_ends. It looks a token ahead (a blank line joins the step before it), so a kept
        state is passed if its tokens begin the completion, whatever the completion's own cut is:
        only then is each completion an unbiased draw at each state.
        """
        self._count(v, reward)
        end = cut(ids)[0]
        last = end == len(ids)
        step = self.step(v, ids[:end], reward if last else None)
        self.nodes[step]["draws"] += 1
        if last or not self.kept[step]:
            self._count(step, reward)
        for u in self.open[v]:
            size = len(self.nodes[u]["ids"])
            if size < len(ids) and ids[:size] == self.nodes[u]["ids"]:
                self.complete(u, ids[size:], cut, reward)

    def _count(self, v: int, reward: int):
        self.nodes[v]["n"] += 1
        self.nodes[v]["wins"] += reward

    def states(self) -> list[list[int]]:
        """Kept states that go on, by steps from the prompt: shallow ones are labelled first."""
        levels, level = [], {0: 0}
        for v, node in enumerate(self.nodes):
            if v:
                level[v] = level[node["parent"]] + 1
            if self.kept[v]:
                levels += [[] for _ in range(level[v] + 1 - len(levels))]
                levels[level[v]].append(v)
        return levels

    def response(self, v: int) -> list[int]:
        """Token ids from the prompt's end to node v."""
        ids = []
        while v:
            ids[:0] = self.nodes[v]["ids"]
            v = self.nodes[v]["parent"]
        return ids


def stage(s: Settings):
    needs = ("id", "prompt", "answer or tests")
    problems = {p["id"]: p for p in read_jsonl(Path(s.problems), needs)}
    samples = read_samples(s.samples)
    out = Stage(s.out, s, {"actor": s.actor, "problems": s.problems, "samples": s.samples})
    if out.complete:
        return
    lm = LM(s.actor, dtype=s.dtype)
    facts = {**actor_facts(lm, s.max_new), "problems": sha256(s.problems)}
    out.begin(facts, expects=facts)
    if foreign := next((r["id"] for r in samples if r["id"] not in problems), None):
        raise UserError(
            f"{s.samples}: {foreign} is not in {s.problems}; pass the problems it was drawn from"
        )
    done = {r["id"] for r in out.done}
    todo = [r for r in samples if r["kept"] and r["id"] not in done]
    total = Counter()
    with tqdm(desc="label_steps", unit=" tokens", disable=None) as progress:
        for i in range(0, len(todo), 64):
            chunk = todo[i : i + 64]
            trees = [plant(r) for r in chunk]
            label(lm, s, chunk, trees, [problems[r["id"]] for r in chunk], total, progress)
            for r in chunk:
                total["unshared"] += sum(len(r["responses"][k]["ends"]) for k in r["kept"])
            out.append([record(lm, r["id"], t) for r, t in zip(chunk, trees)])
    out.finish()
    if total["completions"]:
        print(
            f"{total['states']} states labelled ({total['unshared']} before sharing), {total['completions']} completions "
            f"({1 - total['completions'] / (s.m * total['unshared']):.0%} saved), {total['tokens']} tokens generated, "
            f"{total['prefilled']} prefilled ({total['prefixes'] / total['prefilled']:.0f} times fewer than one by one)"
        )


def plant(sample_record: dict) -> StepTree:
    """The tree of a problem's kept responses, all in it before the first completion."""
    tree = StepTree(sample_record["prompt_ids"])
    for k in sample_record["kept"]:
        r = sample_record["responses"][k]
        if r["ends"]:
            tree.keep(r["ids"], r["ends"], r["reward"])
    return tree


def label(lm: LM, s: Settings, chunk, trees: list[StepTree], problems, total: Counter, progress):
    """Top every kept state of a chunk's trees up to m completions, level by level."""
    levels = [t.states() for t in trees]
    prefix_trees = []
    for tree, states in zip(trees, levels):
        wanted = {v for level in states for v in level}
        nodes = {"prompt_ids": tree.prompt_ids, "nodes": tree.nodes}
        prefix_trees.append(record_tree(nodes, [v in wanted for v in range(len(tree.nodes))]))
    prefixes = Prefixes(lm, prefix_trees)
    total["prefilled"] += prefixes.tokens
    for depth in range(max(map(len, levels))):
        rows = []
        for t, (tree, states) in enumerate(zip(trees, levels)):
            for v in states[depth] if depth < len(states) else []:
                total["states"] += 1
                room = s.max_new - tree.depth[v]
                for k in range(s.m - tree.nodes[v]["n"]):
                    rows.append((t, v, draw_key(s.seed, "label", chunk[t]["id"], v, k), room))
                    total["prefixes"] += len(prefixes.path[t, v])
        drawn = draw_rows(lm, prefixes, rows, batch=s.batch, progress=progress)
        whole = [trees[t].response(v) + ids for (t, v, *_), ids in zip(rows, drawn)]
        graded = grade_ids(lm, [problems[t] for t, *_ in rows], whole, s.unsafe)
        for (t, v, *_), ids, grade in zip(rows, drawn, graded):
            trees[t].tokens += len(ids)
            trees[t].complete(v, ids, lm.step_ends, int(grade["correct"]))
        total["completions"] += len(rows)
        total["tokens"] += sum(map(len, drawn))


def record(lm: LM, problem_id: str, tree: StepTree) -> dict:
    for v, node in enumerate(tree.nodes):
        node["text"] = lm.text(node["ids"] if v else tree.prompt_ids)
        node["labelled"] = tree.kept[v]
    whole = {"id": problem_id, "prompt_ids": tree.prompt_ids, "tokens": tree.tokens}
    return whole | {"nodes": tree.nodes}


if __name__ == "__main__":
    main(stage, Settings, __doc__)
