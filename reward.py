r"""What is right: the reward of a response, shared by sampling, labelling and evaluation.

    reward(problem, text) -> float        from 0 (wrong) to 1 (right); replace it for another reward

Read from top to bottom: the reward and how the stages call it; math answers; programs and their
sandbox. A verdict is one of right, wrong, no answer, timed out, error; only "right" is reward 1.

Rules for math answers, in order:
1. Equal after `normalise`: right.
2. Two plain numbers are compared as exact fractions; nothing is rounded (0.333 is not 1/3).
3. A unit may be missing on one side (5 cm, 5). Two measures that differ are wrong (5 cm, 5 km), and
   none is converted (45 cents, $0.45). A thing counted is no measure: 9 apples are 9 fruits.
4. Beside a percentage a number up to 1 is a share (50%, 0.5); above 1 it lost its sign (50%, 50).
5. Bases, times, ratios and words are right by rule 1 only: 2516_8 is neither 2516_7 nor 2516.
6. (1,2) and [1,2) are ordered, \{1,2\} and a bare 1,2 are not; kinds and lengths must agree.
7. What is left math-verify decides, part by part, with every decimal written as a fraction.

A problem with `tests` is a program to write, and all tests must pass. Its tests are of one of three
kinds (further fields and their defaults: `TESTS`):

    {"kind": "call", "entry": "f", "inputs": [[1, 2]], "outputs": [3]}      f(1, 2) returns 3 or 3.0
    {"kind": "stdin", "inputs": ["1 2\n"], "outputs": ["3\n"]}              it prints 3; white space
                                                                            does not count
    {"kind": "assert", "entry": "f", "code": "assert f(1, 2) == 3"}         sees what f returns

In assert tests f takes positional arguments only, and an exception of f ends them.

The sandbox (Linux, standard library). The tests stay in a judge process. A program runs in another,
a candidate, which gets the inputs one by one and returns plain values that the judge compares:
expected values never get there, so nothing printed, patched, raised or forged makes a pass. A
candidate sees no other process, no network and no file but /usr, /lib and Python's own folder, which
it can read; it has no privilege, an empty folder of 64 MB, limits of CPU time, memory, processes and
file size, and whatever it started dies with it. Where namespaces are not to be had (most containers),
root runs it as a user of no rights, who can harm no other process and read no private file, but
reaches the network and public files; the stage says so once. Where that fails too it asks for
--unsafe. What it does not keep out: bugs of the kernel, what timing tells, memory or disk bandwidth
used up. The tests' own code is trusted: in `assert` tests it runs in the judge.
"""

import ast
import atexit
import builtins
import contextlib
import ctypes
import hashlib
import inspect
import json
import math
import os
import queue
import re
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from itertools import accumulate, pairwise
from subprocess import DEVNULL, PIPE, Popen

from model import LM, UserError

# ------------------------------------------------------------ the reward


def reward(problem: dict, text: str, unsafe: bool = False) -> float:
    """How good a response is, from 0 (wrong) to 1 (right). Replace this body for another reward.

    problem is a line of problems.jsonl, text the whole response; one that was cut off by the length
    has reward 0 and is not asked about. The contract: the same arguments give the same number; it
    never raises, never hangs and never runs model text in this process; several threads call it.
    unsafe: run programs even where they cannot be walled off.

    A bonus for a short response, say: return 0.9 * (verdict == "right") + 0.1 * (len(text) < 200)
    """
    verdict, _ = grade(problem, text, unsafe)
    return 1.0 if verdict == "right" else 0.0


def grade(problem: dict, text: str, unsafe: bool = False) -> tuple[str, str | None]:
    """(verdict, prediction or None) of a response; a program is its own prediction."""
    if tests := problem.get("tests"):
        program = extract_program(tests.get("setup", ""), text)
        verdict, _ = sandbox(unsafe).run(tests, program)
        return verdict, program
    verifier = _verifiers.get()
    try:
        return grade_math(problem["answer"], text, verifier)
    finally:
        _verifiers.put(verifier)


def grade_ids(lm: LM, problems: list[dict], responses: list[list[int]], unsafe: bool) -> list[dict]:
    """Text, prediction, verdict and reward of each response; `finished`: it ended by itself.

    Identical responses to a problem are graded once, different ones several at a time.
    """
    keys = []  # of each response: (problem's id, text, did it end by itself)
    tasks = {}  # the different ones, each with its problem: what to grade
    for problem, ids in zip(problems, responses):
        keys.append((problem["id"], lm.text(ids), ids[-1] in lm.eos))
        tasks[keys[-1]] = problem

    def judged(key, problem):
        _, text, finished = key
        judgement = grade(problem, text, unsafe)
        return judgement, reward(problem, text, unsafe) if finished else 0.0

    found = dict(zip(tasks, _graders.map(judged, tasks, tasks.values())))
    graded = []
    for key in keys:
        _, text, finished = key
        (verdict, prediction), value = found[key]
        line = {"text": text, "prediction": prediction, "correct": value >= 0.5}
        line["reward"] = int(value) if value in (0, 1) else value  # 0 and 1 are written as such
        graded.append(line | {"verdict": verdict, "finished": finished})
    return graded


