"""Stage A.1: n1 responses a problem from the current actor, graded; n kept, balanced.

    python sample.py --actor runs/demo/base --problems runs/demo/train.jsonl \\
        --out runs/demo/iter1/samples.jsonl

Reads:  problems, and the actor (pi_gen = pi_ref: algorithm 1 generates with the policy that it
improves).
Writes: samples.jsonl, a line a problem; `ends` are token offsets one past each step's last token
    {"id": "demo/train/17", "prompt_ids": [1, 9], "kept": [0, 4], "responses":
     [{"ids": [5, 9, 0], "ends": [2, 3], "text": "..", "reward": 1, "finished": true}]}

Departures from the paper:
 1. Temperature-1 draws are from the whole distribution; the paper names no top-p or top-k.
 2. The balanced choice is n // 2 right and n - n // 2 wrong in the order drawn, filled up from the
    other kind if one runs short. A problem whose responses are all alike is kept too, since its
    steps may still differ in value; --mixed keeps none of its responses, and so spends no label on
    problems that the actor always or never solves.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import BLOCK, LM, CacheView, Tree, TreeView, UserError, flag, pack_hidden, pack_trees
from prepare import Stage, actor_facts, main, read_jsonl, sha256
from reward import grade_ids

# ------------------------------------------------------------ the sampler


def draw_key(*what) -> int:
    """64-bit key of a draw, a hash of (seed, stage, problem, state, number): not of the batch."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """splitmix64: a uniform in [0, 1), (B,) float64, for each key and position, (B,) int64."""
    z = key + (position + 1) * -0x61C8864680B583EB  # the golden ratio's bits; int64 wraps around
    z = (z ^ ((z >> 30) & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & (1 << 33) - 1)
    return ((z >> 12) & (1 << 52) - 1).double() * 2.0**-52


def draw_tokens(logits, key, position, temperature: float) -> torch.Tensor:
    """Inverse-CDF draw from the whole distribution, (B, V) -> (B,); temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)
    # u < cdf[-1], so a token of probability 0 is never drawn
    u = uniforms(key, position)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0]


class Prefixes:
    """Keys, values and last hidden states of trees of prefixes, every token computed once.

    path[tree, node]: where the tokens of prompt .. node lie; a row of a pack's mask is a path.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, trees: list[Tree], budget: int = 8192):
        self.path, hidden, kept, self.tokens = {}, [], [], 0
        for pack in pack_trees(trees, budget, align=BLOCK):
            view = TreeView(pack, lm.device, keep=True)
            hidden.append(pack_hidden(lm, pack, view))
            kept.append(view.kept)
            end = pack.end.numpy()
            for owner, last in zip(pack.owner, pack.last.tolist()):
                self.path[owner] = np.flatnonzero(end[: last + 1] > last) + self.tokens
            self.tokens += len(end)
        self.hidden = torch.cat(hidden)  # (tokens, d)
        self.keys, self.values = [], []
        while kept[0]:  # a layer at a time: no second copy of all of them exists
            keys, values = zip(*(layers.pop(0) for layers in kept))
            self.keys.append(torch.cat(keys, 1))  # (G, tokens, D)
            self.values.append(torch.cat(values, 1))


@torch.no_grad()
def draw_rows(
    lm: LM, prefixes: Prefixes, rows: list, temperature=1.0, batch=256, progress=None
) -> list:
    """A continuation for each row (tree, node, key, room): up to an EOS (kept) or `room` tokens.

    -> lists of token ids, in the order of rows. They depend on a row's prefix and key alone, not on
    the batch, the neighbours or the slot (on the CPU in float32: to the last bit).
    A finished row's slot goes to the next waiting row; when none waits, the batch shrinks.
    """
    paths = [prefixes.path[tree, node] for tree, node, _, _ in rows]
    # popped from the end: longest first, so that rows of like length decode together
    queue = sorted(range(len(rows)), key=lambda r: len(paths[r]))
    width = max((len(p) + r[3] for p, r in zip(paths, rows)), default=0)
    if width > lm.max_length:
        wrong = f"a prefix and its new tokens are {width}, the context is {lm.max_length}"
        raise UserError(f"{lm.path}: {wrong}; lower --max_new or leave long problems out")
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
        fewer = max(16, -(-live // 16) * 16)
        if live <= 0.75 * slots and fewer < slots and not queue:  # leave the finished rows behind
            harvest()
            slots = fewer
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
    """f(x) on at least 16 rows: a row's bits do not depend on how many came with it."""
    return f(x) if len(x) >= 16 else f(F.pad(x, (0, 0, 0, 16 - len(x))))[: len(x)]


