"""Trees of token ids side by side in one row of tokens, a pack. It knows nothing of the algorithm.

Read from top to bottom:
  Tree          one problem's nodes
  Pack          the tokens of some trees, and who sees whom
  pack_trees    trees -> packs: a tree is cut into runs, runs are grouped, a group is laid out as a
                table of nodes, and the table is repeated to tokens
"""

from typing import NamedTuple

import numpy as np
import torch

BLOCK = 64  # queries that share one gathered key set


class Tree(NamedTuple):
    """One problem's tokens: node 0 the prompt, node v > 0 the step that leads to state v."""

    ids: list[list[int]]
    parent: list[int]  # parent[0] = -1, parent[v] < v
    score: list[bool]  # which nodes are asked for; others are only somebody's path


def record_tree(record: dict, score: list[bool], lm=None) -> Tree:
    """Tree of a line of trees.jsonl.

    lm: a model.LM with another tokenizer than the actor's. It is given the user message by its own
    chat template, and each step's text as its own tokens.
    """
    nodes = record["nodes"]
    if lm is None:
        ids = [record["prompt_ids"]] + [node["ids"] for node in nodes[1:]]
    else:
        ids = [lm.prompt_ids(record["prompt"])]
        for node in nodes[1:]:
            ids.append(lm.codec.ids(node["text"]) or [lm.own_eos])  # a bare EOS has no text
    return Tree(ids, [node["parent"] for node in nodes], score)


class Pack(NamedTuple):
    """Trees in depth-first order, side by side. Token i sees token j exactly if j <= i < end[j]."""

    ids: torch.Tensor  # (N,)
    pos: torch.Tensor  # (N,) depth in the tree = position id
    end: torch.Tensor  # (N,) one past the subtree that the token's node roots
    prev: torch.Tensor  # (N,) the token before it in its tree, -1 at a root's first
    node: torch.Tensor  # (N,) index into owner, -1 for a token that is context only
    last: torch.Tensor  # (M,) the last token of each scored node
    owner: list[tuple[int, int]]  # (M,) (tree, node)


