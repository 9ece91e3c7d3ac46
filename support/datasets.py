"""Reads data sets in their native files as problems and demonstrations. It knows nothing of the algorithm.

A converter per set turns a row into a prompt and an answer, or tests; `LOADERS` lists them, and a new
set is one more row there. Rows that cannot be used are left out with a reason, and counted.
"""

import ast
import base64
import csv
import gzip
import io
import json
import math
import pickle
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from support.cli import UserError, first_line
from support.judge import encode
from support.math_answers import exact_number, extract_answer
from support.records import dump, is_number, wrong_field
from support.sandbox import TESTS, Sandbox, sandbox

INSTRUCTIONS = {  # by the kind of answer
    "boxed": r"Please reason step by step, and put your final answer within \boxed{}.",
    "program": "Write it in Python, in one ```python block.",
    "####": 'Solve it step by step, one step a line. The last line is "#### " and the answer.',
}


class LeftOut(Exception):
    """A row that cannot be used; the message is the reason."""


class Loader(NamedTuple):
    """How to read a data set. For another one write a converter and give it a row in LOADERS:

    def quiz(row): return {"prompt": row["text"], "answer": row["solution"]}
    LOADERS["quiz"] = Loader("text solution", quiz)        # python prepare.py --train quiz:FILE
    """

    fields: str  # that every row must have; a/b: one of them
    convert: Callable[[dict], dict]  # row -> prompt, and answer, tests, readings or response
    kind: str = "boxed"  # which of INSTRUCTIONS is put after the prompt; "": none


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl, .jsonl.gz, .csv, .json (a list, or a dict of columns) or .parquet file; of a
    folder with a JSON file for each row (MATH), or a folder for each in which every field is a
    file (APPS)."""
    path = Path(path)
    if path.is_dir():
        if not any(path.glob("*/question.txt")):
            return rows_of_files(sorted(path.rglob("[!.]*.json")), path)  # not our own .sha256.json
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        return [{file.stem: file.read_text("utf-8") for file in f.iterdir()} for f in folders]
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: no parquet file that can be read ({first_line(e)})") from None
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    if path.name.removesuffix(".gz").endswith(".csv"):
        return csv_rows(path, text)
    whole = path.name.removesuffix(".gz").endswith(".json")
    rows = []
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            wanted = "" if whole else "; one JSON object a line is wanted"
            raise UserError(f"{path}:{number + error.lineno - 1}: {error.msg}{wanted}") from None
        except RecursionError:
            raise UserError(
                f"{path}:{number}: nested too deeply; is this the right file?"
            ) from None
    rows = rows[0] if whole and rows else rows
    if isinstance(rows, dict) and all(isinstance(column, list) for column in rows.values()):
        with suppress(ValueError):  # columns of different lengths
            rows = [dict(zip(rows, values)) for values in zip(*rows.values(), strict=True)]
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: no rows, or rows that are not JSON objects")
    return rows


def rows_of_files(files: list[Path], path: Path) -> list[dict]:
    """The row that is in each JSON file of a folder."""
    rows = []
    for file in files:
        try:
            rows.append(json.loads(file.read_text("utf-8")))
        except ValueError as error:  # no UTF-8, or no JSON
            raise UserError(f"{file}: {first_line(error)}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: a folder with no rows, or with files that hold no JSON object")
    return rows


def csv_rows(path: Path, text: str) -> list[dict]:
    """A CSV's rows: its first line names the fields; a field that holds a JSON object is read as one."""
    table = csv.DictReader(io.StringIO(text), strict=True)
    rows = []
    csv.field_size_limit(1 << 30)  # of tests
    try:
        for row in table:
            if None in row or None in row.values():
                wrong = f"as many fields as in the first line are wanted, {len(table.fieldnames)}"
                raise UserError(f"{path}:{table.line_num}: {wrong}")
            tests = row.get("tests") or ""
            rows.append(row | ({"tests": json.loads(tests)} if tests.startswith("{") else {}))
    except (csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path}:{table.line_num}: {error}") from None
    if not rows:
        raise UserError(f"{path}: no rows under its first line")
    return rows


def boxed(row: dict) -> dict:
    """MATH and Minerva: the gold answer is in the solution's last box."""
    if not re.search(r"\\(boxed|fbox)", row["solution"]):
        raise LeftOut("no box in the solution")
    return {"prompt": row["problem"], "answer": extract_answer(row["solution"])}


