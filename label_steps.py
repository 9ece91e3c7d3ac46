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

from model import LM, Progress, UserError, flag, record_tree
from prepare import Stage, actor_facts, each_record, main, misfit, read_jsonl, sha256
from reward import grade_ids
from sample import REWARD, Prefixes, Server, draw, draw_key, each_sample, work_through


@dataclass(frozen=True)
class Settings:
    actor: str = flag("the policy that drew the samples, pi_ref")
    problems: str = flag("the problems that the samples are of")
    samples: str = flag("samples.jsonl from sample.py")
    out: str = flag("trees.jsonl to write")
    m: int = flag("completions a state", 16)
    max_new: int = flag("length limit of a whole response in tokens", 2048)
    batch: int = flag("rows decoded at once", 256)
    server: str = flag("URL of a server that serves the actor, or several, comma separated", "")
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the draws", 0)
    unsafe: bool = flag("run programs even where they cannot be walled off", False)
    force: bool = flag("throw an existing output away", False)


NODE = {"parent": int, "ids": [int], "text": str, "draws": int, "n": int, "wins": REWARD}
NODE |= {"reward": REWARD | None, "labelled": bool}


def read_trees(path: str) -> list[dict]:
    """trees.jsonl, looked at whole: a tree that is none would be trained on without a word."""
    records, known = [], {}
    for record in each_record(path, ("id", "prompt_ids", "nodes")):
        if bad := broken_tree(record, known):
            raise UserError(f"{path}: {record['id']}, {bad}: no step tree; make it anew")
        records.append(record)
    return records


def share_numbers(record: dict, known: dict[int, int]):
    """Make equal token ids one object: in a list each takes 8 bytes of memory then, not 36."""
    record["ids"] = list(map(known.setdefault, record["ids"], record["ids"]))


def broken_tree(record: dict, known: dict[int, int]) -> str | None:
    """What is wrong with a line of trees.jsonl; None if it is a step tree."""
    if bad := misfit(record, {"prompt_ids": [int], "nodes": [NODE]}):
        return bad
    for v, node in enumerate(record["nodes"]):
        share_numbers(node, known)
        grows = node["parent"] in range(v) and node["ids"] if v else node["parent"] == -1
        counts = 0 <= node["wins"] <= node["n"] and node["draws"] >= 0
        if not (grows and counts):
            return f"nodes[{v}]"
        if not 0 <= (node["reward"] or 0) <= 1:
            return f"nodes[{v}] reward"
    return None


class StepTree:
    """One problem's nodes while they are counted: the lists below have an item a node."""

    def __init__(self, prompt_ids: list[int]):
        self.prompt_ids = prompt_ids
        root = {"parent": -1, "ids": [], "text": "", "draws": 0, "n": 0, "wins": 0}
        self.nodes = [root | {"reward": None, "labelled": False}]
        self.depth = [0]  # response tokens up to the node
        self.is_state = [True]  # a kept response goes on from here, so it is to be labelled
        self.states_below = [[]]  # its children that are states
        self.child = {}  # (node, token ids of a step): the child that the step leads to
        self.tokens = 0  # generated for this problem

    def step(self, parent: int, ids: list[int], reward: float | None) -> int:
        """The child of `parent` by the step `ids`, made if need be; reward None: it goes on."""
        v = self.child.setdefault((parent, tuple(ids)), len(self.nodes))
        if v == len(self.nodes):
            new = {"parent": parent, "ids": ids, "reward": reward, "n": 0, "wins": 0}
            self.nodes.append(self.nodes[0] | new)
            self.depth.append(self.depth[parent] + len(ids))
            self.is_state.append(False)
            self.states_below.append([])
        elif reward is None:  # a response was cut off here by its length, another goes on
            self.nodes[v]["reward"] = None
        return v

    def keep(self, ids: list[int], ends: list[int], reward: float):
        """Put a kept response's steps in, uncounted: it was kept because of its outcome."""
        v, begin = 0, 0
        for end in ends:
            last = end == ends[-1]
            u = self.step(v, ids[begin:end], reward if last else None)
            if not last and not self.is_state[u]:
                self.is_state[u] = True
                self.states_below[v].append(u)
            v, begin = u, end

    def complete(self, v: int, ids: list[int], cut, reward: float):
        """Count one completion drawn at node v, and go on at every state that it passes.

        cut: LM.step_ends. It looks a token ahead (a blank line joins the step before it), so a state
        is passed if its tokens begin the completion, whatever the completion's own cut is: only
        then is each completion an unbiased draw at each state.
        """
        self._count(v, reward)
        end = cut(ids)[0]
        last = end == len(ids)
        step = self.step(v, ids[:end], reward if last else None)
        self.nodes[step]["draws"] += 1
        if last or not self.is_state[step]:
            self._count(step, reward)
        for u in self.states_below[v]:
            size = len(self.nodes[u]["ids"])
            if size < len(ids) and ids[:size] == self.nodes[u]["ids"]:
                self.complete(u, ids[size:], cut, reward)

    def _count(self, v: int, reward: float):
        self.nodes[v]["n"] += 1
        self.nodes[v]["wins"] += reward

    def levels(self) -> list[list[int]]:
        """The states by steps from the prompt: shallow ones are labelled first."""
        levels, level = [], [0] * len(self.nodes)
        for v, node in enumerate(self.nodes):
            if v:
                level[v] = level[node["parent"]] + 1
            if self.is_state[v]:
                while len(levels) <= level[v]:
                    levels.append([])
                levels[level[v]].append(v)
        return levels

    def response(self, v: int) -> list[int]:
        """Token ids from the prompt's end to node v."""
        ids = []
        while v:
            ids = self.nodes[v]["ids"] + ids
            v = self.nodes[v]["parent"]
        return ids

    def record(self, lm: LM, problem_id: str) -> dict:
        """The line of trees.jsonl."""
        for v, node in enumerate(self.nodes):
            node["text"] = lm.text(node["ids"] if v else self.prompt_ids)
            node["labelled"] = self.is_state[v]
        whole = {"id": problem_id, "prompt_ids": self.prompt_ids, "tokens": self.tokens}
        return whole | {"nodes": self.nodes}


