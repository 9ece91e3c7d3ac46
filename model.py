"""The language model of every stage: packing, attention, log-probs, advantages, the training loop.

Read from top to bottom:
  LM                any Hugging Face decoder with its tokenizer; prompts; where steps end
  pack_trees        step trees -> one row of tokens; `end` is causal and tree mask at once
  attend            the attention of every model; a pack or a cache decides who sees whom
  linear_logprobs   log-probs from hidden states without holding [tokens, vocabulary]
  step_logprobs, step_values, step_advantages   the three quantities of the paper, a number a step
  join, shard       several cards (torchrun, FSDP2), or one with the host's memory
  fit               the training loop: accumulation, NaN check, metrics, exact resume
  memory            what a model needs in every stage: python model.py MODEL --cards 8 --memory 80

Sizes: N tokens of a pack, M scored nodes, S states, B rows of a batch, T columns, V vocabulary,
d width, L layers, G key/value heads, R query heads a key/value head, D head size, K gathered keys or
(eq. 13) actions.
"""

import errno
import functools
import json
import os
import random
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import MISSING, field
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# A stage's lines are the only ones on the screen, whoever loads or saves a model in it.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BLOCK = 64  # queries that share one gathered key set
FLEX = 128  # flex_attention takes queries and keys in multiples of this


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend; exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as a line of ours has room for it."""
    return str(error).strip().split("\n")[0]


def cause(error) -> str:
    """What went wrong in the first process that torch.distributed.checkpoint found failing."""
    return first_line(next(iter(error.failures.values()))[0])


def flag(help: str, default=MISSING):
    """A field of a stage's Settings: its line in --help, and the paper's value."""
    return field(default=default, metadata={"help": help})


class Progress(tqdm):
    """A bar in a terminal; in a log a line a minute: done of all, tokens/s, time left."""

    def __init__(self, what: str, total: int, unit: str = "problems", initial: int = 0):
        self.tokens = 0
        form = {"desc": what, "total": total, "unit": f" {unit}", "initial": initial}
        form["disable"] = rank() > 0
        if not sys.stderr.isatty():
            line = "{desc}: {n_fmt} of {total_fmt}{unit}{postfix}, {remaining} left"
            form |= {"bar_format": line, "delay": 60, "mininterval": 60, "maxinterval": 60}
        super().__init__(**form)

    @staticmethod
    def status_printer(file):
        """tqdm's way to write: over the last line in a terminal, a line of its own elsewhere."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: text.strip() and print(text.strip(), file=file, flush=True)

    def close(self):
        self.disable |= not sys.stderr.isatty()  # no last line of blanks
        super().close()

    def add(self, tokens: int):
        """Tokens were drawn or trained on; shown when it is time."""
        if self.disable:
            return
        self.tokens += tokens
        now = self._time()
        rate = self.tokens / max(1e-9, now - self.start_t)
        self.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        if now - self.last_print_t >= self.mininterval and now - self.start_t >= self.delay:
            self.last_print_t = now
            self.refresh()


# ------------------------------------------------------------ the language model


