"""math_answers. It knows nothing of the algorithm."""

import inspect
import json
import queue
import re
import resource
import signal
import sys
from fractions import Fraction
from importlib.metadata import version
from itertools import accumulate, pairwise

from support.sandbox import CPUS, Worker, remember

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
            source = "import json, resource, signal, sys\n" + inspect.getsource(math_worker)
            worker = Worker("-c", f"{source}\nmath_worker()")
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


def grade_answer(gold: str, text: str) -> tuple[str, str | None]:
    """`grade_math` by a verifier that no other thread is using."""
    verifier = _verifiers.get()
    try:
        return grade_math(gold, text, verifier)
    finally:
        _verifiers.put(verifier)
