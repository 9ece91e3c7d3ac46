"""The language model of every stage: loading, tree packing, log-probs without logits, advantages, the sampler, the loop.

Read from top to bottom:
  LM                 any Hugging Face decoder with its tokenizer; prompts; where steps end
  pack_trees         many step trees -> one row of tokens; `end` is causal mask, tree mask and problem boundary at once
  attend             the attention every model is loaded with; a pack or a key/value cache decides who sees whom
  linear_logprobs    log-probs from hidden states without holding [tokens, vocabulary]
  step_logprobs, step_values, step_advantages     the three quantities of the paper, a number a step
  Prefixes, sample   prefill a tree once, then draw any number of continuations from any of its states
  fit                the training loop: accumulation, NaN check, metrics, exact resume

Sizes: N tokens of a pack, M scored nodes, S states, B rows of a batch, T columns, V vocabulary, d width, L layers,
G key/value heads, R query heads a key/value head, D head size.
"""

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BLOCK = 64  # queries that share one gathered key set (tree attention on the CPU)


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend. Stages print it and exit with code 2."""


# ---------------------------------------------------------------------------------------------- the language model


class LM:
    """A decoder and its tokenizer, from a Hugging Face folder or hub id.

    train=True holds the weights in float32 (AdamW at the paper's learning rates is below bfloat16's resolution) and,
    on CUDA, computes in bfloat16 by autocast; train=False loads them in the dtype that they compute in.
    Raises UserError for what cannot work: no tokenizer, no EOS, no line break, attention that the tree mask would break.
    """

    def __init__(
        self, path: str, train: bool = False, device: str | None = None, check: bool = True
    ):
        self.path, self.device = (
            str(path),
            device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
        self.compute = torch.bfloat16 if self.device == "cuda" else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            config = AutoConfig.from_pretrained(path)
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=torch.float32 if train else self.compute,
                attn_implementation="dapo",
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise ValueError(f"no {min(report['missing_keys'])} in the weights")
            self.model = model.to(self.device)
        except (
            Exception
        ) as e:  # whatever a broken folder makes the library raise, the user needs one line
            reason = str(e).strip().split("\n")[0]
            raise UserError(
                f"{path}: not a loadable Hugging Face model folder with a tokenizer ({reason})"
            ) from e
        self.model.train(train)
        self.decoder, self.config = self.model.base_model, self.model.config.get_text_config()
        self.scale = (
            1.0
            / getattr(self.config, "logits_scaling", 1.0)
            * (getattr(self.config, "logit_scale", None) or 1.0)
        )
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self._read_tokenizer()
        self._refuse_other_attention()
        if check:
            self._check_tree_forward()

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight  # (V, d)

    @property
    def max_length(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    def _read_tokenizer(self):
        """breaks[id]: the token's text has a line break; blank[id]: nothing but white space (or a special token)."""
        eos = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"{self.path}: no EOS in generation_config.json or the tokenizer; add eos_token_id"
            )
        self.eos = sorted({eos} if isinstance(eos, int) else set(eos))
        size = max(self.config.vocab_size, len(self.tokenizer))
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        texts += [""] * (size - len(texts))
        special = set(self.tokenizer.all_special_ids) | set(self.eos)
        self.breaks = np.array(["\n" in t and i not in special for i, t in enumerate(texts)])
        self.blank = np.array([not t.strip() or i in special for i, t in enumerate(texts)])
        if not self.breaks.any():
            raise UserError(
                f"{self.path}: no token of this tokenizer holds a line break, so steps cannot be cut"
            )

    def _refuse_other_attention(self):
        kinds = set(getattr(self.config, "layer_types", None) or []) - {"full_attention"}
        window = (
            getattr(self.config, "sliding_window", None)
            if getattr(self.config, "use_sliding_window", True)
            else None
        )
        if kinds or window:
            what = ", ".join(sorted(kinds)) or f"a sliding window of {window}"
            raise UserError(
                f"{self.path}: {self.config.model_type} has {what}; tree packing needs full attention"
            )

    @torch.no_grad()
    def _check_tree_forward(self):
        """A prompt with two branches in one pack must give what each path gives alone; ALiBi, say, does not."""
        ids = [i % self.config.vocab_size for i in range(3, 12)]
        tree = Tree([ids[:4], ids[4:6], ids[6:]], [-1, 0, 0], [False, True, True])
        was, _ = self.model.training, self.model.eval()
        (both,) = pack_trees([tree], 99)
        alone = [tree._replace(score=[False, v == 1, v == 2]) for _, v in both.owner]
        logp = step_logprobs(self, both)
        one_by_one = torch.cat([step_logprobs(self, *pack_trees([t], 99)) for t in alone])
        self.model.train(was)
        if not torch.allclose(
            logp, one_by_one, atol=1e-3 if self.compute is torch.float32 else 0.5
        ):
            raise UserError(
                f"{self.path}: {self.config.model_type} does not honour the tree mask; it cannot be used here"
            )

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user message: the model's chat template if it has one, else plain text; BOS exactly once."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt)["input_ids"]
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a demonstration, with the EOS that the policy must learn."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.eos[0]]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def step_ends(self, ids: list[int]) -> list[int]:
        """Offsets one past each step's last token; the last is len(ids) (section 3: steps end at line breaks).

        A step ends after a token whose text has a line break; a step of white space alone belongs to the one before it
        (at the very start, where there is none, to the one after it).
        "5 + 3 = 8\\n" "\\n" "So 8.\\n" EOS -> two steps: the blank line joins the first, the bare EOS the second.
        """
        if not ids:
            return []
        ids = np.asarray(ids)
        ends = np.append(np.flatnonzero(self.breaks[ids[:-1]]) + 1, len(ids))  # (steps,)
        blank = np.logical_and.reduceat(self.blank[ids], np.append(0, ends[:-1]))
        # the end of step i stays an end if step i + 1 is not blank and something before it is not blank either
        inner = ~blank[1:] & (np.cumsum(~blank)[:-1] > 0)
        return np.append(ends[:-1][inner], len(ids)).tolist()

    def hidden(self, ids: torch.Tensor, pos: torch.Tensor, view) -> torch.Tensor:
        """Last hidden states (B, T, d) of token ids (B, T) at positions (B, T); `view` says what attends to what."""
        autocast = self.device == "cuda" and self.head.dtype is torch.float32
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
            return self.decoder(
                input_ids=ids, position_ids=pos, use_cache=False, view=view
            ).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        z = F.linear(hidden, self.head.to(hidden.dtype)).float() * self.scale  # (B, V)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def save(self, folder: Path):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_critic(path: str, train: bool = False) -> tuple[LM, torch.nn.Linear]:
    """A critic: a decoder and its value head; a model without value_head.safetensors gets a new head of zeros."""
    lm = LM(path, train)
    head = torch.nn.Linear(lm.config.hidden_size, 1).to(lm.device)
    file = Path(path) / "value_head.safetensors"
    if file.exists():
        try:
            head.load_state_dict(load_file(file))
        except (RuntimeError, SafetensorError) as e:
            raise UserError(
                f"{file}: broken or of another model ({str(e).splitlines()[-1].strip()})"
            ) from e
    else:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    return lm, head


