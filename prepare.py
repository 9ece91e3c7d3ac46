"""Stage 0: the problems and the base model. Also the records that every stage reads and writes.

    python prepare.py --out runs/demo    # embedded problems and base model
    python prepare.py --out runs/code --task code
    python prepare.py --out runs/gsm8k --train gsm8k:train.jsonl --test gsm8k:test.jsonl

Reads:  nothing, or data sets in their native files.
Writes: train.jsonl, valid.jsonl, test.jsonl and, without --train or with --demos, base/
    {"id": "demo/train/17", "source": "demo", "domain": "math", "prompt": "Ann has 6 coins. ...",
     "answer": "9", "tests": null}

The embedded problems are chains of relations ("Ben has twice as many as Ann."). A word-level model
of 0.5M parameters learns to solve them, then, shortly, from demonstrations in which some phrases
are misread more often than not ("twice as many" as + 2). So the base model fails in a way that is
visible in its steps, and knows the right way well enough to find it by sampling. With --task code
they are small functions to write ("Let a be twice x."), graded by running them. Harder ones, that
tell methods apart: --steps 6-6 --wordings 32 --clean_size 48000 (and --careless 4: hardly ever
right).
"""

import argparse
import ast
import base64
import errno
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple, get_args

import torch
from transformers import HfArgumentParser

from model import (
    LM,
    Tree,
    UserError,
    fit,
    flag,
    join,
    leave,
    pack_trees,
    rank,
    replace,
    require_memory,
    shard,
    step_logprobs,
    wait_for_all,
    whole_batches,
)
from reward import TESTS, Sandbox, encode, exact_number, extract_answer, sandbox

# ------------------------------------------------------------ records


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hash of a file or a folder's files; remembered by size and time in .sha256.json beside."""
    path = Path(path)
    if path.is_dir():
        lines = []
        for file in sorted(path.rglob("*")):
            if file.is_file() and not file.name.startswith(".sha256.json"):
                lines.append(f"{file.relative_to(path)} {sha256(file)}")
        return digest("\n".join(lines))
    memory, stat = path.parent / ".sha256.json", path.stat()
    try:
        known = dict(json.loads(memory.read_text()))
    except (OSError, TypeError, ValueError):
        known = {}
    mark = [stat.st_size, stat.st_mtime_ns]
    if known.get(path.name, [])[:2] != mark:
        with path.open("rb") as f:
            known[path.name] = mark + [hashlib.file_digest(f, "sha256").hexdigest()]
        with suppress(OSError):  # a folder of somebody else's, or two processes that hash at once
            replace(memory, lambda p: p.write_text(json.dumps(known)))
    return known[path.name][2]


