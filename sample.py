"""Stage A.1: n1 responses per problem from the current actor, graded; n of them kept, balanced.

    python sample.py --actor runs/demo/base --problems runs/demo/train.jsonl \\
        --out runs/demo/iter1/samples.jsonl

Reads:  problems, and the actor (pi_gen = pi_ref: algorithm 1 generates with the policy that it
improves).
Writes: samples.jsonl, a line per problem; `ends` are token offsets one past each step's last token
    {"id": "demo/train/17", "prompt_ids": [1, 9], "kept": [0, 4], "responses":
     [{"ids": [5, 9, 7, 0], "ends": [2, 4], "text": "..", "reward": 1, "finished": true}]}

Departures from the paper, by default:
 1. Temperature-1 draws are from the whole distribution; the paper names no top-p or top-k.
 2. The balanced choice is n // 2 right and n - n // 2 wrong in the order drawn, filled up from the
    other kind if one runs short. A problem whose responses are all alike is kept too, since its
    steps may still differ in value; --mixed keeps none of its responses, and so spends no label on
    problems that the actor always or never solves.

Beyond the paper, off by default:
 3. --step paragraph, response or a number of tokens makes another unit of a step than the line; the
    later stages read it from the manifest. With --step response the only step is the whole
    response: then label_steps.py --whole_draws --m 0 and train_actor.py --kappa 0 are outcome
    advantages, without steps or critic.
"""

from dataclasses import dataclass

from model import LM, checked_step_ends, load_lm, require_step_unit
from reward import grade_ids
from support.cli import Progress, UserError, flag, main
from support.packing import Tree
from support.records import read_problems, sha256
from support.sampler import Row, draw_key, require_single_process
from support.server import sampler_for
from support.stage import Output, actor_provenance


@dataclass(frozen=True)
class Settings:
    actor: str = flag("Hugging Face folder or hub id of the current policy")
    problems: str = flag("problems.jsonl from prepare.py")
    out: str = flag("samples.jsonl to write")
    n1: int = flag("responses drawn per problem", 32)
    n: int = flag("responses kept per problem", 6)
    step: str = flag("what a step is: line, paragraph, response, or a number of tokens", "line")
    mixed: bool = flag("keep no response of a problem whose draws all have one reward", False)
    first: int = flag("skip this many problems", 0)
    limit: int = flag("use at most this many problems; 0: all", 0)
    max_new: int = flag("length limit of a response in tokens", 2048)
    batch: int = flag("rows decoded at once, at least 16", 256, may_change=True)
    server: str = flag("URL of a server that serves the actor, or several, comma separated", "")
    workers: int = flag("processes that ask the server, decode and grade", 1)
    engines: int = flag("data-parallel engines of a server; 0: as many as it says", 0)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the draws", 0)
    unsafe: bool = flag("run programs even where they cannot be walled off", False, may_change=True)
    force: bool = flag("throw an existing output away", False)