# ---------------------------------------------------------------------------------------------- tree packing


class Tree(NamedTuple):
    """One problem's tokens: node 0 is the prompt, node v > 0 the step that leads to state v; parents come first."""

    ids: list[list[int]]
    parent: list[int]  # parent[0] = -1
    score: list[bool]  # which nodes are asked for; others are there only as somebody's path


def record_tree(record: dict, score: list[bool], lm: LM | None = None) -> Tree:
    """The Tree of a line of trees.jsonl. With `lm`, a critic of another tokenizer, texts are tokenised node by node."""
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
    end: torch.Tensor  # (N,) one past the last token of the subtree that the token's node roots
    prev: (
        torch.Tensor
    )  # (N,) the token before it in its tree: the parent's last, for a step's first; -1 at a root
    node: torch.Tensor  # (N,) index into owner, -1 for a token that is context only
    last: torch.Tensor  # (M,) the last token of each scored node
    owner: list[tuple[int, int]]  # (M,) (tree, node)


def _fragments(tree: Tree, budget: int) -> list[list[tuple[int, bool]]]:
    """Cut a tree into depth-first runs of nodes of at most `budget` tokens, each with the path to its root.

    -> lists of (node, scored here). A repeated ancestor is context; a path that is longer than the budget stays whole.
    """
    need, children = list(tree.score), [[] for _ in tree.ids]
    for v in range(len(tree.ids) - 1, 0, -1):
        need[tree.parent[v]] |= need[v]
        children[tree.parent[v]].append(
            v
        )  # descending, so that the stack below pops them in ascending order
    runs, run, inside, size, stack = [], [], set(), 0, [0] if need[0] else []
    while stack:
        v = stack.pop()
        stack += [c for c in children[v] if need[c]]
        if run and size + len(tree.ids[v]) > budget:
            runs.append(run)
            run, inside, size = [], set(), 0
        path, u = [], tree.parent[v]
        while u >= 0 and u not in inside:
            path.append(u)
            u = tree.parent[u]
        run += [(u, False) for u in reversed(path)] + [(v, tree.score[v])]
        inside.update(path, [v])
        size += sum(len(tree.ids[u]) for u in path) + len(tree.ids[v])
    return runs + [run] if run else runs