# CPUs that this process may use; only Linux says which.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
REMEMBERED = 1 << 18  # verdicts
_graders, _starting = ThreadPoolExecutor(CPUS), threading.Lock()


def remember(known: dict, key, verdict):
    """Keep a verdict: an answer drawn again, which is usual, costs nothing. If there are too many, all
    are forgotten."""
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = verdict


@cache
def _sandbox(unsafe: bool) -> "Sandbox":
    box = Sandbox(unsafe=unsafe)
    atexit.register(box.close)  # no zombie is left where nobody reaps orphans
    return box


def sandbox(unsafe: bool) -> "Sandbox":
    """This process's sandbox, started for the first program, by one thread."""
    with _starting:
        return _sandbox(unsafe)


# ------------------------------------------------------------ processes that grade


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


# ------------------------------------------------------------ grading math answers

MAX_ANSWER = 1000  # characters; a longer answer must be the gold answer's very text
UNITS = """millimeter mm, centimeter cm, decimeter dm, meter m, kilometer km, micrometer, nanometer nm,
inch inche in, foot ft feet, yard yd, mile mi, angstrom, parsec pc, milligram mg, gram g gm,
kilogram kg, pound lb, ounce oz, ton, liter l, milliliter ml, cup, pint pt, quart qt, gallon gal,
millisecond ms, second s sec, minute min, hour h hr, day, week, month, year yr, cent penny pennie,
nickel, dime, dollar usd, euro, degree, radian, percent, acre, megabyte mb, gigabyte gb, hertz hz,
electronvolt ev, kelvin K, newton N, joule J, watt W, volt V, am, pm, th st nd rd, ^2 square sq,
^3 cubic cu, / per"""
UNITS = {word: unit.split()[0] for unit in UNITS.split(",") for word in unit.split()}
# Words that change the number before them.
NO_UNIT = (
    r"(?:hundred|thousand|.illion|dozen)s?( .*)?|half|(?:half|quarters?) of .*|"
    r"(?:halves|squared|cubed|factorial|mod|sin|cos|tan|log)( .*)?|.*\bbelow zero|"
    r"(?:plus|minus|to the) .*|(?:times|less than|more than) [a-z]( .*)?|tens?|"
    r"(?:thir|four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand)(?:d|th)s?( of .*)?"
)
# What may stand before a value: x=, f(x)=, (x,y)= or x\in
NAME = r"(?:[A-Za-z](?:\([a-z]\))?|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-z]) ?)(?!.*[=<>])"
# Of rule 5; a hyphen within a word is no minus, and math-verify would read on after "answer" only.
LITERAL = r"-?[\dA-F.]*\d[\dA-F.]*_\w+|(?:[A-Za-z' .]|(?<=[a-z]{2})-(?=[a-z]{2}))+|.*(?:\d:\d|(?<!_)\d \d|(?i:answer)).*"
HUNDREDS = r"[1-9]\d\d(?!\d)"
TEXT = r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{"
# What `normalise` rewrites, in this order: (pattern, replacement). tests/test_math_grader.py has a
# before and an after for each row.
REWRITES = [
    # Delimiters of mathematics, sizes of brackets, a leading equals sign.
    (r"(?<!\\)\\[()\[\]]|\\(?:displaystyle|left|right)(?![a-zA-Z])|^\s*(?:=|\\approx)", ""),
    # Dollars: "$18" is money and is marked so, "$18$" is mathematics.
    (r"^(-?)\$(?=[\d.,]+$)", r"\1\\$"),
    (r"(?<!\\)\$\s*,\s*\$", ", "),
    (r"(?<!\\)\$", ""),
    # Thin spaces and braces between thousands: 10{,}000, 10,\!000 and 10\,000.
    (r"(?:\{,\}|,\s*\\!\s*|(?<=\d)\\,)(?=\d{3})|\\!", ""),
    # Spacing commands.
    (r"(?<!\\)\\(?:[,;: ]|$)|~|\\q?quad(?![a-z])", " "),
    # Lists: "and", "or" and semicolons are commas; a space after them says: none between thousands.
    (rf",?\s*(?:{TEXT}[\s,]*(?:and|or)\s*\}}|\b(?:and|or)\b)\s*,?|;|,\s+(?={HUNDREDS})", ", "),
    # Text and units: ASDiv's "9 (apples)", \text{cm}; money, percent and degrees are units too.
    (r"(?<=\d) +\( *([A-Za-z][A-Za-z' /.-]*)\)$", r"\\text{\1}"),
    (rf"{TEXT}([^{{}}]*)\}}", lambda m: f" {UNITS.get(m[1].strip(), m[1])} "),
    (r"^(-?)\s*\\\$\s*(.*)", r"\1\2 dollar"),
    (r"\\?%", " percent "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " degree "),
    (r"(?i)\s*\b([ap])\.?m\b\.?", r" \1m"),
    (r"\\AA(?![a-zA-Z])|Å", " angstrom"),
    (r"\\mu\s*(?=meter)", " micro"),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"(?<=[\d}])\s*mph\b", " miles per hour"),
    (r"(?<=[\d}])\s*km?ph\b", " kilometers per hour"),
    # Fractions and roots get their braces.
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\\[a-zA-Z]+|[^\s{\\])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*(\\[a-zA-Z]+|[^\s{\\])", r"\1{\2}"),
    (r"\\sqrt\s*([^\s{\[\\])", r"\\sqrt{\1}"),
    # Products and powers of ten.
    (r"\\times|\*", r"\\cdot "),
    (r"(\d)[eE]([+-]?\d+)(?!\w)", r"\1\\cdot 10^{\2}"),
    # Minerva's np.arcsin(10/13); the base of a number.
    (r"\bnp\.", r"\\"),
    (r"\b([\dA-F]*\d[\dA-F]*) ?_\{(\w+)\}", r"\1_\2"),
    # Commas between thousands.
    (r"^-?\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    # White space where nothing needs it, and what ends a sentence.
    (r"\s+", " "),
    (rf"(?<![A-Za-z0-9,]) |(?<=,) (?!{HUNDREDS})| (?![A-Za-z0-9])|[.,]+$", ""),
    # The letter of a choice; words in any case.
    (r"^\(([A-Z])\)$", r"\1"),
    (r"^[A-Za-z' .-]{2,}$", lambda m: m[0].casefold()),
]


def extract_answer(text: str) -> str | None:
    r"""What the last \boxed or \fbox holds; without a box what follows the last ####, unless that is a
    heading; else the last "answer is" or "answer:", to the end of its sentence. A last box left
    unclosed is no answer."""
    *before, box = re.split(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text)
    if before:
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", box) if box.startswith("{") else ():
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return box[1 : brace.start()].strip() or None
        bare = re.match(r"[^\s{}$]*", box)[0]  # \boxed 5
        return bare.rstrip(".,") or None
    says = r"(?i)\banswer(?:\s+is\b|[\s*]*:)[\s:*]*(?:\$\$|\\\[)?\s*"
    for marker in (r"(?<!#)####(?!#)[^\S\n]*(?:(?i:final answer)[\s:*]*)?", says):
        *before, answer = re.split(marker, text)
        ends = r"\n|(?<!Mrs)(?<!Mr)(?<!Dr)\.\s+(?=[A-Z])|,\s+(?=because\b|since\b|as\b)"
        sentence = re.split(ends, answer)[0].strip(" \t\r*").rstrip(".*")
        heading = marker is not says and not re.match(r"[^A-Za-z]*\d|\\", sentence)
        if before and sentence and not (heading and re.search(says, answer)):
            return sentence
    return None


def normalise(answer: str) -> str:
    """One spelling for what is written in several ways and means the same; it is still LaTeX."""
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer.strip(), flags=re.DOTALL)
    return answer


def exact_number(answer: str) -> Fraction | None:
    r"""Value of an integer, a decimal, a/b, a mixed number or 4.5 \times 10^{33}, in any spelling
    that `normalise` knows; else None."""
    answer = re.sub(r"^([+-]?)(?=10\^)", r"\g<1>1\\cdot ", normalise(answer))
    answer = re.sub(r"\\cdot 10\^(?:\{([+-]?\d{1,4})\}|(\d))$", r"e\1\2", answer)
    answer = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}$", r" \1/\2", answer)
    decimal = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,4})?"
    match = re.fullmatch(rf"([+-]?) ?(?:(\d+) (?=.*/))?(-?{decimal})(?:/({decimal}))?", answer)
    if not match or len(answer) > MAX_ANSWER or not Fraction(match[4] or 1):
        return None
    value = int(match[2] or 0) + Fraction(match[3]) / Fraction(match[4] or 1)
    return -value if match[1] == "-" else value


