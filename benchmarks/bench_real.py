"""Methods on a real model at equal sampled tokens, by hand; needs a GPU (its first seven minutes on an H200 ended with
the first iteration's actors trained and the base measured, RESULTS.md; the whole should take about half an hour):

    python tests/bench_real.py --base SmolLM2-135M-Instruct --data DATA --runs runs/real --out tests/real.jsonl
    python tests/bench_real.py --table tests/real.jsonl

DATA holds gsm8k/train.jsonl, gsm8k/test.jsonl, asdiv/test.jsonl and mawps/test.jsonl. The base is fine-tuned on GSM8K's
solutions, a step a line; the problems to learn from are half GSM8K's and half of ASDiv and MAWPS. Three tenths of each
set by hash are held out: of ASDiv's and MAWPS's and some of GSM8K's own test CHOICE problems choose each method's
learning rate after one iteration, the others are the test. All methods share the first iteration's samples; then each
draws its own. A line of --out:
    {"method": "dapo", "rate": 1e-05, "iteration": 1, "sampled": 512000, "greedy": 0.21, "rights": "0140..."}
rights: right ones of 4 draws at temperature 1, a digit a problem, the CHOICE first.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_evidence import call, evaluate, paired_test, read_rows, settings_of

import label_steps
import prepare
import sample
import train_actor
import train_critic
from model import LM
from support.records import dump, read_jsonl
from support.report import sampled_tokens

GIVEN = sys.argv[1:]  # `call` gives each stage a sys.argv of its own
CHOICE = 400
RATES = (5e-6, 1.5e-5, 5e-5)
CRITIC = "--states all --token_share 0.5 --lr 1e-4 --passes 2 --batch 256"
ACTORS = {}  # bench_evidence.py's own, with batches of about 8 problems in all of them
for method, batch in (("dapo", 256), ("regression", 256), ("outcome", 64), ("rft", 64)):
    words = settings_of(method, "sparse", [])["actor"].split()  # right responses are few here too
    for name, value in (("--batch", str(batch)), ("--passes", "2")):
        words[words.index(name) + 1] = value
    ACTORS[method] = " ".join(words)


def problems_and_base(args, run: Path):
    """train.jsonl, test.jsonl (the CHOICE first) and the fine-tuned base."""
    data, folder = Path(args.data), run / "prepared"
    sets = f"gsm8k:{data}/gsm8k/train.jsonl,asdiv:{data}/asdiv/test.jsonl,mawps:{data}/mawps/test.jsonl"
    flags = "--valid_share 0.3 --lr 1e-4 --passes 2"
    call(prepare, flags, train=sets, test=f"gsm8k:{data}/gsm8k/test.jsonl", base=args.base,
         demos=f"gsm8k:{data}/gsm8k/train.jsonl", out=folder)  # fmt: skip
    rng, halves = random.Random(0), ([], [])
    train = read_jsonl(folder / "train.jsonl")
    for problem in rng.sample(train, len(train)):
        halves[problem["source"] == "gsm8k"].append(problem)
    mixed = [problem for pair in zip(*halves) for problem in pair]
    held_out = read_jsonl(folder / "valid.jsonl")
    held_out = [p for p in held_out if p["source"] != "gsm8k"]
    held_out += read_jsonl(folder / "test.jsonl")[: args.gsm8k]
    for name, problems in (("train", mixed), ("test", rng.sample(held_out, len(held_out)))):
        path = run / f"{name}.jsonl"
        if not path.exists():
            path.write_bytes(b"".join(dump(problem) for problem in problems))
    print(
        {
            name: Counter(p["source"] for p in read_jsonl(run / f"{name}.jsonl"))
            for name in ("train", "test")
        }
    )


def measure(args, run: Path, line: dict, actor: Path):
    """Evaluate an actor and add its line to --out, if it is not there."""
    for old in read_rows(Path(args.out)) if Path(args.out).exists() else []:
        if all(old[key] == line[key] for key in ("method", "rate", "iteration")):
            return
    test = read_jsonl(run / "test.jsonl")[: args.tests]
    begin = time.perf_counter()
    greedy, rights = evaluate(LM(actor), test, args.max_new)
    line |= {"greedy": round(greedy, 4), "rights": "".join(map(str, rights))}
    with open(args.out, "a") as f:
        f.write(json.dumps(line) + "\n")
    seconds = time.perf_counter() - begin
    print(f"{line['method']} {line['rate']} iteration {line['iteration']}: greedy {100 * greedy:.1f}, choice, test "
          f"{100 * t1(line, True):.1f} {100 * t1(line, False):.1f} ({seconds:.0f} s, at {time.time() - args.begin:.0f} s)",
          flush=True)  # fmt: skip


def t1(line: dict, choice: bool) -> float:
    return float(share(line, choice).mean())


def share(line: dict, choice: bool) -> np.ndarray:
    """Of each problem the share of the draws that are right."""
    rights = np.array([*line["rights"]], int) / 4
    return rights[:CHOICE] if choice else rights[CHOICE:]


def draw(args, run: Path, it: Path, i: int, actor: Path, steps: bool):
    """Samples of iteration i, and with `steps` their trees."""
    length = f" --max_new {args.max_new} --seed {i} --batch 1024"
    given = {"actor": actor, "problems": run / "train.jsonl"}
    some = f"--first {(i - 1) * args.problems} --limit {args.problems}"
    call(sample, f"--n1 8 --n 8 {some}{length}", **given, out=it / "samples.jsonl")
    if steps:
        given |= {"samples": it / "samples.jsonl", "out": it / "trees.jsonl"}
        call(label_steps, f"--whole_draws --m 0{length}", **given)


def arm(args, run: Path, method: str, rate: float, first: int, last: int):
    """Iterations first .. last of a method, each measured. Iteration 1's samples and critic are shared."""
    by_steps = method in ("dapo", "regression")
    work, shared = run / f"{method}-{rate}", run / "iter1"
    actor, critic, trees, sampled = run / "prepared/base", shared / "critic", [], 0
    for i in range(1, last + 1):
        it = shared if i == 1 else work / f"iter{i}"
        out = work / f"iter{i}" / "actor"
        if i > 1:
            draw(args, run, it, i, actor, by_steps)
        sampled += sampled_tokens(it)
        given = {"actor": actor, "trees": it / "samples.jsonl", "out": out}
        if by_steps:
            given["trees"] = it / "trees.jsonl"
            trees.append(given["trees"])
            if i > 1:
                several = ",".join(str(path) for path in trees[-2:])
                call(train_critic, CRITIC, trees=several, critic_model=critic, out=it / "critic")
                critic = it / "critic"
            given["critic"] = critic
        call(train_actor, f"{ACTORS[method]} --lr {rate}", **given)
        actor = out
        if i >= first:
            about = {"method": method, "rate": rate, "iteration": i, "sampled": sampled}
            measure(args, run, about, actor)


