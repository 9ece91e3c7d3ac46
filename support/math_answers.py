r"""math_answers: is the answer in a response the gold answer? It knows nothing of the algorithm.

A verdict is one of right, wrong, no answer, timed out, error. A wrong answer accepted is worse than a
right one refused: it is what a policy learns to exploit.

The answer is what the last box of the response holds; boxes joined by a comma, "and" or "or" are one
list. Rules, in order:

1. Equal after `normalise`: right. It rewrites what is written in several ways and means the same, by
   the tables below, one table per kind of thing.
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
import unicodedata
from fractions import Fraction
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path

from support import units
from support.sandbox import CPUS, Worker, remember

MAX_ANSWER = 1000  # characters; a longer answer must be the gold answer's very text

# ------------------------------------------------------------ one spelling for what means the same
#
# Each rule is (pattern, replacement, before, after): before and after are an example, which the tests
# try. The rules of a table are applied from top to bottom, the tables in the order in which they stand.

BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # a group in braces, two more deep
TEXT = r"\\(?:text\w*|[mh]box|math(?:rm|bf|sf|it|tt|normal)|boldsymbol|bm|pmb|emph|operatorname)\s*"
HAT = r"\\hat\s*\{?\s*(?:\\math(?:bf|rm)\s*\{)?\s*\\?([ijk])(?:math)?(?![a-z])\s*\}{0,2}"
ARRAY = r"(?:array\}\s*\{[^{}]*|array|(?:small)?matrix)"
FUNCTIONS = r"(?:a(?:rc)?)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp"
TRIGONOMETRIC = r"\\(?:sin|cos|tan|cot|sec|csc)"
CURRENCY = r"US\s*\\\$|\\\$|Rs\.?|[€£₹¥]"
ABOUT = r"(?:approximately|approx\.?|about|roughly)(?![a-z])"
HUNDREDS = r"[1-9]\d\d(?!\d)"
DIGITS = r"([\dA-F]*\d[\dA-F]*)"
LARGE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
RAYS = {
    "<": [r"(-\infty,{})"], r"\le": [r"(-\infty,{}]"], ">": [r"({},\infty)"], r"\ge": [r"[{},\infty)"],
    r"\ne": [r"(-\infty,{})", r"({},\infty)"],
}  # fmt: skip


def spelled(match: re.Match) -> str:
    r"""Words instead of \text{words}; if they are units behind a number, the names of these."""
    words = match[1]
    behind = re.search(r"(?:[\d})|/]|\\pi|\\cdot)\s*$", match.string[: match.start()])
    symbols = re.findall(r"[^\W\d_]+⊙?", words)
    if (
        behind
        and symbols
        and all(units.spell(s) or s in ("per", "square", "cubic") for s in symbols)
    ):
        words = re.sub(r"[^\W\d_]+⊙?", lambda m: units.spell(m[0]) or m[0], words)
    return f" {words} "


def money(match: re.Match) -> str:
    """An amount with its currency behind it, once: $5 dollars are 5 dollars."""
    sign, symbol, amount, rest = match.groups(default="")
    name = units.spell(symbol.removeprefix("US").strip(" \\."))
    if name in map(units.spell, re.findall("[a-z]+", rest)):
        name = ""
    return f"{sign}{amount} {name} {rest}" if amount else f"{sign}{rest} {name}"


def large(match: re.Match) -> str:
    """2500000 for 2.5 million."""
    value = Fraction(match[1].replace(",", "")) * 10 ** LARGE[match[2]]
    return str(value) if value.denominator == 1 else match[0]


def repeating(match: re.Match) -> str:
    """A fraction for digits of which the last ones, a block, come again for ever."""
    whole, plain, *blocks = match.groups(default="")
    block, before = "".join(blocks), whole + plain
    above = int(before + block) - int(before or "0")
    return rf"\frac{{{above}}}{{{'9' * len(block)}{'0' * len(plain)}}}"


def based(match: re.Match) -> str:
    base = match[2].lower()
    return f"{match[1]}_{BASES.index(base) + 2 if base in BASES else match[2]}"


def intervals(match: re.Match) -> str:
    r"""x\in(1,\infty) for x > 1, a union where there is an "or"; what is not that simple stays."""
    found, names = [], set()
    for part in re.split(r"\bor\b|\\cup", match[0]):
        sides = re.split(r"(<|>|\\[lgn]e(?![a-z]))", part.strip(" ,"))
        sides = [side.strip() for side in sides]
        if sides[-1].isalpha():  # 1 < x is x > 1
            sides = [FLIPPED.get(side, side) for side in reversed(sides)]
        if len(sides) == 3 and sides[0].isalpha():
            name, relation, value = sides
            found += [ray.format(value) for ray in RAYS[relation]]
        elif len(sides) == 5 and sides[2].isalpha():
            if sides[1] in (">", r"\ge"):
                sides = [FLIPPED.get(side, side) for side in reversed(sides)]
            low, first, name, second, high = sides
            if not {first, second} <= {"<", r"\le"}:
                return match[0]
            found.append(
                f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"
            )
        else:
            return match[0]
        names.add(name)
    if len(names) > 1 or len(max(names)) > 1 or re.search("[=,]", match[0]):
        return match[0]
    return rf"{name}\in " + r"\cup ".join(found)


DELIMITERS = [
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])", "", r"\Bigl( x \right)", "( x )"),
    (r"(?<!\\)\\[()\[\]]|\\(?:display|text)style(?![a-zA-Z])", "", r"\[\displaystyle x\]", " x"),
    # "$18" is money and is marked so, "$18$" is mathematics.
    (r"^(-?)\$(?=[\d.,]+$)", r"\1\\$", "$18", r"\$18"),
    (r"(?<!\\)\$\s*,\s*\$", ", ", "$2$,$100$", "$2, 100$"),
    (r"(?<!\\)\$", "", "$18$", "18"),
    (r"^\s*=|^['\"`]+(?=.*['\"`]$)", "", "= 5", " 5"),
]

STYLE = [
    # Space. The thin one between thousands first: 10{,}000, 10,\!000 and 10\,000.
    (r"(?:\{,\}|,\s*\\!\s*|(?<=\d)\\,)(?=\d{3})|\\!", "", r"10{,}000", "10000"),
    (r"(?<!\\)\\(?:[,;: >]|$)|~|\\q?quad(?![a-z])", " ", r"a\; b", "a  b"),
    (r"\\(?:[hv]?phantom|[hv]space\*?)\s*\{[^{}]*\}", " ", r"\hspace{2pt}5", " 5"),
    # Colours, fonts and hats.
    (r"\\(?:textcolor|color)\s*(?:\[\w+\])?\s*\{[^{}]*\}", "", r"{\color{red} 5}", "{ 5}"),
    (r"\\(?:bf|rm|it|sf|tt|em|bfseries)(?![a-zA-Z])", "", r"{\bf 5}", "{ 5}"),
    (rf"\\(?:underline|ensuremath)\s*{BRACED}", r"\1", r"\underline{5}", "5"),
    (HAT, r" \1 ", r"3\hat{\imath}", "3 i "),
    (r"^\{+([^{},]*)\}+$", r"\1", "{5}", "5"),
    # Several commands of one meaning.
    (r"\\[dtc]frac(?![a-z])", r"\\frac", r"\dfrac12", r"\frac12"),
    (r"\\[dt]binom(?![a-z])", r"\\binom", r"\dbinom{7}{3}", r"\binom{7}{3}"),
    (r"\\([lg])(?:eqslant|eqq|eq|e)(?![a-z])", r"\\\1e ", r"x\leqslant 1", r"x\le  1"),
    (r"\\lt(?![a-z])", "<", r"x\lt 1", "x< 1"),
    (r"\\gt(?![a-z])", ">", r"x\gt 1", "x> 1"),
    (r"\\neq?(?![a-z])", r"\\ne ", r"x\neq 3", r"x\ne  3"),
    (r"\\(?:lor|vee)(?![a-z])", " or ", r"x<1 \lor x>3", "x<1  or  x>3"),
    (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset ", r"\varnothing", r"\emptyset "),
    (r"\\(?:[lc]dots|dots[a-z]?)(?![a-z])|\.\.\.", r"\\dots ", r"2, \ldots, 2n", r"2, \dots , 2n"),
    (r"\\(?:mid|[lr]?vert)(?![a-z])", "|", r"\lvert x\rvert", "| x|"),
    (r"\\backslash(?![a-z])", r"\\setminus ", r"A\backslash B", r"A\setminus  B"),
    (r"\\colon(?![a-z])|\{:\}|\\text\s*\{:\}", ":", "10{:}30", "10:30"),
    # Matrices in brackets of any kind; \\[4pt] is a line break.
    (r"\\\\\s*\[[^\[\]]*\]", r"\\\\", r"1\\[4pt]2", r"1\\2"),
    (rf"[\[(]\s*\\begin\{{{ARRAY}\}}(.*?)\\end\{{{ARRAY}\}}\s*[\])]", r"\\begin{pmatrix}\1\\end{pmatrix}",
     r"[\begin{array}{c}1\\2\end{array}]", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\{bmatrix\}", "{pmatrix}", r"\begin{bmatrix}1\end{bmatrix}", r"\begin{pmatrix}1\end{pmatrix}"),
]  # fmt: skip

UNITS = [
    # Symbols that stand outside \text.
    (r"\\AA(?![a-zA-Z])", r"\\text{Å}", r"9.6\AA", r"9.6\text{Å}"),
    (rf"\\mu\s*({TEXT}\{{)\s*", r"\1μ", r"50\mu\mathrm{m}", r"50\mathrm{μm}"),
    (rf"({TEXT}\{{)\s*([kMGm])\s*\}}\s*\\Omega(?![a-z])", r"\1\2Ω}", r"5\text{k}\Omega", r"5\text{kΩ}"),
    (r"(?<=[\d\s}])([kMG]?)(?:\\Omega|Ω)$", r"\\text{\1Ω}", r"5\Omega", r"5\text{Ω}"),
    (r"(?<=[\d\s}])([MRL])_\s*\{?\\odot\}?", r"\\text{\1⊙}", r"8 M_\odot", r"8 \text{M⊙}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])", r"^{\\circ}", r"90^\circ", r"90^{\circ}"),
    (rf"\^\{{\\circ\}}\s*(?:{TEXT}\{{\s*)?([CF])(?![a-zA-Z])\s*\}}?",
     lambda m: " celsius" if m[1] == "C" else " fahrenheit", r"25^{\circ}C", "25 celsius"),
    (r"\\?%", " percent ", r"50\%", "50 percent "),
    # Text: behind a number it may be a unit, anywhere else it is words.
    (rf"{TEXT}{BRACED}", spelled, r"5\text{ kg}", "5  kilogram "),
    (r"(?<=\d)\s+\( *(?!base|approx)([A-Za-z][A-Za-z' /.-]*)\)(?=$|[;,])", spelled, "9 (g)", "9 gram "),
    # Money; $2.5 million is an amount of dollars, too.
    (rf"^(-?)\s*({CURRENCY})\s*([\d.,]*\d(?:\s*[a-z]*illion)?)?(.*)$", money, r"-\$5", "-5 dollar "),
    (r"(?<=\d)\s*([¢€£₹¥])", lambda m: f" {units.spell(m[1])} ", "5€", "5 euro "),
    # Times, feet and inches, minutes and seconds of arc.
    (r"(?i)\s*\b([ap])\.?m\b\.?", lambda m: f" {m[1].lower()}m", "3 P.M.", "3 pm"),
    (r"(?<=\d)\s+([A-Za-z]{4,})\b", lambda m: f" {units.spell(m[1]) or m[1]}", "5 Feet", "5 foot"),
    (r"(?<=\d)(?:''|\")$", " doubleprime", "2''", "2 doubleprime"),
    (r"(?<=\d)'$", " prime", "2'", "2 prime"),
]  # fmt: skip

EQUATIONS = [
    # Words around a value.
    (r"^\s*[A-Za-z' ]*\b(?:is|are|equals)\b\s*:?\s*(?=.*\d)", "", "The area is 36", "36"),
    (rf"^\s*(?:{ABOUT}|\\(?:approx|sim)(?![a-z]))", "", "approximately 12", " 12"),
    (rf"(?<=[\d}}])\s*\(?\s*{ABOUT}\s*\)?$", "", "12 (approximately)", "12"),
    # Sets of real numbers: {x | x > 1}, x > 1 and (1, oo) are one.
    (r"^\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*[|:]\s*(.*[<>].*|.*\\[lgn]e(?![a-z]).*)\\\}$",
     r"\2", r"\{x | x>1\}", "x>1"),
    (r"^.*(?:[<>]|\\[lgn]e(?![a-z])).*$", intervals, r"-1<x\le 1", r"x\in (-1,1]"),
]  # fmt: skip

LISTS = [
    # "and", "or" and semicolons are commas; a space after them says: none between thousands.
    (rf",?\s*\b(?:and|or)\b\s*,?|;|,\s+(?={HUNDREDS})", ", ", "1 and 2", "1, 2"),
    (r"^\{(.*,.*)\}$", r"\\{\1\\}", "{1,2}", r"\{1,2\}"),
]  # fmt: skip

NUMBERS = [
    # Fractions and roots get their braces, and what is written as in a program its backslash.
    (rf"(?<![\\a-zA-Z.])(?:np\.)?(?=(?:sqrt|pi|{FUNCTIONS})(?![a-zA-Z]))", r"\\", "2*pi", r"2*\pi"),
    (r"\\sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}", r"\sqrt(3)", r"\sqrt{3}"),
    (r"\\frac\s*(\\[a-zA-Z]+|[^\s{\\])", r"\\frac{\1}", r"\frac12", r"\frac{1}2"),
    (r"(\\frac\{[^{}]*\})\s*(\\[a-zA-Z]+|[^\s{\\])", r"\1{\2}", r"\frac{1}2", r"\frac{1}{2}"),
    (r"\\sqrt\s*([^\s{\[\\(])", r"\\sqrt{\1}", r"\sqrt2", r"\sqrt{2}"),
    (rf"({TRIGONOMETRIC})\s*\^(\d)", r"\1^{\2}", r"\cos^2 30", r"\cos^{2} 30"),
    (r"\^\(([^()]*)\)", r"^{\1}", "2^(1/3)", "2^{1/3}"),
    (r"\\log_\{?e\}?(?![a-z])", r"\\ln ", r"\log_e 2", r"\ln  2"),
    # Products and powers of ten. Not Euler's number: 2e-1 is a power of ten only if nothing but a unit follows.
    (r"\\times(?![a-z])|\*", r"\\cdot ", r"2\times 3", r"2\cdot  3"),
    (r"^([+-]?[\d.,]*\d) ?[eE] ?([+-]?\d+)(?=$|\s+[A-Za-z])", r"\1\\cdot 10^{\2}", "4.5e33", r"4.5\cdot 10^{33}"),
    (rf"(?<![\d.])([\d,]*\.?\d+)\s*({'|'.join(LARGE)})s?\b", large, "2.5 million", "2500000"),
    # Commas between thousands; a block of digits that comes again and again.
    (r"^-?\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), "1,234", "1234"),
    (r"(\d*)\.(\d*)(?:\\overline\s*\{?(\d+)\}?|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)", repeating,
     r"1.2\overline{34}", r"\frac{1222}{990}"),
    (r"(\d*)\.(\d*?)(\d{1,6}?)\3{2,}\s*\\dots", repeating, r"0.1666\dots", r"\frac{15}{90}"),
    # The base of a number, remainders, ratios.
    (rf"\b{DIGITS} *(?:_\s*\{{?|\(|in )?\s*base\s+({'|'.join(BASES)}|\d+)\b\s*[)}}]?", based,
     "25_{base 16}", "25_16"),
    (rf"\(?\b{DIGITS}\)? ?_\s*\{{\s*(\w+)\s*\}}", based, "25_{16}", "25_16"),
    (rf"\({DIGITS}\)_(\w)", based, "(25)_8", "25_8"),
    (r"\\[pb]?mod\s*\{?(\w+)\}?|\(mod\s*(\w+)\)", r"\\pmod{\1\2}", "3 (mod 7)", r"3 \pmod{7}"),
    (r"^(\d+)\s+to\s+(\d+)$", r"\1:\2", "1 to 2", "1:2"),
]  # fmt: skip

SPACES = [
    # White space where nothing needs it, and what ends a sentence.
    (r"\s+", " ", "a  b", "a b"),
    (rf"(?<![A-Za-z0-9,]) |(?<=,) (?!{HUNDREDS})| (?![A-Za-z0-9])|[.,]+$", "", "x + 1.", "x+1"),
    # The letter of a choice; words in any case.
    (r"^\(([A-Z])\)$", r"\1", "(C)", "C"),
    (r"^[A-Za-z' .-]{2,}$", lambda m: m[0].casefold(), "Tuesday", "tuesday"),
]  # fmt: skip

TABLES = [DELIMITERS, STYLE, UNITS, EQUATIONS, LISTS, NUMBERS, SPACES]


def normalise(answer: str) -> str:
    """One spelling for what is written in several ways and means the same; it is still LaTeX."""
    answer = from_unicode(answer)
    for table in TABLES:
        for pattern, replacement, *_ in table:
            answer = re.sub(pattern, replacement, answer.strip(), flags=re.DOTALL)
    return answer


# ------------------------------------------------------------ signs beyond ASCII

ALIKE = dict(zip("−–‐，：；（）％’‘′“”″", ["-"] * 3 + list(",:;()%") + ["'"] * 3 + ['"'] * 3))
COMMANDS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne", "≈": "approx",
    "≡": "equiv", "∪": "cup", "∩": "cap", "∅": "emptyset", "∈": "in", "±": "pm", "…": "dots", "∣": "mid",
    "∖": "setminus", "ℝ": "mathbb{R}", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil",
    "∠": "angle",
}  # fmt: skip


def from_unicode(answer: str) -> str:
    """LaTeX for signs beyond ASCII: ½, √2, x², 90º, π. Ω, μ and currencies stay: they are units."""
    if answer.isascii():
        return answer

    def digits(match):
        return unicodedata.normalize("NFKC", match[0]).replace("−", "-")

    def fraction(above, below):
        return rf"\frac{{{above}}}{{{below}}}"

    answer = re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", answer).replace("√", r"\sqrt ")
    answer = re.sub("[°º˚]", r"^{\\circ}", answer)
    answer = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: f"^{{{digits(m)}}}", answer)
    answer = re.sub("[₀-₉]+", lambda m: f"_{{{digits(m)}}}", answer)
    answer = re.sub("[¼-¾⅓-⅞]", lambda m: fraction(*digits(m).split("⁄")), answer)
    answer = answer.replace("µ", "μ").replace("\N{OHM SIGN}", "Ω")
    answer = "".join(ALIKE.get(c) or (rf"\{COMMANDS[c]} " if c in COMMANDS else c) for c in answer)
    return re.sub("(?![Ωμ])[Α-ω]", lambda m: rf"\{greek(m[0])} ", answer)


def greek(letter: str) -> str:
    name = unicodedata.name(letter).split()[-1]
    return name.lower() if letter.islower() else name.capitalize()


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
        ends = r"\n|(?<!Mrs)(?<!Mr)(?<!Dr)\.\s+(?=[A-Z])|,\s+(?=because\b|since\b|as\b)"
        sentence = re.split(ends, answer)[0].strip(" \t\r*").rstrip(".*")
        heading = marker is not says and not re.match(r"[^A-Za-z]*\d|\\", sentence)
        if before and sentence and not (heading and re.search(says, answer)):
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
    first, *others = re.split(r",?\s*(?:\\text\s*\{\s*or\s*\}|\bor\b)\s*", answer)
    first = normalise(first)
    if others and all(compare(first, normalise(other), verifier) == "right" for other in others):
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
A_DAY = (
    86_400  # seconds; the worker's CPU time is limited, which no other load of the machine changes
)


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