def split_unit(answer: str) -> tuple[str, set[str]]:
    """'5 cm^2' -> ('5', {'centimeter', '^2'}); a thing counted measures nothing. 'AB=5 cm' is 5 cm."""
    unit = r"[A-Za-z](?:[A-Za-z' ./-]|\\cdot|\^\{?-?\d\}?)+"
    match = re.fullmatch(r"(?:[^=]*=)?(.*(?:[\d})]|\\pi))( ?)(" + unit + ")", answer)
    if not match or re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", match[1]):
        return answer, set()
    phrase = re.sub(r"[{}]", "", match[3]).lower()
    if re.fullmatch(NO_UNIT, phrase):
        return answer, set()
    # What follows is about the measure, not of it: 9 dollars in total.
    phrase = re.split(r"(?:^|\s)(?:in|on|of|at|for|from|by)\s", phrase)[0]
    words = re.findall(r"[a-z][a-z'-]*|\^-?\d|/", phrase)
    if not words:
        return match[1], set()
    measures = []
    for word in words:
        measures.append(UNITS.get(word) or UNITS.get(word.rstrip("s") if len(word) > 2 else word))
    # Letters without a space, or one by one, are variables: 6xyz, 3s^2, 6 m n. But 25 m^2 is an area.
    attached = not match[2] and match[1][-1].isdigit()
    product = attached or len(max(words, key=len)) < 3
    letters = all(len(word) == 1 or word[0] == "^" for word in words) and "/" not in words
    area = match[2] and re.fullmatch(r"m\^[23]", phrase)
    if (product and not measures[0]) or (letters and not area):
        return answer, set()
    return match[1], set(measures) - {None}


