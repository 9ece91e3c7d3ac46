"""The loaders of code data sets, on single rows copied from the sets (sources named) or made up where it says so."""

import base64
import gzip
import json
import pickle
import zlib

import pytest

import reward
import support.datasets
from support.cli import UserError
from support.datasets import load_set

# openai/human-eval, MIT
HUMANEVAL = {
    "task_id": "HumanEval/53",
    "prompt": 'def add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n    >>> add(5, 7)\n    12\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return x + y\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    import random\n\n    assert candidate(0, 1) == 1\n    assert candidate(1, 0) == 1\n",
}
PLUS = HUMANEVAL | {
    "base_input": [[0, 1], [2, 3]],
    "plus_input": [[1.5, 2]],
    "atol": 0,
}  # evalplus, Apache-2.0

# google-research MBPP, CC BY 4.0
MBPP = {
    "text": "Write a function to find the shared elements from the given two lists.",
    "code": "def similar_elements(test_tup1, test_tup2):\r\n  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
    "task_id": 2,
    "test_setup_code": "",
    "test_list": [
        "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
        "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
    ],
}
# evalplus MBPP+, Apache-2.0; inputs cut
MBPP_PLUS = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nWrite a function to find the shared elements from the given two lists.\nassert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "\ndef similar_elements(test_tup1, test_tup2):\n  return tuple(set(test_tup1) & set(test_tup2))\n",
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "plus_input": [[["a", "b"], ["b", "a"]]],
    "atol": 0,
    "assertion": "\nassert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n",
}
POLAR = {  # evalplus MBPP+ 252, inputs cut
    "task_id": "Mbpp/252",
    "prompt": '"""\nWrite a function to convert complex numbers to polar coordinates.\nassert convert(1) == (1.0, 0.0)\n"""\n',
    "entry_point": "convert",
    "canonical_solution": "\nimport cmath  \ndef convert(numbers):    \n  return cmath.polar(numbers)  \n",
    "base_input": [[1]],
    "plus_input": [["(1+2j)"]],
    "atol": 0,
    "assertion": "\nassert convert(1) == (1.0, 0.0)\n",
}
# BAAI TACO, Apache-2.0; solutions cut
TACO = {
    "question": "Complete the function that removes the smallest.",
    "solutions": [
        "def min_and_max(l, d, x):\n\tlst = [n for n in range(l, d + 1) if sum(map(int, str(n))) == x]\n\treturn (min(lst), max(lst))\n"
    ],
    "starter_code": "def min_and_max(l, d, x):\n\t",
    "input_output": {
        "fn_name": "min_and_max",
        "inputs": [[100, 200, 10], [123, 456, 5]],
        "outputs": [[[109, 190]], [[131, 410]]],
    },
}
# APPS 4184, MIT; the solution is ours
APPS_CALL = {
    "question": "Is n prime?",
    "input_output": '{"fn_name": "is_prime", "inputs": [[1], [2], [-1]], "outputs": [[false], [true], [false]]}',
    "solutions": '["def is_prime(n): return n > 1 and all(n % d for d in range(2, n))"]',
    "starter_code": "def is_prime(n):\n\t",
}
# made up
STDIN = {
    "question": "Double n.",
    "input_output": {"inputs": ["1\n", ["2", ""]], "outputs": ["2\n", ["4"]]},
    "solutions": ["print 2", "print(2 * int(input()))"],
    "starter_code": "",
}
LIST_OF_ONE = STDIN | {
    "input_output": {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]},
    "solutions": ["def f(x): return [x]"],
}
LIVE = {  # the layout of livecodebench/code_generation_lite; the problem is made up
    "question_id": "2727",
    "question_content": "Count.",
    "starter_code": "class Solution:\n    def count(self, details: List[str]) -> int:\n        ",
    "public_test_cases": json.dumps(
        [{"input": '["a", "b"]', "output": "2", "testtype": "functional"}]
    ),
    "metadata": '{"func_name": "count"}',
}
PRIVATE = json.dumps([{"input": "[]", "output": "0", "testtype": "functional"}])
OWN = {
    "prompt": "Write f.",
    "tests": {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2]},
}


