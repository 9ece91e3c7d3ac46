"""Every kernel against its slow, obvious twin: float64, loops, one forward a pair, Hugging Face's own attention."""

import functools
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

import model
import support.attention
import support.distributed
import support.memory
import support.packing
import support.sampler
import support.stats
import train_actor
import train_critic
from model import linear_logprobs, load_lm, step_advantages, step_logprobs, step_values
from support.architectures import checkpoint_layers
from support.attention import TreeView, pack_hidden
from support.cli import UserError
from support.packing import BLOCK, Tree, pack_trees
from train_critic import load_critic

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.15, "attention_dropout": 0.0,
}  # fmt: skip
MODELS = {
    "llama, GQA, tied": (hf.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, MHA, untied": (
        hf.LlamaConfig,
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "qwen2, MQA, biases": (
        hf.Qwen2Config,
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    "granite, scaled logits": (hf.GraniteConfig, {"num_key_value_heads": 2, "logits_scaling": 4.0}),
    "cohere, scaled logits": (hf.CohereConfig, {"num_key_value_heads": 2, "logit_scale": 0.25}),
    "nanochat, soft-capped logits": (
        hf.NanoChatConfig,
        {"num_key_value_heads": 2, "final_logit_softcapping": 2.0},
    ),
}


@pytest.fixture(scope="session")
def build(folder, tmp_path_factory):
    """(config class, fields) -> folder of a random model with the embedded tokenizer."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)

    def make(kind, fields, sizes=SIZES):
        eos = tokenizer.eos_token_id
        special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
        torch.manual_seed(0)
        config = kind(vocab_size=len(tokenizer), **{**sizes, **special, **fields})
        made = hf.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # biases and norms start as zeros and ones, which would hide them
            for p in made.parameters():
                if p.dim() == 1:
                    p.add_(0.1 * torch.randn_like(p))
        path = tmp_path_factory.mktemp("model") / "m"
        made.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def models(build):
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(*MODELS[name])
        return made[name]

    return get


def random_tree(rng, nodes: int, longest: int, vocabulary: int, score_root=False) -> Tree:
    ids = [
        [rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(nodes)
    ]
    parent = [-1] + [rng.randrange(max(0, v - 4), v) for v in range(1, nodes)]
    return Tree(ids, parent, [score_root] + [rng.random() < 0.7 for _ in range(nodes - 1)])


def forest(vocabulary: int) -> list[Tree]:
    """Ragged: a bare prompt, a one-token tree, a chain, bushes; the largest spans several blocks of queries."""
    rng = random.Random(1)
    trees = [random_tree(rng, n, 24, vocabulary, n % 2 == 1) for n in (1, 9, 4, 16)]
    return [*trees, Tree([[3], [4], [5]], [-1, 0, 0], [False, True, True])]


def path(tree: Tree, v: int) -> tuple[list[int], int]:
    """Token ids from the prompt to the end of node v, and where v's own begin."""
    before = []
    while tree.parent[v] >= 0:
        v_ids, v = tree.ids[v], tree.parent[v]
        before = [v_ids, *before]
    whole = [tree.ids[v], *before]
    return [i for ids in whole for i in ids], sum(map(len, whole[:-1]))


def slow(folder, trees, head=None):
    """{(tree, node): log-prob of the step, or value logit}, one plain forward a pair in float64; and the model."""
    plain = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    plain.eval()
    out = {}
    for t, tree in enumerate(trees):
        for v in range(len(tree.ids)):
            if not tree.score[v]:
                continue
            ids, first = path(tree, v)
            ids = torch.tensor(ids)
            if head is None:
                logp = plain(ids[None]).logits[0].double().log_softmax(-1)
                terms = [logp[i - 1, ids[i]] for i in range(max(first, 1), len(ids))]
                out[t, v] = sum(terms, torch.zeros((), dtype=torch.float64))
            else:
                out[t, v] = head(plain.base_model(ids[None]).last_hidden_state[0, -1])[0]
    return out, plain


def weigh(keys) -> dict:
    rng = random.Random(2)
    return {k: rng.uniform(-1, 1) for k in sorted(keys)}


def gradients(module) -> dict[str, torch.Tensor]:
    none = {n for n, p in module.named_parameters() if p.grad is None}
    assert not none - {"value"}, none
    return {n: p.grad.double().clone() for n, p in module.named_parameters()}


def same_gradients(mine: dict, wanted: dict, bound=1e-5):
    """To `bound` of the largest entry of all; a parameter's own largest entry decides what is small for it."""
    assert mine.keys() == wanted.keys()
    top = max(float(g.abs().max()) for g in wanted.values())
    for name, want in wanted.items():
        error, scale = float((mine[name] - want).abs().max()), float(want.abs().max())
        assert error <= bound * max(scale, 0.1 * top), f"{name}: {error:.2e} of {scale:.2e}"


LAYOUTS = [(10_000, 1), (10_000, BLOCK), (90, 1), (90, BLOCK), (30, 1), (250, BLOCK)]


@pytest.mark.parametrize("name", MODELS)
def test_packed_logprobs_equal_one_forward_a_pair(models, name):
    lm = load_lm(models(name), train=True, device="cpu")
    trees = forest(lm.config.vocab_size)
    wanted, plain = slow(models(name), trees)
    weight = weigh(wanted)
    sum(weight[k] * x for k, x in wanted.items()).backward()
    for budget, align in LAYOUTS if name.startswith("llama") else LAYOUTS[:1] + LAYOUTS[3:4]:
        packs = pack_trees(trees, budget, align)
        assert budget > 100 or len(packs) > len(trees)
        lm.model.zero_grad()
        got = {}
        for pack in packs:
            logp = step_logprobs(lm, pack)
            assert logp.dtype is torch.float32 and logp.shape == (len(pack.owner),)
            got.update(zip(pack.owner, logp.tolist(), strict=True))
            (logp * torch.tensor([weight[k] for k in pack.owner])).sum().backward()
        assert sum(len(p.owner) for p in packs) == len(got) == len(wanted)  # each pair once
        for key, want in wanted.items():
            assert got[key] == pytest.approx(want.item(), rel=1e-5, abs=1e-5), (budget, align, key)
        same_gradients(gradients(lm.model), gradients(plain))


def test_the_worked_example_of_a_pack():
    """_pack's docstring: a prompt of two tokens and two children of one token each."""
    (pack,) = pack_trees([Tree([[7, 8], [5], [6]], [-1, 0, 0], [False, True, True])], 99)
    table = (pack.ids, pack.pos, pack.end, pack.prev)
    assert [column[:4].tolist() for column in table] == [
        [7, 8, 5, 6], [0, 1, 2, 2], [4, 4, 3, 4], [-1, 0, 1, 1]]  # fmt: skip
    assert pack.owner == [(0, 1), (0, 2)] and pack.last.tolist() == [2, 3]


# ---------------------------------------------------------------- what CUDA would run, held on the CPU


def as_if_on_cuda(monkeypatch, cuda=True):
    """The one seam between the two devices' forms. What CUDA compiles is traced, and then run by
    plain operators."""
    for module in (model, support.attention):
        monkeypatch.setattr(module, "on_cuda", lambda x: cuda)
    traced = functools.partial(torch.compile, backend="aot_eager", dynamic=True)
    monkeypatch.setattr(model, "_one_kernel", traced)


@pytest.fixture
def flex(monkeypatch):
    """The real flex_attention, forward and backward, traced by aot_autograd as on CUDA and then run
    by plain operators. -> counters of compilations: of attention, of block masks."""
    torch._dynamo.reset()
    counters = [CompileCounterWithBackend("aot_eager") for _ in range(2)]
    compiling = functools.partial(torch.compile, dynamic=True)
    compiled = [
        compiling(flex_attention.flex_attention, backend=counters[0], fullgraph=True),
        compiling(flex_attention.create_block_mask, backend=counters[1]),
    ]
    # It refuses gradients on the CPU, for which nobody has compiled it.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(support.attention, "_flex", lambda: compiled)
    yield counters
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flex_attention_s_gradients_are_the_gathered_form_s(models, flex, dtype):
    """A whole training step, layers checkpointed, as on CUDA; it costs two compilations: with
    gradients and without."""
    trees, found = forest(40), []
    for fused in (False, True):
        lm = load_lm(models("llama, GQA, tied"), train=True, device="cpu", dtype=dtype)
        checkpoint_layers(lm.model)
        lm.flex = fused and support.attention.flex_agrees(lm, support.attention.layer_shapes(lm))
        assert lm.flex is fused
        packs = pack_trees(trees, 250)
        with torch.no_grad():
            before = [step_logprobs(lm, pack) for pack in packs]
        logp = [step_logprobs(lm, pack) for pack in packs]
        assert all(torch.equal(a, b) for a, b in zip(before, logp))  # so is the ratio at step 0
        (0.01 * torch.cat(logp)).square().sum().backward()
        found.append((torch.cat(logp).detach(), gradients(lm.model)))
    (logp, grads), (fused_logp, fused_grads) = found
    loose = dtype == "bfloat16"
    torch.testing.assert_close(fused_logp, logp, rtol=1e-2 if loose else 1e-5, atol=1e-3)
    same_gradients(fused_grads, grads, bound=5e-2 if loose else 1e-5)
    assert max(counter.frame_count for counter in flex) <= 3  # the first may count as two frames


@pytest.mark.slow
def test_twelve_sizes_compile_twice_at_most(flex):
    """Once with gradients and once without, under autocast or not, whatever lies in memory how.
    Past torch's limit of 8 it would be an error, hours into a run."""
    counts = set()
    for autocast in (False, True):
        for needed in (False, True):
            for size in range(64, 64 * 13, 64):
                one = support.attention.padded(
                    pack_trees([Tree([[5] * size], [-1], [True])], size)[0]
                )
                mask = support.attention._block_mask(*one)
                query = torch.randn(1, size, 4, 16).transpose(1, 2).requires_grad_(needed)
                key, value = torch.randn(2, 1, 2, size, 16)
                with torch.autocast("cpu", enabled=autocast), torch.set_grad_enabled(needed):
                    out = support.attention.flex_tree_attention(query, key, value, mask, 0.25)
                assert out.shape == query.shape
                counts.add(tuple(counter.frame_count for counter in flex))
    # The very first compilation may count as two frames; no size and no autocast adds one.
    assert len(counts) <= 2 and max(counts) <= (3, 1), counts


def test_no_query_is_under_128_tokens_and_the_kernel_is_named(models, flex, monkeypatch):
    """Shorter ones would go to flex_decoding, which has no kernel for some numbers of heads."""
    calls = []

    def spy(query, key, value, **flags):
        calls.append(query.shape[2])
        assert query.shape[2] == key.shape[2] == value.shape[2] and query.shape[2] % 128 == 0
        assert query.dtype == key.dtype == value.dtype
        assert flags["kernel_options"] == {"FORCE_USE_FLEX_ATTENTION": True}
        return torch.zeros_like(query)

    _, create = support.attention._flex()
    monkeypatch.setattr(support.attention, "_flex", lambda: (spy, create))
    lm = load_lm(models("llama, GQA, tied"), device="cpu")
    for pack in pack_trees(forest(lm.config.vocab_size), 64):
        pack_hidden(lm, pack, TreeView(pack, "cpu", flex=True))
    assert calls and min(calls) == 256


def test_flex_casts_what_rotary_positions_leave_in_float32(monkeypatch):
    seen = []

    def spy(query, key, value, **_):
        seen.append((query.dtype, key.dtype, value.dtype))
        return query

    monkeypatch.setattr(support.attention, "_flex", lambda: (spy, None))
    query, key = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
    out = support.attention.flex_tree_attention(query, key, key.bfloat16(), None, 1.0)
    assert seen == [(torch.bfloat16,) * 3] and out.shape == query.shape


def dense(query, key, value, block_mask, scale, score_mod=None, return_aux=None, **_):
    """A stand-in for flex_attention that has a backward pass on the CPU."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if score_mod is not None:
        scores = score_mod(scores, 0, 0, 0, 0)
    scores = scores.masked_fill(~block_mask, -torch.inf)
    out = scores.softmax(-1) @ value
    return out if return_aux is None else (out, SimpleNamespace(lse=scores.logsumexp(-1)))


def dense_mask(rule, b, h, rows, columns, device):
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    return rule(0, 0, i, j)


def test_flex_is_used_only_where_it_agrees(models, monkeypatch, capsys):
    lm = load_lm(models("llama, GQA, tied"), device="cpu")

    def everyone(rule, b, h, rows, columns, device):
        return torch.ones(rows, columns, dtype=torch.bool).tril()

    def no_kernel(*_, **__):
        raise RuntimeError("NoValidChoicesError: no choices to select\nmore lines")

    def backward_is_wrong(query, key, value, **flags):
        return dense(query, key, value.detach() * 0.5 + value * 0.5, **flags)

    monkeypatch.setattr(support.attention, "_flex", lambda: (dense, dense_mask))
    shapes = support.attention.layer_shapes(lm)
    assert support.attention.flex_agrees(lm, shapes) and capsys.readouterr().err == ""
    for pair in ((dense, everyone), (no_kernel, dense_mask), (backward_is_wrong, dense_mask)):
        monkeypatch.setattr(support.attention, "_flex", lambda pair=pair: pair)
        assert not support.attention.flex_agrees(lm, shapes)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"warning: {lm.path}: flex_attention is not used, a slower and larger form is ("
        )


def window(row, head, i, j):
    """As transformers writes it."""
    return (j > i - 70) & (j <= i)


# (query heads, key/value heads, size of a key, of a value, soft-cap, sinks, mask), as `layer_shapes` has them.
SHAPES = [(4, 2, 16, 16, 1.5, False, window), (4, 4, 16, 8, None, True, None)]


def test_both_forms_of_windows_soft_caps_and_sinks_agree(monkeypatch, capsys):
    """Each switched off in one form only is noticed."""
    lm = SimpleNamespace(in_bfloat16=False, device="cpu", path="M")
    monkeypatch.setattr(support.attention, "_flex", lambda: (dense, dense_mask))
    assert support.attention.flex_agrees(lm, SHAPES) and capsys.readouterr().err == ""

    def without(name, instead):
        def attention(*inputs, **flags):
            return dense(*inputs, **{k: instead if k == name else x for k, x in flags.items()})

        return attention, dense_mask

    for wrong in (without("score_mod", None), without("block_mask", torch.ones(1).bool())):
        monkeypatch.setattr(support.attention, "_flex", lambda wrong=wrong: wrong)
        assert not support.attention.flex_agrees(lm, SHAPES)
    monkeypatch.setattr(support.attention, "_flex", lambda: (dense, dense_mask))
    monkeypatch.setattr(torch, "sigmoid", torch.ones_like)  # no sink
    assert not support.attention.flex_agrees(lm, SHAPES)


@pytest.mark.slow
def test_the_real_flex_takes_windows_soft_caps_and_sinks(flex):
    from transformers.masking_utils import sliding_window_causal_mask_function as sliding

    shapes = [(4, 2, 16, 16, 1.5, False, sliding(70)), SHAPES[1]]
    lm = SimpleNamespace(in_bfloat16=False, device="cpu", path="M")
    assert support.attention.flex_agrees(lm, shapes)


def test_a_head_of_its_own_stays_so_whatever_the_config_says(models, tmp_path):
    """In other processes a model is built by its config, and a saved one is read by it."""
    plain = hf.AutoModelForCausalLM.from_pretrained(models("llama, GQA, tied"))
    weights = {k: x.clone() for k, x in plain.state_dict().items()}
    weights["lm_head.weight"] += 1
    shutil.copytree(models("llama, GQA, tied"), tmp_path / "m")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    lm = load_lm(tmp_path / "m", device="cpu")
    assert not lm.config.tie_word_embeddings
    lm.save(tmp_path / "saved")
    again = load_lm(tmp_path / "saved", device="cpu")
    assert torch.equal(again.head, weights["lm_head.weight"])
    assert load_lm(models("llama, GQA, tied"), device="cpu").config.tie_word_embeddings


def test_flex_is_tried_by_the_first_pack_and_not_by_the_sampler(models, monkeypatch):
    asked = []
    monkeypatch.setattr(support.attention, "flex_agrees", lambda lm, _: bool(asked.append(lm)))
    lm = load_lm(models("llama, GQA, tied"), device="cpu")
    lm.flex = None  # as on CUDA
    tree = Tree([[5, 6, 7]], [-1], [True])
    support.sampler.Sampler(lm).draw([tree], [support.sampler.Row(0, 0, 1, 4)])
    assert asked == []
    for _ in range(2):
        step_values(lm, torch.nn.Linear(lm.config.hidden_size, 1), *pack_trees([tree], 99))
    assert asked == [lm]


def test_flex_unfused_is_an_error(monkeypatch):
    """Past torch's limit of recompilations, in whatever thread: what `_flex` asks for (fullgraph)
    is an error there, and without it the function would run operator by operator."""
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda f, **flags: asked.setdefault(f.__name__, flags))
    support.attention._flex.__wrapped__()
    monkeypatch.undo()
    assert asked["flex_attention"] == {"dynamic": True, "fullgraph": True}
    torch._dynamo.reset()
    add = torch.compile(lambda x, a: x + len(a), backend="eager", **asked["flex_attention"])
    limit = pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit)
    with ThreadPoolExecutor(1) as thread, limit:
        for i in range(20):  # a text is a constant: each is compiled anew
            thread.submit(add, torch.zeros(1), "a" * i).result()
    torch._dynamo.reset()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cuda_s_products_take_bfloat16_and_give_float32(monkeypatch, softcap):
    """bfloat16 in, float32 out: everything around torch.mm must feed it so, forward and backward."""
    calls = []

    def strict(a, b, out_dtype):  # torch.mm has no out_dtype on the CPU, but on meta
        assert a.dtype is b.dtype is torch.bfloat16
        calls.append(multiply(a.to("meta"), b.to("meta"), out_dtype=out_dtype))
        product = a.float() @ b.float()
        assert calls[-1].dtype is product.dtype is torch.float32
        assert calls[-1].shape == product.shape
        return product

    multiply = torch.mm
    torch.manual_seed(0)
    hidden = torch.randn(70, 16).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(90, 16)).bfloat16().requires_grad_()
    targets = torch.randint(0, 90, (70,))
    found = []
    for cuda in (False, True):
        if cuda:
            as_if_on_cuda(monkeypatch)
            monkeypatch.setattr(torch, "mm", strict)
            monkeypatch.setattr(model, "_largest_block", lambda x: (32, 40))
        logp = linear_logprobs(hidden, weight, targets, 0.7, softcap)
        found.append([logp, *torch.autograd.grad(logp.square().mean(), [hidden, weight])])
    assert len(calls) == 3 * 3 * 4
    for cpu, cuda in zip(*found):
        assert cpu.dtype is cuda.dtype
        torch.testing.assert_close(cuda, cpu, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.7, 2.0)])
def test_compiled_log_probs_are_the_cpu_s(monkeypatch, scale, softcap):
    """Twelve sizes of a last block cost few compilations; past torch's limit of 8 it is an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    traced = {}

    def one_kernel(function):
        if function not in traced:
            traced[function] = torch.compile(function, backend=counter, dynamic=True)
        return traced[function]

    for n in range(1, 13):
        hidden, weight, targets = head_inputs(n, 6, 3 * n + 1, torch.float32)
        found = []
        for cuda in (False, True):
            as_if_on_cuda(monkeypatch, cuda)
            monkeypatch.setattr(model, "_one_kernel", one_kernel)
            monkeypatch.setattr(model, "_largest_block", lambda x: (5, 7))
            logp = linear_logprobs(hidden, weight, targets, scale, softcap)
            found.append([logp, *torch.autograd.grad(logp.square().sum(), [hidden, weight])])
        for cpu, compiled in zip(*found):
            torch.testing.assert_close(compiled, cpu)
    assert len(traced) == 2 and 2 <= counter.frame_count <= 8
    torch._dynamo.reset()


def test_log_probs_where_torch_cannot_compile(monkeypatch, capsys):
    def fails(graph, inputs):
        raise RuntimeError("no compiler")

    compiling = functools.partial(torch.compile, backend=fails)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiling(function))
    run = model._one_kernel.__wrapped__(model._softmax_times)
    z = torch.tensor([[1.0, 3.0]])
    for _ in range(2):
        half = run(z, z.logsumexp(-1), torch.tensor([[0.5]]), torch.float32)
        torch.testing.assert_close(half, 0.5 * z.softmax(-1))
    torch._dynamo.reset()
    assert capsys.readouterr().err.count("warning: log-probs are slower") == 1


@torch.no_grad()
@pytest.mark.parametrize("heads, groups", [(6, 2), (4, 4), (8, 1)])
def test_a_decoded_token_by_the_fused_kernel_is_the_cpu_s(monkeypatch, heads, groups):
    """CacheView's way on CUDA (a group's heads as queries, explicit mask, widths in eights) against
    the CPU's, which test_sampler.py holds against Hugging Face's."""
    fused = torch.nn.functional.scaled_dot_product_attention

    def strict(query, key, value, attn_mask, scale):
        rows, width = key.shape[0], key.shape[2]
        assert query.shape == (rows, groups, heads // groups, 8) and width % 8 == 0
        assert attn_mask.shape == (rows, 1, heads // groups, width)
        return fused(query, key, value, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", strict)
    torch.manual_seed(0)
    query, key, value = [torch.randn(5, n, 1, 8) for n in (heads, groups, groups)]
    length = torch.tensor([3, 9, 0, 12, 7])
    kept = [torch.zeros(groups, 9, 8)]
    cache = support.attention.CacheView(kept, kept, 5, 16, [None])
    cache.keys[0].normal_()
    cache.values[0].normal_()
    want = cache.at(length, 13).of_kind(None)(0, query, key, value, 0.4, None, None)
    as_if_on_cuda(monkeypatch)
    got = cache.at(length, 13).of_kind(None)(0, query, key, value, 0.4, None, None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_scores_are_float32_on_cuda(monkeypatch):
    """Under autocast too: scores of 40 rounded to bfloat16 are off by 0.1."""
    torch.manual_seed(0)
    query, key, value = (6 * torch.randn(3, 1, 2, 9, 16)).bfloat16()
    bias = torch.zeros(1, 1, 9, 9)
    exact = support.attention.grouped_attention(
        query.double(), key.double(), value.double(), bias.double(), 0.25
    )
    errors = []
    for cuda in (False, True):
        as_if_on_cuda(monkeypatch, cuda)
        with torch.autocast("cpu", torch.bfloat16):
            out = support.attention.grouped_attention(query, key, value, bias, 0.25)
        errors.append(float((out.double() - exact).abs().mean()))
    assert errors[1] < 0.5 * errors[0], errors


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_forms_of_cuda_draw_and_score_as_the_cpu_s(models, name, monkeypatch):
    """Every branch of model.py for CUDA at once, but flex_attention and the products in bfloat16."""
    lm = load_lm(models(name), device="cpu")
    trees = [tree._replace(score=[True] * len(tree.ids)) for tree in forest(40)[:4]]
    rows = []
    for t, tree in enumerate(trees):
        rows += [support.sampler.Row(t, v, 100 * t + v, 12) for v in range(len(tree.ids))]
    found = []
    for cuda in (False, True):
        as_if_on_cuda(monkeypatch, cuda)
        logp = torch.cat([step_logprobs(lm, pack) for pack in pack_trees(trees, 250)])
        found.append((logp, support.sampler.Sampler(lm).draw(trees, rows)))
    (logp, drawn), (cuda_logp, cuda_drawn) = found
    torch.testing.assert_close(cuda_logp, logp, rtol=1e-5, atol=1e-4)
    same = sum(a == b for a, b in zip(drawn, cuda_drawn))
    assert same >= 0.98 * len(rows)  # a draw may lie within a rounding of the border of a token


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["llama, GQA, tied", "qwen2, MQA, biases"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_layers_have_the_same_gradients_to_the_last_bit(models, name, dtype):
    trees, found, saved = forest(40), [], []
    for checkpointed in (False, True):
        lm = load_lm(models(name), train=True, device="cpu", dtype=dtype)
        if checkpointed:
            checkpoint_layers(lm.model)
        size = [0]

        def count(x, size=size):
            size[0] += x.numel()
            return x

        for pack in pack_trees(trees, 250):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                loss = step_logprobs(lm, pack).square().mean()
            loss.backward()
        found.append({n: p.grad for n, p in lm.model.named_parameters()})
        saved.append(size[0])
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert saved[1] < 0.7 * saved[0]  # so it is really done


@pytest.mark.parametrize("name", ["llama, GQA, tied", "qwen2, MQA, biases"])
def test_packed_values_equal_one_forward_a_state(models, name):
    lm, head = load_critic(models(name), train=True, new=True)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(head.bias, 0.3)
    twin = torch.nn.Linear(lm.config.hidden_size, 1).double()
    twin.load_state_dict(head.state_dict())
    trees = forest(lm.config.vocab_size)
    wanted, plain = slow(models(name), trees, twin)
    weight = weigh(wanted)
    sum(weight[k] * x for k, x in wanted.items()).backward()
    for budget, align in LAYOUTS:
        lm.model.zero_grad()
        head.zero_grad()
        seen = 0
        for pack in pack_trees(trees, budget, align):
            value = step_values(lm, head, pack)
            seen += len(value)
            for key, x in zip(pack.owner, value.tolist(), strict=True):
                assert x == pytest.approx(wanted[key].item(), rel=1e-5, abs=1e-5)
            (value * torch.tensor([weight[k] for k in pack.owner])).sum().backward()
        assert seen == len(wanted)
        same_gradients(gradients(head), gradients(twin))
        same_gradients(gradients(lm.decoder), gradients(plain.base_model))


def test_a_new_critic_s_head_is_zeros_and_a_model_without_one_is_no_critic(folder):
    with pytest.raises(UserError, match=r"no value_head\.safetensors"):
        load_critic(folder)
    lm, head = load_critic(folder, new=True)
    pack, *_ = pack_trees([Tree([[3, 4], [5]], [-1, 0], [True, True])], 99)
    assert step_values(lm, head, pack).tolist() == [0.0, 0.0]  # V = .5 everywhere: no opinion


@pytest.mark.parametrize(
    "budget, align", [(10_000, 1), (10_000, BLOCK), (60, 1), (60, BLOCK), (1, 1)]
)
def test_end_is_the_ancestor_relation(budget, align):
    rng = random.Random(3)
    trees = [random_tree(rng, rng.randint(1, 9), 7, 50, rng.random() < 0.5) for _ in range(12)]
    packs = pack_trees(trees, budget, align)
    seen = []
    for pack in packs:
        n, (ids, pos, end, prev) = len(pack.ids), (x.tolist() for x in pack[:4])
        for i in range(n):  # brute force: follow the tree upwards from each token
            chain, j = [i], prev[i]
            while j >= 0:
                chain, j = [j, *chain], prev[j]
            assert [j for j in range(n) if j <= i < end[j]] == chain
            assert pos[i] == len(chain) - 1
            k = int(pack.node[i])
            if k >= 0 and i == int(pack.last[k]):
                t, v = pack.owner[k]
                assert [ids[j] for j in chain] == path(trees[t], v)[0]
                assert int((pack.node == k).sum()) == len(trees[t].ids[v])
                seen.append((t, v))
        assert n % BLOCK == 0
        if align > 1:  # each tree starts a block
            starts = [i for i in range(n) if prev[i] < 0 and i + 1 < n and prev[i + 1] == i]
            assert all(i % align == 0 for i in starts)
    assert sorted(seen) == [
        (t, v) for t, tree in enumerate(trees) for v, s in enumerate(tree.score) if s
    ]
    longest = max(len(path(tree, v)[0]) for tree in trees for v in range(len(tree.ids)))
    assert all(int((p.prev >= 0).sum()) < max(budget, longest) for p in packs)


# ---------------------------------------------------------------- exactness and bookkeeping of training


def pairs_record(tree: Tree, rng) -> tuple[dict, dict]:
    """A line of trees.jsonl and its line of advantages.jsonl, every step of the tree a pair."""
    nodes = [{"parent": p, "ids": ids if p >= 0 else [], "text": "", "reward": None, "draws": 1, "n": 1 + v % 3,
              "wins": v % 2, "labelled": True} for v, (p, ids) in enumerate(zip(tree.parent, tree.ids))]  # fmt: skip
    states = {}
    for v, p in enumerate(tree.parent):
        if p >= 0:
            states.setdefault(p, []).append({"node": v, "q": 0.5, "adv": rng.uniform(-0.5, 0.5)})
    states = [{"node": p, "mean": 0.5, "gap": 1.0, "actions": a} for p, a in states.items()]
    record = {"id": str(rng.random()), "prompt_ids": tree.ids[0], "nodes": nodes}
    return record, {"id": record["id"], "states": states}


@pytest.fixture
def actor_job(models):
    """The actor, eight problems with their pairs, and what train_actor hands to the training loop."""
    rng = random.Random(5)
    lm = load_lm(models("llama, MHA, untied"), train=True, device="cpu")
    sizes = [2, 3, 5, 9, 14, 4, 2, 7]  # the smallest packs hold fewer than 16 scored tokens
    both = [pairs_record(random_tree(rng, n, 2 * n, lm.config.vocab_size), rng) for n in sizes]
    records, lines = [r for r, _ in both], [x for _, x in both]
    train_actor.reference_logprobs(lm, records, lines, 4096)

    def job(monkeypatch, budget):
        caught = {}

        def catch(modules, batches, prepare, loss, *rest, **more):
            caught.update(batches=batches, prepare=prepare, loss=loss)

        monkeypatch.setattr(train_actor, "fit", catch)
        s = train_actor.Settings("a", "t", "o", beta=0.5, batch=10_000, budget=budget)
        train_actor.train(lm, records, lines, s, None)
        return caught

    return lm, records, lines, job


def logp_refs(lines) -> list[torch.Tensor]:
    refs = [[a["logp_ref"] for state in x["states"] for a in state["actions"]] for x in lines]
    return [torch.tensor(r) for r in refs]


def test_log_ratio_is_exactly_0_at_step_0(actor_job, monkeypatch):
    lm, records, lines, job = actor_job
    whole = job(monkeypatch, 4096)
    batches = [[i] for i in range(8)] + [[7, 0], [6, 1, 2], [3, 4, 5], list(range(8))]
    for batch in batches:  # the reference was scored with all problems side by side
        for pack, numbers in whole["prepare"](batch):
            assert torch.equal(step_logprobs(lm, pack).detach(), numbers[1]), batch
    before = logp_refs(lines)
    for record, line in zip(records, lines):
        train_actor.reference_logprobs(lm, [record], [line], 4096)
    assert all(torch.equal(a, b) for a, b in zip(before, logp_refs(lines)))


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_batch_8x1_equals_1x8(actor_job, models, monkeypatch, in_float64):
    """However many packs a batch is cut into, the gradient is that of the mean over its pairs. In
    float64 (but for Hugging Face's norms, which are float32 inside), since the terms of the sum
    cancel, and float32's rounding of them depends on the number of threads."""
    lm, records, lines, job = actor_job
    lm.model.double()
    for line in lines:  # away from step 0
        for state in line["states"]:
            for a in state["actions"]:
                a["logp_ref"] += a["adv"]
    got = {}
    for budget in (8192, 64):
        work = job(monkeypatch, budget)
        (batch,) = work["batches"]
        assert sorted(batch) == list(range(8))
        packs = work["prepare"](batch)
        assert len(packs) == 1 if budget == 8192 else len(packs) >= 8
        lm.model.zero_grad()
        shares = [work["loss"](*arguments)[0] for arguments in packs]
        for share in shares:
            share.backward()
        got[budget] = sum(shares).item(), gradients(lm.model)
    trees = [train_actor.pair_tree(r, x) for r, x in zip(records, lines)]
    logp, plain = slow(models("llama, MHA, untied"), trees)
    terms = [
        0.5 * (a["adv"] / 0.5 - (logp[t, a["node"]] - a["logp_ref"])) ** 2
        for t, line in enumerate(lines) for state in line["states"] for a in state["actions"]
    ]  # fmt: skip
    assert len(terms) == len(logp)
    mean = sum(terms) / len(terms)
    mean.backward()
    for loss, grads in got.values():
        assert loss == pytest.approx(mean.item(), rel=1e-6)
        same_gradients(grads, gradients(plain), bound=2e-6)


@pytest.mark.parametrize("token_share", [0.0, 0.3])
def test_the_critic_s_batch_too(models, monkeypatch, token_share):
    rng, name = random.Random(6), "llama, GQA, tied"
    lm, head = load_critic(models(name), train=True, new=True)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    twin = torch.nn.Linear(lm.config.hidden_size, 1).double()
    twin.load_state_dict(head.state_dict())
    records = [pairs_record(random_tree(rng, n, 9, 90), rng)[0] for n in (3, 8, 12)]
    _, plain = slow(models(name), [])
    total = wanted = 0
    for record in records:
        tree = support.packing.record_tree(record, [True] * len(record["nodes"]))
        for v, node in enumerate(record["nodes"]):
            ids, first = path(tree, v)
            p = torch.sigmoid(twin(plain.base_model(torch.tensor([ids])).last_hidden_state[0]))[
                :, 0
            ]
            mc = node["wins"] / node["n"]
            bce = -(mc * p.log() + (1 - mc) * (1 - p).log())  # at each token
            inner = bce[max(first, 1) :]
            state = (1 - token_share) * bce[-1] + token_share * inner.sum() / max(1, len(inner))
            wanted = wanted + node["n"] * state  # a state's weight is what is known of it
            total += node["n"]
    wanted = wanted / total
    wanted.backward()
    caught = {}
    monkeypatch.setattr(train_critic, "fit", lambda *args, **more: caught.update(args=args))
    for budget in (8192, 40):
        s = train_critic.Settings(
            "t", "c", "o", states="all", token_share=token_share, budget=budget
        )
        train_critic.train(lm, head, records, False, s, None)
        _, batches, prepare, loss = caught["args"][:4]
        (batch,) = batches
        lm.model.zero_grad()
        head.zero_grad()
        shares = [loss(*arguments)[0] for arguments in prepare(batch)]
        for share in shares:
            share.backward()
        assert len(shares) > 3 or budget == 8192
        assert sum(shares).item() == pytest.approx(wanted.item(), rel=1e-5)
        same_gradients(gradients(head), gradients(twin))
        same_gradients(gradients(lm.decoder), gradients(plain.base_model))


def test_eos_is_trained(models):
    lm = load_lm(models("llama, MHA, untied"), train=True, device="cpu")
    (eos,) = lm.eos
    assert lm.response_ids("The answer is 9.")[-1] == eos
    prompt, said = [9, 8, 7, 5], [11, 12, 13]
    tree = Tree([prompt, [*said, eos], said], [-1, 0, 0], [False, True, True])
    (pack,) = pack_trees([tree], 999)
    logp = step_logprobs(lm, pack)
    order = [v for _, v in pack.owner]
    ended, open_end = logp[order.index(1)], logp[order.index(2)]
    plain = hf.AutoModelForCausalLM.from_pretrained(lm.path, dtype=torch.float64)
    chance = plain(torch.tensor([prompt + said])).logits[0, -1].double().log_softmax(-1)[eos]
    assert (ended - open_end).item() == pytest.approx(chance.item(), abs=1e-5)
    (grad,) = torch.autograd.grad(ended - open_end, lm.head)
    push = 1 - chance.exp()  # d log p / d logit of the EOS, times the hidden state
    hidden = plain.base_model(torch.tensor([prompt + said])).last_hidden_state[0, -1]
    assert torch.allclose(grad[eos].double(), push * hidden, atol=1e-5)


# ---------------------------------------------------------------- linear_logprobs


def naive(hidden, weight, targets, scale=1.0, softcap=None):
    z = hidden @ weight.T * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def head_inputs(n, d, v, dtype=torch.float64, size=1.0):
    g = torch.Generator().manual_seed(n + v)
    hidden = (size * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,), generator=g)


@pytest.fixture(params=[(2048, 2048), (3, 4), (1, 1), (5, 7)], ids=str)
def chunks(request, monkeypatch):
    monkeypatch.setattr(model, "_largest_block", lambda x: request.param)
    return request.param


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, None), (1.7, 1.5), (1.0, 30.0)])
def test_linear_logprobs_gradcheck(chunks, scale, softcap):
    hidden, weight, targets = head_inputs(7, 2, 9)  # no block size divides them
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, scale, softcap), (hidden, weight), atol=1e-7
    )