def _layout(tree: Tree, run: list[tuple[int, bool]]) -> tuple[np.ndarray, ...]:
    """Arrays ids, pos, end, prev, node (N,) and last (M,) of one fragment, offsets relative to its start."""
    nodes = [v for v, _ in run]
    where = {v: i for i, v in enumerate(nodes)}
    lens = np.array([len(tree.ids[v]) for v in nodes])
    stop = np.cumsum(lens)
    start, depth, before, end = (
        stop - lens,
        np.zeros(len(nodes), int),
        np.full(len(nodes), -1),
        stop.copy(),
    )
    up = [where.get(tree.parent[v], -1) for v in nodes]
    for i, u in enumerate(up):
        if u >= 0:
            depth[i], before[i] = depth[u] + lens[u], stop[u] - 1
    for i in range(len(nodes) - 1, 0, -1):
        end[up[i]] = max(end[up[i]], end[i])
    scored = np.array([s for _, s in run])
    index = np.where(scored, np.cumsum(scored) - 1, -1)
    token = np.arange(stop[-1])
    within = token - np.repeat(start, lens)
    ids = np.concatenate([np.asarray(tree.ids[v]) for v in nodes])
    prev = np.where(within == 0, np.repeat(before, lens), token - 1)
    return (
        ids,
        np.repeat(depth, lens) + within,
        np.repeat(end, lens),
        prev,
        np.repeat(index, lens),
        stop[scored] - 1,
    )


