r"""Evaluate an actor: accuracy, paired comparison; the report of a run.

    python evaluate.py --actor runs/demo/iter1/actor --problems runs/demo/test.jsonl \
        --out runs/demo/iter1/eval.jsonl --against runs/demo/iter0/eval.jsonl --samples 8
    python evaluate.py --report runs/demo        # table, pictures and a page of a whole run

Reads:  problems (several sets: comma separated), an actor, and another actor's eval.jsonl.
Writes: eval.jsonl, a line a problem (the greedy response), and summary.json beside it
    {"id": "demo/test/17", "text": "..", "prediction": "18", "correct": true,
     "verdict": "right", "finished": true,
     "sampled": [{"text": "..", "prediction": "18", "correct": true}]}
--report loads no model. It writes into the run's folder report.png (the course of training),
solution.png (one response, its steps coloured by advantage), tree.png (one small step tree) and
report.html (all of these and 20 problems to browse, in one file that needs no network).

Accuracy is zero-shot and greedy; mean@k, pass@k (unbiased) and maj@k come from --samples at
temperature 1. Two actors are compared on the same problems: exact McNemar test, paired bootstrap
interval.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

from model import LM, checked_step_ends, load_lm
from sample import respond
from support.cli import Progress, UserError, flag, main
from support.distributed import all_gather, join, rank, world
from support.records import misfit, read_jsonl, replace
from support.report import percents, report
from support.sampler import Sampler, require_single_process
from support.server import Server
from support.stage import Output, actor_facts, stated_by, tokenizer_facts
from support.stats import majority, paired, pass_at, wilson
from train_critic import load_critic, tree_values


def summarise(lines: list[dict], other: dict[str, dict]) -> dict:
    """The figures of one test set from its lines of eval.jsonl.

    cut_off, unparsed    shares of the greedy responses without an end, and without an answer
    sampled, k           share of right ones among the k responses a problem at temperature 1
    against              the difference to `other`, another actor's lines by id (`paired`)
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
    if other:
        old = [other[line["id"]] for line in lines]
        greedy = paired([line["correct"] for line in lines], [line["correct"] for line in old])
        row["against"] = {"greedy": greedy}
        if k and len(old[0]["sampled"]) == k:
            before = [sum(r["correct"] for r in line["sampled"]) / k for line in old]
            rates = paired([w / k for w in wins], before)
            row["against"]["sampled"] = {key: rates[key] for key in ("difference", "interval")}
    return row


# ------------------------------------------------------------ the stage


@dataclasses.dataclass(frozen=True)
class Settings:
    actor: str = flag("Hugging Face folder or hub id to evaluate", "")
    problems: str = flag("problem files, comma separated", "")
    out: str = flag(
        "eval.jsonl to write, with summary.json beside it (x.jsonl: x.summary.json)", ""
    )
    against: str = flag("eval.jsonl of another actor on the same problems", "")
    samples: int = flag("responses a problem at temperature 1, beside the greedy one", 0)
    critic: str = flag("critic that picks the best of --samples (with the actor's tokenizer)", "")
    max_new: int = flag("length limit of a response in tokens", 2048)
    batch: int = flag("rows decoded at once, at least 16", 256)
    server: str = flag("URL of a server that serves the actor, or several, comma separated", "")
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the samples", 0)
    report: str = flag("a run folder: print its table and draw its figures, nothing else", "")
    unsafe: bool = flag("run programs even where they cannot be walled off", False)
    force: bool = flag("throw an existing output away", False)


