"""sandbox. It knows nothing of the algorithm."""

import ast
import atexit
import hashlib
import inspect
import json
import os
import queue
import re
import select
import sys
import textwrap
import threading
from functools import cache
from subprocess import DEVNULL, PIPE, Popen

from support.cli import UserError
from support.judge import (
    Judge,
    Verdict,
    candidate,
    confine,
    decode,
    encode,
    identity,
    libc,
    printed,
    same,
    same_text,
    sweep,
    wall_off,
    warden,
    zygote,
)

# CPUs that this process may use; only Linux says which.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# What those processes import; beside it math-verify alone, so they start fast and stay small.
IMPORTS = """import atexit, builtins, contextlib, ctypes, json, math, os, re, resource, select
import shutil, signal, socket, sys, tempfile, threading, time, types
"""


class Worker(Popen):
    """A Python process that answers each line of JSON with one: [verdict, values] of a judge,
    [verdict, seconds left] of a math_worker.

    parts: the functions and classes that it consists of; main: code that runs them.
    """

    def __init__(self, flags: str, parts: list, main: str, *args: str, env: dict | None = None):
        source = "\n".join([IMPORTS, *map(inspect.getsource, parts), main])
        options = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "env": env}
        # In a session of its own, because Ctrl-C is for the trainer.
        super().__init__([sys.executable, flags, source, *args], start_new_session=True, **options)

    def ask(self, question: list, seconds: float) -> list:
        """Its answer; ["timed out" or "error", None] from one that is too slow or dead: it is ended."""
        answer, late, poll = None, False, select.poll()
        poll.register(self.stdout, select.POLLIN)
        try:
            self.stdin.write(json.dumps(question).encode() + b"\n")
            self.stdin.flush()
            late = not poll.poll(1000 * seconds)
            answer = None if late else json.loads(self.stdout.readline())
        except (OSError, ValueError):  # it is dead
            pass
        finally:  # also on Ctrl-C, or this answer would be taken for the next question's
            if not answer:
                self.end()
        return answer or ["timed out" if late else "error", None]

    def end(self):
        self.kill()
        self.communicate()


#
#     trainer ---- judge: holds the tests, compares ---- zygote: holds nothing, forks
#                    |                                      |
#                    +------ inputs in, values out ----- candidate: runs the program
TESTS = {  # the fields of a problem's tests, and what holds where one is not given
    "kind": "call",  # or "stdin", or "assert"
    "entry": None,  # the function to test
    "setup": "",  # code that runs before the program, and before `code`
    "inputs": [],  # call: lists of arguments; stdin: texts
    "outputs": [],  # what to return or print
    "code": "",  # assert: calls `entry` and raises if that is wrong
    "atol": 0,  # for floats
    "seconds": 4,  # of CPU time for an input; ten times that for all
    "megabytes": 1024,
}


def extract_program(setup: str, text: str) -> str | None:
    """The program in a response, None if there is none; setup: of the problem's tests."""
    completes = re.search(r"^def \w+\(", setup, re.MULTILINE)  # HumanEval: the prompt, by its body
    # Tokenizers of SentencePiece's kind put a space before a response, which is no indentation.
    if not completes or re.match(r" (import |from |async def |def |class |@)", text):
        text = text.removeprefix(" ")
    defines = re.compile(r"^(async def|def|class) ", re.MULTILINE)
    fence = r"^ *```([^`\n]*)\n(.*?)(?:^ *```|\Z)"  # one left open runs to the end
    blocks, programs = [], []
    for info, block in re.findall(fence, text, re.DOTALL | re.MULTILINE):
        if block.strip():
            blocks.append(textwrap.dedent(block))
            if info.strip().lower().startswith("py") or defines.search(blocks[-1]):
                programs.append(blocks[-1])
    if blocks:  # the last program; what is none may be its output
        return (programs or blocks)[-1]
    if defines.search(text):  # all from the margin on, to a fence that only closes
        first = re.search(r"^(import |from |async def |def |class |@)", text, re.MULTILINE)
        return re.split(r"^ *```", text[first.start() :], maxsplit=1, flags=re.MULTILINE)[0]
    if completes:
        body = re.split(r"^(?=\S)", text, maxsplit=1, flags=re.MULTILINE)[0]
        return f"{setup.rstrip()}\n{body}" if body.strip() else None
    try:
        return text if ast.parse(text).body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


