"""The paper's equations against hand-worked numbers, Theorem 3.2 on tabular MDPs, and the statistics of evaluate.py."""

import itertools
import math

import numpy as np
import pytest
import torch

import support.math_answers
import support.stats
from model import step_advantages
from sample import keep_balanced
from support.stats import bootstrap, majority, mcnemar, paired, pass_at, wilson
from train_actor import (
    action_values,
    actor_loss,
    advantage_states,
    counts_and_critic,
    success_share,
    value_in_the_mean,
)
from train_critic import split_by_hash, training_nodes, value_loss

# ---------------------------------------------------------------- theorem 3.2


class MDP:
    """A layered MDP: layers x states x actions, random transitions, rewards in [0, 1] in the last layer.

    pi_ref is a share of integer draws, so that the mean over draws of eq. 13 is the exact mean under pi_ref.
    """

    def __init__(self, seed: int, layers=3, states=4, actions=3, flat=False):
        g = torch.Generator().manual_seed(seed)
        shape = (layers, states, actions)
        self.draws = torch.randint(1, 9, shape, generator=g)
        self.ref = self.draws.double() / self.draws.sum(-1, keepdim=True)
        self.next = torch.rand(*shape, states, generator=g, dtype=torch.float64) ** 3
        self.next /= self.next.sum(-1, keepdim=True)
        self.reward = torch.rand(states, actions, generator=g, dtype=torch.float64)
        if flat:
            self.reward = torch.full_like(self.reward, 0.4)
        self.nu = torch.rand(shape, generator=g, dtype=torch.float64) + 0.05
        self.nu /= self.nu.sum(-1, keepdim=True)

    def q_values(self, pi, beta):
        """Q (layers, states, actions) and V (layers, states) of pi; each step pays beta KL(pi || pi_ref)."""
        q, v = torch.empty_like(self.ref), torch.empty_like(self.ref[..., 0])
        for t in reversed(range(len(self.ref))):
            q[t] = self.reward if t == len(self.ref) - 1 else self.next[t] @ v[t + 1]
            v[t] = (pi[t] * (q[t] - beta * (pi[t] / self.ref[t]).log())).sum(-1)
        return q, v

    def advantages(self):
        """Exact advantages of pi_ref through the project's eq. 13, all states at once."""
        q, v = self.q_values(self.ref, 0.0)
        parent = torch.arange(v.numel()).repeat_interleave(q.shape[-1])
        adv, mean, _ = step_advantages(q.flatten(), parent, self.draws.flatten())
        assert torch.allclose(mean, v.flatten(), atol=1e-14)
        return adv.view_as(q), v


def minimiser(ref, adv, nu, beta):
    """The exact minimiser of eq. 12 at each state: u + lambda ref e^u / nu = A / beta, sum ref e^u = 1."""

    def ratios(lam):
        u, c = adv / beta, lam[..., None] * ref / nu
        for _ in range(60):  # Newton from the right on a concave falling function: never overshoots
            u = u - (u + c * u.exp() - adv / beta) / (1 + c * u.exp())
        return u

    low, high = torch.zeros_like(adv[..., 0]), torch.full_like(adv[..., 0], 1e3)
    for _ in range(70):
        lam = (low + high) / 2
        above = (ref * ratios(lam).exp()).sum(-1) > 1
        low, high = torch.where(above, lam, low), torch.where(above, high, lam)
    return ratios(lam), lam


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_theorem_3_2(seed, beta):
    mdp = MDP(seed)
    adv, before = mdp.advantages()
    u, lam = minimiser(mdp.ref, adv, mdp.nu, beta)
    pi = mdp.ref * u.exp()
    assert torch.allclose(pi.sum(-1), torch.ones_like(lam), atol=1e-9)
    assert (lam > 0).all()
    assert torch.allclose(u, adv / beta - lam[..., None] * pi / mdp.nu, atol=1e-8)

    # it is the minimiser of the project's loss: stationary, and below any other policy
    def objective(theta):
        return (mdp.nu * actor_loss(theta.log_softmax(-1), mdp.ref.log(), adv, beta)).sum(-1)

    theta = pi.log().requires_grad_()
    best = objective(theta)
    (slope,) = torch.autograd.grad(best.sum(), theta)
    assert slope.abs().max() < 1e-6 * max(1.0, best.max().item())
    g = torch.Generator().manual_seed(seed)
    for size in (1e-2, 0.1, 1.0, 3.0):
        other = theta.detach() + size * torch.randn(theta.shape, generator=g, dtype=torch.float64)
        assert (objective(other) > best).all()
    assert (objective(mdp.ref.log()) > best).all()

    # at every state, hence at every state distribution; strictly, since no advantage is zero here
    assert adv.abs().amin() > 1e-6
    _, after = mdp.q_values(pi, beta)
    assert (after > before).all()