@pytest.mark.parametrize("n, d, v, size", [(7, 3, 11, 1.0), (1, 1, 1, 1.0), (29, 16, 53, 300.0)])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, 2.0)])
def test_linear_logprobs_equals_naive(chunks, n, d, v, size, scale, softcap):
    hidden, weight, targets = head_inputs(n, d, v, size=size)  # size 300: logits of thousands
    before = hidden.detach().clone(), weight.detach().clone(), targets.clone()
    slope = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = naive(hidden, weight, targets, scale, softcap)
    want_h, want_w = torch.autograd.grad(wanted, (hidden, weight), slope)
    given = slope.clone()
    out = linear_logprobs(hidden, weight, targets, scale, softcap)
    got_h, got_w = torch.autograd.grad(out, (hidden, weight), given)
    assert out.dtype is torch.float64 and out.shape == (n,)
    for got, want in [(out, wanted), (got_h, want_h), (got_w, want_w)]:
        assert (got - want).abs().max() <= 1e-12 * max(1.0, want.abs().max().item())
    for now, was in zip((hidden, weight, targets, given), (*before, slope)):
        assert torch.equal(now, was)


def test_linear_logprobs_of_a_frozen_weight(monkeypatch):
    hidden, weight, targets = head_inputs(6, 4, 9)
    weight.requires_grad_(False)
    linear_logprobs(hidden, weight, targets).sum().backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0
    sizes, multiply = [], model._matmul32
    monkeypatch.setattr(model, "_matmul32", lambda *args: sizes.append(1) or multiply(*args))
    counts = []
    for h, w in ((True, False), (False, True), (True, True)):
        sizes.clear()
        hidden, weight, targets = head_inputs(6, 4, 9)
        hidden.requires_grad_(h), weight.requires_grad_(w)
        linear_logprobs(hidden, weight, targets).sum().backward()
        counts.append(len(sizes))
        assert (hidden.grad is None, weight.grad is None) == (not h, not w)
    assert counts[0] == counts[1] == counts[2] - 1  # what is not asked for costs no product
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets).requires_grad


