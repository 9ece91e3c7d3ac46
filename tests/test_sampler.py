"""The sampler: draws depend on prefix and key alone, and are draws from the model's whole distribution."""

import random

import pytest
import torch
import transformers as hf

import support.sampler
from model import load_lm
from support.cli import UserError
from support.packing import Tree
from support.sampler import Decoder, Prefixes, Row, Sampler, draw_key, draw_tokens, uniforms

MASK = 2**64 - 1


def draw_rows(lm, trees, rows, temperature=1.0, batch=256):
    return Sampler(lm, batch).draw(trees, rows, temperature)


@pytest.fixture(scope="module")
def peaked(folder, tmp_path_factory):
    """A random model that is sure of something at every position, and ends often: it has a dozen EOS ids."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.25, tie_word_embeddings=False,
    )  # fmt: skip
    made = hf.LlamaForCausalLM(config)
    ends = [tokenizer.eos_token_id, *range(20, 32)]
    made.generation_config = hf.GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    path = tmp_path_factory.mktemp("model") / "peaked"
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    lm = load_lm(path, device="cpu")
    assert lm.eos == sorted(ends)
    return lm


@pytest.fixture(scope="module")
def crowd(peaked):
    """Trees of nested prefixes and 150 rows on them, with ragged rooms, some of a single token."""
    rng, size = random.Random(0), peaked.config.vocab_size
    trees = []
    for nodes in (1, 6, 12):
        ids = [[rng.randrange(size) for _ in range(rng.randint(1, 14))] for _ in range(nodes)]
        trees.append(Tree(ids, [-1, *(rng.randrange(v) for v in range(1, nodes))], [True] * nodes))
    rows = []
    for k in range(150):
        t = rng.randrange(3)
        v = rng.randrange(len(trees[t].ids))
        rows.append(Row(t, v, draw_key(7, "test", t, v, k), rng.choice([1, 2, 5, 17, 40])))
    return trees, rows


def joined(tree: Tree, v: int) -> list[int]:
    return (joined(tree, tree.parent[v]) if v else []) + tree.ids[v]


def test_draws_depend_on_prefix_and_key_alone(peaked, crowd):
    trees, rows = crowd
    drawn = draw_rows(peaked, trees, rows)
    assert len({tuple(ids) for ids in drawn}) > 100
    for batch in (1, 16, 33, 64, 1000):  # refilled slots, shrinking batches, all at once
        assert draw_rows(peaked, trees, rows, batch=batch) == drawn, batch
    order = random.Random(1).sample(range(len(rows)), len(rows))
    assert draw_rows(peaked, trees, [rows[i] for i in order], batch=32) == [drawn[i] for i in order]
    for i in range(0, 150, 15):  # alone, and among other neighbours
        assert draw_rows(peaked, trees, [rows[i]]) == [drawn[i]]
        assert draw_rows(peaked, trees, rows[i : i + 20], batch=7) == drawn[i : i + 20]
    assert draw_rows(peaked, trees, []) == []
    # the prefix as a plain prompt of its own: the same
    plain = [Tree([joined(trees[t], v)], [-1], [True]) for t, v, *_ in rows]
    alone = [row._replace(tree=i, node=0) for i, row in enumerate(rows)]
    assert draw_rows(peaked, plain, alone) == drawn
    cut = Sampler(peaked)
    cut.trees, cut.prefixes = trees, Prefixes(peaked, trees, budget=20)  # trees cut into packs
    assert cut.draw(trees, rows) == drawn
    # and level by level, when prefixes are computed once
    once = cut.prefixes
    assert [cut.draw(trees, [row])[0] for row in rows[:20]] == drawn[:20] and cut.prefixes is once


class Replayed:
    """A CUDA graph as the CPU can have one: the same kernels on the tensors of the time of recording."""

    def __init__(self, decoder, width):
        self.decoder, self.width, self.tensors = decoder, width, self.addresses(decoder)

    @staticmethod
    def addresses(decoder):
        tensors = [decoder.cache.keys[0], decoder.cache.values[-1], decoder.ends]
        tensors += vars(decoder.slots).values()
        return [tensor.data_ptr() for tensor in tensors]

    def replay(self):
        assert self.addresses(self.decoder) == self.tensors, "a graph knows the old tensors alone"
        self.decoder.step_of_width(self.width)


def test_replayed_steps_draw_the_same(peaked, crowd, monkeypatch):
    trees, rows = crowd
    drawn, recorded = draw_rows(peaked, trees, rows), []

    def capture(decoder, width):
        recorded.append((decoder.size, width))
        decoder.graphs[width] = Replayed(decoder, width)

    monkeypatch.setattr(Decoder, "capture", capture)
    monkeypatch.setattr(support.sampler, "COLUMNS", 16)
    monkeypatch.setattr(peaked, "may_capture", True)
    for batch in (16, 64, 1000):
        recorded.clear()
        assert draw_rows(peaked, trees, rows, batch=batch) == drawn, batch
        assert len(recorded) == len(set(recorded)) > 2  # several widths, and each recorded once
    assert len({size for size, _ in recorded}) > 1  # and anew for a smaller batch


def test_a_longer_room_only_adds(peaked, crowd):
    trees, rows = crowd
    drawn = draw_rows(peaked, trees, rows)
    longer = draw_rows(peaked, trees, [row._replace(max_new=row.max_new + 9) for row in rows])
    for ids, more in zip(drawn, longer, strict=True):
        assert more[: len(ids)] == ids
        assert (len(more) > len(ids)) == (ids[-1] not in peaked.eos)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_end_at_an_eos_or_at_their_room(peaked, crowd, temperature):
    trees, rows = crowd
    ended = cut = 0
    for batch in (16, 64, 256):
        drawn = draw_rows(peaked, trees, rows, temperature, batch)
        for ids, row in zip(drawn, rows, strict=True):
            assert 1 <= len(ids) <= row.max_new
            assert not set(ids[:-1]) & set(peaked.eos)  # it stopped at the first one
            finished = ids[-1] in peaked.eos  # and kept it
            assert finished or len(ids) == row.max_new
            ended, cut = ended + finished, cut + (not finished)
    assert ended > 50 and cut > 50


def test_different_keys_draw_differently(peaked, crowd):
    trees, _ = crowd
    rows = [Row(1, 0, draw_key(0, k), 12) for k in range(64)]
    first = draw_rows(peaked, trees, rows)
    assert len({tuple(ids) for ids in first}) > 30
    assert draw_rows(peaked, trees, [Row(1, 0, draw_key(1, k), 12) for k in range(64)]) != first
    keys = [
        draw_key(0, "a", "1", 2),
        draw_key(0, "a", 1, 2),
        draw_key(0, "a", 12),
        draw_key(0, "a", 1, 2, 0),
    ]
    assert len(set(keys)) == 4 and all(-(2**63) <= k < 2**63 for k in keys)
    assert draw_key(0, "label", "gsm8k/1", 3, 4) == draw_key(0, "label", "gsm8k/1", 3, 4)


# ---------------------------------------------------------------- against the model


def chi_square_z(counts: dict, chance: dict, n: int) -> float:
    """Normal deviate of Pearson's statistic (Wilson and Hilferty); cells that expect less than 5 are pooled."""
    small = [c for c, p in chance.items() if n * p < 5]
    cells = [(counts.get(c, 0), n * p) for c, p in chance.items() if n * p >= 5]
    rest = n - sum(e for _, e in cells)
    if rest > 1:
        cells.append((sum(counts.get(c, 0) for c in small), rest))
    assert sum(o for o, _ in cells) == n  # nothing was drawn that has no chance
    k = len(cells) - 1
    x = sum((o - e) ** 2 / e for o, e in cells)
    return ((x / k) ** (1 / 3) - (1 - 2 / (9 * k))) / (2 / (9 * k)) ** 0.5


