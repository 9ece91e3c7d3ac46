"""Where steps end, and what the step tree counts: the rules of the design as properties."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers as tk
import torch
import toy
import transformers as hf

import label_steps
import sample as sample_stage
import support.records
import support.sampler
from label_steps import StepTree
from model import LM, checked_step_ends, load_lm

# ---------------------------------------------------------------- where steps end


def save_model(tokenizer, path, **fields):
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=eos,
        pad_token_id=eos, **fields,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return load_lm(path, device="cpu")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE whose tokens run over line breaks, as Llama 3's and Qwen's do: ".\\n\\n", ")\\n", "\\n\\n"."""
    base = tk.Tokenizer(tk.models.BPE())
    pieces = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    base.pre_tokenizer = tk.pre_tokenizers.Sequence([
        tk.pre_tokenizers.Split(tk.Regex(pieces), "isolated"),
        tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    base.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    text = "So we add.\n\nThen (1 + 2)\nis 3.\nThe answer:\n\n\n 9 \n\n  \nAnd.\r\nno\r\n\r\n"
    base.train_from_iterator([text] * 20, trainer)
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|end|>")
    return save_model(fast, tmp_path_factory.mktemp("model") / "bpe")


def cut(lm, ids) -> list[str]:
    ends = lm.step_ends(ids)
    return [lm.tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends], ends)]


E = "<|end|>"
STEPS = [  # what was sampled, cut into steps
    ["Ben: 6 * 2 = 12\n", "The answer is 9." + E],
    ["Ben: 6 * 2 = 12\n\n", "The answer is 9.\n" + E],  # a bare EOS belongs to the line before it
    ["Ben: 6 * 2 = 12\n\n\n \n", "The answer is 9.\n\n" + E],  # so do blank lines
    ["\n\nBen: 6 * 2 = 12\n", "The answer is 9." + E],  # at the very start there is none before
    ["Ben: 6 * 2 = 12" + E],  # no line break
    ["Ben: 6 * 2 = 12\n", "The answer is 9"],  # cut off within a step
    ["Ben: 6 * 2 = 12\n", "The answer is 9.\n"],  # cut off right behind one
    ["Ben: 6 * 2 = 12\n\n"],  # cut off in blank lines
    ["Ben: 6 * 2 = 12\n", "The answer is" + E],
    ["\n\n"],  # white space only
    ["\n" + E],
    [E],
]


@pytest.mark.parametrize("steps", STEPS, ids=repr)
def test_steps_end_at_line_breaks(lm, bpe, steps):
    for model in (lm, bpe):
        if model is lm:  # every line break is a token of its own, and there are no bare blanks
            steps = [s.replace("\n \n", "\n\n") for s in steps]
        ids = model.tokenizer("".join(steps), add_special_tokens=False)["input_ids"]
        assert cut(model, ids) == steps
        assert model.step_ends(ids)[-1] == len(ids)


def test_tokens_with_a_line_break_inside_are_one_boundary(bpe):
    for text in (".\n\n", ")\n", ".\r\n"):
        (token,) = bpe.tokenizer(text)["input_ids"]  # or this test says nothing
        assert bpe.codec.breaks[token] and not bpe.codec.blank[token]
    ids = bpe.tokenizer("So we add.\n\nThen (1 + 2)\nis 3.\r\nno")["input_ids"]
    assert cut(bpe, ids) == ["So we add.\n\n", "Then (1 + 2)\n", "is 3.\r\n", "no"]


def test_a_special_token_s_name_is_no_text(lm):
    assert not any(lm.codec.breaks[i] for i in lm.tokenizer.all_special_ids)
    assert all(lm.codec.blank[i] for i in lm.tokenizer.all_special_ids)
    assert lm.step_ends([]) == []


def lines_of(breaks: list[int], blank: list[int]):
    """What LM.step_ends asks of a model whose tokens are these."""
    codec = SimpleNamespace(breaks=np.array(breaks, bool), blank=np.array(blank, bool))
    return SimpleNamespace(step="line", codec=codec)


