"""algebra: are two answers in LaTeX equal, by exact arithmetic? It knows nothing of the algorithm.

The parser is math-verify's (latex2sympy2_extended); the comparison is our own, because math-verify
rounds decimals, and takes numbers for equal that are closer than an absolute distance.

- Two numbers are equal if they are the same fraction, or if their difference vanishes to more digits
  than the size of any integer, power or factorial in them could hide.
- Two expressions are equal if they are equal numbers at each of a few points, fractions of both signs
  and integers. That is far faster than a simplification, and as exact as the numbers are.
- Two equations are equal if one is a multiple of the other: y = 2x and 4x - 2y = 0. But an answer that
  is solved for a name, x = 3, is not met by one that is not, 2x + 1 = 7.
- Two inequalities are equal if one is a positive multiple of the other, two sets if they consist of
  the same intervals and points, two matrices if all their entries are equal.

math_answers starts this file as a process of its own, which imports sympy but no torch. As that
process, it reads [gold, answer, seconds of CPU time] and writes [verdict, seconds left], line by line.
"""

import json
import random
import re
import resource
import signal
import sys
from functools import lru_cache

import sympy
from latex2sympy2_extended import logic
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

MEMORY = 2**30  # bytes
DIGITS = 300  # that a difference must vanish to, besides those that large numbers could hide
OPAQUE = (AppliedUndef, sympy.Integral, sympy.Derivative, sympy.Limit)  # equal if written alike
OF_INTEGERS = (sympy.factorial, sympy.binomial, sympy.Sum, sympy.Product)
# The parser is slow on what it has not seen the like of.
WARM_UP = [
    r"a_{n}=\sum_{k=0}^{n-1}a_{k}x^{2}",
    r"\frac{2\pi c^{2}(x+1)}{e^{hx/(\lambda T)}-\sqrt{3}}",
    "(1,2]",
]
CONFIG = ConversionConfig(lowercase_symbols=False)


@lru_cache(4096)  # the same gold is asked about many times
def parse(latex: str):
    """A sympy object; an Exception for what is no mathematics."""
    # As fractions, because sympy's decimals are binary and 0.1 is none of them.
    latex = re.sub(r"(\d*)\.(\d+)", as_fraction, latex)
    # The parser drops primes and unknown commands without a word.
    latex = re.sub(r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{{len(m[2]) * 'prime'}}}", latex)
    # i is an index beside "_", else the imaginary unit, which the parser knows as I.
    if "_" not in latex:
        latex = re.sub(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", " I ", latex)
    return latex2sympy(
        latex, convert_degrees=True, normalization_config=None, conversion_config=CONFIG
    )


def as_fraction(decimal: re.Match) -> str:
    r"""0.25 -> {\frac{025}{100}}"""
    return rf"{{\frac{{{decimal[1]}{decimal[2]}}}{{{10 ** len(decimal[2])}}}}}"


def equal(gold, answer) -> bool:
    """Of two parsed answers of any kind."""
    if isinstance(gold, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        alike = getattr(gold, "shape", None) == getattr(answer, "shape", None)
        return alike and all(map(equal, gold.flat(), answer.flat()))
    if isinstance(gold, sympy.Set) or isinstance(answer, sympy.Set):
        return same_set(gold, answer)
    if isinstance(gold, (Relational, logic.And)) or isinstance(answer, (Relational, logic.And)):
        return same_relations(gold, answer)
    return isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr) and same(gold, answer)


# ------------------------------------------------------------ numbers and expressions


def same_number(a, b) -> bool:
    """Of two expressions without a variable."""
    if a == b or (a := a.doit()) == (b := b.doit()):
        return a is not sympy.nan and a is not sympy.zoo
    if a.is_Rational and b.is_Rational or not (a.is_finite is not False is not b.is_finite):
        return False
    difference = a - b
    value = difference.evalf(15, maxn=DIGITS + hidden_digits(difference))
    # sympy gives a number that it could not tell from 0 a precision of one bit.
    parts = [part for part in value.as_real_imag() if part != 0]
    return all(part.is_Float and part._prec == 1 for part in parts)


def hidden_digits(number) -> int:
    """How many digits a difference may be away from the number it belongs to: 1 + 2^{-900}."""
    digits = sum(len(hex(n.p)) + len(hex(n.q)) for n in number.atoms(sympy.Rational))
    for power in number.atoms(sympy.Pow, sympy.exp):
        base, exponent = power.as_base_exp()
        if base.is_number and exponent.is_number:
            digits += int(abs(sympy.N(exponent * sympy.log(base), 5)))
    return digits


def same(a, b) -> bool:
    """Of two expressions: at each point where both have a value, and they have some."""
    a, b = with_symbols(a), with_symbols(b)
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    if a == b or not names:
        return same_number(a, b)
    met = 0
    for point in points(names, whole=a.has(*OF_INTEGERS) or b.has(*OF_INTEGERS)):
        here, there = a.subs(point).doit(), b.subs(point).doit()
        if not (is_number(here) and is_number(there)):
            continue
        if not same_number(here, there):
            return False
        met += 1
    return met > 1


def with_symbols(expression):
    """Everything that has no value at a point as a symbol of its own: f(x), an integral."""
    opaque = {part: sympy.Symbol(sympy.srepr(part)) for part in expression.atoms(*OPAQUE)}
    return expression.xreplace(opaque)


def is_number(value) -> bool:
    return value.is_number and not value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)