def test_linear_logprobs_in_low_precision():
    """The error of a 30-token step's log-prob in bfloat16, against float64 on the same weights."""
    hidden, weight, targets = head_inputs(600, 64, 3000, torch.bfloat16, size=0.4)
    step = torch.arange(600) // 30

    def sums(logp):
        return torch.zeros(20, dtype=torch.float64).index_add(0, step, logp.detach().double())

    exact = sums(naive(hidden.double(), weight.double(), targets))
    out = linear_logprobs(hidden, weight, targets)
    assert out.dtype is torch.float32
    error = (sums(out) - exact).abs().mean()
    naive_error = (sums(naive(hidden, weight, targets)) - exact).abs().mean()
    assert error < 1e-3 and error < 0.01 * naive_error, (error, naive_error)
    single = linear_logprobs(hidden.float(), weight.float(), targets)
    assert single.dtype is torch.float32 and (sums(single) - exact).abs().max() < 2e-4
    got = torch.autograd.grad(out.sum(), (hidden, weight))
    want = torch.autograd.grad(
        naive(hidden.double(), weight.double(), targets).sum(), (hidden, weight)
    )
    for a, b in zip(got, want):
        assert a.dtype is torch.bfloat16
        assert (a.double() - b.double()).norm() < 0.02 * b.double().norm()


