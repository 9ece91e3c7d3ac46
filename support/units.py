"""units: what the words and symbols behind a number measure. It knows nothing of the algorithm.

    measure("kg m^{-3}")  ->  {"10": 3, "gram": 1, "meter": -3}         measure("red apples")  ->  {}

Nothing is converted, for an answer states its unit: 5 inches are not 12.7 cm. Only what is defined by
other units of the table is written in them, so that a newton is a kilogram meter per square second.

Why a table, where there is `pint`? On the units of Minerva's answers and of school problems pint 0.25
does not know Angstroms, cents, dollars, solar masses or magnitudes; it reads AU as absorbance units,
amps as attometers per second, cats as technical atmospheres and pins as inches; and it takes 0.8 s to
start.
"""

import re
from functools import cache

# A unit a line: its name and other names; after ":" its symbols, "-" before those that take prefixes;
# after "=" what it is in other units. A plural s is understood.
TABLE = """
meter metre : -m
gram gramme : -g gm
second sec : -s
ampere amp : -A
kelvin : -K
mole : -mol
candela : -cd
hertz : -Hz
newton : -N = kg m s^-2
joule : -J = kg m^2 s^-2
watt : -W = kg m^2 s^-3
pascal : -Pa = kg m^-1 s^-2
coulomb : -C = A s
volt : -V = kg m^2 s^-3 A^-1
ohm : -Ω -Ohm = kg m^2 s^-3 A^-2
siemens : -S = kg^-1 m^-2 s^3 A^2
farad : -F = kg^-1 m^-2 s^4 A^2
henry henrie : -H = kg m^2 s^-2 A^-2
weber : -Wb = kg m^2 s^-2 A^-1
tesla : -T = kg s^-2 A^-1
becquerel : -Bq
gray : -Gy
liter litre : -L -l = dm^3
micron = μm
cc = cm^3
minute : min
hour : hr h
day
week : wk
month
year : -yr
inch inche : in
foot feet : ft
yard : yd
mile : mi
mph = mile hour^-1
kph kmh kmph = km hour^-1
lightyear : ly
parsec : -pc
astronomicalunit : AU
angstrom : Å
nauticalmile
ton
tonne
pound : lb
ounce : oz
solarmass solarmasse : M⊙ Msun
solarradius solarradii : R⊙ Rsun
solarluminosity solarluminositie : L⊙ Lsun
acre
hectare : ha
cup
teaspoon : tsp
tablespoon : tbsp
pint : pt
quart : qt
gallon : gal
degree deg : °
celsius centigrade
fahrenheit
radian : -rad
steradian : sr
arcminute : arcmin
arcsecond : -arcsec
electronvolt : -eV
watthour : -Wh
erg
dyne : dyn
calorie : -cal
atmosphere : atm
bar : -bar
torr : Torr mmHg
gauss : G
jansky : -Jy
decibel : dB
magnitude : mag
bit : -bit
byte : -B
molar : M mM μM nM
percent percentage : %
dollar usd : $
cent penny pennie : ¢
nickel
dime
euro eur : €
pence
rupee rs inr : ₹
yen jpy : ¥
yuan cny rmb
sterling gbp quid : £
prime
doubleprime
am
pm
ordinal th st nd rd
unit
"""
PREFIXES = """femto f -15, pico p -12, nano n -9, micro μ -6, milli m -3, centi c -2, deci d -1, hecto h 2,
kilo k 3, mega M 6, giga G 9, tera T 12, peta P 15"""

# Symbols that are units even where a product of variables might be meant. All others need \text or
# \mathrm around them, or a unit on the other side: kT, mg and eV are formulas, too.
PLAIN = "mm cm dm km kg lb lbs oz ft yd mi hr hrs min sec mph kph kmh ml mL am pm th st nd rd"
PLAIN = set(PLAIN.split())

NAMES, SYMBOLS = {}, {}  # any name, any symbol: the unit's name
DEFINITIONS = {}  # name: (power of ten, in other units)