def olympiadbench(row: dict) -> dict:
    """Several final answers are one list; the unit is a field of its own, and so is how far an answer
    may be off ("1e-1"; of several answers one number each, of which the least is taken)."""
    question = "\n".join(part for part in (row["context"], row["question"]) if part)
    answer, unit = ", ".join(row["final_answer"] or []), row["unit"] or ""
    unit = unit if not unit or "\\" in unit else rf"\text{{ {unit}}}"
    record = {"prompt": question, "answer": f"{answer} {unit}" if answer else ""}
    if row.get("error"):
        record["tolerance"] = min(float(part) for part in str(row["error"]).split(","))
    return record


def mawps(row: dict) -> dict:
    """43.0 -> 43; 0.6666666667 -> 2/3, because it is rounded and numbers are compared exactly."""
    fraction = Fraction(row["target"]).limit_denominator(1000)
    rounded = 0 < abs(fraction - Fraction(str(row["target"]))) < 1e-9
    return {"prompt": row["input"], "answer": str(fraction) if rounded else f"{row['target']:.10g}"}


def asdiv(row: dict) -> dict:
    return {"prompt": f"{row['body'].strip()} {row['question'].strip()}", "answer": row["answer"]}


def gsm8k(row: dict) -> dict:
    if "####" not in row["answer"]:
        raise LeftOut("no ####")
    return {"prompt": row["question"], "answer": row["answer"].rpartition("####")[2]}


def taken(**names: str) -> Callable[[dict], dict]:
    """A converter that only renames: taken(prompt="problem") takes a row's problem as prompt."""
    return lambda row: {new: row[old] for new, old in names.items()}


# Sets of programs. Their converters give readings of the tests, of which one is to hold, and the
# row's own solutions, one of which must pass (keep_solved); or tests that are taken on trust.
# What LeetCode's users need not import, as in LiveCodeBench's own grader: all names of these modules,
# then the builtins that some of them hide (math's pow takes no modulus), then the modules themselves.
MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools"
)
MODULES += " operator io sys json queue"
STARS = [f"from {name} import *" for name in [*MODULES.split(), "builtins", "typing"]]
LEETCODE = "\n".join([*STARS, *(f"import {name}" for name in MODULES.split())])
STDIN = "Read standard input and print the answer."


def apps(row: dict) -> dict:
    """APPS and TACO, whose outputs may or may not be wrapped in a list."""
    cases, solutions = parsed(row["input_output"]), parsed(row["solutions"])
    if not cases.get("inputs") or not solutions:
        raise LeftOut("no solution" if cases.get("inputs") else "no tests")
    name, inputs, outputs = cases.get("fn_name"), cases["inputs"], cases["outputs"]
    if name:
        tests = {"kind": "call", "entry": name, "setup": LEETCODE, "inputs": inputs}
        ways = [outputs]
        if all(isinstance(value, list) and len(value) == 1 for value in outputs):
            ways.insert(0, [value[0] for value in outputs])
    else:
        tests = {"kind": "stdin", "setup": "", "inputs": [lines(x) for x in inputs]}
        ways = [[lines(x) for x in outputs]]
    readings = []
    for wanted in ways:
        readings.append(tests | {"atol": 1e-6, "outputs": [as_json(value) for value in wanted]})
    how = f"Write the function {name}." if name else STDIN
    prompt = f"{row['question'].strip()}\n\n{how}\n{row.get('starter_code') or ''}".rstrip()
    return {"prompt": prompt, "readings": readings, "solutions": solutions}


def parsed(value):
    """A field that holds JSON as text in the original, and as itself in some copies."""
    return json.loads(value or "{}") if isinstance(value, str) else value


def lines(text: str | list[str]) -> str:
    return "\n".join(text) if isinstance(text, list) else text


def as_json(value):
    """A JSON value as an output. A tuple will do for a list, since JSON writes both alike."""
    return {"!json": value} if isinstance(value, (list, dict)) else value


def program(problem_id: str, prompt: str, tests: dict, solution: str) -> dict:
    return {"id": problem_id, "prompt": prompt, "readings": [tests], "solutions": [solution]}


def humaneval(row: dict) -> dict:
    prompt, name, number = row["prompt"], row["entry_point"], row["task_id"].split("/")[1]
    tests = {"kind": "assert", "entry": name, "setup": prompt}
    tests["code"] = f"{row['test']}\ncheck({name})"
    return program(f"humaneval/test/{number}", prompt, tests, prompt + row["canonical_solution"])


