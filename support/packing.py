"""packing. It knows nothing of the algorithm."""

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
        # trees.jsonl of before there was a "prompt" has its text alone
        ids = [lm.prompt_ids(record.get("prompt", nodes[0]["text"]))]
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


def _fragments(tree: Tree, budget: int) -> list[list[tuple[int, bool]]]:
    """Cut a tree into depth-first runs of at most `budget` tokens, each with the path to its root.

    -> lists of (node, scored here); a repeated ancestor is context. A path longer than the budget
    stays whole.
    """
    needed = list(tree.score)  # a node is needed if it or anything below it is scored
    children = [[] for _ in tree.ids]
    for v in range(len(tree.ids) - 1, 0, -1):
        needed[tree.parent[v]] |= needed[v]
        children[tree.parent[v]].append(v)
    runs, inside, size = [], set(), budget  # "full", so that the first node opens a run
    stack = [0] if needed[0] else []
    while stack:
        v = stack.pop()
        stack += [child for child in children[v] if needed[child]]
        if size + len(tree.ids[v]) > budget:
            runs.append([])
            inside, size = set(), 0
        path, u = [(v, tree.score[v])], tree.parent[v]
        while u >= 0 and u not in inside:
            path.append((u, False))
            u = tree.parent[u]
        for u, scored in reversed(path):
            runs[-1].append((u, scored))
            inside.add(u)
            size += len(tree.ids[u])
    # A run of ancestors alone is left where the next node did not fit behind them.
    return [run for run in runs if any(scored for _, scored in run)]


def pack_trees(trees: list[Tree], budget: int, align: int = 1, multiple: int = 1) -> list[Pack]:
    """Packs of about `budget` tokens that score every node asked for; like lengths go together.

    align: each tree starts at a multiple of it. With align=BLOCK a tree's numbers do not depend,
    even in the last bit, on what else is in its pack (on the CPU): exact resume relies on it.
    multiple: so many processes share the packs out. Packs become smaller where their number is a
    multiple of it then, or nearer to one: 9 packs for 8 processes would take as long as 16.
    """
    groups = _groups(trees, budget, align)
    if multiple > 1 and groups:
        wanted = -(-len(groups) // multiple) * multiple
        low = BLOCK  # too small a budget, as far as we know; `budget` itself is large enough
        while budget - low > BLOCK:
            middle = (low + budget) // 2
            smaller = _groups(trees, middle, align)
            if len(smaller) <= wanted:
                budget, groups = middle, smaller
            else:
                low = middle
    return [_pack(trees, group, align) for group in groups]


def _groups(trees: list[Tree], budget: int, align: int) -> list[list[tuple[int, list]]]:
    """What goes into each pack: (tree, run of _fragments), the longest first."""
    pieces = [(t, run) for t, tree in enumerate(trees) for run in _fragments(tree, budget)]
    sizes = [sum(len(trees[t].ids[v]) for v, _ in run) for t, run in pieces]
    groups, size = [], budget  # "full", so that the first piece opens a group
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        room = -(-sizes[i] // align) * align
        if size + room > budget:
            groups.append([])
            size = 0
        groups[-1].append(pieces[i])
        size += room
    return groups


def _pack(trees: list[Tree], group: list[tuple[int, list]], align: int) -> Pack:
    """One pack of a group of (tree, run of _fragments).

    A prompt of 2 tokens [7, 8] and two children of one token each, 5 and 6, without the padding:
    ids [7, 8, 5, 6], pos [0, 1, 2, 2], end [4, 4, 3, 4], prev [-1, 0, 1, 1].
    """
    # The table of nodes, in depth-first order: token ids, parent's row, index among the scored.
    ids, up, scored_as, owner, size = [], [], [], [], 0

    def pad(unit: int):
        """Fill up with roots of one token, which see themselves alone: no row is all masked."""
        nonlocal size
        for _ in range(-size % unit):
            ids.append([0])
            up.append(-1)
            scored_as.append(-1)
            size += 1

    for t, run in group:
        row_of = {-1: -1}
        for v, scored in run:
            row_of[v] = len(ids)
            ids.append(trees[t].ids[v])
            up.append(row_of[trees[t].parent[v]])
            scored_as.append(len(owner) if scored else -1)
            size += len(ids[-1])
            if scored:
                owner.append((t, v))
        pad(align)
    pad(BLOCK)

    # What each node has of its own: where it ends, where its subtree ends, how deep it starts.
    length, up = np.array([len(x) for x in ids]), np.array(up)  # (nodes,)
    stop, depth = np.cumsum(length), np.zeros(len(ids), int)
    for i in np.flatnonzero(up >= 0):  # parents come before their children
        depth[i] = depth[up[i]] + length[up[i]]
    end = stop.copy()
    for i in np.flatnonzero(up >= 0)[::-1]:
        end[up[i]] = max(end[up[i]], end[i])
    before = np.where(up < 0, -1, stop[up] - 1)  # the last token of the parent

    # The tokens: a node's numbers repeated, and the offset within the node.
    token = np.arange(size)
    offset = token - np.repeat(stop - length, length)
    prev = np.where(offset == 0, np.repeat(before, length), token - 1)
    node = np.repeat(scored_as, length)
    last = stop[np.array(scored_as) >= 0] - 1
    columns = (np.concatenate(ids), np.repeat(depth, length) + offset, np.repeat(end, length))
    return Pack(*[torch.from_numpy(x) for x in (*columns, prev, node, last)], owner)
