r"""math_answers: is the answer in a response the gold answer? It knows nothing of the algorithm.

A verdict is one of right, wrong, no answer, timed out, error. A wrong answer accepted is worse than a
right one refused: it is what a policy learns to exploit.

The answer is what the last box of the response holds; boxes joined by a comma, "and" or "or" are one
list. Rules, in order:

1. Equal after `normalise`: right. It rewrites what is written in several ways and means the same, by
   the tables of spelling.py, one per kind of thing.
2. The letter of a choice may have its text behind it: (D) 12 is D.
3. What stands before "=" is left out where it is a name (x = 5, P(A) = 1/3), unless the other side
   names something else. In a chain of values, 5! = 120, each must be right.
4. A unit may be missing on one side (5 cm, 5). Two measures that differ are wrong (5 cm, 5 km), and
   none is converted (45 cents, $0.45). A thing counted is no measure: 9 apples are 9 fruits. Letters
   without \text around them are variables, if the other side has no unit: 5 A is no current.
5. Two plain numbers are compared as exact fractions; nothing is rounded (0.333 is not 1/3). Beside a
   percentage a number up to 1 is a share (50%, 0.5); above 1 it lost its sign (50%, 50).
6. Bases, times, ratios and words are right by rule 1 only: 2516_8 is neither 2516_7 nor 2516.
7. (1,2) and [1,2) are ordered, \{1,2\} and a bare 1,2 are not; kinds and lengths must agree. Where
   parts have labels (m = 2, n = 3; 5 apples and 3 pears) each is compared with its namesake. "a or b"
   is one value if a equals b.
8. What is left algebra.py decides, part by part, exactly: expressions, equations, sets, matrices.
"""

import os
import queue
import re
import signal
from fractions import Fraction
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path

from support import units
from support.sandbox import CPUS, Worker, remember
from support.spelling import TRIGONOMETRIC, normalise

MAX_ANSWER = 1000  # characters; a longer answer must be the gold answer's very text

# ------------------------------------------------------------ the answer in a response

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
# What may stand between two boxes of one list, once BLANK is blank: "and", and the next one's name.
BLANK = r"[\s$~]+|\\[()\[\],;: ]|\\q?quad(?![a-z])"
BOX_NAME = r"([A-Za-z](?:_\w|\([a-z]\))?)\s*="
JOINED = re.compile(
    rf"\s*(?:,|;|,?\s*(?:\b(and|or)\b|\\(?:text\w*|mbox|mathrm)\s*\{{\s*(and|or)\s*\}}))\s*(?:{BOX_NAME}\s*)?"
)


def extract_answer(text: str) -> str | None:
    r"""What the last \boxed or \fbox holds, or the last few, if a comma, "and" or "or" joins them;
    without a box what follows the last ####, unless that is a heading; else the last "answer is" or
    "answer:", to the end of its sentence. A last box left unclosed is no answer."""
    before, *boxes = BOX.split(text)
    if boxes:
        content, _ = box_content(boxes.pop())
        return content and joined_boxes(content, [before, *boxes])
    says = r"(?i)\banswer(?:\s+is\b|[\s*]*:)[\s:*]*(?:\$\$|\\\[)?\s*"
    for marker in (r"(?<!#)####(?!#)[^\S\n]*(?:(?i:final answer)[\s:*]*)?", says):
        *before, answer = re.split(marker, text)
        if not before:
            continue
        ends = r"\n|(?<!Mrs)(?<!Mr)(?<!Dr)\.\s+(?=[A-Z])|,\s+(?=because\b|since\b|as\b)"
        sentence = re.split(ends, answer, maxsplit=1)[0].strip(" \t\r*").rstrip(".*")
        heading = marker is not says and not re.match(r"[^A-Za-z]*\d|\\", sentence)
        if sentence and not (heading and re.search(says, answer)):
            return sentence
    return None