def start(args, method: str, rate: float, first: int, last: int):
    """`arm` in a process of its own."""
    words = [sys.executable, __file__, *GIVEN, "--begin", str(args.begin)]
    return subprocess.Popen([*words, "--arm", json.dumps([method, rate, first, last])])


def finish(jobs: list):
    """Wait for all of them; end if one has failed, since what it should have measured is missing."""
    if failed := [job.args for job in jobs if job.wait()]:
        sys.exit(f"{failed} failed")


def main(args):
    if args.tests and args.tests <= CHOICE:
        sys.exit(f"--tests {args.tests}: wanted more than the {CHOICE} that choose the rates")
    run = Path(args.runs)
    run.mkdir(parents=True, exist_ok=True)
    if args.arm:
        arm(args, run, *json.loads(args.arm))
        return
    say = lambda what: print(f"{what} at {time.time() - args.begin:.0f} s", flush=True)
    problems_and_base(args, run)
    say("problems and base")
    draw(args, run, run / "iter1", 1, run / "prepared/base", True)
    say("samples")
    jobs = [start(args, method, rate, 1, 1) for rate in RATES for method in ("outcome", "rft")]
    trees, base = run / "iter1/trees.jsonl", run / "prepared/base"
    call(train_critic, CRITIC, trees=trees, critic_model=base, out=run / "iter1/critic")
    say("critic")
    jobs += [start(args, "dapo", rate, 1, 1) for rate in RATES]
    line = {"method": "base", "rate": 0, "iteration": 0, "sampled": 0}
    measure(args, run, line, base)
    finish(jobs)
    best = best_rates(read_rows(Path(args.out)))
    say(f"rates {best}")
    jobs = []
    for method, rate in best.items():
        first = 1 if method == "regression" else 2
        jobs.append(start(args, method, rate, first, args.iterations))
    finish(jobs)
    table(args.out)


def best_rates(rows: list[dict]) -> dict[str, float]:
    """Each method's rate that is best on the CHOICE after the first iteration."""
    best = {}
    for line in sorted(rows, key=lambda line: t1(line, True)):
        if line["iteration"] == 1 and line["method"] != "regression":
            best[line["method"]] = line["rate"]
    best["regression"] = best["dapo"]  # which is DAPO's without a term
    return best


def table(path):
    """Every line on the test problems; of the chosen rates the paired difference to DAPO's."""
    rows = sorted(
        read_rows(Path(path)), key=lambda line: (line["iteration"], line["method"], line["rate"])
    )
    best = best_rates(rows)
    ours = {}
    for line in rows:
        if line["method"] == "dapo" and line["rate"] == best["dapo"]:
            ours[line["iteration"]] = share(line, False)
    print(
        "| method | rate | iteration | tokens | choice, T = 1 | test, T = 1 | DAPO is ahead by | p |"
    )
    print("| --- " * 8 + "|")
    for line in rows:
        cells = [
            line["method"],
            f"{line['rate']:g}",
            str(line["iteration"]),
            f"{line['sampled']:,}",
        ]
        cells += [f"{100 * t1(line, True):.1f}", f"{100 * t1(line, False):.1f}", "", ""]
        if (
            line["method"] != "dapo"
            and line["rate"] == best.get(line["method"])
            and line["iteration"] in ours
        ):
            difference = ours[line["iteration"]] - share(line, False)
            error, p = paired_test(difference)
            cells[-2:] = [f"{100 * difference.mean():+.1f} ± {196 * error:.1f}", f"{p:.2g}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", help="model folder or hub id")
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--runs", default="runs/real")
    parser.add_argument("--out", default="tests/real.jsonl")
    parser.add_argument("--problems", type=int, default=800, help="in each iteration")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--max_new", type=int, default=200)
    parser.add_argument("--gsm8k", type=int, default=500, help="problems of GSM8K's test")
    parser.add_argument("--tests", type=int, default=None, help="at most so many test problems")
    parser.add_argument("--begin", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--table", help="print the table of these rows")
    args = parser.parse_args()
    if args.table:
        table(args.table)
    else:
        main(args)