def pack_trees(trees: list[Tree], budget: int, align: int = 1) -> list[Pack]:
    """Pack every scored node of the trees into as few rows of about `budget` tokens as length order gives.

    align: each fragment starts at a multiple of it. With align=BLOCK a tree's numbers do not depend, even in the last
    bit, on what else is in the pack (on the CPU); the sampler's prefill relies on this for exact resume.
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
    return [_join(trees, group, align) for group in groups]


def _join(trees: list[Tree], group: list[tuple[int, list]], align: int) -> Pack:
    columns, owner, offset = [], [], 0
    for i, (t, run) in enumerate(group):
        ids, pos, end, prev, node, last = _layout(trees[t], run)
        unit = BLOCK if i == len(group) - 1 else align  # the pack itself ends on a whole block
        pad = -len(ids) % unit if unit == align else -(offset + len(ids)) % unit
        own = (
            offset + len(ids) + np.arange(pad)
        )  # a padding token sees itself alone, so that no row is all masked
        zero, none = np.zeros(pad, int), np.full(pad, -1)
        columns.append(
            (
                np.append(ids, zero),
                np.append(pos, zero),
                np.append(end + offset, own + 1),
                np.append(np.where(prev < 0, -1, prev + offset), none),
                np.append(np.where(node < 0, -1, node + len(owner)), none),
                last + offset,
            )
        )
        owner += [(t, v) for v, scored in run if scored]
        offset += len(ids) + pad
    return Pack(*(torch.from_numpy(np.concatenate(c)) for c in zip(*columns)), owner)


# ---------------------------------------------------------------------------------------------- attention


def attend(module, query, key, value, attention_mask=None, scaling=None, view=None, **kwargs):
    """The attention function that models are loaded with; query (B, G * R, T, D), key and value (B, G, T, D).

    `view` (TreeView or CacheView) comes through the model's own forward to every layer and does the work.
    """
    if (
        kwargs.get("softcap") is not None
        or kwargs.get("sliding_window") is not None
        or view is None
    ):
        raise UserError(
            "this model's attention (soft-cap or sliding window) is not one that a tree can be packed for"
        )
    return view(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("dapo", attend)


def _attention(query, key, value, bias, scaling):
    """softmax(q k' * scaling + bias) v for query (b, G, Q, D), key and value (b, G, K, D), bias (b, 1, Q, K).

    Written out on purpose: on the CPU it is as fast as the fused kernel and, unlike it, gives a row the same bits
    whatever the batch and however many masked columns follow.
    """
    return ((query * scaling) @ key.transpose(-1, -2) + bias).softmax(-1) @ value


class TreeView:
    """Who sees whom in a pack: j <= i < end[j].

    CPU: each block of BLOCK queries gathers just the keys that any of them may see (its path and itself), so the cost
    grows with depth, not with the pack. CUDA: flex_attention skips the blocks that the same rule leaves empty.
    """

    def __init__(self, pack: Pack, device: str, keep: bool = False):
        self.kept = [] if keep else None  # (key, value), each (G, N, D), a layer
        if device == "cuda":
            self.mask, end = None, pack.end.to(device)
            self.mask = _flex()[1](
                lambda b, h, i, j: (j <= i) & (i < end[j]),
                None,
                None,
                len(end),
                len(end),
                device=device,
            )
            return
        end = pack.end.numpy()
        sets = [
            np.append(np.flatnonzero(end[:a] > a), np.arange(a, a + BLOCK))
            for a in range(0, len(end), BLOCK)
        ]
        table = np.full(
            (len(sets), -(-max(map(len, sets)) // 16) * 16), len(end)
        )  # (blocks, K); len(end) = nothing
        for row, keys in zip(table, sets):
            row[: len(keys)] = keys
        i, j = (
            np.arange(len(end)).reshape(-1, BLOCK, 1),
            table[:, None],
        )  # (blocks, BLOCK, 1), (blocks, 1, K)
        seen = (j <= i) & (i < np.append(end, 0)[j])
        self.table = torch.from_numpy(np.minimum(table, len(end) - 1))
        self.bias = torch.where(torch.from_numpy(seen), 0.0, -torch.inf)[
            :, None
        ]  # (blocks, 1, BLOCK, K)

    def __call__(self, layer, query, key, value, scaling):
        if self.kept is not None:
            self.kept.append((key[0].detach(), value[0].detach()))
        if query.is_cuda:
            return _flex()[0](
                query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=True
            )
        heads, (groups, _, size), (blocks, _, _, width) = (
            query.shape[1],
            key.shape[1:],
            self.bias.shape,
        )
        q = (
            query[0].view(groups, -1, blocks, BLOCK, size).permute(2, 0, 1, 3, 4)
        )  # (blocks, G, R, BLOCK, D)
        k, v = (
            x[0].index_select(1, self.table.view(-1)).view(groups, blocks, 1, width, size)
            for x in (key, value)
        )
        out = _attention(q, k.transpose(0, 1), v.transpose(0, 1), self.bias[:, None], scaling)
        return out.permute(1, 2, 0, 3, 4).reshape(1, heads, -1, size)


def _flex():
    """(flex_attention, create_block_mask), compiled once; only CUDA comes here."""
    if not hasattr(_flex, "made"):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        _flex.made = (
            torch.compile(flex_attention, dynamic=True),
            torch.compile(create_block_mask, dynamic=True),
        )
    return _flex.made


class CacheView:
    """Keys and values of B rows, allocated once; row b has written columns 0 .. length[b] - 1."""

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            for _ in range(2)
        )  # L x (B, G, T, D)

    def at(self, length: torch.Tensor, width: int):
        """Let the next token of rows 0 .. len(length) - 1 go to column `length` and see columns 0 .. length < width."""
        self.rows, self.length, self.width = (
            torch.arange(len(length), device=length.device),
            length,
            width,
        )
        seen = torch.arange(width, device=length.device) <= length[:, None]
        self.bias = torch.where(seen, 0.0, -torch.inf).to(self.keys[0].dtype)[
            :, None, None
        ]  # (B, 1, 1, T)
        return self

    def __call__(self, layer, query, key, value, scaling):
        k, v = self.keys[layer], self.values[layer]
        k[self.rows, :, self.length], v[self.rows, :, self.length] = key[:, :, 0], value[:, :, 0]
        k, v = k[: len(query), :, : self.width], v[: len(query), :, : self.width]
        q = query.view(
            len(query), k.shape[1], -1, query.shape[-1]
        )  # (B, G, R, D): grouped heads share their keys
        return _attention(q, k, v, self.bias, scaling).view(query.shape)


# ---------------------------------------------------------------------------------------------- log-probs and values


def _logits32(hidden, weight):
    """hidden (n, d) @ weight (v, d)' in float32 (n, v), without rounding the products to bfloat16 where that can be had."""
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


class _LinearLogprobs(torch.autograd.Function):
    TOKENS, VOCAB = 1024, 8192  # the largest block of logits that ever exists

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, softcap):
        high = torch.promote_types(hidden.dtype, torch.float32)
        top = torch.full(
            (len(hidden),), -torch.inf, dtype=high, device=hidden.device
        )  # running maximum
        total, target = (
            torch.zeros_like(top),
            torch.zeros_like(top),
        )  # running sum of exp(logit - top); target's logit
        for w, first in _chunks(weight, _LinearLogprobs.VOCAB):
            for h, row in _chunks(hidden, _LinearLogprobs.TOKENS):
                z = _logits32(h, w) * scale
                if softcap is not None:
                    z = softcap * torch.tanh(z / softcap)
                rows = slice(row, row + len(h))
                new = torch.maximum(top[rows], z.amax(-1))
                local = targets[rows] - first
                inside = (local >= 0) & (local < len(w))
                target[rows] += torch.where(
                    inside, z.gather(1, local.clamp(0, len(w) - 1)[:, None])[:, 0], 0
                )
                total[rows] = total[rows] * (top[rows] - new).exp() + z.sub_(
                    new[:, None]
                ).exp_().sum(-1)
                top[rows] = new
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.scale, ctx.softcap = scale, softcap
        return target - lse

    @staticmethod
    def backward(ctx, grad):
        """d logp_t / d logit_v = [v = t] - softmax_v, recomputed block by block; vocabulary outside, tokens inside."""
        hidden, weight, targets, lse = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        grad_h = (
            torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if need_h else None
        )
        grad_w = torch.empty_like(weight) if need_w else None
        for w, first in _chunks(weight, _LinearLogprobs.VOCAB):
            acc = torch.zeros(w.shape, dtype=lse.dtype, device=w.device) if need_w else None
            for h, row in _chunks(hidden, _LinearLogprobs.TOKENS):
                rows = slice(row, row + len(h))
                z = _logits32(h, w) * ctx.scale
                slope = ctx.scale
                if ctx.softcap is not None:
                    t = torch.tanh(z / ctx.softcap)
                    z, slope = ctx.softcap * t, ctx.scale * (1 - t * t)
                g = z.sub_(lse[rows, None]).exp_().mul_(-grad[rows, None])  # (n, v)
                local = targets[rows] - first
                inside = ((local >= 0) & (local < len(w))).nonzero()[:, 0]
                g[inside, local[inside]] += grad[rows][
                    inside
                ]  # the one-hot, in float32, before any rounding
                g = (g * slope).to(hidden.dtype)
                if need_h:
                    grad_h[rows] += _logits32(g, w.T)
                if need_w:
                    acc += _logits32(g.T, h.T)
            if need_w:
                grad_w[first : first + len(w)] = acc
        return grad_h.to(hidden.dtype) if need_h else None, grad_w, None, None, None


