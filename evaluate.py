r"""Evaluate an actor: accuracy, paired comparison, figures. Also the graders: is this right.

    python evaluate.py --actor runs/demo/iter1/actor --problems runs/demo/test.jsonl \
        --out runs/demo/iter1/eval.jsonl --against runs/demo/iter0/eval.jsonl --samples 8
    python evaluate.py --report runs/demo        # the table and figures of a whole run

Reads:  problems (several sets: comma separated), an actor, and the eval.jsonl of another actor to
compare with.
Writes: eval.jsonl, a line a problem (the greedy response), and summary.json beside it
    {"id": "demo/test/17", "text": "..", "prediction": "18", "correct": true,
     "verdict": "right", "finished": true, "sampled": [{"text": "..", "prediction": "18", "correct": true}]}

Accuracy is zero-shot and greedy; mean@k, pass@k (unbiased) and maj@k come from --samples at
temperature 1. Two actors are compared on the same problems: exact McNemar test, paired bootstrap
interval.

A verdict is one of right, wrong, no answer, timed out, error; only right is reward 1. Rules for
math answers, in order:
1. Equal after `normalise`: right.
2. Two plain numbers are compared as exact fractions; nothing is rounded (0.333 is not 1/3).
3. A unit may be missing on one side (5 cm, 5). Two measures that differ are wrong (5 cm, 5 km), and
   none is converted (45 cents, $0.45). A thing counted is no measure: 9 apples are 9 fruits.
4. Beside a percentage a number up to 1 is a share (50%, 0.5); above 1 it lost its sign (50%, 50).
5. Bases, times, ratios and words are right by rule 1 only: 2516_8 is neither 2516_7 nor 2516.
6. (1,2) and [1,2) are ordered, \{1,2\} and a bare 1,2 are not; kinds and lengths must agree.
7. What is left math-verify decides, part by part, with every decimal written as a fraction.
"""

import inspect
import json
import math
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import numpy as np
import torch

from model import (
    LM,
    Prefixes,
    Tree,
    UserError,
    draw_key,
    flag,
    load_critic,
    pack_trees,
    replace,
    sample,
    step_values,
)

# ------------------------------------------------------------ grading math answers