def split_parts(answer: str) -> tuple[str, list[str]]:
    r"""'(1,2]' -> ('(]', ['1', '2']); '1,2', '\{1,2\}' -> ('', ['1', '2']); 'x' -> ('', ['x'])."""
    depth = list(accumulate((c in "([{") - (c in ")]}") for c in answer))
    outer = re.fullmatch(r"(\\\{|\(|\[)(.+?)(\\\}|\)|\])", answer)
    if outer and min(depth[len(outer[1]) - 1 : -1]) > 0:
        kind, parts = split_parts(outer[2])
        plain = kind or outer[1] == r"\{" or (outer[1] == "(" and len(parts) == 1)
        return (kind if plain else outer[1] + outer[3]), parts
    cuts = [-1, *(i for i, c in enumerate(answer) if c == "," and depth[i] == 0), len(answer)]
    parts = [answer[i + 1 : j].strip() for i, j in pairwise(cuts)]
    return "", [p for part in parts for p in sorted({part.replace(r"\pm", s) for s in "+-"})]


def math_worker() -> None:
    """Reads [gold, answer, seconds of CPU time], writes [verdict, seconds left]."""
    # Unhandled, SIGALRM and SIGPROF end the process even inside C code: no orphan is left.
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    rules = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)]
    print("ready", flush=True)
    signal.alarm(0)
    for line in sys.stdin:
        signal.alarm(60)
        *texts, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        sides = []
        for side in texts:
            options = (latex, "no_fallback", "first_match")
            sides.append(parse(f"${side}$", *options, parsing_timeout=None))
        gold, answer = sides
        # 30 digits: with the default of 15, 10^{-20} \sqrt{2} is 0.
        right = gold and answer and verify(gold, answer, 6, 30, True, True, None)
        left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(["right" if right else "wrong", left]), flush=True)
        signal.alarm(0)


class MathVerifier:
    """math-verify in one process with 1 GB of memory: used for many answers, killed when one takes
    too long, then started again. The process imports neither torch nor this module. One thread uses
    it at a time."""

    def __init__(self, limit_s: float = 5.0, known: dict | None = None):
        version("math-verify")  # missing: say so here, not in the first verdict
        self.limit_s = self.left_s = limit_s  # of CPU time for one answer; ten times that in all
        self.known = {} if known is None else known  # (gold, answer): verdict
        self.worker = None

    def check(self, gold: str, answer: str) -> str:
        """Verdict on two LaTeX scalars. `grade_math` has set `left_s`."""
        if self.left_s <= 0:
            return "timed out"
        if not self.worker or self.worker.poll() is not None:
            worker = Worker("-c", [math_worker], "math_worker()")
            worker.stdout.readline()  # "ready"; starting is not the answer's time
            self.worker = worker
        exact = [re.sub(r"(\d*)\.(\d+)", as_fraction, side) for side in (gold, answer)]
        # i is an index beside "_", else the imaginary unit, of which math-verify makes two symbols.
        i = r"(?<![a-zA-Z\\])i(?![a-zA-Z])"
        exact = [side if "_" in side else re.sub(i, " I ", side) for side in exact]
        verdict, left = self.worker.ask([*exact, self.left_s], 10 * self.left_s)
        self.left_s = left or 0  # 0: the process has ended
        return "timed out" if self.worker.returncode == -signal.SIGPROF else verdict

    def close(self):
        if self.worker:
            self.worker.end()


