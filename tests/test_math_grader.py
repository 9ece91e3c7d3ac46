"""The math grader. Cases are (gold, answer); rows from data sets name them."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import toy

import reward
from support import units
from support.cli import UserError
from support.math_answers import (
    MathVerifier,
    compare,
    exact_number,
    extract_answer,
    grade_answer,
    grade_math,
)
from support.spelling import TABLES, normalise


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier()
    yield verifier
    verifier.close()


EXTRACTED = [
    (r"so $\boxed{5}$.", "5"),
    (r"\boxed{1}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{1} and \boxed{2}", "1, 2"),
    (
        r"$x$ must be $\boxed{3}$ or $\boxed{\frac{2}{5}}$.",
        r"3 or \frac{2}{5}",
    ),  # MATH test row 2703
    (r"$a = \boxed{-1}$ and $a = \boxed{2}.$", "-1, 2"),  # MATH test row 4559
    (r"\[\boxed{(1,2)} \text{ and } \boxed{(3,4)}.\] Either is right.", "(1,2), (3,4)"),
    (r"\(\boxed{1}\), \(\boxed{2}\), and \(\boxed{3}\)", "1, 2, 3"),
    (r"$x = \boxed{2}$ and $y = \boxed{3}$", "x=2, y=3"),
    (r"$\boxed{5}$ or, again, $\boxed{5}$", "5"),
    (r"\boxed{5}, \boxed{5}", "5"),
    (r"so \boxed{1}. The other way, \boxed{2}", "2"),  # far apart
    (r"\boxed{\frac{25}{13}} = \boxed{1\frac{12}{13}}", r"1\frac{12}{13}"),
    (r"\boxed{4} and \boxed{5", None),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\fbox{7}", "7"),
    (r"$\boxed 2$.", "2"),  # MATH train row 888
    (r"\boxed 5.", "5"),
    (r"\boxed5", "5"),
    (r"\boxed{5", None),
    (r"\boxed{4} then \boxed{5", None),
    (r"\boxed{5 and the answer is 5", None),
    (r"\boxed{}", None),
    (r"\boxed{4} The answer is 5.", "4"),  # a box comes first, wherever it stands
    ("The answer is 4.\n#### 5", "5"),
    ("#### 4\nThe answer is 5.", "4"),
    ("#### 17\n#### 18", "18"),
    ("#### .5", ".5"),
    ("####\nThe answer is 5", "5"),
    ("The answer is 9.", "9"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is 8. So the answer is 9. I hope it is correct.", "9"),
    ("**Answer:** 9", "9"),
    ("The final answer is: **9**.", "9"),
    ("Answer:\n5", "5"),
    ("The answer is Mrs. Hilt.", "Mrs. Hilt"),  # ASDiv row 29
    ("**Final Answer**: 18", "18"),
    ("The final answer is:\n$$\n18\n$$", "18"),
    ("The final answer is:\n\\[\n18\n\\]", "18"),
    ("#### Step 2: Multiply\n2 * 9\nThe answer is 18.", "18"),  # a heading
    ("#### Final Answer\n18", "18"),
    ("#### Paris", "Paris"),
    ("The answer is 18, because 9 * 2 = 18.", "18"),
    ("I do not know", None),
    ("", None),
]


@pytest.mark.parametrize("text, answer", EXTRACTED)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


NUMBERS = [
    ("42", 42), ("-7", -7), ("+5", 5), ("10.", 10), (".5", Fraction(1, 2)), ("1,234,567", 1234567),
    ("4.5e33", 45 * 10**32), (r"4.5 \times 10^{33}", 45 * 10**32), (r"10^{-3}", Fraction(1, 1000)),
    (r"-\frac{1}{2}", Fraction(-1, 2)), (r"\frac{-1}{2}", Fraction(-1, 2)),
    (r"\frac12", Fraction(1, 2)),
    ("3/4", Fraction(3, 4)), (r"3\frac18", Fraction(25, 8)), ("-1 1/2", Fraction(-3, 2)),
    (r"10{,}000", 10000), ("x", None), ("2^{10}", None), ("1/0", None), ("1 2", None),
    ("100, 200", None),
    ("1e99999", None), ("", None),
]  # fmt: skip


@pytest.mark.parametrize("answer, number", NUMBERS)
def test_exact_number(answer, number):
    assert exact_number(answer) == number


SAME = [
    (r"\log_2 8", "3"), ("123 (tenth graders)", "123"), ("9 (quarters)", "9"),
    # numbers
    ("4.5e33", r"4.5 \times 10^{33}"), ("4.5e33", r"4.5\cdot10^{33}"),
    (r"1.09 \times 10^{0}", "1.09"),
    ("10{,}000", "10000"), (r"10,\!000", "10,000"), (r"10\,000", "10000"),
    ("109,200,000", "109200000"),
    ("18", "18.00"), ("0.5", ".5"), ("0.5", r"\frac{1}{2}"), (r"\dfrac{1}{2}", "1/2"),
    ("10", "10."),
    (r"-(1/3)", r"-\frac13"), (r"3\frac18", "3.125"), (r"\dfrac{2469}{20,\!000}", "0.12345"),
    ("5", "(5)"), ("5", "+5"), ("1/3", r"\frac{2}{6}"), ("4", "2^2"), ("120", "5!"),
    # units and money
    ("5 cm", "5"), ("5", "5 cm"), (r"5\text{ cm}", "5 centimeters"), (r"15\mbox{ cm}^2", "15"),
    (r"15\mbox{ cm}^2", "15 square cm"), ("9 (apples)", "9"), ("9 (apples)", "9 apples"),
    ("9 (apples)", "9 red apples"), ("12 (star-shaped stones)", "12"), ("350 (g)", "350"),
    ("5 (times)", "5"),
    ("3 (DS games)", "3"), ("123 (third graders)", "123"), ("18 (cm)", "18 centimeters"),
    (r"18\text{ ways.}", "18"),
    (r"99\pi \text{ square inches}", r"99\pi"), (r"12\sqrt{13}\text{ feet}", r"\sqrt{1872}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"), ("90^\\circ", "90 degrees"),
    ("300", r"300 \mathrm{~km} / \mathrm{s}"),
    ("7e37", r"7 \times 10^{37}\ \mathrm{erg}\cdot\mathrm{s}^{-1}"),
    (r"\$18", "18"), ("18", "$18"), (r"-\$0.50", "-0.5"), (r"\$5", "5 dollars"), ("6th", "6"),
    ("(6,235^\\circ)", "(6,235)"),
    (r"15\mbox{ cm}^2", r"15\text{ cm}^{2}"), (r"144 \mbox{ m}^3", "144 m³"), ("25", "25 m^2"),
    (r"25\text{ m}^2", "25 m^2"), ("9 (dollars)", "9 dollars in total"), ("9 (dollars)", "$9 in total"),
    ("100 (miles)", "100 miles in all"), ("9 (feet)", "9 feet in length"), ("5 (cubic in)", "5 cubic inches"),
    (r"5\text{ cm}", r"AB = 5\text{ cm}"), (r"60^\circ", r"\angle ABC = 60^\circ"),
    ("9.6", r"9.6 \AA"), ("9.6", r"9.6 \text{ Å}"), ("50", r"50\,\mu\mathrm{m}"), ("100", r"100\text{ pc}"),
    ("500", r"500 \mathrm{~K}"), ("5", r"5\text{ N}"), ("2.5", r"2.5\text{ eV}"), ("5", r"5\text{ nm}"),
    # percent
    (r"50\%", "0.5"), (r"50\%", "50"), ("50", r"50\%"), (r"\frac{3}{4}", r"75\%"),
    (r"237.5\%", "237.5"),
    # words, choices, times, ratios, bases
    (r"\text{Evelyn}", "evelyn"), (r"(\text{E})", "E"), (r"\text{(B)}", "B"), ("Yes", "yes"),
    ("4:30 p.m.", r"4\!:\!30\text{ PM}"), ("1 : 2", "1:2"), ("1323_{4}", "1323_4"),
    (r"\text{A5}_{11}", "A5_{11}"),
    # sets, tuples, intervals
    (r"\{1,2\}", "2, 1"), (r"12\text{ and }13", "13, 12"), ("1,3,5", "5, 3 and 1"),
    ("(1,2)", "(1, 2.0)"), ("144, 256", "256, 144"), ("$2$,$100$", "100 and 2"),
    ("$(45,2),(-10,-9)$", "(-10,-9), (45,2)"), (r"(1,\sqrt8),(2,3)", r"(2,3), (1, 2\sqrt2)"),
    (r"1\pm\sqrt{2}", r"1-\sqrt2, 1+\sqrt2"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"), (r"x \in [1,2]", "[1, 2]"),
    ("x > 1", r"(1,\infty)"), (r"(1,\infty)", "x > 1"), (r"-1<x \leqslant 1", "(-1,1]"),
    # algebra
    ("x=5", "5"), ("5", "x = 5"), ("(x,y)=(1,2)", "(1,2)"), ("f(x)=2 x", "2x"), ("5", "2+3=5"),
    ("p - q", "-q + p"), ("10-4 n", "-4n+10"), ("0.1x", r"\frac{x}{10}"), ("x^{0.5}", r"\sqrt{x}"),
    (r"\sqrt{8}", r"2\sqrt 2"), (r"\frac{48 i-56}{85}", r"-\frac{56}{85}+\frac{48}{85}i"),
    ("np.arcsin(10/13)", r"\arcsin\left(\frac{10}{13}\right)"),  # Minerva row 5
    ("3+4i", "3+4 i"), ("2i", r"2\mathrm{i}"), (r"\sum_{i=1}^{3} i", "6"),
    (r"\log_{10} 2", r"\log_{10}{2}"), (r"\log_{10} 100", "2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    # more of each kind that graders of others refuse
    (r"\tan 15^\circ", r"2-\sqrt3"), (r"\sin 30^\circ", r"\frac12"),
    (r"\cos^2 30^\circ", r"\frac34"), (r"\sin(45°)", r"\frac{\sqrt2}{2}"), ("y=-2x+1", "2x+y-1=0"),
    ("y^2=8x", r"x=\frac{y^2}{8}"), ("(m,n)=(2,3)", "m=2, n=3"), ("m=2, n=3", "(m,n)=(2,3)"),
    ("m=2, n=3", "n=3, m=2"), (r"\frac{2}{3}", r"0.\overline{6}"), (r"\frac{2}{3}", r"0.\dot6"),
    (r"\frac{611}{495}", r"1.2\overline{34}"), (r"\frac{1}{7}", r"0.\dot{1}4285\dot{7}"),
    ("1/6", "0.1666..."), ("(1,2)", r"\Bigl(1,2\Bigr)"), ("5", r"\boldsymbol{5}"),
    ("5", r"\textcolor{red}{5}"), ("5", r"\hbox{5}"), ("5", r"\underline{5}"),
    ("x", r"\operatorname{x}"), ("5", r"5\phantom{0}"), ("5", r"{\color{blue}{5}}"),
    (r"\frac12", "½"), (r"\frac52", "2½"), ("-3", "−3"), (r"90^\circ", "90º"), (r"2\sqrt3", "2√3"),
    ("x^2", "x²"), (r"\pi/6", "pi/6"), (r"\ln 2", r"\log_e 2"), (r"\emptyset", r"\varnothing"),
    (r"(1,\infty)", r"\{x \mid x > 1\}"), (r"(1,\infty)", r"\{x : x > 1\}"),
    (r"(-\infty,-1)\cup(3,\infty)", r"x < -1 \text{ or } x > 3"),
    (r"(-\infty,-1)\cup(3,\infty)", "x>3 or x<-1"),
    (r"x<-1 \text{ or } x>3", r"(-\infty,-1)\cup(3,\infty)"), (r"1,2,\dots,n", r"1,2,\ldots,n"),
    (r"\frac{2e-1}{e}", r"2-\frac1e"), (r"\frac{2e-1}{e}", "2-e^{-1}"), ("5", r"5 \text{ N/m}"),
    ("5", r"5\,\Omega"), ("5", r"5\ \mathrm{J/K}"), ("5", r"5\text{ dB}"),
    (r"9.8 \mathrm{~m/s^2}", r"9.8\,\mathrm{m\,s^{-2}}"), (r"9.8\text{ m/s}^2", "9.8 m/s^2"),
    (r"9.8\text{ m}\cdot\text{s}^{-2}", r"9.8 \mathrm{~m} / \mathrm{s}^{2}"),
    (r"5\text{ N}", r"5 \text{ kg m/s}^2"), (r"5\text{ mL}", r"5\text{ cm}^3"),
    ("5", r"5 \text{ EUR}"), ("D", "(D) 12"), ("D", "D. 12"), ("D", "D: 12"),
    (r"\text{(D)}", "D) foo"), (r"\textbf{(D)}", r"\textbf{(D)}~12"), ("(D) 12", "D"),
    ("1011_2", r"1011_{\text{two}}"), ("1011_2", "1011 in base 2"), ("1011_2", "(1011)_{2}"),
    ("1011_2", "1011 base two"), ("25_8", "25_{eight}"), (r"\frac{\pi}{6}", "pi/6"),
    (r"6\sqrt3", "6*sqrt(3)"), ("2500000", "2.5 million"), ("120", "5! = 120"),
    (r"\frac13", r"P(A)=\frac13"), ("1:2", "1 to 2"), ("10:30", "10{:}30"),
    ("12", "approximately 12"), ("12", "about 12"), ("12", r"\approx 12"), ("12", "12 (approx.)"),
    ("2,3", "2 and 3"), (r"15\frac{39}{40} or \frac{639}{40}", r"\frac{639}{40}"),
    ("x+11 or 11+x", "x+11"), ("all real numbers", "all real numbers"),
    (r"25^\circ\text{C}", "25 °C"), (r"25^\circ\text{F}", "25 degrees Fahrenheit"),
    ("45", r"45^{\circ}"), (r"3\sqrt2 \text{ cm}", r"3\sqrt{2}"), (r"\frac{2}{3}", r"\frac23"),
    ("2x+3y", "3y+2x"), ("x = 3", "3"), ("x=1,2", "1,2"), ("(x,y)=(1,2)", "(1,2)"),
    ("(x,y,z)=(1,2,3)", "x=1, y=2, z=3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left(\begin{array}{c}1\\2\end{array}\right)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left[\begin{smallmatrix}1\\2\end{smallmatrix}\right]"),
    ("10", "10.0"), ("1,000", "1000"), ("6.022e23", r"6.022\times10^{23}"),
    ("3.2e-5", r"3.2\times10^{-5}"), ("2x-y+3=0", "y=2x+3"), ("2x-y+3=0", "4x-2y+6=0"),
    ("x^2+y^2=4", "x^2+y^2-4=0"), (r"\{x|x\ne 2\}", r"x\neq 2"), ("[0,1]", r"0\le x\le 1"),
    ("[0,1]", r"1\ge x\ge 0"), (r"(-\infty, 3]", r"x \le 3"), (r"\$5", "5 dollars"),
    ("5 cents", "5¢"), (r"\sqrt[3]{2}", "2^{1/3}"), ("2^{1/3}", "2^(1/3)"),
    (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"), (r"e^{\pi i}", "-1"), ("0.5", r"50\%"),
    (r"\cot 45^\circ", "1"), ("f^{-1}(x)=x+1", "x+1"), (r"3\times 4", "12"),
    (r"\sin^{-1}(1)", r"\frac{\pi}{2}"), (r"5 \text{ eV}", "5"), ("5", r"5 \text{ kHz}"),
    (r"2\text{ hours }30\text{ minutes}", "2 hours 30 minutes"),
    (r"\sin 20^\circ", r"2\sin 10^\circ\cos 10^\circ"), (r"\frac{1}{2}", r"\cos(60^{\circ})"),
    (r"\tan 75^{\circ}", r"2+\sqrt{3}"), (r"\sin^2 15^\circ", r"\frac{2-\sqrt3}{4}"),
    ("5", r"5 \text{ kN}"), ("5", r"5\ \mathrm{MPa}"), ("5", r"5 \text{ kg}\cdot\text{m}^2"),
    ("5", r"5\,\mathrm{W/m^2}"), ("5", r"5 \text{ g/mol}"), ("5", r"5 \text{ rad/s}"),
    (r"5\text{ rad/s}", "5 rad/s"),
    (r"(-\infty,2)\cup(2,\infty)", r"\{x \in \mathbb{R} \mid x \neq 2\}"),
    ("(-1,3)", r"\{x : -1 < x < 3\}"),
    (r"(-\infty,-1]\cup[3,\infty)", r"x \le -1 \text{ or } x \ge 3"), ("x^2+y^2=25", "y^2+x^2=25"),
    (r"\frac{x}{2}+\frac{y}{3}=1", "3x+2y=6"), ("3x+2y=6", r"y=3-\frac32x"),
    (r"y=\frac{1}{x}", "xy=1"), ("(a,b,c)=(1,2,3)", "a=1, b=2, c=3"), ("a=1,b=2", "(a,b)=(1,2)"),
    (r"\frac{1}{3}", r"0.333\ldots"), (r"\frac{41}{333}", r"0.\overline{123}"),
    (r"\frac{7}{6}", r"1.1\dot6"), ("7", r"\mathsf{7}"), ("7", r"\bm{7}"), ("7", r"{\rm 7}"),
    ("(3,4)", r"\Big(3,4\Big)"), ("3", r"\textbf{3}"), ("1/4", "¼"), (r"3\sqrt{5}", "3√5"),
    (r"x\ge 2", "x ≥ 2"), ("-7", "−7"), ("60", "60º"), (r"\pi r^2", "πr²"),
    (r"\frac{e^2-1}{2e}", r"\frac{e}{2}-\frac{1}{2e}"), (r"3e-2\pi", r"-2\pi+3e"),
    ("C", r"\text{(C) } 3\sqrt{2}"), ("C", r"C. 3\sqrt2"), ("C", "(C)"), ("C", "C: Paris"),
    ("101_2", "101_{base 2}"), ("77_8", r"77_{\text{eight}}"), ("A3_{16}", "(A3)_{16}"),
    ("sqrt(2)/2", r"\frac{\sqrt2}{2}"), (r"\ln 5", r"\log_{e} 5"), ("3200000", "3.2 million"),
    ("24", "4! = 24"), (r"\frac25", r"P(X=1)=\frac25"), ("3:5", "3 to 5"), ("7:45", "7{:}45"),
    ("100", "about 100"), ("5", r"5\text{ USD}"), ("5", r"\text{€}5"), ("20", r"\$20"),
    (r"1.5\times10^{3}\text{ kg}", "1500 kg"), (r"1.67\times10^{-27}\text{ kg}", "1.67e-27"),
    (r"5\text{ }\mu\text{F}", "5"), (r"5 \mu\text{F}", r"5 \text{ μF}"),
    (r"x=2 \text{ or } x=3", "2, 3"), (r"\{2,3\}", "x=2 or x=3"), ("1,2,3", "1, 2, and 3"),
    (r"\begin{bmatrix}1&0\\0&1\end{bmatrix}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"),
    (r"2\mathbf{i}+3\mathbf{j}", r"2\hat{\mathbf{i}}+3\hat{\mathbf{j}}"), (r"5 \text{ m}", "5 m"),
    ("12", r"12\text{ (approx)}"), ("9.8", r"9.8\text{ m s}^{-2}"), (r"13\frac12", "13.5"),
    (r"2\pm\sqrt3", r"2+\sqrt3, 2-\sqrt3"), (r"2\pm\sqrt3", r"x=2\pm\sqrt{3}"),
    (r"\frac{\sqrt{6p}}{3}", r"\sqrt{\frac{2p}{3}}"), ("(x+1)(x-1)", "x^2-1"),
    (r"\frac{1}{n(n+1)}", r"\frac1n-\frac1{n+1}"), ("2^{n+1}-2", "2(2^n-1)"),
    ("n^2", r"\sum_{k=1}^{n}(2k-1)"),
]  # fmt: skip

DIFFERENT = [
    # products of variables are no units
    ("6abc", "6xyz"), ("6xyz", "6"), ("10", "10abc"), ("3", "3 fourths"), ("5", "5 tens"),
    # what must not take for ever in the trainer's process
    ("7", "2x" + 80 * r" \cdot x" + "+1"), ("7", "1.e999999999"), ("7", "1.e-999999999"),
    # numbers
    ("0.0000001", "0.0000002"), ("(0.0000001,1)", "(0.0000002,1)"), ("10001", "10000"),
    ("1,234", "234"),
    ("-7", "7"), ("10", "100"), ("4.5e33", "4.5e32"), ("4.5e33", "4.5"), (r"\frac13", "0.333333"),
    ("1 1/2", "11/2"), ("2 3", "5"), ("23", "2 3"), (r"\pi", "3.14159265"),
    (r"2\pi", "6.283185307179586"),
    (r"\sqrt2", "1.414214"), ("2^{10}", "210"), ("9!", "9"), (r"0.\overline{3}", "0.3"),
    ("5 million", "5"), ("2 thirds", "2"),
    (r"10^{-20}\sqrt2", r"2\cdot10^{-20}\sqrt2"), ("1", "1%"), (r"-\frac12", r"\frac12"),
    # units and money
    ("5 cm", "5 km"), (r"5\text{ m}", r"5\text{ cm}"), (r"8 \mathrm{~m}", r"8 \mathrm{~km}"),
    ("5 m", "5"), ("350 (g)", "350 (kg)"),
    (r"15\text{ cm}^2", r"15\text{ cm}^3"), ("5 dollars", "5 cents"), (r"\$5", "5 cents"),
    ("3s^2", "3"), ("6 m n", "6"), ("6 m n", "6 m p"), (r"\frac{3}{2} m v", r"\frac{3}{2}"), ("3", "3 h k"),
    (r"\frac12 g t^2", r"\frac12"), (r"2\pi h r", r"2\pi"), ("3", "3m^2"),
    (r"15\text{ cm}^{2}", r"15\text{ cm}^{3}"), (r"15\text{ cm}^{2}", r"15\text{ cm}"),
    ("5", "5 billions"), ("10", r"10\text{ thousands}"), ("3", "3 half"), ("3", "3 sixteenths"),
    ("3", "3 twelfths"), ("3", "3 twentieths"), ("3", "3 tenths of a mile"), ("3", "3 quarters of an hour"),
    ("7", "7 less than x"), ("7", "7 minus two"), ("7", "7 plus y"), ("3", "3 to the power of four"),
    ("3", "3 degrees below zero"), ("12 (gallons)", "12 quarts"), ("5 (grams)", "5 milligrams"),
    ("5 (pounds)", "5 tons"), ("5 (dollars)", "5 pennies"), (r"5\text{ m}", r"5\text{ ms}"),
    ("9 am", "9 pm"), ("5 mph", "5 km/h"), ("5 mph", "5 kph"), ("5 miles per hour", "5 kilometers"),
    ("3 hours", "3 minutes"), ("5 cm, 6 cm", "5 km, 6 km"), ("3 n", "3"), ("3x", "3"),
    (r"3 \sin x", "3"),
    (r"2\mathrm{i}", "2"), (r"2\mathrm{e}", "2"),
    # percent
    (r"50\%", r"5000\%"), ("50", "5000"), ("5000", "50"), (r"50\%", "5000"), ("0.5", r"0.5\%"),
    # words, choices, times, ratios, bases
    ("east", "seat"), (r"\text{eat}", r"\text{tea}"), ("A", "B"), ("2A", "2a"), ("3:45", "3:54"),
    ("1:2", "2:1"), ("2516_8", "2516_7"), ("2516_8", "2516"), ("2516", "2516_8"), ("x_1", "x_2"),
    (r"\text{A5}_{11}", r"\text{A5}_{31}"),
    # sets, tuples, intervals
    ("(1,2)", r"\{1,2\}"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("(1,2)", "1,2"),
    ("[1,2)", "(1,2]"),
    ("1,2", "1"), ("1,2,2", "1,2"), ("1,2", "1,2,3"), (r"1\pm\sqrt2", r"1+\sqrt2"),
    ("1,234", "(1,234)"), ("81, 256", "81256"), ("1,234", "1 and 234"),
    ("x>1", r"x \ge 1"), ("x > 1", "(1,2)"), (r"\infty", r"-\infty"),
    # algebra
    ("x=5", "y=5"), ("a-b", "b-a"), ("x^2", "x^3"), (r"\sqrt{x^2}", "x"), (r"\log 2", r"\ln 2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\frac{1}{2}", r"\foo\bar \frac{1}{2}"), (r"\frac{1}{2}", r"\text{answer } \frac{1}{2} + 7"),
    # and their neighbours: what such rules must not let in
    (r"5\text{ eV}", r"5\text{ MeV}"), (r"5\text{ Hz}", r"5\text{ kHz}"),
    (r"5\text{ pc}", r"5\text{ kpc}"), (r"5\text{ Gyr}", r"5\text{ Myr}"),
    (r"5\text{ mol}", r"5\text{ g}"), (r"25^\circ\text{C}", r"25^\circ\text{F}"),
    ("25 degrees C", "25 degrees F"), (r"5\text{ MW}", r"5\text{ mW}"),
    (r"5\text{ T}", r"5\text{ mT}"), ("5 eV", "5 MeV"), ("5 Hz", "5 kHz"), ("5 erg", "5 J"),
    ("5 days", "5 weeks"), ("5 euros", "5 dollars"), ("£5", "€5"), ("3", "3kT"), ("3", "3mg"),
    ("3mg", "3"), (r"\frac32 kT", r"\frac32"), ("2eV", "2"), ("3 F/A", "3"), ("2", "2A"),
    ("2A", "2"), ("2", "2T"), ("2 m", "2"), ("2", r"2\pi"), ("5", "5x"), ("3", "3ab"), ("2", "2xy"),
    (r"2\mathrm{i}", "2"), ("5", "5 n"), (r"\frac{1}{2}mv^2", r"\frac12"), ("2Gm", "2"),
    (r"\frac{1}{2008!}", r"\frac{2}{2008!}"), ("(2/3)^{200}", "(2/3)^{201}"),
    ("e^{-100}", "e^{-200}"), (r"\frac{2^{2008}+1}{2^{2009}}", r"\frac{2^{2008}-1}{2^{2009}}"),
    ("1-e^{-500}", "1"), (r"\frac{1}{3^{5000}}\sqrt2", r"\frac{1}{3^{5001}}\sqrt2"),
    (r"1+2^{-5000}\sqrt2", "1"), ("10^{-40}x", r"2\cdot 10^{-40}x"), ("x+10^{-400}", "x"),
    (r"0.\overline{9}", "0.99"), (r"\tan 15^\circ", r"2+\sqrt3"), (r"\sin 30^\circ", r"\sin 30"),
    (r"\sin 30", r"\frac12"), (r"\cos 58^\circ", r"\sin 58^\circ"), (r"\sin 30^\circ", "30"),
    ("y=-2x+1", "2x+y+1=0"), ("y^2=8x", "y=8x^2"), ("y=2x", "0=0"), ("y=2x", "y=y"),
    ("y=2x", "x=2y"), ("0", "x+y+z=1"), ("x=3", "2x+1=7"), ("x=3", "x=x"), ("x=3", "3=3"),
    ("3", "x=x"), ("3", "x"), ("x=3", "x"), ("x=3", "y=3"), (r"V=\frac{nRT}{p}", "pV=nRT"),
    ("x=2,y=3", "x=3,y=2"), ("x=2,y=3", "3,2"), ("(m,n)=(2,3)", "m=3,n=2"), ("1", "x=1=2"),
    ("4", "x^2+y^2=4"), ("x^2+y^2=4", "4"), ("xy=1", "1"), ("2x+y=1", "1"), ("x+y+z=0", "0"),
    ("100", r"5 \cdot 24 = 100"), ("120", "5!=100=120"), (r"\frac23", "0.667..."),
    (r"\frac23", "0.67"), (r"\frac23", "0.66"), ("0.6", r"0.\overline6"), (r"\pi", "3.14..."),
    (r"\pi", r"3.141\dots"), ("0.12", r"0.\dot12"), (r"(1,\infty)", r"x\ge1"),
    (r"(-\infty,-1)\cup(3,\infty)", "x<-1"), (r"(-\infty,-1)\cup(3,\infty)", "x<-1 or x>4"),
    ("x>1", "y>1"), ("x<1 or x>3", "1<x<3"), ("(1,3)", r"1\le x<3"), (r"x\ne 3", "x=3"),
    ("x>1", "x<1"), (r"\emptyset", "0"), (r"\emptyset", r"\{0\}"),
    (r"\frac{2e-1}{e}", r"\frac{0.2}{e}"), ("2e", "2"), ("2e^2", "200"), ("5", "5e0x"),
    ("B", "(C) 12"), ("D", "D, E"), ("D", "(D) or (E)"), ("D", "(D) (E)"),
    ("D", "A) 1 B) 2 C) 3 D) 4"), ("D", "Depends"), ("A", "A: x or B: y"), ("D", "12"), ("A", "a"),
    ("12", "(D) 13"), ("2516_8", r"2516_{\text{base }7}"), ("2516_8", "2516"),
    ("2516_8", "(2516)_7"), ("25_8", "25 (base eighty)"), ("12", "approximately 13"),
    ("1/3", "approximately 0.333"), ("12", "not 12"), ("12", "The area is not 12"),
    ("12", "less than 12"), ("1:2", "2 to 1"), ("1:2", "1 to 3"), ("10:30", "10{:}31"),
    ("2.5", "2.5 million"), ("2500000", "2.5 thousand"), ("5", "5 million"), ("120", "4!=120"),
    ("1,2", "1 or 2 or 3"), (r"\frac12", r"\frac12 or 0.25"), ("5", "5 or 6"), ("5", "4 or 5"),
    ("5", "5, 5"), ("5 apples and 3 pears", "3 apples and 5 pears"),
    ("5 (apples); 3 (pears)", "3, 5"), ("5 feet 3 inches", "5 feet 4 inches"),
    ("5 feet 3 inches", "3 feet 5 inches"), ("5 feet 3 inches", "5 inches 3 feet"), ("2''", "2'"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{vmatrix}1\\2\end{vmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("3i-2j", "3j-2i"),
    (r"3\hat i", r"3\hat j"), ("x", "x'"), ("f(x)", "f(y)"), (r"\sqrt{x^2}", "x"), ("|x|", "x"),
    (r"z\bar z", "z^2"), (r"\overline{AB}", "AB"), (r"\log 2", r"\ln 2"),
    (r"\log_2 8", r"\log_3 8"), (r"-\frac12", r"\frac12"), ("2^{-1}", "-2"), ("a_1", "a_2"),
    ("x^y", "y^x"), ("n!", "n"), ("(n+1)!", "n!+1"), (r"\lfloor x\rfloor", "x"),
    (r"\lceil x\rceil", r"\lfloor x\rfloor+1"), (r"\sin x", r"\sin{2x}"),
    (r"\binom{n}{2}", r"\binom{n}{3}"), ("(-1)^n", "1"), ("1", r"(-1)^{2n}-0\cdot n+1"),
    (r"\frac{1}{0}", r"\frac{2}{0}"), (r"\infty", r"-\infty"), (r"\frac{x}{x}\cdot 0", "1"),
    ("i", "1"), ("i", "-i"), (r"\sqrt{-1}", "1"), ("3+4i", "3-4i"), ("5 km", r"5 \text{ m}"),
    ("45 cents", r"\$0.45"), ("0", r"\frac{1}{10^{400}}"),
    ("2", "2.0000000000000000000000000000000000001"),
    (r"\sin 20^\circ", r"2\sin 10^\circ\cos 20^\circ"), (r"5\text{ kN}", r"5\text{ N}"),
    (r"5\text{ rad/s}", r"5\text{ rad}"), (r"5\text{ MPa}", r"5\text{ mPa}"),
    (r"5\text{ g/mol}", r"5\text{ kg/mol}"), (r"5\text{ W/m}^2", r"5\text{ W/m}"),
    (r"5\,\mathrm{m\,s^{-2}}", r"5\,\mathrm{m\,s^{-1}}"), (r"5 \mu\text{F}", r"5\text{ F}"),
    (r"5 \mu\text{F}", r"5\text{ mF}"), (r"5^\circ", r"5\text{ rad}"),
    (r"5\text{ K}", r"5^\circ\text{C}"), (r"5\text{ h}", r"5\text{ H}"),
    (r"5\text{ AU}", r"5\text{ ly}"), (r"5 M_\odot", r"5 R_\odot"), (r"5\text{ dB}", r"5\text{ B}"),
    (r"\$5", "£5"), (r"5\text{ Euro}", r"5\text{ USD}"), ("3x+2y=6", r"y=3+\frac32x"),
    (r"y=\frac1x", "xy=2"), (r"y=\frac1x", "x^2y=x+1"), ("x=2", "2=3"), ("x=2", "x^2=4"),
    ("y=x", "y^2=x^2"), ("(a,b)=(1,2)", "a=2,b=1"), ("a=1,b=2", "(1,2),(3)"), ("a=1,b=2", "a=1"),
    ("1,2", "a=2,b=1,c=1"), ("x=1 or x=2", "x=1"), (r"\frac13", "0.333"),
    (r"\frac{41}{333}", r"0.\overline{132}"), ("7", r"\mathbf{1}"), ("1/4", "¾"), (r"x\ge2", "x>2"),
    ("3e", "3"), (r"3e-2\pi", r"0.03\pi"), ("C", "(B) 3"), ("C", "B, C"), ("C", "Cat"),
    ("C", "(A) or (C)"), ("101_2", "101_{base 3}"), ("77_8", "77_{seven}"), ("77_8", "77"),
    ("3200000", "3.2 billion"), ("3.2", "3.2 million"), ("24", "4!=25"), ("24", "3! = 24"),
    ("3:5", "5 to 3"), ("7:45", "7:54"), ("100", "about 101"), ("100", "about 99.9"),
    ("x<1", "x>1"), ("(1,2)", r"1<x\le2"), ("x=2 or x=3", "2 or 4"),
    (r"\frac{1}{n}-\frac1{n+1}", r"\frac{1}{n}"), ("2^{n}", "2^{n}+10^{-50}"),
    ("n^2", r"\sum_{k=1}^{n}(2k+1)"), (r"\sqrt{x}", r"-\sqrt{x}"), (r"\pi", r"\frac{355}{113}"),
    (r"\pi", r"\frac{22}{7}"), (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    ("1", r"0.\overline{9}8"), ("10^{100}", "10^{100}+1"), (r"\sqrt{10^{100}+1}", "10^{50}"),
    (r"\frac{1}{2}", "0.5000000000000000000000000000000000000001"), ("x", "x+10^{-40}"),
    (r"\sin x", r"x-\frac{x^3}{6}"), ("2", "two"), ("5", "5 or 5.0001"), ("3", r"3 \text{ or } 4"),
    ("(1,2)", "(1,2),(1,2)"), ("0", r"\emptyset"), (r"\pm 2", "2"), ("2", r"\pm2"), ("4", "2^2=5"),
    ("5", "x=5, y=6"), ("5", "5=6"), ("5", "6=5"), ("5", "-5"), ("5", "5?"), ("x=5", r"x\ne5"),
    ("5", r"x\le5"), ("[1,2]", r"\{1,2\}"),
]  # fmt: skip


@pytest.mark.parametrize("gold, answer", SAME)
def test_the_same_answer(gold, answer, verifier):
    assert grade_math(gold, rf"So it is \boxed{{{answer}}}.", verifier) == ("right", answer)


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_a_look_alike_is_wrong(gold, answer, verifier):
    assert grade_math(gold, rf"So it is \boxed{{{answer}}}.", verifier) == ("wrong", answer)


@pytest.mark.parametrize("answer", sorted({answer for pair in SAME + DIFFERENT for answer in pair}))
def test_every_answer_equals_itself_and_normalise_is_idempotent(answer, verifier):
    once = normalise(answer)
    assert compare(once, once, verifier) == "right"  # grade_math would see that the texts are one
    assert normalise(once) == once


def test_no_answer(verifier):
    assert grade_math("5", r"it is \boxed{5", verifier) == ("no answer", None)


def test_plain_numbers_and_words_need_no_worker():
    verifier = MathVerifier()
    for gold, answer in [
        ("4.5e33", "45"),
        ("9 (apples)", "8"),
        ("1,2", "2,3"),
        ("Yes", "No"),
        ("3:4", "4:3"),
    ]:
        assert grade_math(gold, f"#### {answer}", verifier)[0] == "wrong"
    assert verifier.worker is None


UNITS = [
    ("m s^{-2}", {"meter": 1, "second": -2}), ("meters per second squared", {"meter": 1, "second": -2}),
    ("kg m/s^2", {"10": 3, "gram": 1, "meter": 1, "second": -2}), ("N", units.measure("kg m/s^2")),
    ("J/(kg K)", {"meter": 2, "second": -2, "kelvin": -1}), ("mL", units.measure("cubic centimeters")),
    ("kpc", {"10": 3, "parsec": 1}), ("Gyr", {"10": 9, "year": 1}), ("MeV", {"10": 6, "electronvolt": 1}),
    ("Angstroms", {"angstrom": 1}), ("solar masses", {"solarmass": 1}), ("AU", {"astronomicalunit": 1}),
    ("amps", {"ampere": 1}), ("light-years", {"lightyear": 1}), ("degrees C", {"celsius": 1}),
    ("cents", {"cent": 1}), ("qz", {"qz": 1}), ("cats", {}), ("hats", {}), ("pins", {}), ("red apples", {}),
]  # fmt: skip


@pytest.mark.parametrize("phrase, measure", UNITS)
def test_what_a_phrase_measures(phrase, measure):
    assert units.measure(phrase) == measure


@pytest.mark.parametrize(
    "piece", ["1", "12", "ab ", "5x", r"x \cdot ", r"\text{", "((", "1, ", "or ", "=1", ".1"]
)
def test_a_thousand_characters_need_little_work_here(piece):
    """Patterns that try one way after the other would need years."""
    verifier = MathVerifier()
    verifier.check = lambda gold, answer: "wrong"
    for end in ("", "!", "}", " m"):
        grade_math(r"5\text{ cm}", rf"\boxed{{{piece * (990 // len(piece))}{end}}}", verifier)


PIECES = [r"\frac", r"\sqrt", r"\boxed", r"\text", r"\{", r"\}", r"\pm", r"\$", "cm", "1e0"]
PIECES += [*"{}()[],;.10-xe%$^_=# \n\t\0é٣½𝟙"]


@pytest.mark.parametrize("seed", range(300))
def test_no_text_makes_it_raise(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(PIECES, k=rng.randrange(12)))
    gold = "".join(rng.choices(PIECES, k=rng.randrange(12)))

    class Wrong(MathVerifier):
        def check(self, gold, answer):
            return "wrong"

    for reply in (text, f"#### {text}", rf"\boxed{{{text}}}"):
        assert grade_math(gold, reply, Wrong())[0] in ("right", "wrong", "no answer")


@pytest.mark.parametrize(
    "piece", [r"\boxed{", r"\boxed{{}", "####", "answer is ", " ", "(", "1,", ". A"]
)
def test_a_million_characters_take_no_time(piece, verifier):
    began = time.monotonic()
    verdict, _ = grade_math("5", piece * (1_000_000 // len(piece)), verifier)
    assert verdict in ("wrong", "no answer")
    boxed = "\\boxed{" + piece * (1_000_000 // len(piece)) + "}"
    assert grade_math("5", boxed, verifier)[0] in ("wrong", "no answer")
    assert grade_math("5", r"\boxed{5}" + " so" * 10_000, verifier)[0] == "right"
    assert time.monotonic() - began < 60  # quadratic work would take hours


def test_no_answer_takes_long_to_spell_or_breaks_the_spelling():
    """In the trainer's own process, where nothing limits the time."""
    began = time.process_time()
    for text in ("1" * 490 + "." + "1" * 490, "1" * 4000, "\u03a2", "\u03a2" * 500):
        reply = "\\boxed{" + text + "}"
        assert grade_answer("5", reply, tolerance=0.5)[0] == "wrong"
    assert time.process_time() - began < 5


