"""Stage A.1: n1 responses a problem from the current actor, graded; n kept, balanced. And drawing.

    python sample.py --actor runs/demo/base --problems runs/demo/train.jsonl \\
        --out runs/demo/iter1/samples.jsonl

Reads:  problems, and the actor (pi_gen = pi_ref: algorithm 1 generates with the policy that it
improves).
Writes: samples.jsonl, a line a problem; `ends` are token offsets one past each step's last token
    {"id": "demo/train/17", "prompt_ids": [1, 9], "kept": [0, 4], "responses":
     [{"ids": [5, 9, 7, 0], "ends": [2, 4], "text": "..", "reward": 1, "finished": true}]}

Departures from the paper:
 1. Temperature-1 draws are from the whole distribution; the paper names no top-p or top-k.
 2. The balanced choice is n // 2 right and n - n // 2 wrong in the order drawn, filled up from the
    other kind if one runs short. A problem whose responses are all alike is kept too, since its
    steps may still differ in value; --mixed keeps none of its responses, and so spends no label on
    problems that the actor always or never solves.

Drawing is one function, `draw(lm, trees, rows)`, for this stage, label_steps.py and evaluate.py. It
is done here, by `Prefixes` (every token of a tree is computed once) and `Slots` (rows that decode
together), or by a server that takes and returns token ids (--server, class `Server`).
"""

import functools
import hashlib
import http.client
import json
import math
import queue
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import (
    BLOCK,
    LM,
    Progress,
    Tree,
    TreeView,
    UserError,
    first_line,
    flag,
    grouped_attention,
    on_cuda,
    pack_hidden,
    pack_trees,
    row_bytes,
    world,
)
from prepare import (
    Stage,
    actor_facts,
    each_record,
    fingerprint,
    main,
    misfit,
    read_jsonl,
    sha256,
)
from reward import grade_ids

# ------------------------------------------------------------ samples.jsonl, read

REWARD = int | float  # from 0 to 1
RESPONSE = {"ids": [int], "ends": [int], "text": str, "reward": REWARD, "finished": bool}


def each_sample(path: str) -> Iterator[dict]:
    """The lines of samples.jsonl one by one: offsets that cut steps, and choices that exist."""
    for record in each_record(path, ("id", "prompt_ids", "responses")):
        if bad := broken_samples(record):
            raise UserError(f"{path}: {record['id']}, {bad}: no samples; make them anew")
        yield record


def broken_samples(record: dict) -> str | None:
    """What is wrong with a line of samples.jsonl; None if nothing is."""
    if bad := misfit(record, {"prompt_ids": [int], "kept": [int], "responses": [RESPONSE]}):
        return bad
    for response in record["responses"]:
        ends = [0, *response["ends"]]
        if ends != sorted({*ends, len(response["ids"])}):
            return "ends"
        if not 0 <= response["reward"] <= 1:
            return "reward"
    if not {*record["kept"]} <= {*range(len(record["responses"]))}:
        return "kept"
    return None


# ------------------------------------------------------------ one token


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


# ------------------------------------------------------------ keys and values

COLUMNS = 128  # of the cache, that one CUDA graph serves


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


def free_memory() -> int:
    """Bytes of the GPU that nothing uses, those that torch has set aside included."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def rows_that_fit(lm: LM, columns: int, wanted: int) -> int:
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


# ------------------------------------------------------------ continuations of trees' states


class Row(NamedTuple):
    """One draw: what follows the tokens from trees[tree]'s root through `node`."""

    tree: int
    node: int
    key: int  # of its random numbers (draw_key)
    room: int  # the most tokens that it may have


def prefixes_fit(lm: LM, trees: list[Tree]) -> bool:
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
    def __init__(self, lm: LM, trees: list[Tree], budget: int = 8192):
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

    def __init__(self, lm: LM, prefixes: Prefixes, rows: list[Row], size: int, temperature: float):
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
    lm: LM, trees: list[Tree], rows: list[Row], temperature=1.0, batch=256, progress=None,
    prefixes: Prefixes | None = None, server: "Server | None" = None,
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


# ------------------------------------------------------------ continuations by a server


class Fault(Exception):
    """A server's answer that cannot be used, for a reason that may pass."""


class NoTokenIds(Fault):
    """What a server says that cannot return token ids."""


# Of the connection, and of answers that hold anything else than what was asked for.
FAULTS = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)
FAULTS += (Fault,)


