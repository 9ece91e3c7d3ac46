"""What does not run on a GPU, at the paper's size, by hand: python tests/bench_size.py [grading reading]

grading   verdicts a second on LaTeX answers that need math-verify, with one process and with one a CPU, and again: the
          second time every verdict is remembered
reading   seconds and memory a token of a trees.jsonl whose problems have the paper's size, and of all 7,500 problems of MATH
"""

import json
import random
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support.sandbox

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward
from support.records import read_trees

NODES, TOKENS = (
    900,
    35,
)  # of a problem's tree: 6 responses, 16 completions from every state; of a step
PROBLEMS = 7500


def pairs(count: int) -> list[tuple[dict, str]]:
    """Problems and responses: half of the answers are right, none is the gold answer's very text."""
    rng, found = random.Random(0), []
    for _ in range(count):
        a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.choice((2, 3, 5, 6, 7))
        gold = rf"\frac{{{a}}}{{{b}}} + \sqrt{{{c}}}"
        answer = rf"\sqrt{{{c}}} + \frac{{{3 * a}}}{{{3 * b + rng.randint(0, 1)}}}"
        found.append(({"id": len(found), "answer": gold}, rf"So \boxed{{{answer}}}."))
    return found


def grading(count=400):
    tasks = pairs(count)
    for threads in (1, support.sandbox.CPUS):
        reward._known.clear()
        with ThreadPoolExecutor(threads) as pool:
            judge = lambda task: reward.grade(*task)[0]
            list(pool.map(judge, tasks[: 2 * threads]))  # starts the processes
            reward._known.clear()
            for how in ("anew", "remembered"):
                begin = time.perf_counter()
                verdicts = list(pool.map(judge, tasks))
                took = time.perf_counter() - begin
                right = verdicts.count("right") / count
                print(
                    f"{threads} at once, {how}: {count / took:.0f} verdicts a second, {right:.0%} right"
                )


def reading(problems=60):
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trees.jsonl"
        with path.open("w") as f:
            for i in range(problems):
                root = {"parent": -1, "ids": [], "text": "", "n": 16, "wins": 8, "draws": 0}
                nodes = [root | {"reward": None, "labelled": True}]
                for v in range(1, NODES):
                    ids = [rng.randrange(150_000) for _ in range(TOKENS)]
                    node = {
                        "parent": rng.randrange(max(0, v - 50), v),
                        "ids": ids,
                        "text": "x" * 120,
                    }
                    nodes.append(
                        node | {"n": 0, "wins": 0, "draws": 1, "reward": None, "labelled": False}
                    )
                record = {"id": f"p/{i}", "prompt_ids": list(range(80)), "nodes": nodes}
                f.write(json.dumps(record) + "\n")
        size = path.stat().st_size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        read_trees(str(path))
        took = time.perf_counter() - begin
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    tokens, whole = problems * NODES * TOKENS, PROBLEMS * NODES * TOKENS
    print(f"reading {tokens / 1e6:.1f} million tokens, {size / 1e6:.0f} MB: {took:.1f} s, {took / tokens * 1e6:.2f} us and "
          f"{memory / tokens:.0f} bytes a token")  # fmt: skip
    print(f"{PROBLEMS} such problems: {whole / 1e6:.0f} million tokens, {whole * took / tokens / 60:.1f} minutes and "
          f"{whole * memory / tokens / 1e9:.1f} GB")  # fmt: skip


if __name__ == "__main__":
    for part in sys.argv[1:] or ("grading", "reading"):
        globals()[part]()