# ---------------------------------------------------------------- step_advantages


def test_step_advantages_equals_loops(rng):
    for _ in range(50):
        states = rng.randint(1, 6)
        actions = [
            (s, rng.random(), rng.randint(1, 5))
            for s in range(states)
            for _ in range(rng.randint(1, 4))
        ]
        rng.shuffle(actions)
        parent, q, draws = (torch.tensor(x) for x in zip(*actions))
        adv, mean, gap = step_advantages(q.double(), parent, draws)
        for s in range(states):
            mine = [float(q[k]) for k, a in enumerate(actions) if a[0] == s for _ in range(a[2])]
            average = sum(mine) / len(mine)
            assert mean[s].item() == pytest.approx(average)
            assert gap[s].item() == pytest.approx(max(mine) - min(mine))
            for k, a in enumerate(actions):
                if a[0] == s:
                    assert adv[k].item() == pytest.approx(float(q[k]) - average)


# ---------------------------------------------------------------- models and their configs


def test_what_a_model_does_to_its_logits_is_found_out(build):
    """Llama does not read this field; of BERT's head the product is the last part alone."""
    lm = load_lm(
        build(hf.LlamaConfig, {"num_key_value_heads": 2, "logits_scaling": 4.0}), device="cpu"
    )
    assert lm.scale == 1.0
    sizes = {k: x for k, x in SIZES.items() if k != "attention_dropout"}
    with pytest.raises(UserError, match="bert is not supported: its logits are no product"):
        load_lm(build(hf.BertConfig, {"is_decoder": True}, sizes), device="cpu")