class Server:
    """Draws by OpenAI-compatible servers that take and return token ids (vLLM, SGLang).

    urls: comma separated, each the root of a server ("http://127.0.0.1:8000"). lm: tokenizer and
    config of the model that they must serve (its weights are not needed). Log-probs are never taken
    from a server, and no seed is sent: draws differ from run to run, what is stored stays.
    """

    requests = 64  # that each server is asked at once
    most = 64  # continuations that a request asks for
    tries = 8  # of one request, on whichever server is free
    timeout = 900.0  # seconds for one answer
    pause = 1.0  # seconds that a server rests after a fault, doubled with each further one

    def __init__(self, urls: str, lm: LM):
        self.lm, self.names, self.contexts = lm, {}, {}
        self.faults, self.rest = {}, {}  # of each server: faults in a row, and until when it rests
        if wrong := [url for url in urls.split(",") if "://" not in url]:
            raise UserError(f"--server {wrong[0]}: wanted a URL such as http://127.0.0.1:8000")
        end = lm.tokenizer.eos_token_id
        if end is not None and end not in lm.eos:  # here such a response would go on
            wrong = f"a server ends responses at the tokenizer's EOS too, {end}"
            raise UserError(f"{lm.path}: {wrong}; add it to eos_token_id in generation_config.json")
        self.seats = queue.PriorityQueue()  # (when it may be used, number, url): free requests
        for url in [url.strip().rstrip("/") for url in urls.split(",")]:
            self.faults[url], self.rest[url] = 0, 0.0
            self._check(url)
            for _ in range(self.requests):
                self.seats.put((0.0, self.seats.qsize(), url))

    def _check(self, url: str):
        """Refuse a server that serves another model, or gives no token ids."""
        try:
            self._name_of_model(url)
            self._complete(url, [self.lm.eos[0]], 1, 1, 0.0)
        except NoTokenIds as e:
            raise UserError(f"{url}: {e}; a server that returns token ids is needed") from e
        except FAULTS as e:
            raise ConnectionError(f"{url}: {e}; is the server up?") from e

    def _name_of_model(self, url: str) -> str:
        """What the server calls the actor: it is known by its path, or by its weights' fingerprint."""
        models = self._ask(url, "/v1/models")["data"]
        own = {self.lm.path, str(Path(self.lm.path).resolve()), fingerprint(self.lm.path)[:16]}
        served = set()
        for model in models:
            names = {model.get("id"), model.get("root")}
            if names & own:
                self.names[url] = model["id"]
                self.contexts[url] = min(model.get("max_model_len") or math.inf, self.lm.max_length)
                return model["id"]
            served |= names
        others = ", ".join(sorted(str(name) for name in served if name))
        raise UserError(f"{url}: serves {others}, not {self.lm.path}; start it with that folder")

    def _ask(self, url: str, path: str, question: dict | None = None) -> dict:
        data = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as e:
            said = e.read().decode(errors="replace")[:300]
            if 400 <= e.code < 500 and e.code not in (408, 429):
                raise UserError(f"{url}: answered {e.code}: {said}") from e
            raise Fault(f"answered {e.code}: {said}") from e

    def _complete(self, url, prompt: list[int], count: int, room: int, temperature) -> list:
        """Up to `count` continuations of a prompt; Fault if the answer is not to be trusted."""
        # A server cuts off what does not fit. Asked again until nothing is cut off, it would draw
        # short responses alone.
        if len(prompt) + room > self.contexts[url]:
            wrong = f"a prefix and its new tokens are {len(prompt) + room}"
            wrong += f", the server's context is {self.contexts[url]}"
            raise UserError(f"{url}: {wrong}; lower --max_new, or start it with a longer context")
        question = {
            "model": self.names[url], "prompt": prompt, "n": count, "max_tokens": room,
            "temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": False, "stop_token_ids": self.lm.eos, "return_token_ids": True,
        }  # fmt: skip
        answer = self._ask(url, "/v1/completions", question)
        drawn = []
        for choice in answer.get("choices") or ():
            ids, echoed = choice.get("token_ids"), choice.get("prompt_token_ids")
            echoed = answer.get("prompt_token_ids") if echoed is None else echoed
            if not isinstance(ids, list) or not isinstance(echoed, list):
                raise NoTokenIds("its answers have no token ids")
            if echoed != prompt:
                raise Fault("it answered another prompt than it was sent")
            if choice.get("finish_reason") == "stop" and not (ids and ids[-1] in self.lm.eos):
                end = choice.get("stop_reason")
                ids = [*ids, self.lm.own_eos if end is None else end]  # none said: the tokenizer's
            whole = len(ids) == room or (ids and len(ids) < room and ids[-1] in self.lm.eos)
            if not whole or set(ids[:-1]) & set(self.lm.eos):
                raise Fault(f"{len(ids)} tokens came where {room} or an end were asked for")
            # Rows of the head beyond the tokenizer are padding: such a draw is made anew.
            if all(type(i) is int and 0 <= i < len(self.lm.tokenizer) for i in ids):
                drawn.append(ids)
        if not answer.get("choices") or len(drawn) > count:
            raise Fault(f"{len(drawn)} continuations came where {count} were asked for")
        return drawn

    def _continuations(self, prompt: list[int], count: int, room: int, temperature) -> list:
        """`count` continuations, by whichever server is free, tried again where one fails."""
        drawn, failed = [], 0
        while len(drawn) < count:
            usable, number, url = self.seats.get()
            if usable < self.rest[url]:  # a fault at another of its seats: the whole server rests
                self.seats.put((self.rest[url], number, url))
                continue
            time.sleep(max(0.0, usable - time.monotonic()))
            began = time.monotonic()
            try:
                if self.faults[url]:  # it may have been started anew, with another model
                    self._name_of_model(url)
                # At temperature 0 a request for several is refused.
                asked = min(self.most if temperature else 1, count - len(drawn))
                more = self._complete(url, prompt, asked, room, temperature)
                if not more:
                    raise Fault("it draws tokens that the tokenizer does not have")
                drawn = drawn + more
                self.faults[url], self.rest[url] = 0, 0.0
            except FAULTS as e:
                failed += 1
                if began >= self.rest[url]:  # requests in flight together fail together, once
                    self.faults[url] += 1
                    rest = self.pause * 2 ** min(self.faults[url] - 1, 6)
                    self.rest[url] = time.monotonic() + rest
                if failed >= self.tries:
                    raise ConnectionError(f"{url}: {e}, {failed} times") from e
            finally:
                self.seats.put((self.rest[url], number, url))
        return drawn

    def draw(self, trees: list[Tree], rows: list[Row], temperature: float, progress):
        """As the function `draw`: rows of one state and room are one request."""
        asked = {}  # (tree, node, room): the numbers of its rows
        for r, row in enumerate(rows):
            asked.setdefault((row.tree, row.node, row.room), []).append(r)

        def ask(state):
            tree, node, room = state
            prompt = []
            while node >= 0:
                prompt = trees[tree].ids[node] + prompt
                node = trees[tree].parent[node]
            return self._continuations(prompt, len(asked[state]), room, temperature)

        results = [None] * len(rows)
        with ThreadPoolExecutor(self.requests) as pool:
            for state, drawn in zip(asked, pool.map(ask, asked)):
                for r, ids in zip(asked[state], drawn):
                    results[r] = ids
                    if progress is not None:
                        progress.add(len(ids))
        return results