def _chunks(x, size):
    return ((x[i : i + size], i) for i in range(0, len(x), size))


def linear_logprobs(
    hidden, weight, targets, scale: float = 1.0, softcap: float | None = None
) -> torch.Tensor:
    """log softmax(hidden @ weight')[targets] without ever holding [N, V].

    hidden (N, d), weight (V, d) of one dtype, targets (N,) int64 -> (N,) float32 (float64 for float64 input).
    An online logsumexp over vocabulary chunks; backward recomputes them. scale and softcap: the model's logit
    transforms, softcap * tanh(scale * logit / softcap).
    """
    return _LinearLogprobs.apply(hidden, weight, targets, scale, softcap)


def pack_hidden(lm: LM, pack: Pack) -> torch.Tensor:
    view = TreeView(pack, lm.device)
    return lm.hidden(pack.ids[None].to(lm.device), pack.pos[None].to(lm.device), view)[0]  # (N, d)


def step_logprobs(lm: LM, pack: Pack) -> torch.Tensor:
    """log pi(a | s) of every scored node: the sum over its step's tokens, line break or EOS included (eq. 12). (M,)"""
    hidden = pack_hidden(lm, pack)
    token = ((pack.node >= 0) & (pack.prev >= 0)).nonzero()[
        :, 0
    ]  # (n,) a prompt's first token has nothing before it
    source, target, node = (x[token].to(lm.device) for x in (pack.prev, pack.ids, pack.node))
    logp = linear_logprobs(hidden[source], lm.head.to(hidden.dtype), target, lm.scale, lm.softcap)
    return torch.zeros(len(pack.owner), device=lm.device).index_add(0, node, logp)


