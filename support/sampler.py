"""Draws from a language model on this device. It knows nothing of the algorithm.

Read from bottom to top: `Sampler.draw` is the loop. A row is one response or completion to draw; what
comes before it is a path of a tree, whose tokens `Prefixes` computes once each. `Decoder` holds a
batch of rows that decode together: finished rows retire, waiting ones are admitted into their slots,
and when none waits the batch is made more compact.

A draw depends on its prefix and its key alone, not on the batch, the neighbours or the slot (on the
CPU in float32: to the last bit). `support/server.py` has the other class with the same `draw`.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from support.attention import CacheView, TreeView, newest, pack_hidden, row_bytes
from support.cli import UserError, first_line
from support.distributed import world
from support.packing import BLOCK, Tree, pack_trees, path_ids


class Row(NamedTuple):
    """One draw: what follows the tokens from trees[tree]'s root through `node`."""

    tree: int
    node: int
    key: int  # of its random numbers (draw_key)
    max_new: int  # the most tokens that it may have


# ------------------------------------------------------------ random numbers


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
    """Inverse-CDF draw from the whole distribution, (B, V) -> (B,); temperature 0 is greedy.

    Where a logit is NaN the token drawn is V, which no token is.
    """
    if temperature == 0:
        top, token = logits.max(-1)
        return token.masked_fill_(top.isnan(), logits.shape[-1])
    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)
    # u < cdf[-1], so a token of probability 0 is never drawn
    u = uniforms(key, position)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0]


# ------------------------------------------------------------ prefixes


class Prefixes:
    """Keys, values and last hidden states of trees of prefixes, every token computed once.

    path[tree, node]: where the tokens of prompt .. node lie; a row of a pack's mask is a path.
    """

    @torch.no_grad()
    def __init__(self, lm, trees: list[Tree], budget: int = 8192):
        self.path, tokens = {}, 0
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
                self.path[owner] = np.flatnonzero(end[: last + 1] > last) + tokens
            tokens += len(end)
        self.hidden = torch.cat(hidden)  # (tokens, d)
        self.keys, self.values = [], []  # a layer each, (G, tokens, D)
        while layers_of_packs[0]:  # a layer at a time: no second copy of all of them exists
            layer = [layers.pop(0) for layers in layers_of_packs]  # (keys, values) of each pack
            self.keys.append(torch.cat([keys for keys, _ in layer], 1))
            self.values.append(torch.cat([values for _, values in layer], 1))


# ------------------------------------------------------------ a batch of rows

COLUMNS = 128  # of the cache, that one CUDA graph serves


@dataclass
class Slots:
    """What is known of the row in each of B slots, all on the model's device."""

    row: torch.Tensor  # (B,) the row's number; -1: the slot is free
    alive: torch.Tensor  # (B,) bool: it draws on
    key: torch.Tensor  # (B,) of its random numbers
    max_new: torch.Tensor  # (B,) how many tokens it may draw
    count: torch.Tensor  # (B,) how many it has drawn
    out: torch.Tensor  # (B, largest max_new) which ones
    token: torch.Tensor  # (B,) the last of them, not yet in the cache
    length: torch.Tensor  # (B,) tokens before that one, which are

    @classmethod
    def free(cls, size: int, largest: int, device: str):
        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.long, device=device)

        alive = torch.zeros(size, dtype=torch.bool, device=device)
        columns = {f.name: zeros(size) for f in fields(cls)}
        return cls(
            **columns | {"row": zeros(size) - 1, "alive": alive, "out": zeros(size, largest)}
        )

    def take(self, slots: torch.Tensor):
        """These slots alone, in this order."""
        return Slots(*(getattr(self, f.name)[slots] for f in fields(self)))


