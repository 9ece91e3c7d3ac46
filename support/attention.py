"""The attention of every model: a pack of trees, or a cache of rows, decides who sees whom. It knows
nothing of the algorithm.

Read from top to bottom:
  attend, layer_mask   what transformers calls in place of its own attention and masks
  grouped_attention    the formula
  TreeView             a pack: every path of every tree at once
  CacheView            rows that are decoded: keys and values so far
  flex_...             the other form of a pack, for CUDA
  pack_hidden          hidden states of a pack, by a TreeView or path by path

Sizes: B rows, G key/value heads, R query heads per key/value head, T or N tokens, D size of a key, E of
a value (D for nearly every model), K gathered keys.
"""

import functools
import sys
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
import torch.nn.functional as F

from support.cli import UserError, first_line
from support.packing import BLOCK, Pack, Tree, pack_trees

FLEX = 128  # flex_attention takes queries and keys in multiples of this
NAME = "dapo"  # of this attention among those of transformers
# What transformers hands to an attention beside what `attend` names, and what has no effect here.
IGNORED = {"dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "past_key_values"}
IGNORED |= {"output_attentions", "output_hidden_states", "output_router_logits", "cache_position"}

_view = ContextVar("view")


@contextmanager
def seen_through(view):
    """In this context models attend by `view`, a TreeView or a CacheView."""
    before = _view.set(view)
    try:
        yield
    finally:
        _view.reset(before)


def register():
    """Make this attention known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface  # takes seconds

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, layer_mask)


def layer_mask(mask_function, **_):
    """transformers calls this once per forward for each kind of mask that a model's layers have, and
    hands the result to these layers as their attention_mask.

    mask_function(row, head, i, j): may a token at position i see one at position j <= i of its path.
    Of a sliding window: i - window < j. As a token's position in a tree is its depth, the same holds
    there, beside the rule of the tree.
    """
    from transformers.masking_utils import causal_mask_function

    return _view.get().of_kind(None if mask_function is causal_mask_function else mask_function)


def attend(
    module, query, key, value, attention_mask=None, scaling=None, softcap=None, s_aux=None, **more
):
    """The attention of every layer; query (B, G * R, T, D), key (B, G, T, D), value (B, G, T, E)
    -> (B, T, G * R, E), None.

    attention_mask: what `layer_mask` made. softcap: softcap * tanh(score / softcap) (Gemma 2). s_aux
    (G * R,): one more score per head that takes its share and has no value (gpt-oss). Raises
    ValueError where something else decides who sees whom.
    """
    kind = type(module).__name__
    if not isinstance(attention_mask, functools.partial):
        raise ValueError(f"{kind} makes its mask itself")  # noqa: TRY004
    unknown = [name for name, x in more.items() if x is not None and name not in IGNORED]
    if unknown:
        raise ValueError(f"{kind} has {', '.join(unknown)}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention_mask(module.layer_idx, query, key, value, scaling, softcap or None, s_aux)
    return out.transpose(1, 2).contiguous(), None


def on_cuda(x: torch.Tensor) -> bool:
    """Which form of a kernel is for this tensor: tests replace this and run CUDA's on the CPU."""
    return x.is_cuda


def grouped_attention(query, key, value, bias, scaling, softcap=None, sinks=None):
    """softmax(q k' * scaling + bias) v; q (..., Q, D), k (..., K, D), v (..., K, E), bias (..., Q, K),
    sinks (..., Q or 1, 1).

    The sizes before broadcast: blocks, G and R of a pack, B and G of a cache.

    Written out on purpose: on the CPU as fast as the fused kernel and, unlike it, the same bits for
    a row whatever the batch and however many masked columns follow. On CUDA scores are float32, as
    inside the fused kernels.
    """
    if on_cuda(query):
        with torch.autocast(query.device.type, enabled=False, cache_enabled=False):
            scores = (query.float() * scaling) @ key.float().transpose(-1, -2)
    else:
        scores = (query * scaling) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    high = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1, dtype=high).to(value.dtype)
    return (weights if sinks is None else weights[..., :-1]) @ value