def step_values(lm: LM, head: torch.nn.Linear, pack: Pack) -> torch.Tensor:
    """Logit of V(s) of every scored node, read at the state's last token (eq. 15). (M,) float32"""
    return head(pack_hidden(lm, pack)[pack.last.to(lm.device)].float())[:, 0]


def step_advantages(q, parent, draws):
    """Eq. 13, A(s, a) = Q(s, a) - 1/M sum_j Q(s, a_j), for every action of every state at once.

    q (K,) value of each action, parent (K,) its state in 0 .. S-1, draws (K,) how often it was drawn there: duplicates
    count in the mean, since it estimates E_{a ~ pi_ref} Q. -> adv (K,), mean (S,), gap (S,) = max A - min A (app. F.1).

    q = [1, 0, .5] of one state with draws [1, 2, 1]: mean = (1 + 0 + 0 + .5) / 4 = .375, adv = [.625, -.375, .125].
    """
    states = int(parent.max()) + 1
    total = q.new_zeros(states).index_add(0, parent, q * draws)
    mean = total / q.new_zeros(states).index_add(0, parent, draws.to(q.dtype))
    adv = q - mean[parent]
    high = q.new_full((states,), -torch.inf).scatter_reduce(0, parent, adv, "amax")
    low = q.new_full((states,), torch.inf).scatter_reduce(0, parent, adv, "amin")
    return adv, mean, high - low


# ---------------------------------------------------------------------------------------------- the sampler


def draw_key(*what) -> int:
    """The 64-bit key of one draw, a hash of (seed, stage, problem, state, number): who asks decides, not the batch."""
    return int.from_bytes(
        hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little", signed=True
    )


