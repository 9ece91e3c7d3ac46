"""sampler. It knows nothing of the algorithm."""

import hashlib
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from support.attention import CacheView, TreeView, pack_hidden, row_bytes
from support.cli import UserError, first_line
from support.distributed import world
from support.packing import BLOCK, Tree, pack_trees


def draw_key(*what) -> int:
    """64-bit key of a draw, a hash of (seed, stage, problem, state, number): not of the batch."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """splitmix64: a uniform in [0, 1), (B,) float64, for each key and position, (B,) int64."""

    def shifted(z, bits: int):  # as an unsigned number: >> of an int64 repeats the sign
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = key + (position + 1) * -0x61C8864680B583EB  # the golden ratio's bits; int64 wraps around
    z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    z = z ^ shifted(z, 31)
    return shifted(z, 12).double() * 2.0**-52


def draw_tokens(logits, key, position, temperature: float) -> torch.Tensor:
    """Inverse-CDF draw from the whole distribution, (B, V) -> (B,); temperature 0 is greedy. V,
    which no token is, where a logit is no number."""
    if temperature == 0:
        top, token = logits.max(-1)
        return token.masked_fill_(top.isnan(), logits.shape[-1])
    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)
    # u < cdf[-1], so a token of probability 0 is never drawn
    u = uniforms(key, position)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0]


COLUMNS = 128  # of the cache, that one CUDA graph serves


def free_memory() -> int:
    """Bytes of the GPU that nothing uses, those that torch has set aside included."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def rows_that_fit(lm, columns: int, wanted: int) -> int:
    """How many rows of the key/value cache to decode at once: `wanted`, or as many as fit."""
    if lm.device != "cuda":
        return wanted
    free = free_memory()
    each = row_bytes(lm.config, columns, lm.head.element_size())
    logits = 20 * lm.config.vocab_size  # of a row in float32; probabilities and sums in float64
    fit = int(0.8 * free / (each + logits)) // 16 * 16
    if fit == 0:
        needed = f"16 rows of {columns} tokens need {16 * each / 1e9:.1f} GB"
        raise UserError(f"{lm.path}: {needed}, {free / 1e9:.1f} GB are free; lower --max_new")
    return min(wanted, fit)


class Row(NamedTuple):
    """One draw: what follows the tokens from trees[tree]'s root through `node`."""

    tree: int
    node: int
    key: int  # of its random numbers (draw_key)
    room: int  # the most tokens that it may have


def prefixes_fit(lm, trees: list[Tree]) -> bool:
    """Do the trees' Prefixes take at most half of the memory? The rest is for the rows."""
    if lm.device != "cuda":
        return True
    tokens = sum(len(ids) for tree in trees for ids in tree.ids)
    return tokens * row_bytes(lm.config, 1, lm.head.element_size()) <= free_memory() / 2


class Prefixes:
    """Keys, values and last hidden states of trees of prefixes, every token computed once.

    path[tree, node]: where the tokens of prompt .. node lie; a row of a pack's mask is a path.
    """

    @torch.no_grad()
    def __init__(self, lm, trees: list[Tree], budget: int = 8192):
        self.path, self.tokens = {}, 0
        hidden, layers_of_packs = [], []
        for pack in pack_trees(trees, budget, align=BLOCK):
            longest = int(pack.pos.max()) + 1
            if longest > lm.max_length:
                wrong = f"a prompt or prefix has {longest} tokens, the context is {lm.max_length}"
                raise UserError(f"{lm.path}: {wrong}; leave long problems out")
            view = TreeView(pack, lm.device, remember=True)
            hidden.append(pack_hidden(lm, pack, view))
            layers_of_packs.append(view.layers)
            end = pack.end.numpy()
            for owner, last in zip(pack.owner, pack.last.tolist()):
                self.path[owner] = np.flatnonzero(end[: last + 1] > last) + self.tokens
            self.tokens += len(end)
        self.hidden = torch.cat(hidden)  # (tokens, d)
        self.keys, self.values = [], []  # a layer each, (G, tokens, D)
        while layers_of_packs[0]:  # a layer at a time: no second copy of all of them exists
            layer = [layers.pop(0) for layers in layers_of_packs]  # (keys, values) of each pack
            self.keys.append(torch.cat([keys for keys, _ in layer], 1))
            self.values.append(torch.cat([values for _, values in layer], 1))


