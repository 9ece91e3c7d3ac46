"""Packs for several processes, and passes over many trees that go on where they were stopped."""

import random
import shutil

import pytest
import torch
import toy

import support.scoring
from support.cli import UserError
from support.packing import BLOCK, Tree, pack_trees
from support.scoring import Results, score_trees


def forest(count: int, longest=40) -> list[Tree]:
    """Trees of 30 nodes, some of which are scored."""
    rng, trees = random.Random(0), []
    for _ in range(count):
        ids = [[rng.randrange(99) for _ in range(rng.randint(1, longest))] for _ in range(30)]
        parent = [-1, *(rng.randrange(max(0, v - 4), v) for v in range(1, 30))]
        trees.append(Tree(ids, parent, [False, True, *(rng.random() < 0.7 for _ in range(28))]))
    return trees


def slots(packs, processes: int) -> int:
    """Tokens that the processes have time for in a step: all wait for the largest pack of a round."""
    rounds = [packs[i : i + processes] for i in range(0, len(packs), processes)]
    return sum(max(len(pack.ids) for pack in packs) * processes for packs in rounds)


@pytest.mark.parametrize("align", [1, BLOCK])
@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("count, budget", [(4, 9000), (9, 8192), (30, 8192)])
def test_packs_are_a_multiple_of_the_processes(count, budget, processes, align):
    """And so even that at least 70 % of the processes' time is used."""
    trees = forest(count, longest=200)
    wanted = [(t, v) for t, tree in enumerate(trees) for v in range(30) if tree.score[v]]
    usual, packs = pack_trees(trees, budget, align), pack_trees(trees, budget, align, processes)
    assert sorted(owner for pack in packs for owner in pack.owner) == wanted  # each node once
    assert len(packs) % processes == 0 and len(packs) < len(usual) + processes
    assert slots(packs, processes) <= slots(usual, processes)
    needed = sum(len(ids) for tree in trees for ids in tree.ids)
    assert needed > 0.7 * slots(packs, processes)
    assert len(pack_trees(trees[:1], budget, align, 99)) < 99  # a node cannot be cut


def total(pack):
    """A number of each scored node that depends on its tokens alone."""
    return torch.tensor([float(pack.ids[pack.last[i]] + v) for i, (_, v) in enumerate(pack.owner)])


def score(trees, kept=None, function=total):
    return score_trees(function, trees, 512, "M: V", list("abcdefghij"), kept=kept)


def test_passes_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    trees, path, origin = forest(10), tmp_path / "work" / "kept.jsonl", {"model": "M"}
    wanted = score(trees)
    for tree, numbers in zip(trees, wanted):
        assert numbers == [tree.ids[v][-1] + v for v in range(30) if tree.score[v]]
    monkeypatch.setattr(support.scoring, "ROUND", 1000)
    assert score(trees) == wanted

    scored = []

    def stopped(pack):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(len(pack.owner))
        return total(pack)

    with pytest.raises(KeyboardInterrupt):
        score(trees, Results(path, origin), stopped)
    whole = path.read_bytes().count(b"\n") - 1
    assert 0 < whole < 10
    with path.open("ab") as file:
        file.write(b'{"result": [1')  # a kill may tear a line
    kept = Results(path, origin)
    assert len(kept.done) == whole
    scored.clear()
    assert score(trees, kept, lambda pack: scored.append(len(pack.owner)) or total(pack)) == wanted
    assert sum(scored) == sum(map(len, wanted[whole:]))  # none of the first ones again
    assert Results(path, origin).done == wanted
    assert score(trees, Results(path, origin), None) == wanted  # nothing is computed
    assert Results(path, {"model": "another"}).done == []
    assert Results(path, origin).done == []  # it is the other one's now


def test_a_number_that_is_not_finite_is_not_kept(tmp_path):
    kept = Results(tmp_path / "kept.jsonl", {})
    with pytest.raises(UserError, match="M: V is nan in problem b; train it again"):
        score(forest(2)[::-1], kept, lambda pack: torch.tensor(
            [torch.nan if t == 1 else 0.0 for t, _ in pack.owner]
        ))  # fmt: skip
    assert Results(tmp_path / "kept.jsonl", {}).done == []


def test_b1_goes_on_within_its_passes(tmp_path, monkeypatch):
    """Stopped in the critic's pass, then in the reference model's: no round is computed twice, and
    the files are those of a run that was not stopped."""
    monkeypatch.setattr(support.scoring, "ROUND", 100)
    toy.finished_run(tmp_path / "one", "sample.py", "label_steps.py", "train_critic.py")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    real, rounds, stop_at = support.scoring._score_round, [], []

    def score_round(*arguments):
        if [len(rounds)] == stop_at[:1]:
            stop_at.pop(0)
            raise KeyboardInterrupt
        rounds.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(support.scoring, "_score_round", score_round)
    codes, counts = [], []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        while not codes or codes[-1] != 0:
            codes.append(toy.stage("train_actor.py", toy.ACTOR)[0])
        counts.append(len(rounds))
        rounds.clear()
        stop_at[:] = [2, counts[0] - 2]
        codes.append(None)
    assert codes == [0, None, 130, 130, 0, None] and counts[0] == counts[1] > 6
    assert toy.hashes(tmp_path / "one") == toy.hashes(tmp_path / "two")