def as_fraction(decimal: re.Match) -> str:
    """0.25 -> {\\frac{025}{100}}, because math-verify rounds decimals to 6 places."""
    return rf"{{\frac{{{decimal[1]}{decimal[2]}}}{{{10 ** len(decimal[2])}}}}}"


def compare(gold: str, answer: str, verifier: MathVerifier) -> str:
    """Verdict on two normalised answers, by the rules at the top."""
    names = {match[0] for match in (re.match(NAME, gold), re.match(NAME, answer)) if match}
    if len(names) == 1:
        gold, answer = re.sub(NAME, "", gold), re.sub(NAME, "", answer)
    (gold, unit), (answer, answer_unit) = split_unit(gold), split_unit(answer)
    if unit and answer_unit and unit != answer_unit:
        return "wrong"
    x, y = exact_number(gold), exact_number(answer)
    if x is not None and y is not None:
        if "percent" in unit ^ answer_unit:
            plain, percent = (y, x) if "percent" in unit else (x, y)
            return "right" if percent == (100 * plain if abs(plain) <= 1 else plain) else "wrong"
        return "right" if x == y else "wrong"
    if gold == answer:
        return "right"
    literal = re.fullmatch(LITERAL, gold) or re.fullmatch(LITERAL, answer)
    if literal or gold.casefold() == answer.casefold():  # to math-verify A and a are one symbol
        return "wrong"
    (kind, parts), (answer_kind, rest) = split_parts(gold), split_parts(answer)
    if (kind, len(parts)) != (answer_kind, len(rest)):
        inequality = re.search(r"[<>]|\\[lg]e", gold + answer)  # x > 1 may be (1, oo)
        return verifier.check(gold, answer) if inequality else "wrong"
    if (parts, rest) == ([gold], [answer]):
        return verifier.check(gold, answer)
    for part in parts:
        for candidate in rest[:1] if kind else list(rest):
            if (verdict := compare(part, candidate, verifier)) == "right":
                rest.remove(candidate)
                break
        else:
            return verdict
    return "right"


def grade_math(gold: str, text: str, verifier: MathVerifier) -> tuple[str, str | None]:
    """-> (verdict, the answer as extracted). Never raises."""
    prediction = extract_answer(text)
    if prediction is None:
        return "no answer", None
    if prediction in (gold, gold.strip()):  # most answers end here or, as two integers, below
        return "right", prediction
    if max(len(gold), len(prediction)) > MAX_ANSWER:
        return "wrong", prediction
    if re.fullmatch(r"-?\d+", gold) and re.fullmatch(r"-?\d+", prediction):
        return "right" if int(gold) == int(prediction) else "wrong", prediction
    key = gold, prediction
    if verdict := verifier.known.get(key):
        return verdict, prediction
    verifier.left_s = verifier.limit_s
    try:
        verdict = compare(normalise(gold), normalise(prediction), verifier)
    except OSError:  # the worker cannot be started
        return "error", prediction
    if verdict in ("right", "wrong"):  # the others may be this machine's fault
        remember(verifier.known, key, verdict)
    return verdict, prediction


_known = {}
_verifiers = queue.SimpleQueue()  # those that no thread is using
for _ in range(CPUS):
    _verifiers.put(MathVerifier(known=_known))  # a process starts with its first answer


