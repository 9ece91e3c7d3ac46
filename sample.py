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

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from evaluate import grade_ids
from model import LM, Prefixes, Tree, UserError, draw_key, flag, sample
from prepare import Stage, actor_facts, main, read_jsonl, sha256


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
            drawn = sample(lm, prefixes, rows, batch=s.batch, progress=progress)
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
