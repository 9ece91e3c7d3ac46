r"""One spelling of an answer for all spellings that mean the same. It knows nothing of the algorithm.

`normalise` is the first rule of math_answers.py. Its tables, one per kind of thing, hold rules of
(pattern, replacement, before, after): before and after are an example, which the tests try. The rules
of a table are applied from top to bottom, the tables in the order in which they stand.
"""

import re
import unicodedata
from fractions import Fraction

from support import units

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
    (r"(?<!\d)(\d*)\.(?=\d+\s*\\dots)(\d*?)(\d{1,6}?)\3{2,}\s*\\dots", repeating,
     r"0.1666\dots", r"\frac{15}{90}"),
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
    return re.sub("(?![Ωμ])[Α-ΡΣ-ω]", lambda m: rf"\{greek(m[0])} ", answer)


def greek(letter: str) -> str:
    name = unicodedata.name(letter).split()[-1]
    return name.lower() if letter.islower() else name.capitalize()