# ------------------------------------------------------------ the stage


@dataclass(frozen=True)
class Settings:
    actor: str = flag("Hugging Face folder or hub id of the current policy")
    problems: str = flag("problems.jsonl from prepare.py")
    out: str = flag("samples.jsonl to write")
    n1: int = flag("responses drawn a problem", 32)
    n: int = flag("responses kept a problem", 6)
    mixed: bool = flag(
        "keep no response of a problem whose draws are all right or all wrong", False
    )
    first: int = flag("skip this many problems", 0)
    limit: int = flag("use at most this many problems; 0: all", 0)
    max_new: int = flag("length limit of a response in tokens", 2048)
    batch: int = flag("rows decoded at once", 256)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the draws", 0)
    unsafe: bool = flag("run programs even where they cannot be walled off", False)
    force: bool = flag("throw an existing output away", False)


def keep_balanced(rewards: list[int], n: int) -> list[int]:
    """Indices of the n responses to keep: half right, half wrong as far as there are, as drawn.

    rewards [1, 0, 0, 0, 1, 0], n = 4 -> right [0, 4], wrong [1, 2] -> [0, 1, 2, 4]
    """
    right, wrong = ([i for i, r in enumerate(rewards) if r == kind] for kind in (1, 0))
    a = min(len(right), max(n // 2, n - len(wrong)))
    return sorted(right[:a] + wrong[: n - a])


def stage(s: Settings):
    if not 1 <= s.n <= s.n1:
        raise UserError(f"--n {s.n}: wanted 1 <= n <= n1 = {s.n1}")
    problems = read_jsonl(Path(s.problems), needs=("id", "prompt", "answer or tests"))
    problems = problems[s.first :][: s.limit or None]
    if not problems:
        raise UserError(f"{s.problems}: no problem is left after --first {s.first}")
    out = Stage(s.out, s, {"actor": s.actor, "problems": s.problems})
    if out.complete:
        return
    lm = LM(s.actor, dtype=s.dtype)
    out.begin({**actor_facts(lm, s.max_new), "problems": sha256(s.problems)})
    done = {r["id"] for r in out.done}
    todo = [p for p in problems if p["id"] not in done]
    tokens = right = 0
    with tqdm(desc="sample", unit=" tokens", disable=None) as progress:
        for i in range(0, len(todo), 64):
            chunk = todo[i : i + 64]
            prompts = [lm.prompt_ids(p["prompt"]) for p in chunk]
            prefixes = Prefixes(lm, [Tree([ids], [-1], [True]) for ids in prompts])
            rows = [
                (j, 0, draw_key(s.seed, "sample", p["id"], k), s.max_new)
                for j, p in enumerate(chunk)
                for k in range(s.n1)
            ]
            drawn = draw_rows(lm, prefixes, rows, batch=s.batch, progress=progress)
            graded = grade_ids(lm, [chunk[j] for j, *_ in rows], drawn, s.unsafe)
            everything = [
                {"ids": ids, "ends": lm.step_ends(ids), "text": g["text"],
                 "reward": int(g["correct"]), "finished": g["finished"]}
                for ids, g in zip(drawn, graded)
            ]  # fmt: skip
            records = []
            for j, p in enumerate(chunk):
                responses = everything[j * s.n1 : (j + 1) * s.n1]
                rewards = [r["reward"] for r in responses]
                tokens += sum(len(r["ids"]) for r in responses)
                right += sum(rewards)
                alike = s.mixed and len({*rewards}) < 2
                kept = [] if alike else keep_balanced(rewards, s.n)
                records.append(
                    {"id": p["id"], "prompt_ids": prompts[j], "kept": kept, "responses": responses}
                )
            out.append(records)
    out.finish()
    print(
        f"{len(todo)} problems, {tokens} tokens, {right / max(1, len(todo) * s.n1):.3f} of the responses right"
    )


if __name__ == "__main__":
    main(stage, Settings, __doc__)
