"""Where the time of a run goes, by hand: bash run.sh && python tests/bench_pipeline.py runs/demo

Runs every stage of a finished run's first iteration again, with the settings that its manifests state, on one thread
and on two, and once more under cProfile. Prints seconds, tokens a second, the share of fsync and hashing, that of grading
(sample.py and label_steps.py), and the functions that take the most time of their own.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INPUTS = {  # script -> its output, and the flags that name its inputs
    "evaluate.py": ("iter0/eval.jsonl", "--actor base --problems test.jsonl"),
    "sample.py": ("iter1/samples.jsonl", "--actor base --problems train.jsonl"),
    "label_steps.py": (
        "iter1/trees.jsonl",
        "--actor base --problems train.jsonl --samples iter1/samples.jsonl",
    ),
    "train_critic.py": ("iter1/critic", "--trees iter1/trees.jsonl --critic_model base"),
    "train_actor.py": (
        "iter1/actor",
        "--actor base --trees iter1/trees.jsonl --critic iter1/critic",
    ),
}
# Runs a script as a user would, and reports the seconds that it spent in fsync, in hashing and in grading.
METER = """
import cProfile, hashlib, json, os, pstats, runpy, sys, time
spent = {"fsync": 0.0, "hash": 0.0, "grade": 0.0}
def metered(kind, f):
    def call(*args, **kwargs):
        begin = time.perf_counter()
        try: return f(*args, **kwargs)
        finally: spent[kind] += time.perf_counter() - begin
    return call
os.fsync, hashlib.file_digest = metered("fsync", os.fsync), metered("hash", hashlib.file_digest)
report, profiled = sys.argv.pop(1), sys.argv.pop(1) == "profile"
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import reward
reward.grade_ids = metered("grade", reward.grade_ids)
profile, begin = cProfile.Profile(), time.perf_counter()
if profiled: profile.enable()
runpy.run_path(sys.argv[0], run_name="__main__")
profile.disable()
spent["seconds"] = time.perf_counter() - begin
if profiled:
    own = sorted(((v[2], k[2]) for k, v in pstats.Stats(profile).stats.items()), reverse=True)
    total = sum(t for t, _ in own)
    names = [n.removeprefix("<built-in method ").removeprefix("<method ").split(" of ")[0] for _, n in own]
    spent["top"] = [f"{n.strip('<>')} {t / total:.0%}" for (t, _), n in zip(own[:5], names)]
json.dump(spent, open(report, "w"))
"""


def tokens(output: Path) -> int:
    """Tokens that a stage generated or, in training, saw: what its output says."""
    if not output.is_file():
        return 0
    rows = [json.loads(line) for line in output.open()]
    return sum(
        r["tokens"] if "tokens" in r else sum(len(x["ids"]) for x in r.get("responses", []))
        for r in rows
    )


def run(folder: Path, script: str, threads: int, how: str) -> tuple[dict, int]:
    name, inputs = INPUTS[script]
    made = json.loads((folder / f"{name}.manifest.json").read_text())
    flags = [
        f"--{k}={v}"
        for k, v in made["settings"].items()
        if v is not False and v != "" and k not in ("against", "report")
    ]
    words = [w if w.startswith("--") else str(folder / w) for w in inputs.split()]
    with tempfile.TemporaryDirectory() as temporary:
        out, report = Path(temporary) / Path(name).name, Path(temporary) / "report.json"
        command = ["-c", METER, str(report), how, str(ROOT / script), *words, *flags]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [sys.executable, *command, "--out", str(out)], check=True, env=env, stdout=subprocess.DEVNULL
        )  # fmt: skip
        return json.loads(report.read_text()), tokens(out)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print("stage            1 thread   2 threads   again   tokens/s   fsync + hash   grading")
    for script in INPUTS:
        one, count = run(folder, script, 1, "plain")
        two, again = (run(folder, script, 2, "plain")[0] for _ in range(2))
        s = [r["seconds"] for r in (one, two, again)]
        cost = (two["fsync"] + two["hash"]) / two["seconds"]
        speed = f"{count / s[1]:8.0f}" if count else f"{'':8}"
        grade = f"{two['grade'] / two['seconds']:10.1%}" if two["grade"] else ""
        print(f"{script:16}{s[0]:7.1f} s{s[1]:10.1f} s{s[2]:7.1f} {speed} {cost:13.2%} {grade}")
        print(f"{'':16} {', '.join(run(folder, script, 1, 'profile')[0]['top'])}")