def test_theorem_3_2_holds_with_equality_only_at_the_optimum():
    flat = MDP(0, flat=True)  # every action is as good: pi_ref is optimal
    adv, before = flat.advantages()
    u, _ = minimiser(flat.ref, adv, flat.nu, 0.1)
    assert u.abs().max() < 1e-7
    _, after = flat.q_values(flat.ref * u.exp(), 0.1)
    assert torch.allclose(after, before, atol=1e-7)
    flat.reward[0, 0] += 0.01  # one action of one last state is a little better
    adv, before = flat.advantages()
    u, _ = minimiser(flat.ref, adv, flat.nu, 0.1)
    _, after = flat.q_values(flat.ref * u.exp(), 0.1)
    assert after[-1, 0] - before[-1, 0] > 1e-7
    assert (after[0] - before[0] > 1e-8).all()  # all first states reach it
    assert (after[-1, 1:] - before[-1, 1:]).abs().max() < 1e-9


# ---------------------------------------------------------------- eq. 12, 13, 15 by hand


@pytest.mark.parametrize(
    "logp, ref, adv, beta, loss, slope",
    [
        (-1.5, -2.0, 0.2, 0.1, 1.125, -1.5),  # .5 * (2 - .5)^2; d loss / d logp = -(2 - .5)
        (-3.0, -3.0, 0.2, 0.1, 2.0, -2.0),  # step 0: .5 * (A / beta)^2
        (-3.0, -3.0, -0.2, 0.1, 2.0, 2.0),  # a bad action is pushed down
        (-1.0, -3.0, 0.2, 0.1, 0.0, 0.0),  # the log-ratio is where it should be
        (-4.0, -2.0, 0.0, 0.01, 2.0, -2.0),  # no advantage: back to pi_ref
    ],
)
def test_eq_12(logp, ref, adv, beta, loss, slope):
    x = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    out = actor_loss(x, x.new_tensor([ref]), x.new_tensor([adv]), beta)
    assert out.shape == (1,) and out.item() == pytest.approx(loss, abs=1e-12)
    out.sum().backward()
    assert x.grad.item() == pytest.approx(slope, abs=1e-12)


