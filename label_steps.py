"""Stage A.2: m completions from every state of the kept responses give its Monte Carlo value.

    python label_steps.py --actor runs/demo/base --problems runs/demo/train.jsonl \\
        --samples runs/demo/iter1/samples.jsonl --out runs/demo/iter1/trees.jsonl

Reads:  samples.jsonl, its problems, and the actor that drew it.
Writes: trees.jsonl, a step tree per problem (node 0: the prompt, by its text; tokens: generated for it)
    {"id": "demo/train/17", "prompt": "..", "prompt_ids": [1, 9], "tokens": 812, "nodes": [
     {"parent": -1, "ids": [], "text": "..", "draws": 0, "n": 16, "wins": 9, "reward": null,
      "labelled": true}]}

Samples choose the states, completions measure them (without --whole_draws). A kept response was
kept because of its outcome, so its own steps come in with no draw, no n and no win. A completion
from s counts in n and wins of s; then it walks down: as long as its next step leads to another
kept state, that node's draws, n and wins go up too. The first step that leaves the kept responses
leads to a leaf, made if it is not there yet; it is counted, and the walk ends. So a completion is
an unbiased draw at every state that it passes, and the children's draws of a labelled state sum to
its n.

Departures from the paper, by default:
 1. States that several kept responses share are labelled once.
 2. A completion counts at the deeper kept states that it passes, so those need fewer of their own:
    only m - n.

Beyond the paper, off by default:
 3. --whole_draws wastes no draw: all responses are in the tree and count (all of them are a fair
    sample, only the kept ones are not), and of responses and completions every step, not the first
    one alone, is an action that leads to a state. With --m 0 no completion is drawn at all: the
    samples are the tree. All states are `labelled` then, since the kept ones alone would be chosen
    by their outcome. One bias comes with it: of "a\\n" and "a\\n\\n" as different tokens, the state
    after "a\\n" is in the tree only if some draw went on from it without the blank line.
"""

from dataclasses import dataclass
from functools import partial

from model import LM, checked_step_ends, load_lm
from reward import grade_ids
from support.cli import Progress, UserError, flag, main
from support.packing import record_tree
from support.records import each_sample, read_problems, sha256
from support.sampler import Row, Sampler, draw_key, require_single_process
from support.server import sampler_for
from support.stage import Output, actor_provenance, read_manifest, stated_by


@dataclass(frozen=True)
class Settings:
    actor: str = flag("the policy that drew the samples, pi_ref")
    problems: str = flag("the problems that the samples are of")
    samples: str = flag("samples.jsonl from sample.py")
    out: str = flag("trees.jsonl to write")
    m: int = flag("completions per state; 0 with --whole_draws: none", 16, least=0)
    whole_draws: bool = flag("count all responses, and every step of a completion", False)
    max_new: int = flag("length limit of a whole response in tokens", 2048)
    batch: int = flag("rows decoded at once, at least 16", 256, may_change=True)
    server: str = flag("URL of a server that serves the actor, or several, comma separated", "")
    workers: int = flag("processes that ask the server, decode and grade", 1)
    engines: int = flag("data-parallel engines of a server; 0: as many as it says", 0)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the draws", 0)
    unsafe: bool = flag("run programs even where they cannot be walled off", False, may_change=True)
    force: bool = flag("throw an existing output away", False)


