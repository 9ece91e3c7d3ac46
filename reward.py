r"""What is right: the reward of a response, shared by sampling, labelling and evaluation.

    reward(problem, text) -> float        from 0 (wrong) to 1 (right); replace it for another reward

Read from top to bottom: the reward and how the stages call it; math answers; programs and their
sandbox. A verdict is one of right, wrong, no answer, timed out, error; only "right" is reward 1.

Rules for math answers, in order:
1. Equal after `normalise`: right.
2. Two plain numbers are compared as exact fractions; nothing is rounded (0.333 is not 1/3).
3. A unit may be missing on one side (5 cm, 5). Two measures that differ are wrong (5 cm, 5 km), and
   none is converted (45 cents, $0.45). A thing counted is no measure: 9 apples are 9 fruits.
4. Beside a percentage a number up to 1 is a share (50%, 0.5); above 1 it lost its sign (50%, 50).
5. Bases, times, ratios and words are right by rule 1 only: 2516_8 is neither 2516_7 nor 2516.
6. (1,2) and [1,2) are ordered, \{1,2\} and a bare 1,2 are not; kinds and lengths must agree.
7. What is left math-verify decides, part by part, with every decimal written as a fraction.

A problem with `tests` is a program to write, and all tests must pass. Its tests are of one of three
kinds (further fields and their defaults: `TESTS`):

    {"kind": "call", "entry": "f", "inputs": [[1, 2]], "outputs": [3]}      f(1, 2) returns 3 or 3.0
    {"kind": "stdin", "inputs": ["1 2\n"], "outputs": ["3\n"]}              it prints 3; white space
                                                                            does not count
    {"kind": "assert", "entry": "f", "code": "assert f(1, 2) == 3"}         sees what f returns

In assert tests f takes positional arguments only, and an exception of f ends them.

The sandbox (Linux, standard library). The tests stay in a judge process. A program runs in another,
a candidate, which gets the inputs one by one and returns plain values that the judge compares:
expected values never get there, so nothing printed, patched, raised or forged makes a pass. A
candidate sees no other process, no network and no file but /usr, /lib and Python's own folder, which
it can read; it has no privilege, an empty folder of 64 MB, limits of CPU time, memory, processes and
file size, and whatever it started dies with it. Where namespaces are not to be had (most containers),
root runs it as a user of no rights, who can harm no other process and read no private file, but
reaches the network and public files; the stage says so once. Where that fails too it asks for
--unsafe. What it does not keep out: bugs of the kernel, what timing tells, memory or disk bandwidth
used up. The tests' own code is trusted: in `assert` tests it runs in the judge.
"""

from concurrent.futures import ThreadPoolExecutor

from model import LM
from support.math_answers import grade_answer
from support.sandbox import CPUS, extract_program, sandbox

# ------------------------------------------------------------ the reward


def reward(problem: dict, text: str, unsafe: bool = False) -> float:
    """How good a response is, from 0 (wrong) to 1 (right). Replace this body for another reward.

    problem is a line of problems.jsonl, text the whole response; one that was cut off by the length
    has reward 0 and is not asked about. The contract: the same arguments give the same number; it
    never raises, never hangs and never runs model text in this process; several threads call it.
    unsafe: run programs even where they cannot be walled off.

    A bonus for a short response, say: return 0.9 * (verdict == "right") + 0.1 * (len(text) < 200)
    """
    verdict, _ = grade(problem, text, unsafe)
    return 1.0 if verdict == "right" else 0.0


def grade(problem: dict, text: str, unsafe: bool = False) -> tuple[str, str | None]:
    """(verdict, prediction or None) of a response; a program is its own prediction."""
    if tests := problem.get("tests"):
        program = extract_program(tests.get("setup", ""), text)
        verdict, _ = sandbox(unsafe).run(tests, program)
        return verdict, program
    return grade_answer(problem["answer"], text)


graders = ThreadPoolExecutor(CPUS)


def grade_ids(lm: LM, problems: list[dict], responses: list[list[int]], unsafe: bool) -> list[dict]:
    """Text, prediction, verdict and reward of each response; `finished`: it ended by itself.

    Identical responses to a problem are graded once, different ones several at a time.
    """
    keys = []  # of each response: (problem's id, text, did it end by itself)
    tasks = {}  # the different ones, each with its problem: what to grade
    for problem, ids in zip(problems, responses):
        keys.append((problem["id"], lm.text(ids), ids[-1] in lm.eos))
        tasks[keys[-1]] = problem

    def judged(key, problem):
        _, text, finished = key
        judgement = grade(problem, text, unsafe)
        return judgement, reward(problem, text, unsafe) if finished else 0.0

    found = dict(zip(tasks, graders.map(judged, tasks, tasks.values())))
    graded = []
    for key in keys:
        _, text, finished = key
        (verdict, prediction), value = found[key]
        line = {"text": text, "prediction": prediction, "correct": value >= 0.5}
        line["reward"] = int(value) if value in (0, 1) else value  # 0 and 1 are written as such
        graded.append(line | {"verdict": verdict, "finished": finished})
    return graded