def read_table() -> None:
    for line in TABLE.strip().splitlines():
        line, _, definition = line.partition(" = ")
        names, _, symbols = line.partition(" : ")
        name = names.split()[0]
        forms = [("", "", 0)]
        if "-" in symbols:
            forms += [prefix.split() for prefix in PREFIXES.split(",")]
        for word, letter, power in forms:
            NAMES.update({word + other: word + name for other in names.split()})
            for symbol in symbols.split():
                if not word or symbol[0] == "-":
                    SYMBOLS.setdefault(letter + symbol.lstrip("-"), word + name)
            if definition or word:
                DEFINITIONS[word + name] = int(power), definition if not word else name


read_table()


@cache
def spell(word: str) -> str | None:
    """'km', 'kms', 'Kilometers' -> 'kilometer'; None for what is no unit."""
    singular = word[:-1] if len(word) > 2 and word.endswith("s") else word
    for form in (word, singular, re.sub("^K", "k", singular)):
        if name := NAMES.get(form.lower()) or SYMBOLS.get(form):
            return name
    return SYMBOLS.get(singular.lower()) if len(singular) > 1 else None


@cache
def base(name: str) -> dict[str, int]:
    """'kilonewton' -> {'10': 6, 'gram': 1, 'meter': 1, 'second': -2}"""
    if name not in DEFINITIONS:
        return {name: 1}
    power, definition = DEFINITIONS[name]
    powers = measure(definition)
    return powers | {"10": powers.get("10", 0) + power}


TWO_WORDS = re.compile(r"(?i)\b(light|nautical|astronomical|electron|arc|solar)[ -]+(?=[a-z])")
DEGREES = re.compile(r"(?i)(?:°|\bdeg(?:ree)?s?\b)\s*(C|F|celsius|centigrade|fahrenheit)\b")
TOKEN = re.compile(r"[^\W\d_]+⊙?|[°%$€£¥₹¢/()]|\^\{?-?\d+\}?")


def measure(phrase: str) -> dict[str, int]:
    """What a phrase measures, as powers of units and of 10; {} for things that are only counted. A
    word that looks like a symbol but is none that we know is a unit of its own."""
    phrase = TWO_WORDS.sub(r"\1", phrase)
    phrase = DEGREES.sub(lambda m: "fahrenheit" if m[1][0] in "fF" else "celsius", phrase)
    factors = []  # [powers, exponent]
    sign = group = after = 1  # of the next unit: divided by, inside such brackets, squared
    for token in TOKEN.findall(phrase):
        word = token.lower()
        if word in ("/", "per"):
            sign = -1
        elif token == "(":
            group, sign = sign, 1
        elif token == ")":
            group = 1
        elif word in ("square", "sq", "cubic", "cu"):
            after = 2 if word[0] == "s" else 3
        elif word in ("squared", "cubed") or token[0] == "^":
            power = {"squared": 2, "cubed": 3}.get(word) or int(token.strip("^{}"))
            if factors:
                factors[-1][1] *= power
        else:
            name = spell(token)
            odd = not re.search(r"[aeiouy]", word) or re.search("[a-z][A-Z]", token)
            factors.append([base(name) if name else {word: 1} if odd else {}, sign * group * after])
            sign = after = 1
    total = {}
    for powers, exponent in factors:
        for name, power in powers.items():
            total[name] = total.get(name, 0) + power * exponent
    return {name: power for name, power in total.items() if power}


def agree(ours: dict, theirs: dict) -> bool:
    """Of two measures. What is missing on one side agrees; "degrees" may be those of a temperature,
    "square units" those of any area."""
    if not ours or not theirs or ours == theirs:
        return True
    names = set(ours) | set(theirs)
    if names in ({"degree", "celsius"}, {"degree", "fahrenheit"}):
        return True
    powers = [[p for name, p in side.items() if name != "10"] for side in (ours, theirs)]
    return "unit" in names and powers[0] == powers[1]