class Slots:
    """B rows that decode together, each in a slot; a finished row's slot is free for another."""

    def __init__(self, lm, prefixes: Prefixes, rows: list[Row], size: int, temperature: float):
        self.lm, self.prefixes, self.rows, self.temperature = lm, prefixes, rows, temperature
        self.size = size  # B, the number of slots
        self.width = 0  # columns of the cache that the longest row may have written
        longest = max(len(prefixes.path[row.tree, row.node]) + row.room for row in rows)
        groups, _, head_size = prefixes.keys[0].shape
        shape, dtype = (size, groups, longest, head_size), prefixes.keys[0].dtype
        self.cache = CacheView(len(prefixes.keys), shape, dtype, lm.device)

        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.long, device=lm.device)

        self.row = zeros(size) - 1  # which of `rows` sits in a slot; -1: none
        self.alive = torch.zeros(size, dtype=torch.bool, device=lm.device)  # it draws on
        self.key = zeros(size)  # of its draws
        self.room = zeros(size)  # how many tokens it may draw
        self.new = zeros(size)  # how many it has drawn
        self.out = zeros(size, max(row.room for row in rows))  # (B, longest room) what it has drawn
        self.token = zeros(size)  # the last of them, not yet in the cache
        self.length = zeros(size)  # tokens before that one, which are
        # Is this token an end (V + 1,): V, which no token is, is drawn where a logit is no number.
        self.stop = torch.zeros(max(len(lm.head), max(lm.eos)) + 1, dtype=torch.bool)
        self.stop[[*lm.eos, len(lm.head)]] = True
        self.stop = self.stop.to(lm.device)
        self.graphs = {}  # width of the cache: the kernels of one token, on a GPU

    def seat(self, waiting: list[int]):
        """Give free slots to waiting rows, the last ones first, and draw their first tokens."""
        free = (self.row < 0).nonzero()[:, 0][: len(waiting)]
        if len(free) == 0:
            return
        numbers = [waiting.pop() for _ in range(len(free))]
        seated = [self.rows[r] for r in numbers]
        paths = [self.prefixes.path[row.tree, row.node] for row in seated]
        index = np.zeros((len(seated), max(map(len, paths))), int)  # (free, longest prefix)
        for i, path in enumerate(paths):
            index[i, : len(path)] = path
        index = torch.from_numpy(index).to(self.lm.device)
        for stores, sources in (
            (self.cache.keys, self.prefixes.keys),
            (self.cache.values, self.prefixes.values),
        ):
            for store, source in zip(stores, sources):
                store[free, :, : index.shape[1]] = source[:, index].transpose(0, 1)

        def tensor(values):
            return torch.tensor(values, dtype=torch.long, device=self.lm.device)

        self.row[free], self.alive[free], self.new[free] = tensor(numbers), True, 0
        self.key[free] = tensor([row.key for row in seated])
        self.room[free] = tensor([row.room for row in seated])
        self.length[free] = tensor([len(path) for path in paths])
        last = tensor([path[-1] for path in paths])
        self.write(free, _at_least_16(self.lm.logits, self.prefixes.hidden[last]))

    def write(self, slot, logits):
        """Draw the next token of these slots and write it down where the row is alive."""
        alive = self.alive[slot]
        token = draw_tokens(logits, self.key[slot], self.new[slot], self.temperature)
        column = self.new[slot].clamp(max=self.out.shape[1] - 1)
        self.out[slot, column] = torch.where(alive, token, self.out[slot, column])
        self.token[slot] = token.clamp(max=len(self.lm.head) - 1)
        self.new[slot] += alive
        self.alive[slot] = alive & ~self.stop[token] & (self.new[slot] < self.room[slot])

    def next_token(self):
        """One token for every living row.

        A GPU runs a token's kernels in less time than Python needs to launch them. So they are
        captured once as a CUDA graph and then replayed, until a row outgrows the columns that the
        graph reads: each serves COLUMNS widths, since columns behind a row's end are masked.
        """
        columns = self.cache.keys[0].shape[2]
        self.width = min(self.width + 1, columns)
        if not self.lm.may_capture:
            self.next_token_of_width(self.width)
            return
        width = min(self.width + -self.width % COLUMNS, columns)
        if width in self.graphs:
            self.graphs[width].replay()
        else:
            # Kernels that run for the first time cannot be captured.
            self.next_token_of_width(width)
            self.capture(width)

    def next_token_of_width(self, width: int):
        """A forward of all slots that reads `width` columns of the cache, then the draws."""
        view = self.cache.at(self.length, width)
        hidden = self.lm.hidden(self.token[:, None], self.length[:, None], view)[:, 0]  # (B, d)
        self.length += self.alive  # a finished row stays where it is until its slot is given away
        logits = self.lm.logits(hidden)  # (B, V)
        if self.lm.device == "cuda":  # to ask which rows live would wait for the GPU
            self.write(torch.arange(self.size, device="cuda"), logits)
        else:
            living = self.alive.nonzero()[:, 0]
            self.write(living, logits[living])

    def capture(self, width: int):
        """Capture the next token's kernels; it does not run them. A model that cannot be captured
        (some rotary embeddings ask the GPU for the longest row) goes on without."""
        graph, others = torch.cuda.CUDAGraph(), list(self.graphs.values())
        pool = others[0].pool() if others else None  # graphs never run together: one workspace
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.next_token_of_width(width)
            self.graphs[width] = graph
        except RuntimeError as e:
            wrong = f"{self.lm.path}: no CUDA graph, slower ({first_line(e)})"
            print(f"warning: {wrong}", file=sys.stderr)
            self.lm.may_capture = False

    def look(self) -> int:
        """How many rows live; on a GPU this waits for its work."""
        self.width = int(self.length.max())
        return int(self.alive.sum())

    def finished(self) -> list[tuple[int, list[int]]]:
        """(row, its tokens) of the rows that have ended; their slots are free then."""
        done = (~self.alive & (self.row >= 0)).nonzero()[:, 0]
        ended = []
        for r, n, ids in zip(
            self.row[done].tolist(), self.new[done].tolist(), self.out[done].tolist()
        ):
            if ids[n - 1] >= len(self.lm.head):
                raise UserError(f"{self.lm.path}: a logit is no number; train it anew")
            ended.append((r, ids[:n]))
        self.row[done] = -1
        return ended

    def shrink(self, size: int):
        """Leave free slots behind: the first `size` slots are the living rows', then free ones."""
        first = torch.cat([self.alive.nonzero()[:, 0], (~self.alive).nonzero()[:, 0]])[:size]
        for store in (*self.cache.keys, *self.cache.values):
            store[:size] = store[first]
        for name in ("row", "alive", "key", "room", "new", "out", "token", "length"):
            setattr(self, name, getattr(self, name)[first])
        self.size = size
        self.graphs = {}  # they were captured for the old tensors