def box_content(text: str) -> tuple[str | None, str]:
    r"""(What the box holds, what follows it) of a text that follows "\boxed"."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text) if text.startswith("{") else ():
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[1 : brace.start()].strip() or None, text[brace.end() :]
    bare = re.match(r"[^\s{}$]*", text)[0]  # \boxed 5
    return bare.rstrip(".,") or None, text[len(bare) :]


def joined_boxes(content: str, before: list[str]) -> str:
    r"""The last box's content, or the list that it ends. before: the texts up to that box, cut at each
    box. x = \boxed{2} and y = \boxed{3} is "x=2, y=3"."""
    members, names, sign = [content], [], ", "
    while len(before) > 1:
        content, between = box_content(before[-1])
        match = len(between) < 60 and JOINED.fullmatch(re.sub(BLANK, " ", between))
        if not match or not content:
            before = [between]
            break
        before = before[:-1]
        members.insert(0, content)
        names.insert(0, match[3])
        sign = " or " if "or" in match.groups()[:2] else sign
    first = re.search(rf"(?<![A-Za-z\\]){BOX_NAME}\s*$", re.sub(BLANK, " ", before[0][-40:]))
    names.insert(0, first and first[1])
    if len({name for name in names if name}) > 1:
        members = [f"{name}={value}" if name else value for name, value in zip(names, members)]
    return sign.join(dict.fromkeys(members))


# ------------------------------------------------------------ numbers, units, lists

# Words that change the number before them.
NO_UNIT = (
    r"(?:hundred|thousand|.illion|dozen)s?( .*)?|half|(?:half|quarters?) of .*|"
    r"(?:halves|squared|cubed|factorial|mod|sin|cos|tan|log)( .*)?|.*\bbelow zero|"
    r"(?:plus|minus|to the) .*|(?:times|less than|more than) [a-z]( .*)?|tens?|"
    r"(?:thir|four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand)(?:d|th)s?( of .*)?"
)
DEGREE = r"^{\circ}"
UNIT = re.compile(
    r"(.*?(?:[\d})|]|\\pi))( ?)((?:\^\{\\circ\}|[^\W\d_])(?:[^\W\d_]|[⊙' /().-]|\\cdot|\^\{?-?\d+\}?)*)"
)


def exact_number(answer: str) -> Fraction | None:
    r"""Value of an integer, a decimal, a/b, a mixed number or 4.5 \times 10^{33}, in any spelling
    that `normalise` knows; else None."""
    return plain_number(normalise(answer))


def plain_number(answer: str) -> Fraction | None:
    """`exact_number` of what is normalised."""
    answer = re.sub(r"^([+-]?)(?=10\^)", r"\g<1>1\\cdot ", answer)
    answer = re.sub(r"\\cdot 10\^(?:\{([+-]?\d{1,4})\}|(\d))$", r"e\1\2", answer)
    answer = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}$", r" \1/\2", answer)
    decimal = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,4})?"
    match = re.fullmatch(rf"([+-]?) ?(?:(\d+) (?=.*/))?(-?{decimal})(?:/({decimal}))?", answer)
    if not match or len(answer) > MAX_ANSWER or not Fraction(match[4] or 1):
        return None
    value = int(match[2] or 0) + Fraction(match[3]) / Fraction(match[4] or 1)
    return -value if match[1] == "-" else value


def split_unit(answer: str, other: str = "") -> tuple[str, dict[str, int]]:
    r"""'5 cm^2' -> ('5', {'10': -4, 'meter': 2}); what is only counted measures nothing: '9 apples'
    -> ('9', {}). other: the other answer; if it has a unit, letters are one here, too."""
    match = UNIT.fullmatch(answer)
    if not match or re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", match[1]):
        return answer, {}
    if match[3].count("(") != match[3].count(")"):
        return answer, {}
    number, space, phrase = match[1], match[2], match[3].replace(DEGREE, "°")
    if (
        phrase[0] == "°"
        and re.search(TRIGONOMETRIC, number)
        or re.fullmatch(NO_UNIT, phrase.lower())
    ):
        return answer, {}
    # What follows is about the measure, not of it: 9 dollars in total.
    phrase = re.split(r"(?:^|\s)(?:in|on|of|at|for|from|by)\s", phrase)[0]
    words = re.findall(r"[^\W\d_]+", phrase)
    measure = units.measure(phrase)
    if not words or measure and other and split_unit(other)[1]:
        return number, measure
    # Letters without a space, or one by one, are variables: 6xyz, 3s^2, 6 m n. But 25 m^2 is an area.
    named = words[0] in units.PLAIN or units.spell(words[0]) and len(words[0]) > 3
    quotient = "/" in phrase and units.PLAIN.union("mgsh").issuperset(words)
    attached = not space and number[-1].isdigit()
    area = re.fullmatch(r"m\^\{?[23]\}?", phrase)
    product = attached or len(max(words, key=len)) < 3
    if product and not named and not (space and (quotient or area)):
        return answer, {}
    return number, measure


def split_parts(answer: str) -> tuple[str, list[str]]:
    r"""'(1,2]' -> ('(]', ['1', '2']); '1,2', '\{1,2\}' -> ('', ['1', '2']); 'x' -> ('', ['x'])."""
    depth = list(accumulate((c in "([{") - (c in ")]}") for c in answer))
    outer = re.fullmatch(r"(\\\{|\(|\[)(.+?)(\\\}|\)|\])", answer)
    if outer and min(depth[len(outer[1]) - 1 : -1]) > 0:
        kind, parts = split_parts(outer[2])
        plain = kind or outer[1] == r"\{" or (outer[1] == "(" and len(parts) == 1)
        return (kind if plain else outer[1] + outer[3]), parts
    parts = split_outside(",", answer)
    return "", [p for part in parts for p in sorted({part.replace(r"\pm", s) for s in "+-"})]


def split_outside(separator: str, answer: str) -> list[str]:
    """Split at a regular expression, outside of brackets only."""
    depth = [0, *accumulate((c in "([{") - (c in ")]}") for c in answer)]
    cuts = [m.span() for m in re.finditer(separator, answer) if depth[m.start()] == 0]
    edges = [(0, 0), *cuts, (len(answer), len(answer))]
    return [answer[a[1] : b[0]].strip() for a, b in pairwise(edges)]


def labels(parts: list[str]) -> dict[str, str] | None:
    """{'m': '2', 'n': '3'} of m=2, n=3; {'apple': '5', 'pear': '3'} of 5 apples, 3 pears; None if they
    have no labels, or not different ones."""
    found = {}
    for part in parts:
        if match := re.fullmatch(rf"({NAME})=(.*)", part):
            found[match[1]] = match[2]
        elif match := re.fullmatch(r"(-?[\d.]+) ?([a-z][a-z' -]*[a-z])", part):
            found[re.sub("e?s\\b", "", match[2])] = match[1]
    return found if len(found) == len(parts) > 1 else None


# ------------------------------------------------------------ the verdict

# A name: x, f(x), a_5, AB, \theta, \angle ABC, P(A), \Pr[X=2], C(5,2), |S|, area, (x,y).
NAME = (
    r"(?:m?\\angle ?|\\triangle ?)?(?:[A-Za-z]|[A-Z]{2,}|[A-Za-z]{3,}(?: [a-z]+)*|\\(?!frac|sqrt)[A-Za-z]+)"
    r"'*(?:_\w|_\{\w+\})?(?:\^\{-1\})?(?:\([^()]*\)|\[[^\[\]]*\])?|\|[A-Za-z]+\||\([a-z](?:,[a-z])+\)"
)
EQUALS = r"=|\\(?:approx|in|equiv)(?![a-z])"
INEQUALITY = r"[<>]|\\[lgn]e(?![a-z])"
# Of rule 6: a base; words, where a hyphen is no minus; anything with a time, a remainder, a
# closed infinity or a word in it.
LITERAL = (
    r"-?[\dA-F.]*\d[\dA-F.]*_\w+|(?:[A-Za-z' .]|(?<=[a-z]{2})-(?=[a-z]{2}))+|"
    r".*(?:\d:\d|(?<!_)\d \d|\\pmod|\[-\\infty|\\infty\]|(?<![\\A-Za-z{])[A-Za-z]{4}).*"
)
CHOICE = r"\(?([A-J])[).:](?!.*(?<![A-Za-z])[A-J](?![A-Za-z])).*"


def sides(answer: str) -> list[str]:
    """The members of an equation or of a chain: ['5!', '120'] of 5! = 120. What follows an "about
    equal" is none. A list of equations has one, itself, like an inequality."""
    listed = sum("=" in part for part in split_outside(",", answer)) > 1
    if listed or re.search(INEQUALITY, answer):
        return [answer]
    return split_outside(EQUALS, split_outside(r"\\approx(?![a-z])", answer)[0])