CALL = OWN["tests"]
ASSERT = {"kind": "assert", "entry": "f", "code": "assert f(1) == 2"}
OWN_BROKEN = [
    ("assert f(1) == 2", "its tests are no JSON object"),
    (CALL | {"input": []}, "tests have no field input"),
    (CALL | {"kind": "cal"}, "its tests' kind does not fit kind cal"),
    ({"kind": "call", "entry": "f"}, "its tests have no inputs"),
    (CALL | {"entry": None}, "its tests have no entry"),
    (ASSERT | {"code": ""}, "its tests have no code"),
    (CALL | {"outputs": None}, "its tests' outputs does not fit kind call"),
    (CALL | {"inputs": [1]}, "its tests' inputs does not fit kind call"),
    (CALL | {"outputs": [2, 3]}, "it has not as many outputs as inputs"),
    (
        {"kind": "stdin", "inputs": ["1"], "outputs": [1]},
        "its tests' outputs does not fit kind stdin",
    ),
    (CALL | {"seconds": "4"}, "its tests' seconds does not fit kind call"),
    (CALL | {"megabytes": 64.5}, "its tests' megabytes does not fit kind call"),
    (CALL | {"seconds": -1}, "its seconds and megabytes must be above 0, its atol not below"),
    (CALL | {"megabytes": 0}, "its seconds and megabytes must be above 0, its atol not below"),
    (ASSERT | {"code": "assert f(1) =="}, "its setup or code is no Python: invalid syntax"),
    (CALL | {"setup": "return 1"}, "its setup or code is no Python: 'return' outside function"),
]


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def load(tmp_path, name, row, file="test.jsonl"):
    (tmp_path / file).write_text(json.dumps(row) + "\n")
    return load_set(name, tmp_path / file, unsafe=True)


# set, row, id, a right program, a wrong one
ROWS = [
    ("humaneval", HUMANEVAL, "humaneval/test/53", "def add(x, y): return x + y", "def add(x, y): return x"),
    ("humaneval_plus", PLUS, "humaneval_plus/test/53", "def add(x, y): return x + y", "def add(x, y): return int(x + y)"),
    ("mbpp", MBPP, "mbpp/prompt/2", "def similar_elements(a, b): return tuple(sorted({*a} & {*b}))", "def similar_elements(a, b): return a"),
    ("mbpp_plus", MBPP_PLUS, "mbpp_plus/test/2", "def similar_elements(a, b): return (*{*b} & {*a},) * 2", "def similar_elements(a, b): return a"),
    ("mbpp_plus", POLAR, "mbpp_plus/test/252", "def convert(z):\n import cmath\n return abs(z), cmath.phase(z)", "def convert(z): return abs(z), 0.0"),
    ("taco", TACO, "taco/test/0", TACO["solutions"][0].replace("(min", "[min").replace("(lst))", "(lst)]"), "def min_and_max(l, d, x): return l, d"),
    ("apps", APPS_CALL, "apps/test/0", json.loads(APPS_CALL["solutions"])[0], "def is_prime(n): return n == 2 or None"),
    ("apps", STDIN, "apps/test/0", "print(int(input()) + 1, end='') if 0 else print(2 * int(input()))", "print(2)"),
    ("apps", LIST_OF_ONE, "apps/test/0", "def f(x): return [x]", "def f(x): return x"),
    ("livecodebench", LIVE, "livecodebench/test/2727", "class Solution:\n def count(self, details: List[str]): return len(details)", "def count(d): return 3"),
    ("livecodebench", LIVE | {"private_test_cases": packed(PRIVATE)}, "livecodebench/test/2727", "def count(d): return len(d)", "def count(d): return 2"),
    ("jsonl", OWN, "jsonl/test/0", "def f(x): return 2", "def f(x): return 1"),
]  # fmt: skip


@pytest.mark.parametrize("name, row, row_id, right, wrong", ROWS)
def test_row(tmp_path, name, row, row_id, right, wrong):
    (problem,), left_out = load(tmp_path, name, row)
    assert not left_out
    assert problem.keys() == {"id", "source", "domain", "prompt", "answer", "tests"}
    assert (problem["id"], problem["source"], problem["domain"], problem["answer"]) == (
        row_id,
        name,
        "code",
        None,
    )
    problem = json.loads(json.dumps(problem))  # as it will be read back
    texts = [right, f"```\n{wrong}\n```", "?"]
    grades = [reward.grade(problem, text, unsafe=True) for text in texts]
    assert grades == [("right", right), ("wrong", f"{wrong}\n"), ("no answer", None)]


class Harmful:
    def __reduce__(self):
        return print, ("unpickled!",)


@pytest.mark.parametrize(
    "name, row, reason",
    [
        (
            "mbpp",
            MBPP | {"test_list": ["assert similar_elements((3,), (3,)) == (4,)"]},
            "its own solution: wrong",
        ),
        (
            "humaneval_plus",
            PLUS | {"canonical_solution": "    raise ValueError"},
            "its own solution: error",
        ),
        (
            "humaneval_plus",
            PLUS | {"canonical_solution": "    return object()"},
            "its own solution: wrong",
        ),
        ("apps", STDIN | {"solutions": "[]"}, "no solution"),
        ("apps", STDIN | {"input_output": ""}, "no tests"),
        (
            "livecodebench",
            LIVE | {"private_test_cases": packed(Harmful())},
            "its private tests ask for builtins.print",
        ),
        *[("jsonl", OWN | {"tests": tests}, reason) for tests, reason in OWN_BROKEN],
    ],
)
def test_left_out(tmp_path, name, row, reason, capsys):
    problems, ((row_id, found),) = load(tmp_path, name, row)
    assert not problems and row_id.startswith(name) and found == reason
    assert "unpickled" not in capsys.readouterr().out


