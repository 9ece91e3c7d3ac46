r"""What is right: the reward of a response. Replace `reward` to train for something else.

    reward(problem, text, unsafe=False) -> float        from 0 (wrong) to 1 (right)

The contract: the same arguments give the same number; it never raises, never hangs and never runs
model text in this process; several threads call it. problem is a line of problems.jsonl, text the
whole response; unsafe matters only to rewards that run programs. A response that was cut off by the
length has reward 0 and is not asked about. Accuracy counts reward 1 alone.

A problem with an `answer` is graded by support/math_answers.py, whose docstring has the rules. A
problem with `tests` asks for a program, and support/sandbox.py runs it. Tests are of three kinds
(further fields and their defaults: `TESTS` in support/sandbox.py):

    {"kind": "call", "entry": "f", "inputs": [[1, 2]], "outputs": [3]}      f(1, 2) returns 3 or 3.0
    {"kind": "stdin", "inputs": ["1 2\n"], "outputs": ["3\n"]}              it prints 3; white space
                                                                            does not count
    {"kind": "assert", "entry": "f", "code": "assert f(1, 2) == 3"}         sees what f returns

Two rewards that forks often want. A bonus for a response that is shorter than most (choose the length
by your own responses; right then means right and short):

    def reward(problem, text, unsafe=False):
        verdict, _ = grade(problem, text, unsafe)
        return 0.9 * (verdict == "right") + 0.1 * (len(text) < 200)

The share of a program's tests that pass:

    def reward(problem, text, unsafe=False):
        program = prediction_of(problem, text)
        _, passed = sandbox(unsafe).run(problem["tests"], program, each=True)
        return sum(passed) / len(passed) if passed else 0.0
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from model import LM
from support.cli import UserError
from support.math_answers import extract_answer, grade_answer
from support.programs import extract_program
from support.sandbox import CPUS, sandbox


def reward(problem: dict, text: str, unsafe: bool = False) -> float:
    """How good a response is, from 0 (wrong) to 1 (right). unsafe: run programs even where they
    cannot be walled off."""
    verdict, _ = grade(problem, text, unsafe)
    return 1.0 if verdict == "right" else 0.0


def grade(problem: dict, text: str, unsafe: bool = False) -> tuple[str, str | None]:
    """(verdict, prediction or None): right, wrong, no answer, timed out or error, and what was taken
    for the answer; a program is its own prediction. This is left in `latest` too, so that
    `judged` need not run a program twice."""
    if problem.get("tests"):
        program = prediction_of(problem, text)
        verdict, _ = sandbox(unsafe).run(problem["tests"], program)
        latest.judgement = verdict, program
    else:  # a few problems of OlympiadBench say how far an answer may be off
        tolerance = problem.get("tolerance") or 0
        latest.judgement = grade_answer(problem["answer"], text, tolerance)
    return latest.judgement


def prediction_of(problem: dict, text: str) -> str | None:
    """What a response gives as its answer, or its program; None if there is none."""
    if tests := problem.get("tests"):
        return extract_program(tests.get("setup", ""), text, tests.get("entry"))
    return extract_answer(text)


# ------------------------------------------------------------ how the stages call it

graders = ThreadPoolExecutor(CPUS)
# A forked worker has none of its parent's threads.
os.register_at_fork(after_in_child=lambda: globals().update(graders=ThreadPoolExecutor(1)))
latest = threading.local()  # .judgement: what `grade` found last in this thread


def grade_ids(lm: LM, problems: list[dict], responses: list[list[int]], unsafe: bool) -> list[dict]:
    """`judged` of each response, of its token ids; `finished`: it ended by itself.

    Identical responses to a problem are graded once, different ones several at a time.
    """
    keys = []  # of each response: (problem's id, text, did it end by itself)
    tasks = {}  # the different ones, each with its problem: what to grade
    for problem, ids in zip(problems, responses):
        keys.append((problem["id"], lm.text(ids), ids[-1] in lm.eos))
        tasks[keys[-1]] = problem

    def judge(job: list) -> list[dict]:
        return [judged(problem, text, ended, unsafe) for (_, text, ended), problem in job]

    # To hand one answer to a thread takes longer than to grade it, but a program takes its time.
    size = 1 if any(problem.get("tests") for problem in problems) else 16
    items = list(tasks.items())
    jobs = [items[k : k + size] for k in range(0, len(items), size)]
    found = dict(zip(tasks, chain.from_iterable(graders.map(judge, jobs))))
    return [dict(found[key]) for key in keys]


def judged(problem: dict, text: str, finished: bool, unsafe: bool) -> dict:
    """Reward, verdict and prediction of one response, by one call of `reward`. The verdict is what
    `grade` found in that call, but "right" exactly where the reward is 1."""
    latest.judgement = None
    value = checked(reward(problem, text, unsafe), problem["id"]) if finished else 0
    if latest.judgement:
        verdict, prediction = latest.judgement
    else:  # cut off, or a reward of another kind
        prediction = prediction_of(problem, text)
        verdict = "no answer" if prediction is None else "wrong"
    if value == 1 or verdict == "right":
        verdict = "right" if value == 1 else "wrong"
    line = {"text": text, "prediction": prediction, "correct": value == 1, "reward": value}
    return line | {"verdict": verdict, "finished": finished}


def checked(value, problem_id) -> float:
    """A reward as files have it, 0 and 1 as integers; UserError if it is no number from 0 to 1."""
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        wrong = f"reward() gave {value!r} for problem {problem_id}"
        raise UserError(f"reward.py: {wrong}; a Python number from 0 to 1 is wanted")
    value = round(float(value), 9)  # .7 + .2 + .1 is 0.9999999999999999, and right is 1
    return int(value) if value in (0, 1) else value