@pytest.mark.parametrize("kind", [hf.MistralConfig, hf.Qwen2Config])
def test_a_window_that_is_switched_off_is_fine(build, kind):
    load_lm(build(kind, {"num_key_value_heads": 2, "sliding_window": None}), device="cpu")


def test_a_temperature_without_do_sample_can_be_saved(build, tmp_path):
    """Hugging Face loads such a generation config with a warning, but does not save it."""
    place = build(hf.LlamaConfig, {"num_key_value_heads": 2})
    lm = load_lm(place, device="cpu")
    lm.model.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="temperature"):
        lm.model.save_pretrained(tmp_path / "refused")
    lm.save(tmp_path / "saved")
    load_lm(tmp_path / "saved", device="cpu")


def test_auc_counts_ties_as_half(monkeypatch, rng):
    values = [rng.randint(0, 4) / 4 for _ in range(60)]
    wins = [rng.randint(0, 4) for _ in values]
    node = {"parent": 0, "reward": None, "labelled": True, "n": 4}
    nodes = [node | {"wins": w} for w in wins]
    monkeypatch.setattr(train_critic, "tree_values", lambda *_: [values])
    found = train_critic.measure(None, None, [{"nodes": nodes}], False, 99, 0.5)
    above = total = 0.0
    for i, (v, w) in enumerate(zip(values, wins)):
        for j, (u, x) in enumerate(zip(values, wins)):
            if i != j:  # every success of state i against every failure of state j
                total += w * (4 - x)
                above += w * (4 - x) * ((v > u) + (v == u) / 2)
    assert found["auc"] == pytest.approx(above / total)