def points(names: list, whole: bool):
    """Yields {symbol: value}, always the same. whole: counting numbers only, for n! and sums; else
    fractions of both signs, and integers, where floors and (-1)^n show. What is called z or w is
    complex by custom, and so are its values."""
    rng = random.Random(0)
    anywhere = ((2, 6, 1), (-5, -2, 1), (1, 5, 997), (-4, 4, 991), (0, 1, 983), (3, 9, 1))
    for low, high, parts in ((1, 5, 1), (2, 9, 1), (4, 20, 1), (9, 40, 1)) if whole else anywhere:
        point = {}
        for name in names:
            value = sympy.Rational(rng.randint(low * parts, high * parts), parts)
            if str(name)[0] in "zw" and parts > 1:
                value += sympy.I * sympy.Rational(rng.randint(1, parts), parts)
            point[name] = value
        yield point


# ------------------------------------------------------------ equations, inequalities, sets


def same_relations(gold, answer) -> bool:
    """Of two relations, or two chains of them."""
    ours, theirs = (getattr(side, "_unsorted_args", (side,)) for side in (gold, answer))
    return len(ours) == len(theirs) and all(map(same_relation, ours, theirs))


def same_relation(gold, answer) -> bool:
    for sides in (gold, answer):
        if not isinstance(sides, Relational) or not all(
            isinstance(s, sympy.Expr) for s in sides.args
        ):
            return False
    if solved_for(gold) - solved_for(answer):
        return False
    (kind, gold), (other, answer) = difference(gold), difference(answer)
    if kind is not other:
        return False
    if kind is sympy.Eq:  # a denominator is no part of the curve
        gold, answer = (sympy.fraction(sympy.together(side))[0] for side in (gold, answer))
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for point in points(names, whole=False):
        here, there = gold.subs(point).doit(), answer.subs(point).doit()
        if is_number(here) and is_number(there) and not same_number(here, sympy.S.Zero):
            ratio = there / here
            positive = kind in (sympy.Eq, sympy.Ne) or ratio.is_positive
            return (
                bool(positive)
                and not same_number(there, sympy.S.Zero)
                and same(gold * ratio, answer)
            )
    return False


def solved_for(relation) -> set:
    """The name that an answer is solved for, {x} of x = 3. Not y of y = 2x + 1: a curve may be
    written in any way."""
    found = set()
    for side, other in (relation.args, relation.args[::-1]):
        curve = str(side) in "xyz" and other.free_symbols
        if side.is_Symbol and side not in other.free_symbols and not curve:
            found.add(side)
    return found


def difference(relation) -> tuple:
    """(kind, d) with d = 0, d != 0, d < 0 or d <= 0."""
    left, right = relation.args
    if isinstance(relation, (sympy.Gt, sympy.Ge)):
        left, right = right, left
    kinds = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
    return kinds.get(type(relation), type(relation)), left - right


def same_set(gold, answer) -> bool:
    if not (isinstance(gold, sympy.Set) and isinstance(answer, sympy.Set)):
        return False
    gold, answer = gold.doit(), answer.doit()
    if gold == answer:
        return True
    ours, theirs = pieces(gold), pieces(answer)
    if not ours or not theirs or len(ours) != len(theirs):
        return False
    for (start, end, *ends), (other_start, other_end, *other_ends) in zip(ours, theirs):
        if ends != other_ends or not (same(start, other_start) and same(end, other_end)):
            return False
    return True


def pieces(whole) -> list | None:
    """[start, end, is it open there, and there] of each interval or point, in order; None for
    another kind of set."""
    found = []
    for part in whole.args if isinstance(whole, sympy.Union) else [whole]:
        if isinstance(part, sympy.Interval):
            found.append([part.start, part.end, bool(part.left_open), bool(part.right_open)])
        elif isinstance(part, sympy.FiniteSet):
            found += [[value, value, False, False] for value in part.args]
        else:
            return None
    return sorted(found, key=lambda piece: (sympy.default_sort_key(piece[0].evalf()), str(piece)))


# ------------------------------------------------------------ the process


def verdict(gold: str, answer: str) -> str:
    try:
        return "right" if equal(parse(gold), parse(answer)) else "wrong"
    except Exception:  # noqa: BLE001  whatever a library says of what is no mathematics
        return "wrong"


def main() -> None:
    """Ends by itself, even inside C code, when an answer has used up its seconds or the parent dies."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for example in WARM_UP:
        verdict(example, example)
    print("ready", flush=True)
    for line in sys.stdin:
        *texts, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        found = verdict(*texts)
        left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([found, left]), flush=True)


if __name__ == "__main__":
    main()
