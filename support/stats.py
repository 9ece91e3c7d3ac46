"""Statistics of critics and of evaluations: AUC, calibration, intervals, paired tests. It knows nothing
of the algorithm."""

import math
from collections import Counter
from itertools import combinations

import numpy as np

from support.math_answers import MAX_ANSWER, exact_number, split_unit
from support.spelling import normalise


def auc(v: np.ndarray, mc: np.ndarray) -> float:
    """Chance that V puts a completion that was right above one that was wrong; a tie is half.

    v and mc (S,): V of each state and the share of its completions that were right.
    v [.9, .2], mc [1, 0] -> 1.0; v [.9, .5, .5], mc [0, 1, 0] -> (0 + .5) / 2 = .25
    """
    losses, rank_of = 1 - mc, np.unique(v, return_inverse=True)[1]
    rivals = mc.sum() * losses.sum() - (mc * losses).sum()  # a state is no rival of itself
    if rivals <= 0:
        return 0.5
    tied = np.bincount(rank_of, losses)  # failures at each value of V
    below = (np.cumsum(tied) - tied / 2)[rank_of] - losses / 2
    return float((mc * below).sum() / rivals)


def calibration(v: np.ndarray, mc: np.ndarray) -> tuple[float, list[dict]]:
    """Expected calibration error over ten bins of V, and the bins: how far V is from MC on average.

    v [.91, .95, .2], mc [1, .8, .1]: bins [.9, 1] and [.2, .3): |1.86 - 1.8| + |.2 - .1| = .16, / 3
    """
    which, error, bins = np.minimum((v * 10).astype(int), 9), 0.0, []
    for b in range(10):
        value, success = v[which == b], mc[which == b]
        error += abs(value.sum() - success.sum())
        if len(value):
            row = {"states": len(value), "value": float(value.mean()), "mc": float(success.mean())}
            bins.append(row)
    return float(error / len(v)), bins


def siblings(records: list[dict], value: list[list[float]]) -> tuple[float | None, int]:
    """Of the pairs of actions of one state whose MC differ by at least 0.5, the share that V puts in
    the right order, a tie being half; and how many pairs. 0.5 is chance, None: there is no pair.

    Only actions that go on and have n >= 4 count: at an end the reward stands for V, so such pairs are
    in order whatever the critic says. MC 1, .75, .25 and V .9, .4, .5: pairs (1, .25) right,
    (.75, .25) wrong -> (0.5, 2)
    """
    pairs, right = 0, 0.0
    for record, values in zip(records, value):
        actions = {}  # of each state: (MC, V)
        for node, v in zip(record["nodes"][1:], values[1:]):
            if node["reward"] is None and node["n"] >= 4:
                actions.setdefault(node["parent"], []).append((node["wins"] / node["n"], v))
        for group in actions.values():
            for (mc, v), (other_mc, other_v) in combinations(group, 2):
                if abs(mc - other_mc) >= 0.5:
                    pairs += 1
                    right += 0.5 if v == other_v else (mc > other_mc) == (v > other_v)
    return right / pairs if pairs else None, pairs


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. 8 of 10 -> (0.490, 0.943)"""
    z, p = 1.959964, right / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), (middle + half) / scale


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test. 8 gained, 1 lost -> 2 * (1 + 9) / 2^9 = 0.039"""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def bootstrap(difference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (n,), 10,000 resamples of problems."""
    rng, n, means = np.random.default_rng(0), len(difference), []
    for _ in range(100):  # 100 resamples at once: all of them may not fit into memory
        means += difference[rng.integers(n, size=(100, n))].mean(1).tolist()
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def paired(new: list[float], old: list[float]) -> dict:
    """How far `new` is above `old`, two scores of the same problems in the same order.

    difference, interval    mean of new - old and its bootstrap interval
    gained, lost, p         problems whose score rose, or fell, and McNemar's test of these two
    """
    difference = np.array(new, float) - np.array(old, float)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    figures = {"difference": float(difference.mean()), "interval": bootstrap(difference)}
    return figures | {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def pass_at(k: int, n: int, right: int) -> float:
    """Unbiased chance that one of k draws is right, from n draws with `right` right ones.

    k 2, n 4, right 1 -> 1 - 3 / 6 = 0.5: of the six pairs, three miss the right one
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(sampled: list[dict]) -> bool:
    """Is the most frequent answer right, in most of the responses that give it?

    Equal numbers are one answer, with a unit or without; programs are one if their texts are.
    """

    def vote(answer):
        if len(answer) > MAX_ANSWER or "\n" in answer:
            return answer
        answer, _ = split_unit(normalise(answer))
        value = exact_number(answer)
        return answer if value is None else value

    answered = [response for response in sampled if response["prediction"]]
    vote_of = {answer: vote(answer) for answer in {r["prediction"] for r in answered}}
    votes = Counter(vote_of[response["prediction"]] for response in answered)
    winner = max(votes, key=votes.get, default=None)
    won = [r["correct"] for r in answered if vote_of[r["prediction"]] == winner]
    return 2 * sum(won) > len(won)
