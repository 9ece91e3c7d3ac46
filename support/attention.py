"""attention. It knows nothing of the algorithm."""

import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F

from support.cli import UserError, first_line
from support.distributed import rank
from support.packing import BLOCK, Pack, Tree, pack_trees

FLEX = 128  # flex_attention takes queries and keys in multiples of this


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


class CacheView:
    """Keys and values of B rows, allocated once; row b has written columns 0 .. length[b] - 1."""

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        rows, groups, columns, size = shape
        columns += -columns % 8  # CUDA's fused kernels want such widths
        # Zeros: a masked column counts 0 times its value, which for a NaN left in memory is NaN.
        zeros = functools.partial(torch.zeros, (rows, groups, columns, size))  # (B, G, T, D)
        self.keys = [zeros(dtype=dtype, device=device) for _ in range(layers)]
        self.values = [zeros(dtype=dtype, device=device) for _ in range(layers)]

    def at(self, length: torch.Tensor, width: int):
        """The next token of a row goes to column `length` and sees columns 0 .. length < width."""
        if on_cuda(length):
            width += -width % 8
        self.rows = torch.arange(len(length), device=length.device)
        self.length, self.width = length, width
        unseen = torch.arange(width, device=length.device) > length[:, None]
        bias = torch.zeros(unseen.shape, dtype=self.keys[0].dtype, device=length.device)
        self.bias = bias.masked_fill_(unseen, -torch.inf)[:, None, None]  # (B, 1, 1, T)
        return self

    def __call__(self, layer, query, key, value, scaling):
        k, v = self.keys[layer], self.values[layer]
        k[self.rows, :, self.length] = key[:, :, 0].to(k.dtype)
        v[self.rows, :, self.length] = value[:, :, 0].to(v.dtype)
        k, v = k[: len(query), :, : self.width], v[: len(query), :, : self.width]
        # (B, G, R, D): the heads of a group share keys, as if they were R queries of one head.
        q = query.view(len(query), k.shape[1], -1, query.shape[-1])
        if not on_cuda(query):
            return grouped_attention(q, k, v, self.bias, scaling).view(query.shape)
        # So no kernel need know of groups (the one that takes a mask on most cards does not, and
        # would give way to one that copies the cache). Scores and softmax are float32 inside.
        bias = self.bias.expand(-1, -1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=bias, scale=scaling)
        return out.reshape(query.shape)


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


def flex_agrees(lm) -> bool:
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


def pack_hidden(lm, pack: Pack, view: TreeView | None = None) -> torch.Tensor:
    """Last hidden states (N, d) of a pack's tokens, every path at once. lm: a model.LM."""
    return lm.with_weights(lambda: forward_pack(lm, pack, view))


def forward_pack(lm, pack: Pack, view: TreeView | None = None) -> torch.Tensor:
    """The same where all weights are gathered already, inside `lm.with_weights`."""
    if not 0 <= int(pack.ids.min()) <= int(pack.ids.max()) < lm.config.vocab_size:
        wrong = f"token {int(pack.ids.max())} is asked for, of {lm.config.vocab_size}"
        raise UserError(f"{lm.path}: {wrong}: the records are of another tokenizer")
    if view is None:
        if lm.flex is None:
            lm.flex = flex_agrees(lm)
        view = TreeView(pack, lm.device, flex=lm.flex)
    ids, pos = pack.ids[None].to(lm.device), pack.pos[None].to(lm.device)
    return lm.hidden(ids, pos, view)[0]