def keep_balanced(rewards: list[float], n: int) -> list[int]:
    """Indices of the n responses to keep: half right, half wrong as far as there are, as drawn.

    rewards [1, 0, 0, 0, 1, 0], n = 4 -> right [0, 4], wrong [1, 2] -> [0, 1, 2, 4]

    A reward of 0.5 or more counts as right here, so that partial credit can be balanced too.
    """
    right = [i for i, reward in enumerate(rewards) if reward >= 0.5]
    wrong = [i for i, reward in enumerate(rewards) if reward < 0.5]
    a = min(len(right), max(n // 2, n - len(wrong)))
    return sorted(right[:a] + wrong[: n - a])


def respond(
    lm: LM, sampler, problems: list[dict], count: int, use: str, s, temperature=1.0, progress=None
) -> list[tuple]:
    """(prompt_ids, `count` graded responses: {"ids", "text", "reward", ...}) of each problem.

    sampler: who draws. use: what for, so that no other draws have the same keys. s: settings with
    seed, max_new and unsafe. progress: as in Sampler.draw.
    """
    trees = [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in problems]
    rows, owners = [], []
    for j, problem in enumerate(problems):
        for k in range(count):
            rows.append(Row(j, 0, draw_key(s.seed, use, problem["id"], k), s.max_new))
            owners.append(problem)
    drawn = sampler.draw(trees, rows, temperature, progress)
    answered = [(tree.ids[0], []) for tree in trees]
    for row, ids, graded in zip(rows, drawn, grade_ids(lm, owners, drawn, s.unsafe)):
        answered[row.tree][1].append({"ids": ids, **graded})
    return answered


def stage(s: Settings):
    require_single_process("sample.py")
    if not 1 <= s.n <= s.n1:
        raise UserError(f"--n {s.n}: wanted 1 <= n <= n1 = {s.n1}")
    require_step_unit(s.step)
    problems = read_problems(s.problems)
    problems = problems[s.first :][: s.limit or None]
    if not problems:
        raise UserError(f"{s.problems}: no problem is left after --first {s.first}")
    output = Output("sample.py", s.out, s, {"actor": s.actor, "problems": s.problems})
    if output.complete:
        return
    lm = load_lm(s.actor, dtype=s.dtype, weights=not s.server)
    lm.step, lm.codec.date = s.step, output.date  # some chat templates print the date
    sampler = sampler_for(lm, s)

    def process(chunk: list[dict], progress) -> list[dict]:
        def ended(responses: int, tokens: int):
            progress(responses / s.n1, tokens=tokens)

        answered = respond(lm, sampler, chunk, s.n1, "sample", s, progress=ended)
        records = []
        for problem, (prompt_ids, responses) in zip(chunk, answered):
            records.append(sample_record(lm, problem, prompt_ids, responses, s))
        return records

    provenance = {
        **actor_provenance(lm, s.max_new),
        "problems": sha256(s.problems),
        **sampler.provenance,
    }
    with output.open(provenance, count=counted) as out:
        todo = [p for p in problems if p["id"] not in out.done]
        with Progress("sample", len(todo)) as bar:
            sampler.work_through(todo, process, bar.add, out.append)
    print(summary(out.totals))


def summary(total: dict) -> str:
    """How sampling went, in words. total: sums of `counted` over the whole file."""
    n, right = total["problems"], total["rewards"] / max(1, total["responses"])
    return (
        f"A.1: {total['responses']:,} responses to {n:,} problems, mean reward {right:.3f}; "
        f"{total['mixed']:,} problems ({total['mixed'] / max(1, n):.0%}) have better and worse ones "
        f"(near 0 %: too hard or too easy); {total['tokens']:,} tokens"
    )


def sample_record(lm: LM, problem: dict, prompt_ids: list[int], responses: list[dict], s) -> dict:
    """A line of samples.jsonl."""
    rewards = [r["reward"] for r in responses]
    kept = keep_balanced(rewards, s.n)
    if s.mixed and len(set(rewards)) == 1:
        kept = []
    lines = []
    for r in responses:
        line = {"ids": r["ids"], "ends": checked_step_ends(lm, r["ids"]), "text": r["text"]}
        lines.append(line | {"reward": r["reward"], "finished": r["finished"]})
    return {"id": problem["id"], "prompt_ids": prompt_ids, "kept": kept, "responses": lines}


def counted(record: dict) -> dict:
    """What a line of samples.jsonl adds to the totals of its manifest."""
    responses = record["responses"]
    return {
        "problems": 1,
        "kept": int(bool(record["kept"])),  # problems of which a response is kept
        "mixed": int(len({r["reward"] for r in responses}) > 1),  # whose rewards differ
        "responses": len(responses),
        "tokens": sum(len(r["ids"]) for r in responses),
        "rewards": sum(r["reward"] for r in responses),
    }


if __name__ == "__main__":
    main(stage, Settings, __doc__)