def mbpp(row: dict) -> dict:
    number, asserts = row["task_id"], "\n".join(row["test_list"])
    splits = {"prompt": 10, "test": 510, "validation": 600, "train": 974}  # their last task_id
    split = next(split for split, last in splits.items() if number <= last)
    names = re.findall(r"^def (\w+)", row["code"], re.MULTILINE)
    called = [name for name in names if re.search(rf"\b{name}\(", asserts)]
    if not called:
        raise LeftOut("its tests call none of its functions")
    setup = f"import math, sys\n{row['test_setup_code']}"
    tests = {"kind": "assert", "entry": called[0], "setup": setup, "code": asserts}
    prompt = f"{row['text'].strip()}\nYour code should pass these tests:\n{asserts}"
    return program(f"mbpp/{split}/{number}", prompt, tests, row["code"])


def plus(row: dict) -> dict:
    """HumanEval+ and MBPP+: the expected values are what the reference solution returns.

    An MBPP+ row has an `assertion`; a HumanEval+ row has none, and its prompt opens the function.
    """
    name, number = row["entry_point"], row["task_id"].split("/")[1]
    asserts = row.get("assertion") or ""
    inputs = row["base_input"] + list(row["plus_input"])
    if asserts:
        inputs = restored(inputs, literal_calls(asserts, name), number)
    # Some tasks have more than one right answer: for those a line of code says what is right.
    kind, code = "call", ""
    if "assert set(" in row["prompt"]:
        code = f"for i, o in zip(inputs, outputs): assert set({name}(*i)) == set(o)"
    elif f"assert not {name}(" in asserts:
        code = f"for i, o in zip(inputs, outputs): assert bool({name}(*i)) == bool(o)"
    elif name == "find_zero":
        code = f"for i in inputs: assert abs(poly(*i, {name}(*i))) <= {row['atol']}"
    if code:
        kind = "assert"
    start = "" if asserts else row["prompt"]
    tests = {"kind": kind, "entry": name, "setup": start, "code": code}
    tests["inputs"] = [encode(arguments) for arguments in inputs]
    tests |= {"outputs": None, "atol": row["atol"] or 1e-6}
    problem_id = f"{'mbpp' if asserts else 'humaneval'}_plus/test/{number}"
    return program(problem_id, row["prompt"], tests, start + row["canonical_solution"])


def restored(inputs: list, calls: list[list], number: str) -> list:
    """MBPP+'s inputs as they were before JSON made lists of tuples and sets, and text of complex
    numbers: an argument becomes what the assertions' calls have in its place."""
    if number in ("124", "252"):
        return [[complex(argument) for argument in arguments] for arguments in inputs]
    if not calls:
        return inputs
    examples = list(zip(*calls))  # the values that the calls pass, a tuple a parameter
    whole = []
    for arguments in inputs:
        whole.append([like(value, seen) for value, seen in zip(arguments, examples)])
    return whole