MODES = {  # ways to wall programs off, best first, and what they leave open
    "root": "",
    "user": "",
    "uid": "the network, files that everyone may read, folders that everyone may write to",
    "none": "your files, your processes, the network",
}


# The judge runs in an interpreter of its own, without torch and site-packages.
JUDGE_PARTS = [encode, decode, identity, same, same_text, Verdict, Judge, libc, zygote]


JUDGE_PARTS += [wall_off, warden, sweep, confine, candidate, printed]


JUDGE_MAIN = """
judge = Judge(sys.argv[1])
for line in sys.stdin.buffer:
    print(json.dumps(judge.grade(*json.loads(line))), flush=True)
"""


class Sandbox:
    """A pool of judges.

    workers: programs graded at once; default: the CPUs that this process may use. unsafe: go on
    even where programs cannot be walled off. modes: the MODES to try. UserError if none works.
    """

    def __init__(self, workers=None, unsafe=False, modes=tuple(MODES)):
        self.workers = workers or CPUS
        tests = TESTS | {"entry": "f", "inputs": [[]], "outputs": [1]}
        probe = tests, "import decimal, random\ndef f(): return 1"  # is the library within reach?
        for self.mode in modes:
            judge = self._start()
            if (self.mode != "none" or unsafe) and judge.ask(probe, 240)[0] == "right":
                break
            judge.end()
        else:
            raise UserError("no way to wall programs off here; --unsafe runs them unprotected")
        if MODES[self.mode]:
            print(f"sandbox: programs can get at {MODES[self.mode]}", file=sys.stderr)
        self.known = {}  # (hash of the tests, program): verdict and values
        self._judges = queue.SimpleQueue()
        self._judges.put(judge)
        for _ in range(self.workers - 1):
            self._judges.put(self._start())

    def close(self):
        for _ in range(self.workers):
            self._judges.get().end()

    def run(self, tests: dict, program: str | None) -> tuple[str, list | None]:
        """(verdict, values) of a program, by the next judge that is free; any thread may call it.

        right, wrong, timed out; "no answer": there is no program; "error": it raised, ended or grew
        too large before it had answered. values: if tests["outputs"] is None, what `entry`
        returned, encoded.
        """
        if not program or not program.strip():
            return "no answer", None
        tests = TESTS | tests
        text = json.dumps(tests, sort_keys=True).encode()
        key = hashlib.blake2b(text, digest_size=16).digest(), program
        if found := self.known.get(key):
            return found
        judge = self._judges.get()
        # The judge keeps the limits itself; this one is for test code that chokes on an answer.
        found = judge.ask([tests, program], 60 * tests["seconds"])
        alive = judge.poll() is None
        self._judges.put(judge if alive else self._start())
        if alive or found[0] == "timed out":  # a judge that died may be this machine's fault
            remember(self.known, key, found)
        return found

    def _start(self):
        # -I would ignore the hash seed, without which the order of a set, and with it a verdict,
        # changes from run to run; with this environment and -sS the rest is the same
        env = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
        return Worker("-sSBc", JUDGE_PARTS, JUDGE_MAIN, self.mode, env=env)


REMEMBERED = 1 << 18  # verdicts


def remember(known: dict, key, verdict):
    """Keep a verdict: an answer drawn again, which is usual, costs nothing. If there are too many, all
    are forgotten."""
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = verdict


@cache
def _sandbox(unsafe: bool) -> Sandbox:
    box = Sandbox(unsafe=unsafe)
    atexit.register(box.close)  # no zombie is left where nobody reaps orphans
    return box


_starting = threading.Lock()


def sandbox(unsafe: bool) -> Sandbox:
    """This process's sandbox, started for the first program, by one thread."""
    with _starting:
        return _sandbox(unsafe)