def uniforms(key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One uniform in [0, 1) of 52 bits for each (key, position), both (B,) int64: splitmix64. -> (B,) float64"""
    z = (
        key + (position + 1) * -0x61C8864680B583EB
    )  # the golden-ratio increment; int64 arithmetic wraps
    z = (z ^ ((z >> 30) & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & (1 << 33) - 1)
    return ((z >> 12) & (1 << 52) - 1).double() * 2.0**-52


def draw_tokens(logits, key, position, temperature: float) -> torch.Tensor:
    """Inverse-CDF draw from the whole distribution, no top-k, no top-p; temperature 0 is greedy. (B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)
    u = (
        uniforms(key, position)[:, None] * cdf[:, -1:]
    )  # u < cdf[-1], so a token of probability 0 is never drawn
    return torch.searchsorted(cdf, u, right=True)[:, 0]


class Prefixes:
    """Keys, values and last hidden states of trees of prefixes, every token computed once.

    path[tree, node]: where the tokens of prompt .. node lie; the rows of a pack's mask are the paths of its tokens.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, trees: list[Tree], budget: int = 8192):
        self.path, hidden, kept, self.tokens = {}, [], [], 0
        for pack in pack_trees(trees, budget, align=BLOCK):
            view = TreeView(pack, lm.device, keep=True)
            hidden.append(
                lm.hidden(pack.ids[None].to(lm.device), pack.pos[None].to(lm.device), view)[0]
            )
            kept.append(view.kept)
            end = pack.end.numpy()
            for owner, last in zip(pack.owner, pack.last.tolist()):
                self.path[owner] = np.flatnonzero(end[: last + 1] > last) + self.tokens
            self.tokens += len(end)
        self.hidden = torch.cat(hidden)  # (tokens, d)
        self.keys, self.values = (
            [torch.cat([k[i][j] for k in kept], 1) for i in range(len(kept[0]))] for j in (0, 1)
        )


@torch.no_grad()
def sample(
    lm: LM, prefixes: Prefixes, rows: list, temperature=1.0, batch=256, progress=None
) -> list:
    """Draw one continuation for each row (tree, node, key, room): up to an EOS (kept in the ids) or `room` tokens.

    -> list of token id lists, in the order of rows. A row's tokens depend on its prefix and key alone:
    neither the batch, nor its neighbours, nor the slot it sits in enter (CPU, float32: to the last bit).
    A finished row's slot goes to the next waiting row; when none waits, the batch shrinks.
    """
    paths = [prefixes.path[tree, node] for tree, node, _, _ in rows]
    # popped from the end: longest first, so that rows of like length decode together
    queue = sorted(range(len(rows)), key=lambda r: len(paths[r]))
    width = max((len(p) + r[3] for p, r in zip(paths, rows)), default=0)
    if width > lm.max_length:
        raise UserError(
            f"{lm.path}: a prefix and its new tokens are {width} tokens, the context is "
            f"{lm.max_length}; lower --max_new or leave long problems out"
        )
    # under 16 rows the CPU's matrix product rounds differently
    slots = max(16, min(batch, -(-len(rows) // 16) * 16))
    (groups, _, size), dtype = prefixes.keys[0].shape, prefixes.keys[0].dtype
    cache = CacheView(len(prefixes.keys), (slots, groups, width, size), dtype, lm.device)
    long = {"dtype": torch.long, "device": lm.device}
    length, key, new, room, token, row = (torch.zeros(slots, **long) for _ in range(6))
    row -= 1  # which of `rows` sits in a slot, -1: none
    alive = torch.zeros(slots, dtype=torch.bool, device=lm.device)
    out = torch.zeros(slots, max((r[3] for r in rows), default=0), **long)
    stop = torch.zeros(max(lm.head.shape[0], max(lm.eos) + 1), dtype=torch.bool, device=lm.device)
    stop[lm.eos] = True
    results = [None] * len(rows)

    def record(slot, logits):  # draw the next token of these slots and write it down
        token[slot] = draw_tokens(logits, key[slot], new[slot], temperature)
        out[slot, new[slot]] = token[slot]
        new[slot] += 1
        alive[slot] &= ~stop[token[slot]] & (new[slot] < room[slot])

    def harvest():  # read finished rows, seat waiting ones
        free = (~alive).nonzero()[:, 0]
        done = free[row[free] >= 0]
        for r, n, ids in zip(row[done].tolist(), new[done].tolist(), out[done].tolist()):
            results[r] = ids[:n]
            if progress is not None:
                progress.update(n)
        row[done] = -1
        free = free[: len(queue)]
        if len(free) == 0:
            return
        seat = [queue.pop() for _ in range(len(free))]
        lens = np.array([len(paths[r]) for r in seat])
        index = np.zeros((len(seat), lens.max()), int)  # (free, longest prefix)
        for i, r in enumerate(seat):
            index[i, : lens[i]] = paths[r]
        index = torch.from_numpy(index).to(lm.device)
        for views, kept in ((cache.keys, prefixes.keys), (cache.values, prefixes.values)):
            for store, source in zip(views, kept):
                store[free, :, : index.shape[1]] = source[:, index].transpose(0, 1)
        length[free], row[free] = torch.tensor(lens, **long), torch.tensor(seat, **long)
        key[free] = torch.tensor([rows[r][2] for r in seat], **long)
        room[free], new[free] = torch.tensor([rows[r][3] for r in seat], **long), 0
        alive[free] = True
        last = torch.tensor([paths[r][-1] for r in seat], **long)
        record(free, _at_least_16(lm.logits, prefixes.hidden[last]))

    while True:
        live = int(alive.sum())
        if live == 0 or (queue and live <= 0.9 * slots):
            waiting = len(queue)
            harvest()
            if waiting == 0:
                return results
            continue  # a fresh row may have ended with its first token
        if live <= 0.75 * slots and slots > 16 and not queue:  # leave the finished rows behind
            harvest()
            slots = max(16, -(-live // 16) * 16)
            keep = torch.cat([alive.nonzero()[:, 0], (~alive).nonzero()[:, 0]])[:slots]
            for store in (*cache.keys, *cache.values):
                store[:slots] = store[keep]
            state = (length, key, new, room, token, row, alive, out)
            length, key, new, room, token, row, alive, out = (x[keep] for x in state)
        view = cache.at(length, int(length.max()) + 1)
        hidden = lm.hidden(token[:, None], length[:, None], view)[:, 0]
        length += alive  # a finished row stays where it is until its slot is given away
        active = alive.nonzero()[:, 0]
        record(active, lm.logits(hidden)[active])


def _at_least_16(f, x):
    """f(x) with at least 16 rows, so that a row's bits do not depend on how many others came with it."""
    return f(x) if len(x) >= 16 else f(F.pad(x, (0, 0, 0, 16 - len(x))))[: len(x)]


# ---------------------------------------------------------------------------------------------- training


def replace(path: Path, write):
    """Make `path` (a file or a folder) whole or not at all: write(beside it), fsync, rename, fsync of the folder."""
    path, beside = Path(path), Path(f"{path}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
    except (
        RuntimeError,
        SafetensorError,
    ) as e:  # how torch and safetensors say that the disk is full
        raise OSError(errno.EIO, f"not written ({str(e).splitlines()[0]})", str(path)) from e
    for p in (*beside.rglob("*"), beside) if beside.is_dir() else [beside]:
        _fsync(p)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(beside, path)
    _fsync(path.parent)


def _fsync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fit(
    modules,
    batches,
    prepare,
    loss,
    work: Path,
    lr: float,
    save_every: int,
    warmup=0.05,
    clip=1.0,
    name=str,
):
    """One optimiser step (AdamW, gradient norm clipped to `clip`) a batch; resumes exactly from `work`.

    modules   {name: torch.nn.Module} to train; batches: what step i trains on, a list fixed by the stage's seed
    prepare   batch -> list of argument tuples, one a pack; runs in a thread while the step before it computes
    loss      (*arguments) -> (the pack's share of the batch's mean loss, {metric: sum over the pack}); shares add up, so
              the gradient does not depend on how a batch was cut into packs (batch 8 x 1 = 1 x 8)
    name      batch -> what to call it in the report on a loss that is not finite
    The rate rises over the first `warmup` share of the steps and then falls linearly to a tenth.
    `work` holds the two newest checkpoints and metrics.jsonl, a line a step; seconds go to timing.jsonl apart.
    """
    work.mkdir(parents=True, exist_ok=True)
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    saved = sorted(work.glob("step-*.pt"))
    size = 3 * sum(p.numel() * p.element_size() for p in parameters)  # weights and two moments
    need = (3 - len(saved)) * size  # two kept, one new
    if shutil.disk_usage(work).free < need:
        raise UserError(
            f"{work}: checkpoints need {need / 1e9:.1f} GB of disk; make room or choose another --out"
        )
    optimiser = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
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
        first = state["step"]
        print(f"resuming {work} at step {first} of {len(batches)}")
    lines = log.read_text().splitlines(keepends=True)[:first] if first else []
    replace(log, lambda p: p.write_text("".join(lines)))

    with (
        ThreadPoolExecutor(1) as ahead,
        log.open("a") as metrics,
        (work / "timing.jsonl").open("a") as timing,
    ):
        packs = ahead.submit(prepare, batches[first]) if first < len(batches) else None
        for i in tqdm(
            range(first, len(batches)),
            initial=first,
            total=len(batches),
            disable=None,
            desc=work.stem,
        ):
            begin, work_items = perf_counter(), packs.result()
            if i + 1 < len(batches):
                packs = ahead.submit(prepare, batches[i + 1])
            rate = min((i + 1) / max(1, warmup * len(batches)), 1 - 0.9 * i / len(batches), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            sums = {"loss": 0.0}
            for arguments in work_items:
                share, parts = loss(*arguments)
                share.backward()
                for key, value in {"loss": share.detach(), **parts}.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
            if not np.isfinite([norm, *sums.values()]).all():
                bad = work / "non_finite.json"
                bad.write_text(
                    json.dumps(
                        {"step": i, "batch": name(batches[i]), "norm": str(norm), "sums": str(sums)}
                    )
                )
                raise UserError(
                    f"step {i}: loss or gradient is not finite; the batch is in {bad}; try a lower --lr"
                )
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            metrics.write(json.dumps({"step": i, **sums, "norm": norm, "lr": lr * rate}) + "\n")
            timing.write(json.dumps({"step": i, "seconds": perf_counter() - begin}) + "\n")
            if (i + 1) % save_every == 0 or i + 1 == len(batches):
                metrics.flush()
                os.fsync(metrics.fileno())
                state = {
                    "step": i + 1,
                    "modules": {k: m.state_dict() for k, m in modules.items()},
                    "optimiser": optimiser.state_dict(),
                    "rng": torch.get_rng_state(),
                }
                replace(work / f"step-{i + 1:08d}.pt", lambda p: torch.save(state, p))
                for old in sorted(work.glob("step-*.pt"))[:-2]:
                    old.unlink()
