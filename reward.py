r"""What is right: the reward of a response. Replace `reward` to train for something else.

    reward(problem, text) -> float        from 0 (wrong) to 1 (right)

The contract: the same arguments give the same number; it never raises, never hangs and never runs
model text in this process; several threads call it. problem is a line of problems.jsonl, text the
whole response. One that was cut off by the length has reward 0 and is not asked about. Right is
reward 1, nothing less.

A problem with an `answer` is graded by support/math_answers.py, whose docstring has the rules. A
problem with `tests` is a program to write, graded by running it in support/sandbox.py. Its tests
are of one of three kinds (further fields and their defaults: `TESTS` in support/sandbox.py):

    {"kind": "call", "entry": "f", "inputs": [[1, 2]], "outputs": [3]}      f(1, 2) returns 3 or 3.0
    {"kind": "stdin", "inputs": ["1 2\n"], "outputs": ["3\n"]}              it prints 3; white space
                                                                            does not count
    {"kind": "assert", "entry": "f", "code": "assert f(1, 2) == 3"}         sees what f returns

Two rewards that forks often want. A bonus for a short response:

    def reward(problem, text, unsafe=False):
        verdict, _ = grade(problem, text, unsafe)
        return 0.9 * (verdict == "right") + 0.1 * (len(text) < 200)

The share of tests that pass, of a program with `inputs` and `outputs`, in one run of it:

    def reward(problem, text, unsafe=False):
        tests, wanted = problem["tests"], problem["tests"]["outputs"]
        program = prediction_of(problem, text)
        _, values = sandbox(unsafe).run(tests | {"outputs": None}, program)
        return sum(v == w for v, w in zip(values or [], wanted)) / len(wanted)
"""

import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from model import LM
from support.cli import UserError
from support.math_answers import (
    exact_number,
    extract_answer,
    grade_answer,
    normalise,
    split_unit,
)
from support.programs import extract_program
from support.sandbox import CPUS, sandbox


def reward(problem: dict, text: str, unsafe: bool = False) -> float:
    """How good a response is, from 0 (wrong) to 1 (right). unsafe: run programs even where they
    cannot be walled off."""
    verdict, _ = grade(problem, text, unsafe)
    return 1.0 if verdict == "right" else 0.0


def grade(problem: dict, text: str, unsafe: bool = False) -> tuple[str, str | None]:
    """(verdict, prediction or None): right, wrong, no answer, timed out or error, and what was taken
    for the answer; a program is its own prediction."""
    if problem.get("tests"):
        program = prediction_of(problem, text)
        verdict, _ = sandbox(unsafe).run(problem["tests"], program)
        found = verdict, program
    else:
        found = grade_answer(problem["answer"], text)
        verdict, prediction = found
        tolerance = problem.get("tolerance")  # of a few problems of OlympiadBench
        if tolerance and verdict == "wrong" and is_near(problem["answer"], prediction, tolerance):
            found = "right", prediction
    judgements[problem.get("id"), text] = found
    return found


def is_near(gold: str, answer: str, tolerance: float) -> bool:
    """Are two numbers, of no different units, at most `tolerance` apart? 3.2, 3.27, 0.1 -> True"""
    (ours, unit), (theirs, other_unit) = (split_unit(normalise(x)) for x in (gold, answer))
    numbers = exact_number(ours), exact_number(theirs)
    if None in numbers or (unit and other_unit and unit != other_unit):
        return False
    return abs(numbers[0] - numbers[1]) <= Fraction(str(tolerance))


def prediction_of(problem: dict, text: str) -> str | None:
    """What a response gives as its answer, or its program; None if there is none."""
    if tests := problem.get("tests"):
        return extract_program(tests.get("setup", ""), text, tests.get("entry"))
    return extract_answer(text)


# ------------------------------------------------------------ how the stages call it

graders = ThreadPoolExecutor(CPUS)
os.register_at_fork(after_in_child=lambda: globals().update(graders=ThreadPoolExecutor(1)))
judgements = {}  # (problem's id, text): what `grade` found, until `judged` takes it


def judged(problem: dict, text: str, finished: bool, unsafe: bool) -> dict:
    """Reward, verdict and prediction of one response, graded once."""
    value = checked(reward(problem, text, unsafe), problem["id"]) if finished else 0
    found = judgements.pop((problem["id"], text), None)
    if found is None and not finished:
        found = grade(problem, text, unsafe)
        del judgements[problem["id"], text]
    if found is None:  # another reward, which did not ask `grade`
        prediction = prediction_of(problem, text)
        verdict = "right" if value == 1 else "wrong" if prediction else "no answer"
        found = verdict, prediction
    verdict, prediction = found
    line = {"text": text, "prediction": prediction, "correct": value == 1, "reward": value}
    return line | {"verdict": verdict, "finished": finished}


def grade_ids(lm: LM, problems: list[dict], responses: list[list[int]], unsafe: bool) -> list[dict]:
    """`judged` of each response, of its token ids; `finished`: it ended by itself.

    Identical responses to a problem are graded once, different ones several at a time.
    """
    keys = []  # of each response: (problem's id, text, did it end by itself)
    tasks = {}  # the different ones, each with its problem: what to grade
    for problem, ids in zip(problems, responses):
        keys.append((problem["id"], lm.text(ids), ids[-1] in lm.eos))
        tasks[keys[-1]] = problem

    def judge(key, problem) -> dict:
        _, text, finished = key
        return judged(problem, text, finished, unsafe)

    found = dict(zip(tasks, graders.map(judge, tasks, tasks.values())))
    return [dict(found[key]) for key in keys]


def checked(value, problem) -> float:
    """A reward from 0 to 1, with 0 and 1 as integers, as the files have them; UserError if it is none."""
    is_number = isinstance(value, int | float) and 0 <= value <= 1
    if not is_number:
        wrong = f"reward() gave {value!r} for problem {problem}; a number from 0 to 1 is wanted"
        raise UserError(f"reward.py: {wrong}")
    return int(value) if value in (0, 1) else float(value)
