r"""Evaluate an actor: greedy accuracy, and how far it is above another on the same problems.

    python evaluate.py --actor runs/demo/iter1/actor --problems runs/demo/test.jsonl \
        --out runs/demo/iter1/eval.jsonl --against runs/demo/iter0/eval.jsonl --samples 8
    python evaluate.py --compare runs/demo runs/beta/iter1/eval.jsonl     # a row each
    python evaluate.py --report runs/demo        # table, pictures and a page of a whole run

Reads:  problems (several sets: comma separated), an actor, and another actor's eval.jsonl.
Writes: eval.jsonl, a line per problem (the greedy response), and summary.json beside it
    {"id": "demo/test/17", "text": "..", "prediction": "18", "correct": true, "reward": 1,
     "verdict": "right", "finished": true,
     "sampled": [{"text": "..", "prediction": "18", "correct": true, "reward": 1}]}

"correct" is full reward, and accuracy the share of correct responses: zero-shot, greedy, with the
model's own chat template. Where a reward is neither 0 nor 1, the mean reward stands beside it.
--samples adds responses at temperature 1: their accuracy, pass@k (unbiased), maj@k.

A problem with a "number" (the embedded --task parity) can be answered right by luck. Its responses
have "reasoned" too: is the last number that the response names the true one?

Two actors are compared on the same problems: exact McNemar test, paired bootstrap interval.
--compare takes eval.jsonl files, or run folders for their last iteration, and pairs each with the
first. --report loads no model. It writes into the run's folder report.png (the course of training),
solution.png (one response, its steps coloured by advantage), tree.png (one small step tree) and
report.html (all of these and 20 problems to browse, in one file that needs no network).
"""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean

from model import LM, checked_step_ends, load_lm
from sample import respond
from support.cli import Progress, UserError, flag, main
from support.distributed import all_gather, join, rank, world
from support.records import evaluation_fault, read_jsonl, read_problems, replace
from support.report import (
    TABLE_KEY,
    aligned,
    evaluation_words,
    iterations,
    report,
    table,
    table_row,
)
from support.sampler import require_single_process
from support.server import sampler_for
from support.stage import Output, actor_provenance, read_manifest, stated_by, tokenizer_provenance
from support.stats import majority, paired, pass_at, wilson
from train_critic import load_critic, tree_values

# ------------------------------------------------------------ accuracy, and a paired comparison


def reasoned(problem: dict, text: str) -> bool:
    """Is the last whole number in a response the problem's "number"?

    number "14", "Ben: 7 * 2 = 14\nThe answer is even." -> True
    """
    numbers = re.findall(r"-?\d+", text)
    return bool(numbers) and numbers[-1] == str(problem["number"])


def summarise(lines: list[dict], other: dict[str, dict]) -> dict:
    """The figures of one test set from its lines of eval.jsonl; other: another actor's, by id.

    accuracy, interval      share of right greedy responses, and its Wilson 95 % interval
    cut_off, unparsed       shares of the greedy responses without an end, and without an answer
    sampled, k              share of right ones of the k responses per problem at temperature 1
    reward, reward_sampled  mean rewards, where some reward is neither 0 nor 1
    reasoning, reasoning_sampled    shares of responses that reasoned right, where that is known
    against                 the difference to the other actor: `paired`, greedy and sampled
    """
    n, k = len(lines), len(lines[0]["sampled"])
    right = sum(line["correct"] for line in lines)
    verdicts = Counter(line["verdict"] for line in lines)
    row = {"n": n, "accuracy": right / n, "interval": wilson(right, n)}
    row["cut_off"] = sum(not line["finished"] for line in lines) / n
    row |= {"unparsed": verdicts["no answer"] / n, "verdicts": dict(verdicts)}
    wins = [sum(response["correct"] for response in line["sampled"]) for line in lines]
    if k:
        row |= {"k": k, "sampled": sum(wins) / (n * k)}
        row["maj"] = sum(majority(line["sampled"]) for line in lines) / n
        draws = 2
        while draws <= k:
            row[f"pass@{draws}"] = sum(pass_at(draws, k, w) for w in wins) / n
            draws *= 2
        if "by_critic" in lines[0]:
            row["best_of_k_by_critic"] = sum(line["by_critic"] for line in lines) / n
    drawn = [response for line in lines for response in line["sampled"]]
    partial = any(response["reward"] not in (0, 1) for response in lines + drawn)
    for name, responses in (("", lines), ("_sampled", drawn)):
        if partial and responses:
            row[f"reward{name}"] = mean([response["reward"] for response in responses])
        if known := [response["reasoned"] for response in responses if "reasoned" in response]:
            row[f"reasoning{name}"] = mean(known)
    if other:
        old = [other[line["id"]] for line in lines]
        greedy = paired([line["correct"] for line in lines], [line["correct"] for line in old])
        row["against"] = {"greedy": greedy}
        if k and old[0]["sampled"]:
            before = [mean([r["correct"] for r in line["sampled"]]) for line in old]
            rates = paired([w / k for w in wins], before)
            row["against"]["sampled"] = {key: rates[key] for key in ("difference", "interval")}
    return row