GPT2 = (hf.GPT2Config, {}, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256})


def test_the_critic_s_numbers_by_hand():
    """The worked numbers of the docstrings."""
    array = np.array
    assert support.stats.auc(array([0.9, 0.2]), array([1, 0])) == 1
    assert support.stats.auc(array([0.9, 0.5, 0.5]), array([0, 1, 0])) == 0.25
    error, bins = support.stats.calibration(array([0.91, 0.95, 0.2]), array([1, 0.8, 0.1]))
    assert error == pytest.approx(0.16 / 3) and [b["states"] for b in bins] == [1, 2]
    assert bins[1] == pytest.approx({"states": 2, "value": 0.93, "mc": 0.9})
    wins, value = [0, 4, 3, 1], [0.5, 0.9, 0.4, 0.5]
    nodes = [{"parent": 0, "reward": None, "n": 4, "wins": w} for w in wins]
    assert support.stats.siblings([{"nodes": nodes}], [value]) == (0.5, 2)
    assert support.stats.siblings([{"nodes": nodes[:2]}], [value]) == (None, 0)
    few = [nodes[0], nodes[1], nodes[3] | {"n": 3}]
    assert support.stats.siblings([{"nodes": few}], [value]) == (None, 0)  # 3 draws are too few
    few[2] |= {"n": 4}
    assert support.stats.siblings([{"nodes": few}], [[0.5, 1.0, 1.0]]) == (0.5, 1)  # a tie is half
    few[1] |= {"reward": 1}
    assert support.stats.siblings([{"nodes": few}], [value]) == (None, 0)  # its V is the reward