def test_a_slow_answer_is_timed_out_and_the_next_is_graded():
    verifier = MathVerifier(limit_s=3.0)
    began = time.monotonic()
    many = ", ".join(["9^{9^{9^9}}"] * 20)
    assert grade_math(", ".join("1" * 20), f"#### {many}", verifier)[0] == "timed out"
    assert time.monotonic() - began < 60
    assert not verifier.known
    assert grade_math(r"2\sqrt2", r"#### \sqrt8", verifier)[0] == "right"
    verifier.close()


def test_a_busy_machine_times_no_answer_out():
    verifier = MathVerifier(limit_s=1.0)
    assert grade_math("2x", "#### x+x", verifier)[0] == "right"
    verifier.worker.send_signal(signal.SIGSTOP)
    threading.Timer(2, verifier.worker.send_signal, (signal.SIGCONT,)).start()
    assert grade_math(r"2\sqrt2", r"#### \sqrt8", verifier)[0] == "right"
    verifier.close()


def test_a_worker_that_dies_is_an_error_or_replaced():
    verifier = MathVerifier()
    assert grade_math(r"2\sqrt2", r"#### \sqrt8", verifier)[0] == "right"
    first = verifier.worker
    first.kill()
    first.wait()
    assert grade_math(r"3\sqrt2", r"#### \sqrt{18}", verifier)[0] == "right"
    verifier.worker.send_signal(signal.SIGSTOP)  # so that it has not answered when it is killed
    threading.Timer(0.5, verifier.worker.kill).start()
    assert grade_math("2y", "#### y+y", verifier)[0] == "error"
    assert "error" not in verifier.known.values()
    assert grade_math(r"2\sqrt2", r"#### \sqrt8", verifier)[0] == "right"
    verifier.close()


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    for program in ("/bin/false", "/no/such/program"):
        monkeypatch.setattr(sys, "executable", program)
        assert grade_math("2x", "#### x+x", MathVerifier())[0] == "error"


