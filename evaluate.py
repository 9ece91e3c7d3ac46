r"""Evaluate an actor: accuracy, paired comparison, figures.

    python evaluate.py --actor runs/demo/iter1/actor --problems runs/demo/test.jsonl \
        --out runs/demo/iter1/eval.jsonl --against runs/demo/iter0/eval.jsonl --samples 8
    python evaluate.py --report runs/demo        # the table and figures of a whole run

Reads:  problems (several sets: comma separated), an actor, and another actor's eval.jsonl.
Writes: eval.jsonl, a line a problem (the greedy response), and summary.json beside it
    {"id": "demo/test/17", "text": "..", "prediction": "18", "correct": true,
     "verdict": "right", "finished": true,
     "sampled": [{"text": "..", "prediction": "18", "correct": true}]}

Accuracy is zero-shot and greedy; mean@k, pass@k (unbiased) and maj@k come from --samples at
temperature 1. Two actors are compared on the same problems: exact McNemar test, paired bootstrap
interval.
"""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from model import (
    LM,
    Progress,
    UserError,
    flag,
    gathered,
    join,
    load_critic,
    rank,
    replace,
    tree_values,
    world,
)
from prepare import Stage, actor_facts, main, misfit, read_jsonl, tokenizer_facts
from reward import exact_number, normalise
from sample import Server, respond, work_through