class TreeView:
    """Who sees whom in a pack: j <= i < end[j], and what a layer's own kind of mask says of the depths
    of i and j.

    Gathered, on every device: each block of queries gathers just the keys that any of them may see
    (its path and itself), so the cost grows with depth, not with the pack. flex=True, on CUDA:
    flex_attention skips the blocks that the same rule leaves empty. remember=True keeps each
    layer's keys and values for the sampler.
    """

    def __init__(self, pack: Pack, device: str, remember: bool = False, flex: bool = False):
        self.pack, self.device, self.flex = pack, device, flex
        self.layers = [] if remember else None  # (key, value) of a layer, (G, N, D) and (G, N, E)
        self.rules = []  # of the layers
        self.shapes = set()  # of the layers' heads, for `layer_shapes`

    def of_kind(self, rule):
        """The attention of the layers whose own mask is `rule` (see `layer_mask`); None: whole paths."""
        if self.flex:
            end, pos = padded(self.pack)
            mask = _block_mask(end.to(self.device), pos.to(self.device), rule)
            return functools.partial(self._attend, flex_tree_attention, mask, rule)
        return functools.partial(self._attend, gathered_attention, self._gathered_keys(rule), rule)

    def _attend(self, form, mask, rule, layer, query, key, value, scaling, softcap, sinks):
        if self.layers is not None:
            self.layers.append((key[0].detach(), value[0].detach()))
        self.rules.append(rule)
        sizes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        self.shapes.add((*sizes, softcap, sinks is not None, rule))
        return form(query, key, value, mask, scaling, softcap, sinks)

    def _gathered_keys(self, rule) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks, K) the keys of each block of queries; (blocks, 1, 1, BLOCK, K) 0, or -inf for a
        key that a query of the block does not see."""
        end, tokens, sets = self.pack.end.numpy(), len(self.pack.end), []
        for a in range(0, tokens, BLOCK):
            sets.append(np.append(np.flatnonzero(end[:a] > a), np.arange(a, a + BLOCK)))
        width = -(-max(map(len, sets)) // 16) * 16
        table = np.full((len(sets), width), tokens)  # (blocks, K) keys of a block; `tokens`: none
        for row, keys in zip(table, sets):
            row[: len(keys)] = keys
        i, j = np.arange(tokens).reshape(-1, BLOCK, 1), table[:, None]
        seen = (j <= i) & (i < np.append(end, 0)[j])  # (blocks, BLOCK, K)
        if rule is not None:
            pos = np.append(self.pack.pos.numpy(), 0)
            where = (torch.from_numpy(pos[x]).to(self.device) for x in (i, j))
            seen &= allowed(rule, *where).cpu().numpy()
            # Keys that no query of a block sees are not gathered.
            needed = seen.any(1)  # (blocks, K)
            first = np.argsort(~needed, axis=1, kind="stable")
            first = first[:, : -(-needed.sum(1).max() // 16) * 16]
            table = np.take_along_axis(table, first, 1)
            seen = np.take_along_axis(seen, first[:, None], 2)
        table = torch.from_numpy(np.minimum(table, tokens - 1)).to(self.device)
        bias = torch.where(torch.from_numpy(seen), 0.0, -torch.inf)[:, None, None]
        return table, bias.to(self.device)


def allowed(rule, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """What a layer's own mask says of positions i and j, broadcast."""
    zero = torch.zeros((), dtype=torch.long, device=i.device)
    return rule(zero, zero, i, j)


def gathered_attention(query, key, value, keys, scaling, softcap, sinks):
    """A pack by gathered keys: query (1, G * R, N, D), key (1, G, N, D), value (1, G, N, E); keys:
    TreeView._gathered_keys. -> (1, G * R, N, E)"""
    (table, bias), groups, tokens = keys, key.shape[1], query.shape[2]
    blocks, width = table.shape
    q = query[0].view(groups, -1, blocks, BLOCK, query.shape[3])  # (G, R, blocks, BLOCK, D)
    k, v = [
        x[0].index_select(1, table.view(-1)).view(groups, blocks, 1, width, -1).transpose(0, 1)
        for x in (key, value)
    ]  # (blocks, G, 1, K, D)
    q = q.permute(2, 0, 1, 3, 4)
    if sinks is not None:
        sinks = sinks.view(groups, -1, 1, 1)
    out = grouped_attention(q, k, v, bias, scaling, softcap, sinks)
    return out.permute(1, 2, 0, 3, 4).reshape(1, -1, tokens, value.shape[3])