def literal_calls(assertions: str, name: str) -> list[list]:
    """The arguments of the calls of `name`, where they are literals."""
    calls = []
    for node in ast.walk(ast.parse(assertions)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
            with suppress(ValueError):
                calls.append([ast.literal_eval(argument) for argument in node.args])
    return calls


def like(value, examples):
    """A JSON value with its lists turned into what the examples have in their place."""
    if isinstance(value, dict):
        inside = [item for e in examples if isinstance(e, dict) for item in e.values()]
        return {key: like(item, inside) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    alike = [e for e in examples if isinstance(e, (list, tuple, set))]
    items = [like(item, [inner for e in alike for inner in e]) for item in value]
    return type(alike[0])(items) if alike else items


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise LeftOut(f"its private tests ask for {module}.{name}")


def livecodebench(row: dict) -> dict:
    """The public tests and the private ones: JSON, or JSON pickled, zipped, in base64."""
    private = row.get("private_test_cases") or "[]"
    if not private.startswith("["):
        packed = zlib.decompress(base64.b64decode(private))
        private = PlainUnpickler(io.BytesIO(packed)).load()
    cases = json.loads(row["public_test_cases"]) + json.loads(private)
    name = json.loads(row["metadata"]).get("func_name")
    tests = {"kind": "stdin", "entry": name, "atol": 1e-6}
    inputs = [case["input"] for case in cases]
    outputs = [case["output"] for case in cases]
    if name:
        tests |= {"kind": "call", "setup": LEETCODE}
        inputs = [[json.loads(line) for line in text.split("\n")] for text in inputs]
        outputs = [as_json(json.loads(text)) for text in outputs]
    how = f"Complete this:\n{row['starter_code']}" if name else STDIN
    return {
        "id": f"livecodebench/test/{row['question_id']}",
        "prompt": f"{row['question_content'].strip()}\n\n{how}",
        "tests": tests | {"inputs": inputs, "outputs": outputs},
    }


OWN = {  # what the tests of a user's line have, by kind
    "call": ("entry", "inputs"),
    "stdin": ("inputs",),
    "assert": ("entry", "code"),
}


def wrong_test_field(tests: dict) -> str | None:
    """The first field of a user's tests that does not fit their kind; None if all do."""

    def is_list_of(items, kind: type) -> bool:
        return isinstance(items, list) and all(isinstance(item, kind) for item in items)

    inputs, outputs = tests["inputs"], tests["outputs"]
    texts = ("setup", "code") if tests["kind"] == "stdin" else ("setup", "code", "entry")
    checks = {name: isinstance(tests[name], str) for name in texts}
    if tests["kind"] == "call":
        checks |= {"inputs": is_list_of(inputs, list), "outputs": isinstance(outputs, list)}
    elif tests["kind"] == "stdin":
        checks |= {"inputs": is_list_of(inputs, str), "outputs": is_list_of(outputs, str)}
    elif tests["kind"] != "assert":
        return "kind"
    checks |= {name: is_number(tests[name]) for name in ("atol", "seconds")}
    return wrong_field(checks | {"megabytes": type(tests["megabytes"]) is int})


def own(row: dict) -> dict:
    """A user's line: an answer, or tests."""
    tests = row.get("tests")
    if not tests:
        answer = row.get("answer")
        if isinstance(answer, list) and len(answer) == 1:
            (answer,) = answer
        if not isinstance(answer, str | int | float | None) or isinstance(answer, bool):
            raise LeftOut(f"its answer is no text or number but a {type(answer).__name__}")
        return {"prompt": row["prompt"], "answer": answer}
    if not isinstance(tests, dict):
        raise LeftOut("its tests are no JSON object")
    if unknown := tests.keys() - TESTS.keys():
        raise LeftOut(f"tests have no field {', '.join(sorted(unknown))}")
    tests = TESTS | tests
    fields = OWN.get(str(tests["kind"]), ("kind",))
    if empty := [name for name in fields if not tests[name]]:
        raise LeftOut(f"its tests have no {empty[0]}")
    if bad := wrong_test_field(tests):
        raise LeftOut(f"its tests' {bad} does not fit kind {tests['kind']}")
    if "inputs" in fields and len(tests["inputs"]) != len(tests["outputs"]):
        raise LeftOut("it has not as many outputs as inputs")
    if not (0 < tests["seconds"] < math.inf and tests["megabytes"] > 0 and tests["atol"] >= 0):
        raise LeftOut("its seconds and megabytes must be above 0, its atol not below")
    try:
        compile(f"{tests['setup']}\n{tests['code']}", "tests", "exec")
    except SyntaxError as error:
        raise LeftOut(f"its setup or code is no Python: {error.msg}") from None
    return {"prompt": row["prompt"], "domain": "code", "tests": tests}


def first_passing(problem: dict, box: Sandbox) -> tuple[str, dict | None]:
    """("right", the first reading of the tests that one of the first three solutions passes), or
    the verdict on the last try and None.

    A reading without outputs gets those that the first solution returns.
    """
    verdict = "no answer"
    for tests in problem["readings"]:
        if tests.get("outputs", "") is None:
            verdict, values = box.run(tests | {"kind": "call"}, problem["solutions"][0])
            if verdict != "right":
                return verdict, None
            tests = tests | {"outputs": values}
        for solution in problem["solutions"][:3]:
            verdict, _ = box.run(tests, solution)
            if verdict == "right":
                return "right", tests
    return verdict, None


def keep_solved(problems: list[dict], unsafe: bool) -> tuple[list[dict], list[tuple[str, str]]]:
    """-> the problems that their own solutions solve, with the tests that these pass; and
    (id, reason) of the others. Several are tried at once."""
    box = sandbox(unsafe)
    with ThreadPoolExecutor(box.workers) as pool:
        found = list(pool.map(lambda problem: first_passing(problem, box), problems))
    solved, failed = [], []
    for problem, (verdict, tests) in zip(problems, found):
        if verdict == "right":
            solved.append(problem | {"tests": tests})
            del solved[-1]["readings"], solved[-1]["solutions"]
        else:
            failed.append((problem["id"], f"its own solution: {verdict}"))
    return solved, failed


def gsm8k_demos(row: dict) -> dict:
    """GSM8K's own solution without its <<48/2=24>>, a step a line; it ends in "#### 72"."""
    steps = re.sub(r"<<[^<>]*>>", "", row["answer"]).splitlines()
    return {"prompt": row["question"], "response": "\n".join(s.strip() for s in steps if s.strip())}


def asdiv_demos(row: dict) -> dict:
    """'4/2 (box)=2; 2+1=3' -> "4 / 2 = 2", "2 + 1 = 3" and "#### 3", a line each."""
    gold = row["answer"].partition("(")[0].strip()
    if re.match(r"[a-z]\s*:", row["formula"]):
        raise LeftOut("the formula has a variable")
    formula = re.sub(r"\s*\([A-Za-z][^()]*\)|\s+", "", row["formula"])  # units and spaces
    results = formula.rpartition("=")[2].split("r")  # 9/2=4r1: the quotient or the remainder
    if exact_number(gold) is None or exact_number(gold) not in map(exact_number, results):
        raise LeftOut("the formula does not end in the answer")
    steps = re.sub(r"([-+*/=]|(?<=\d)r)", r" \1 ", formula).split(";")
    return {"prompt": asdiv(row)["prompt"], "response": "\n".join([*steps, f"#### {gold}"])}


PLUS = "task_id prompt entry_point canonical_solution base_input plus_input atol"


LIVE = "question_id question_content starter_code public_test_cases metadata"


LOADERS = {
    "math": Loader("problem solution", boxed),
    "math500": Loader("problem answer", taken(prompt="problem", answer="answer")),
    "gsm8k": Loader("question answer", gsm8k, "####"),
    "minerva": Loader("problem solution", boxed),
    "olympiadbench": Loader("question context final_answer unit", olympiadbench),
    "college_math": Loader("question answer", taken(prompt="question", answer="answer")),
    "asdiv": Loader("body question answer", asdiv, "####"),
    "mawps": Loader("input target", mawps, "####"),
    "jsonl": Loader("prompt answer/tests", own, ""),  # a user's prompts say what they want
    "taco": Loader("question input_output solutions", apps, "program"),
    "apps": Loader("question input_output solutions", apps, "program"),
    "humaneval": Loader("task_id prompt entry_point canonical_solution test", humaneval, "program"),
    "humaneval_plus": Loader(PLUS, plus, "program"),
    "mbpp": Loader("task_id text code test_list test_setup_code", mbpp, "program"),
    "mbpp_plus": Loader(f"{PLUS} assertion", plus, "program"),
    "livecodebench": Loader(LIVE, livecodebench, "program"),
}


DEMOS = {
    "gsm8k": Loader("question answer", gsm8k_demos, "####"),
    "asdiv": Loader("body question answer formula", asdiv_demos, "####"),
    "jsonl": Loader("prompt response", taken(prompt="prompt", response="response"), ""),
}


def load_set(name: str, path: str | Path, unsafe=False, loaders=LOADERS) -> tuple[list, list]:
    """-> records, and (id, reason) of each row left out. A file of another layout: UserError."""
    if name not in loaders:
        what = "data set" if loaders is LOADERS else "set of demonstrations"
        raise UserError(f"no {what} is called {name!r}; there are {', '.join(loaders)}")
    needed, convert, kind = loaders[name]
    domain = "code" if kind == "program" else "math"
    records, left_out = [], []
    for index, row in enumerate(read_rows(path)):
        if any(row.keys().isdisjoint(field.split("/")) for field in needed.split()):
            wanted = needed.replace(" ", ", ").replace("/", " or ")
            raise UserError(f"{path}: row {index} has {', '.join(row)}; {name} wants {wanted}")
        record = {"id": f"{name}/{Path(path).name.split('.')[0]}/{index}", "source": name}
        record |= {"domain": domain, "prompt": "", "answer": None, "tests": None}
        try:
            record |= convert(row)
            if record["answer"] is not None:
                record["answer"] = str(record["answer"]).strip()
            if not record["prompt"]:
                raise LeftOut("no question")
            if not any(record.get(k) for k in ("answer", "tests", "readings", "response")):
                raise LeftOut("no gold answer")
            dump(record)
        except (LeftOut, ValueError) as reason:  # no JSON in a field that should hold it, no text
            left_out.append((record["id"], str(reason).partition(" in position")[0]))
            continue
        except Exception as e:  # noqa: BLE001  a field of another type or form
            raise UserError(f"{path}: row {index} is none of {name}'s ({e!r})") from None
        for field in ("prompt", "response"):
            if not isinstance(record.get(field, ""), str):
                raise UserError(f"{path}: row {index}: its {field} is no text")
        records.append(record)
    if any("readings" in record for record in records):
        records, unsolved = keep_solved(records, unsafe)
        left_out += unsolved
    return records, left_out


def normalised_question(text: str) -> str:
    """Equal for two spellings of one question. Operators stay: a+b is another question than a-b."""
    return re.sub(r"[^\w+\-*/^=<>|%]+|_+", " ", text.casefold()).strip()