class Decoder:
    """A batch of rows that decode together: admit, step, retire, compact.

    size: B, the number of slots. temperature: as in draw_tokens.
    """

    def __init__(self, lm, prefixes: Prefixes, rows: list[Row], size: int, temperature: float):
        self.lm, self.prefixes, self.rows, self.temperature = lm, prefixes, rows, temperature
        self.size = size
        self.width = 0  # columns of the cache that the longest row may have written
        longest = max(len(prefixes.path[row.tree, row.node]) + row.max_new for row in rows)
        self.cache = CacheView(prefixes.keys, prefixes.values, size, longest, lm.windows)
        self.slots = Slots.free(size, max(row.max_new for row in rows), lm.device)
        # (V + 1,) does this token end a response: EOS do, and V, which is drawn where a logit is NaN.
        self.ends = torch.zeros(max(len(lm.head), max(lm.eos)) + 1, dtype=torch.bool)
        self.ends[[*lm.eos, len(lm.head)]] = True
        self.ends = self.ends.to(lm.device)
        self.graphs = {}  # width of the cache: the kernels of one token, on a GPU

    def living(self) -> int:
        """How many rows draw on. On a GPU this waits for its work, so it is asked now and then."""
        self.width = int(self.slots.length.max())
        return int(self.slots.alive.sum())

    def admit(self, waiting: list[int]):
        """Give free slots to waiting rows, the last ones first, and draw their first tokens."""
        slots, device = self.slots, self.lm.device
        free = (slots.row < 0).nonzero()[:, 0][: len(waiting)]
        numbers = [waiting.pop() for _ in range(len(free))]
        rows = [self.rows[r] for r in numbers]
        paths = [self.prefixes.path[row.tree, row.node] for row in rows]
        index = np.zeros((len(rows), max(map(len, paths))), int)  # (free, longest prefix)
        for i, path in enumerate(paths):
            index[i, : len(path)] = path
        index = torch.from_numpy(index).to(device)

        def tensor(values):
            return torch.tensor(values, dtype=torch.long, device=device)

        length = tensor([len(path) for path in paths])
        for stores, sources in (
            (self.cache.keys, self.prefixes.keys),
            (self.cache.values, self.prefixes.values),
        ):
            for store, source in zip(stores, sources):
                columns, width = store.shape[2], min(store.shape[2], index.shape[1])
                position = newest(length[:, None] - 1, columns, width).clamp(min=0)
                store[free, :, :width] = source[:, index.gather(1, position)].transpose(0, 1)

        slots.row[free], slots.alive[free], slots.count[free] = tensor(numbers), True, 0
        slots.key[free] = tensor([row.key for row in rows])
        slots.max_new[free] = tensor([row.max_new for row in rows])
        slots.length[free] = length
        last = tensor([path[-1] for path in paths])
        self._draw(free, _at_least_16(self.lm.logits, self.prefixes.hidden[last]))

    def _draw(self, at, logits):
        """Draw the next token of the slots `at` and write it down where the row is alive."""
        slots = self.slots
        alive = slots.alive[at]
        token = draw_tokens(logits, slots.key[at], slots.count[at], self.temperature)
        column = slots.count[at].clamp(max=slots.out.shape[1] - 1)
        slots.out[at, column] = torch.where(alive, token, slots.out[at, column])
        slots.token[at] = token.clamp(max=len(self.lm.head) - 1)
        slots.count[at] += alive
        slots.alive[at] = alive & ~self.ends[token] & (slots.count[at] < slots.max_new[at])

    def step(self):
        """One token for every living row.

        A GPU runs a token's kernels in less time than Python needs to launch them. So they are
        captured once as a CUDA graph and then replayed, until a row outgrows the columns that the
        graph reads: each serves COLUMNS widths, since columns behind a row's end are masked.
        """
        columns = self.cache.columns
        self.width = min(self.width + 1, columns)
        if not self.lm.may_capture:
            self.step_of_width(self.width)
            return
        width = min(self.width + -self.width % COLUMNS, columns)
        if width in self.graphs:
            self.graphs[width].replay()
        else:
            # Kernels that run for the first time cannot be captured.
            self.step_of_width(width)
            self.capture(width)

    def step_of_width(self, width: int):
        """A forward of all slots that reads `width` columns of the cache, then the draws."""
        slots, cuda = self.slots, self.lm.device == "cuda"
        view = self.cache.at(slots.length, width)
        hidden = self.lm.hidden(slots.token[:, None], slots.length[:, None], view)[:, 0]  # (B, d)
        slots.length += slots.alive  # a finished row stays where it is until its slot is given away
        logits = self.lm.logits(hidden)  # (B, V)
        if cuda:  # to ask which rows live would wait for the GPU
            self._draw(torch.arange(self.size, device="cuda"), logits)
        else:
            living = slots.alive.nonzero()[:, 0]
            self._draw(living, logits[living])

    def capture(self, width: int):
        """Capture the next token's kernels; it does not run them. A model that cannot be captured
        (some rotary embeddings ask the GPU for the longest row) goes on without."""
        graph, others = torch.cuda.CUDAGraph(), list(self.graphs.values())
        pool = others[0].pool() if others else None  # graphs never run together: one workspace
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.step_of_width(width)
            self.graphs[width] = graph
        except RuntimeError as e:
            wrong = f"{self.lm.path}: no CUDA graph, slower ({first_line(e)})"
            print(f"warning: {wrong}", file=sys.stderr)
            self.lm.may_capture = False

    def retire(self) -> list[tuple[int, list[int]]]:
        """(row, its tokens) of the rows that have ended; their slots are free then."""
        slots = self.slots
        done = (~slots.alive & (slots.row >= 0)).nonzero()[:, 0]
        ended = []
        for r, n, ids in zip(
            slots.row[done].tolist(), slots.count[done].tolist(), slots.out[done].tolist()
        ):
            if ids[n - 1] >= len(self.lm.head):
                raise UserError(f"{self.lm.path}: a logit is NaN; train it again")
            ended.append((r, ids[:n]))
        slots.row[done] = -1
        return ended

    def compact(self, living: int):
        """Go on with as few slots as the living rows need, which come first."""
        if (size := _sixteens(living)) >= self.size:
            return
        alive = self.slots.alive
        first = torch.cat([alive.nonzero()[:, 0], (~alive).nonzero()[:, 0]])[:size]
        for store in (*self.cache.keys, *self.cache.values):
            store[:size] = store[first]
        self.slots, self.size = self.slots.take(first), size
        self.graphs = {}  # they were captured for the old tensors


