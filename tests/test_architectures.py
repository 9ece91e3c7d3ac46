"""The models that people have, with tiny random weights: packed or path by path, each gives the numbers of
the plain model, one path at a time; the sampler draws what draws by hand are; and transformers loads what
is saved."""

import random

import pytest
import torch
import toy
import transformers as hf

import support.distributed
from model import load_lm, step_logprobs, step_values
from support.attention import row_bytes
from support.packing import BLOCK, Tree, pack_trees, path_ids
from support.sampler import Row, Sampler, draw_key, draw_tokens

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
}  # fmt: skip
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.15}
OLD |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EIGHT = SIZES | {"head_dim": 8}
EXPERTS = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
BOTH = ["sliding_attention", "full_attention"]  # a layer of each kind
LATENT = EXPERTS | {
    "n_routed_experts": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "num_key_value_heads": 4,
}
LATENT |= {
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
}
LATENT |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 4}
LINEAR = EXPERTS | {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
}
LINEAR |= {"linear_value_head_dim": 8, "head_dim": 8, "shared_expert_intermediate_size": 16}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
PACKED = {
    "Llama": SIZES | {"tie_word_embeddings": True},
    "Qwen2": SIZES | {"num_key_value_heads": 1},
    "Qwen2, a window in the second layer": SIZES
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "Qwen3": EIGHT,
    "Qwen3Moe": EXPERTS | {"head_dim": 8},
    "Mistral, a window of 5": EIGHT | {"sliding_window": 5},
    "Mistral, a window of more than a block": EIGHT | {"sliding_window": BLOCK + 6},
    "Mixtral": SIZES | {"num_local_experts": 4, "head_dim": 8},
    "Ministral": EIGHT | {"sliding_window": 5, "layer_types": BOTH},
    "Gemma": EIGHT,
    "Gemma2": EIGHT | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": EIGHT | {"sliding_window": 5, "layer_types": BOTH},
    "Gemma3nText": EIGHT | {"sliding_window": 5, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    | {"layer_types": BOTH * 2, "hidden_size_per_layer_input": 8, "intermediate_size": [48] * 4}
    | {"activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8},
    "Phi": SIZES,  # a bias on the logits
    "Phi3": SIZES | {"sliding_window": 5, "pad_token_id": 0},
    "Olmo": SIZES, "Olmo2": SIZES,
    "Olmo3": SIZES | {"sliding_window": 5, "layer_types": BOTH},
    "Granite": SIZES | {"logits_scaling": 4.0},
    "GraniteMoe": SIZES | {"num_local_experts": 4, "logits_scaling": 2.0},
    "Cohere": SIZES | {"logit_scale": 0.25},
    "Cohere2": EIGHT | {"sliding_window": 5, "layer_types": BOTH},
    "GPTNeoX": SIZES, "GPT2": OLD,
    "Starcoder2": SIZES | {"sliding_window": 5},
    "SmolLM3": SIZES | {"pad_token_id": 0}, "Glm": EIGHT, "Glm4": EIGHT, "Helium": EIGHT,
    "OPT": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 32, "init_std": 0.15, "max_position_embeddings": 512, "dropout": 0.0},
    "SeedOss": EIGHT | {"attention_dropout": 0.0, "residual_dropout": 0.0}, "Ernie4_5": EIGHT, "Persimmon": SIZES, "Arcee": EIGHT, "Apertus": EIGHT,
    "NanoChat": SIZES | {"final_logit_softcapping": 2.0},
    "StableLm": SIZES, "Nemotron": EIGHT,
    "Exaone4": EIGHT | {"sliding_window": 5, "layer_types": BOTH},
    "GptOss": EIGHT | {"sliding_window": 5, "layer_types": BOTH, "num_local_experts": 4},  # sinks
    "DeepseekV2": LATENT, "DeepseekV3": LATENT,
    "Llama4Text": EIGHT | {"intermediate_size_mlp": 48, "num_local_experts": 4}
    | {"attention_chunk_size": 7, "layer_types": ["chunked_attention", "full_attention"]},
}  # fmt: skip
SPACES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.15}
PATHS = {
    "Qwen3Next": LINEAR,
    "Qwen3_5Text": LINEAR,
    "MiniMax": EIGHT | {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "Mamba": SPACES,
    "Jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    | {"mamba_d_state": 8, "mamba_dt_rank": 4},
    "RecurrentGemma": SIZES | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6},
    "Lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15}
    | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "GPTJ": OLD | {"rotary_dim": 4},
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(folder):
    return hf.AutoTokenizer.from_pretrained(folder)


def build(place, name: str, tokenizer, more=None):
    """A folder with a random model; more: other sizes."""
    kind = getattr(hf, f"{name.split(',')[0]}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    eos = tokenizer.eos_token_id
    special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    torch.manual_seed(0)
    config = kind(
        **{"vocab_size": len(tokenizer), **(PACKED | PATHS)[name], **special, **(more or {})}
    )
    random_model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases, norms and sinks start as zeros and ones, which would hide them
        for p in random_model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    random_model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def forest(vocabulary: int) -> list[Tree]:
    """Bushes whose steps, prompts and paths are longer than the windows; one is deeper than a block."""
    rng, trees = random.Random(1), []
    for nodes, longest in ((9, 12), (5, 30)):
        ids = [
            [rng.randrange(3, vocabulary) for _ in range(rng.randint(longest // 2, longest))]
            for _ in range(nodes)
        ]
        parent = [-1] + [rng.randrange(max(0, v - 2), v) for v in range(1, nodes)]
        trees.append(Tree(ids, parent, [True] * nodes))
    assert max(len(path_ids(tree, v)) for tree in trees for v in range(len(tree.ids))) > BLOCK + 6
    return trees


def scores(lm, head, trees, paths: bool, budget: int):
    """({(tree, node): log-prob}, {..: value}, gradients of a weighted sum of both)."""
    lm.model.zero_grad()
    logps, values = {}, {}
    for pack in pack_trees(trees, budget, paths=paths):
        logp, value = step_logprobs(lm, pack), step_values(lm, head, pack)
        sum(weight(k) * (x + y) for k, x, y in zip(pack.owner, logp, value)).backward()
        logps.update(zip(pack.owner, logp.tolist()))
        values.update(zip(pack.owner, value.tolist()))
    return logps, values, {n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None}


def weight(key: tuple) -> float:
    return random.Random(str(key)).uniform(-1, 1)


def plain_scores(plain, head, trees):
    """The same, one path at a time."""
    seen, logps, values = [], {}, {}
    plain.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for t, tree in enumerate(trees):
        for v in range(len(tree.ids)):
            ids = torch.tensor(path_ids(tree, v))
            logits = plain(ids[None], use_cache=False).logits[0]
            first = max(len(ids) - len(tree.ids[v]), 1)
            logp = logits[first - 1 : -1].log_softmax(-1).gather(1, ids[first:, None])
            logps[t, v], values[t, v] = logp.sum(), head(seen[-1][0, -1])[0]
    sum(weight(k) * (logps[k] + values[k]) for k in logps).backward()
    numbers = [{k: x.item() for k, x in found.items()} for found in (logps, values)]
    return *numbers, {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}


@torch.no_grad()
def drawn_by_hand(plain, trees, rows, eos) -> list[list[int]]:
    """Each token from a forward of all that is before it: rows of one node, and no cache."""
    drawn = {}
    for node in {(row.tree, row.node) for row in rows}:
        some = [r for r, row in enumerate(rows) if (row.tree, row.node) == node]
        key = torch.tensor([rows[r].key for r in some])
        ids = torch.tensor([path_ids(trees[node[0]], node[1])] * len(some))
        first = ids.shape[1]
        for n in range(max(rows[r].max_new for r in some)):
            logits = plain(ids, use_cache=False).logits[:, -1].float()
            token = draw_tokens(logits, key, torch.full_like(key, n), 1.0)
            ids = torch.cat([ids, token[:, None]], 1)
        for r, new in zip(some, ids[:, first:].tolist()):
            ends = [n for n, token in enumerate(new, 1) if token in eos]
            drawn[r] = new[: min([*ends, rows[r].max_new])]
    return [drawn[r] for r in range(len(rows))]


# One of each form of attention, of head and of recurrence; the others are run before a release.
USUAL = {"Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mistral, a window of more than a block", "Gemma2"}
USUAL |= {"Gemma3Text", "Phi", "Granite", "Cohere2", "GPT2", "OPT", "GptOss", "DeepseekV3"}
USUAL |= {"Llama4Text", "Qwen3Next", "MiniMax", "Mamba", "Jamba", "Lfm2", "Bloom", "Falcon"}


def marked(name: str):
    return pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in (*PACKED, *PATHS)])
def test_an_architecture(name, tokenizer, tmp_path, capsys):
    place = build(tmp_path / "m", name, tokenizer)
    lm = load_lm(place, train=True, device="cpu")
    said = capsys.readouterr().err
    assert lm.paths is (name in PATHS)
    if lm.paths:
        assert said.startswith("warning: ") and said.count("\n") == 1 and "half the speed" in said
    else:
        assert said == ""
    softcap = (PACKED | PATHS)[name].get("attn_logit_softcapping")  # see `own_attention`
    kind = {"attn_implementation": "eager"} if softcap else {}
    plain = hf.AutoModelForCausalLM.from_pretrained(place, **kind).eval()
    trees = forest(len(tokenizer))

    # Draws: 64 of them, from prompts and from states.
    nodes = [(t, v) for t, tree in enumerate(trees) for v in range(len(tree.ids))]
    rows = [Row(*nodes[i % len(nodes)], draw_key(i), 2 + i % 3) for i in range(64)]
    wanted = drawn_by_hand(plain, trees, rows, lm.eos)
    sampler = Sampler(lm)
    drawn = sampler.draw(trees, rows)
    same = sum(a == b for a, b in zip(drawn, wanted))
    assert same >= 63, same  # a draw may lie within a rounding of a token's border

    # What a GPU's memory is planned by: the cache of a token, all layers. (GPT-NeoX and Persimmon have
    # a key per query, whatever number of key heads stands in the config, as it does in SIZES.)
    if not lm.paths and name not in ("GPTNeoX", "Persimmon"):
        held = sampler.prefixes.keys + sampler.prefixes.values
        held = sum(4 * x.shape[0] * x.shape[2] for x in held)
        assert held <= row_bytes(lm.config, 1, 4) <= 2 * held

    # Log-probs, values and gradients.
    torch.manual_seed(0)
    head = torch.nn.Linear(lm.config.hidden_size, 1)
    logps, values, slopes = plain_scores(plain, head, trees)
    top = max(float(g.abs().max()) for g in slopes.values())
    for budget in (10_000, 90):
        got = scores(lm, head, trees, lm.paths, budget)
        for numbers, wanted in zip(got[:2], (logps, values)):
            assert numbers.keys() == wanted.keys()
            for key, number in wanted.items():
                assert numbers[key] == pytest.approx(number, rel=2e-5, abs=2e-4), key
        for parameter, slope in slopes.items():
            error = float((got[2][parameter] - slope).abs().max())
            assert error <= 1e-4 * top, (parameter, error, top)

    # Saved, and loaded by plain transformers.
    lm.save(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **kind).eval()
    ids = torch.tensor([path_ids(trees[0], 4)])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, plain(ids).logits)


def sharded_scores(rank, places, trees, out):
    """In one of two processes: log-probs and gradients of each model that the first one reads, and
    log-probs of the same without training."""
    support.distributed.join()
    found = {}
    for name, place in places.items():
        lm = load_lm(place, train=True)
        support.distributed.shard(lm)
        logps, slopes = trained_scores(lm, trees)
        slopes = {n: slope.full_tensor() for n, slope in slopes.items()}
        whole = load_lm(place)
        with torch.no_grad():
            for pack in pack_trees(trees, 250, BLOCK, 1, lm.paths):
                for key, logp in zip(pack.owner, step_logprobs(whole, pack).tolist()):
                    assert logp == pytest.approx(logps[key], abs=3e-4), (name, key)
        found[name] = logps, slopes
    if rank == 1:
        torch.save(found, out)
    support.distributed.leave()


def trained_scores(lm, trees):
    """(log-probs of all steps, gradients of their weighted sum)"""
    logps = {}
    for pack in pack_trees(trees, 250, BLOCK, 1, lm.paths):
        logp = step_logprobs(lm, pack)
        sum(weight(key) * x for key, x in zip(pack.owner, logp)).backward()
        logps.update(zip(pack.owner, logp.tolist()))
    return logps, {n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None}


# Tied and untied heads, buffers of many kinds, experts, layers without attention, models by paths.
SHARDED = ["Llama", "Gemma3Text", "GptOss", "DeepseekV3", "Qwen3Next", "OPT", "Jamba", "Bloom"]


@pytest.mark.slow
def test_two_processes_read_and_shard_what_one_reads(tokenizer, tmp_path):
    """The other one gets all weights and buffers from there, and what is tied stays so."""
    trees, places, wanted = forest(len(tokenizer)), {}, {}
    for name in SHARDED:
        places[name] = build(tmp_path / name, name, tokenizer)
        wanted[name] = trained_scores(load_lm(places[name], train=True, device="cpu"), trees)
    assert toy.ranks(2, sharded_scores, places, trees, tmp_path / "found") == [0, 0]
    for name, (logps, slopes) in torch.load(tmp_path / "found").items():
        top = max(float(slope.abs().max()) for slope in wanted[name][1].values())
        assert logps == pytest.approx(wanted[name][0], abs=3e-4), name
        assert slopes.keys() == wanted[name][1].keys()
        for parameter, slope in slopes.items():
            error = (slope - 2 * wanted[name][1][parameter]).abs().max()  # both ran all packs
            assert float(error) <= 1e-4 * top, (name, parameter)


EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
EYES |= {"image_size": 28, "patch_size": 14}
QWEN_EYES = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SEEING = {  # text config, vision config, more
    "Gemma3": (EIGHT | {"sliding_window": 5}, EYES, {"mm_tokens_per_image": 4}),
    "Qwen2_5_VL": (EIGHT | {"rope_parameters": ROPE}, QWEN_EYES | {"patch_size": 14}, {}),
    "Qwen3VL": (
        EIGHT | {"rope_parameters": ROPE},
        QWEN_EYES | {"deepstack_visual_indexes": [0]},
        {},
    ),
}


@pytest.mark.parametrize("name", SEEING)
def test_a_checkpoint_that_reads_images_too_works_by_its_text_part(name, tokenizer, tmp_path):
    text, vision, more = SEEING[name]
    special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    text = text | special | {"bos_token_id": None, "pad_token_id": tokenizer.eos_token_id}
    config = getattr(hf, f"{name}Config")(text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    getattr(hf, f"{name}ForConditionalGeneration")(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    lm = load_lm(tmp_path / "m", train=True, device="cpu")
    assert not lm.paths
    trees = forest(len(tokenizer))
    with torch.no_grad():
        logp = {k: x for p in pack_trees(trees, 250) for k, x in zip(p.owner, step_logprobs(lm, p))}
    lm.save(tmp_path / "saved")  # the whole model, for whoever serves it
    plain = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    for (t, v), found in logp.items():
        ids = torch.tensor(path_ids(trees[t], v))
        first = max(len(ids) - len(trees[t].ids[v]), 1)
        with torch.no_grad():
            each = plain(input_ids=ids[None]).logits[0, first - 1 : -1].log_softmax(-1)
        assert float(found) == pytest.approx(
            float(each.gather(1, ids[first:, None]).sum()), abs=1e-3
        )
    assert len(Sampler(lm).draw(trees, [Row(0, 0, 1, 3)])[0]) > 0
