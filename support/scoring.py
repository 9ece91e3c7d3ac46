"""A number for every scored node of many trees, by forward passes that a killed run need not repeat.

It knows nothing of the algorithm: what is scored, the caller's function says.
"""

import json
import math
import os
from pathlib import Path

from support.cli import UserError
from support.distributed import all_gather, local_shard, rank, wait_for_all, world
from support.packing import Tree, pack_trees
from support.records import dump, replace

ROUND = 1 << 22  # tokens that a process packs at once: 0.2 GB of packs, minutes of a card's work


class Results:
    """The results of a long computation, one line per item in the items' order, in a file that grows
    as they come. Its first line says what they are made from: if that is another now, none is taken."""

    def __init__(self, path: Path, provenance: dict):
        self.path, lines = path, []
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith(b"\n")]  # a kill may tear the last one
        if lines[:1] != [dump(provenance)]:
            lines = [dump(provenance)]
        if rank() == 0:
            replace(path, lambda p: p.write_bytes(b"".join(lines)))
        wait_for_all()
        self.done = [json.loads(line)["result"] for line in lines[1:]]

    def append(self, results: list):
        self.done += results
        if rank() == 0:
            with self.path.open("ab") as file:
                file.write(b"".join(dump({"result": result}) for result in results))
                file.flush()
                os.fsync(file.fileno())


def score_trees(
    score, trees: list[Tree], budget: int, what: str, names: list, align=1, kept=None, paths=False
) -> list[list[float]]:
    """The numbers of every tree's scored nodes, in the order of the nodes.

    score   (Pack) -> the numbers of its scored nodes, (M,)
    budget  tokens of a pack; align, paths: as of pack_trees
    what    what the numbers are and of which model; names: of the trees; for errors
    kept    Results: trees that are there already are not computed again

    Each process packs its own share of the trees only, `ROUND` tokens at a time, since packs take
    more memory than trees do; after each round the results are kept. Raises UserError for a
    number that is not finite.
    """
    done = kept.done if kept else []
    while len(done) < len(trees):
        first, tokens = len(done), 0
        last = first
        while last < len(trees) and tokens < world() * ROUND:
            tokens += sum(map(len, trees[last].ids))
            last += 1
        found = _score_round(score, trees[first:last], budget, align, paths)
        for t, numbers in enumerate(found, first):
            for number in numbers:
                if not math.isfinite(number):
                    raise UserError(f"{what} is {number} in problem {names[t]}; train it again")
        if kept:
            kept.append(found)
        else:
            done += found
    return done


def _score_round(
    score, trees: list[Tree], budget: int, align: int, paths: bool
) -> list[list[float]]:
    """The same for trees that are packed at once."""
    own, found = local_shard(range(len(trees))), []
    packs = pack_trees([trees[t] for t in own], budget, align, paths=paths)
    for pack in packs:
        for (t, v), number in zip(pack.owner, score(pack).tolist()):
            found.append(((own[t], v), number))
    most = max(all_gather([len(packs)]))
    if len(packs) < most:  # of sharded weights all processes must run equally many passes
        some = next(tree for tree in trees if any(tree.score))
        spare = pack_trees([some], budget, align, paths=paths)[0]
        for _ in range(most - len(packs)):
            score(spare)
    numbers = dict(all_gather(found))
    listed = []
    for t, tree in enumerate(trees):
        listed.append([numbers[t, v] for v, is_scored in enumerate(tree.score) if is_scored])
    return listed