def test_ctrl_c_leaves_no_reply_for_the_next_question():
    verifier = MathVerifier()
    assert grade_math("2x", "#### x+x", verifier)[0] == "right"
    verifier.worker.send_signal(signal.SIGSTOP)  # so that it has not answered before
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        grade_math("2y", "#### y+y", verifier)
    signal.signal(signal.SIGINT, handler)
    assert grade_math("2x", "#### x+1", verifier)[0] == "wrong"
    verifier.close()


def test_threads_share_workers_of_1_gb(verifier):
    def verdict(n):
        problem = {"answer": rf"2\sqrt{{{n % 10}}}"}
        return reward.grade(problem, rf"#### \sqrt{{{4 * n}}}")[0]

    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(verdict, range(2, 40)))
    assert verdicts == ["right" if n < 10 else "wrong" for n in range(2, 40)]
    assert grade_math(r"2\sqrt2", r"#### \sqrt8", verifier)[0] == "right"
    assert (
        os.getsid(verifier.worker.pid) == verifier.worker.pid
    )  # a terminal's Ctrl-C is not for it
    assert resource.prlimit(verifier.worker.pid, resource.RLIMIT_AS) == (2**30, 2**30)


SCRIPT = """
import sys, time
print("imported", flush=True)  # a stage without `if __name__ == "__main__"`
from support.math_answers import MathVerifier, grade_math
verifier = MathVerifier()
print(grade_math(r"2\\\\sqrt2", r"#### \\\\sqrt8", verifier)[0], verifier.worker.pid, flush=True)
time.sleep(60)
"""