class StepTree:
    """One problem's nodes while they are counted: the lists below have one item per node.

    whole_draws: every step that is drawn leads to a state, not those of kept responses alone.
    """

    def __init__(self, prompt_ids: list[int], whole_draws: bool = False):
        self.prompt_ids, self.whole_draws = prompt_ids, whole_draws
        self.nodes = []  # as they are written
        self.depth = []  # response tokens up to the node
        self.to_label = []  # a kept response goes on from here
        self.followed = []  # a draw that comes here is followed further
        self.followed_below = []  # its children that are followed
        self.child = {}  # (node, token ids of a step): the child that the step leads to
        self.tokens = 0  # generated for this problem
        self._add(-1, [], None, depth=0)
        self.to_label[0] = self.followed[0] = True

    def _add(self, parent: int, ids: list[int], reward: float | None, depth: int):
        """A new node, without counts."""
        node = {"parent": parent, "ids": ids, "text": "", "draws": 0, "n": 0, "wins": 0}
        self.nodes.append(node | {"reward": reward, "labelled": False})
        self.depth.append(depth)
        self.to_label.append(False)
        self.followed.append(False)
        self.followed_below.append([])

    def child_by(self, parent: int, ids: list[int], reward: float | None) -> int:
        """The child of `parent` by the step `ids`, made if need be; reward None: it goes on."""
        v = self.child.setdefault((parent, tuple(ids)), len(self.nodes))
        if v == len(self.nodes):
            self._add(parent, ids, reward, self.depth[parent] + len(ids))
        return v

    def put_in(self, ids: list[int], ends: list[int], reward: float, to_label: bool = True):
        """Make a response's steps nodes, uncounted: a kept one was kept because of its outcome."""
        v, begin = 0, 0
        for end in ends:
            last = end == ends[-1]
            v, begin = self.child_by(v, ids[begin:end], reward if last else None), end
            if not last:
                self.to_label[v] |= to_label
                self._follow(v)

    def _follow(self, v: int):
        """From now on draws that pass node v are followed further."""
        if not self.followed[v]:
            self.followed[v] = True
            self.followed_below[self.nodes[v]["parent"]].append(v)

    def count_draw(self, v: int, ids: list[int], step_ends, reward: float):
        """Count one draw at node v, a completion or response, and at every state that it passes.

        step_ends: LM.step_ends. A blank line joins the step before it, so where "a\\n" and
        "a\\n\\n" are both states, a draw "a\\n\\nb" passes both, though its own steps take the
        second alone. It counts at both, since a state's share of right draws is unbiased only if
        every draw that begins with the state's tokens counts there. New states are made along the
        draw's own steps only.
        """
        # Of each: a node, what is drawn from there, and did the draw's own steps lead there?
        waiting = [(v, ids, True)]
        while waiting:
            v, ids, by_own_steps = waiting.pop()
            self._count(v, reward)
            end = step_ends(ids)[0]
            last = end == len(ids)
            child = self.child_by(v, ids[:end], reward if last else None)
            self.nodes[child]["draws"] += 1
            if self.whole_draws and by_own_steps and not last:
                self._follow(child)
            if last or not self.followed[child]:
                self._count(child, reward)
            for u in reversed(self.followed_below[v]):
                size = len(self.nodes[u]["ids"])
                if size < len(ids) and ids[:size] == self.nodes[u]["ids"]:
                    waiting.append((u, ids[size:], by_own_steps and u == child))

    def _count(self, v: int, reward: float):
        self.nodes[v]["n"] += 1
        self.nodes[v]["wins"] += reward

    def levels(self, all_wait: bool = True) -> list[list[int]]:
        """The states by steps from the prompt: shallow ones are labelled first.

        not all_wait: a state that a single response passes is of its parent's level. Few completions
        will pass it, so there is little to wait for.
        """
        responses = [int(node["reward"] is not None) for node in self.nodes]  # that pass a node
        for v in range(len(self.nodes) - 1, 0, -1):
            responses[self.nodes[v]["parent"]] += responses[v]
        levels, level = [], [0] * len(self.nodes)
        for v, node in enumerate(self.nodes):
            if v:
                level[v] = level[node["parent"]] + (all_wait or responses[v] > 1)
            if self.to_label[v]:
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

    def record(self, lm: LM, problem: dict) -> dict:
        """The line of trees.jsonl."""
        parents = [node["parent"] for node in self.nodes]
        ids = [self.prompt_ids, *(node["ids"] for node in self.nodes[1:])]
        ended = [node["reward"] is not None for node in self.nodes]
        labelled = self.followed if self.whole_draws else self.to_label
        for v, text in enumerate(lm.codec.tree_texts(parents, ids, ended)):
            self.nodes[v] |= {"text": text, "labelled": labelled[v]}
        whole = {"id": problem["id"], "prompt": problem["prompt"], "prompt_ids": self.prompt_ids}
        return whole | {"tokens": self.tokens, "nodes": self.nodes}