# ------------------------------------------------------------ grading programs
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
    if re.search(r"^def \w+\(", setup, re.MULTILINE):  # HumanEval: the prompt, to be completed
        body = re.split(r"^(?=\S)", text, maxsplit=1, flags=re.MULTILINE)[0]
        return f"{setup.rstrip()}\n{body}" if body.strip() else None
    try:
        return text if ast.parse(text).body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def encode(value):
    """A plain value as JSON; what JSON lacks has a "!": (1, 2) is {"!tuple": [1, 2]}.

    An object of another type, or of an int's subclass, is a TypeError: no foreign code gets across.
    """
    kind = type(value)
    if kind in (bool, str, type(None)):
        return value
    if kind is re.Match:
        return True  # programs return it for a truth value
    if kind is int and abs(value) < 2**63 or kind is float and math.isfinite(value):
        return value
    if kind in (int, float, complex, bytes):
        return {f"!{kind.__name__}": {int: hex, bytes: bytes.hex}.get(kind, repr)(value)}
    if isinstance(value, dict):  # or a Counter: every benchmark takes it for a dict
        return {"!dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if kind in (list, tuple, set, frozenset):
        items = [encode(item) for item in value]
        return items if kind is list else {f"!{kind.__name__}": items}
    raise TypeError(f"{kind.__name__} is not a plain value")


def decode(value):
    """The inverse of encode; also takes JSON's own objects, if no key begins with "!"."""
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    if not any(key.startswith("!") for key in value):
        return {key: decode(item) for key, item in value.items()}
    ((kind, body),) = value.items()
    makers = {"!int": lambda text: int(text, 16), "!bytes": bytes.fromhex, "!float": float}
    makers |= {"!complex": complex, "!tuple": tuple, "!set": set, "!frozenset": frozenset}
    return (makers | {"!dict": dict})[kind](decode(body))


def identity(value):
    """Of an element or key: what is equal exactly where `same` finds it so."""
    kind = type(value)
    if kind in (int, float, complex):  # a NaN is equal to nothing, its repr is
        return "number", repr(value) if "nan" in repr(value) else value
    if kind in (tuple, frozenset):
        return kind, kind(identity(item) for item in value)
    return kind, value


def same(want, got, atol):
    """Equal values of equal types all through; but 2 equals 2.0, as in every benchmark."""
    if {type(want), type(got)} <= {int, float, complex}:  # so no bool
        if want == got or repr(want) == repr(got):  # repr for NaN
            return True
        return atol > 0 and abs(want - got) <= atol + 1e-7 * abs(want) < math.inf
    if type(want) is not type(got):
        return False
    if type(want) in (list, tuple):
        return len(want) == len(got) and all(same(w, g, atol) for w, g in zip(want, got))
    if type(want) in (set, frozenset):  # == would take {True} for {1}
        return {identity(w) for w in want} == {identity(g) for g in got}
    if type(want) is dict:
        ours = {identity(key): item for key, item in want.items()}
        theirs = {identity(key): item for key, item in got.items()}
        if ours.keys() != theirs.keys():
            return False
        return all(same(item, theirs[key], atol) for key, item in ours.items())
    return want == got


def same_text(want, got, atol):
    """The same words on the same lines; space around words and empty lines do not count."""

    def words(text):
        found = []
        for row in text.split("\n"):
            found += [*row.split(), "\n"] if row.strip() else []
        return found

    want, got = words(want), words(got)
    try:
        equal = (w == g or "." in w and same(float(w), float(g), atol) for w, g in zip(want, got))
        return len(want) == len(got) and all(equal)
    except ValueError:  # a word that is no number
        return False


class Verdict(BaseException):
    """Ends the grading of a program; not an Exception, for test code may catch those."""


class Judge:
    """Grades programs. It holds the tests; its zygote is forked before they come."""

    def __init__(self, mode):
        self.walled = mode in ("root", "user")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            self.control.close()
            zygote(theirs, mode)
        theirs.close()
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a program may return a lot

    def grade(self, tests, program):
        """-> verdict, and what was returned if tests["outputs"] is None."""
        self.tests, self.values, self.verdict = tests, [], "right"
        self.task = {key: tests[key] for key in ("kind", "entry", "setup")} | {"program": program}
        self.begin, self.spent, self.idle = time.monotonic(), 0, 0
        with contextlib.suppress(Verdict):
            given, wanted = tests["inputs"], tests["outputs"]
            if tests["kind"] == "assert":
                given, wanted = tests["code"], None
            if not given or (wanted is not None and len(given) != len(wanted)):
                self.stop("error")  # without a test there is no pass
            getattr(self, f"run_{tests['kind']}")()
        return self.verdict, self.values

    def stop(self, verdict):
        self.verdict = verdict  # kept, should test code with a bare except catch this
        raise Verdict

    def run_stdin(self):
        """A candidate for each input; what it prints is its answer."""
        for text, want in zip(self.tests["inputs"], self.tests["outputs"], strict=True):
            with self.candidate():
                got = self.ask(self.task | {"stdin": text})
            if type(got) is not str or not same_text(want, got, self.tests["atol"]):
                self.stop("wrong")

    def run_call(self):
        """One candidate answers all. A wanted {"!json": v} is met by all that JSON writes as v."""
        with self.candidate():
            self.ask(self.task)
            for number, args in enumerate(self.tests["inputs"]):
                got = self.ask(args)
                if self.tests["outputs"] is None:
                    self.values.append(encode(got))
                    continue
                want = self.tests["outputs"][number]
                try:
                    if type(want) is dict and "!json" in want:
                        want, got = want["!json"], json.loads(json.dumps(got))
                    if not same(decode(want), got, self.tests["atol"]):
                        self.stop("wrong")
                except (TypeError, ValueError, OverflowError):
                    self.stop("wrong")  # nothing for JSON, or numbers beyond a float

    def run_assert(self):
        """The test code runs here; the function it calls is a proxy and returns plain values."""
        names = {key: decode(self.tests[key]) for key in ("inputs", "outputs")}
        proxy = {self.tests["entry"]: lambda *args: self.ask([encode(arg) for arg in args])}
        with self.candidate():
            self.ask(self.task)
            try:
                exec(self.tests["setup"], names)  # noqa: S102
                exec(self.tests["code"], names | proxy)  # noqa: S102
            except Exception:  # noqa: BLE001  an assertion, or an unfit value
                self.stop("wrong")

    @contextlib.contextmanager
    def candidate(self):
        """Has a candidate started, and at the end killed with all that it started."""
        self.data, theirs = socket.socketpair()
        limits = [self.tests["seconds"], self.tests["megabytes"]]
        socket.send_fds(self.control, [json.dumps(limits).encode()], [theirs.fileno()])
        theirs.close()
        self.cpu = 0
        self.pid, (self.proc,), _, _ = socket.recv_fds(self.data, 9, 1)  # of its own /proc
        try:
            yield
        finally:
            self.spent += self.cpu
            self.control.send(b"kill")
            self.control.recv(9)
            self.data.close()
            os.close(self.proc)

    def ask(self, question):
        """Sends a line and decodes the line that answers it."""
        unsent, answer = memoryview(json.dumps(question).encode() + b"\n"), bytearray()
        before, checked = self.cpu, time.monotonic()
        while not answer.endswith(b"\n"):
            reads, writes, _ = select.select([0, self.data], [self.data][: len(unsent)], [], 0.05)
            if 0 in reads:
                os._exit(1)  # the trainer is gone
            try:
                if writes:
                    unsent = unsent[self.data.send(unsent, socket.MSG_DONTWAIT) :]
                chunk = self.data.recv(1 << 20) if self.data in reads else None
            except ConnectionError:
                chunk = b""
            answer += chunk or b""
            if chunk == b"" or len(answer) > 16 << 20:
                self.stop("error")  # it has ended, or does not
            if chunk is None or time.monotonic() - checked > 0.05 or answer.endswith(b"\n"):
                checked = self.check(before, checked)
        try:
            return decode(json.loads(answer))
        except (KeyError, TypeError, ValueError, RecursionError, MemoryError):
            self.stop("wrong")  # no plain value, or a forged line

    def check(self, before, checked):
        """Stops a candidate that uses too much; -> the time."""
        ticks = pages = running = 0
        for pid in os.listdir(self.proc) if self.walled else [self.pid.decode()]:
            with contextlib.suppress(OSError):  # it ends while we look
                if pid.isdigit():
                    with open(os.open(f"{pid}/stat", os.O_RDONLY, dir_fd=self.proc), "rb") as file:
                        stat = file.read().rpartition(b")")[2].split()  # proc(5), from field 3 on
                    running |= stat[0] in b"RD"
                    ticks += sum(map(int, stat[11:15]))
                    pages += int(stat[21])
        now, last, self.cpu = time.monotonic(), self.cpu, ticks / os.sysconf("SC_CLK_TCK")
        if not running and self.cpu == last:
            self.idle += now - checked
        if pages * resource.getpagesize() > self.tests["megabytes"] << 20:
            self.stop("error")
        # CPU and idle time: a busy machine changes no verdict. The wall clock is the backstop.
        total, wall = self.spent + self.cpu, now - self.begin
        if max(self.cpu - before, self.idle, total / 10, wall / 40) > self.tests["seconds"]:
            self.stop("timed out")
        return now


def libc(name, *args):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)