def test_the_worker_does_not_import_the_script_and_dies_with_it(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(SCRIPT.replace("\\\\", "\\"))
    here = os.path.dirname(reward.__file__)
    stage = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": here},
    )
    assert stage.stdout.readline() == "imported\n"
    verdict, pid = stage.stdout.readline().split()
    assert verdict == "right"
    with open(f"/proc/{pid}/maps") as maps:
        assert "torch" not in maps.read()
    ended = toy.watch(pid)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert ended(pid)
    assert stage.stdout.read() == ""


RULES = [rule for table in TABLES for rule in table]


@pytest.mark.parametrize("rule", RULES, ids=[before for _, _, before, _ in RULES])
def test_each_rule_does_what_its_example_says_and_no_other_does_it(rule):
    pattern, replacement, before, after = rule
    assert re.sub(pattern, replacement, before, flags=re.DOTALL) == after
    text = before
    for other in (other for other in RULES if other is not rule):
        text = re.sub(other[0], other[1], text.strip(), flags=re.DOTALL)
    assert text != normalise(before)


@pytest.mark.parametrize(
    "answer, latex",
    [
        ("2½", r"2\frac{1}{2}"), ("√10", r"\sqrt{10}"), ("√x", r"\sqrt{x}"), ("x²⁰", "x^{20}"), ("−3", "-3"),
        ("90º", r"90^{\circ}"), ("3π", r"3\pi"), ("a₁₂", "a_{12}"), ("x ≤ 3", r"x\in(-\infty,3]"), ("5 kΩ", "5 kiloohm"),
    ],
)  # fmt: skip
def test_signs_beyond_ascii_become_latex(answer, latex):
    assert normalise(answer) == latex