def stage(s: Settings):
    if s.report:
        return report(Path(s.report))
    if s.critic and not s.samples:
        raise UserError("--critic picks the best of --samples; give some")
    if not (s.actor and s.problems and s.out):
        raise UserError("evaluate.py: give --actor, --problems and --out, or --report; see --help")
    needs, paths = ("id", "prompt", "answer or tests"), s.problems.split(",")
    problems = [p for path in paths for p in read_jsonl(path, needs)]
    if len({p["id"] for p in problems}) < len(problems):
        raise UserError(f"{s.problems}: some problem is in two of these files")
    other = {x["id"]: x for x in read_jsonl(s.against)} if s.against else {}
    for name, line in other.items():
        if misfit(line, {"correct": bool, "sampled": [{"correct": bool}]}):
            raise UserError(f"{s.against}: {name}: no line of evaluate.py; pass an eval.jsonl")
    if other and (lacks := [p["id"] for p in problems if p["id"] not in other]):
        raise UserError(f"{s.against}: no problem {lacks[0]}; compare actors on the same problems")
    inputs = {"actor": s.actor} | {f"problems{i or ''}": path for i, path in enumerate(paths)}
    inputs |= {"critic": s.critic} if s.critic else {}
    # --against is no setting of eval.jsonl: a finished evaluation is compared anew at no cost
    output = Output("evaluate.py", s.out, dataclasses.replace(s, against=""), inputs)
    if not output.complete:
        if s.server or s.critic:  # processes share out one pack's trees, here each has its own
            flag = "--server" if s.server else "--critic"
            require_single_process(f"evaluate.py {flag}")
        join()
        lm = load_lm(s.actor, dtype=s.dtype, weights=not s.server)
        lm.step, lm.codec.date = stated_by(s.critic, "step", "line"), output.date
        sampler = Server(s.server, lm) if s.server else Sampler(lm, s.batch)
        critic = load_critic(s.critic, dtype=s.dtype) if s.critic else None
        if critic and tokenizer_facts(critic[0])["tokenizer"] != tokenizer_facts(lm)["tokenizer"]:
            raise UserError(f"{s.critic}: its tokenizer is not the actor's; pass one that has it")

        def process(chunk: list[dict], progress) -> list[dict]:
            """Each process answers every world()-th problem."""
            mine = answer(lm, sampler, critic, chunk[rank() :: world()], s, progress)
            answered = {line["id"]: line for line in all_gather(mine)}
            return [answered[p["id"]] for p in chunk]

        with output.open({**actor_facts(lm, s.max_new), **sampler.provenance}) as out:
            todo = [p for p in problems if p["id"] not in out.done]
            with Progress("evaluate", len(todo)) as bar:
                sampler.work_through(todo, process, bar.add, out.append)
    if rank() > 0:
        return
    lines = {x["id"]: x for x in read_jsonl(s.out)}
    sets = {}
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
        sampled = f", T=1 {row['sampled']:.1%}" if s.samples else ""
        print(
            f"{name}: greedy {row['accuracy']:.1%} {percents(row['interval'])}{sampled}, "
            f"n {row['n']}, cut off {row['cut_off']:.1%}, unparsed {row['unparsed']:.1%}"
        )
        if other:
            greedy = row["against"]["greedy"]
            gain = f"{greedy['difference']:+.1%} {percents(greedy['interval'], '+')}"
            print(f"  greedy {gain}, p {greedy['p']:.2g}, against {s.against}")


def answer(lm: LM, sampler, critic, problems: list[dict], s: Settings, progress) -> list[dict]:
    """A line of eval.jsonl per problem. A response that was cut off is not right in any case."""
    if not problems:
        return []

    def ended(responses: int, tokens: int):
        progress(responses * world() / (s.samples + 1), tokens=tokens * world())

    drawn = respond(lm, sampler, problems, s.samples, "evaluate", s, 1.0, ended)
    greedy = respond(lm, sampler, problems, 1, "evaluate", s, 0.0, ended)
    lines = []
    for problem, (_, (first,)), (_, sampled) in zip(problems, greedy, drawn):
        line = {"id": problem["id"]}
        for name in ("text", "prediction", "correct", "verdict", "finished"):
            line[name] = first[name]
        line["sampled"] = []
        for response in sampled:
            shown = {name: response[name] for name in ("text", "prediction", "correct")}
            line["sampled"].append(shown)
        lines.append(line)
    if critic:
        for line, best in zip(lines, choose(lm, critic, problems, drawn)):
            line["by_critic"] = line["sampled"][best]["correct"]
    return lines


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
