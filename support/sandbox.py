"""Runs programs that a model wrote, walled off, and says whether they pass their tests. It knows nothing
of the algorithm.

    trainer ---- judge: holds the tests, compares ---- zygote: holds nothing, forks
                   |                                      |
                   +------ inputs in, values out ----- candidate: runs the program

The tests stay in a judge process (judge.py, an interpreter without torch and site-packages). A
program runs in another, a candidate, which gets the inputs one by one and returns plain values that
the judge compares: expected values never get there, so nothing printed, patched, raised or forged
makes a pass. A candidate sees no other process, no network and no file but /usr, /lib and Python's own
folder, which it can read; it has no privilege, an empty folder of 64 MB, limits of CPU time,
memory, processes and file size, and whatever it started dies with it. Where namespaces are not to
be had (most containers), root runs it as a user of no rights, who can harm no other process and
read no private file, but reaches the network and public files; the stage says so once. Where that
fails too it asks for --unsafe. What it does not keep out: bugs of the kernel, what timing tells,
memory or disk bandwidth used up. The tests' own code is trusted: in `assert` tests it runs in the
judge. Linux, standard library.
"""

import atexit
import hashlib
import json
import os
import queue
import select
import sys
import threading
from functools import cache
from subprocess import DEVNULL, PIPE, Popen

import support.judge  # started as a file; imported so that manifests name it among the code
from support.cli import UserError

# CPUs that this process may use; only Linux says which.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Worker(Popen):
    """A Python process that answers each line of JSON with one: [verdict, ...].

    words: of its command line, behind the interpreter's name. env: its environment, by default ours.
    """

    def __init__(self, *words: str, env: dict | None = None):
        pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL}
        # In a session of its own, because Ctrl-C is for the trainer.
        super().__init__([sys.executable, *words], start_new_session=True, env=env, **pipes)

    def ask(self, question: list, seconds: float) -> list:
        """Its answer; ["timed out" or "error", None] from one that is too slow or dead: it is ended."""
        answer, late, poll = None, False, select.poll()
        poll.register(self.stdout, select.POLLIN)
        try:
            self.stdin.write(json.dumps(question).encode() + b"\n")
            self.stdin.flush()
            late = not poll.poll(min(1000 * seconds, 2**31 - 1))  # the most that it takes
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


MODES = {  # ways to wall programs off, best first, and what they leave open
    "root": "",
    "user": "",
    "uid": "the network, files that everyone may read, folders that everyone may write to",
    "none": "your files, your processes, the network",
}


class Sandbox:
    """A pool of judges.

    workers: programs graded at once; default: the CPUs that this process may use. unsafe: go on
    even where programs cannot be walled off. modes: the MODES to try. UserError if none works.
    """

    def __init__(self, workers=None, unsafe=False, modes=tuple(MODES)):
        self.workers = workers or CPUS
        tests = TESTS | {"entry": "f", "inputs": [[]], "outputs": [1]}
        probe = tests, "import cmath, csv\ndef f(): return 1", False  # is the library within reach?
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

    def run(self, tests: dict, program: str | None, each=False) -> tuple[str, list | None]:
        """(verdict, values) of a program, by the next judge that is free; any thread may call it.

        right, wrong, timed out; "no answer": there is no program; "error": it raised, ended or grew
        too large before it had answered. values: with `each`, which goes on after a test that
        failed, whether each test passed; else what `entry` returned, encoded, if
        tests["outputs"] is None. None if there was nothing to run.
        """
        if not program or not program.strip():
            return "no answer", None
        tests = TESTS | tests
        text = json.dumps(tests, sort_keys=True).encode()
        key = hashlib.blake2b(text, digest_size=16).digest(), program, each
        if found := self.known.get(key):
            return found
        judge = self._judges.get()
        try:
            if judge.poll() is not None:  # it died of an earlier program
                judge = self._start()
            # The judge keeps the limits itself; this one is for test code that chokes on an answer.
            found = judge.ask([tests, program, each], 60 * tests["seconds"] + 60)
        finally:
            self._judges.put(judge)
        # A judge that died may be this machine's fault.
        if judge.poll() is None or found[0] == "timed out":
            remember(self.known, key, found)
        return found

    def _start(self):
        # -I would ignore the hash seed, without which the order of a set, and with it a verdict,
        # changes from run to run. With this environment and -sS the rest is the same; the safe path
        # keeps the modules beside judge.py from being taken for the standard library's.
        env = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
        env |= {"TMPDIR": os.environ["TMPDIR"]} if "TMPDIR" in os.environ else {}
        return Worker("-sSB", support.judge.__file__, self.mode, env=env)


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


def _after_fork():
    """A fork has none of its parent's threads, and its parent's judges are not its own. It is one of
    several that grade, so it grades one response at a time."""
    global CPUS, _starting
    CPUS, _starting = 1, threading.Lock()
    _sandbox.cache_clear()


os.register_at_fork(after_in_child=_after_fork)


def sandbox(unsafe: bool) -> Sandbox:
    """This process's sandbox, started for the first program, by one thread."""
    with _starting:
        return _sandbox(unsafe)