def test_types_come_back(tmp_path):
    (problem,), _ = load(tmp_path, "mbpp_plus", MBPP_PLUS)
    assert problem["tests"]["inputs"][1] == [{"!tuple": ["a", "b"]}, {"!tuple": ["b", "a"]}]
    (problem,), _ = load(tmp_path, "mbpp_plus", POLAR)
    assert problem["tests"]["outputs"][0] == {"!tuple": [1.0, 0.0]}


def test_apps_folders_and_packed_files(tmp_path):
    folder = tmp_path / "train" / "0001"
    folder.mkdir(parents=True)
    (folder / "question.txt").write_text("Double n.")
    (folder / "input_output.json").write_text(json.dumps(STDIN["input_output"]))
    (folder / "solutions.json").write_text(json.dumps(STDIN["solutions"]))
    (problem,), left_out = load_set("apps", tmp_path / "train", unsafe=True)
    assert (
        problem["id"] == "apps/train/0" and "standard input" in problem["prompt"] and not left_out
    )
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert len(load_set("humaneval", tmp_path / "x.jsonl.gz", unsafe=True)[0]) == 1


def test_another_layout_is_an_error(tmp_path):
    with pytest.raises(UserError, match="test.jsonl.*prompt.*tests"):
        load(tmp_path, "jsonl", {"question": "?"})


def test_a_list_of_one_answer_is_that_answer(tmp_path):
    rows = [{"prompt": "a", "answer": ["34"]}, {"prompt": "b", "answer": ["3", "4"]},
            {"prompt": "c", "answer": {"x": 1}}, {"prompt": "d", "answer": 5}, {"prompt": "e", "answer": [7]}]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    used, left_out = load_set("jsonl", path)
    assert [r["answer"] for r in used] == ["34", "5", "7"]
    assert [reason for _, reason in left_out] == [
        "its answer is no text or number but a list", "its answer is no text or number but a dict"]  # fmt: skip


def test_a_csv_is_a_data_set(tmp_path):
    path = tmp_path / "own.csv"
    tests = json.dumps({"kind": "stdin", "inputs": ["1"], "outputs": ["2"]}).replace('"', '""')
    path.write_text(f'prompt,answer,tests\n"What is ""1"", 2\nand 3?",6,\nAdd one.,,"{tests}"\n')
    used, left_out = load_set("jsonl", path)
    assert left_out == [] and [r["prompt"] for r in used] == ['What is "1", 2\nand 3?', "Add one."]
    assert used[0]["answer"] == "6" and used[1]["tests"]["outputs"] == ["2"]
    path.write_text("prompt,answer\na,1,2\n")
    with pytest.raises(UserError, match="own.csv:2: as many fields as in the first line"):
        load_set("jsonl", path)


def test_olympiadbench_names_a_tolerance(tmp_path):
    row = {"question": "q", "context": None, "final_answer": ["3.2"], "unit": "cm", "error": "1e-1"}
    path = tmp_path / "o.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"error": None}) + "\n")
    used, _ = load_set("olympiadbench", path)
    assert used[0]["tolerance"] == 0.1 and "tolerance" not in used[1]
    assert reward.grade(used[0], r"\boxed{3.27 \text{ cm}}")[0] == "right"
    assert reward.grade(used[1], r"\boxed{3.27 \text{ cm}}")[0] == "wrong"


def test_what_leetcode_s_users_need_not_import():
    """Modules and the names out of them, and no builtin is hidden; a program's own names come first."""
    names = "math.inf, collections.Counter, heapq.heappop, functools.lru_cache, bisect.bisect_left, re.sub"
    names += ", operator.add, random.random, inf, Counter, heappush, deque, List[int], accumulate, gcd, deepcopy"
    names += (
        ", datetime.datetime, string.ascii_lowercase, sys.maxsize, cache, itemgetter, PriorityQueue"
    )
    program = f"""
def f(x):
    assert all([{names}])
    assert pow(2, 10, 1000) == 24 and sum([1]) == 1 and abs(-1) == max(1, 0) == len([0])
    assert round(2.5) == 2 and open.__module__ in ("io", "_io") and compile("1", "", "eval")
    return gcd(x)
def gcd(x): return x + 1
"""
    tests = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2]}
    problem = {"id": 1, "tests": tests | {"setup": support.datasets.LEETCODE}}
    assert reward.grade(problem, program, True)[0] == "right"