def read_evaluation(path) -> dict[str, dict]:
    """The lines of an eval.jsonl by id."""
    return {line["id"]: line for line in read_jsonl(path, evaluation_fault)}


def compare(names: list[str]):
    """--compare: print a row per eval.jsonl, paired against the first one."""
    paths = []
    for name in map(Path, names):
        found = iterations(name, "eval.jsonl") if name.is_dir() else [name]
        if not found:
            raise UserError(f"{name}: no iter*/eval.jsonl; pass a run folder, or an eval.jsonl")
        paths.append(found[-1])
    first, rows = read_evaluation(paths[0]), []
    for path in paths:
        lines = read_evaluation(path)
        if lines.keys() != first.keys() or problems_of(path) != problems_of(paths[0]):
            raise UserError(f"{path}: not on the problems of {paths[0]}; evaluate both on the same")
        row = summarise([lines[i] for i in first], first if rows else {})
        rows.append((str(path), table_row(row)))
    print("\n".join([f"{len(first)} problems", *aligned(table(rows)), TABLE_KEY]))


def problems_of(path: Path) -> set[str]:
    """Hashes of the problem files of an eval.jsonl: problems of two seeds may have the same ids."""
    inputs = read_manifest(path).get("inputs", {})
    return {inputs[name] for name in inputs if name.startswith("problems")}


# ------------------------------------------------------------ the stage


@dataclasses.dataclass(frozen=True)
class Settings:
    actor: str = flag("Hugging Face folder or hub id to evaluate", "")
    problems: str = flag("problem files, comma separated", "")
    out: str = flag(
        "eval.jsonl to write, with summary.json beside it (x.jsonl: x.summary.json)", ""
    )
    against: str = flag("eval.jsonl of another actor on the same problems", "")
    samples: int = flag("responses per problem at temperature 1, beside the greedy one", 0)
    critic: str = flag("critic that picks the best of --samples (with the actor's tokenizer)", "")
    max_new: int = flag("length limit of a response in tokens", 2048)
    batch: int = flag("rows decoded at once, at least 16", 256, may_change=True)
    server: str = flag("URL of a server that serves the actor, or several, comma separated", "")
    workers: int = flag("processes that ask the server, decode and grade", 1)
    engines: int = flag("data-parallel engines of a server; 0: as many as it says", 0)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the samples", 0)
    compare: list[str] | None = flag(  # noqa: RUF009
        "run folders or eval.jsonl files: print a row each, nothing else", None
    )
    report: str = flag("a run folder: print its table and draw its figures, nothing else", "")
    unsafe: bool = flag("run programs even where they cannot be walled off", False, may_change=True)
    force: bool = flag("throw an existing output away", False)