# ------------------------------------------------------------ statistics


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. 8 of 10 -> (0.490, 0.943)"""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), (middle + half) / (1 + z * z / n)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test. 8 gained, 1 lost -> 2 * (1 + 9) / 2^9 = 0.039"""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def bootstrap(difference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (n,), 10,000 resamples of problems."""
    draw = np.random.default_rng(0).choice
    means = [draw(difference, len(difference)).mean() for _ in range(10_000)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def paired(new: list[float], old: list[float]) -> dict:
    """How far `new` is above `old`, two scores of the same problems."""
    difference = np.array(new, float) - np.array(old, float)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    figures = {"difference": float(difference.mean()), "interval": bootstrap(difference)}
    return figures | {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def pass_at(k: int, n: int, right: int) -> float:
    """Unbiased chance that one of k draws is right, from n draws with `right` right ones."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(sampled: list[dict]) -> bool:
    """Is the most frequent answer right? Equal numbers are one answer, however they are written."""

    def vote(x):
        value = exact_number(x["prediction"])
        return normalise(x["prediction"]) if value is None else value

    votes = Counter(vote(x) for x in sampled if x["prediction"])
    winner = max(votes, key=votes.get, default=None)
    return any(x["correct"] and vote(x) == winner for x in sampled if x["prediction"])


def summarise(lines: list[dict], other: dict[str, dict]) -> dict:
    """The figures of one test set; `other`: another actor's lines by id, to compare with."""
    n, k, right = len(lines), len(lines[0]["sampled"]), sum(x["correct"] for x in lines)
    verdicts = Counter(x["verdict"] for x in lines)
    row = {"n": n, "accuracy": right / n, "interval": wilson(right, n)}
    row["cut_off"] = sum(not x["finished"] for x in lines) / n
    row |= {"unparsed": verdicts["no answer"] / n, "verdicts": dict(verdicts)}
    wins = [sum(s["correct"] for s in x["sampled"]) for x in lines]
    if k:
        row |= {"k": k, "sampled": sum(wins) / (n * k)}
        row["maj"] = sum(majority(x["sampled"]) for x in lines) / n
        for j in (2**i for i in range(1, k.bit_length())):
            row[f"pass@{j}"] = sum(pass_at(j, k, w) for w in wins) / n
        if "by_critic" in lines[0]:
            row["best_of_k_by_critic"] = sum(x["by_critic"] for x in lines) / n
    if other:
        old = [other[x["id"]] for x in lines]
        greedy = paired([x["correct"] for x in lines], [x["correct"] for x in old])
        row["against"] = {"greedy": greedy}
        if k and len(old[0]["sampled"]) == k:
            before = [sum(s["correct"] for s in x["sampled"]) / k for x in old]
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
    batch: int = flag("rows decoded at once", 256)
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
    out = Stage("evaluate.py", s.out, dataclasses.replace(s, against=""), inputs)
    if not out.complete:
        join()
        lm = LM(s.actor, dtype=s.dtype, weights=not s.server)
        server = Server(s.server, lm) if s.server else None
        critic = load_critic(s.critic, dtype=s.dtype) if s.critic else None
        if critic and tokenizer_facts(critic[0])["tokenizer"] != tokenizer_facts(lm)["tokenizer"]:
            raise UserError(f"{s.critic}: its tokenizer is not the actor's; pass one that has it")
        out.begin(actor_facts(lm, s.max_new) | ({"draws": "server"} if server else {}))
        done = {line["id"] for line in out.done}
        todo = [p for p in problems if p["id"] not in done]
        with Progress("evaluate", len(todo)) as progress:

            def process(chunk: list[dict]) -> list[dict]:
                """Each process answers every world()-th problem."""
                mine = answer(lm, critic, chunk[rank() :: world()], s, progress, server)
                answered = {line["id"]: line for line in gathered(mine)}
                progress.update(len(chunk))
                return [answered[p["id"]] for p in chunk]

            work_through(todo, process, out, server, 64 * world())
        out.finish()
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
    name = "summary.json" if out.out.name == "eval.jsonl" else f"{out.out.stem}.summary.json"
    replace(out.out.with_name(name), lambda path: path.write_text(text))
    for name, row in figures.items():
        sampled = f", T=1 {row['sampled']:.1%}" if s.samples else ""
        print(
            f"{name}: greedy {row['accuracy']:.1%} {percents(row['interval'])}{sampled}, "
            f"n {row['n']}, cut off {row['cut_off']:.1%}, unparsed {row['unparsed']:.1%}"
        )


def answer(lm: LM, critic, problems: list[dict], s: Settings, progress, server) -> list[dict]:
    """A line of eval.jsonl a problem. A response that was cut off is not right in any case."""
    if not problems:
        return []
    how = {"progress": progress, "server": server}
    drawn = respond(lm, problems, s.samples, "evaluate", s, **how)
    greedy = respond(lm, problems, 1, "evaluate", s, temperature=0.0, **how)
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
            begin = [0, *lm.step_ends(response["ids"])][-2]  # of the last step
            if begin:
                nodes.append({"parent": 0, "ids": response["ids"][:begin], "reward": None})
            own.append(len(nodes) - 1 if begin else 0)
        trees.append({"id": problem["id"], "prompt_ids": prompt_ids, "nodes": nodes})
        states.append(own)
    best = []
    for own, value in zip(states, tree_values(*critic, trees, False, 8192)):
        best.append(max(range(len(own)), key=lambda k: value[own[k]]))
    return best


# ------------------------------------------------------------ the report of a run


def percents(interval: list[float], sign: str = "") -> str:
    """[0.395, 0.482] -> "[39.5%, 48.2%]"; sign "+": "[+39.5%, +48.2%]" """
    return "[" + ", ".join(f"{x:{sign}.1%}" for x in interval) + "]"


def report(run: Path):
    """Print the table over iterations and draw report.png and solution.png from the run's files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = [f for f in run.glob("iter*/summary.json") if f.parent.name[4:].isdigit()]
    files.sort(key=lambda path: int(path.parent.name[4:]))
    if not files:
        raise UserError(f"{run}: no iter*/summary.json; run the stages first (bash run.sh)")
    rows = {f.parent.name: [*json.loads(f.read_text())["sets"].values()][-1] for f in files}
    table = "{:8}{:>8}{:>17}{:>9}{:>11}{:>10}{:>20}"
    head = ("greedy", "95 % interval", "T=1", "p vs base", "T=1 gain", "95 % interval ")
    print(table.format("", *head))
    for name, row in rows.items():
        greedy, gain = (row.get("against", {}).get(key) for key in ("greedy", "sampled"))
        cells = (
            f"{row['accuracy']:.1%}",
            percents(row["interval"]),
            f"{row['sampled']:.1%}" if "sampled" in row else "",
            f"{greedy['p']:.2g}" if greedy else "",
            f"{gain['difference']:+.1%}" if gain else "",
            percents(gain["interval"], "+") if gain else "",
        )
        print(table.format(name, *cells))

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="tight")
    (accuracy, critic), (pairs, ratios) = axes
    greedy, sampled = ([row.get(k) for row in rows.values()] for k in ("accuracy", "sampled"))
    bars = np.abs(np.transpose([row["interval"] for row in rows.values()]) - greedy)
    accuracy.errorbar([*rows], greedy, bars, marker="o", capsize=4, label="greedy")
    accuracy.plot([*rows], np.array(sampled, float), marker="s", label="temperature 1")
    accuracy.set(title="accuracy on the test problems", ylim=(0, 1))
    critic.plot([0, 1], [0, 1], "k:", lw=1)
    critic.set(title="critic on held-out states", xlabel="V(s)", ylabel="MC(s), the success rate")
    pairs.set(title="advantages of the pairs", xlabel="A(s, a)", ylabel="pairs", yscale="log")
    ratios.set(title="mean log-ratio in training", xlabel="step", ylabel="log pi / pi_ref")
    for i, name in enumerate([*rows][1:]):
        folder, style = run / name, {"color": f"C{i}", "label": name}
        if (file := folder / "critic.metrics.json").exists():
            bins = [b for b in json.loads(file.read_text())["bins"] if b["states"]]
            critic.plot([b["value"] for b in bins], [b["mc"] for b in bins], marker="o", **style)
        if (file := folder / "actor.advantages.jsonl").exists():
            states = [state for text in file.open() for state in json.loads(text)["states"]]
            adv = [action["adv"] for state in states for action in state["actions"]]
            pairs.hist(adv, bins=41, range=(-1, 1), histtype="step", **style)
        if (file := folder / "actor.work" / "metrics.jsonl").exists():
            steps = [json.loads(text) for text in file.open()]
            for kind, dash, sign in (("up", "-", ">"), ("down", "--", "<=")):
                ratio = [m[f"ratio_{kind}"] / max(1, m[f"pairs_{kind}"]) for m in steps]
                ratios.plot(ratio, dash, color=f"C{i}", lw=1, label=f"{name}, A {sign} 0")
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.savefig(run / "report.png", dpi=110)
    print(run / "report.png")
    if (run / "iter1" / "actor.advantages.jsonl").exists():
        draw_solution(run, plt)


def draw_solution(run: Path, plt):
    """The path of iteration 1 whose advantages are the widest apart, a colour for each."""
    trees = {r["id"]: r["nodes"] for r in map(json.loads, (run / "iter1" / "trees.jsonl").open())}
    widest, best = 0.0, None
    for line in map(json.loads, (run / "iter1" / "actor.advantages.jsonl").open()):
        nodes = trees[line["id"]]
        adv = {a["node"]: a["adv"] for state in line["states"] for a in state["actions"]}
        for leaf in adv:
            path = [leaf]
            while parent := nodes[path[0]]["parent"]:
                path.insert(0, parent)
            known = [adv[v] for v in path if v in adv]
            if len(known) > 2 and max(known) - min(known) > widest:
                widest, best = max(known) - min(known), (nodes, adv, path)
    if best is None:
        return
    nodes, adv, path = best
    lines = [(text, None) for text in [*nodes[0]["text"].strip().splitlines(), ""]]
    lines += [(nodes[v]["text"].strip(), adv.get(v)) for v in path]
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(lines)))
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(len(lines) - 0.5, -0.5))
    for y, (text, a) in enumerate(lines):
        if a is None:  # the prompt's, or a step that no completion drew
            axis.text(0, y, text, family="monospace", color="0.35")
        else:
            box = {"facecolor": plt.get_cmap("RdYlGn")(0.5 + a / 2), "edgecolor": "none", "pad": 2}
            axis.text(0, y, text, family="monospace", bbox=box)
            axis.text(1, y, f"A = {a:+.2f}", family="monospace", ha="right")
    figure.savefig(run / "solution.png", dpi=110, bbox_inches="tight")
    print(run / "solution.png")


if __name__ == "__main__":
    main(stage, Settings, __doc__)