def tree_from_responses(sampled: dict) -> StepTree:
    """The tree of a problem's kept responses, all in it before the first completion. They choose the
    states to label and are not counted."""
    tree = StepTree(sampled["prompt_ids"])
    for k in sampled["kept"]:
        response = sampled["responses"][k]
        tree.put_in(response["ids"], response["ends"], response["reward"])
    return tree


def require_relative_split(lm: LM, record: dict):
    """Refuse an LM.step_ends that cuts the rest of a response otherwise than it cuts the whole:
    completions are such rests, and would lead to other states than the kept responses. Tried on the
    response of most steps."""
    ids = max(record["responses"], key=lambda response: len(response["ends"]))["ids"]
    ends = checked_step_ends(lm, ids)
    for k, begin in enumerate(ends[:-1]):
        rest, within = lm.step_ends(ids[begin:]), [end - begin for end in ends[k + 1 :]]
        if rest != within:
            wrong = f"cuts what follows token {begin} of a response of {record['id']} at {rest}"
            wrong += f", but within the whole response at {within}"
            raise UserError(f"LM.step_ends (model.py): {wrong}; it may not depend on the place")


def label(lm: LM, sampler, problems: list[dict], trees: list[StepTree], s: Settings, progress=None):
    """Top every state of these problems' trees up to m completions, level by level.

    Shallow states come first, since their completions count at the deeper states that they pass.
    sampler: who draws. progress: called with the part of the work that is done, in problems, and
    with what to sum up: states, completions, tokens.
    """
    progress = progress or (lambda done, **counts: None)
    prefix_trees = []
    for tree in trees:
        record = {"prompt_ids": tree.prompt_ids, "nodes": tree.nodes}
        prefix_trees.append(record_tree(record, list(tree.to_label)))
    if len(trees) > 1 and not sampler.fits(prefix_trees):
        # Their prefixes are too many for the memory: one half of the problems after the other.
        half = len(trees) // 2
        label(lm, sampler, problems[:half], trees[:half], s, progress)
        return label(lm, sampler, problems[half:], trees[half:], s, progress)
    levels = [tree.levels(sampler.all_wait) for tree in trees]
    for level in range(max(map(len, levels))):
        rows, share = [], 0.0  # of the work, in problems
        for t, tree in enumerate(trees):
            for v in levels[t][level] if level < len(levels[t]) else ():
                max_new = s.max_new - tree.depth[v]
                missing = max(0, s.m - tree.nodes[v]["n"])
                for k in range(missing):
                    key = draw_key(s.seed, "label", problems[t]["id"], v, k)
                    rows.append(Row(t, v, key, max_new))
                share += 1 / sum(tree.to_label)
                progress(0, states=1, completions=missing)
        if not rows:
            progress(share)
            continue
        each = share / len(rows)

        def ended(completions: int, tokens: int, each=each):
            progress(completions * each, tokens=tokens)

        drawn = sampler.draw(prefix_trees, rows, 1.0, ended)
        whole, owners = [], []
        for row, ids in zip(rows, drawn):
            whole.append(trees[row.tree].response(row.node) + ids)
            owners.append(problems[row.tree])
        graded = grade_ids(lm, owners, whole, s.unsafe)
        for row, ids, grade in zip(rows, drawn, graded):
            tree = trees[row.tree]
            tree.tokens += len(ids)
            tree.count_draw(row.node, ids, partial(checked_step_ends, lm), grade["reward"])


# ------------------------------------------------------------ beyond the paper (off by default)