def pack_trees(
    trees: list[Tree], budget: int, align: int = 1, multiple: int = 1, paths: bool = False
) -> list[Pack]:
    """Packs of about `budget` tokens that score every node asked for; like lengths go together.

    align: each tree starts at a multiple of it. With align=BLOCK a tree's numbers do not depend,
    even in the last bit, on what else is in its pack (on the CPU): exact resume relies on it.
    multiple: so many processes share the packs out. Packs become smaller where their number is a
    multiple of it then, or nearer to one: 9 packs for 8 processes would take as long as 16.
    paths: a tree is cut into its paths, for models that compute one path per row.
    """
    groups = _groups(trees, budget, align, paths)
    if multiple > 1 and groups:
        wanted = -(-len(groups) // multiple) * multiple
        low = BLOCK  # too small a budget, as far as we know; `budget` itself is large enough
        while budget - low > BLOCK:
            middle = (low + budget) // 2
            smaller = _groups(trees, middle, align, paths)
            if len(smaller) <= wanted:
                budget, groups = middle, smaller
            else:
                low = middle
    return [_repeat(_lay_out(trees, group, align)) for group in groups]


# ------------------------------------------------------------ which nodes go together

Run = list[tuple[int, bool]]  # nodes in depth-first order, and whether each is scored here


def _depth_first(tree: Tree) -> list[int]:
    """The nodes that are scored, or have such below them, in depth-first order."""
    needed, children = list(tree.score), [[] for _ in tree.ids]
    for v in range(len(tree.ids) - 1, 0, -1):
        needed[tree.parent[v]] |= needed[v]
        children[tree.parent[v]].append(v)
    order, stack = [], [0]
    while stack:
        v = stack.pop()
        if needed[v]:
            order.append(v)
            stack += children[v]
    return order


def path_to(tree: Tree, v: int) -> list[int]:
    """The nodes from the root to v."""
    nodes = [v]
    while tree.parent[nodes[-1]] >= 0:
        nodes.append(tree.parent[nodes[-1]])
    return nodes[::-1]


def path_ids(tree: Tree, v: int) -> list[int]:
    """The tokens from the root to v."""
    return [i for u in path_to(tree, v) for i in tree.ids[u]]


def _runs(tree: Tree, budget: int) -> list[Run]:
    """Cut a tree into depth-first runs of at most `budget` tokens, each with the path to its root.

    A repeated ancestor is context, not scored again. A path longer than the budget stays whole.
    """
    runs, inside, size = [], set(), budget  # "full", so that the first node opens a run
    for v in _depth_first(tree):
        if size + len(tree.ids[v]) > budget:
            runs.append([])
            inside, size = set(), 0
        added = [(u, u == v and tree.score[v]) for u in path_to(tree, v) if u not in inside]
        runs[-1] += added
        inside.update(u for u, _ in added)
        size += sum(len(tree.ids[u]) for u, _ in added)
    # A run of ancestors alone is left where the next node did not fit behind them.
    return [run for run in runs if any(scored for _, scored in run)]


def _paths(tree: Tree) -> list[Run]:
    """A run for each path to a leaf; a node is scored in the first path that it is on."""
    order, runs, inside = _depth_first(tree), [], set()
    parents = {tree.parent[v] for v in order}
    for leaf in order:
        if leaf not in parents:
            nodes = path_to(tree, leaf)
            runs.append([(v, tree.score[v] and v not in inside) for v in nodes])
            inside.update(nodes)
    return runs


def _groups(trees: list[Tree], budget: int, align: int, paths: bool) -> list[list]:
    """What goes into each pack: (tree, run), the longest first."""
    pieces = []
    for t, tree in enumerate(trees):
        pieces += [(t, run) for run in (_paths(tree) if paths else _runs(tree, budget))]
    sizes = [sum(len(trees[t].ids[v]) for v, _ in run) for t, run in pieces]
    groups, size = [], budget  # "full", so that the first piece opens a group
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        taken = -(-sizes[i] // align) * align
        if size + taken > budget:
            groups.append([])
            longest, size = taken, 0
        groups[-1].append(pieces[i])
        size += longest if paths else taken  # a path fills its row up to the longest
    return groups


# ------------------------------------------------------------ a table of nodes, and its tokens


class Row(NamedTuple):
    """A node in a pack's table."""

    ids: list[int]
    parent: int  # its parent's row, -1: none
    owner: tuple[int, int] | None  # (tree, node) if it is scored here


def _lay_out(trees: list[Tree], group: list, align: int) -> list[Row]:
    """The table of a group of (tree, run).

    It is filled up by roots of one token, which see themselves alone: no token's mask is all empty. A
    token of the trees, since that of padding may be a vector of zeros, which some norms cannot take.
    """
    table, size = [], 0
    fill = Row(trees[group[0][0]].ids[0][:1], -1, None)
    for t, run in group:
        row_of = {-1: -1}
        for v, scored in run:
            row_of[v] = len(table)
            ids, parent = trees[t].ids[v], row_of[trees[t].parent[v]]
            table.append(Row(ids, parent, (t, v) if scored else None))
            size += len(ids)
        table += [fill] * (-size % align)
        size += -size % align
    return table + [fill] * (-size % BLOCK)


def _repeat(table: list[Row]) -> Pack:
    """The tokens of a table: what a node has of its own, repeated, and the offset within the node.

    A prompt of 2 tokens [7, 8] and two children of one token each, 5 and 6, without the padding:
    ids [7, 8, 5, 6], pos [0, 1, 2, 2], end [4, 4, 3, 4], prev [-1, 0, 1, 1].
    """
    length = np.array([len(row.ids) for row in table])  # (rows,)
    parent = np.array([row.parent for row in table])
    scored = np.array([row.owner is not None for row in table])
    stop = np.cumsum(length)  # one past its last token
    depth = np.zeros(len(table), int)  # of its first token
    for i in np.flatnonzero(parent >= 0):  # parents come before their children
        depth[i] = depth[parent[i]] + length[parent[i]]
    end = stop.copy()  # one past its subtree's last token
    for i in np.flatnonzero(parent >= 0)[::-1]:
        end[parent[i]] = max(end[parent[i]], end[i])
    before = np.where(parent < 0, -1, stop[parent] - 1)  # its parent's last token
    number = np.where(scored, np.cumsum(scored) - 1, -1)  # among the scored ones

    ids = np.concatenate([row.ids for row in table])  # (N,)
    token = np.arange(len(ids))
    offset = token - np.repeat(stop - length, length)
    pos = np.repeat(depth, length) + offset
    prev = np.where(offset == 0, np.repeat(before, length), token - 1)
    columns = ids, pos, np.repeat(end, length), prev, np.repeat(number, length), stop[scored] - 1
    owner = [row.owner for row in table if row.owner is not None]
    return Pack(*(torch.from_numpy(x) for x in columns), owner)