def slow_ends(lm, ids) -> list[int]:
    """Cut after every token with a line break, then hand blank pieces to the piece before them."""
    special = {*lm.tokenizer.all_special_ids, *lm.eos}
    text = ["" if i in special else lm.tokenizer.decode([i]) for i in ids]
    pieces, piece = [], []
    for at, t in enumerate(text):
        piece.append(at)
        if "\n" in t or at == len(ids) - 1:
            pieces.append(piece)
            piece = []
    steps = []
    for piece in pieces:
        blank = not "".join(text[at] for at in piece).strip()
        lead = len(steps) == 1 and not "".join(text[at] for at in steps[0]).strip()
        if steps and (blank or lead):
            steps[-1] += piece
        else:
            steps.append(piece)
    return [step[-1] + 1 for step in steps]


def test_steps_partition_a_response(lm, bpe, rng):
    for model in (lm, bpe):
        breaks = [int(i) for i in model.codec.breaks.nonzero()[0]]
        for _ in range(400):
            ids = [
                rng.choice(breaks) if rng.random() < 0.4 else rng.randrange(len(model.tokenizer))
                for _ in range(rng.randint(1, 12))
            ]
            ends = model.step_ends(ids)
            assert ends == slow_ends(model, ids), [model.tokenizer.decode([i]) for i in ids]
            assert ends == sorted(set(ends)) and ends[0] > 0 and ends[-1] == len(ids)


TEXT = "\n\nFirst\nsecond\n\n\nThird.\r\n\r\nFourth\n \n\n" + E
UNITS = [
    ("line", ["\n\nFirst\n", "second\n\n\n", "Third.\r\n\r\n", "Fourth\n \n\n" + E]),
    ("paragraph", ["\n\nFirst\nsecond\n\n\n", "Third.\r\n\r\n", "Fourth\n \n\n" + E]),
    ("response", [TEXT]),
]


def test_the_unit_of_a_step(bpe, rng, monkeypatch):
    ids = bpe.tokenizer(TEXT)["input_ids"]
    for unit, steps in UNITS:
        monkeypatch.setattr(bpe, "step", unit)
        assert cut(bpe, ids) == steps
    for k in (1, 4, 99):
        monkeypatch.setattr(bpe, "step", str(k))
        ends = bpe.step_ends(ids)
        assert ends == [min(end, len(ids)) for end in range(k, len(ids) + k, k)]
    assert bpe.step_ends([]) == []


@pytest.mark.parametrize("unit", ["line", "paragraph", "response", "3"])
def test_the_rest_of_a_response_is_cut_as_within_it(unit, bpe, rng, monkeypatch):
    monkeypatch.setattr(bpe, "step", unit)
    breaks = [int(i) for i in bpe.codec.breaks.nonzero()[0]]
    for _ in range(300):
        ids = [
            rng.choice(breaks) if rng.random() < 0.4 else rng.randrange(len(bpe.tokenizer))
            for _ in range(rng.randint(1, 20))
        ]
        ends = checked_step_ends(bpe, ids)
        record = {"id": "x", "responses": [{"ids": ids, "ends": ends}]}
        label_steps.require_relative_split(bpe, record)