def tree_from_all_draws(sampled: dict, step_ends) -> StepTree:
    """--whole_draws: the tree of all responses, kept or not. They count, which is unbiased as long as
    none is left out for its outcome; only the kept ones' states are completed. step_ends:
    LM.step_ends."""
    tree = StepTree(sampled["prompt_ids"], whole_draws=True)
    responses = [r for r in sampled["responses"] if r["ids"]]
    kept = [sampled["responses"][k] for k in sampled["kept"]]
    for response in responses:
        is_kept = any(response is other for other in kept)
        tree.put_in(response["ids"], response["ends"], response["reward"], to_label=is_kept)
    for response in responses:
        tree.count_draw(0, response["ids"], step_ends, response["reward"])
    return tree


# ------------------------------------------------------------ the stage


def stage(s: Settings):
    require_single_process("label_steps.py")
    if s.m == 0 and not s.whole_draws:
        raise UserError("--m 0: nothing would be counted; wanted 1 or more, or --whole_draws")
    problems = {p["id"]: p for p in read_problems(s.problems)}

    def usable(record: dict) -> bool:
        """Is there a state to label, or a draw to count?"""
        return bool(record["kept"]) or (
            s.whole_draws and any(r["ids"] for r in record["responses"])
        )

    inputs = {"actor": s.actor, "problems": s.problems, "samples": s.samples}
    output = Output("label_steps.py", s.out, s, inputs)
    if output.complete:
        return
    made = read_manifest(s.samples)
    if made.get("stage") == "sample" and "totals" in made:
        sampled = made["totals"]["problems" if s.whole_draws else "kept"]
    else:  # looked at whole before anything is drawn, but never held whole
        sampled = 0
        for record in each_sample(s.samples):
            sampled += usable(record)
            if record["id"] not in problems:
                wrong = f"{record['id']} is not in {s.problems}"
                raise UserError(f"{s.samples}: {wrong}; pass the problems it was drawn from")
    lm = load_lm(s.actor, dtype=s.dtype, weights=s.m > 0 and not s.server)
    lm.step, lm.codec.date = stated_by(s.samples, "step", "line"), output.date
    sampler = sampler_for(lm, s) if s.m else Sampler(lm, s.batch)

    def process(chunk: list[dict], progress) -> list[dict]:
        for record in chunk:
            require_relative_split(lm, record)
        if s.whole_draws:
            step_ends = partial(checked_step_ends, lm)
            trees = [tree_from_all_draws(record, step_ends) for record in chunk]
        else:
            trees = [tree_from_responses(record) for record in chunk]
        owners = [problems[record["id"]] for record in chunk]
        if s.m:
            label(lm, sampler, owners, trees, s, progress)
        for record in chunk:
            progress(0, unshared=sum(len(record["responses"][k]["ends"]) for k in record["kept"]))
        return [tree.record(lm, problem) for tree, problem in zip(trees, owners)]

    provenance = {**actor_provenance(lm, s.max_new), "problems": sha256(s.problems)}
    with output.open(provenance | sampler.provenance, expects=provenance, count=counted) as out:
        todo = (r for r in each_sample(s.samples) if usable(r) and r["id"] not in out.done)
        with Progress("label_steps", sampled - len(out.done)) as bar:
            sampler.work_through(todo, process, bar.add, out.append)
    total, here = out.totals, bar.counts  # of the whole file; of what this start has drawn
    is_whole = here["completions"] and not out.done
    drawn = f", {here['completions']:,} completions" if is_whole else ""
    print(
        f"A.2: {total['states']:,} states of {total['problems']:,} problems{drawn}, "
        f"{total['tokens']:,} tokens"
    )
    if is_whole and not s.whole_draws:
        saved = 1 - here["completions"] / (s.m * here["unshared"])
        print(f"{saved:.0%} of the completions were saved: responses share states and completions")


def counted(record: dict) -> dict:
    """What a line of trees.jsonl adds to the totals of its manifest."""
    states = sum(node["labelled"] for node in record["nodes"])
    return {"problems": 1, "states": states, "tokens": record["tokens"]}


if __name__ == "__main__":
    main(stage, Settings, __doc__)
