"""How good a run's critic is, by hand: bash run.sh && python tests/bench_critic.py runs/demo

Draws responses to 80 validation problems with iteration 1's reference policy, completes their states 64 times each
(`--m 16`, `--problems 40`: fewer), and holds V against these success rates: all states, then by the number of steps so
far. Settings are those of the run's manifests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.records import read_trees
from train_critic import load_critic, measure, tree_values


def settings(path: Path, names: str) -> list[str]:
    made = json.loads(Path(f"{path}.manifest.json").read_text())["settings"]
    return [f"--{name}={made[name]}" for name in names.split() if made[name]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--m", default="64")
    parser.add_argument("--problems", default="80")
    parser.add_argument("--actor", help="default: RUN/base")
    a = parser.parse_args()
    it, actor = a.run / "iter1", a.actor or str(a.run / "base")
    with tempfile.TemporaryDirectory() as folder:
        common = ["--actor", actor, "--problems", str(a.run / "valid.jsonl"), "--seed", "99"]
        common += settings(it / "samples.jsonl", "max_new batch dtype")
        samples, trees = f"{folder}/samples.jsonl", f"{folder}/trees.jsonl"
        flags = [*settings(it / "samples.jsonl", "n1 n"), "--limit", a.problems, "--out", samples]
        for script, more in (
            ("sample.py", flags),
            ("label_steps.py", ["--samples", samples, "--m", a.m, "--out", trees]),
        ):
            command = [sys.executable, str(ROOT / script), *common, *more]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        records = read_trees(trees)
    known = [n for r in read_trees(it / "trees.jsonl") for n in r["nodes"] if n["labelled"]]
    constant = sum(n["wins"] for n in known) / sum(n["n"] for n in known)
    lm, head = load_critic(str(it / "critic"))
    found = measure(lm, head, records, False, 8192, constant)
    print(json.dumps({k: round(v, 3) for k, v in found.items() if k != "bins"}))
    rows = {}  # steps so far -> (V, MC)
    for r, value in zip(records, tree_values(lm, head, records, False, 8192)):
        steps = [0]
        for v, n in enumerate(r["nodes"][1:], 1):
            steps.append(steps[n["parent"]] + 1)
        for v, n in enumerate(r["nodes"]):
            if n["labelled"]:
                rows.setdefault(steps[v], []).append((value[v], n["wins"] / n["n"]))
    for step, pairs in sorted(rows.items()):
        v, mc = np.array(pairs).T
        r = np.corrcoef(v, mc)[0, 1] if len(v) > 2 and v.std() * mc.std() else np.nan
        print(f"  after {step} steps: {len(v):4} states, V {v.mean():.2f}, MC {mc.mean():.2f}, "
              f"correlation {r:.2f}, Brier {((v - mc) ** 2).mean():.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