def dump(record: dict) -> bytes:
    """A record as a line of JSONL."""
    return (json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n").encode()


LARGEST = 1 << 62  # integers beyond it do not fit into a tensor


def misfit(value, shape, name: str = "") -> str | None:
    """Where a value first differs from a shape; None if it fits.

    A shape is a type or a union of types, [the shape of each item] or {field: its shape}; a field
    whose shape includes EllipsisType may be missing.
    {"ids": [3, "4"]} against {"ids": [int]} -> "ids[1]"
    """
    if isinstance(shape, list) and isinstance(value, list):
        # Token ids are looked at all together: one by one takes minutes at full size.
        ints = shape == [int] and set(map(type, value)) == {int}
        if ints and -LARGEST < min(value) and max(value) < LARGEST:
            return None
        for i, item in enumerate(value):
            if found := misfit(item, shape[0], f"{name}[{i}]"):
                return found
        return None
    if isinstance(shape, dict) and isinstance(value, dict):
        for field, inner in shape.items():
            if found := misfit(value.get(field, ...), inner, f"{name} {field}".strip()):
                return found
        return None
    wanted = get_args(shape) or (shape,)
    # type() and not isinstance(), for which True would be an int
    fits = type(value) in wanted and not (type(value) is int and abs(value) >= LARGEST)
    return None if fits else name or "all of it"


KINDS = {"id": str | int, "prompt": str, "answer": str, "tests": dict}
KINDS |= {"prompt_ids": list, "nodes": list, "responses": list}
TESTS_SHAPE = {"setup": str | EllipsisType, "outputs": list | EllipsisType}


def unusable(record: dict, needs: tuple[str, ...]) -> list[str]:
    """The fields of `needs` that a record lacks, or that are empty or of another type."""
    if record.get("tests") and misfit(record["tests"], TESTS_SHAPE):
        return ["tests"]
    missing = []
    for need in needs:
        for name in need.split(" or "):
            value = record.get(name)
            if isinstance(value, KINDS[name]) and value not in ("", [], {}):
                break
        else:
            missing.append(need)
    return missing


def each_record(path, needs: tuple[str, ...] = ("id",), may_be_empty=False) -> Iterator[dict]:
    """The records of a JSONL file, one by one. A broken line is an error that names file and line.

    needs: fields that must be there and not empty; "answer or tests": one of them.
    """
    path, ids = Path(path), set()
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path, or run the stage that writes it")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where, line = f"{path}:{number}", line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
                if b"\\u" in line:  # half a surrogate pair is JSON, but no text
                    dump(record)
            except (ValueError, RecursionError) as e:
                why = f"not JSON in UTF-8 ({e}); one object a line is wanted"
                raise UserError(f"{where}: {why}") from e
            record = record if isinstance(record, dict) else {}
            if missing := unusable(record, needs):
                found = (
                    f"no usable {', '.join(missing)} (found: {', '.join(record) or 'no object'})"
                )
                sets = " prepare.py makes problems of data sets" if "prompt" in needs else ""
                raise UserError(f"{where}: {found}; is this the right file?{sets}")
            if record["id"] in ids:
                raise UserError(f"{where}: the id {record['id']!r} is there twice; make ids unique")
            ids.add(record["id"])
            yield record
    if not ids and not may_be_empty:
        raise UserError(f"{path}: empty; one JSON object a line is wanted")


def read_jsonl(path, needs: tuple[str, ...] = ("id",), may_be_empty=False) -> list[dict]:
    """All records of a JSONL file at once."""
    return list(each_record(path, needs, may_be_empty))


# ------------------------------------------------------------ the machinery of a stage


MANIFEST = {"stage": str, "settings": dict, "code": dict, "grader": str, "inputs": dict}
MANIFEST |= {"facts": dict, "output": str | EllipsisType}  # no output yet: unfinished


def read_manifest(path: Path) -> dict:
    """What the stage that made `path` stated about it; empty if no stage did."""
    manifest = Path(f"{path}.manifest.json")
    if not manifest.exists():
        return {}
    with suppress(ValueError):
        made = json.loads(manifest.read_text())
        if not misfit(made, MANIFEST) and all(isinstance(v, str) for v in made["facts"].values()):
            return made
    raise UserError(f"{manifest}: broken; remove it with its output, and make that anew")


def differences(old: dict, new: dict) -> list[str]:
    """How one manifest differs from another, a line a field: what it was and what it is now.

    {"settings": {"beta": 0.1}}, {"settings": {"beta": 0.2}} -> ["settings beta was 0.1, is 0.2 now"]
    """
    found = []
    for part in ("stage", "settings", "inputs", "facts", "grader"):
        was, now = old.get(part), new.get(part)
        if not isinstance(was, dict) or not isinstance(now, dict):
            was, now, part = {part: was}, {part: now}, ""
        for name in sorted({*was, *now}):
            if was.get(name) != now.get(name):
                what = f"{part} {name}".strip()
                found.append(f"{what} was {was.get(name)}, is {now.get(name)} now")
    return found


def code_of(script: str) -> dict[str, str]:
    """{file: hash} of a stage's script and of all that it imports from this folder."""
    found, waiting = {}, [script]
    while waiting:
        name = waiting.pop()
        path = Path(__file__).with_name(name)
        if name not in found and path.exists():
            text = path.read_text("utf-8")
            found[name] = digest(text)[:16]
            for module in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
                waiting.append(f"{module}.py")
    return dict(sorted(found.items()))


def changed_files(old: dict, new: dict) -> list[str]:
    """Names of the files of code that are not as they were."""
    was, now = old["code"], new["code"]
    return [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]


class Stage:
    """One output of one stage: its lock, its manifest, and for JSONL its records.

    The manifest `OUT.manifest.json` holds settings, code, hashes of the inputs, and facts. Started
    again with the same ones, the stage goes on where it stopped (`done`: the ids of the records
    that are there); with others it is refused. Code is treated mildly, since people change it: a
    difference is a warning, unless the output is half done and the stage's own file is another now.
    The order of calls: Stage(...) only looks, and `complete` says that nothing is left to do,
    before any model is loaded; `begin` locks the folder and finds what is done; `start` writes the
    manifest (`append` does it for JSONL); `append` or `finish(folder)` write the output.

    script    "sample.py": whose output this is
    inputs    {name: path}; an input made by a stage must be complete and as that stage left it
    """

    lock = None  # of the stage that this process runs
    TRUTH = ("model.py", "reward.py")  # where steps end, and what is right

    def __init__(self, script: str, out, settings, inputs: dict):
        self.out, self.inputs, self.force = Path(out), inputs, settings.force
        self.path, self.work = Path(f"{out}.manifest.json"), Path(f"{out}.work")
        self.began, self.done = time.perf_counter(), set()
        if self.out.exists() and not self.path.exists():
            raise UserError(f"{out}: there already, and not by this pipeline; choose another --out")
        if self.out.resolve() in [Path(path).resolve() for path in inputs.values()]:
            raise UserError(f"{out}: is an input too; choose another --out")
        flags = {
            k: v
            for k, v in asdict(settings).items()
            if k not in ("out", "force", "server", *inputs)
        }
        # How the output is made and not what it is: a half-done one may go on with another.
        how = {"budget", "save_minutes", "unsafe"} | ({"batch"} if "max_new" in flags else set())
        self.defaults = {
            f.name: f.default for f in fields(settings) if f.name in flags.keys() - how
        }
        self.manifest = {
            "stage": script.removesuffix(".py"),
            "settings": flags,
            "code": code_of(script),
            "grader": version("math-verify"),
            "inputs": {key: _checked_input(key, str(path)) for key, path in inputs.items()},
        }
        self.complete = "output" in self._earlier() and self.out.exists()
        if self.complete:
            _checked_input("out", str(self.out))
            self._drop_checkpoints()
            print(f"{self.out}: complete, nothing to do")

    def _earlier(self) -> dict:
        """The manifest of an earlier start, {} if there is none; an error if this is another run."""
        old = {} if self.force else read_manifest(self.out)
        if not old:
            return {}
        # A flag younger than it had its default; one that is no more is not compared.
        was = {name: old["settings"].get(name, x) for name, x in self.defaults.items()}
        now = {name: self.manifest["settings"][name] for name in self.defaults}
        facts = self.manifest.get("facts", old["facts"])  # they come with `begin`
        new = self.manifest | {"settings": now, "facts": facts}
        if found := differences(old | {"settings": was}, new):
            raise UserError(f"{self.out}: {found[0]}; --force starts over, or change --out")
        changed = changed_files(old, self.manifest)
        own = f"{self.manifest['stage']}.py"
        if own in changed and "output" not in old:
            half = f"half done by another {own}"
            raise UserError(f"{self.out}: {half}; restore that, or --force starts over")
        if changed and self.manifest.get("facts") is None:  # say it once
            print(f"{self.out}: made with another {', '.join(changed)}; taken as it is")
        return old

    def begin(self, facts: dict | None = None, expects: dict | None = None):
        """Take the folder's lock and find the records that are there; a torn last line is dropped.

        facts     {fact: value} that the manifest states for the stages that come after
        expects   {fact: value} that inputs' manifests must agree with, where they state that fact
        """
        for path in self.inputs.values():
            made = read_manifest(path)
            for fact, now in (expects or {}).items():
                was = made.get("facts", {}).get(fact, now)
                if was != now:
                    wrong = f"made with {fact} {was[:16]}, this run has {now[:16]}"
                    raise UserError(f"{path}: {wrong}; pass that {fact}, or make it anew")
            if made.get("stage") in ("sample", "label_steps"):
                other = [f for f in changed_files(made, self.manifest) if f in self.TRUTH]
                if other:
                    taken = "its rewards and steps are taken as they are"
                    print(f"{path}: made with another {', '.join(other)}; {taken}")
        self.manifest["facts"] = facts or {}
        if rank() == 0:
            self._own_folder()
        wait_for_all()
        if self.out.is_file():
            self.done = {record["id"] for record in each_record(self.out, may_be_empty=True)}
            if self.done:
                print(f"{self.out}: resuming after {len(self.done)} records")
        return self

    def _own_folder(self):
        """Lock the folder and make the output fit to go on from; with --force throw it away."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if Stage.lock:  # a notebook's last stage may have ended in an error
            Stage.lock.close()
        self.lock = Stage.lock = (self.out.parent / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.out.parent}: another stage is writing here; wait") from None
        self._earlier()
        # The manifest goes last: a kill in between leaves the rest owned.
        for path in (self.out, self.work, self.path) if self.force else ():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.out.is_file():
            with self.out.open("rb") as lines:
                whole = sum(len(line) for line in lines if line.endswith(b"\n"))
            torn = self.out.stat().st_size - whole
            if torn:
                print(f"{self.out}: dropped a torn last line of {torn} bytes")
                os.truncate(self.out, whole)

    def start(self):
        """Write the manifest; a run that was refused before this leaves nothing behind."""
        if rank() > 0:
            return
        replace(self.path, lambda p: p.write_text(json.dumps(self.manifest, indent=1)))

    def append(self, records: list[dict]):
        """Write whole lines, flushed and fsynced before the next ones are made."""
        if rank() > 0:
            return
        if not self.out.exists():
            self.start()
            replace(self.out, Path.touch)
        with self.out.open("ab") as f:
            f.write(b"".join(dump(record) for record in records))
            f.flush()
            os.fsync(f.fileno())

    def finish(self, folder=None):
        """State that the output is whole; `folder(path)`, if given, writes it as a folder first.

        Of several processes all call `folder`, since each has a part of the weights; one writes.
        """
        if rank() > 0:
            if folder is not None:
                folder(self.out)
            wait_for_all()
            return
        if folder is not None:
            replace(self.out, folder)
        elif not self.out.exists():
            self.append([])
        self.manifest["output"] = sha256(self.out)
        self.start()
        self._drop_checkpoints()
        self.lock.close()
        wait_for_all()
        print(f"{self.out}: written, {time.perf_counter() - self.began:.0f} s")

    def _drop_checkpoints(self):
        """Of a finished stage: of an 8B model they take 96 GB each. A kill may leave some behind,
        which the next start drops."""
        if rank() == 0:
            for checkpoint in [*self.work.rglob("step-*")]:
                shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()


def _checked_input(key: str, path: str) -> str:
    """Hash of an input; refuses an unfinished or changed one."""
    if not Path(path).exists():
        if key in ("actor", "base", "critic_model"):
            return path  # a hub id
        raise UserError(f"{path}: no such file; check the path, or run the stage that writes it")
    found, made = sha256(path), read_manifest(path)
    if made and "output" not in made:
        raise UserError(f"{path}: unfinished; run {made['stage']}.py again with the same flags")
    if made and made["output"] != found:
        change = f"changed since {made['stage']}.py wrote it"
        raise UserError(f"{path}: {change}; restore it, or make it anew with --force")
    return found


def fingerprint(model: str) -> str:
    """What identifies a model: the hash of its weights, or the name of one on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    weights = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin")]
    return digest("".join(sha256(file) for file in weights))


def tokenizer_facts(lm: LM) -> dict:
    """Hashes of the vocabulary and of the chat template: records made with others do not fit."""
    vocabulary = json.dumps(sorted(lm.tokenizer.get_vocab().items()))
    template = str(lm.tokenizer.chat_template)
    return {"tokenizer": digest(vocabulary)[:16], "template": digest(template)[:16]}


def actor_facts(lm: LM, max_new: int) -> dict:
    """What two stages must agree on if one's responses are to fit the other's."""
    facts = {"actor": fingerprint(lm.path), "eos": str(lm.eos), "max_new": str(max_new)}
    return {**facts, "grader": version("math-verify"), **tokenizer_facts(lm)}


class Help(argparse.RawDescriptionHelpFormatter):
    """--help: the docstring as it is written; a default where there is one."""

    def _get_help_string(self, action):
        shown = not action.required and action.default not in (None, "", argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


def main(stage, settings_class, doc: str):
    """Parse the flags, run the stage, turn users' mistakes into one line on stderr and code 2."""
    parser = HfArgumentParser(
        settings_class, description=doc, formatter_class=Help, allow_abbrev=False
    )

    def refuse(message):
        raise UserError(f"{Path(sys.argv[0]).name}: {message}; --help lists the flags")

    def stop(*_):  # a record in hand is dropped; a second Ctrl-C ends the process at once
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    parser.error = refuse
    if rank() > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    signal.signal(signal.SIGINT, stop)
    try:
        settings = settings_class(**vars(parser.parse_args()))
        check_numbers(settings)
        stage(settings)
        return leave()
    except UserError as e:
        code, line = 2, f"error: {e}"
    except (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError) as e:
        code, line = 2, f"error: {e.filename}: {e.strerror}"
    except ConnectionError as e:  # of a server
        code, line = 1, f"error: {e}; nothing is lost, the same command goes on"
    except OSError as e:
        room = "make room, " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        where = e.filename or settings.out
        code, line = 1, f"error: {where}: {e.strerror or e}; {room}the same command goes on"
    except KeyboardInterrupt:
        again = shlex.join(a for a in sys.argv if a != "--force")
        code, line = 130, f"stopped; to go on: python {again}"
    except Exception:
        sys.stderr = sys.__stderr__  # our own fault, whichever process found it, is shown whole
        raise
    finally:
        if Stage.lock:
            Stage.lock.close()
    if rank() > 0 and code != 130:  # If the first process has met it too, it says it, and torchrun
        time.sleep(3)  # ends this one meanwhile; else nobody but this one knows.
        sys.stderr = sys.__stderr__
    print(*line.splitlines(), file=sys.stderr)
    sys.exit(code)


def check_numbers(settings):
    """Refuse numbers that are negative or not finite, and 0 unless it is the default or has a use."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        zero = f.name in (
            "m",
            "kappa",
            "gap",
            "valid_share",
            "token_share",
            "clean_seed",
            "careless",
        )
        good = isinstance(value, bool) or value == f.default or (value == 0 and zero)
        if isinstance(value, int | float) and not (good or 0 < value < math.inf):
            raise UserError(f"--{f.name} {value}: wanted a finite number above 0")


# ------------------------------------------------------------ the embedded problems

# kind of step: phrase, right reading, misreading, share of demonstrations that misread it
RELATIONS = {
    "more": ("{k} more than {x}", "{x} + {k}", "{x} - {k}", 0.03),
    "fewer": ("{k} fewer than {x}", "{x} - {k}", "{x} + {k}", 0.15),
    "twice": ("twice as many as {x}", "{x} * 2", "{x} + 2", 0.72),
    "thrice": ("3 times as many as {x}", "{x} * 3", "{x} + 3", 0.38),
    "half": ("half as many as {x}", "{x} / 2", "{x} - 2", 0.60),
}
OPERATIONS = {
    "more": ("{k} more than {x}", "{x} + {k}", "{x} - {k}", 0.03),
    "less": ("{k} less than {x}", "{x} - {k}", "{k} - {x}", 0.15),
    "twice": ("twice {x}", "{x} * 2", "{x} + 2", 0.72),
    "double": ("the double of {x}", "{x} * 2", "{x} + 2", 0.72),
    "thrice": ("3 times {x}", "{x} * 3", "{x} + 3", 0.38),
    "least": ("{x}, but at least {k}", "max({x}, {k})", "min({x}, {k})", 0.25),
    "half": ("half of {x}, rounded down", "{x} // 2", "{x} - 2", 0.30),
    "over": ("{k} if {x} is over 9, else {x}", "{k} if {x} > 9 else {x}", "{k} if {x} < 9 else {x}", 0.10),
}  # fmt: skip
NAMES = "Ann Ben Cai Dia Eli Fay Gus Hal Ida Jon Kim Leo Mia".split()  # noqa: SIM905
VARIABLES = "xabcdeghijkmn"
MOST_STEPS = len(NAMES) - 1
# harmless words before and after a line of a chain's solution: 64 ways to say the same
BEGINNINGS = ["", "So ", "Then ", "Now ", "Next ", "Thus ", "Here ", "Hence "]
ENDINGS = ["", " coins", " now", " exactly", " then", " here", " clearly", " indeed"]
INPUTS = [-8, -1, 2, 5, 11, 32]


class Task(NamedTuple):
    draw: Callable  # (rng, fewest, most steps) -> what a problem says, its skeleton
    tell: Callable  # skeleton -> prompt
    solve: Callable  # (rng, skeleton, misread, slip) -> response, a line a step
    check: Callable  # skeleton -> {"answer"} or {"tests"}, and whether luck would solve it


def read(rng: random.Random, phrase: tuple, misread: float) -> str:
    """A phrase's right reading, or its misreading as often as a careless reader's.

    misread 1: in the phrase's share of the readings, 2: as if read twice and wrong at least once,
    0: never
    """
    _, right, wrong, share = phrase
    return wrong if misread and rng.random() < 1 - (1 - share) ** misread else right


def outcomes(phrases: dict, steps: list, values: tuple[int, ...]) -> tuple[tuple, set[tuple]]:
    """What steps [(kind, k)] make of some values: read right throughout; misread at least once."""
    right, wrong = values, set()
    for kind, k in steps:
        _, good, bad, _ = phrases[kind]
        good, bad = good.format(x="x", k=k), bad.format(x="x", k=k)
        wrong = {after(v, text) for v in wrong for text in (good, bad)} | {after(right, bad)}
        right = after(right, good)
    return right, wrong


def after(values: tuple[int, ...], text: str) -> tuple[int, ...]:
    """Each x after an expression of x: (5, 8) and "x / 2" -> (2, 4)"""
    return tuple(math.floor(expression(text)(x)) for x in values)


@cache
def expression(text: str) -> Callable[[int], float]:
    return eval(f"lambda x: {text}")  # ours, of RELATIONS or OPERATIONS


def draw_chain(rng: random.Random, fewest: int, most: int) -> tuple[int, list]:
    """A first value and some relations; all values are whole, from 1 to 20."""
    x = first = rng.randint(1, 20)
    steps = []
    for _ in range(rng.randint(fewest, most)):
        new = 0
        while new not in range(1, 21):
            kind, k = rng.choice(list(RELATIONS)), rng.randint(1, 9)
            text = RELATIONS[kind][1].format(x="x", k=k)
            new = expression(text)(x)
        steps.append((kind, int(text.split()[-1])))  # of "twice", which names no k, 2
        x = int(new)
    return first, steps


def tell_chain(skeleton: tuple[int, list]) -> str:
    first, steps = skeleton
    lines = [f"{NAMES[0]} has {first} coins."]
    for (kind, k), x, y in zip(steps, NAMES, NAMES[1:]):
        lines.append(f"{y} has {RELATIONS[kind][0].format(x=x, k=k)}.")
    return "\n".join([*lines, f"How many coins does {NAMES[len(steps)]} have?"])


def solve_chain(rng: random.Random, skeleton: tuple[int, list], misread=0.0, slip=0.0) -> str:
    """A solution, a line a relation: "Ben: 6 * 2 = 12"."""
    x, steps = skeleton
    lines = []
    for (kind, k), name in zip(steps, NAMES[1:]):
        text = read(rng, RELATIONS[kind], misread)
        (new,) = after((x,), text.format(x="x", k=k))
        if rng.random() < slip:
            new += rng.choice([-1, 1])
        lines.append(f"{name}: {text.format(x=x, k=k)} = {new}")
        x = new
    return "\n".join([*lines, f"The answer is {x}."])


def check_chain(skeleton: tuple[int, list]) -> tuple[dict, bool]:
    """Its answer, and whether some of its misreadings would end in the same."""
    first, steps = skeleton
    right, wrong = outcomes(RELATIONS, steps, (first,))
    return {"answer": str(right[0])}, right in wrong


def draw_function(rng: random.Random, fewest: int, most: int) -> list:
    """Some operations; a k that the phrase does not name is 0."""
    steps = []
    for _ in range(rng.randint(fewest, most)):
        kind, k = rng.choice(list(OPERATIONS)), rng.randint(1, 9)
        steps.append((kind, k if "{k}" in OPERATIONS[kind][0] else 0))
    return steps


def tell_function(steps: list) -> str:
    lines = ["Write f(x)."]
    for (kind, k), x, y in zip(steps, VARIABLES, VARIABLES[1:]):
        lines.append(f"Let {y} be {OPERATIONS[kind][0].format(x=x, k=k)}.")
    return "\n".join([*lines, f"Return {VARIABLES[len(steps)]}."])


def solve_function(rng: random.Random, steps: list, misread=0.0, slip=0.0) -> str:
    """The function, a line an operation: "    a = x * 2"."""
    lines = ["def f(x):"]
    for (kind, k), x, y in zip(steps, VARIABLES, VARIABLES[1:]):
        if rng.random() < slip:
            k += rng.choice([-1, 1])
        lines.append(f"{y} = {read(rng, OPERATIONS[kind], misread).format(x=x, k=k)}")
    return "\n    ".join([*lines, f"return {VARIABLES[len(steps)]}"])


def check_function(steps: list) -> tuple[dict, bool]:
    """Its tests, and whether some of its misreadings would pass them."""
    right, wrong = outcomes(OPERATIONS, steps, tuple(INPUTS))
    tests = {"kind": "call", "entry": "f", "inputs": [[x] for x in INPUTS], "outputs": list(right)}
    return {"domain": "code", "tests": tests}, right in wrong


TASKS = {
    "math": Task(draw_chain, tell_chain, solve_chain, check_chain),
    "code": Task(draw_function, tell_function, solve_function, check_function),
}


def split_of(skeleton) -> str:
    bucket = int(digest(json.dumps(skeleton))[:2], 16) % 10
    return "test" if bucket < 2 else "valid" if bucket < 4 else "train"


def demo_problems(
    task: Task, seed: int, sizes: dict[str, int], steps: tuple[int, int] = (2, 4)
) -> dict[str, list[dict]]:
    """Problems of each split; the hash of a skeleton says which split.

    A problem that some misreading would solve by luck is left out, but the longer problems are, the
    fewer are without one: where hardly any is, they stay, and their number is printed.
    """
    rng = random.Random("luck")
    fair = sum(not task.check(task.draw(rng, *steps))[1] for _ in range(1000))
    rng, problems, seen = random.Random(f"problems {seed}"), {s: [] for s in sizes}, set()
    total = in_vain = 0
    while any(len(problems[s]) < n for s, n in sizes.items()):
        if in_vain == 100_000:
            few = {split: len(found) for split, found in problems.items()}
            raise UserError(f"--steps: there are only {few} problems; more steps, or smaller sizes")
        skeleton = task.draw(rng, *steps)
        key, split = json.dumps(skeleton), split_of(skeleton)
        in_vain += 1
        if key in seen or len(problems[split]) >= sizes[split]:
            continue
        in_vain = 0
        seen.add(key)
        goal, lucky = task.check(skeleton)
        if lucky and fair >= 20:
            continue
        total += lucky
        problem = {"id": f"demo/{split}/{len(problems[split])}", "source": "demo"}
        problem |= {"domain": "math", "prompt": task.tell(skeleton)}
        problems[split].append(problem | {"answer": None, "tests": None} | goal)
    if total:
        print(f"{total} of {sum(sizes.values())} problems can be solved by luck, misread somewhere")
    return problems


def demonstrations(
    task: Task, seed: int, count: int, misread: float, steps: tuple[int, int] = (2, 4), wordings=1
) -> list[dict]:
    """{"prompt", "response"} of training skeletons; clean ones include drills of one step."""
    rng, demos = random.Random(f"demonstrations {seed} {misread > 0}"), []
    fewest, most = steps
    while len(demos) < count:
        skeleton = task.draw(rng, fewest if misread else 1, most)
        if split_of(skeleton) == "train":
            response = task.solve(rng, skeleton, misread, 0.02 if misread else 0.0)
            if wordings > 1:
                response = reword(rng, response, wordings)
            demos.append({"prompt": task.tell(skeleton), "response": response})
    return demos


def reword(rng: random.Random, response: str, wordings: int) -> str:
    """Each line but the answer's in one of some ways: "Then Ben: 6 * 2 = 12 coins"."""
    *lines, answer = response.split("\n")
    said = []
    for line in lines:
        ending, beginning = divmod(rng.randrange(wordings), len(BEGINNINGS))
        said.append(BEGINNINGS[beginning] + line + ENDINGS[ending])
    return "\n".join([*said, answer])


def build_tokenizer(texts: list[str]):
    """Word level: a word, number or sign and the space before it are a token, and so is an
    indentation; exact round trip."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    pieces = r"<\|\w+\|>|\n| {4}| ?[A-Za-z]+| ?-?\d+| ?[^\sA-Za-z\d]"
    words = {w for text in texts for w in re.findall(pieces, text)}
    words |= {f" {i}" for i in range(-20, 100)}
    ids = {w: i for i, w in enumerate([*special, "\n", *sorted(words - {"\n"})])}
    model = tk.Tokenizer(tk.models.WordLevel(ids, unk_token="<|unknown|>"))
    model.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(pieces), "isolated")
    model.decoder = tk.decoders.Fuse()
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|unknown|>"}
    options = {"additional_special_tokens": special[1:3], "clean_up_tokenization_spaces": False}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **names, **options)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def new_model(tokenizer, seed: int, layers: int = 3, width: int = 128):
    """A Llama of 0.5M parameters with random weights."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **end)
    return model


# ------------------------------------------------------------ fine-tuning on demonstrations

DEMO_PACK = 8192  # tokens of a pack


def demo_tree(lm: LM, demo: dict) -> Tree:
    """A demonstration as a tree of two nodes, prompt and response, both scored."""
    ids = [lm.prompt_ids(demo["prompt"]), lm.response_ids(demo["response"])]
    return Tree(ids, [-1, 0], [True, True])


def fine_tune(lm: LM, trees: list[Tree], work: Path, lr, batch, passes, seed, prompt_weight):
    """Next-token training; a prompt's tokens count `prompt_weight`, a response's 1."""
    if prompt_weight == 0:  # prompts are context alone
        trees = [tree._replace(score=[False, True]) for tree in trees]

    def make_packs(rows):
        chosen = [trees[r] for r in rows]
        weight = sum(prompt_weight * len(t.ids[0]) + len(t.ids[1]) for t in chosen)
        return [(pack, weight) for pack in pack_trees(chosen, DEMO_PACK)]

    def loss(pack, weight):
        logp = step_logprobs(lm, pack)  # (M,)
        response = torch.tensor([v > 0 for _, v in pack.owner], device=logp.device)
        nll = -torch.where(response, logp, prompt_weight * logp).sum() / weight
        return nll, {"response_nll": -float(logp.detach()[response].sum()) / weight}

    batches = whole_batches([1] * len(trees), batch, passes, f"fine_tune {seed}")
    fit({"model": lm.model}, batches, make_packs, loss, work, lr, save_minutes=15.0)


# ------------------------------------------------------------ data sets

INSTRUCTIONS = {  # by the kind of answer
    "boxed": r"Please reason step by step, and put your final answer within \boxed{}.",
    "program": "Write it in Python, in one ```python block.",
    "####": 'Solve it step by step, one step a line. The last line is "#### " and the answer.',
}


class LeftOut(Exception):
    """A row that cannot be used; the message is the reason."""


class Loader(NamedTuple):
    """How to read a data set. For another one write a converter and give it a row in LOADERS:

    def quiz(row): return {"prompt": row["text"], "answer": row["solution"]}
    LOADERS["quiz"] = Loader("text solution", quiz)        # python prepare.py --train quiz:FILE
    """

    fields: str  # that every row must have; a/b: one of them
    convert: Callable[[dict], dict]  # row -> prompt, and answer, tests, readings or response
    kind: str = "boxed"  # which of INSTRUCTIONS is put after the prompt; "": none


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl, .jsonl.gz, .json (a list, or a dict of columns) or .parquet file; of a
    folder with a folder for each row, in which every field is a file (APPS)."""
    path = Path(path)
    if path.is_dir():
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        return [{file.stem: file.read_text("utf-8") for file in f.iterdir()} for f in folders]
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
        return parquet.read_table(path).to_pylist()
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    whole = path.name.removesuffix(".gz").endswith(".json")
    rows = []
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            wanted = "" if whole else "; one JSON object a line is wanted"
            raise UserError(f"{path}:{number + error.lineno - 1}: {error.msg}{wanted}") from None
        except RecursionError:
            raise UserError(
                f"{path}:{number}: nested too deeply; is this the right file?"
            ) from None
    rows = rows[0] if whole and rows else rows
    if isinstance(rows, dict) and all(isinstance(column, list) for column in rows.values()):
        with suppress(ValueError):  # columns of different lengths
            rows = [dict(zip(rows, values)) for values in zip(*rows.values(), strict=True)]
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: no rows, or rows that are not JSON objects")
    return rows


def boxed(row: dict) -> dict:
    """MATH and Minerva: the gold answer is in the solution's last box."""
    if not re.search(r"\\(boxed|fbox)", row["solution"]):
        raise LeftOut("no box in the solution")
    return {"prompt": row["problem"], "answer": extract_answer(row["solution"])}


def olympiadbench(row: dict) -> dict:
    """Several final answers are one list; the unit is a field of its own."""
    question = "\n".join(part for part in (row["context"], row["question"]) if part)
    answer, unit = ", ".join(row["final_answer"] or []), row["unit"] or ""
    unit = unit if not unit or "\\" in unit else rf"\text{{ {unit}}}"
    return {"prompt": question, "answer": f"{answer} {unit}" if answer else ""}


def mawps(row: dict) -> dict:
    """43.0 -> 43; 0.6666666667 -> 2/3, because it is rounded and numbers are compared exactly."""
    fraction = Fraction(row["target"]).limit_denominator(1000)
    rounded = 0 < abs(fraction - Fraction(str(row["target"]))) < 1e-9
    return {"prompt": row["input"], "answer": str(fraction) if rounded else f"{row['target']:.10g}"}


def asdiv(row: dict) -> dict:
    return {"prompt": f"{row['body'].strip()} {row['question'].strip()}", "answer": row["answer"]}


def gsm8k(row: dict) -> dict:
    if "####" not in row["answer"]:
        raise LeftOut("no ####")
    return {"prompt": row["question"], "answer": row["answer"].rpartition("####")[2]}


def taken(**names: str) -> Callable[[dict], dict]:
    """A converter that only renames: taken(prompt="problem") takes a row's problem as prompt."""
    return lambda row: {new: row[old] for new, old in names.items()}


# Sets of programs. Their converters give readings of the tests, of which one is to hold, and the
# row's own solutions, one of which must pass (keep_solved); or tests that are taken on trust.

LIBRARY = ["typing", "collections", "functools", "itertools", "heapq", "bisect", "math", "string"]
LEETCODE = "\n".join(f"from {name} import *" for name in LIBRARY)  # as LeetCode does for its users
STDIN = "Read standard input and print the answer."


def apps(row: dict) -> dict:
    """APPS and TACO, whose outputs may or may not be wrapped in a list."""
    cases, solutions = parsed(row["input_output"]), parsed(row["solutions"])
    if not cases.get("inputs") or not solutions:
        raise LeftOut("no solution" if cases.get("inputs") else "no tests")
    name, inputs, outputs = cases.get("fn_name"), cases["inputs"], cases["outputs"]
    if name:
        tests = {"kind": "call", "entry": name, "setup": LEETCODE, "inputs": inputs}
        ways = [outputs]
        if all(isinstance(value, list) and len(value) == 1 for value in outputs):
            ways.insert(0, [value[0] for value in outputs])
    else:
        tests = {"kind": "stdin", "setup": "", "inputs": [lines(x) for x in inputs]}
        ways = [[lines(x) for x in outputs]]
    readings = []
    for wanted in ways:
        readings.append(tests | {"atol": 1e-6, "outputs": [as_json(value) for value in wanted]})
    how = f"Write the function {name}." if name else STDIN
    prompt = f"{row['question'].strip()}\n\n{how}\n{row.get('starter_code') or ''}".rstrip()
    return {"prompt": prompt, "readings": readings, "solutions": solutions}


def parsed(value):
    """A field that holds JSON as text in the original, and as itself in some copies."""
    return json.loads(value or "{}") if isinstance(value, str) else value


def lines(text: str | list[str]) -> str:
    return "\n".join(text) if isinstance(text, list) else text


def as_json(value):
    """A JSON value as an output. A tuple will do for a list, since JSON writes both alike."""
    return {"!json": value} if isinstance(value, (list, dict)) else value


def program(problem_id: str, prompt: str, tests: dict, solution: str) -> dict:
    return {"id": problem_id, "prompt": prompt, "readings": [tests], "solutions": [solution]}


def humaneval(row: dict) -> dict:
    prompt, name, number = row["prompt"], row["entry_point"], row["task_id"].split("/")[1]
    tests = {"kind": "assert", "entry": name, "setup": prompt}
    tests["code"] = f"{row['test']}\ncheck({name})"
    return program(f"humaneval/test/{number}", prompt, tests, prompt + row["canonical_solution"])


def mbpp(row: dict) -> dict:
    number, asserts = row["task_id"], "\n".join(row["test_list"])
    splits = {"prompt": 10, "test": 510, "validation": 600, "train": 974}  # their last task_id
    split = next(split for split, last in splits.items() if number <= last)
    names = re.findall(r"^def (\w+)", row["code"], re.MULTILINE)
    called = [name for name in names if re.search(rf"\b{name}\(", asserts)]
    if not called:
        raise LeftOut("its tests call none of its functions")
    setup = f"import math, sys\n{row['test_setup_code']}"
    tests = {"kind": "assert", "entry": called[0], "setup": setup, "code": asserts}
    prompt = f"{row['text'].strip()}\nYour code should pass these tests:\n{asserts}"
    return program(f"mbpp/{split}/{number}", prompt, tests, row["code"])


def plus(row: dict) -> dict:
    """HumanEval+ and MBPP+: the expected values are what the reference solution returns.

    An MBPP+ row has an `assertion`; a HumanEval+ row has none, and its prompt opens the function.
    """
    name, number = row["entry_point"], row["task_id"].split("/")[1]
    asserts = row.get("assertion") or ""
    inputs = row["base_input"] + list(row["plus_input"])
    if asserts:
        inputs = restored(inputs, literal_calls(asserts, name), number)
    # Some tasks have more than one right answer: for those a line of code says what is right.
    kind, code = "call", ""
    if "assert set(" in row["prompt"]:
        code = f"for i, o in zip(inputs, outputs): assert set({name}(*i)) == set(o)"
    elif f"assert not {name}(" in asserts:
        code = f"for i, o in zip(inputs, outputs): assert bool({name}(*i)) == bool(o)"
    elif name == "find_zero":
        code = f"for i in inputs: assert abs(poly(*i, {name}(*i))) <= {row['atol']}"
    if code:
        kind = "assert"
    start = "" if asserts else row["prompt"]
    tests = {"kind": kind, "entry": name, "setup": start, "code": code}
    tests["inputs"] = [encode(arguments) for arguments in inputs]
    tests |= {"outputs": None, "atol": row["atol"] or 1e-6}
    problem_id = f"{'mbpp' if asserts else 'humaneval'}_plus/test/{number}"
    return program(problem_id, row["prompt"], tests, start + row["canonical_solution"])


def restored(inputs: list, calls: list[list], number: str) -> list:
    """MBPP+'s inputs as they were before JSON made lists of tuples and sets, and text of complex
    numbers: an argument becomes what the assertions' calls have in its place."""
    if number in ("124", "252"):
        return [[complex(argument) for argument in arguments] for arguments in inputs]
    if not calls:
        return inputs
    examples = list(zip(*calls))  # the values that the calls pass, a tuple a parameter
    whole = []
    for arguments in inputs:
        whole.append([like(value, seen) for value, seen in zip(arguments, examples)])
    return whole


def literal_calls(assertions: str, name: str) -> list[list]:
    """The arguments of the calls of `name`, where they are literals."""
    calls = []
    for node in ast.walk(ast.parse(assertions)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
            with suppress(ValueError):
                calls.append([ast.literal_eval(argument) for argument in node.args])
    return calls


def like(value, examples):
    """A JSON value with its lists turned into what the examples have in their place."""
    if isinstance(value, dict):
        inside = [item for e in examples if isinstance(e, dict) for item in e.values()]
        return {key: like(item, inside) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    alike = [e for e in examples if isinstance(e, (list, tuple, set))]
    items = [like(item, [inner for e in alike for inner in e]) for item in value]
    return type(alike[0])(items) if alike else items


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise LeftOut(f"its private tests ask for {module}.{name}")


def livecodebench(row: dict) -> dict:
    """The public tests and the private ones: JSON, or JSON pickled, zipped, in base64."""
    private = row.get("private_test_cases") or "[]"
    if not private.startswith("["):
        packed = zlib.decompress(base64.b64decode(private))
        private = PlainUnpickler(io.BytesIO(packed)).load()
    cases = json.loads(row["public_test_cases"]) + json.loads(private)
    name = json.loads(row["metadata"]).get("func_name")
    tests = {"kind": "stdin", "entry": name, "atol": 1e-6}
    inputs = [case["input"] for case in cases]
    outputs = [case["output"] for case in cases]
    if name:
        tests |= {"kind": "call", "setup": LEETCODE}
        inputs = [[json.loads(line) for line in text.split("\n")] for text in inputs]
        outputs = [as_json(json.loads(text)) for text in outputs]
    how = f"Complete this:\n{row['starter_code']}" if name else STDIN
    return {
        "id": f"livecodebench/test/{row['question_id']}",
        "prompt": f"{row['question_content'].strip()}\n\n{how}",
        "tests": tests | {"inputs": inputs, "outputs": outputs},
    }


OWN = {  # what the tests of a user's line have, by kind
    "call": {"entry": str, "inputs": [list], "outputs": list},
    "stdin": {"inputs": [str], "outputs": [str]},
    "assert": {"entry": str, "code": str},
}
LIMITS = {"setup": str, "atol": int | float, "seconds": int | float, "megabytes": int}


def own(row: dict) -> dict:
    """A user's line: an answer, or tests."""
    tests = row.get("tests")
    if not tests:
        return {"prompt": row["prompt"], "answer": row.get("answer")}
    if not isinstance(tests, dict):
        raise LeftOut("its tests are no JSON object")
    if unknown := tests.keys() - TESTS.keys():
        raise LeftOut(f"tests have no field {', '.join(sorted(unknown))}")
    tests = TESTS | tests
    shape = OWN.get(str(tests["kind"]), {"kind": None})
    if empty := [name for name in shape if name != "outputs" and not tests[name]]:
        raise LeftOut(f"its tests have no {empty[0]}")
    if bad := misfit(tests, shape | LIMITS):
        raise LeftOut(f"its tests' {bad} does not fit kind {tests['kind']}")
    if "inputs" in shape and len(tests["inputs"]) != len(tests["outputs"]):
        raise LeftOut("it has not as many outputs as inputs")
    if not (0 < tests["seconds"] < math.inf and tests["megabytes"] > 0 and tests["atol"] >= 0):
        raise LeftOut("its seconds and megabytes must be above 0, its atol not below")
    try:
        compile(f"{tests['setup']}\n{tests['code']}", "tests", "exec")
    except SyntaxError as error:
        raise LeftOut(f"its setup or code is no Python: {error.msg}") from None
    return {"prompt": row["prompt"], "domain": "code", "tests": tests}


def first_passing(problem: dict, box: Sandbox) -> tuple[str, dict | None]:
    """("right", the first reading of the tests that one of the first three solutions passes), or
    the verdict on the last try and None.

    A reading without outputs gets those that the first solution returns.
    """
    verdict = "no answer"
    for tests in problem["readings"]:
        if tests.get("outputs", "") is None:
            verdict, values = box.run(tests | {"kind": "call"}, problem["solutions"][0])
            if verdict != "right":
                return verdict, None
            tests = tests | {"outputs": values}
        for solution in problem["solutions"][:3]:
            verdict, _ = box.run(tests, solution)
            if verdict == "right":
                return "right", tests
    return verdict, None


def keep_solved(problems: list[dict], unsafe: bool) -> tuple[list[dict], list[tuple[str, str]]]:
    """-> the problems that their own solutions solve, with the tests that these pass; and
    (id, reason) of the others. Several are tried at once."""
    box = sandbox(unsafe)
    with ThreadPoolExecutor(box.workers) as pool:
        found = list(pool.map(lambda problem: first_passing(problem, box), problems))
    solved, failed = [], []
    for problem, (verdict, tests) in zip(problems, found):
        if verdict == "right":
            solved.append(problem | {"tests": tests})
            del solved[-1]["readings"], solved[-1]["solutions"]
        else:
            failed.append((problem["id"], f"its own solution: {verdict}"))
    return solved, failed


def gsm8k_demos(row: dict) -> dict:
    """GSM8K's own solution without its <<48/2=24>>, a step a line; it ends in "#### 72"."""
    steps = re.sub(r"<<[^<>]*>>", "", row["answer"]).splitlines()
    return {"prompt": row["question"], "response": "\n".join(s.strip() for s in steps if s.strip())}


def asdiv_demos(row: dict) -> dict:
    """'4/2 (box)=2; 2+1=3' -> "4 / 2 = 2", "2 + 1 = 3" and "#### 3", a line each."""
    gold = row["answer"].partition("(")[0].strip()
    if re.match(r"[a-z]\s*:", row["formula"]):
        raise LeftOut("the formula has a variable")
    formula = re.sub(r"\s*\([A-Za-z][^()]*\)|\s+", "", row["formula"])  # units and spaces
    results = formula.rpartition("=")[2].split("r")  # 9/2=4r1: the quotient or the remainder
    if exact_number(gold) is None or exact_number(gold) not in map(exact_number, results):
        raise LeftOut("the formula does not end in the answer")
    steps = re.sub(r"([-+*/=]|(?<=\d)r)", r" \1 ", formula).split(";")
    return {"prompt": asdiv(row)["prompt"], "response": "\n".join([*steps, f"#### {gold}"])}


PLUS = "task_id prompt entry_point canonical_solution base_input plus_input atol"
LIVE = "question_id question_content starter_code public_test_cases metadata"
LOADERS = {
    "math": Loader("problem solution", boxed),
    "math500": Loader("problem answer", taken(prompt="problem", answer="answer")),
    "gsm8k": Loader("question answer", gsm8k, "####"),
    "minerva": Loader("problem solution", boxed),
    "olympiadbench": Loader("question context final_answer unit", olympiadbench),
    "college_math": Loader("question answer", taken(prompt="question", answer="answer")),
    "asdiv": Loader("body question answer", asdiv, "####"),
    "mawps": Loader("input target", mawps, "####"),
    "jsonl": Loader("prompt answer/tests", own, ""),  # a user's prompts say what they want
    "taco": Loader("question input_output solutions", apps, "program"),
    "apps": Loader("question input_output solutions", apps, "program"),
    "humaneval": Loader("task_id prompt entry_point canonical_solution test", humaneval, "program"),
    "humaneval_plus": Loader(PLUS, plus, "program"),
    "mbpp": Loader("task_id text code test_list test_setup_code", mbpp, "program"),
    "mbpp_plus": Loader(f"{PLUS} assertion", plus, "program"),
    "livecodebench": Loader(LIVE, livecodebench, "program"),
}
DEMOS = {
    "gsm8k": Loader("question answer", gsm8k_demos, "####"),
    "asdiv": Loader("body question answer formula", asdiv_demos, "####"),
    "jsonl": Loader("prompt response", taken(prompt="prompt", response="response"), ""),
}


def load_set(name: str, path: str | Path, unsafe=False, loaders=LOADERS) -> tuple[list, list]:
    """-> records, and (id, reason) of each row left out. A file of another layout: UserError."""
    if name not in loaders:
        what = "data set" if loaders is LOADERS else "set of demonstrations"
        raise UserError(f"no {what} is called {name!r}; there are {', '.join(loaders)}")
    needed, convert, kind = loaders[name]
    domain = "code" if kind == "program" else "math"
    records, left_out = [], []
    for index, row in enumerate(read_rows(path)):
        if any(row.keys().isdisjoint(field.split("/")) for field in needed.split()):
            wanted = needed.replace(" ", ", ").replace("/", " or ")
            raise UserError(f"{path}: row {index} has {', '.join(row)}; {name} wants {wanted}")
        record = {"id": f"{name}/{Path(path).name.split('.')[0]}/{index}", "source": name}
        record |= {"domain": domain, "prompt": "", "answer": None, "tests": None}
        try:
            record |= convert(row)
            if record["answer"] is not None:
                record["answer"] = str(record["answer"]).strip()
            if not record["prompt"]:
                raise LeftOut("no question")
            if not any(record.get(k) for k in ("answer", "tests", "readings", "response")):
                raise LeftOut("no gold answer")
            dump(record)
        except (LeftOut, ValueError) as reason:  # no JSON in a field that should hold it, no text
            left_out.append((record["id"], str(reason).partition(" in position")[0]))
            continue
        except Exception as e:  # noqa: BLE001  a field of another type or form
            raise UserError(f"{path}: row {index} is none of {name}'s ({e!r})") from None
        if bad := misfit(record, {"prompt": str, "response": str | EllipsisType}):
            raise UserError(f"{path}: row {index}: its {bad} is no text")
        records.append(record)
    if any("readings" in record for record in records):
        records, unsolved = keep_solved(records, unsafe)
        left_out += unsolved
    return records, left_out


def normalised_question(text: str) -> str:
    """Equal for two spellings of one question. Operators stay: a+b is another question than a-b."""
    return re.sub(r"[^\w+\-*/^=<>|%]+|_+", " ", text.casefold()).strip()


# ------------------------------------------------------------ the stage


@dataclass(frozen=True)
class Settings:
    out: str = flag("folder of the run")
    train: str = flag("NAME:PATH of training problems, comma separated; empty: embedded", "")
    test: str = flag("NAME:PATH of test problems, comma separated", "")
    instruction: str | None = flag(
        "put after each question, empty: nothing; default: by the set's kind of answer", None
    )
    limit: int = flag("use at most this many training problems; 0: all", 0)
    valid_share: float = flag("share of --train held out as valid.jsonl, by hash", 0.1)
    split_seed: int = flag("of that hash", 0)
    make_base: bool = flag("make base/: embedded, or --base fine-tuned on --demos", True)
    base: str = flag("model to fine-tune on --demos", "")
    demos: str = flag("NAME:PATH of demonstrations (gsm8k, asdiv or jsonl)", "")
    lr: float = flag("peak learning rate on --demos", 2e-5)
    passes: int = flag("passes over --demos", 2)
    offload: bool = flag("hold weights, gradients and moments in the host's memory", False)
    task: str = flag("which embedded problems: math or code", "math")
    steps: str = flag("fewest and most steps of the embedded problems", "2-4")
    careless: float = flag("how careless the base reads: as if so many times, once wrong", 1.0)
    wordings: int = flag("ways to word each line of an embedded solution, up to 64", 1)
    clean_size: int = flag("right solutions that the embedded base learns from first", 16000)
    clean_seed: int = flag("of that first training, for benchmarks; -1: --seed", -1)
    clean: str = flag("folder that keeps models so trained, for benchmarks of many runs", "")
    train_size: int = flag("embedded training problems", 2000)
    valid_size: int = flag("embedded validation problems", 300)
    test_size: int = flag("embedded test problems", 500)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the embedded problems and of base training", 0)
    unsafe: bool = flag("run solutions even where they cannot be walled off", False)
    force: bool = flag("throw existing outputs away", False)


def stage(s: Settings):
    if bool(s.train) != bool(s.test) or bool(s.base) != bool(s.demos):
        raise UserError("--train and --test go together, and so do --base and --demos")
    join(s.offload)
    if s.task not in TASKS:
        raise UserError(f"--task {s.task}: wanted {' or '.join(TASKS)}")
    ways = len(BEGINNINGS) * len(ENDINGS) if s.task == "math" else 1
    if s.wordings > ways:
        raise UserError(f"--wordings {s.wordings}: --task {s.task} has up to {ways}")
    steps = steps_of(s)
    folder, task, demos = Path(s.out), TASKS[s.task], load(s.demos, s, DEMOS)
    sizes = {"train": s.train_size, "valid": s.valid_size, "test": s.test_size}
    inputs = {path: path for spec in (s.train, s.test, s.demos) for _, path in parse(spec)}
    outs = {}
    for split in sizes:
        outs[split] = Stage("prepare.py", folder / f"{split}.jsonl", s, inputs)
    if not all(out.complete for out in outs.values()):
        problems = real_problems(s) if s.train else demo_problems(task, s.seed, sizes, steps)
    for split, out in outs.items():
        if not out.complete:
            out.begin()
            out.append(problems[split][len(out.done) :])
            out.finish()
    if s.make_base and (s.demos or not s.train):
        inputs |= {"base": s.base} if s.base else {}
        base = Stage("prepare.py", folder / "base", s, inputs)
        if not base.complete:
            base.begin()
            if s.demos:
                tune_base(base, demos, folder, s)
            else:
                make_base(base, task, s)


def steps_of(s: Settings) -> tuple[int, int]:
    """ "2-4" -> (2, 4)"""
    if not (found := re.fullmatch(r"(\d+)-(\d+)", s.steps)):
        raise UserError(f"--steps {s.steps}: two numbers are wanted, such as 2-4")
    fewest, most = int(found[1]), int(found[2])
    if not 1 <= fewest <= most <= MOST_STEPS:
        raise UserError(f"--steps {s.steps}: wanted 1 to {MOST_STEPS}, the fewest first")
    return fewest, most


def parse(spec: str) -> list[tuple[str, str]]:
    """ "gsm8k:a.jsonl,asdiv:b.jsonl" -> [("gsm8k", "a.jsonl"), ("asdiv", "b.jsonl")]"""
    pairs = [part.partition(":")[::2] for part in spec.split(",") if part]
    if bad := [name for name, path in pairs if not path]:
        raise UserError(f"{bad[0]}: NAME:PATH is wanted, such as gsm8k:train.jsonl")
    return pairs


def load(spec: str, s: Settings, loaders: dict[str, Loader] = LOADERS) -> list[dict]:
    """The records of some sets, with their instruction; says what was read and what left out."""
    records = []
    for name, path in parse(spec):
        used, left_out = load_set(name, path, s.unsafe, loaders)
        print(f"{name} {path}: {len(used) + len(left_out)} rows, {len(used)} used")
        ids = {}  # of the rows left out, by reason
        for row_id, reason in left_out:
            ids.setdefault(reason, []).append(row_id)
        for reason in sorted(ids):
            shown = ", ".join(ids[reason][:5]) + (", ..." if len(ids[reason]) > 5 else "")
            print(f"  left out, {reason}: {len(ids[reason])} ({shown})")
        for r in used:
            instruction = s.instruction
            if instruction is None:
                instruction = INSTRUCTIONS.get(loaders[name].kind)
            if instruction:
                r["prompt"] = f"{r['prompt']}\n{instruction}".strip()
        records += used
    return records


def real_problems(s: Settings) -> dict[str, list[dict]]:
    """Train, validation and test problems of data sets; no test question stays in training."""
    test, pool = load(s.test, s), load(s.train, s)
    for problems, spec in ((test, s.test), (pool, s.train)):
        if twice := [i for i, n in Counter(p["id"] for p in problems).items() if n > 1]:
            raise UserError(f"{spec}: two files give the id {twice[0]}; rename one of them")
    train, valid = [], []
    kept = without(pool, test, s)
    dropped = len(pool) - len(kept)
    print(f"dropped from training, because the question is a test question: {dropped}")
    for p in kept:
        key = f"{s.split_seed} {question(p, s)}"
        share = int(digest(key)[:8], 16) / 2**32
        (valid if share < s.valid_share else train).append(p)
    train = without(train, valid, s)[: s.limit or None]
    if not train:
        raise UserError(f"{s.train}: no training problem is left; see the table above")
    print(f"first prompt:\n{train[0]['prompt']}")
    return {"train": train, "valid": valid, "test": test}


def question(record: dict, s: Settings) -> str:
    """What a prompt asks, whatever the instruction after it."""
    prompt = record["prompt"]
    for instruction in (s.instruction or "", *INSTRUCTIONS.values()):
        prompt = prompt.removesuffix(instruction)
    return normalised_question(prompt)


def without(records: list[dict], others: list[dict], s: Settings) -> list[dict]:
    """The records whose question is none of the others'."""
    known = {question(r, s) for r in others}
    return [r for r in records if question(r, s) not in known]


def tune_base(out: Stage, demos: list[dict], folder: Path, s: Settings):
    """Fine-tune --base on demonstrations of questions that are neither in valid nor in test."""
    held_out = [folder / "valid.jsonl", folder / "test.jsonl"]
    others = [p for path in held_out for p in read_jsonl(path, may_be_empty=True)]
    chosen = without(demos, others, s)
    if not chosen:
        raise UserError(f"{s.demos}: no demonstration is left beside held-out questions; add some")
    print(f"{len(chosen)} demonstrations; {len(demos) - len(chosen)} are of held-out questions")
    require_memory(s.base, DEMO_PACK, s.offload)
    lm = LM(s.base, train=True, dtype=s.dtype)
    shard(lm, offload=s.offload)
    trees = [demo_tree(lm, d) for d in chosen]
    out.start()
    fine_tune(lm, trees, out.work, s.lr, batch=32, passes=s.passes, seed=s.seed, prompt_weight=0.0)
    out.finish(lm.save)


def make_base(out: Stage, task: Task, s: Settings):
    """The embedded base: clean solutions first, then a short while misread ones."""
    out.start()
    lm = clean_model(out.work, task, s)
    misread = demonstrations(task, s.seed, 3000, s.careless, steps_of(s), s.wordings)
    trees = [demo_tree(lm, d) for d in misread]
    fine_tune(lm, trees, out.work / "misread", 6e-4, 16, passes=1, seed=s.seed, prompt_weight=0.2)
    out.finish(lm.save)


def clean_model(work: Path, task: Task, s: Settings) -> LM:
    """A model that solves the embedded problems; --clean keeps it, since it takes the most time."""
    seed = s.seed if s.clean_seed == -1 else s.clean_seed
    kept = Path(s.clean) / f"{s.task}-{s.steps}-{s.wordings}-{s.clean_size}-{seed}"
    if s.clean and kept.exists():
        return LM(kept, train=True)
    clean = demonstrations(task, seed, s.clean_size, 0.0, steps_of(s), s.wordings)
    # The misread ones are for their words alone.
    misread = demonstrations(task, seed, 3000, 1.0, steps_of(s), s.wordings)
    tokenizer = build_tokenizer([d[k] for d in clean + misread for k in ("prompt", "response")])
    model, start = new_model(tokenizer, seed), work / "random"
    replace(start, lambda p: (model.save_pretrained(p), tokenizer.save_pretrained(p)))
    lm = LM(start, train=True)
    trees = [demo_tree(lm, d) for d in clean]
    fine_tune(lm, trees, work / "clean", 3e-3, 16, passes=1, seed=seed, prompt_weight=0.2)
    if s.clean:
        replace(kept, lm.save)
    return lm


if __name__ == "__main__":
    main(stage, Settings, __doc__)