def compare(gold: str, answer: str, verifier: "MathVerifier") -> str:
    """Verdict on two normalised answers, by the rules at the top."""
    if gold == answer:
        return "right"
    for letter, text in ((gold, answer), (answer, gold)):
        if re.fullmatch("[A-J]", letter) and (choice := re.fullmatch(CHOICE, text)):
            return "right" if choice[1] == letter else "wrong"
    if len(sides(gold)) > 1 or len(sides(answer)) > 1:
        return compare_equations(gold, answer, verifier)
    (gold, unit), (answer, other) = split_unit(gold, answer), split_unit(answer, gold)
    if not units.agree(unit, other):
        return "wrong"
    x, y = plain_number(gold), plain_number(answer)
    if x is not None and y is not None:
        if ("percent" in unit) != ("percent" in other):
            plain, percent = (y, x) if "percent" in unit else (x, y)
            return "right" if percent == (100 * plain if abs(plain) <= 1 else plain) else "wrong"
        return "right" if x == y else "wrong"
    if gold == answer:
        return "right"
    (kind, ours), (other_kind, theirs) = split_parts(gold), split_parts(answer)
    if (kind, len(ours)) != (other_kind, len(theirs)):
        return "wrong"
    if (ours, theirs) == ([gold], [answer]):
        literal = re.fullmatch(LITERAL, gold) or re.fullmatch(LITERAL, answer)
        return "wrong" if literal else verifier.check(gold, answer)
    return compare_parts(ours, theirs, bool(kind), verifier)