MAX_ANSWER = 1000  # characters; a longer answer must be the gold answer's very text
UNITS = """millimeter mm, centimeter cm, meter m, kilometer km, inch inche in, foot ft feet,
yard yd, mile mi, gram g gm, kilogram kg, pound lb, ounce oz, liter l, milliliter ml, second s sec,
minute min, hour h hr, day, week, month, year yr, cent, dollar usd, euro, degree, radian, percent,
acre, gigabyte gb, am, pm, th st nd rd, ^2 square sq, ^3 cubic cu, / per"""
UNITS = {word: unit.split()[0] for unit in UNITS.split(",") for word in unit.split()}
# Words that change the number before them.
NO_UNIT = "hundred|thousand|.illion|dozen|halves|thirds|squared|cubed|factorial|mod|sin|cos|tan|log"
# What may stand before a value: x=, f(x)=, (x,y)= or x\in
NAME = r"(?:[A-Za-z](?:\([a-z]\))?|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-z]) ?)(?!.*[=<>])"
# Of rule 5; a hyphen within a word is no minus, and math-verify would read on after "answer" only.
LITERAL = (
    r"-?\d[\dA-Z.]*_\w+|(?:[A-Za-z' .]|(?<=[a-z]{2})-(?=[a-z]{2}))+|.*(?:\d:\d|\d \d|(?i:answer)).*"
)
TEXT = r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{"
REWRITES = [
    (r"(?<!\\)\\[()\[\]]|\\(?:displaystyle|left|right)(?![a-zA-Z])|^\s*(?:=|\\approx)", ""),
    (r"^(-?)\$(?=[\d.,]+$)", r"\1\\$"),  # "$18" is money, "$18$" is math
    (r"(?<!\\)\$", ""),
    (r"(?:\{,\}|,\s*\\!\s*|(?<=\d)\\,)(?=\d{3})|\\!", ""),  # 10{,}000, 10,\!000 and 10\,000
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])", " "),
    (rf",?\s*(?:{TEXT}[\s,]*(?:and|or)\s*\}}|\b(?:and|or)\b)\s*,?|;", ","),
    (r"(?<=\d) +\( *([A-Za-z][A-Za-z' /.-]*)\)$", r"\\text{\1}"),  # ASDiv's "9 (apples)"
    (rf"{TEXT}([^{{}}]*)\}}", lambda m: f" {UNITS.get(m[1].strip(), m[1])} "),
    (r"^(-?)\s*\\\$\s*(.*)", r"\1\2 dollar"),
    (r"\\?%", " percent "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " degree "),
    (r"(?i)\s*\b([ap])\.?m\b\.?", r" \1m"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\\[a-zA-Z]+|[^\s{\\])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*(\\[a-zA-Z]+|[^\s{\\])", r"\1{\2}"),
    (r"\\sqrt\s*([^\s{\[\\])", r"\\sqrt{\1}"),
    (r"\\times|\*", r"\\cdot "),
    (r"(\d)[eE]([+-]?\d+)(?!\w)", r"\1\\cdot 10^{\2}"),
    (r"\bnp\.", r"\\"),  # Minerva's np.arcsin(10/13)
    (r"_\{(\w+)\}", r"_\1"),
    (r"^-?\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    (r"\s+", " "),
    (r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])|[.,]+$", ""),
    (r"^\(([A-Z])\)$", r"\1"),
    (r"^[A-Za-z' .-]{2,}$", lambda m: m[0].casefold()),
]


def extract_answer(text: str) -> str | None:
    r"""What the last \boxed or \fbox holds; without a box what follows the last ####; else the last
    "answer is" or "answer:", to the end of its sentence. A last box left unclosed is no answer."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if boxes:
        text = text[boxes[-1].end() :]
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", text) if text.startswith("{") else ():
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return text[1 : brace.start()].strip() or None
        bare = re.match(r"[^\s{}$]*", text)[0]  # \boxed 5
        return bare.rstrip(".,") or None
    for marker in (r"(?<!#)####(?!#)[^\S\n]*", r"(?i)\banswer(?:\s+is\b|\s*:)[\s:*]*"):
        *before, answer = re.split(marker, text)
        sentence = re.split(r"\n|(?<!Mrs)(?<!Mr)(?<!Dr)\.\s+(?=[A-Z])", answer)[0].strip(" \t\r*")
        if before and sentence.rstrip(".*"):
            return sentence.rstrip(".*")
    return None


def normalise(answer: str) -> str:
    """One spelling for what is written in several ways and means the same; it is still LaTeX."""
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer.strip(), flags=re.DOTALL)
    return answer


def exact_number(answer: str) -> Fraction | None:
    r"""Value of an integer, a decimal, a/b, a mixed number or 4.5 \times 10^{33}; else None."""
    answer = re.sub(r"^([+-]?)(?=10\^)", r"\g<1>1\\cdot ", normalise(answer))
    answer = re.sub(r"\\cdot 10\^(?:\{([+-]?\d{1,4})\}|(\d))$", r"e\1\2", answer)
    answer = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}$", r" \1/\2", answer)
    decimal = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
    match = re.fullmatch(rf"([+-]?) ?(?:(\d+) (?=.*/))?(-?{decimal})(?:/({decimal}))?", answer)
    if not match or len(answer) > MAX_ANSWER or not Fraction(match[4] or 1):
        return None
    value = int(match[2] or 0) + Fraction(match[3]) / Fraction(match[4] or 1)
    return -value if match[1] == "-" else value


def split_unit(answer: str) -> tuple[str, set[str]]:
    """'5 cm^2' -> ('5', {'centimeter', '^2'}); a thing counted measures nothing."""
    unit = r"[A-Za-z](?:[A-Za-z' ./-]|\\cdot ?|\^\{?-?\d\}?)+"
    match = re.fullmatch(r"(.*(?:[\d})]|\\pi)) ?(" + unit + ")", answer)
    if not match or re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", match[1]):
        return answer, set()
    words = re.findall(r"[a-z][a-z'-]*|\^\d|/", match[2].lower())
    measures = [UNITS.get(word) or UNITS.get(word.rstrip("s")) for word in words]
    if not measures[0] and (len(max(words, key=len)) < 3 or re.fullmatch(NO_UNIT, words[0])):
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
    parts = [answer[i + 1 : j] for i, j in pairwise(cuts)]
    return "", [p for part in parts for p in sorted({part.replace(r"\pm", s) for s in "+-"})]


def math_worker() -> None:
    """Reads [gold, answer], writes a verdict, a line each. This source is all its process knows."""
    import json
    import resource
    import signal
    import sys

    # Unhandled, SIGALRM ends the process even inside C code: no orphan outlives the trainer.
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    rules = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)]
    print("ready", flush=True)
    signal.alarm(0)
    for line in sys.stdin:
        signal.alarm(10)
        gold, answer = (
            parse(f"${side}$", latex, "no_fallback", "first_match", parsing_timeout=None)
            for side in json.loads(line)
        )
        # 30 digits: with the default of 15, 10^{-20} \sqrt{2} is 0.
        right = gold and answer and verify(gold, answer, 6, 30, True, True, None)
        print("right" if right else "wrong", flush=True)
        signal.alarm(0)


class MathVerifier:
    """math-verify in one process with 1 GB of memory: used for many answers, killed when one takes
    too long, then started again. The process imports neither torch nor this module."""

    def __init__(self, limit_s: float = 5.0):
        version("math-verify")  # missing: say so here, not in the first verdict
        self.limit_s = self.left_s = limit_s  # for one answer; a restart adds about a second
        self.lock = threading.Lock()
        self.worker = None

    def check(self, gold: str, answer: str) -> str:
        """Verdict on two LaTeX scalars. `grade_math` holds the lock and has set `left_s`."""
        if self.left_s <= 0:
            return "timed out"
        if not self.worker or self.worker.poll() is not None:
            self.close()
            code = inspect.getsource(math_worker) + "math_worker()"
            pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True}
            # In a session of its own, because Ctrl-C is for the trainer.
            worker = Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
            worker.stdout.readline()  # "ready"; starting is not the answer's time
            self.worker = worker
        exact = [re.sub(r"(\d*)\.(\d+)", as_fraction, side) for side in (gold, answer)]
        began, reply = time.monotonic(), ""
        timer = threading.Timer(self.left_s, self.worker.kill)
        timer.start()
        try:
            print(json.dumps(exact), file=self.worker.stdin, flush=True)
            reply = self.worker.stdout.readline().strip()
        finally:  # also on Ctrl-C, or this reply would answer the next question
            timer.cancel()
            self.left_s -= time.monotonic() - began
            if not reply or self.left_s <= 0:
                self.close()
        return reply or ("timed out" if self.left_s <= 0 else "error")

    def close(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


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
            verdict = compare(part, candidate, verifier)
            if verdict == "right":
                rest.remove(candidate)
                break
        if verdict != "right":
            return verdict
    return "right"


def grade_math(gold: str, text: str, verifier: MathVerifier) -> tuple[str, str | None]:
    """-> (verdict, the answer as extracted). Never raises; any thread may call it."""
    prediction = extract_answer(text)
    if prediction is None:
        return "no answer", None
    if prediction == gold:  # most answers end here or, as two integers, below: no worker, no regex
        return "right", prediction
    if re.fullmatch(r"-?\d+", gold) and re.fullmatch(r"-?\d+", prediction):
        return "right" if int(gold) == int(prediction) else "wrong", prediction
    if max(len(gold), len(prediction)) > MAX_ANSWER:
        return "right" if gold.strip() == prediction else "wrong", prediction
    with verifier.lock:
        verifier.left_s = verifier.limit_s
        try:
            return compare(normalise(gold), normalise(prediction), verifier), prediction
        except OSError:  # the worker cannot be started
            return "error", prediction


# ------------------------------------------------------------ grading

_math = MathVerifier()


def grade_all(problems: list[dict], texts: list[str]) -> list[tuple[str, str | None]]:
    """(verdict, prediction) of each response to its problem; identical texts are graded once."""
    seen = {}
    for problem, text in zip(problems, texts):
        if (problem["id"], text) not in seen:
            seen[problem["id"], text] = grade_math(problem["answer"], text, _math)
    return [seen[problem["id"], text] for problem, text in zip(problems, texts)]


# ------------------------------------------------------------ statistics


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. 8 of 10 -> (0.490, 0.943)"""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), (middle + half) / (1 + z * z / n)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test. 8 gained, 1 lost -> 2 * (1 + 9) / 2^9 = 0.039"""
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * float(Fraction(tail, 2**n)))


def bootstrap(difference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (n,), 10,000 resamples of problems."""
    rng = np.random.default_rng(0)
    means = [
        difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(10_000)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def pass_at(k: int, n: int, right: int) -> float:
    """Unbiased chance that one of k draws is right, from n draws with `right` right ones."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def summarise(lines: list[dict], other: dict[str, dict] | None) -> dict:
    """The figures of one test set; `other`: another actor's lines by id, to compare with."""
    n, right = len(lines), sum(x["correct"] for x in lines)
    verdicts = Counter(x["verdict"] for x in lines)
    row = {
        "n": n,
        "accuracy": right / n,
        "interval": wilson(right, n),
        "cut_off": sum(not x["finished"] for x in lines) / n,
        "unparsed": verdicts["no answer"] / n,
        "verdicts": dict(verdicts),
    }
    if k := len(lines[0]["sampled"]):
        wins = [sum(s["correct"] for s in x["sampled"]) for x in lines]
        majority = [
            Counter(s["prediction"] for s in x["sampled"] if s["prediction"]).most_common(1)
            for x in lines
        ]
        voted = sum(
            any(s["correct"] for s in x["sampled"] if best and s["prediction"] == best[0][0])
            for x, best in zip(lines, majority)
        )
        row |= {"k": k, "sampled": sum(wins) / (n * k), "maj": voted / n}
        row |= {
            f"pass@{j}": sum(pass_at(j, k, w) for w in wins) / n
            for j in (1 << i for i in range(1, k.bit_length()))
        }
        if "by_critic" in lines[0]:
            row["best_of_k_by_critic"] = sum(x["by_critic"] for x in lines) / n
    if other:
        row["against"] = {
            "greedy": paired(
                [x["correct"] for x in lines], [other[x["id"]]["correct"] for x in lines]
            ),
        }
        if k and len(other[lines[0]["id"]]["sampled"]) == k:
            mean = lambda x: sum(s["correct"] for s in x["sampled"]) / k
            difference = np.array([mean(x) - mean(other[x["id"]]) for x in lines])
            row["against"]["sampled"] = {
                "difference": float(difference.mean()),
                "interval": bootstrap(difference),
            }
    return row


def paired(new: list[bool], old: list[bool]) -> dict:
    difference = np.array(new, float) - np.array(old, float)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return {
        "difference": float(difference.mean()),
        "interval": bootstrap(difference),
        "gained": gained,
        "lost": lost,
        "p": mcnemar(gained, lost),
    }


# ------------------------------------------------------------ the stage


@dataclass(frozen=True)
class Settings:
    actor: str = flag("Hugging Face folder or hub id to evaluate", "")
    problems: str = flag("problem files, comma separated", "")
    out: str = flag("eval.jsonl to write; summary.json goes beside it", "")
    against: str = flag("eval.jsonl of another actor on the same problems", "")
    samples: int = flag("responses a problem at temperature 1, beside the greedy one", 0)
    critic: str = flag("critic that picks the best of --samples (with the actor's tokenizer)", "")
    max_new: int = flag("length limit of a response in tokens", 2048)
    batch: int = flag("rows decoded at once", 256)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the samples", 0)
    report: str = flag("a run folder: print its table and draw its figures, nothing else", "")
    force: bool = flag("throw an existing output away", False)


def stage(s: Settings):
    from prepare import (
        Stage,
        actor_facts,
        misfit,
        read_jsonl,
    )  # which imports this file for its graders

    if s.report:
        return report(Path(s.report))
    if not (s.actor and s.problems and s.out):
        raise UserError("evaluate.py: give --actor, --problems and --out, or --report; see --help")
    paths = s.problems.split(",")
    problems = [p for path in paths for p in read_jsonl(path, ("id", "prompt", "answer"))]
    if len({p["id"] for p in problems}) < len(problems):
        raise UserError(f"{s.problems}: some problem is in two of these files")
    other = {x["id"]: x for x in read_jsonl(s.against)} if s.against else None
    shape = {"correct": bool, "sampled": [{"correct": bool}]}
    if bad := next((i for i, x in (other or {}).items() if misfit(x, shape)), None):
        raise UserError(
            f"{s.against}: {bad}: no line of evaluate.py; pass another actor's eval.jsonl"
        )
    if other and (lacks := next((p["id"] for p in problems if p["id"] not in other), None)):
        raise UserError(
            f"{s.against}: problem {lacks} is not there; compare actors on the same problems"
        )
    inputs = {"actor": s.actor, **{f"problems{i or ''}": p for i, p in enumerate(paths)}}
    inputs |= {"critic": s.critic} if s.critic else {}
    out = Stage(s.out, s, inputs)
    if not out.complete:
        lm = LM(s.actor, dtype=s.dtype)
        critic = load_critic(s.critic, dtype=s.dtype) if s.critic and s.samples else None
        out.begin(actor_facts(lm, s.max_new))
        done = {x["id"] for x in out.done}
        todo = [p for p in problems if p["id"] not in done]
        for i in range(0, len(todo), 64):
            chunk = todo[i : i + 64]
            prefixes = Prefixes(
                lm, [Tree([lm.prompt_ids(p["prompt"])], [-1], [True]) for p in chunk]
            )
            greedy = sample(
                lm, prefixes, [(j, 0, 0, s.max_new) for j in range(len(chunk))], 0.0, s.batch
            )
            rows = [
                (j, 0, draw_key(s.seed, "evaluate", p["id"], k), s.max_new)
                for j, p in enumerate(chunk) for k in range(s.samples)
            ]  # fmt: skip
            drawn = sample(lm, prefixes, rows, 1.0, s.batch)
            ids = [[g, *drawn[j * s.samples : (j + 1) * s.samples]] for j, g in enumerate(greedy)]
            lines = [line(lm, p, responses) for p, responses in zip(chunk, ids)]
            if critic:
                for x, best in zip(lines, best_by_critic(lm, *critic, chunk, ids)):
                    x["by_critic"] = x["sampled"][best]["correct"]
            out.append(lines)
        out.finish()
    lines = {x["id"]: x for x in read_jsonl(s.out)}
    sets = {}
    for p in problems:
        sets.setdefault(str(p.get("source")), []).append(lines[p["id"]])
    if len(sets) > 1:
        sets["pooled"] = list(lines.values())
    summary = {
        "sets": {name: summarise(rows, other) for name, rows in sets.items()},
        "against": s.against,
    }
    replace(
        out.out.with_name("summary.json"), lambda p: p.write_text(json.dumps(summary, indent=1))
    )
    for name, row in summary["sets"].items():
        low, high = row["interval"]
        sampled = f", T=1 {row['sampled']:.1%}" if s.samples else ""
        print(f"{name}: greedy {row['accuracy']:.1%} [{low:.1%}, {high:.1%}]{sampled}, n {row['n']}, "
              f"cut off {row['cut_off']:.1%}, unparsed {row['unparsed']:.1%}")  # fmt: skip


def line(lm, problem: dict, responses: list[list[int]]) -> dict:
    """The record of one problem; a response that was cut off is not right, whatever it says."""
    texts = [lm.text(ids) for ids in responses]
    finished = [bool(ids) and ids[-1] in lm.eos for ids in responses]
    grades = grade_all([problem] * len(texts), texts)
    correct = [f and verdict == "right" for f, (verdict, _) in zip(finished, grades)]
    sampled = [
        {"text": t, "prediction": g[1], "correct": c} for t, g, c in zip(texts, grades, correct)
    ][1:]
    return {
        "id": problem["id"], "text": texts[0], "prediction": grades[0][1], "correct": correct[0],
        "verdict": grades[0][0], "finished": finished[0], "sampled": sampled,
    }  # fmt: skip


@torch.no_grad()
def best_by_critic(
    lm: LM, critic: LM, head, problems: list[dict], responses: list[list[list[int]]]
) -> list[int]:
    """The sampled response of each problem with the highest V before its last step."""
    trees = []
    for problem, (_, *sampled) in zip(problems, responses):
        before = [ids[: ([0, *lm.step_ends(ids)])[-2]] for ids in sampled]
        kids = [b or [lm.eos[0]] for b in before]
        trees.append(
            Tree(
                [lm.prompt_ids(problem["prompt"]), *kids],
                [-1] + [0] * len(kids),
                [False] + [True] * len(kids),
            )
        )
    value = [np.zeros(len(sampled) - 1) for sampled in responses]
    for pack in pack_trees(trees, 8192):
        for (t, v), x in zip(pack.owner, step_values(critic, head, pack).tolist()):
            value[t][v - 1] = x
    return [int(v.argmax()) for v in value]


# ------------------------------------------------------------ the report of a run


def report(run: Path):
    """Print the table over iterations and draw report.png and solution.png from the run's files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folders = sorted(run.glob("iter*/summary.json"), key=lambda p: int(p.parent.name[4:]))
    if not folders:
        raise UserError(f"{run}: no iter*/summary.json; run the stages first (bash run.sh)")
    rows = []
    for path in folders:
        name, row = list(json.loads(path.read_text())["sets"].items())[-1]
        rows.append((path.parent.name, row))
    print(
        f"{'':8}{'greedy':>8} {'95 % interval':>16} {'T=1':>8} {'p vs base':>10} {'T=1 gain':>9} {'95 % interval':>18}"
    )
    for name, row in rows:
        against = row.get("against", {})
        p = f"{against['greedy']['p']:10.2g}" if against else f"{'':10}"
        gain = against.get("sampled")
        gain = (
            f"{gain['difference']:+9.1%}    [{gain['interval'][0]:+.1%}, {gain['interval'][1]:+.1%}]"
            if gain
            else ""
        )
        low, high = row["interval"]
        sampled = f"{row['sampled']:.1%}" if "sampled" in row else ""
        print(f"{name:8}{row['accuracy']:8.1%}   [{low:.1%}, {high:.1%}] {sampled:>8} {p} {gain}")

    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    x = range(len(rows))
    accuracy = [row["accuracy"] for _, row in rows]
    bars = np.abs(np.array([row["interval"] for _, row in rows]).T - accuracy)
    axes[0, 0].errorbar(x, accuracy, bars, marker="o", capsize=4, label="greedy")
    axes[0, 0].plot(
        x, [row.get("sampled", math.nan) for _, row in rows], marker="s", label="temperature 1"
    )
    axes[0, 0].set(
        title="accuracy on the test problems",
        xticks=list(x),
        xticklabels=[n for n, _ in rows],
        ylim=(0, 1),
    )
    axes[0, 1].plot([0, 1], [0, 1], "k:", lw=1)
    axes[0, 1].set(
        title="critic on held-out states", xlabel="V(s)", ylabel="success rate of the completions"
    )
    axes[1, 0].set(title="advantages of the pairs", xlabel="A(s, a)", ylabel="pairs", yscale="log")
    axes[1, 1].set(
        title="mean log-ratio while the actor trains", xlabel="step", ylabel="log pi / pi_ref"
    )
    for (name, _), color in zip(rows[1:], plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9):
        folder = run / name
        if (critic := folder / "critic.metrics.json").exists():
            bins = [b for b in json.loads(critic.read_text())["bins"] if b["states"]]
            axes[0, 1].plot(
                [b["value"] for b in bins],
                [b["mc"] for b in bins],
                marker="o",
                color=color,
                label=name,
            )
        if (table := folder / "advantages.jsonl").exists():
            states = [state for text in table.open() for state in json.loads(text)["states"]]
            adv = [a["adv"] for state in states for a in state["actions"]]
            axes[1, 0].hist(adv, bins=41, range=(-1, 1), histtype="step", color=color, label=name)
        if (log := folder / "actor.work" / "metrics.jsonl").exists():
            steps = [json.loads(text) for text in log.open()]
            for kind, style in (("up", "-"), ("down", "--")):
                ratio = [m[f"ratio_{kind}"] / max(1, m[f"pairs_{kind}"]) for m in steps]
                label = f"{name}, A {'>' if kind == 'up' else '<='} 0"
                axes[1, 1].plot(ratio, style, color=color, lw=1, label=label)
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(run / "report.png", dpi=110)
    print(run / "report.png")
    if (run / "iter1" / "advantages.jsonl").exists():
        draw_solution(run, plt)


def draw_solution(run: Path, plt):
    """A path of iteration 1, each step coloured by its advantage: the one with the widest spread."""
    trees = {r["id"]: r for r in map(json.loads, (run / "iter1" / "trees.jsonl").open())}
    best = (0.0, None, None)
    for text in (run / "iter1" / "advantages.jsonl").open():
        line = json.loads(text)
        nodes = trees[line["id"]]["nodes"]
        adv = {a["node"]: a["adv"] for state in line["states"] for a in state["actions"]}
        for leaf in adv:
            path, v = [], leaf
            while v:
                path.insert(0, (nodes[v]["text"].strip(), adv.get(v)))
                v = nodes[v]["parent"]
            known = [a for _, a in path if a is not None]
            spread = max(known) - min(known)
            if len(known) > 2 and spread > best[0]:
                best = (spread, nodes[0]["text"], path)
    if best[2] is None:
        return
    prompt, path = best[1].strip().splitlines(), best[2]
    figure, axis = plt.subplots(figsize=(7, 0.32 * (len(prompt) + len(path) + 1)))
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(len(prompt) + len(path) + 1, 0))
    for y, text in enumerate(prompt):
        axis.text(0, y + 0.5, text, family="monospace", color="0.35")
    for y, (text, adv) in enumerate(path, len(prompt) + 1):
        color = plt.get_cmap("RdYlGn")(0.5 + (adv or 0.0) / 2)
        axis.text(
            0,
            y + 0.5,
            text,
            family="monospace",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 2},
        )
        axis.text(
            1, y + 0.5, "" if adv is None else f"A = {adv:+.2f}", family="monospace", ha="right"
        )
    figure.savefig(run / "solution.png", dpi=110, bbox_inches="tight")
    print(run / "solution.png")


if __name__ == "__main__":
    from prepare import main

    main(stage, Settings, __doc__)