def test_eq_13():
    #        state 0, drawn 1 + 2 + 1   state 1, drawn 3   state 2, drawn 1 + 4
    q = torch.tensor([1.0, 0.0, 0.5, 0.7, 0.25, 0.75], dtype=torch.float64)
    parent = torch.tensor([0, 0, 0, 1, 2, 2])
    draws = torch.tensor([1, 2, 1, 3, 1, 4])
    order = torch.tensor([4, 0, 3, 2, 5, 1])  # actions of a state need not stand together
    adv, mean, gap = step_advantages(q[order], parent[order], draws[order])
    want = torch.tensor([0.625, -0.375, 0.125, 0.0, -0.4, 0.1], dtype=torch.float64)
    assert torch.allclose(adv, want[order], atol=1e-12)
    assert mean.tolist() == pytest.approx([0.375, 0.7, 0.65])
    assert gap.tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_eq_13_with_the_states_own_values():
    """V(s) as value_draws draws more: in the mean, and in the gap as one more action."""
    #        state 0, drawn 1 + 3   state 1, drawn once
    q = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    parent, draws = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 1])
    value = torch.tensor([0.75, 0.5], dtype=torch.float64)
    adv, mean, gap = value_in_the_mean(q, parent, draws, value, 2.0)
    assert mean.tolist() == pytest.approx([(1 + 2 * 0.75) / 6, (1 + 2 * 0.5) / 3])
    assert adv.tolist() == pytest.approx([1 - 2.5 / 6, -2.5 / 6, 1 / 3])
    assert gap.tolist() == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    "logit, target, weight, loss",
    [
        (0.0, 0.75, 2.0, 2 * math.log(2)),  # V = .5 costs log 2 whatever the target
        (math.log(3), 0.75, 1.0, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),  # V = target
        (math.log(3), 0.0, 1.0, math.log(4)),
        (-math.log(3), 1.0, 0.5, 0.5 * math.log(4)),
        (-200.0, 1.0, 1.0, 200.0),  # far off: no overflow, and the gradient does not vanish
    ],
)
def test_eq_15(logit, target, weight, loss):
    x = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    out = value_loss(x, x.new_tensor([target]), x.new_tensor([weight]))
    assert out.item() == pytest.approx(loss)
    out.backward()
    assert x.grad.item() == pytest.approx(weight * (1 / (1 + math.exp(-logit)) - target))


def test_eq_15_sums_over_states():
    logit, target = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.5, 0.25, 1.0])
    weight = torch.tensor([3.0, 1.0, 2.0])
    each = [value_loss(logit[i : i + 1], target[i : i + 1], weight[i : i + 1]) for i in range(3)]
    assert value_loss(logit, target, weight).item() == pytest.approx(float(sum(each)))


# ---------------------------------------------------------------- from trees to pairs


def node(parent, draws=0, n=0, wins=0, reward=None, labelled=False):
    return {"parent": parent, "ids": [5], "text": "a", "draws": draws, "n": n, "wins": wins,
            "reward": reward, "labelled": labelled}  # fmt: skip


RECORD = {"id": "x", "prompt_ids": [1], "nodes": [
    node(-1, n=4, wins=2, labelled=True),
    node(0, draws=1, n=6, wins=3, labelled=True),  # kept, drawn once, five completions of its own
    node(0, draws=2, n=2, wins=2, reward=1),  # ended, right
    node(0, draws=1, n=1, wins=0),
    node(0),  # kept, never drawn
    node(1, draws=6, n=6, wins=3),
]}  # fmt: skip


def test_action_values():  # of nodes 1 to 5: the root is nobody's action
    value = [0.5, 0.9, 0.1, 0.2, 0.6, 0.3]
    assert action_values(RECORD, value).tolist()[1:] == [0.9, 1.0, 0.2, 0.6, 0.3]


@pytest.mark.parametrize(
    "kappa, want",
    [
        (0.0, [3 / 6, 1.0, 0 / 1, 0.0, 3 / 6]),
        (1.0, [3.9 / 7, 1.0, 0.2 / 2, 0.6, 3.3 / 7]),
        (4.0, [6.6 / 10, 1.0, 0.8 / 5, 0.6, 4.2 / 10]),
    ],
)
def test_action_values_of_counts_and_critic(kappa, want):
    value = [0.5, 0.9, 0.1, 0.2, 0.6, 0.3]
    mixed = counts_and_critic(RECORD, value, kappa)
    assert action_values(RECORD, mixed).tolist()[1:] == pytest.approx(want)
    if kappa == 0:  # raw counts need no critic
        mixed = counts_and_critic(RECORD, [None] * 6, 0.0)
        assert action_values(RECORD, mixed).tolist()[1:] == pytest.approx(want)


def test_success_share_of_an_undrawn_end_is_its_reward():
    assert success_share(node(0, draws=2, n=4, wins=3)) == 0.75
    assert success_share(node(0, reward=1)) == 1  # kept, and drawn by no completion
    assert success_share(node(0, reward=0)) == 0