def compare_equations(gold: str, answer: str, verifier: "MathVerifier") -> str:
    """Where one of the two, or both, are an equation or a chain."""
    ours, theirs = sides(gold), sides(answer)
    if len(ours) > 1 and len(theirs) > 1:
        if ours[0] == theirs[0] and re.fullmatch(NAME, ours[0]):
            return compare("=".join(ours[1:]), "=".join(theirs[1:]), verifier)
        return verifier.check("=".join(ours), "=".join(theirs))
    # (m,n) = (2,3) beside m = 2, n = 3
    chain, other = (ours, answer) if len(ours) > 1 else (theirs, gold)
    names, values = (split_parts(side)[1] for side in chain[:2])
    if labels(split_parts(other)[1]) and len(names) == len(values) > 1:
        spread = ",".join(f"{name}={value}" for name, value in zip(names, values))
        return compare(*((spread, other) if chain is ours else (other, spread)), verifier)
    # Names and, in an answer, sums of names have no value: m + n = 3.
    valueless = NAME if chain is ours else rf"{NAME}|(?:\\?[a-z]|[+| -])+"
    members = [side for side in chain if not re.fullmatch(valueless, side)]
    for member in members:
        pair = (member, answer) if chain is ours else (gold, member)
        if (verdict := compare(*pair, verifier)) != "right":
            return verdict
    return "right" if members else "wrong"


def compare_parts(ours: list, theirs: list, ordered: bool, verifier: "MathVerifier") -> str:
    """Two lists of equal length: in order, by label, or in any order."""
    named, other_named = (None, None) if ordered else (labels(ours), labels(theirs))
    if named and other_named:
        if named.keys() != other_named.keys():
            return "wrong"
        theirs = [other_named[name] for name in named]
    elif other_named:
        theirs = list(other_named.values())
    ours = list(named.values()) if named else ours
    ordered = ordered or named or other_named
    for part in ours:
        for candidate in theirs[:1] if ordered else list(theirs):
            if (verdict := compare(part, candidate, verifier)) == "right":
                theirs.remove(candidate)
                break
        else:
            return verdict
    return "right"


def one_of_equals(answer: str, verifier: "MathVerifier") -> str:
    """Normalised; of "a or b", where b says the same as a, only a: 1/2 or 0.5."""
    values = re.split(r",?\s*(?:\\text\s*\{\s*or\s*\}|\bor\b)\s*", answer)
    first, *others = map(normalise, values)
    if all(compare(first, other, verifier) == "right" for other in others):
        return first
    return normalise(answer)