def zygote(control, mode):
    """Builds the walls once, then forks a warden for each candidate, until the judge is gone."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if mode in ("root", "uid") and os.getuid() != 0:
        os._exit(1)  # only root becomes somebody else
    if mode in ("root", "user"):
        wall_off(mode == "user")
    uid = 2_000_000_000 + os.getpid() if mode in ("root", "uid") else None  # nobody else's
    while True:
        limits, fds, _, _ = socket.recv_fds(control, 99, 1)
        if not limits:
            os._exit(0)
        if os.fork() == 0:
            warden(control, mode in ("root", "user"), uid, json.loads(limits), fds[0])
        os.close(fds[0])
        os.wait()


def wall_off(as_user):
    """Own network, own mounts; of the files only libraries and Python are left, to be read."""
    uid, gid = os.getuid(), os.getgid()
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    if as_user:
        libc("unshare", 0x10000000)  # CLONE_NEWUSER
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    libc("unshare", 0x40020000)  # CLONE_NEWNET | CLONE_NEWNS
    libc("mount", None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: no mount shows outside
    root = "/sys"  # any directory will do to mount on
    libc("mount", b"tmpfs", root.encode(), b"tmpfs", 0, b"size=1m,mode=755")
    for path in ("/proc", "/box"):
        os.mkdir(root + path)
    for path in filter(os.path.isdir, ("/usr", "/lib", "/lib64", sys.base_prefix)):
        target = (root + path).encode()
        os.makedirs(target, exist_ok=True)
        libc("mount", path.encode(), target, None, 0x5000, None)  # MS_BIND | MS_REC
        kept = os.statvfs(path).f_flag & 0xC0E  # nosuid, nodev, ...: a user may not lift them
        libc("mount", None, target, None, 0x1023 | kept, None)  # remount: read-only, nosuid
    libc("mount", None, root.encode(), None, 0x1023, None)
    os.chroot(root)  # from where, besides, nobody can make a user namespace
    os.chdir("/")


def warden(control, walled, uid, limits, data):
    """Forks a candidate, waits for the judge's word, and leaves no process of it behind."""
    box = "/box"
    if walled:
        libc("unshare", 0x20000000)  # CLONE_NEWPID: its first process, our child, takes all along
    else:
        libc("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become our children
        box = tempfile.mkdtemp()
        os.chown(box, uid or -1, -1)
    pid = os.fork()
    if pid == 0:
        confine(walled, uid, *limits, box, data)
        candidate()
    os.close(data)
    control.recv(9)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if not walled:
        sweep(uid)
        shutil.rmtree(box, ignore_errors=True)
    control.send(b"gone")
    os._exit(0)


def sweep(uid):
    """Kills what is left: all processes of a uid at a stroke; without one, children one by one."""
    if uid and os.fork() == 0:
        os.setresuid(uid, uid, uid)
        os.kill(-1, signal.SIGKILL)
        os._exit(0)
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        while children := file.read().split():
            for child in map(int, children):
                os.kill(child, 0 if uid else signal.SIGKILL)
                os.waitpid(child, 0)
            file.seek(0)


def confine(walled, uid, seconds, megabytes, box, data):
    """Takes from a candidate what it must not have, before it reads the program."""
    os.setsid()
    os.dup2(data, 3)
    os.closerange(4, 1024)
    if walled:
        libc("unshare", 0x08020000)  # CLONE_NEWIPC | CLONE_NEWNS
        libc("mount", b"proc", b"/proc", b"proc", 0, None)
        libc("mount", b"tmpfs", b"/box", b"tmpfs", 0, b"size=64m,nr_inodes=4k,mode=777")
    os.chdir(box)
    limits = {"CPU": 10 * math.ceil(seconds) + 1, "AS": megabytes << 20, "FSIZE": 32 << 20}
    limits |= {"NPROC": 64 if walled or uid else 4096, "NOFILE": 64, "STACK": 64 << 20, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # no capability
    libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def candidate():
    """Runs the program and sends what it prints, or what its function returns for each question."""
    data = socket.socket(fileno=3)
    socket.send_fds(data, [b"%d" % os.getpid()], [os.open("/proc", os.O_RDONLY)])
    lines = data.makefile("rb")
    task = json.loads(lines.readline())
    sys.argv = ["program.py"]
    builtins.exit = builtins.quit = sys.exit  # by site, which we do without
    name = "__main__" if task["kind"] == "stdin" else "program"
    module = sys.modules[name] = types.ModuleType(name)

    def load():
        for part in ("setup", "program"):
            code = compile(task[part], f"{part}.py", "exec", dont_inherit=True)
            exec(code, vars(module))  # noqa: S102

    def send(value):
        try:
            line = json.dumps(encode(value))
        except (TypeError, RecursionError):
            line = '{"!other": 0}'  # which decode refuses
        data.sendall(line.encode() + b"\n")

    try:
        if task["kind"] == "stdin":
            return send(printed(load, task["stdin"]))  # by way of finally
        load()
        value = None
        while True:
            send(value)
            args = decode(json.loads(lines.readline()))
            solution = getattr(module, "Solution", None)  # LeetCode's
            owner = solution() if hasattr(solution, task["entry"]) else module
            value = getattr(owner, task["entry"])(*args)
    finally:
        os._exit(1)


def printed(program, stdin):
    """What a program prints that runs to its end: its threads and its atexit functions, too."""
    out = os.memfd_create("out")
    os.dup2(out, 1)
    os.dup2(os.memfd_create("in"), 0)
    os.pwrite(0, stdin.encode(), 0)
    try:
        program()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    threading._shutdown()  # joins the threads that are no daemons
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(ValueError):  # it may be closed
            file.flush()
    return os.pread(out, os.fstat(out).st_size, 0).decode(errors="replace")


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