def work_through(todo: Iterable, process, out: Stage, server: Server | None, chunk: int = 64):
    """Append process(list of items) -> records of all items: the loop of every stage that draws.

    Here: `chunk` problems at a time, since they decode in one batch. By a server: a thread a problem,
    so that requests are in flight over the problems' borders, and records come as problems finish.
    """
    items = iter(todo)
    if server is None:
        while some := list(islice(items, chunk)):
            out.append(process(some))
        return
    threads = server.requests * len(server.faults)
    with ThreadPoolExecutor(threads) as pool:
        running = set()
        try:
            while True:
                for item in islice(items, 2 * threads - len(running)):
                    running.add(pool.submit(process, [item]))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    out.append(future.result())
        finally:
            for future in running:
                future.cancel()


# ------------------------------------------------------------ the stage


def alone(script: str):
    """Refuse torchrun: several cards sample by an engine, which shares out the work itself."""
    if world() > 1:
        raise UserError(
            f"{script}: runs as one process; for several cards start a --server on them"
        )


@dataclass(frozen=True)
class Settings:
    actor: str = flag("Hugging Face folder or hub id of the current policy")
    problems: str = flag("problems.jsonl from prepare.py")
    out: str = flag("samples.jsonl to write")
    n1: int = flag("responses drawn a problem", 32)
    n: int = flag("responses kept a problem", 6)
    mixed: bool = flag("keep no response of a problem whose draws all have one reward", False)
    first: int = flag("skip this many problems", 0)
    limit: int = flag("use at most this many problems; 0: all", 0)
    max_new: int = flag("length limit of a response in tokens", 2048)
    batch: int = flag("rows decoded at once, at least 16", 256)
    server: str = flag("URL of a server that serves the actor, or several, comma separated", "")
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the draws", 0)
    unsafe: bool = flag("run programs even where they cannot be walled off", False)
    force: bool = flag("throw an existing output away", False)