class LM:
    """A decoder and its tokenizer, from a Hugging Face folder or hub id.

    dtype: what it computes in, by default bfloat16 on CUDA and float32 on the CPU. train=True holds
    the weights in float32 all the same (bfloat16 cannot hold AdamW's updates at the paper's
    learning rates) and computes by autocast. weights=False loads tokenizer and config alone, for
    stages whose draws come from a server. checkpointed: of a trained model on CUDA the layers are
    computed twice, which saves memory. Raises UserError for what cannot work: no tokenizer, no EOS,
    no line break, attention that a tree mask would break.
    """

    def __init__(
        self,
        path,
        train=False,
        device: str | None = None,
        dtype="",
        weights=True,
        checkpointed=True,
    ):
        # Registered here and not on import: it takes seconds, and a complete stage should say so
        # at once.
        transformers.AttentionInterface.register("dapo", attend)
        self.path = str(path)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("bfloat16" if self.device == "cuda" else "float32")
        if dtype not in ("bfloat16", "float32"):
            raise UserError(f"--dtype {dtype}: wanted bfloat16 or float32")
        self.in_bfloat16 = dtype == "bfloat16"
        self.model = None
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            self.config = transformers.AutoConfig.from_pretrained(path).get_text_config()
            if weights:
                self._load(torch.float32 if train else getattr(torch, dtype))
                self.generation = self.model.generation_config
            else:
                self.generation = transformers.GenerationConfig.from_model_config(self.config)
                if (Path(path) / "generation_config.json").exists():
                    self.generation = transformers.GenerationConfig.from_pretrained(path)
                elif not Path(path).is_dir():
                    with suppress(OSError):  # many a model of the hub has none
                        self.generation = transformers.GenerationConfig.from_pretrained(path)
        except torch.OutOfMemoryError as e:
            raise UserError(f"{path}: the weights do not fit on this GPU, or others use it") from e
        except Exception as e:  # a broken folder raises all kinds; the user needs one line
            raise UserError(f"{path}: not a model folder with a tokenizer ({first_line(e)})") from e
        self._read_tokenizer()
        self.may_capture = self.device == "cuda"  # may sampling capture CUDA graphs (sample.Slots)
        # Whether flex_attention does what the gathered form does. None: it is tried at the first
        # pack, so that stages which only draw need not wait until it is compiled.
        self.flex = False
        if weights:
            self._refuse_other_attention()
            self.flex = None if self.device == "cuda" else False
        if weights and train:
            self._refuse_dropout()
            if checkpointed and self.device == "cuda":
                self.checkpoint_layers()

    def _load(self, dtype: torch.dtype):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            self.path, dtype=dtype, attn_implementation="dapo", output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"no {min(report['missing_keys'])} in the weights")
        self.model = model.to(self.device).eval()
        self.decoder, self.config = model.base_model, model.config.get_text_config()
        self.scale = getattr(self.config, "logit_scale", None) or 1.0
        self.scale /= getattr(self.config, "logits_scaling", None) or 1.0
        self.softcap = getattr(self.config, "final_logit_softcapping", None)

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight  # (V, d)

    @property
    def own_eos(self) -> int:
        """Of several EOS ids the one that the tokenizer's chat template ends with."""
        own = self.tokenizer.eos_token_id
        return own if own in self.eos else self.eos[0]

    @property
    def max_length(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    def _read_tokenizer(self):
        """breaks[id]: the token's text has a line break; blank[id]: white space or special."""
        eos = self.generation.eos_token_id
        if eos is None or eos == []:
            eos = self.tokenizer.eos_token_id
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
        apart = []
        for _, v in pack.owner:
            alone = tree._replace(score=[False, v == 1, v == 2])
            apart.append(step_logprobs(self, *pack_trees([alone], 99)))
        if not together.isfinite().all():
            raise UserError(f"{self.path}: its log-probs are no numbers; train it anew")
        if not torch.allclose(together, torch.cat(apart), atol=0.5 if self.in_bfloat16 else 1e-3):
            raise UserError(f"{self.path}: {kind} ignores a tree mask, so it cannot be used")
        ids, pos = pack.ids[None].to(self.device), pack.pos[None].to(self.device)
        view = TreeView(pack, self.device)
        with self._autocast():
            own = self.model(input_ids=ids, position_ids=pos, use_cache=False, view=view).logits[0]
        difference = (own - self.logits(self.hidden(ids, pos, view)[0])).abs().max()
        if difference > (0.1 if self.in_bfloat16 else 1e-3) * own.abs().max():
            raise UserError(f"{self.path}: {kind} scales its logits in a way that is not supported")

    def _refuse_dropout(self):
        """The model stays in eval mode, so that the log-ratio starts at exactly 0. A config with
        dropout is refused rather than trained without it unasked."""
        names = []
        for name, value in self.config.to_dict().items():
            of_a_classifier = name.startswith(("summary", "classifier"))
            if "drop" in name and isinstance(value, float) and value and not of_a_classifier:
                names.append(name)
        if names:
            wrong = f"its config has dropout ({', '.join(names)}), training has none"
            raise UserError(f"{self.path}: {wrong}; set it to 0.0 there")

    def checkpoint_layers(self):
        """Keep of each layer its input alone and compute the rest again in the backward pass: of
        8,192 tokens of an 8B model 4 GB in place of 65. The gradients are the same to the last bit.

        Hugging Face's own switch acts in train mode only, and the model stays in eval mode; so
        layers are wrapped here.
        """
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for layer in decoder_layers(self.model):
            layer.forward = functools.partial(again, layer.forward)

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
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.own_eos]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def step_ends(self, ids: list[int]) -> list[int]:
        """Offsets one past each step's last token; the last is len(ids) (section 3).

        A step ends after a token whose text has a line break. A step of white space alone belongs
        to the one before it (at the very start, where there is none, to the one after it).
        "5 + 3 = 8\\n" "\\n" "So 8.\\n" EOS -> two steps; the blank line joins the first.

        The one place that cuts responses: a fork that cuts at blank lines or every 32 tokens
        replaces what is below the first two lines, by `return [*range(32, len(ids), 32), len(ids)]`,
        and samples anew.
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
        """bfloat16 products where the weights are held in float32; elsewhere the weights already
        have the dtype that they compute in.

        A pass uses each weight once, so to keep its rounded copy would only cost memory.
        """
        enabled = self.in_bfloat16 and self.head.dtype is torch.float32
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def hidden(self, ids: torch.Tensor, pos: torch.Tensor, view) -> torch.Tensor:
        """Last hidden states (B, T, d) of ids (B, T) at positions (B, T); `view`: who sees whom."""
        with self._autocast():
            out = self.decoder(input_ids=ids, position_ids=pos, use_cache=False, view=view)
        return out.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of hidden states (B, d), in float32."""
        head, in_bfloat16 = _wide(self.head.to(hidden.dtype)), hidden.dtype is torch.bfloat16
        z = _matmul32(_wide(hidden), head.T, in_bfloat16) * self.scale  # (B, V)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def with_weights(self, function):
        """function(), with all weights gathered. Where they are sharded it runs as a method of the
        model (see `shard`), since only that gathers them."""
        return self.model.with_weights(function) if is_sharded(self.model) else function()

    def save(self, folder: Path):
        """Write a Hugging Face folder; of several processes the first one writes."""
        state = whole_state(self.model)
        if rank() > 0:
            return
        try:
            self.model.generation_config.validate(strict=True)
        except ValueError:  # a temperature without do_sample, which may be loaded but not saved
            self.model.generation_config.do_sample = True
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)


