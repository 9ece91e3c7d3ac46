"""The language model of every stage: packing, log-probs, advantages, the sampler, the loop.

Read from top to bottom:
  LM                any Hugging Face decoder with its tokenizer; prompts; where steps end
  pack_trees        step trees -> one row of tokens; `end` is causal and tree mask at once
  attend            the attention of every model; a pack or a cache decides who sees whom
  linear_logprobs   log-probs from hidden states without holding [tokens, vocabulary]
  step_logprobs, step_values, step_advantages   the three quantities of the paper, a number a step
  Prefixes, sample  prefill a tree once, then draw continuations from any of its states
  fit               the training loop: accumulation, NaN check, metrics, exact resume

Sizes: N tokens of a pack, M scored nodes, S states, B rows of a batch, T columns, V vocabulary,
d width, L layers, G key/value heads, R query heads a key/value head, D head size.
"""

import errno
import functools
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, field
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

# A stage's lines are the only ones on the screen, whoever loads or saves a model in it.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BLOCK = 64  # queries that share one gathered key set (tree attention on the CPU)


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend; exit code 2."""


def flag(help: str, default=MISSING):
    """A field of a stage's Settings: its line in --help, and the paper's value."""
    return field(default=default, metadata={"help": help})


# ------------------------------------------------------------ the language model


class LM:
    """A decoder and its tokenizer, from a Hugging Face folder or hub id.

    dtype: what it computes in, by default bfloat16 on CUDA and float32 on the CPU. train=True holds
    the weights in float32 all the same (bfloat16 cannot hold AdamW's updates at the paper's
    learning rates) and computes by autocast. Raises UserError for what cannot work: no tokenizer,
    no EOS, no line break, attention that a tree mask would break.
    """

    def __init__(self, path: str, train: bool = False, device: str | None = None, dtype: str = ""):
        # here, not on import: it takes seconds, and a stage that is complete should say so at once
        transformers.AttentionInterface.register("dapo", attend)
        self.path = str(path)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("bfloat16" if self.device == "cuda" else "float32")
        if dtype not in ("bfloat16", "float32"):
            raise UserError(f"--dtype {dtype}: wanted bfloat16 or float32")
        self.rounds = dtype == "bfloat16"
        dtype = torch.float32 if train else getattr(torch, dtype)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="dapo", output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"no {min(report['missing_keys'])} in the weights")
        except Exception as e:  # a broken folder raises all kinds; the user needs one line
            reason = str(e).strip().split("\n")[0]
            raise UserError(f"{path}: not a model folder with a tokenizer ({reason})") from e
        self.model = model.to(self.device).eval()  # no dropout: the log-ratio starts at exactly 0
        self.decoder, self.config = model.base_model, model.config.get_text_config()
        self.scale = getattr(self.config, "logit_scale", None) or 1.0
        self.scale /= getattr(self.config, "logits_scaling", None) or 1.0
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self._read_tokenizer()
        self._refuse_other_attention()

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight  # (V, d)

    @property
    def max_length(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    def _read_tokenizer(self):
        """breaks[id]: the token's text has a line break; blank[id]: white space or special."""
        eos = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"{self.path}: no EOS; add eos_token_id to generation_config.json")
        self.eos = sorted({eos} if isinstance(eos, int) else set(eos))
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        texts += [""] * (self.config.vocab_size - len(texts))
        special = set(self.tokenizer.all_special_ids) | set(self.eos)
        self.breaks = np.array(["\n" in t and i not in special for i, t in enumerate(texts)])
        self.blank = np.array([not t.strip() or i in special for i, t in enumerate(texts)])
        if not self.breaks.any():
            raise UserError(f"{self.path}: no token holds a line break, so steps cannot be cut")

    @torch.no_grad()
    def _refuse_other_attention(self):
        """By config, and by trying: two branches in a pack must score as each path alone, and from
        hidden states must come the model's own logits."""
        kind = self.config.model_type
        if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise UserError(f"{self.path}: {kind} has a bias on its logits, which is not supported")
        other = set(getattr(self.config, "layer_types", None) or []) - {"full_attention"}
        windows = getattr(self.config, "use_sliding_window", True)
        if other or (windows and getattr(self.config, "sliding_window", None)):
            what = ", ".join(sorted(other)) or "a sliding window"
            raise UserError(f"{self.path}: {kind} has {what}; tree packing needs full attention")
        ids = [i % self.config.vocab_size for i in range(3, 12)]
        tree = Tree([ids[:4], ids[4:6], ids[6:]], [-1, 0, 0], [False, True, True])
        (pack,) = pack_trees([tree], 99)
        together = step_logprobs(self, pack)
        alone = [tree._replace(score=[False, v == 1, v == 2]) for _, v in pack.owner]
        apart = torch.cat([step_logprobs(self, *pack_trees([t], 99)) for t in alone])
        if not torch.allclose(together, apart, atol=0.5 if self.rounds else 1e-3):
            raise UserError(f"{self.path}: {kind} ignores a tree mask, so it cannot be used")
        ids, pos = (x[None].to(self.device) for x in (pack.ids, pack.pos))
        view = TreeView(pack, self.device)
        with self._autocast():
            own = self.model(input_ids=ids, position_ids=pos, use_cache=False, view=view).logits[0]
        difference = (own - self.logits(self.hidden(ids, pos, view)[0])).abs().max()
        if difference > (0.1 if self.rounds else 1e-3) * own.abs().max():
            raise UserError(f"{self.path}: {kind} scales its logits in a way that is not supported")

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user message: by chat template if there is one, else plain; one BOS."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt)["input_ids"]
        message = [{"role": "user", "content": prompt}]
        chat = self.tokenizer.apply_chat_template
        text = chat(message, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a demonstration, with the EOS that the policy must learn."""
        own = self.tokenizer.eos_token_id  # of several the one that its chat template ends with
        end = own if own in self.eos else self.eos[0]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [end]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def step_ends(self, ids: list[int]) -> list[int]:
        """Offsets one past each step's last token; the last is len(ids) (section 3).

        A step ends after a token whose text has a line break. A step of white space alone belongs
        to the one before it (at the very start, where there is none, to the one after it).
        "5 + 3 = 8\\n" "\\n" "So 8.\\n" EOS -> two steps; the blank line joins the first.
        """
        if not ids:
            return []
        ids = np.asarray(ids)
        ends = np.append(np.flatnonzero(self.breaks[ids[:-1]]) + 1, len(ids))  # (steps,)
        blank = np.logical_and.reduceat(self.blank[ids], np.append(0, ends[:-1]))
        # step i ends if step i + 1 is not blank, and something up to here is not blank either
        inner = ~blank[1:] & (np.cumsum(~blank)[:-1] > 0)
        return np.append(ends[:-1][inner], len(ids)).tolist()

    def _autocast(self):
        rounds = self.rounds and self.head.dtype is torch.float32
        return torch.autocast(self.device, torch.bfloat16, enabled=rounds)

    def hidden(self, ids: torch.Tensor, pos: torch.Tensor, view) -> torch.Tensor:
        """Last hidden states (B, T, d) of ids (B, T) at positions (B, T); `view`: who sees whom."""
        with self._autocast():
            out = self.decoder(input_ids=ids, position_ids=pos, use_cache=False, view=view)
        return out.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head, rounds = _wide(self.head.to(hidden.dtype)), hidden.dtype is torch.bfloat16
        z = _matmul32(_wide(hidden), head.T, rounds) * self.scale  # (B, V)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def save(self, folder: Path):
        try:
            self.model.generation_config.validate(strict=True)
        except ValueError:  # a temperature without do_sample, which may be loaded but not saved
            self.model.generation_config.do_sample = True
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_critic(path: str, train: bool = False, dtype: str = "") -> tuple[LM, torch.nn.Linear]:
    """A decoder and its value head; without value_head.safetensors the head starts at zero."""
    lm = LM(path, train, dtype=dtype)
    head = torch.nn.Linear(lm.config.hidden_size, 1).to(lm.device)
    file = Path(path) / "value_head.safetensors"
    if file.exists():
        try:
            head.load_state_dict(load_file(file))
        except (RuntimeError, SafetensorError) as e:
            why = str(e).splitlines()[-1].strip()
            raise UserError(f"{file}: broken or of another model ({why})") from e
    else:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    return lm, head


# ------------------------------------------------------------ tree packing


class Tree(NamedTuple):
    """One problem's tokens: node 0 the prompt, node v > 0 the step that leads to state v."""

    ids: list[list[int]]
    parent: list[int]  # parent[0] = -1, parent[v] < v
    score: list[bool]  # which nodes are asked for; others are only somebody's path


def record_tree(record: dict, score: list[bool], lm: LM | None = None) -> Tree:
    """Tree of a line of trees.jsonl; an `lm` of another tokenizer re-tokenises node by node."""
    nodes = record["nodes"]
    if lm is None:
        ids = [record["prompt_ids"]] + [node["ids"] for node in nodes[1:]]
    else:
        tokenize = lm.tokenizer
        ids = [tokenize(nodes[0]["text"])["input_ids"] or [lm.eos[0]]]
        for node in nodes[1:]:
            ids.append(tokenize(node["text"], add_special_tokens=False)["input_ids"] or [lm.eos[0]])
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
    need, children = list(tree.score), [[] for _ in tree.ids]
    for v in range(len(tree.ids) - 1, 0, -1):
        need[tree.parent[v]] |= need[v]
        children[tree.parent[v]].append(v)
    runs, inside, size, stack = [], set(), budget, [0] if need[0] else []
    while stack:
        v = stack.pop()
        stack += [c for c in children[v] if need[c]]
        if size + len(tree.ids[v]) > budget:
            runs.append([])
            inside, size = set(), 0
        path, u = [(v, tree.score[v])], tree.parent[v]
        while u >= 0 and u not in inside:
            path.append((u, False))
            u = tree.parent[u]
        runs[-1] += reversed(path)
        inside.update(u for u, _ in path)
        size += sum(len(tree.ids[u]) for u, _ in path)
    return runs


def pack_trees(trees: list[Tree], budget: int, align: int = 1) -> list[Pack]:
    """Packs of about `budget` tokens that score every node asked for; like lengths go together.

    align: each tree starts at a multiple of it. With align=BLOCK a tree's numbers do not depend,
    even in the last bit, on what else is in its pack (on the CPU): exact resume relies on it.
    """
    pieces = [(t, run) for t, tree in enumerate(trees) for run in _fragments(tree, budget)]
    sizes = [sum(len(trees[t].ids[v]) for v, _ in run) for t, run in pieces]
    groups, size = [], budget
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        room = -(-sizes[i] // align) * align
        if size + room > budget or not groups:
            groups.append([])
            size = 0
        groups[-1].append(pieces[i])
        size += room
    return [_pack(trees, group, align) for group in groups]


def _pack(trees: list[Tree], group: list[tuple[int, list]], align: int) -> Pack:
    ids, up, scored, owner, size = [], [], [], [], 0  # up: a node's parent in this pack

    def pad(unit):  # with roots of one token, which see themselves alone: no row is all masked
        nonlocal size
        up.extend([-1] * (-size % unit))
        ids.extend([[0]] * (-size % unit))
        size += -size % unit

    for t, run in group:
        where = {-1: -1}
        for v, score in run:
            where[v] = len(ids)
            ids.append(trees[t].ids[v])
            up.append(where[trees[t].parent[v]])
            size += len(ids[-1])
            if score:
                scored.append(where[v])
                owner.append((t, v))
        pad(align)
    pad(BLOCK)
    lens, up = np.array([len(x) for x in ids]), np.array(up)  # (nodes,)
    stop, depth, which = np.cumsum(lens), np.zeros(len(ids), int), np.full(len(ids), -1)
    end, before = stop.copy(), np.where(up < 0, -1, stop[up] - 1)
    which[scored] = np.arange(len(scored))
    for i in np.flatnonzero(up >= 0):
        depth[i] = depth[up[i]] + lens[up[i]]
    for i in np.flatnonzero(up >= 0)[::-1]:
        end[up[i]] = max(end[up[i]], end[i])
    token = np.arange(size)
    within = token - np.repeat(stop - lens, lens)  # offset in its node
    prev = np.where(within == 0, np.repeat(before, lens), token - 1)
    pos, end, which = np.repeat(depth, lens) + within, np.repeat(end, lens), np.repeat(which, lens)
    columns = (np.concatenate(ids), pos, end, prev, which, stop[scored] - 1)
    return Pack(*map(torch.from_numpy, columns), owner)


# ------------------------------------------------------------ attention


def attend(module, query, key, value, attention_mask=None, scaling=None, view=None, **kwargs):
    """The attention of every model; query (B, G * R, T, D), key and value (B, G, T, D).

    `view` (TreeView or CacheView) comes through the model's own forward and does the work.
    """
    odd = view is None or key.shape != value.shape
    if odd or kwargs.get("softcap") or kwargs.get("sliding_window"):
        what = "a soft-cap, a sliding window, values of another size, or hides the mask"
        raise UserError(f"{type(module).__name__} has {what}: it cannot be packed")
    return view(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


def _attention(query, key, value, bias, scaling):
    """softmax(q k' * scaling + bias) v; q (b, G, Q, D), k and v (b, G, K, D), bias (b, 1, Q, K).

    Written out on purpose: on the CPU as fast as the fused kernel and, unlike it, the same bits for
    a row whatever the batch and however many masked columns follow.
    """
    scores = (query * scaling) @ key.transpose(-1, -2) + bias
    high = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=high).to(value.dtype) @ value


class TreeView:
    """Who sees whom in a pack: j <= i < end[j].

    CPU: each block of queries gathers just the keys that any of them may see (its path and
    itself), so the cost grows with depth, not with the pack. CUDA: flex_attention skips the blocks
    that the same rule leaves empty.
    """

    def __init__(self, pack: Pack, device: str, keep: bool = False):
        self.kept = [] if keep else None  # (key, value), each (G, N, D), a layer
        self.mask = _block_mask(pack.end.to(device)) if device == "cuda" else None
        if self.mask is not None:
            return
        end, size, sets = pack.end.numpy(), len(pack.end), []
        for a in range(0, size, BLOCK):
            sets.append(np.append(np.flatnonzero(end[:a] > a), np.arange(a, a + BLOCK)))
        width = -(-max(map(len, sets)) // 16) * 16
        table = np.full((len(sets), width), size)  # (blocks, K) keys of a block; `size`: none
        for row, keys in zip(table, sets):
            row[: len(keys)] = keys
        i, j = np.arange(size).reshape(-1, BLOCK, 1), table[:, None]
        seen = torch.from_numpy((j <= i) & (i < np.append(end, 0)[j]))
        self.table = torch.from_numpy(np.minimum(table, size - 1))
        self.bias = torch.where(seen, 0.0, -torch.inf)[:, None, None]  # (blocks, 1, 1, BLOCK, K)

    def __call__(self, layer, query, key, value, scaling):
        if self.kept is not None:
            self.kept.append((key[0].detach(), value[0].detach()))
        if self.mask is not None:
            flags = {"block_mask": self.mask, "scale": scaling, "enable_gqa": True}
            return _flex()[0](query, key, value, **flags)
        groups, size, (blocks, width) = key.shape[1], key.shape[3], self.table.shape
        q = query[0].view(groups, -1, blocks, BLOCK, size)  # (G, R, blocks, BLOCK, D)
        shape = (groups, blocks, 1, width, size)
        k, v = (x[0].index_select(1, self.table.view(-1)).view(shape) for x in (key, value))
        q, k, v = q.permute(2, 0, 1, 3, 4), k.transpose(0, 1), v.transpose(0, 1)
        out = _attention(q, k, v, self.bias, scaling)
        return out.permute(1, 2, 0, 3, 4).reshape(query.shape)


def _block_mask(end: torch.Tensor):
    """The blocks of a pack in which some token sees some other, for flex_attention."""
    rule = lambda b, h, i, j: (j <= i) & (i < end[j])
    return _flex()[1](rule, None, None, len(end), len(end), device=end.device)


@functools.cache
def _flex():
    """(flex_attention, create_block_mask), compiled once; only CUDA comes here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return tuple(torch.compile(f, dynamic=True) for f in (flex_attention, create_block_mask))


class CacheView:
    """Keys and values of B rows, allocated once; row b has written columns 0 .. length[b] - 1."""

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        empty = functools.partial(torch.zeros, shape, dtype=dtype, device=device)  # (B, G, T, D)
        self.keys, self.values = ([empty() for _ in range(layers)] for _ in range(2))

    def at(self, length: torch.Tensor, width: int):
        """The next token of a row goes to column `length` and sees columns 0 .. length < width."""
        self.rows = torch.arange(len(length), device=length.device)
        self.length, self.width = length, width
        seen = torch.arange(width, device=length.device) <= length[:, None]
        bias = torch.where(seen, 0.0, -torch.inf).to(self.keys[0].dtype)
        self.bias = bias[:, None, None]  # (B, 1, 1, T)
        return self

    def __call__(self, layer, query, key, value, scaling):
        k, v = self.keys[layer], self.values[layer]
        k[self.rows, :, self.length], v[self.rows, :, self.length] = key[:, :, 0], value[:, :, 0]
        k, v = k[: len(query), :, : self.width], v[: len(query), :, : self.width]
        # (B, G, R, D): the heads of a group share keys
        q = query.view(len(query), k.shape[1], -1, query.shape[-1])
        return _attention(q, k, v, self.bias, scaling).view(query.shape)


# ------------------------------------------------------------ log-probs and values


def _wide(x):
    """What `_matmul32` takes: on the CPU bfloat16 numbers in float32, widened once, not a product."""
    return x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32))


def _matmul32(a, b, rounds: bool):
    """a (n, k) @ b (k, m); rounds: of bfloat16 numbers, and their sums are float32."""
    if not rounds:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    matmul = torch.backends.mkldnn.matmul  # the CPU's bfloat16 units, but with a float32 result
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return a @ b
    finally:
        matmul.fp32_precision = before


def _largest_block(x) -> tuple[int, int]:
    """(tokens, vocabulary) of the logits that exist at once; the CPU's as measured, CUDA's is not."""
    return (4096, 8192) if x.is_cuda else (2048, 2048)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, softcap):
        high = torch.promote_types(hidden.dtype, torch.float32)
        top = hidden.new_full((len(hidden),), -torch.inf, dtype=high)  # running maximum
        total = torch.zeros_like(top)  # running sum of exp(logit - top)
        target = torch.zeros_like(top)  # the target's logit
        rounds, wide = hidden.dtype is torch.bfloat16, _wide(hidden)
        tokens, vocabulary = _largest_block(hidden)
        for w, first in _chunks(weight, vocabulary):
            for h, row in _chunks(wide, tokens):
                z = _matmul32(h, w.T, rounds).mul_(scale)
                if softcap is not None:
                    z = softcap * torch.tanh(z / softcap)
                rows = slice(row, row + len(h))
                new = torch.maximum(top[rows], z.amax(-1))
                local = targets[rows] - first
                inside = (local >= 0) & (local < len(w))
                own = z.gather(1, local.clamp(0, len(w) - 1)[:, None])[:, 0]
                target[rows] += torch.where(inside, own, 0)
                total[rows] *= (top[rows] - new).exp()
                total[rows] += z.sub_(new[:, None]).exp_().sum(-1)
                top[rows] = new
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.scale, ctx.softcap = scale, softcap
        return target - lse

    @staticmethod
    def backward(ctx, grad):
        """d logp_t / d logit_v = [v = t] - softmax_v, recomputed block by block.

        Vocabulary outside, tokens inside: one float32 accumulator of a block's rows, not of [V, d].
        """
        hidden, weight, targets, lse = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        grad_h = torch.zeros_like(hidden, dtype=lse.dtype) if need_h else None
        grad_w = torch.empty_like(weight) if need_w else None
        rounds, wide = hidden.dtype is torch.bfloat16, _wide(hidden)
        tokens, vocabulary = _largest_block(hidden)
        for w, first in _chunks(weight, vocabulary):
            acc = torch.zeros(w.shape, dtype=lse.dtype, device=w.device) if need_w else None
            for h, row in _chunks(wide, tokens):
                rows = slice(row, row + len(h))
                z = _matmul32(h, w.T, rounds).mul_(ctx.scale)
                slope = ctx.scale
                if ctx.softcap is not None:
                    t = torch.tanh(z / ctx.softcap)
                    z, slope = ctx.softcap * t, ctx.scale * (1 - t * t)
                g = z.sub_(lse[rows, None]).exp_().mul_(-grad[rows, None])  # (n, v)
                local = targets[rows] - first
                inside = ((local >= 0) & (local < len(w))).nonzero()[:, 0]
                # the one-hot, in float32, before any rounding
                g[inside, local[inside]] += grad[rows][inside]
                g = g.mul_(slope).to(wide.dtype)
                if need_h:
                    grad_h[rows] += _matmul32(g, w, rounds)
                if need_w:
                    acc += _matmul32(g.T, h, rounds)
            if need_w:
                grad_w[first : first + len(w)] = acc
        return grad_h.to(hidden.dtype) if need_h else None, grad_w, None, None, None


def _chunks(x, size):
    return ((_wide(x[i : i + size]), i) for i in range(0, len(x), size))


def linear_logprobs(hidden, weight, targets, scale: float = 1.0, softcap: float | None = None):
    """log softmax(hidden @ weight')[targets] without ever holding [N, V].

    hidden (N, d), weight (V, d) of one dtype, targets (N,) int64 -> (N,) float32 (or float64). An
    online logsumexp over vocabulary chunks; backward recomputes them. The model's logit transforms:
    softcap * tanh(scale * logit / softcap).
    """
    return _LinearLogprobs.apply(hidden, weight, targets, scale, softcap)


def pack_hidden(lm: LM, pack: Pack, view: TreeView | None = None) -> torch.Tensor:
    """Last hidden states (N, d) of a pack's tokens, every path at once."""
    if not 0 <= int(pack.ids.min()) <= int(pack.ids.max()) < lm.config.vocab_size:
        wrong = f"token {int(pack.ids.max())} is asked for, of {lm.config.vocab_size}"
        raise UserError(f"{lm.path}: {wrong}: the records are of another tokenizer")
    ids, pos = pack.ids[None].to(lm.device), pack.pos[None].to(lm.device)
    return lm.hidden(ids, pos, view or TreeView(pack, lm.device))[0]


def step_logprobs(lm: LM, pack: Pack) -> torch.Tensor:
    """log pi(a | s) of every scored node: the sum over its tokens, EOS included (eq. 12). (M,)"""
    hidden = pack_hidden(lm, pack)
    if lm.rounds:  # autocast leaves the last norm in float32
        hidden = hidden.bfloat16()
    # a prompt's first token has none before it
    token = ((pack.node >= 0) & (pack.prev >= 0)).nonzero()[:, 0]
    source, target, node = (x[token].to(lm.device) for x in (pack.prev, pack.ids, pack.node))
    logp = linear_logprobs(hidden[source], lm.head.to(hidden.dtype), target, lm.scale, lm.softcap)
    return torch.zeros(len(pack.owner), device=lm.device).index_add(0, node, logp)


def step_values(lm: LM, head: torch.nn.Linear, pack: Pack) -> torch.Tensor:
    """Logit of V(s) of every scored node, read at the state's last token (eq. 15). (M,)"""
    return head(pack_hidden(lm, pack)[pack.last.to(lm.device)].float())[:, 0]


@torch.no_grad()
def tree_values(lm: LM, head, records: list[dict], retokenise: bool, budget: int) -> list[list]:
    """V of every node of trees.jsonl lines, one pass over each tree; the reward where a step ended."""
    other = lm if retokenise else None
    trees = [record_tree(r, [n["reward"] is None for n in r["nodes"]], other) for r in records]
    values = [[float(n["reward"] or 0) for n in r["nodes"]] for r in records]
    for pack in pack_trees(trees, budget):
        for (t, v), x in zip(pack.owner, torch.sigmoid(step_values(lm, head, pack)).tolist()):
            if not np.isfinite(x):
                raise UserError(f"{lm.path}: V is {x} in problem {records[t]['id']}; train it anew")
            values[t][v] = x
    return values


def step_advantages(q, parent, draws):
    """Eq. 13, A(s, a) = Q(s, a) - 1/M sum_j Q(s, a_j), for every action of every state at once.

    q (K,) value of each action, parent (K,) its state in 0 .. S-1, draws (K,) how often it was
    drawn there: duplicates count in the mean, since it estimates E_{a ~ pi_ref} Q.
    -> adv (K,), mean (S,), gap (S,) = max A - min A (appendix F.1).

    One state, q = [1, 0, .5], draws [1, 2, 1]: mean = 1.5 / 4 = .375, adv = [.625, -.375, .125].
    """
    states = int(parent.max()) + 1
    total = q.new_zeros(states).index_add(0, parent, q * draws)
    mean = total / q.new_zeros(states).index_add(0, parent, draws.to(q.dtype))
    adv = q - mean[parent]
    high = q.new_full((states,), -torch.inf).scatter_reduce(0, parent, adv, "amax")
    low = q.new_full((states,), torch.inf).scatter_reduce(0, parent, adv, "amin")
    return adv, mean, high - low


# ------------------------------------------------------------ training


def replace(path: Path, write):
    """Make `path`, a file or a folder, whole or not at all: write beside, fsync, rename, fsync."""
    path, beside = Path(path), Path(f"{path}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
    except (RuntimeError, SafetensorError) as e:  # torch's and safetensors' word for a full disk
        raise OSError(errno.EIO, f"not written ({str(e).splitlines()[0]})", str(path)) from e
    for p in (*beside.rglob("*"), beside) if beside.is_dir() else [beside]:
        fsync(p)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(beside, path)
    fsync(path.parent)


def fsync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def whole_batches(counts: list[int], size: int, passes: int, seed: str) -> list[list[int]]:
    """Indices of whole problems whose counts reach `size` together, in a new order each pass."""
    rng, batches = random.Random(seed), []
    for _ in range(passes):
        batch, full = [], 0
        for i in rng.sample(range(len(counts)), len(counts)):
            batch, full = [*batch, i], full + counts[i]
            if full >= size:
                batches.append(batch)
                batch, full = [], 0
        batches += [batch] if full else []
    return batches


def fit(modules, batches, prepare, loss, work: Path, lr: float, save_every: int, name=str):
    """One optimiser step (AdamW, gradient norm clipped to 1) a batch; resumes exactly from `work`.

    modules   {name: torch.nn.Module} to train
    batches   what step i trains on, a list that the stage's seed fixes
    prepare   batch -> a list of argument tuples, one a pack; runs in a thread, a step ahead
    loss      (*arguments) -> (the pack's share of the batch's mean loss, {metric: its sum}); shares
              add up, so gradients do not depend on how a batch is cut into packs (8 x 1 = 1 x 8)
    name      batch -> what to call it in the report on a loss that is not finite
    The rate rises over the first 5 % of the steps, then falls linearly to a tenth. `work` holds the
    two newest checkpoints and metrics.jsonl, a line a step; seconds go to timing.jsonl apart.
    """
    work.mkdir(parents=True, exist_ok=True)
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    saved = sorted(work.glob("step-*.pt"))
    size = 3 * sum(p.numel() * p.element_size() for p in parameters)  # weights and two moments
    need = (3 - len(saved)) * size  # two are kept while a third is written
    if shutil.disk_usage(work).free < need:
        raise UserError(f"{work}: checkpoints need {need / 1e9:.1f} GB of disk; make room there")
    if not saved:
        print(f"{work}: {len(batches)} steps; checkpoints take up to {need / 1e6:.0f} MB of disk")
    flags = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimiser = torch.optim.AdamW(parameters, lr=lr, **flags)
    first, log = 0, work / "metrics.jsonl"
    if saved:
        try:
            state = torch.load(saved[-1], map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as e:
            raise UserError(f"{saved[-1]}: broken; remove it, the one before it is used") from e
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        first = state["step"]
        print(f"resuming {work} at step {first} of {len(batches)}")
    lines = log.read_text().splitlines(keepends=True)[:first] if first else []
    replace(log, lambda p: p.write_text("".join(lines)))

    steps = range(first, len(batches))
    bar = tqdm(steps, initial=first, total=len(batches), disable=None, desc=work.stem)
    with (
        ThreadPoolExecutor(1) as ahead,
        log.open("a", buffering=1) as metrics,
        (work / "timing.jsonl").open("a", buffering=1) as timing,
    ):
        packs = ahead.submit(prepare, batches[first]) if steps else None
        for i in bar:
            begin, items = perf_counter(), packs.result()
            if i + 1 < len(batches):
                packs = ahead.submit(prepare, batches[i + 1])
            rate = min((i + 1) / (0.05 * len(batches)), 1 - 0.9 * i / len(batches))
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            sums = {"loss": 0.0}
            for arguments in items:
                share, parts = loss(*arguments)
                share.backward()
                for key, value in {"loss": share.detach(), **parts}.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            if not np.isfinite([norm, *sums.values()]).all():
                bad = work / "non_finite.json"
                found = {"norm": str(norm), "sums": str(sums)}
                bad.write_text(json.dumps({"step": i, "batch": name(batches[i]), **found}))
                raise UserError(f"step {i}: loss or gradient not finite, see {bad}; lower --lr")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            metrics.write(json.dumps({"step": i, **sums, "norm": norm, "lr": lr * rate}) + "\n")
            timing.write(json.dumps({"step": i, "seconds": perf_counter() - begin}) + "\n")
            if (i + 1) % save_every == 0 or i + 1 == len(batches):
                os.fsync(metrics.fileno())
                state = {
                    "step": i + 1,
                    "modules": {k: m.state_dict() for k, m in modules.items()},
                    "optimiser": optimiser.state_dict(),
                    "rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state_all(),
                }
                replace(work / f"step-{i + 1:08d}.pt", functools.partial(torch.save, state))
                for old in sorted(work.glob("step-*.pt"))[:-2]:
                    old.unlink()