def stage(s: Settings):
    if s.report:
        return report(Path(s.report))
    if s.compare:
        return compare(s.compare)
    if s.critic and not s.samples:
        raise UserError("--critic picks the best of --samples; give some")
    if not (s.actor and s.problems and s.out):
        other = "--compare, or --report"
        raise UserError(f"evaluate.py: give --actor, --problems and --out, or {other}; see --help")
    paths = s.problems.split(",")
    problems = [p for path in paths for p in read_problems(path)]
    if len({p["id"] for p in problems}) < len(problems):
        raise UserError(f"{s.problems}: some problem is in two of these files")
    other = read_evaluation(s.against) if s.against else {}
    if other and (lacks := [p["id"] for p in problems if p["id"] not in other]):
        raise UserError(f"{s.against}: no problem {lacks[0]}; compare actors on the same problems")
    inputs = {"actor": s.actor} | {f"problems{i or ''}": path for i, path in enumerate(paths)}
    inputs |= {"critic": s.critic} if s.critic else {}
    # --against is no setting of eval.jsonl: a finished evaluation is compared again at no cost
    output = Output("evaluate.py", s.out, dataclasses.replace(s, against=""), inputs)
    if not output.complete:
        if s.server or s.critic:  # one process asks; and a critic scores the trees of all problems
            require_single_process(f"evaluate.py {'--server' if s.server else '--critic'}")
        join()
        lm = load_lm(s.actor, dtype=s.dtype, weights=not s.server)
        lm.step, lm.codec.date = stated_by(s.critic, "step", "line"), output.date
        sampler = sampler_for(lm, s)
        critic = load_critic(s.critic, dtype=s.dtype) if s.critic else None
        if (
            critic
            and tokenizer_provenance(critic[0])["tokenizer"]
            != tokenizer_provenance(lm)["tokenizer"]
        ):
            raise UserError(f"{s.critic}: its tokenizer is not the actor's; pass one that has it")

        def process(chunk: list[dict], progress) -> list[dict]:
            """Each process answers every world()-th problem."""
            mine = answer(lm, sampler, critic, chunk[rank() :: world()], s, progress)
            answered = {line["id"]: line for line in all_gather(mine)}
            return [answered[p["id"]] for p in chunk]

        with output.open({**actor_provenance(lm, s.max_new), **sampler.provenance}) as out:
            todo = [p for p in problems if p["id"] not in out.done]
            with Progress("evaluate", len(todo)) as bar:
                sampler.work_through(todo, process, bar.add, out.append)
    if rank() > 0:
        return
    lines, sets = read_evaluation(s.out), {}
    for p in problems:
        sets.setdefault(str(p.get("source")), []).append(lines[p["id"]])
    if len(sets) > 1:
        sets["pooled"] = list(lines.values())
    figures = {name: summarise(rows, other) for name, rows in sets.items()}
    text = json.dumps({"sets": figures, "against": s.against}, indent=1)
    path = Path(s.out)
    name = "summary.json" if path.name == "eval.jsonl" else f"{path.stem}.summary.json"
    replace(path.with_name(name), lambda path: path.write_text(text))
    for name, row in figures.items():
        print("\n".join(evaluation_words(name, row, s.against)))


def answer(lm: LM, sampler, critic, problems: list[dict], s: Settings, progress) -> list[dict]:
    """A line of eval.jsonl per problem. A response that was cut off is never right."""
    if not problems:
        return []

    def ended(responses: int, tokens: int):
        progress(responses * world() / (s.samples + 1), tokens=tokens * world())

    drawn = respond(lm, sampler, problems, s.samples, "evaluate", s, 1.0, ended)
    greedy = respond(lm, sampler, problems, 1, "evaluate", s, 0.0, ended)
    lines = []
    for problem, (_, (first,)), (_, sampled) in zip(problems, greedy, drawn):
        line = {"id": problem["id"]} | shown(problem, first)
        line |= {"verdict": first["verdict"], "finished": first["finished"]}
        line["sampled"] = [shown(problem, response) for response in sampled]
        lines.append(line)
    if critic:
        for line, best in zip(lines, choose(lm, critic, problems, drawn)):
            line["by_critic"] = line["sampled"][best]["correct"]
    return lines


def shown(problem: dict, response: dict) -> dict:
    """What eval.jsonl says of a graded response, greedy or sampled."""
    line = {name: response[name] for name in ("text", "prediction", "correct", "reward")}
    return line | ({"reasoned": reasoned(problem, response["text"])} if "number" in problem else {})


def choose(lm: LM, critic: tuple, problems: list[dict], drawn: list[tuple]) -> list[int]:
    """Of each problem's sampled responses the one with the highest V before its last step."""
    trees, states = [], []  # states: of each sampled response its node, 0 if it has one step
    for problem, (prompt_ids, sampled) in zip(problems, drawn):
        nodes, own = [{"parent": -1, "reward": None}], []
        for response in sampled:
            begin = [0, *checked_step_ends(lm, response["ids"])][-2]  # of the last step
            if begin:
                nodes.append({"parent": 0, "ids": response["ids"][:begin], "reward": None})
            own.append(len(nodes) - 1 if begin else 0)
        trees.append({"id": problem["id"], "prompt_ids": prompt_ids, "nodes": nodes})
        states.append(own)
    best = []
    for own, value in zip(states, tree_values(*critic, trees, False, 8192)):
        best.append(max(range(len(own)), key=lambda k: value[own[k]]))
    return best


if __name__ == "__main__":
    main(stage, Settings, __doc__)