def plant(sample_record: dict) -> StepTree:
    """The tree of a problem's kept responses, all in it before the first completion."""
    tree = StepTree(sample_record["prompt_ids"])
    for k in sample_record["kept"]:
        response = sample_record["responses"][k]
        if response["ends"]:
            tree.keep(response["ids"], response["ends"], response["reward"])
    return tree


def label(lm: LM, problems: list[dict], trees: list[StepTree], s: Settings, progress, server):
    """Top every state of these problems' trees up to m completions, level by level.

    Shallow states come first, since their completions count at the deeper states that they pass.
    -> how much was done, by name.
    """
    done = Counter()
    levels = [tree.levels() for tree in trees]
    prefix_trees = []
    for tree in trees:
        nodes = {"prompt_ids": tree.prompt_ids, "nodes": tree.nodes}
        prefix_trees.append(record_tree(nodes, list(tree.is_state)))
    prefixes = None
    if not server:
        prefixes = Prefixes(lm, prefix_trees)  # once for all levels
        done["prefilled"] += prefixes.tokens
    for depth in range(max(map(len, levels))):
        rows = []
        for t, tree in enumerate(trees):
            for v in levels[t][depth] if depth < len(levels[t]) else ():
                room = s.max_new - tree.depth[v]
                missing = max(0, s.m - tree.nodes[v]["n"])
                for k in range(missing):
                    rows.append((t, v, draw_key(s.seed, "label", problems[t]["id"], v, k), room))
                done["states"] += 1
                done["prefixes"] += missing * (len(tree.prompt_ids) + tree.depth[v])
        how = {"batch": s.batch, "progress": progress, "prefixes": prefixes, "server": server}
        drawn = draw(lm, prefix_trees, rows, **how)
        whole, owners = [], []
        for (t, v, *_), ids in zip(rows, drawn):
            whole.append(trees[t].response(v) + ids)
            owners.append(problems[t])
        graded = grade_ids(lm, owners, whole, s.unsafe)
        for (t, v, *_), ids, grade in zip(rows, drawn, graded):
            trees[t].tokens += len(ids)
            trees[t].complete(v, ids, lm.step_ends, grade["reward"])
            done["tokens"] += len(ids)
        done["completions"] += len(rows)
    return done


def stage(s: Settings):
    needs = ("id", "prompt", "answer or tests")
    problems = {p["id"]: p for p in read_jsonl(Path(s.problems), needs)}
    # The file is looked at whole before anything is drawn, but never held whole.
    sampled, foreign = 0, None
    for record in each_sample(s.samples):
        sampled += bool(record["kept"])
        if record["id"] not in problems:
            foreign = record["id"]
    inputs = {"actor": s.actor, "problems": s.problems, "samples": s.samples}
    out = Stage("label_steps.py", s.out, s, inputs)
    if out.complete:
        return
    lm = LM(s.actor, dtype=s.dtype, weights=not s.server)
    server = Server(s.server, lm) if s.server else None
    facts = {**actor_facts(lm, s.max_new), "problems": sha256(s.problems)}
    out.begin(facts | ({"draws": "server"} if server else {}), expects=facts)
    if foreign:
        wrong = f"{foreign} is not in {s.problems}"
        raise UserError(f"{s.samples}: {wrong}; pass the problems it was drawn from")
    todo = (r for r in each_sample(s.samples) if r["kept"] and r["id"] not in out.done)
    counts = []  # of each chunk
    with Progress("label_steps", sampled - len(out.done)) as progress:

        def process(chunk: list[dict]) -> list[dict]:
            trees = [plant(record) for record in chunk]
            owners = [problems[record["id"]] for record in chunk]
            counts.append(label(lm, owners, trees, s, progress, server))
            for record in chunk:
                for k in record["kept"]:
                    counts[-1]["unshared"] += len(record["responses"][k]["ends"])
            progress.update(len(chunk))
            return [tree.record(lm, record["id"]) for tree, record in zip(trees, chunk)]

        work_through(todo, process, out, server)
    out.finish()
    total = sum(counts, Counter())
    if total["completions"]:
        saved = 1 - total["completions"] / (s.m * total["unshared"])
        print(
            f"{total['states']} states labelled ({total['unshared']} before sharing), "
            f"{total['completions']} completions ({saved:.0%} saved), "
            f"{total['tokens']} tokens generated"
        )
    if total["prefilled"]:
        fewer = total["prefixes"] / total["prefilled"]
        print(f"{total['prefilled']} tokens prefilled ({fewer:.0f} times fewer than one by one)")


if __name__ == "__main__":
    main(stage, Settings, __doc__)