FORKS = [  # a step_ends of one's own, and what is said of it by which stage
    (
        lambda lm, ids: [*range(3, len(ids), 3)],
        "sample.py",
        r"cuts \d+ tokens at \[.*; wanted offsets",
    ),
    (lambda lm, ids: [0, len(ids)], "sample.py", "wanted offsets that rise"),
    (lambda lm, ids: np.array([len(ids)]), "sample.py", "wanted offsets that rise"),
    (
        lambda lm, ids: sorted({len(ids) // 2 or len(ids), len(ids)}),
        "label_steps.py",
        "depend on the",
    ),
]


@pytest.mark.parametrize(("fork", "script", "said"), FORKS)
def test_a_step_split_that_breaks_its_contract_is_named_where_it_is_made(
    fork, script, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    toy.build(tmp_path)
    monkeypatch.setattr(LM, "step_ends", fork)
    for stage, flags in (("sample.py", toy.SAMPLE), ("label_steps.py", toy.LABEL)):
        code, _, err = toy.stage(stage, flags)
        assert code == (2 if stage == script else 0), err
        if code:
            assert (
                re.search(said, err) and "LM.step_ends (model.py)" in err and err.count("\n") == 1
            )
            return


# ---------------------------------------------------------------- the tree's counts


class Bandit:
    """A tabular policy over steps: at each state a few steps, each of which ends the response or goes on.

    State = the tuple of steps so far. Limit: a response is cut off, and wrong, after `limit` steps.
    """

    def __init__(self, seed: int, limit=4):
        self.seed, self.limit = seed, limit

    def actions(self, state) -> list[tuple[float, tuple, int | None]]:
        """(chance, step's tokens, reward or None) at a state."""
        rng = random.Random(f"{self.seed} {state}")
        weights = [rng.uniform(0.3, 1) for _ in range(3)]
        out = []
        for k, w in enumerate(weights):
            step = tuple(10 * len(state) + k for _ in range(rng.randint(1, 2)))
            reward = int(rng.random() < 0.4) if rng.random() < 0.3 else None
            if reward is None and len(state) == self.limit - 1:
                reward = 0
            out.append((w / sum(weights), step, reward))
        return out

    def draw(self, rng, state) -> tuple[list[tuple], int]:
        steps, reward = [], None
        while reward is None:
            options = self.actions((*state, *steps))
            (_, step, reward), *_ = rng.choices(options, [p for p, *_ in options])
            steps.append(step)
        return steps, reward

    def value(self, state=()) -> float:
        return sum(
            p * (self.value((*state, step)) if reward is None else reward)
            for p, step, reward in self.actions(state)
        )


def flat(steps) -> tuple[list[int], list[int]]:
    """Token ids and step ends of a list of steps."""
    ids = [i for step in steps for i in step]
    return ids, [sum(map(len, steps[: k + 1])) for k in range(len(steps))]


def draw(ids, ends):
    """A completion and how it is cut, from wherever the walk has come to."""
    return ids, lambda rest: [e - len(ids) + len(rest) for e in ends if e > len(ids) - len(rest)]


def steps_to(tree: StepTree, v: int) -> tuple:
    steps = ()
    while v:
        steps, v = (tuple(tree.nodes[v]["ids"]), *steps), tree.nodes[v]["parent"]
    return steps


def grow(bandit: Bandit, rng, n1=12, n=4, m=5, whole_draws=False):
    """A tree grown as label_steps grows it; also the kept responses and all counted draws (state, steps, reward)."""
    drawn = [bandit.draw(rng, ()) for _ in range(n1)]
    chosen = sample_stage.keep_balanced([r for _, r in drawn], n)
    kept, responses, cuts = [drawn[i] for i in chosen], [], {}
    for steps, reward in drawn:
        ids, ends = flat(steps)
        responses.append({"ids": ids, "ends": ends, "reward": reward})
        for size, end in zip([0, *ends], ends):  # how what is left of it is cut
            cuts[tuple(ids[size:])] = [e - size for e in ends if e >= end]
    sampled = {"prompt_ids": [1, 2], "kept": chosen, "responses": responses}
    if whole_draws:
        tree = label_steps.tree_from_all_draws(sampled, lambda rest: cuts[tuple(rest)])
    else:
        tree = label_steps.tree_from_responses(sampled)
    log = [((), steps, reward) for steps, reward in drawn] if whole_draws else []
    for level in tree.levels():
        for v in level:
            for _ in range(m - tree.nodes[v]["n"]):
                state = steps_to(tree, v)
                steps, reward = bandit.draw(rng, state)
                tree.count_draw(v, *draw(*flat(steps)), reward)
                log.append((state, steps, reward))
    return tree, kept, log


def twin(kept, log) -> dict:
    """{path of steps: [draws, n, wins, reward]} by the design's words: for each completion look at every prefix."""
    inside = {tuple(steps[:k]) for steps, _ in kept for k in range(len(steps) + 1)}
    nodes = {p: [0, 0, 0, None] for p in inside}
    for steps, reward in kept:
        nodes[tuple(steps)][3] = reward
    for state, steps, reward in log:
        nodes[state][1] += 1
        nodes[state][2] += reward
        for k in range(1, len(steps) + 1):
            here = (*state, *steps[:k])
            if here[:-1] not in inside:
                break  # it left the kept responses a step ago
            ends = reward if k == len(steps) else None
            node = nodes.setdefault(here, [0, 0, 0, ends])
            node[0] += 1
            node[1] += 1
            node[2] += reward
    return nodes


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("m", [5, 0])
def test_the_tree_of_whole_draws_counts_as_its_dictionary_twin(seed, m):
    """Of every draw every step: a state's n is how many draws passed it or began there."""
    tree, kept, log = grow(Bandit(seed % 5), random.Random(seed), m=m, whole_draws=True)
    want = {(): [0, 0, 0, None]}
    for state, steps, reward in log:
        for k in range(len(steps) + 1):
            ends = reward if k == len(steps) else None
            node = want.setdefault((*state, *steps[:k]), [0, 0, 0, ends])
            node[0] += k > 0
            node[1] += 1
            node[2] += reward
    mine = {}
    for v, node in enumerate(tree.nodes):
        mine[steps_to(tree, v)] = [node["draws"], node["n"], node["wins"], node["reward"]]
    assert len(mine) == len(tree.nodes) and mine == want
    states = {steps_to(tree, v) for level in tree.levels() for v in level}
    assert states == {tuple(steps[:k]) for steps, _ in kept for k in range(len(steps))}
    assert all(want[state][1] >= m for state in states)


@pytest.mark.parametrize("seed", range(25))
def test_the_tree_counts_as_its_dictionary_twin(seed):
    bandit, m = Bandit(seed % 5), 5
    tree, kept, log = grow(bandit, random.Random(seed), m=m)
    mine = {
        steps_to(tree, v): [node["draws"], node["n"], node["wins"], node["reward"]]
        for v, node in enumerate(tree.nodes)
    }
    assert len(mine) == len(tree.nodes)  # a state is one node
    assert mine == twin(kept, log)
    states = [v for level in tree.levels() for v in level]
    assert len(set(states)) == len(states)  # shared states are labelled once
    assert {steps_to(tree, v) for v in states} == {
        tuple(steps[:k]) for steps, _ in kept for k in range(len(steps))
    }
    depths = [len(steps_to(tree, v)) for v in states]
    assert depths == sorted(depths)  # shallow ones first
    for v in states:
        assert tree.nodes[v]["n"] >= m
        draws = [node["draws"] for node in tree.nodes if node["parent"] == v]
        assert sum(draws) == tree.nodes[v]["n"]
    for v, node in enumerate(tree.nodes):
        assert node["parent"] < v
        if v:
            assert node["n"] >= node["draws"]
            assert tree.response(v) == [i for step in steps_to(tree, v) for i in step]
            assert tree.depth[v] == len(tree.response(v))
            if v not in states:  # leaves, ended steps: what was drawn is all that is known
                assert node["n"] == node["draws"]


def test_hand_worked_tree():
    tree = StepTree([1])
    tree.put_in([5, 6, 7], [1, 3], 1)  # 5 | 6 7
    tree.put_in([5, 8], [1, 2], 0)  # 5 | 8
    assert [(n["draws"], n["n"], n["wins"]) for n in tree.nodes] == [(0, 0, 0)] * 4
    assert [n["reward"] for n in tree.nodes] == [None, None, 1, 0]
    assert tree.levels() == [[0], [1]]
    tree.count_draw(0, *draw([5, 6, 7], [1, 3]), 1)  # along a kept response to its end
    tree.count_draw(
        0, *draw([5, 9, 9], [1, 2, 3]), 1
    )  # leaves it after the first step; 9 is a leaf
    tree.count_draw(0, *draw([4, 5, 6, 7], [1, 2, 4]), 0)  # leaves at once
    tree.count_draw(1, *draw([9, 8], [1, 2]), 0)  # meets the leaf
    rows = [(n["parent"], n["ids"], n["draws"], n["n"], n["wins"], n["reward"]) for n in tree.nodes]
    assert rows == [
        (-1, [], 0, 3, 2, None),
        (0, [5], 2, 3, 2, None),
        (1, [6, 7], 1, 1, 1, 1),
        (1, [8], 0, 0, 0, 0),
        (1, [9], 2, 2, 1, None),
        (0, [4], 1, 1, 0, None),
    ]


@pytest.mark.parametrize("whole_draws", [False, True])
def test_pooled_monte_carlo_values_are_unbiased(whole_draws):
    """E[wins - n V] = 0 at every state, although kept responses are chosen by their outcome.

    Counting the kept responses, or labelling a state only from what passes it, would show as a z of 5 and more.
    """
    bandit, rng, value, sums = Bandit(4), random.Random(0), {}, {}
    for _ in range(800):
        tree, _, _ = grow(bandit, rng, n1=8, n=4, m=4, whole_draws=whole_draws)
        for v, node in enumerate(tree.nodes):
            state = steps_to(tree, v)
            if node["reward"] is not None or not node["n"]:
                continue
            if state not in value:
                value[state] = bandit.value(state)
            error = node["wins"] - node["n"] * value[state]
            total = sums.setdefault(state, [0.0, 0.0, 0])
            total[0] += error
            total[1] += error**2
            total[2] += 1
    tested = {s: a / b**0.5 for s, (a, b, n) in sums.items() if n > 100 and b > 1}
    assert len(tested) > 15 and len({round(value[s], 6) for s in tested}) > 10
    assert max(map(abs, tested.values())) < 3.5, tested
    assert sum(z * z for z in tested.values()) < 2.5 * len(tested)


@pytest.mark.parametrize("whole_draws", [False, True])
def test_means_over_draws_are_unbiased(whole_draws):
    """The mean of eq. 13 over a state's draws, Q of each child exact, estimates E_{a ~ pi_ref} Q = V."""
    bandit, rng = Bandit(4), random.Random(1)
    errors = {}
    for _ in range(800):
        tree, _, _ = grow(bandit, rng, n1=8, n=4, m=4, whole_draws=whole_draws)
        kids = {}
        for v, node in enumerate(tree.nodes):
            if node["draws"]:
                state = steps_to(tree, v)
                q = bandit.value(state) if node["reward"] is None else node["reward"]
                kids.setdefault(state[:-1], []).append((node["draws"], q))
        for state, draws in kids.items():
            error = sum(n * q for n, q in draws) - sum(n for n, _ in draws) * bandit.value(state)
            errors.setdefault(state, []).append(error)
    z = {
        s: sum(x) / sum(e * e for e in x) ** 0.5
        for s, x in errors.items()
        if len(x) > 100 and any(x)
    }
    assert len(z) > 4 and max(map(abs, z.values())) < 3.5, z


# ---------------------------------------------------------------- the stages themselves


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """sample.py and label_steps.py on a model of five words that hardly knows one from another.

    Line breaks, blank lines, ends and answers come at random, so trees share, branch, end and are cut off a lot.
    """
    words = [E, "?", "\n", "go", "#### 1"]
    base = tk.Tokenizer(tk.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    base.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(r"<\|end\|>|\n|go|#### 1"), "isolated")
    base.decoder = tk.decoders.Fuse()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=base, eos_token=E, unk_token="?")
    run = tmp_path_factory.mktemp("run")
    lm = save_model(fast, run / "base", initializer_range=0.1)
    problems = [
        {"id": f"p/{k}", "source": "p", "domain": "math", "prompt": "go" * (k + 1), "answer": "1", "tests": None}
        for k in range(30)
    ]  # fmt: skip
    (run / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    where = {"actor": str(run / "base"), "problems": str(run / "train.jsonl"), "max_new": 10}
    samples, trees = str(run / "samples.jsonl"), str(run / "trees.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py"])
        sample_stage.stage(sample_stage.Settings(**where, out=samples, n1=12, n=4))
        patch.setattr(sys, "argv", ["label_steps.py"])
        label_steps.stage(label_steps.Settings(**where, samples=samples, out=trees, m=6))
    read = lambda path: [json.loads(x) for x in open(path)]  # noqa: SIM115
    return lm, read(samples), read(trees)


def test_samples_of_the_stage(labelled):
    lm, samples, _ = labelled
    seen = Counter()
    for record in samples:
        assert record["prompt_ids"] == lm.prompt_ids("go" * (int(record["id"][2:]) + 1))
        rewards = [r["reward"] for r in record["responses"]]
        assert len(rewards) == 12
        assert record["kept"] == sample_stage.keep_balanced(rewards, 4)
        for r in record["responses"]:
            assert r["finished"] == (r["ids"][-1] in lm.eos) and (
                r["finished"] or len(r["ids"]) == 10
            )
            assert r["ends"] == lm.step_ends(r["ids"]) and r["text"] == lm.text(r["ids"])
            right = "#### 1" in r["text"] and r["finished"]
            assert r["reward"] <= right
            seen.update(right=r["reward"], cut=not r["finished"], steps=len(r["ends"]) > 2)
    assert min(seen["right"], seen["cut"], seen["steps"]) > 3, seen


def test_a_card_with_less_memory_makes_the_same_trees(labelled, monkeypatch):
    """Problems are labelled a few at a time where the keys and values of all are too many."""
    run, sizes = Path(labelled[0].path).parent, []

    def fit(sampler, trees):
        sizes.append(len(trees))
        return len(trees) <= 8

    monkeypatch.setattr(support.sampler.Sampler, "fits", fit)
    monkeypatch.setattr(sys, "argv", ["label_steps.py"])
    where = {"actor": str(run / "base"), "problems": str(run / "train.jsonl"), "max_new": 10}
    few = run / "few.jsonl"
    where |= {"samples": str(run / "samples.jsonl"), "out": str(few)}
    label_steps.stage(label_steps.Settings(**where, m=6))
    assert few.read_bytes() == (run / "trees.jsonl").read_bytes()
    assert max(sizes) > 8 and sum(size <= 8 for size in sizes) > 1


def test_trees_of_the_stage(labelled):
    lm, samples, trees = labelled
    seen = Counter()
    for record, tree in zip(samples, trees, strict=True):
        assert (tree["id"], tree["prompt_ids"]) == (record["id"], record["prompt_ids"])
        nodes, paths, ends = tree["nodes"], [()], {}
        for v, node in enumerate(nodes[1:], 1):
            assert node["parent"] < v and node["ids"] and node["text"] == lm.text(node["ids"])
            paths.append((*paths[node["parent"]], tuple(node["ids"])))
        assert len(set(paths)) == len(paths)
        inside = set()
        for k in record["kept"]:
            r = record["responses"][k]
            steps = [tuple(r["ids"][a:b]) for a, b in zip([0, *r["ends"]], r["ends"])]
            inside |= {tuple(steps[:j]) for j in range(len(steps))}
            ends[tuple(steps)] = r["reward"]
        for v, (node, path) in enumerate(zip(nodes, paths)):
            assert node["labelled"] == (path in inside)
            assert 0 <= node["wins"] <= node["n"] and 0 <= node["draws"] <= node["n"] or v == 0
            draws = sum(x["draws"] for x in nodes if x["parent"] == v)
            if node["labelled"]:
                assert node["n"] >= 6 and draws == node["n"] and node["reward"] is None
                seen["topped up"] += 0 < node["draws"] < 6 == node["n"]
                seen["shared"] += sum(p[: len(path)] == path for p in ends) > 1
                continue
            assert draws == 0 and node["n"] == node["draws"]
            if path in ends:
                assert node["reward"] == ends[path]
                seen["kept ends drawn"] += node["draws"] > 0
                seen["kept ends not drawn"] += node["draws"] == 0
            else:
                assert node["n"] > 0 and paths[node["parent"]] in inside
            length = sum(map(len, path))
            assert length <= 10
            if node["reward"] is not None:
                assert node["wins"] == node["n"] * node["reward"]
                assert node["ids"][-1] in lm.eos or (length == 10 and node["reward"] == 0)
                seen["cut off"] += node["ids"][-1] not in lm.eos
            else:
                assert not set(node["ids"]) & set(lm.eos)
    wanted = {"topped up", "shared", "kept ends drawn", "kept ends not drawn", "cut off"}
    assert wanted == {k for k in seen if seen[k] > 1}, seen


def test_a_boundary_that_needs_a_look_ahead_does_not_bias_the_counts():
    """Token 1 is a blank line: "0" then "1" is one step, "0" then anything else ends after the 0.

    The policy draws 0, then with equal chance 1 2 (right) or 3 (wrong), so V(after 0) = 1/2. The kept
    response 0 | 3 makes a state of "0". Counting a completion from above there only if its own cut
    ends after the 0 would let the wrong ones in and keep the right ones out: MC would be 1/4.
    """
    toy = lines_of(breaks=[1, 1, 0, 0], blank=[0, 1, 0, 0])
    rng, wins, n = random.Random(0), 0, 0
    for _ in range(400):
        tree = StepTree([9])
        tree.put_in([0, 3], [1, 2], 0)
        for _ in range(8):
            right = rng.random() < 0.5
            ids = [0, 1, 2] if right else [0, 3]
            tree.count_draw(0, ids, lambda rest: LM.step_ends(toy, rest), int(right))
        while tree.nodes[1]["n"] < 8:
            right = rng.random() < 0.5
            ids = [1, 2] if right else [3]
            tree.count_draw(1, ids, lambda rest: LM.step_ends(toy, rest), int(right))
        wins, n = wins + tree.nodes[1]["wins"], n + tree.nodes[1]["n"]
    assert abs(wins / n - 0.5) < 4 * (0.25 / n) ** 0.5


BLANK = lines_of(breaks=[1, 1, 0], blank=[0, 1, 0])


def planted(responses: list[tuple[list[int], int]]) -> StepTree:
    """The tree of whole draws of some responses, (ids, reward) each, where token 1 is a blank line."""
    cut = lambda rest: LM.step_ends(BLANK, rest)
    rows = [{"ids": ids, "ends": cut(ids), "reward": reward} for ids, reward in responses]
    return label_steps.tree_from_all_draws({"prompt_ids": [9], "kept": [], "responses": rows}, cut)


def test_whole_draws_where_blank_lines_are_tokens_make_no_more_nodes_than_steps():
    """0 | 0 1 | ...: of a prefix that may be cut in two ways a draw goes on by its own cut alone."""
    rng = random.Random(0)
    for size in (5, 20):
        responses = []
        for _ in range(12):
            ids = [0]
            while len(ids) < 2 * size:
                ids += [0, 1] if rng.random() < 0.5 else [0]
            responses.append(([*ids, 2], 1))
        tree = planted(responses)
        steps = sum(len(LM.step_ends(BLANK, ids)) for ids, _ in responses)
        assert len(tree.nodes) <= 2 * steps + 1
        assert tree.nodes[0]["n"] == tree.nodes[0]["wins"] == 12


def test_a_draw_of_a_thousand_steps_is_counted():
    tree = planted([([0] * 3000, 0), ([0] * 2999 + [2], 1)])
    assert [node["n"] for node in tree.nodes] == [2] * 3000 + [
        1,
        1,
    ]  # the prompt, 2,999 states, two ends


def test_labelled_states_of_whole_draws_are_unbiased_too():
    """All states are `labelled`: those of the kept responses alone would be chosen by their outcome."""
    bandit, rng, errors, value = Bandit(4), random.Random(2), [], {}
    for _ in range(1500):
        tree, _, _ = grow(bandit, rng, n1=8, n=4, m=0, whole_draws=True)
        lm = SimpleNamespace(codec=SimpleNamespace(tree_texts=lambda *what: [""] * len(what[0])))
        total = 0.0
        for v, node in enumerate(tree.record(lm, {"id": "p", "prompt": "?"})["nodes"]):
            if node["labelled"]:
                state = steps_to(tree, v)
                value.setdefault(state, bandit.value(state))
                total += node["wins"] - node["n"] * value[state]
        errors.append(total)
    assert abs(np.mean(errors)) < 3.5 * np.std(errors) / len(errors) ** 0.5


def test_mixed_labels_only_problems_that_are_sometimes_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.build(tmp_path)
    assert toy.stage("sample.py", f"{toy.SAMPLE} --mixed")[0] == 0
    assert toy.stage("label_steps.py", toy.LABEL)[0] == 0
    samples, trees = (support.records.read_jsonl(f"run/{x}.jsonl") for x in ("samples", "trees"))
    mixed = []
    for r in samples:
        rewards = [x["reward"] for x in r["responses"]]
        alike = len({*rewards}) == 1
        assert r["kept"] == ([] if alike else sample_stage.keep_balanced(rewards, 4))
        mixed += [] if alike else [r["id"]]
    assert 0 < len(mixed) < len(samples)
    assert [r["id"] for r in trees] == mixed


def test_the_unit_of_a_step_travels_with_the_records(tmp_path, monkeypatch):
    """sample.py --step is what completions are cut by, and what a critic reads responses by."""
    monkeypatch.chdir(tmp_path)
    toy.build(tmp_path)
    critic = "--actor tiny --critic run/critic --out run/chosen.jsonl"
    flags = toy.FLAGS | {"evaluate.py": f"{toy.EVALUATE} {critic}"}
    flags["sample.py"] += " --step 2"
    for script in ("sample.py", "label_steps.py", "train_critic.py", "evaluate.py"):
        code, _, err = toy.stage(script, flags[script])
        assert code == 0, err
        stated = json.loads(Path(f"run/{OUT[script]}.manifest.json").read_text())["facts"]
        assert stated["step"] == "2"
    lengths = Counter()
    for record in support.records.read_trees("run/trees.jsonl"):
        for node in record["nodes"][1:]:
            lengths[len(node["ids"]), node["reward"] is None] += 1
    assert {*lengths} <= {(2, True), (2, False), (1, False)} and min(lengths.values()) > 5
    code, _, err = toy.stage("sample.py", f"{toy.SAMPLE} --step sentence --force")
    assert code == 2 and "wanted line, paragraph, response, or a number of tokens" in err


OUT = toy.OUTPUT | {"evaluate.py": "chosen.jsonl"}


def test_outcome_advantages_are_a_tree_of_one_step(tmp_path, monkeypatch):
    """--step response, --whole_draws --m 0, --kappa 0: reward minus mean reward of all responses."""
    monkeypatch.chdir(tmp_path)
    toy.build(tmp_path)
    actor = "--actor tiny --trees run/trees.jsonl --out run/actor --kappa 0 --gap 0 --batch 99"
    for script, flags in (
        ("sample.py", f"{toy.SAMPLE} --step response"),
        ("label_steps.py", f"{toy.LABEL} --whole_draws --m 0"),
        ("train_actor.py", actor),
    ):
        code, _, err = toy.stage(script, flags)
        assert code == 0, err
    trees = {tree["id"]: tree for tree in support.records.read_trees("run/trees.jsonl")}
    lines = {x["id"]: x for x in support.records.read_jsonl("run/actor.advantages.jsonl")}
    differ = repeated = 0
    for sampled in support.records.each_sample("run/samples.jsonl"):
        tree, (state,) = trees[sampled["id"]], lines[sampled["id"]]["states"]
        rewards = [response["reward"] for response in sampled["responses"]]
        mean = sum(rewards) / len(rewards)
        wanted = {tuple(r["ids"]): r["reward"] - mean for r in sampled["responses"]}
        found = {}
        for action in state["actions"]:
            found[tuple(tree["nodes"][action["node"]]["ids"])] = action["adv"]
        assert found == pytest.approx(wanted, abs=1e-6)
        assert state["gap"] == max(rewards) - min(rewards)
        assert state["mean"] == pytest.approx(mean, abs=1e-6)
        differ += len({*rewards}) > 1
        repeated += len(wanted) < len(rewards)
    assert min(differ, repeated) > 3