def test_advantage_states():
    q = torch.tensor([0.0, 0.9, 1.0, 0.2, 0.6, 0.3], dtype=torch.float64)
    (state,) = advantage_states(RECORD, q, 0.1)  # node 1 has one action: no gap
    mean = (
        0.9 + 2 * 1.0 + 0.2
    ) / 4  # the mean runs over draws: node 2 twice, the undrawn node 4 not
    assert state["node"] == 0
    assert state["mean"] == pytest.approx(mean) and state["gap"] == pytest.approx(0.8)
    assert [a["node"] for a in state["actions"]] == [1, 2, 3]  # each unique action once
    assert [a["adv"] for a in state["actions"]] == pytest.approx([0.9 - mean, 1 - mean, 0.2 - mean])
    assert [len(advantage_states(RECORD, q, gap)) for gap in (0.0, 0.79, 0.81)] == [2, 1, 0]


def test_advantage_states_with_a_baseline_for_states_drawn_once():
    q = torch.tensor([0.0, 0.9, 1.0, 0.2, 0.6, 0.3], dtype=torch.float64)
    value = [0.5, 0.7, 0.0, 0.0, 0.0, 0.0]
    root, single = advantage_states(RECORD, q, 0.1, value=value, value_draws=1.0)
    assert root["mean"] == pytest.approx((0.9 + 2 * 1.0 + 0.2 + 0.5) / 5)
    mean = (6 * 0.3 + 0.7) / 7  # node 1 has one action, drawn six times
    assert (single["node"], single["mean"]) == (1, pytest.approx(mean, abs=1e-6))
    assert single["gap"] == pytest.approx(0.4)
    assert single["actions"] == [{"node": 5, "q": 0.3, "adv": pytest.approx(0.3 - mean, abs=1e-6)}]


def test_training_nodes():
    # states that go on and were completed; an ended step has no state, node 4 no completion
    assert training_nodes(RECORD, "all") == [True, True, False, True, False, True]
    assert training_nodes(RECORD, "labelled") == [True, True, False, False, False, False]


def test_problems_are_held_out_by_hash_and_of_few_at_least_one():
    records = [{"id": f"p/{i}"} for i in range(1000)]
    training, held_out = split_by_hash(records)
    assert len(training) + len(held_out) == 1000 and 70 < len(held_out) < 130
    out = [record["id"] for record in held_out]
    for size in range(3, 40):  # whichever others are there, a problem stays on its side
        few, rest = split_by_hash(records[:size])
        assert few and rest
        if any(record["id"] in out for record in records[:size]):
            assert all(record["id"] in out for record in rest)


@pytest.mark.parametrize(
    "rewards, n, kept",
    [
        ([1, 0, 0, 0, 1, 0], 4, [0, 1, 2, 4]),
        ([0, 0, 0, 0, 1, 1, 1], 6, [0, 1, 2, 4, 5, 6]),
        ([0, 0, 0, 0, 1, 1, 1], 5, [0, 1, 2, 4, 5]),  # odd: the odd one is wrong
        ([0] * 5 + [1], 4, [0, 1, 2, 5]),  # too few right ones: filled up
        ([1] * 5 + [0], 4, [0, 1, 2, 5]),
        ([1] * 6, 4, [0, 1, 2, 3]),
        ([0] * 6, 4, [0, 1, 2, 3]),
        ([0, 1], 1, [0]),
    ],
)
def test_keep_balanced(rewards, n, kept):
    assert keep_balanced(rewards, n) == kept