def grade_math(gold: str, text: str, verifier: "MathVerifier") -> tuple[str, str | None]:
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
        gold, answer = (one_of_equals(side, verifier) for side in key)
        verdict = compare(gold, answer, verifier)
    except OSError:  # the worker cannot be started
        return "error", prediction
    if verdict in ("right", "wrong"):  # the others may be this machine's fault
        remember(verifier.known, key, verdict)
    return verdict, prediction


ALGEBRA = Path(__file__).with_name("algebra.py")
# In seconds. The worker's CPU time is limited, which no other load of the machine changes.
A_DAY = 86_400


class MathVerifier:
    """algebra.py in one process with 1 GB of memory: used for many answers, ended when one takes more
    than its CPU time, then started again. One thread uses it at a time."""

    def __init__(self, limit_s: float = 5.0, known: dict | None = None):
        version("math-verify")  # brings the parser; missing: say so here, not in the first verdict
        self.limit_s = self.left_s = limit_s  # of CPU time for one answer
        self.known = {} if known is None else known  # (gold, answer): verdict
        self.worker = None

    def check(self, gold: str, answer: str) -> str:
        """Verdict on two LaTeX expressions. `grade_math` has set `left_s`."""
        if self.left_s <= 0:
            return "timed out"
        if not self.worker or self.worker.poll() is not None:
            worker = Worker(str(ALGEBRA), env=os.environ | {"PYTHONSAFEPATH": "1"})
            worker.stdout.readline()  # "ready"; starting is not the answer's time
            self.worker = worker
        verdict, left = self.worker.ask([gold, answer, self.left_s], A_DAY)
        self.left_s = left or 0  # 0: the process has ended
        return "timed out" if self.worker.returncode == -signal.SIGPROF else verdict

    def close(self):
        if self.worker:
            self.worker.end()


_known = {}
_verifiers = queue.SimpleQueue()  # those that no thread is using
for _ in range(CPUS):
    _verifiers.put(MathVerifier(known=_known))  # a process starts with its first answer


def _after_fork():
    """A fork must not speak to its parent's processes. It is one of several that grade, so one is
    enough for it."""
    global _verifiers
    _verifiers = queue.SimpleQueue()
    _verifiers.put(MathVerifier(known={}))


os.register_at_fork(after_in_child=_after_fork)


def grade_answer(gold: str, text: str, tolerance: float = 0) -> tuple[str, str | None]:
    """`grade_math` by a verifier that no other thread is using. tolerance: how far numbers may be off."""
    verifier = _verifiers.get()
    try:
        verdict, prediction = grade_math(gold, text, verifier)
    finally:
        _verifiers.put(verifier)
    if tolerance and verdict == "wrong" and is_near(gold, prediction, tolerance):
        verdict = "right"
    return verdict, prediction


def is_near(gold: str, answer: str, tolerance: float) -> bool:
    """Are the numbers of two answers, of no different units, at most `tolerance` apart?

    ("3.2", "x = 3.27 cm", 0.1) -> True; lists are compared part by part, the smallest with the smallest
    """
    if len(answer) > MAX_ANSWER:
        return False
    (kind, ours, units), (other_kind, theirs, other_units) = map(numbers_and_units, (gold, answer))
    if kind != other_kind or len(ours) != len(theirs) or None in (*ours, *theirs):
        return False
    if any(unit != other for unit in units for other in other_units):
        return False
    pairs = zip(ours, theirs) if kind else zip(sorted(ours), sorted(theirs))
    return all(abs(a - b) <= Fraction(str(tolerance)) for a, b in pairs)


def numbers_and_units(answer: str) -> tuple[str, list, list]:
    """The kind of brackets around an answer, the numbers of its parts (None: no number), their units."""
    kind, parts = split_parts(normalise(answer))
    values = [re.sub(r"^[^=\d]*(?:=|\\approx)", "", part).strip() for part in parts]
    measures = [split_unit(value) for value in values]
    return kind, [exact_number(number) for number, _ in measures], [u for _, u in measures if u]