def test_temperature_1_is_the_models_distribution(peaked):
    """First tokens and whole two-token sequences, against softmax of Hugging Face's own logits."""
    prompt, n = [4, 9, 13, 5, 2, 77], 6000
    rows = [Row(0, 0, draw_key(3, "chi", k), 2) for k in range(n)]
    drawn = draw_rows(peaked, [Tree([prompt], [-1], [True])], rows, batch=1000)
    plain = hf.AutoModelForCausalLM.from_pretrained(peaked.path, dtype=torch.float64)
    size = peaked.config.vocab_size
    with torch.no_grad():
        one = plain(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        two = plain(torch.tensor([[*prompt, i] for i in range(size)])).logits[:, -1].softmax(-1)
    first, both, got_first, got_both = {}, {}, {}, {}
    for i in range(size):
        first[i] = one[i].item()
        if i in peaked.eos:
            both[i,] = one[i].item()
        else:
            both.update({(i, j): p for j, p in enumerate((one[i] * two[i]).tolist())})
    for ids in drawn:
        got_first[ids[0]] = got_first.get(ids[0], 0) + 1
        got_both[tuple(ids)] = got_both.get(tuple(ids), 0) + 1
    assert sum(n * p >= 5 for p in both.values()) > 100
    assert abs(chi_square_z(got_first, first, n)) < 3.5
    assert abs(chi_square_z(got_both, both, n)) < 3.5
    # the test has the power to see a temperature of 0.9 and a top-p of 0.95
    cool = (one.log() / 0.9).softmax(-1).tolist()
    assert chi_square_z(got_first, dict(enumerate(cool)), n) > 5


@pytest.mark.parametrize(
    "kind, fields",
    [
        (hf.GraniteConfig, {"logits_scaling": 3.0}),
        (hf.CohereConfig, {"logit_scale": 0.3}),
        (hf.NanoChatConfig, {"final_logit_softcapping": 2.0}),
    ],
)
def test_a_models_own_logit_transform_is_sampled(folder, tmp_path, kind, fields):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = kind(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.25, bos_token_id=None, eos_token_id=0, pad_token_id=0, **fields,
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm, prompt = load_lm(tmp_path, device="cpu"), [4, 9, 13, 5]
    keys = [draw_key(5, k) for k in range(300)]
    drawn = draw_rows(lm, [Tree([prompt], [-1], [True])], [Row(0, 0, k, 2) for k in keys])
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same = total = 0
    for ids, key in zip(drawn, keys, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
        where = torch.arange(len(ids))
        want = draw_tokens(logits, torch.tensor(key).expand(len(ids)), where, 1.0).tolist()
        same, total = same + sum(a == b for a, b in zip(want, ids)), total + len(ids)
    assert same >= 0.995 * total  # a draw may sit on the very edge of a token


def test_draw_tokens_is_the_inverse_cdf():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]]).log_softmax(-1)
    key, position = torch.arange(4000) * 977, torch.zeros(4000, dtype=torch.long)
    drawn = draw_tokens(logits.expand(4000, -1), key, position, 1.0)
    cdf = logits[0].double().exp().cumsum(0)
    for u, token in zip(uniforms(key, position).tolist(), drawn.tolist()):
        assert token in (0, 2, 3)  # never a token of probability 0
        assert (cdf[token - 1] if token else 0) - 1e-6 <= u <= cdf[token] + 1e-6
    sharp = draw_tokens(logits.expand(4000, -1), key, position, 0.25)
    assert (sharp == 3).float().mean().item() == pytest.approx(
        (logits / 0.25).softmax(-1)[0, 3].item(), abs=0.02
    )