def test_layers_are_found_whatever_a_model_calls_them(build, models):
    for path in (models("llama, GQA, tied"), build(*GPT2)):
        lm = load_lm(path, device="cpu")
        assert len(support.distributed.decoder_layers(lm.model)) == lm.config.num_hidden_layers
        support.memory.require_memory(str(path), 8192, False, card=80e9)


def test_an_eos_of_id_0_is_one(build, tmp_path):
    """generation_config.json says where responses end, also where it says 0."""
    shutil.copytree(build(hf.LlamaConfig, {"num_key_value_heads": 2}), tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 0}))
    words = hf.AutoTokenizer.from_pretrained(tmp_path / "m")
    words.eos_token = words.convert_ids_to_tokens(5)
    words.save_pretrained(tmp_path / "m")
    assert load_lm(tmp_path / "m", device="cpu").eos == [0, 5]  # the tokenizer's own too


def test_dropout_is_refused_in_training(build):
    """A policy that flips coins has no log-ratio of exactly 0 at step 0, so training has none."""
    kind, fields, sizes = GPT2
    path = build(kind, fields, sizes | {"resid_pdrop": 0.3, "embd_pdrop": 0.1})
    with pytest.raises(
        UserError, match=r"dropout \(resid_pdrop, embd_pdrop, attn_pdrop\).*to 0\.0"
    ):
        load_lm(path, train=True, device="cpu")
    lm = load_lm(path, device="cpu")
    (pack,) = pack_trees(forest(100)[:2], 9999)
    assert torch.equal(step_logprobs(lm, pack), step_logprobs(lm, pack))


def test_token_of_another_vocabulary_is_refused(lm):
    (pack,) = pack_trees([Tree([[1, 2], [lm.config.vocab_size]], [-1, 0], [False, True])], 99)
    with pytest.raises(UserError, match="of another tokenizer"):
        step_logprobs(lm, pack)


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_on_the_cpu_is_close(folder, train):
    """--dtype bfloat16: weights of a model that trains stay float32; log-probs come out in float32."""
    tree = Tree([[5, 6, 7], [8, 9], [10, 11, 12]], [-1, 0, 0], [False, True, True])
    (pack,) = pack_trees([tree], 99)
    exact = step_logprobs(load_lm(folder, device="cpu"), pack)
    lm = load_lm(folder, train, "cpu", "bfloat16")
    logp = step_logprobs(lm, pack)
    assert lm.head.dtype is (torch.float32 if train else torch.bfloat16)
    assert logp.dtype is torch.float32
    error = (logp - exact).abs().max()
    assert 0 < error < 0.05
    with pytest.raises(UserError, match="--dtype half"):
        load_lm(folder, dtype="half")