def decoder_layers(model) -> list[torch.nn.Module]:
    """The layers of a Hugging Face decoder, which one calls `layers` and another `h`."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes seconds

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


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
    needed = list(tree.score)  # a node is needed if it or anything below it is scored
    children = [[] for _ in tree.ids]
    for v in range(len(tree.ids) - 1, 0, -1):
        needed[tree.parent[v]] |= needed[v]
        children[tree.parent[v]].append(v)
    runs, inside, size = [], set(), budget  # "full", so that the first node opens a run
    stack = [0] if needed[0] else []
    while stack:
        v = stack.pop()
        stack += [child for child in children[v] if needed[child]]
        if size + len(tree.ids[v]) > budget:
            runs.append([])
            inside, size = set(), 0
        path, u = [(v, tree.score[v])], tree.parent[v]
        while u >= 0 and u not in inside:
            path.append((u, False))
            u = tree.parent[u]
        for u, scored in reversed(path):
            runs[-1].append((u, scored))
            inside.add(u)
            size += len(tree.ids[u])
    # A run of ancestors alone is left where the next node did not fit behind them.
    return [run for run in runs if any(scored for _, scored in run)]


def pack_trees(trees: list[Tree], budget: int, align: int = 1) -> list[Pack]:
    """Packs of about `budget` tokens that score every node asked for; like lengths go together.

    align: each tree starts at a multiple of it. With align=BLOCK a tree's numbers do not depend,
    even in the last bit, on what else is in its pack (on the CPU): exact resume relies on it.
    """
    pieces = [(t, run) for t, tree in enumerate(trees) for run in _fragments(tree, budget)]
    sizes = [sum(len(trees[t].ids[v]) for v, _ in run) for t, run in pieces]
    groups, size = [], budget  # "full", so that the first piece opens a group
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        room = -(-sizes[i] // align) * align
        if size + room > budget:
            groups.append([])
            size = 0
        groups[-1].append(pieces[i])
        size += room
    return [_pack(trees, group, align) for group in groups]


def _pack(trees: list[Tree], group: list[tuple[int, list]], align: int) -> Pack:
    """One pack of a group of (tree, run of _fragments).

    A prompt of 2 tokens [7, 8] and two children of one token each, 5 and 6, without the padding:
    ids [7, 8, 5, 6], pos [0, 1, 2, 2], end [4, 4, 3, 4], prev [-1, 0, 1, 1].
    """
    # The table of nodes, in depth-first order: token ids, parent's row, index among the scored.
    ids, up, scored_as, owner, size = [], [], [], [], 0

    def pad(unit: int):
        """Fill up with roots of one token, which see themselves alone: no row is all masked."""
        nonlocal size
        for _ in range(-size % unit):
            ids.append([0])
            up.append(-1)
            scored_as.append(-1)
            size += 1

    for t, run in group:
        row_of = {-1: -1}
        for v, scored in run:
            row_of[v] = len(ids)
            ids.append(trees[t].ids[v])
            up.append(row_of[trees[t].parent[v]])
            scored_as.append(len(owner) if scored else -1)
            size += len(ids[-1])
            if scored:
                owner.append((t, v))
        pad(align)
    pad(BLOCK)

    # What each node has of its own: where it ends, where its subtree ends, how deep it starts.
    length, up = np.array([len(x) for x in ids]), np.array(up)  # (nodes,)
    stop, depth = np.cumsum(length), np.zeros(len(ids), int)
    for i in np.flatnonzero(up >= 0):  # parents come before their children
        depth[i] = depth[up[i]] + length[up[i]]
    end = stop.copy()
    for i in np.flatnonzero(up >= 0)[::-1]:
        end[up[i]] = max(end[up[i]], end[i])
    before = np.where(up < 0, -1, stop[up] - 1)  # the last token of the parent

    # The tokens: a node's numbers repeated, and the offset within the node.
    token = np.arange(size)
    offset = token - np.repeat(stop - length, length)
    prev = np.where(offset == 0, np.repeat(before, length), token - 1)
    node = np.repeat(scored_as, length)
    last = stop[np.array(scored_as) >= 0] - 1
    columns = (np.concatenate(ids), np.repeat(depth, length) + offset, np.repeat(end, length))
    return Pack(*[torch.from_numpy(x) for x in (*columns, prev, node, last)], owner)


# ------------------------------------------------------------ attention


def attend(module, query, key, value, attention_mask=None, scaling=None, view=None, **kwargs):
    """The attention of every model; query (B, G * R, T, D), key and value (B, G, T, D).

    `view` (TreeView here, CacheView in sample.py) comes through the model's own forward.
    """
    odd = view is None or key.shape != value.shape
    if odd or kwargs.get("softcap") or kwargs.get("sliding_window"):
        what = "a soft-cap, a sliding window, values of another size, or hides the mask"
        raise UserError(f"{type(module).__name__} has {what}: it cannot be packed")
    return view(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


def on_cuda(x: torch.Tensor) -> bool:
    """Which form of a kernel is for this tensor: tests replace this and run CUDA's on the CPU."""
    return x.is_cuda


def grouped_attention(query, key, value, bias, scaling):
    """softmax(q k' * scaling + bias) v; q (..., Q, D), k and v (..., K, D), bias (..., Q, K).

    The sizes before broadcast: blocks, G and R of a pack, B and G of a cache.

    Written out on purpose: on the CPU as fast as the fused kernel and, unlike it, the same bits for
    a row whatever the batch and however many masked columns follow. On CUDA scores are float32, as
    inside the fused kernels.
    """
    if on_cuda(query):
        with torch.autocast(query.device.type, enabled=False, cache_enabled=False):
            scores = (query.float() * scaling) @ key.float().transpose(-1, -2) + bias
    else:
        scores = (query * scaling) @ key.transpose(-1, -2) + bias
    high = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=high).to(value.dtype) @ value