def _at_least_16(f, x):
    """f(x) on at least 16 rows: a row's bits do not depend on how many came with it."""
    return f(x) if len(x) >= 16 else f(F.pad(x, (0, 0, 0, 16 - len(x))))[: len(x)]


def _sixteens(n: int) -> int:
    """n rounded up to a multiple of 16: under 16 rows the CPU's matrix product rounds otherwise."""
    return max(16, -(-n // 16) * 16)


@torch.no_grad()
def draw(
    lm, trees: list[Tree], rows: list[Row], temperature=1.0, batch=256, progress=None,
    prefixes: Prefixes | None = None, server=None,
) -> list[list[int]]:  # fmt: skip
    """A continuation for each row: up to an EOS (kept) or `room` tokens.

    -> lists of token ids, in the order of rows. They depend on a row's prefix and key alone, not on
    the batch, the neighbours or the slot (on the CPU in float32: to the last bit; a server's draws
    are its own). batch: rows decoded at once, fewer where the GPU's memory holds fewer; progress: told of
    the tokens; prefixes: of these trees, if they are computed already.
    """
    if server:
        return server.draw(trees, rows, temperature, progress)
    if not rows:
        return []
    prefixes = prefixes or Prefixes(lm, trees)
    sizes = [len(prefixes.path[row.tree, row.node]) for row in rows]
    width = max(size + row.room for size, row in zip(sizes, rows))
    if width > lm.max_length:
        wrong = f"a prefix and its new tokens are {width}, the context is {lm.max_length}"
        raise UserError(f"{lm.path}: {wrong}; lower --max_new or leave long problems out")
    # Taken from the end: longest first, so that rows of like length decode together.
    waiting = sorted(range(len(rows)), key=lambda r: sizes[r])
    wanted = max(16, min(batch, _sixteens(len(rows))))
    slots = Slots(lm, prefixes, rows, rows_that_fit(lm, width, wanted), temperature)
    results = [None] * len(rows)
    while True:
        # 1. Look how many rows live. On a GPU that waits for its work, so it is done now and then.
        live = slots.look()
        # A tenth of the slots pays for seating rows, a quarter for shrinking the batch.
        free_enough = live <= (0.9 if waiting else 0.75) * slots.size
        # 2. Finished rows hand in their tokens, once a good part of the slots is free.
        if free_enough:
            for r, ids in slots.finished():
                results[r] = ids
                if progress is not None:
                    progress.add(len(ids))
        # 3. Nothing lives and nothing waits: done.
        if live == 0 and not waiting:
            return results
        # 4. Waiting rows take the free slots; one may end with its first token, so look again.
        if waiting and free_enough:
            slots.seat(waiting)
            continue
        # 5. When none waits, the batch gets smaller.
        if not waiting and free_enough and _sixteens(live) < slots.size:
            slots.shrink(_sixteens(live))
        # 6. The next token of every row.
        for _ in range(8 if lm.device == "cuda" else 1):
            slots.next_token()


def alone(script: str):
    """Refuse torchrun: several cards sample by an engine, which shares out the work itself."""
    if world() > 1:
        raise UserError(
            f"{script}: runs as one process; for several cards start a --server on them"
        )