def test_greedy_equals_hugging_face(peaked, crowd):
    trees, _ = crowd
    states = [(t, v) for t, tree in enumerate(trees) for v in range(len(tree.ids))]
    mine = draw_rows(peaked, trees, [Row(t, v, 0, 30) for t, v in states], 0.0)
    plain = hf.AutoModelForCausalLM.from_pretrained(peaked.path, dtype=torch.float32)
    for (t, v), ids in zip(states, mine, strict=True):
        prompt = torch.tensor([joined(trees[t], v)])
        out = plain.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30
        )
        assert out[0, prompt.shape[1] :].tolist() == ids
    assert len({len(ids) for ids in mine}) > 3  # some end early


# ---------------------------------------------------------------- uniforms


def splitmix64(key: int, position: int) -> float:
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 12) / 2**52


def test_uniforms_equal_splitmix64(rng):
    keys = [0, 1, -1, 2**63 - 1, -(2**63), *(rng.randrange(-(2**63), 2**63) for _ in range(200))]
    where = [rng.choice([0, 1, 2, 999, 10**6]) for _ in keys]
    got = uniforms(torch.tensor(keys), torch.tensor(where))
    assert got.dtype is torch.float64
    assert got.tolist() == [splitmix64(k, p) for k, p in zip(keys, where)]