def keep_balanced(rewards: list[float], n: int) -> list[int]:
    """Indices of the n responses to keep: half right, half wrong as far as there are, as drawn.

    rewards [1, 0, 0, 0, 1, 0], n = 4 -> right [0, 4], wrong [1, 2] -> [0, 1, 2, 4]
    """
    right = [i for i, reward in enumerate(rewards) if reward >= 0.5]
    wrong = [i for i, reward in enumerate(rewards) if reward < 0.5]
    a = min(len(right), max(n // 2, n - len(wrong)))
    return sorted(right[:a] + wrong[: n - a])


def respond(lm: LM, problems: list[dict], count: int, use: str, s, **how) -> list[tuple]:
    """(prompt_ids, `count` graded responses: {"ids", "text", "reward", ...}) of each problem.

    use: what for, so that no other draws have the same keys. s: settings with seed, max_new, batch
    and unsafe. how: further arguments of `draw`.
    """
    trees = [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in problems]
    rows, owners = [], []
    for j, problem in enumerate(problems):
        for k in range(count):
            rows.append(Row(j, 0, draw_key(s.seed, use, problem["id"], k), s.max_new))
            owners.append(problem)
    drawn = draw(lm, trees, rows, batch=s.batch, **how)
    answered = [(tree.ids[0], []) for tree in trees]
    for row, ids, graded in zip(rows, drawn, grade_ids(lm, owners, drawn, s.unsafe)):
        answered[row.tree][1].append({"ids": ids, **graded})
    return answered


def stage(s: Settings):
    alone("sample.py")
    if not 1 <= s.n <= s.n1:
        raise UserError(f"--n {s.n}: wanted 1 <= n <= n1 = {s.n1}")
    problems = read_jsonl(Path(s.problems), needs=("id", "prompt", "answer or tests"))
    problems = problems[s.first :][: s.limit or None]
    if not problems:
        raise UserError(f"{s.problems}: no problem is left after --first {s.first}")
    out = Stage("sample.py", s.out, s, {"actor": s.actor, "problems": s.problems})
    if out.complete:
        return
    lm = LM(s.actor, dtype=s.dtype, weights=not s.server)
    server = Server(s.server, lm) if s.server else None
    facts = {"draws": "server"} if server else {}
    out.begin({**actor_facts(lm, s.max_new), "problems": sha256(s.problems), **facts})
    todo = [p for p in problems if p["id"] not in out.done]
    rewards, tokens = [], []  # of all responses
    with Progress("sample", len(todo)) as progress:

        def process(chunk: list[dict]) -> list[dict]:
            how = {"progress": progress, "server": server}
            answered = respond(lm, chunk, s.n1, "sample", s, **how)
            records = []
            for problem, (prompt_ids, responses) in zip(chunk, answered):
                rewards.extend(r["reward"] for r in responses)
                tokens.extend(len(r["ids"]) for r in responses)
                records.append(sample_record(lm, problem, prompt_ids, responses, s))
            progress.update(len(chunk))
            return records

        work_through(todo, process, out, server)
    out.finish()
    right = sum(rewards) / max(1, len(rewards))
    print(f"{len(todo)} problems, {sum(tokens)} tokens, {right:.3f} of the responses right")


def sample_record(lm: LM, problem: dict, prompt_ids: list[int], responses: list[dict], s) -> dict:
    """A line of samples.jsonl."""
    rewards = [r["reward"] for r in responses]
    kept = keep_balanced(rewards, s.n)
    if s.mixed and len(set(rewards)) == 1:
        kept = []
    lines = []
    for r in responses:
        line = {"ids": r["ids"], "ends": lm.step_ends(r["ids"]), "text": r["text"]}
        lines.append(line | {"reward": r["reward"], "finished": r["finished"]})
    return {"id": problem["id"], "prompt_ids": prompt_ids, "kept": kept, "responses": lines}


if __name__ == "__main__":
    main(stage, Settings, __doc__)