def _at_least_16(f, x):
    """f(x) on at least 16 rows: a row's bits do not depend on how many came with it."""
    return f(x) if len(x) >= 16 else f(F.pad(x, (0, 0, 0, 16 - len(x))))[: len(x)]


def _sixteens(n: int) -> int:
    """n rounded up to a multiple of 16: under 16 rows the CPU's matrix product rounds otherwise."""
    return -(-n // 16) * 16


# ------------------------------------------------------------ memory


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


# ------------------------------------------------------------ who draws


class Sampler:
    """Draws by the model's weights on this device.

    lm: a model.LM. batch: rows decoded at once, fewer where the GPU's memory holds fewer.
    """

    chunk = 64  # problems whose rows decode together
    all_wait = True  # for draws that may save others: other problems' rows decode meanwhile

    def __init__(self, lm, batch: int = 256):
        self.lm, self.batch = lm, batch
        self.provenance = {}  # what a manifest says of draws: nothing, since they are the seed's
        self.trees, self.prefixes = None, None  # of the last call: a stage draws level by level

    def fits(self, trees: list[Tree]) -> bool:
        """Do the trees' prefixes take at most half of the memory? The rest is for the rows."""
        if self.lm.device != "cuda" or self.lm.paths:
            return True
        self.trees = self.prefixes = None
        tokens = sum(len(ids) for tree in trees for ids in tree.ids)
        size = row_bytes(self.lm.config, 1, self.lm.head.element_size())
        return tokens * size <= free_memory() / 2

    @torch.no_grad()
    def draw(
        self, trees: list[Tree], rows: list[Row], temperature: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """A continuation for each row: up to an EOS (kept) or `max_new` tokens.

        -> lists of token ids, in the order of rows. progress: called as rows end, with how many
        have ended and how many tokens they have. Raises UserError where a row is longer than the
        model's context, or the memory holds too few.
        """
        if not rows:
            return []
        if self.lm.paths:
            return self._draw_path_by_path(trees, rows, temperature, progress)
        lm, prefixes = self.lm, self._prefixes(trees)
        sizes = [len(prefixes.path[row.tree, row.node]) for row in rows]
        width = require_room(lm, sizes, rows)
        # Taken from the end: longest first, so that rows of like length decode together.
        waiting = sorted(range(len(rows)), key=lambda r: sizes[r])
        size = rows_that_fit(lm, width, max(16, min(self.batch, _sixteens(len(rows)))))
        decoder = Decoder(lm, prefixes, rows, size, temperature)
        results = [None] * len(rows)
        while True:
            living = decoder.living()
            # A tenth of the slots pays for admitting rows, a quarter for a smaller batch.
            if living <= (0.9 if waiting else 0.75) * decoder.size:
                for r, ids in decoder.retire():
                    results[r] = ids
                    if progress:
                        progress(1, len(ids))
                if waiting:
                    decoder.admit(waiting)
                    continue  # one may end with its first token
                if living == 0:
                    return results
                decoder.compact(living)
            for _ in range(8 if lm.device == "cuda" else 1):
                decoder.step()

    def _draw_path_by_path(self, trees, rows, temperature, progress) -> list[list[int]]:
        """The same by the model's own cache, whatever that is: rows whose prefixes have one length
        decode together."""
        from support.generation import generate  # takes seconds

        lm, results = self.lm, [None] * len(rows)
        prefixes = [path_ids(trees[row.tree], row.node) for row in rows]
        require_room(lm, list(map(len, prefixes)), rows)
        order = sorted(range(len(rows)), key=lambda r: len(prefixes[r]))
        for _, group in groupby(order, key=lambda r: len(prefixes[r])):
            group = iter(group)
            while some := list(islice(group, self.batch)):
                key = torch.tensor([rows[r].key for r in some], device=lm.device)

                def draw(logits, drawn: int, key=key):
                    return draw_tokens(logits, key, torch.full_like(key, drawn), temperature)

                longest = max(rows[r].max_new for r in some)
                drawn = generate(lm, [prefixes[r] for r in some], longest, draw)
                for r, ids in zip(some, drawn):
                    results[r] = ids[: rows[r].max_new]
                    if progress:
                        progress(1, len(results[r]))
        return results

    def _prefixes(self, trees: list[Tree]) -> Prefixes:
        """Of these trees, computed unless the last call was about the same list."""
        if trees is not self.trees:
            self.trees = self.prefixes = None  # their memory is free before the next take theirs
            self.trees, self.prefixes = trees, Prefixes(self.lm, trees)
        return self.prefixes

    def work_through(self, todo: Iterable, process: Callable, progress, write: Callable):
        """write(process(items, progress)), a list of records, of all items, a chunk at a time."""
        items = iter(todo)
        while some := list(islice(items, self.chunk * world())):
            write(process(some, progress))


def require_room(lm, sizes: list[int], rows: list[Row]) -> int:
    """Tokens of the longest row and its prefix (sizes); UserError if the model's context is shorter."""
    width = max(size + row.max_new for size, row in zip(sizes, rows))
    if width > lm.max_length:
        wrong = f"a prefix and its new tokens are {width}, the context is {lm.max_length}"
        raise UserError(f"{lm.path}: {wrong}; lower --max_new or leave long problems out")
    return width


def require_single_process(script: str):
    """Refuse torchrun: several cards sample by an engine, which shares out the work itself."""
    if world() > 1:
        raise UserError(
            f"{script}: runs as one process; for several cards start a --server on them"
        )