def test_keep_balanced_is_as_balanced_as_can_be(rng):
    for _ in range(300):
        rewards = [rng.randint(0, 1) for _ in range(rng.randint(1, 9))]
        n = rng.randint(1, len(rewards))
        kept = keep_balanced(rewards, n)
        assert len(kept) == len(set(kept)) == n and kept == sorted(kept)
        spread = [abs(2 * sum(c) - n) for c in itertools.combinations(rewards, n)]
        assert abs(2 * sum(rewards[i] for i in kept) - n) == min(spread)
        for kind in (0, 1):  # of each kind the ones drawn first
            which = [i for i, r in enumerate(rewards) if r == kind]
            mine = [i for i in kept if rewards[i] == kind]
            assert mine == which[: len(mine)]


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_is_where_the_score_test_rejects():
    for right, n in [(3, 7), (50, 60), (1, 200), (422, 500)]:
        for p in wilson(right, n):
            assert (right / n - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(
                math.copysign(1.959964, right / n - p), rel=1e-6
            )


def test_mcnemar():
    for gained, lost, p in [(8, 1, 0.0390625), (1, 8, 0.0390625), (10, 0, 2 / 1024), (5, 5, 1.0),
                            (0, 0, 1.0), (1, 0, 1.0), (15, 5, 0.04138947)]:  # fmt: skip
        assert mcnemar(gained, lost) == pytest.approx(p)
    assert 0 <= mcnemar(3000, 0) < 1e-300
    for n in range(1, 9):  # all 2^n equally likely outcomes that are at least as extreme
        for k in range(n + 1):
            extreme = [
                abs(2 * sum(x) - n) >= abs(2 * k - n) for x in itertools.product((0, 1), repeat=n)
            ]
            assert mcnemar(k, n - k) == pytest.approx(sum(extreme) / 2**n)


def test_majority_counts_equal_numbers_as_one_answer(monkeypatch):
    votes = [("1/2", True), ("3", False), ("0.5", True), (r"\frac12", True), ("3", False)]
    sampled = [{"prediction": p, "correct": c} for p, c in [*votes, (None, False)]]
    assert majority(sampled) and not majority(sampled[1:3] + sampled[4:])
    assert not majority([]) and not majority(sampled[-1:])
    votes = [("$18", True), ("17", False), ("18", True), ("17", False), ("18 dollars", True)]
    assert majority([{"prediction": p, "correct": c} for p, c in votes])
    # Programs that differ in an indent alone, and a unit: most of those that say so must be right.
    votes = [("f:\n    return 1", False)] * 3 + [("f:\nreturn 1", True), ("7", False), ("7", False)]
    assert not majority([{"prediction": p, "correct": c} for p, c in votes])
    votes = [("5 km", False)] * 3 + [("5 cm", True), ("7", False), ("7", False)]
    assert not majority([{"prediction": p, "correct": c} for p, c in votes])
    long = {"prediction": "1" + " " * 100_000 + "2", "correct": False}
    for module in (support.math_answers, support.stats):  # it takes minutes for an answer so long
        monkeypatch.setattr(module, "normalise", None)
    assert not majority([long])


def test_pass_at():
    assert pass_at(2, 4, 1) == pytest.approx(0.5) and pass_at(1, 7, 3) == pytest.approx(3 / 7)
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                picks = list(itertools.combinations([1] * right + [0] * (n - right), k))
                assert pass_at(k, n, right) == pytest.approx(sum(map(any, picks)) / len(picks))


def test_bootstrap():
    assert bootstrap(np.full(20, 0.25)) == (0.25, 0.25)
    x = np.array([1.0] * 30 + [0.0] * 150 + [-1.0] * 20)
    low, high = bootstrap(x)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.008)
    assert bootstrap(x) == (low, high)  # the same figures each time
    assert bootstrap(-x) == pytest.approx((-high, -low), abs=0.008)


def test_paired():
    new = [True] * 8 + [False] * 1 + [True] * 6 + [False] * 5
    old = [False] * 8 + [True] * 1 + [True] * 6 + [False] * 5
    row = paired(new, old)
    assert row["difference"] == pytest.approx(0.35)
    assert (row["gained"], row["lost"]) == (8, 1) and row["p"] == pytest.approx(0.0390625)
    assert row["interval"] == bootstrap(np.array(new, float) - np.array(old, float))