def test_answers_after_public_complaints_about_graders(verifier):
    """Pairs of a gold answer and a response, after what users of other graders complained about."""
    lines = (Path(__file__).parent / "answers.jsonl").read_text().splitlines()
    misjudged = []
    for row in map(json.loads, lines):
        verdict, prediction = grade_math(row["gold"], row["response"], verifier)
        if (verdict == "right") != row["right"]:
            misjudged.append((row["gold"], prediction, verdict))
    assert len(lines) == 348 and misjudged == []


def test_one_function_is_the_reward_of_every_stage(monkeypatch):
    """A fork that replaces the body of `reward` gets its numbers in records and in evaluation."""

    class Words:
        eos = (0,)

        def text(self, ids):
            return "#### " + " ".join(str(i) for i in ids[:-1])

    problems = [{"id": 1, "answer": "5"}] * 3
    responses = [[5, 0], [6, 0], [5, 7]]
    graded = reward.grade_ids(Words(), problems, responses, False)
    assert [g["reward"] for g in graded] == [1, 0, 0]
    assert [type(g["reward"]) for g in graded] == [int, int, int]  # files of 0 and 1 look as before
    assert [g["correct"] for g in graded] == [True, False, False]
    assert [g["finished"] for g in graded] == [True, True, False]
    monkeypatch.setattr(reward, "reward", lambda problem, text, unsafe: len(text) / 10)
    graded = reward.grade_ids(Words(), problems, responses, False)
    assert [g["reward"] for g in graded] == [0.6, 0.6, 0]
    assert {g["verdict"] for g in graded} == {"wrong"}  # right is reward 1 alone
    assert not any(g["correct"] for g in graded)
    for value in (1.5, -0.5, float("nan"), None, "1"):
        monkeypatch.setattr(reward, "reward", lambda *_, value=value: value)
        with pytest.raises(UserError, match=f"reward.py: reward.. gave {value!r} for problem 1"):
            reward.grade_ids(Words(), problems, responses, False)


def test_a_response_that_was_cut_off_is_not_asked_about(monkeypatch):
    class Words:
        eos = (0,)

        def text(self, ids):
            return "#### 5"  # the same text, with an end and without

    asked = []
    monkeypatch.setattr(reward, "reward", lambda *arguments: asked.append(arguments) or 1.0)
    graded = reward.grade_ids(Words(), [{"id": 1, "answer": "5"}] * 3, [[5], [5, 0], [5]], False)
    assert [g["reward"] for g in graded] == [0, 1, 0] and len(asked) == 1