class TreeView:
    """Who sees whom in a pack: j <= i < end[j].

    Gathered, on every device: each block of queries gathers just the keys that any of them may see
    (its path and itself), so the cost grows with depth, not with the pack. flex=True, on CUDA:
    flex_attention skips the blocks that the same rule leaves empty. remember=True keeps each
    layer's keys and values for the sampler.
    """

    def __init__(self, pack: Pack, device: str, remember: bool = False, flex: bool = False):
        self.layers = [] if remember else None  # (key, value), each (G, N, D), a layer
        self.flex = flex
        if flex:
            self.block_mask = _block_mask(_padded_ends(pack.end).to(device))
            return
        end, tokens, sets = pack.end.numpy(), len(pack.end), []
        for a in range(0, tokens, BLOCK):
            sets.append(np.append(np.flatnonzero(end[:a] > a), np.arange(a, a + BLOCK)))
        width = -(-max(map(len, sets)) // 16) * 16
        table = np.full((len(sets), width), tokens)  # (blocks, K) keys of a block; `tokens`: none
        for row, keys in zip(table, sets):
            row[: len(keys)] = keys
        i, j = np.arange(tokens).reshape(-1, BLOCK, 1), table[:, None]
        seen = torch.from_numpy((j <= i) & (i < np.append(end, 0)[j]))
        self.table = torch.from_numpy(np.minimum(table, tokens - 1)).to(device)
        # (blocks, 1, 1, BLOCK, K)
        self.bias = torch.where(seen, 0.0, -torch.inf)[:, None, None].to(device)

    def __call__(self, layer, query, key, value, scaling):
        if self.layers is not None:
            self.layers.append((key[0].detach(), value[0].detach()))
        if self.flex:
            return flex_tree_attention(query, key, value, self.block_mask, scaling)
        groups, size, (blocks, width) = key.shape[1], key.shape[3], self.table.shape
        q = query[0].view(groups, -1, blocks, BLOCK, size)  # (G, R, blocks, BLOCK, D)
        shape = (groups, blocks, 1, width, size)
        k = key[0].index_select(1, self.table.view(-1)).view(shape)
        v = value[0].index_select(1, self.table.view(-1)).view(shape)
        q, k, v = q.permute(2, 0, 1, 3, 4), k.transpose(0, 1), v.transpose(0, 1)
        out = grouped_attention(q, k, v, self.bias, scaling)
        return out.permute(1, 2, 0, 3, 4).reshape(query.shape)


def _padding(size: int) -> int:
    """How many tokens fill a pack up to a multiple of FLEX, and to two: of one block torch would
    compile another kernel than of many."""
    return max(-size % FLEX, 2 * FLEX - size)


def _padded_ends(end: torch.Tensor) -> torch.Tensor:
    """`end` of a pack filled up by tokens that see themselves alone."""
    more = torch.arange(len(end), len(end) + _padding(len(end)))
    return torch.cat([end, more + 1])


def _block_mask(end: torch.Tensor):
    """The blocks of a pack in which some token sees some other, for flex_attention."""
    rule = lambda b, h, i, j: (j <= i) & (i < end[j])
    return _flex()[1](rule, None, None, len(end), len(end), device=end.device)


def flex_tree_attention(query, key, value, block_mask, scaling):
    """flex_attention on a pack: query (1, G * R, N, D), key and value (1, G, N, D).

    A query under 128 tokens would go to another kernel (flex_decoding), which finds no block for
    some head counts; so tokens are filled up and the kernel is named. Under autocast rotary
    positions leave query and key in float32, and torch 2.11 does not cast them here; nothing is
    left for autocast to do then, and torch would compile once more for each of its states.
    """
    size, more = query.shape[2], _padding(query.shape[2])

    def filled(x):  # of one dtype and one layout too: each other one would be compiled anew
        return F.pad(x.to(value.dtype), (0, 0, 0, more)).contiguous()

    with torch.autocast(query.device.type, enabled=False, cache_enabled=False):
        out = _flex()[0](
            filled(query), filled(key), filled(value), block_mask=block_mask, scale=scaling,
            enable_gqa=True, kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )  # fmt: skip
    return out[:, :, :size]


@functools.cache
def _flex():
    """(flex_attention, create_block_mask), compiled once for all sizes; only CUDA comes here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Beyond its limit of recompilations torch would run flex_attention unfused, with all scores in
    # memory (8.6 GB at 8,192 tokens), and say nothing. fullgraph makes that an error, in the
    # backward pass's own threads too.
    fused = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return fused, torch.compile(create_block_mask, dynamic=True)


def head_sizes(config) -> tuple[int, int, int]:
    """(query heads, key/value heads, size of a head) by a model's config."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def flex_agrees(lm: LM) -> bool:
    """Does flex_attention give what the gathered form gives, forward and backward, for this model's
    heads? If not, or where it cannot run, the gathered form goes on, with one line of warning."""
    heads, groups, size = head_sizes(lm.config)
    dtype = torch.bfloat16 if lm.in_bfloat16 else torch.float32
    tolerance = 3e-2 if lm.in_bfloat16 else 1e-4
    rng = torch.Generator().manual_seed(0)
    try:
        for tokens in (128, 256, 1024):
            part = tokens // 4
            tree = Tree([[1] * part] * 4, [-1, 0, 0, 2], [True] * 4)
            (pack,) = pack_trees([tree], tokens)
            shapes = [(1, heads, tokens, size)] + [(1, groups, tokens, size)] * 2
            inputs = []
            for shape in shapes:
                x = torch.randn(shape, generator=rng).to(lm.device, dtype)
                inputs.append(x.requires_grad_())
            found = []
            for flex in (False, True):
                view = TreeView(pack, lm.device, flex=flex)
                with torch.enable_grad():  # whoever asks first may not need gradients
                    out = view(0, *inputs, size**-0.5)
                    found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
            for expected, fused in zip(*found):
                expected, fused = expected.detach().float(), fused.detach().float()
                difference = float((expected - fused).abs().max())
                if not difference <= tolerance * max(1.0, float(expected.abs().max())):
                    raise ValueError(f"{tokens} tokens differ by {difference:.1g}")
    except Exception as e:  # noqa: BLE001  whatever a GPU's software does, numbers are right
        if rank() == 0:
            wrong = "flex_attention is not used, a slower and larger form is"
            wrong = f"{lm.path}: {wrong} ({first_line(e)})"
            print(f"warning: {wrong}", file=sys.stderr)
        return False
    return True


def row_bytes(config, columns: int, itemsize: int) -> int:
    """Bytes of the keys and values of one row of `columns` tokens, all layers."""
    _, groups, size = head_sizes(config)
    return 2 * config.num_hidden_layers * groups * size * columns * itemsize


# ------------------------------------------------------------ log-probs and values


def _wide(x):
    """What `_matmul32` takes: on the CPU bfloat16 numbers are written in float32, without loss."""
    return x if on_cuda(x) else x.to(torch.promote_types(x.dtype, torch.float32))


def _matmul32(a, b, in_bfloat16: bool):
    """a (n, k) @ b (k, m) with sums in float32 at least; in_bfloat16: of bfloat16 numbers.

    The one place where CPU and CUDA multiply differently: CUDA takes bfloat16 and gives float32, the
    CPU takes the same numbers written in float32 and may use its bfloat16 units for them.
    """
    if not in_bfloat16:
        return a @ b
    if on_cuda(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return a @ b
    finally:
        matmul.fp32_precision = before


def _largest_block(x) -> tuple[int, int]:
    """(tokens, vocabulary) of the logits that exist at once: what was fast on CPUs, and on an H200."""
    return (4096, 16384) if on_cuda(x) else (2048, 2048)


def _running_sum(z, top, total):
    """Running maximum (n,), and running sum of exp(logit - maximum), with one more block of logits
    z (n, v)."""
    new = torch.maximum(top, z.amax(-1))
    return new, total * (top - new).exp() + (z - new[:, None]).exp_().sum(-1)


def _softmax_times(z, lse, factor, dtype: torch.dtype):
    """factor * softmax of a block of logits z (n, v), in float32 until it is rounded to dtype."""
    return ((z - lse[:, None]).exp_().mul_(factor)).to(dtype)


@functools.cache
def _one_kernel(function):
    """`function`, compiled to a kernel that reads each logit once; only CUDA comes here. Operator by
    operator most of the time is spent on passes over the logits. Where torch cannot compile, the
    operators go on, with one line of warning."""
    compiled = torch.compile(function, dynamic=True)

    def run(*arguments):
        nonlocal compiled
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as e:
            wrong = f"log-probs are slower, torch cannot compile here ({first_line(e)})"
            print(f"warning: {wrong}", file=sys.stderr)
            compiled = function
            return function(*arguments)

    return run


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, softcap):
        high = torch.promote_types(hidden.dtype, torch.float32)
        top = hidden.new_full((len(hidden),), -torch.inf, dtype=high)  # running maximum
        total = torch.zeros_like(top)  # running sum of exp(logit - top)
        target = torch.zeros_like(top)  # the target's logit
        in_bfloat16, wide = hidden.dtype is torch.bfloat16, _wide(hidden)
        tokens, vocabulary = _largest_block(hidden)
        running_sum = _one_kernel(_running_sum) if on_cuda(hidden) else _running_sum
        for w, first in _chunks(weight, vocabulary):
            for h, row in _chunks(wide, tokens):
                z = _times(_matmul32(h, w.T, in_bfloat16), scale)
                if softcap is not None:
                    z = softcap * torch.tanh(z / softcap)
                rows = slice(row, row + len(h))
                local = targets[rows] - first
                inside = (local >= 0) & (local < len(w))
                own = z.gather(1, local.clamp(0, len(w) - 1)[:, None])[:, 0]
                target[rows] += torch.where(inside, own, 0)
                top[rows], total[rows] = running_sum(z, top[rows], total[rows])
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
        in_bfloat16, wide = hidden.dtype is torch.bfloat16, _wide(hidden)
        tokens, vocabulary = _largest_block(hidden)
        softmax_times = _one_kernel(_softmax_times) if on_cuda(hidden) else _softmax_times
        for w, first in _chunks(weight, vocabulary):
            acc = torch.zeros(w.shape, dtype=lse.dtype, device=w.device) if need_w else None
            for h, row in _chunks(wide, tokens):
                rows = slice(row, row + len(h))
                z = _times(_matmul32(h, w.T, in_bfloat16), ctx.scale)
                slope = grad[rows, None] * ctx.scale  # of logp by the product, but for the softmax
                if ctx.softcap is not None:
                    t = torch.tanh(z / ctx.softcap)
                    z, slope = ctx.softcap * t, slope * (1 - t * t)
                g = softmax_times(z, lse[rows], -slope, wide.dtype)  # (n, v)
                # The target's own entry is 1 - softmax, in float32 before any rounding.
                local = targets[rows] - first
                inside = ((local >= 0) & (local < len(w)))[:, None]
                column = local.clamp(0, len(w) - 1)[:, None]
                own = slope.expand_as(z).gather(1, column)  # (n, 1)
                entry = (z.gather(1, column) - lse[rows, None]).exp() * -own + own
                entry = torch.where(inside, entry.to(wide.dtype), g.gather(1, column))
                g.scatter_(1, column, entry)
                if need_h:
                    grad_h[rows] += _matmul32(g, w, in_bfloat16)
                if need_w:
                    acc += _matmul32(g.T, h, in_bfloat16)
            if need_w:
                grad_w[first : first + len(w)] = acc
        return grad_h.to(hidden.dtype) if need_h else None, grad_w, None, None, None


def _times(x, factor):
    """x * factor, in place; nearly every model's factor is 1, which need not read x again."""
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def _chunks(x, size):
    """Blocks of `size` rows, each with the number of its first row."""
    for first in range(0, len(x), size):
        yield _wide(x[first : first + size]), first


def linear_logprobs(hidden, weight, targets, scale: float = 1.0, softcap: float | None = None):
    """log softmax(hidden @ weight')[targets] without ever holding [N, V].

    hidden (N, d), weight (V, d) of one dtype, targets (N,) int64 -> (N,) float32 (or float64). An
    online logsumexp over vocabulary chunks; backward recomputes them. The model's logit transforms:
    softcap * tanh(scale * logit / softcap).
    """
    return _LinearLogprobs.apply(hidden, weight, targets, scale, softcap)


def pack_hidden(lm: LM, pack: Pack, view: TreeView | None = None) -> torch.Tensor:
    """Last hidden states (N, d) of a pack's tokens, every path at once."""
    return lm.with_weights(lambda: _pack_hidden(lm, pack, view))[0]


def _pack_hidden(lm: LM, pack: Pack, view: TreeView | None = None) -> torch.Tensor:  # (1, N, d)
    if not 0 <= int(pack.ids.min()) <= int(pack.ids.max()) < lm.config.vocab_size:
        wrong = f"token {int(pack.ids.max())} is asked for, of {lm.config.vocab_size}"
        raise UserError(f"{lm.path}: {wrong}: the records are of another tokenizer")
    if view is None:
        if lm.flex is None:
            lm.flex = flex_agrees(lm)
        view = TreeView(pack, lm.device, flex=lm.flex)
    ids, pos = pack.ids[None].to(lm.device), pack.pos[None].to(lm.device)
    return lm.hidden(ids, pos, view)


def step_logprobs(lm: LM, pack: Pack) -> torch.Tensor:
    """log pi(a | s) of every scored node: the sum over its tokens, EOS included (eq. 12). (M,)"""
    # A prompt's first token has none before it, so it has no log-prob.
    token = ((pack.node >= 0) & (pack.prev >= 0)).nonzero()[:, 0]
    source, target = pack.prev[token].to(lm.device), pack.ids[token].to(lm.device)

    def token_logprobs():
        hidden = _pack_hidden(lm, pack)[0]
        if lm.in_bfloat16:  # autocast leaves the last norm in float32
            hidden = hidden.bfloat16()
        head = lm.head.to(hidden.dtype)
        return linear_logprobs(hidden[source], head, target, lm.scale, lm.softcap)

    logp = lm.with_weights(token_logprobs)
    sums = torch.zeros(len(pack.owner), dtype=logp.dtype, device=lm.device)
    return sums.index_add(0, pack.node[token].to(lm.device), logp)


def step_values(lm: LM, value_head: torch.nn.Linear, pack: Pack) -> torch.Tensor:
    """Logit of V(s) of every scored node, read at the state's last token (eq. 15). (M,)"""
    return value_head(pack_hidden(lm, pack)[pack.last.to(lm.device)].float())[:, 0]


def step_advantages(q, parent, draws, value=None, value_draws: float = 0.0):
    """Eq. 13, A(s, a) = Q(s, a) - 1/m sum_j Q(s, a_j), for every action of every state at once.

    q (K,) value of each action, parent (K,) its state in 0 .. S-1, draws (K,) how often it was
    drawn there: duplicates count in the mean, since it estimates E_{a ~ pi_ref} Q.
    -> adv (K,), mean (S,), gap (S,) = max A - min A (appendix F.1).

    One state, q = [1, 0, .5], draws [1, 2, 1]: mean = 1.5 / 4 = .375, adv = [.625, -.375, .125].

    Not in the paper: value (S,), the states' own V, another estimate of the mean. It counts as
    value_draws more draws, and in the gap as one more action, so that the only action of a state
    has an advantage too: q = [1], draws [1], value [.5], value_draws 1 -> mean .75, adv [.25].
    """
    states = int(parent.max()) + 1
    total = q.new_zeros(states).index_add(0, parent, q * draws)
    count = q.new_zeros(states).index_add(0, parent, draws.to(q.dtype))
    high, low = q.new_full((states,), -torch.inf), q.new_full((states,), torch.inf)
    if value_draws:  # V(s) stands for value_draws more draws, and for one more action in the gap
        total = total + value_draws * value
        count = count + value_draws
        high = low = value
    mean = total / count
    high = high.scatter_reduce(0, parent, q, "amax")
    low = low.scatter_reduce(0, parent, q, "amin")
    return q - mean[parent], mean, high - low


# ------------------------------------------------------------ several processes
#
# torchrun starts a process a card: `torchrun --nproc-per-node 8 train_actor.py ...`. Each runs the
# whole script; weights, gradients and moments are sharded (FSDP2), packs are shared out, and the
# first process alone speaks and writes. Without torchrun nothing of this happens.


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(offload: bool = False):
    """Meet the other processes; offload: a group of one, which CPUOffloadPolicy needs too."""
    if dist.is_initialized() or (world() == 1 and not offload):
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world() == 1 else {}
    dist.init_process_group(backend, **alone)


def leave():
    """Part from the other processes; gloo's threads would otherwise end some with an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all():
    if world() > 1 and dist.is_initialized():
        dist.barrier()


def own_share(items: list) -> list[tuple]:
    """(item, True) of this process's share. (items[0], False) fills up: of sharded weights every
    process must run equally many passes, and the result of this one is not used."""
    share = [(item, True) for item in items[rank() :: world()]]
    missing = -(-len(items) // world()) - len(share)
    if missing:  # never of no items at all
        share += [(items[0], False)] * missing
    return share


def from_all(items: list) -> list:
    """The items of all processes, joined."""
    if world() == 1:
        return items
    everyone = [None] * world()
    dist.all_gather_object(everyone, items)
    return [item for own in everyone for item in own]


def is_sharded(module) -> bool:
    if not dist.is_initialized():  # the import below takes a while
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def shard(lm: LM, value_head: torch.nn.Module | None = None, offload: bool = False):
    """Shard a model's weights over the processes, each decoder layer and then the rest; value_head:
    the critic's, too. offload: weights, gradients and moments lie in the host's memory.

    What uses weights outside the layers (embedding, last norm, the vocabulary products) runs inside
    `LM.with_weights`, for which they are gathered; so tied embeddings stay one parameter.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(lm.device, (world(),), mesh_dim_names=("shard",))
    narrow = torch.bfloat16 if lm.in_bfloat16 else None
    place = CPUOffloadPolicy(torch.cuda.is_available()) if offload else OffloadPolicy()
    flags = {"mesh": mesh, "offload_policy": place}
    precise = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
    flags["reshard_after_forward"] = not offload  # offloaded weights go up once a step, not a pack
    for layer in decoder_layers(lm.model):
        fully_shard(layer, mp_policy=precise, **flags)
    fully_shard(lm.model, mp_policy=precise, **flags)
    lm.model.with_weights = types.MethodType(lambda model, function: function(), lm.model)
    register_fsdp_forward_method(lm.model, "with_weights")
    sharded = [lm.model]
    if value_head is not None:
        sharded.append(fully_shard(value_head, **flags))
    for module in sharded:
        for part in module.modules():
            if is_sharded(part):  # the shares of a batch's mean are summed, not averaged
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        module.reshards_late = offload


def whole_state(module: torch.nn.Module) -> dict:
    """The state dict with whole tensors, on the first process; every process takes part."""
    if not is_sharded(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return {name: state[name] for name in own if name in state}  # a tied head is no second one


# ------------------------------------------------------------ training


def replace(path: Path, write):
    """Make `path`, a file or a folder, whole or not at all: write beside, fsync, rename, fsync."""
    path, beside = Path(path), Path(f"{path}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
    except (RuntimeError, SafetensorError) as e:  # torch's and safetensors' word for a full disk
        raise OSError(errno.EIO, f"not written ({first_line(e)})", str(path)) from e
    put_in_place(beside, path)


def put_in_place(beside: Path, path: Path):
    """fsync what was written beside, then give it its name."""
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


class Checkpoints:
    """The two newest checkpoints of a training run: a file each, of several processes a folder
    each (torch.distributed.checkpoint), which any number of processes can read again."""

    def __init__(self, work: Path, modules: dict, optimiser):
        self.work, self.modules, self.optimiser = work, modules, optimiser
        if rank() == 0:
            for half in work.glob("step-*.new"):  # a kill while it was written
                shutil.rmtree(half) if half.is_dir() else half.unlink()
        wait_for_all()  # or the others would find no room for what is being removed
        self.sharded = any(is_sharded(module) for module in modules.values())
        files, folders = sorted(work.glob("step-*.pt")), sorted(work.glob("step-*.dcp"))
        self.saved = folders if self.sharded else files
        if not self.saved and (files or folders):
            other = "without torchrun" if self.sharded else "under torchrun, or with --offload"
            raise UserError(f"{work}: was begun {other}; go on so, or --force starts over")

    def check_disk(self):
        """Two are kept while a third is written, each of weights and two moments."""
        size = 0
        for module in self.modules.values():
            size += 3 * sum(p.numel() * p.element_size() for p in module.parameters())
        need = (3 - len(self.saved)) * size
        if shutil.disk_usage(self.work).free < need:
            raise UserError(f"{self.work}: checkpoints need {need / 1e9:.1f} GB of disk; make room")
        return need

    def _sharded_state(self) -> dict:
        """Before the first step torch makes the moments by an empty step, and AdamW's count of steps
        stays at 1: so only `_load_sharded`, which overwrites both, calls it then."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        together = torch.nn.ModuleDict(self.modules)
        moments = get_optimizer_state_dict(together, self.optimiser)
        return {"modules": {k: m.state_dict() for k, m in self.modules.items()}, "moments": moments}

    def save(self, step: int):
        path = self.work / f"step-{step:08d}"
        if self.sharded:
            import torch.distributed.checkpoint as dcp

            path = Path(f"{path}.dcp")
            beside = Path(f"{path}.new")
            try:
                dcp.save(self._sharded_state() | {"step": step}, checkpoint_id=beside)
            except dcp.CheckpointException as e:  # no Exception: it would pass every handler
                raise OSError(errno.EIO, f"not written ({cause(e)})", str(path)) from e
            if rank() == 0:
                put_in_place(beside, path)
        else:
            path = Path(f"{path}.pt")
            state = {
                "step": step,
                "modules": {k: m.state_dict() for k, m in self.modules.items()},
                "optimiser": self.optimiser.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            }
            replace(path, functools.partial(torch.save, state))
        self.saved.append(path)
        while len(self.saved) > 2:
            old = self.saved.pop(0)
            if rank() == 0:
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def load(self) -> int:
        """Restore the newest; -> the step that comes next."""
        if not self.saved:
            return 0
        newest = self.saved[-1]
        try:
            return self._load_sharded(newest) if self.sharded else self._load_file(newest)
        except (RuntimeError, EOFError, UnpicklingError) as e:
            raise UserError(f"{newest}: broken; remove it, the one before it is used") from e

    def _load_file(self, path: Path) -> int:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        return state["step"]

    def _load_sharded(self, path: Path) -> int:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        state = self._sharded_state() | {"step": 0}
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.CheckpointException as e:
            raise RuntimeError(cause(e)) from e
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        together = torch.nn.ModuleDict(self.modules)
        set_optimizer_state_dict(together, self.optimiser, state["moments"])
        return state["step"]


def fit(modules, batches, make_packs, loss, work: Path, lr: float, save_minutes: float, name=str):
    """One optimiser step (AdamW, gradient norm clipped to 1) a batch; resumes exactly from `work`.

    modules   {name: torch.nn.Module} to train
    batches   what step i trains on, a list that the stage's seed fixes
    make_packs  batch -> a list of argument tuples, one a pack; runs in a thread, a step ahead, and
              so makes tensors of the CPU alone: another thread's GPU may be another
    loss      (*arguments) -> (the pack's share of the batch's mean loss, {metric: its sum}); shares
              add up, so gradients do not depend on how a batch is cut into packs (8 x 1 = 1 x 8)
    name      batch -> what to call it in the report on a loss that is not finite

    The rate is the lower of two lines: one rises to lr over the first 5 % of the steps, one falls from
    lr to a tenth of it over all of them. `work` holds the two newest checkpoints, one every
    `save_minutes`, and metrics.jsonl, a line a step; seconds go to timing.jsonl apart. Of several
    processes each runs its share of a batch's packs.
    """
    work.mkdir(parents=True, exist_ok=True)
    give_back_whole_weights(modules)
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    flags = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimiser = torch.optim.AdamW(parameters, lr=lr, **flags)
    checkpoints = Checkpoints(work, modules, optimiser)
    need, fresh = checkpoints.check_disk(), not checkpoints.saved
    first = checkpoints.load()
    if fresh:
        print(f"{work}: {len(batches)} steps; checkpoints take up to {need / 1e6:.0f} MB of disk")
    else:
        print(f"resuming {work} at step {first} of {len(batches)}")
    metrics, timing = Lines(work / "metrics.jsonl", first), Lines(work / "timing.jsonl", None)
    saved_at = perf_counter()
    with (
        ThreadPoolExecutor(1) as ahead,
        Progress(work.stem, len(batches), "steps", initial=first) as bar,
    ):
        packs = ahead.submit(make_packs, batches[first]) if first < len(batches) else None
        for i in range(first, len(batches)):
            begin, items = perf_counter(), packs.result()
            if i + 1 < len(batches):
                packs = ahead.submit(make_packs, batches[i + 1])
            rate = min((i + 1) / (0.05 * len(batches)), 1 - 0.9 * i / len(batches))
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            sums = {"loss": 0.0}
            own = own_share(items)
            for j, (arguments, is_used) in enumerate(own):
                synchronise(modules, last=j == len(own) - 1)
                share, numbers = loss(*arguments)
                (share if is_used else 0.0 * share).backward()
                for key, value in {"loss": share.detach(), **numbers}.items():
                    sums[key] = sums.get(key, 0.0) + float(value) * is_used
            sums = summed(sums)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if not np.isfinite([norm, *sums.values()]).all():
                bad = work / "non_finite.json"
                found = {"norm": str(norm), "sums": str(sums)}
                if rank() == 0:
                    bad.write_text(json.dumps({"step": i, "batch": name(batches[i]), **found}))
                raise UserError(f"step {i}: loss or gradient not finite, see {bad}; lower --lr")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            metrics.write({"step": i, **sums, "norm": norm, "lr": lr * rate})
            timing.write({"step": i, "seconds": perf_counter() - begin})
            bar.update()
            due = summed({"due": float(perf_counter() - saved_at > 60 * save_minutes)})["due"]
            if due or i + 1 == len(batches):
                metrics.flush()
                checkpoints.save(i + 1)
                saved_at = perf_counter()


class Lines:
    """A JSONL file that the first process writes; keep: the lines of an earlier start that stay."""

    def __init__(self, path: Path, keep: int | None):
        self.file = None
        if rank() > 0:
            return
        if keep is not None:
            old = path.read_text().splitlines(keepends=True)[:keep] if keep else []
            replace(path, lambda p: p.write_text("".join(old)))
        self.file = path.open("a", buffering=1)

    def write(self, record: dict):
        if self.file:
            self.file.write(json.dumps(record) + "\n")

    def flush(self):
        if self.file:
            os.fsync(self.file.fileno())


def give_back_whole_weights(modules: dict):
    """After passes without a backward one, offloaded weights are still whole on the card, and the
    modules' parameters are those: an optimiser made now would train copies."""
    for module in modules.values():
        for part in module.modules():
            if is_sharded(part):
                part.reshard()


def synchronise(modules: dict, last: bool):
    """With --offload weights and gradients stay on the card until a step's last pack. Otherwise the
    gradients of each pack are summed over the processes at once: kept whole until the last pack
    they would take 4 bytes a parameter of every card."""
    for module in modules.values():
        if is_sharded(module) and module.reshards_late:
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last)


def summed(sums: dict[str, float]) -> dict[str, float]:
    """Each number summed over the processes."""
    if world() == 1:
        return sums
    numbers = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(numbers)
    return dict(zip(sums, numbers.tolist()))


# ------------------------------------------------------------ memory


def memory(config, columns: int, tokens: int, rows: int, cards: int, offload: bool) -> dict:
    """Bytes that a model needs on one card, by stage and part; from its config alone.

    columns: of a row of the key/value cache (prompt and response); tokens of a pack; rows decoded
    at once. Training is in bfloat16 with checkpointed layers.
    """
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as e:
        raise UserError(f"{config.model_type}: no language model with a decoder alone") from e
    config = config.get_text_config()
    count = sum(p.numel() for p in model.parameters())
    layers, width, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads, _, size = head_sizes(config)
    queries = heads * size  # width of all query heads
    sampling = {
        "weights": 2 * count,
        "key/value cache": rows * row_bytes(config, columns, 2),
        "logits and their sums": rows * vocabulary * 20,
    }
    # On one card autocast rounds float32 weights, and the residual stream is float32.
    alone = cards == 1 and not offload
    stream = 4 if alone else 2  # bytes of a number of it
    state = 0 if offload else 16 * count // cards  # float32 weights, gradients and two moments
    if alone:
        whole_weights = 2 * layer  # of the layer that is computed, rounded
    elif offload:
        whole_weights = 6 * count  # until a step's last pack, gradients in float32 too
    else:  # of two layers, and of what is outside them; gradients, and their sum in float32
        whole_weights = 10 * layer + 8 * (count - layers * layer)
    # A layer while it is computed again: 4 bytes a number of its activations and their gradients.
    one_layer = 4 * tokens * (4 * width + 3 * queries + 4 * inner)
    # Two blocks of logits and one rounded; the head rounded, its gradient, a block's in float32; of
    # the hidden states copies and gradients.
    block = min(vocabulary, 16384)
    blocks = 10 * min(tokens, 4096) * block + 4 * width * (vocabulary + block)
    blocks += 14 * tokens * width
    training = {
        "weights, gradients, moments": state,
        "gathered weights and gradients": whole_weights,
        "layers' inputs": stream * (layers + 2) * tokens * width,  # the last norm keeps two more
        "one layer, or blocks of the vocabulary": max(one_layer, blocks),
    }
    # Each process reads the whole model, which is then sharded.
    loading = {} if alone else {"the whole weights, in float32": 4 * count}
    host = {"weights of every process, as they are loaded": 4 * count * cards}
    if offload and cards <= 4:  # then what training holds there is more
        host = {"weights, gradients, moments": 16 * count}
    disk = {"two checkpoints and a third": 3 * 12 * count, "the model folder": 4 * count}
    parts = {"sampling": sampling, "loading to train": loading, "training": training}
    return parts | {"host": host, "disk": disk}


def config_of(path: str):
    """The config of a folder or hub id; UserError if there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except Exception as e:
        raise UserError(f"{path}: not a model folder ({first_line(e)})") from e


def require_memory(path: str, tokens: int, offload: bool, card: float | None = None):
    """Refuse training that cannot fit, before anything is loaded. card: bytes of one, by default
    this machine's; without one nothing is refused."""
    if card is None and torch.cuda.is_available():
        card = torch.cuda.mem_get_info()[1]
    if card is None:
        return
    config = config_of(path)
    found = memory(config, 0, tokens, 0, world(), offload)
    without = " and without --offload" if offload else ", --offload"
    for stage, mend in (
        ("training", f"torchrun with more cards{without}, or a smaller --budget"),
        ("loading to train", "cards of more memory"),
    ):
        need = sum(found[stage].values())
        if need > 0.92 * card:
            each = f"{need / 1e9:.0f} GB of each card, which has {card / 1e9:.0f}"
            raise UserError(f"{path}: {stage} needs {each}; mend it by {mend}")
    host = sum(found["host"].values())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if host > have:
        wrong = f"training needs {host / 1e9:.0f} GB of the host's memory, which has"
        mend = "more of it, or torchrun without --offload" if offload else "fewer cards"
        raise UserError(f"{path}: {wrong} {have / 1e9:.0f}; mend it by {mend}")


def print_memory(arguments: list[str]):
    """python model.py MODEL [--cards N] [--memory GB] [--columns C] [--tokens T] [--rows R]"""
    import argparse

    parser = argparse.ArgumentParser(description="What a model needs of memory in every stage.")
    parser.add_argument("model", help="a folder or hub id; only its config is read")
    parser.add_argument("--cards", type=int, default=1, help="that training is sharded over")
    parser.add_argument("--memory", type=float, default=80.0, help="of one card")
    parser.add_argument("--columns", type=int, default=2448, help="tokens of prompt and response")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack, --budget")
    parser.add_argument("--rows", type=int, default=256, help="decoded at once, --batch")
    s = parser.parse_args(arguments)
    if min(s.cards, s.memory, s.columns, s.tokens, s.rows) <= 0:
        raise UserError("model.py: a number is not above 0")
    config = config_of(s.model)
    print(f"{s.model}, GB on each of {s.cards} card(s) of {s.memory:.0f} GB")
    for offload in (False, True):
        found = memory(config, s.columns, s.tokens, s.rows, s.cards, offload)
        for stage, parts in found.items():
            if not parts or (offload and stage in ("sampling", "disk")):
                continue
            total = sum(parts.values()) / 1e9
            title = f"{stage}, --offload" if offload else stage
            listed = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
            verdict = ""
            if stage not in ("host", "disk"):
                room = 0.92e9 * s.memory  # the rest: kernels, fragments
                mend = {"sampling": "--batch is lowered to what fits"}
                if parts.get("weights", 0) > room:
                    mend["sampling"] = "an engine on more cards"
                mend["loading to train"] = "cards of more memory"
                without = " without it" if offload else ", --offload"
                mend["training"] = f"more cards{without}, or a smaller --budget"
                verdict = " fits" if 1e9 * total < room else f" does not fit: {mend[stage]}"
            print(f"  {title}: {total:.1f}{verdict} ({listed})")


if __name__ == "__main__":
    try:
        print_memory(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
