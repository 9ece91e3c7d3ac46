"""Fuzz what every stage reads, by hand: python benchmarks/fuzz_readers.py SECONDS [SEED]

Breaks one input file of a finished toy run in a random way (bytes, lines, JSON fields), takes away its manifest, so
that nothing but the reader stands guard, and runs a stage on it. The stage must end with code 0, or with code 2 and
one line on stderr: any traceback is printed with what caused it, and the process ends with code 1.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import toy

from support.records import sha256

REAL = "--out new --no_make_base --train {0}:data --test {0}:test_rows.jsonl"
COUNTS = toy.ACTOR.replace("--critic run/critic --out run", "--out new").replace(
    "kappa 1", "kappa 0"
)
TARGETS = [  # (file to break, script, flags)
    ("problems.jsonl", "sample.py", toy.SAMPLE.replace("run/samples", "new/samples")),
    ("run/samples.jsonl", "label_steps.py", toy.LABEL.replace("run/trees", "new/trees")),
    ("problems.jsonl", "label_steps.py", toy.LABEL.replace("run/trees", "new/trees")),
    ("run/trees.jsonl", "train_critic.py", toy.CRITIC.replace("--out run", "--out new")),
    ("run/trees.jsonl", "train_actor.py", COUNTS),
    ("test.jsonl", "evaluate.py", toy.EVALUATE.replace("run/eval", "new/eval")),
    (
        "run/eval.jsonl",
        "evaluate.py",
        toy.EVALUATE.replace("run/eval", "new/eval") + " --against run/eval.jsonl",
    ),
    ("rows.jsonl", "prepare.py", toy.PREPARE.replace("--out run", "--out new")),
    ("demos.jsonl", "prepare.py", toy.PREPARE.replace("--out run", "--out new")),
    ("run/samples.jsonl.manifest.json", "label_steps.py", toy.LABEL.replace("/trees", "/new")),
    ("run/trees.jsonl.manifest.json", "train_critic.py", toy.CRITIC.replace("/critic", "/new")),
]
ODD = [None, True, False, 0, -1, 1, 7, 10**30, 1.5, float("nan"), float("inf"), "", " ", "\n", "1"]
ODD += ["\0", "\ud800", "é" * 50, [], [None], [[]], ["a"], {}, {"a": 1}, [10**9], [-1], [0], [1.5]]


def mutate_value(rng, value):
    """Another value in place of this one, or somewhere inside it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i, copy = rng.randrange(len(value)), list(value)
        change = rng.random()
        if change < 0.15:
            del copy[i]
        elif change < 0.3:
            copy.insert(i, copy[i])
        elif change < 0.4:
            rng.shuffle(copy)
        else:
            copy[i] = mutate_value(rng, copy[i])
        return copy
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 1000])
    return rng.choice(ODD)


def mutate(rng, data: bytes) -> bytes:
    if rng.random() < 0.3:  # bytes
        raw = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 20])):
            at = rng.randrange(len(raw))
            what = rng.random()
            if what < 0.4:
                raw[at] = rng.randrange(256)
            elif what < 0.6:
                del raw[at : at + rng.randint(1, 40)]
            elif what < 0.8:
                raw[at:at] = rng.choice(
                    [b"\n", b"\r\n", b"\0", b"{", b"]", b"\xff", b"\xef\xbb\xbf"]
                )
            else:
                raw[at:] = b""
            if not raw:
                break
        return bytes(raw)
    whole = data.lstrip().startswith(b"{\n")  # a manifest: one object over many lines
    lines = [data] if whole else data.splitlines()
    for _ in range(rng.choice([1, 1, 2, 5])):
        i = rng.randrange(len(lines))
        try:
            lines[i] = json.dumps(mutate_value(rng, json.loads(lines[i]))).encode()
        except ValueError:
            continue
    if rng.random() < 0.1:
        rng.shuffle(lines)
    return b"\n".join(lines) + b"\n"


def main(seconds: float, seed: int) -> int:
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    toy.build(folder)
    toy.pipeline("sample.py", "label_steps.py", "train_critic.py", "train_actor.py", "evaluate.py")
    rng, codes, found, stop = random.Random(seed), Counter(), Counter(), time.time() + seconds
    while time.time() < stop:
        name, script, flags = rng.choice(TARGETS)
        path, manifest = folder / name, folder / f"{name}.manifest.json"
        kept = path.read_bytes()
        kept_manifest = manifest.read_text() if manifest.exists() else None
        path.write_bytes(mutate(rng, kept))
        if kept_manifest and script != "train_critic.py":
            manifest.unlink()
        elif kept_manifest:  # which says what tokenizer made the trees
            made = json.loads(kept_manifest)
            del made["output"]
            manifest.write_text(json.dumps(made | {"output": sha256(path)}))
        try:
            code, _, err = toy.stage(script, flags)
            fine = code == 0 or (
                code in (1, 2) and err.count("\n") == 1 and err.startswith("error: ")
            )
            cause = "" if fine else f"code {code}: {err[-300:]}"
        except Exception:  # noqa: BLE001  that is what we look for
            code, cause = "traceback", traceback.format_exc(limit=-3)
        codes[script, code] += 1
        if cause:
            last = cause.strip().splitlines()[-1][:80]
            found[script, last] += 1
            if found[script, last] == 1:
                print(ascii(f"---- {script} {name}: {cause}").replace("\\n", "\n"), flush=True)
                Path(f"{folder}.{sum(found.values())}.bad").write_bytes(path.read_bytes())
        path.write_bytes(kept)
        if kept_manifest:
            manifest.write_text(kept_manifest)
        for new in ("new", "run/new", "run/new.work", "run/new.manifest.json"):
            if (folder / new).is_dir():
                shutil.rmtree(folder / new)
            else:
                (folder / new).unlink(missing_ok=True)
    print(*(f"{s} {c}: {n}" for (s, c), n in sorted(codes.items(), key=str)), sep="\n")
    for (script, last), n in found.items():
        print(f"FOUND {n} times: {script}: {last}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int((sys.argv[2:] or ["0"])[0])))