def newest(last: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    """Which position column c of a row holds, (B, width), where position p is written to column p %
    columns and `last` (B, 1) is the last one; negative: none yet."""
    column = torch.arange(width, device=last.device)
    return column + torch.div(last - column, columns, rounding_mode="floor") * columns


class CacheView:
    """Keys and values of B rows, allocated once; row b has written positions 0 .. length[b] - 1.

    keys, values: one per layer, of prefixes, (G, tokens, D) and (G, tokens, E). columns: of the longest
    row; windows: per layer how many of the last positions it sees, None: all. Of a layer with a window
    no more are kept.
    """

    def __init__(self, keys: list, values: list, rows: int, columns: int, windows: list):
        def empty(x, window):  # (B, G, T, D)
            kept = min(columns, window or columns)
            kept += -kept % 8  # CUDA's fused kernels want such widths
            # Zeros: a masked column counts 0 times its value, which for a NaN left in memory is NaN.
            return x.new_zeros(rows, len(x), kept, x.shape[-1])

        self.keys = [empty(x, window) for x, window in zip(keys, windows)]
        self.values = [empty(x, window) for x, window in zip(values, windows)]
        self.columns = columns + -columns % 8

    def at(self, length: torch.Tensor, width: int):
        """The next token of a row is at position `length` and sees positions 0 .. length < width."""
        if on_cuda(length):
            width += -width % 8
        self.rows = torch.arange(len(length), device=length.device)
        self.length, self.width = length, width
        return self

    def of_kind(self, rule):
        """The attention of the layers whose own mask is `rule` (see `layer_mask`)."""
        return functools.partial(self._attend, rule, {})

    def _bias(self, rule, columns: int) -> torch.Tensor:
        """(B, 1, 1, T) 0, or -inf for what a row does not see."""
        length = self.length[:, None]
        position = newest(length, columns, min(self.width, columns))
        unseen = position < 0
        if rule is not None:
            unseen |= ~allowed(rule, length, position)
        bias = torch.zeros(unseen.shape, dtype=self.keys[0].dtype, device=length.device)
        return bias.masked_fill_(unseen, -torch.inf)[:, None, None]

    def _attend(self, rule, biases, layer, query, key, value, scaling, softcap, sinks):
        k, v = self.keys[layer], self.values[layer]
        columns = k.shape[2]
        if columns not in biases:
            biases[columns] = self._bias(rule, columns)
        bias, column = biases[columns], self.length % columns
        k[self.rows, :, column] = key[:, :, 0].to(k.dtype)
        v[self.rows, :, column] = value[:, :, 0].to(v.dtype)
        k, v = k[: len(query), :, : self.width], v[: len(query), :, : self.width]
        # (B, G, R, D): the heads of a group share keys, as if they were R queries of one head.
        q = query.view(len(query), k.shape[1], -1, query.shape[-1])
        shape = (*query.shape[:3], v.shape[-1])
        if not on_cuda(query) or softcap is not None or sinks is not None:
            if sinks is not None:
                sinks = sinks.view(k.shape[1], -1, 1)
            return grouped_attention(q, k, v, bias, scaling, softcap, sinks).view(shape)
        # So no kernel need know of groups (the one that takes a mask on most cards does not, and
        # would give way to one that copies the cache). Scores and softmax are float32 inside.
        bias = bias.expand(-1, -1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=bias, scale=scaling)
        return out.reshape(shape)


def padded(pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """`end` and `pos` of a pack filled up by tokens that see themselves alone."""
    size = len(pack.end)
    more = torch.arange(size, size + _padding(size))
    return torch.cat([pack.end, more + 1]), torch.cat([pack.pos, torch.zeros_like(more)])


def _padding(size: int) -> int:
    """How many tokens fill a pack up to a multiple of FLEX, and to two: of one block torch would
    compile another kernel than of many."""
    return max(-size % FLEX, 2 * FLEX - size)


def _block_mask(end: torch.Tensor, pos: torch.Tensor, rule=None):
    """The blocks of a pack in which some token sees some other, for flex_attention."""

    def in_tree(b, h, i, j):
        return (j <= i) & (i < end[j])

    def in_tree_and_rule(b, h, i, j):
        return (j <= i) & (i < end[j]) & rule(b, h, pos[i], pos[j])

    seen = in_tree if rule is None else in_tree_and_rule
    return _flex()[1](seen, None, None, len(end), len(end), device=end.device)


@functools.cache
def _capped(softcap: float, device):
    """What flex_attention does to each score. A tensor, since torch cannot compile it with a number that
    it takes for a size that may change."""
    cap = torch.tensor(softcap, device=device)
    return lambda score, b, h, i, j: cap * torch.tanh(score / cap)


def flex_tree_attention(query, key, value, block_mask, scaling, softcap=None, sinks=None):
    """flex_attention on a pack: query (1, G * R, N, D), key (1, G, N, D), value (1, G, N, E).

    A query under 128 tokens would go to another kernel (flex_decoding), which finds no block for
    some head counts; so tokens are filled up and the kernel is named. Under autocast rotary
    positions leave query and key in float32, and torch 2.11 does not cast them here; nothing is
    left for autocast to do then, and torch would compile once more for each of its states.
    """
    size, more = query.shape[2], _padding(query.shape[2])

    def filled(x):  # of one dtype and one layout too: each other one would be compiled again
        return F.pad(x.to(value.dtype), (0, 0, 0, more)).contiguous()

    options = {"scale": scaling, "enable_gqa": True}
    options["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True}
    if softcap is not None:
        options["score_mod"] = _capped(softcap, query.device)
    if sinks is not None:
        from torch.nn.attention.flex_attention import AuxRequest

        options["return_aux"] = AuxRequest(lse=True)
    with torch.autocast(query.device.type, enabled=False, cache_enabled=False):
        inputs = filled(query), filled(key), filled(value)
        out = _flex()[0](*inputs, block_mask=block_mask, **options)
        if sinks is not None:  # its share of the softmax: exp(sink) / (exp(sink) + exp(lse))
            out, aux = out
            kept = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])  # (1, G * R, N)
            out = (out * kept[..., None]).to(out.dtype)
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


@torch.no_grad()
def layer_shapes(lm) -> set[tuple]:
    """(query heads, key/value heads, size of a key, of a value, soft-cap, sinks, mask) of the layers."""
    (pack,) = pack_trees([Tree([[0]], [-1], [True])], BLOCK)
    view = TreeView(pack, lm.device)
    forward_pack(lm, pack, view)
    return view.shapes


def flex_agrees(lm, shapes_of_layers) -> bool:
    """Does flex_attention give what the gathered form gives, forward and backward, for the heads and
    masks of this model's layers (`layer_shapes`)? If not, or where it cannot run, the gathered form
    goes on, with one line of warning."""
    dtype = torch.bfloat16 if lm.in_bfloat16 else torch.float32
    tolerance = 3e-2 if lm.in_bfloat16 else 1e-4
    rng = torch.Generator().manual_seed(0)
    try:
        for heads, groups, size, value_size, softcap, with_sinks, rule in shapes_of_layers:
            for tokens in (128, 256, 1024):
                part = tokens // 4
                tree = Tree([[1] * part] * 4, [-1, 0, 0, 2], [True] * 4)
                (pack,) = pack_trees([tree], tokens)
                shapes = [(1, heads, tokens, size), (1, groups, tokens, size)]
                shapes += [(1, groups, tokens, value_size)] + [(heads,)] * with_sinks
                inputs = []
                for shape in shapes:
                    x = torch.randn(shape, generator=rng).to(lm.device, dtype)
                    inputs.append(x.requires_grad_())
                query, key, value, sinks = inputs if with_sinks else (*inputs, None)
                found = []
                for flex in (False, True):
                    view = TreeView(pack, lm.device, flex=flex).of_kind(rule)
                    with torch.enable_grad():  # whoever asks first may not need gradients
                        out = view(0, query, key, value, size**-0.5, softcap, sinks)
                        slopes = torch.autograd.grad(out.float().square().sum(), inputs)
                        found.append([out, *slopes])
                for expected, fused in zip(*found):
                    expected, fused = expected.detach().float(), fused.detach().float()
                    difference = float((expected - fused).abs().max())
                    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
                        raise ValueError(f"{tokens} tokens differ by {difference:.1g}")
    except Exception as e:  # noqa: BLE001  whatever a GPU's software does, numbers are right
        wrong = f"flex_attention is not used, a slower and larger form is ({first_line(e)})"
        print(f"warning: {lm.path}: {wrong}", file=sys.stderr)
        return False
    return True


def head_sizes(config) -> tuple[int, int, int]:
    """(query heads, key/value heads, size of a head) by a model's config; zeros without attention."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0, 0, 0
    groups = getattr(config, "num_key_value_heads", None) or heads
    return heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def windows_of(config) -> list[int | None]:
    """Per layer the window that a model's config gives it, None: it sees whole paths."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def is_window(rule, window: int | None, device: str) -> bool:
    """Does a layer's own mask hide just what is `window` or more positions back?"""
    if rule is None or not window:
        return False
    i = torch.tensor([1, 2, 3], device=device) * window
    hidden, seen = allowed(rule, i, i - window), allowed(rule, i, i - window + 1)
    return bool(seen.all() and not hidden.any())


def row_bytes(config, columns: int, itemsize: int) -> int:
    """Bytes of the keys and values of one row of `columns` tokens, all layers."""
    _, groups, size = head_sizes(config)
    kept = sum(min(columns, window or columns) for window in windows_of(config))
    # Latent attention (DeepSeek) has keys and values of other sizes than its config's heads.
    key = getattr(config, "qk_head_dim", None) or size
    value = getattr(config, "v_head_dim", None) or size
    return kept * groups * (key + value) * itemsize


def pack_hidden(lm, pack: Pack, view: TreeView | None = None) -> torch.Tensor:
    """Last hidden states (N, d) of a pack's tokens, every path at once. lm: a model.LM."""
    return lm.with_weights(lambda: forward_pack(lm, pack, view))


def forward_pack(lm, pack: Pack, view: TreeView | None = None) -> torch.Tensor:
    """The same where all weights are gathered already, inside `lm.with_weights`."""
    if not 0 <= int(pack.ids.min()) <= int(pack.ids.max()) < lm.config.vocab_size:
        wrong = f"token {int(pack.ids.max())} is asked for, of {lm.config.vocab_size}"
        raise UserError(f"{lm.path}: {wrong}: the records are of another tokenizer")
    if lm.paths:
        return forward_paths(lm, pack)
    if view is None:
        if lm.flex is None:
            lm.flex = flex_agrees(lm, layer_shapes(lm))
        view = TreeView(pack, lm.device, flex=lm.flex)
    ids, pos = pack.ids[None].to(lm.device), pack.pos[None].to(lm.device)
    return lm.hidden(ids, pos, view)[0]


def forward_paths(lm, pack: Pack) -> torch.Tensor:
    """The same for a model that no tree mask holds for, by its own attention: a row for each path to a
    leaf, filled up on the right, where nothing before sees it."""
    end, pos, prev = pack.end.numpy(), pack.pos.numpy(), pack.prev.numpy()
    token = np.arange(len(end))
    last = np.setdiff1d(token, prev)[:, None]  # (rows, 1) the leaves: no token follows them
    path = (token <= last) & (last < end)  # (rows, N)
    path = path[(path & (pack.node.numpy() >= 0)).any(1)]  # without what fills the pack up
    row, seen = path.nonzero()
    ids = pack.ids[0].repeat(len(path), pos[seen].max() + 1)  # (rows, T)
    ids[row, pos[seen]] = pack.ids[seen]
    with lm.autocast():
        out = lm.decoder(input_ids=ids.to(lm.device), use_cache=False).last_hidden_state
    place = path.argmax(0) * ids.shape[1] + pos  # (N,) in the first row that has the token
    return out.flatten(0, 1)[torch.from_numpy(place).to(lm.device)]