@pytest.mark.parametrize(
    "key, position",
    [
        (torch.arange(20_000), torch.tensor(5)),  # neighbouring keys
        (torch.tensor([draw_key("u", k) for k in range(20_000)]), torch.tensor(0)),
        (torch.tensor(draw_key("one row")), torch.arange(20_000)),  # along one row
    ],
)
def test_uniforms_are_uniform(key, position):
    u = uniforms(*torch.broadcast_tensors(key, position))
    assert 0 <= u.min() and u.max() < 1
    counts = dict(enumerate(torch.bincount((u * 64).long(), minlength=64).tolist()))
    assert abs(chi_square_z(counts, dict.fromkeys(range(64), 1 / 64), len(u))) < 3.5
    pairs = (u[:-1] * 8).long() * 8 + (
        u[1:] * 8
    ).long()  # and neighbours know nothing of each other
    counts = dict(enumerate(torch.bincount(pairs, minlength=64).tolist()))
    assert abs(chi_square_z(counts, dict.fromkeys(range(64), 1 / 64), len(pairs))) < 3.5


# ---------------------------------------------------------------- the context


def test_more_than_the_context_is_refused(peaked):
    assert peaked.max_length == 128
    tree = Tree([[5] * 100, [6] * 20], [-1, 0], [True, True])
    fits = draw_rows(peaked, [tree], [Row(0, 1, 1, 8), Row(0, 0, 1, 28)])
    assert len(fits[0]) <= 8 and len(fits[1]) <= 28
    for row in [Row(0, 1, 1, 9), Row(0, 0, 1, 29)]:
        with pytest.raises(UserError, match=r"129.*128"):
            draw_rows(peaked, [tree], [Row(0, 0, 1, 2), row])


def test_a_prompt_longer_than_learned_positions_is_refused(folder, tmp_path):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    made = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(tokenizer), **sizes, **ends))
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm, tree = load_lm(tmp_path, device="cpu"), Tree([[5] * 100], [-1], [True])
    with pytest.raises(UserError, match=r"100.*64"):
        draw_rows(lm, [tree], [Row(0, 0, 1, 4)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_no_number_is_refused(peaked, temperature, monkeypatch):
    broken = lambda hidden: torch.full((len(hidden), peaked.config.vocab_size), torch.nan)
    monkeypatch.setattr(peaked, "logits", broken)
    with pytest.raises(UserError, match="is NaN"):
        draw_rows(peaked, [Tree([[5, 6]], [-1], [True])], [Row(0, 0, 1, 4)], temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_so_is_one_in_the_middle_of_a_response(peaked, temperature, monkeypatch):
    usual, calls = peaked.logits, []

    def later(hidden):
        calls.append(hidden)
        logits = usual(hidden)
        return logits if len(calls) < 2 else torch.full_like(logits, torch.nan)

    monkeypatch.setattr(peaked, "logits", later)
    monkeypatch.setattr(peaked, "eos", [len(peaked.head)])  # no row ends before
    with pytest.raises(UserError, match="is NaN"):
        draw_rows(peaked, [Tree([[5, 6]], [-1], [True])], [Row(0, 0, 1, 4)], temperature)
    assert len(calls) == 2
