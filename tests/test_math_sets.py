"""The loaders of math data sets. Single rows are copied from the sets they name."""

import gzip
import json
import sys

import pytest
import toy

from prepare import Settings, load, real_problems, without
from support.cli import UserError
from support.datasets import (
    INSTRUCTIONS,
    LOADERS,
    LeftOut,
    Loader,
    asdiv_demos,
    gsm8k_demos,
    load_set,
    normalised_question,
    read_rows,
)

MATH = {  # MATH test row 0, its solution shortened
    "problem": "How many vertical asymptotes does the graph of $y=\\frac{2}{x^2+x-6}$ have?",
    "level": "Level 3",
    "type": "Algebra",
    "solution": "It has $\\boxed{1}$ or rather $\\boxed{2}$ vertical asymptotes.",
}
GSM8K = {  # GSM8K train row 0
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips "
    "altogether in April and May.\n#### 72",
}
ASDIV = {  # ASDiv row 0
    "body": "Seven red apples and two green apples are in the basket.",
    "question": "How many apples are in the basket?",
    "answer": "9 (apples)",
    "formula": "7+2=9",
}
OLYMPIAD = {"context": None, "question": "Find it.", "final_answer": ["$69$,$84$"], "unit": None}
MAWPS = {"input": "How many seashells did she give to Sam ?", "target": 43.0}

ROWS = [  # set, row, prompt, answer
    ("math", MATH, MATH["problem"], "2"),
    ("math", {"problem": "p", "solution": "$\\boxed 2$."}, "p", "2"),  # as in MATH train row 888
    ("minerva", {"problem": "p", "solution": "$\\boxed{4.5e33}$ ergs"}, "p", "4.5e33"),
    ("math500", {"problem": "p", "answer": "p - q", "solution": "\\boxed{no}"}, "p", "p - q"),
    ("gsm8k", GSM8K, GSM8K["question"], "72"),
    ("olympiadbench", OLYMPIAD, "Find it.", "$69$,$84$"),
    ("olympiadbench", OLYMPIAD | {"context": "Let", "unit": "m"}, "Let\nFind it.", r"$69$,$84$ \text{ m}"),
    ("olympiadbench", OLYMPIAD | {"final_answer": ["1", "2"], "unit": r"$\mathrm{~m}$"}, "Find it.",
     r"1, 2 $\mathrm{~m}$"),
    ("college_math", {"question": "Simplify", "answer": "$10-4 n$"}, "Simplify", "$10-4 n$"),
    ("asdiv", ASDIV, ASDIV["body"] + " " + ASDIV["question"], "9 (apples)"),
    ("mawps", MAWPS, MAWPS["input"], "43"),
    ("mawps", MAWPS | {"target": 158.35}, MAWPS["input"], "158.35"),
    ("mawps", MAWPS | {"target": 0.6666666667}, MAWPS["input"], "2/3"),
    ("mawps", MAWPS | {"target": 0.3}, MAWPS["input"], "0.3"),
    ("jsonl", {"prompt": "p", "answer": 0, "id": "mine"}, "p", "0"),
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name, row, prompt, answer", ROWS)
def test_a_row_becomes_a_problem(name, row, prompt, answer, tmp_path):
    problems, left_out = load_set(name, write(tmp_path / "train.jsonl", [row]))
    assert problems == [
        {"id": f"{name}/train/0", "source": name, "domain": "math", "prompt": prompt, "answer": answer,
         "tests": None}
    ]  # fmt: skip
    assert left_out == []


LEFT_OUT = [
    (
        "math",
        {"problem": "p", "solution": "it is \\boxed{}"},
        "no gold answer",
    ),  # MATH train row 5341
    ("math", {"problem": "p", "solution": "the answer is 5"}, "no box in the solution"),
    ("math", {"problem": "p", "solution": "\\boxed{5"}, "no gold answer"),
    ("gsm8k", {"question": "p", "answer": "It is 5."}, "no ####"),
    ("olympiadbench", OLYMPIAD | {"final_answer": None}, "no gold answer"),
    ("jsonl", {"prompt": "p", "answer": None}, "no gold answer"),
    ("jsonl", {"prompt": "", "answer": "5"}, "no question"),
]


@pytest.mark.parametrize("name, row, reason", LEFT_OUT)
def test_a_row_without_gold_is_left_out_by_id(name, row, reason, tmp_path):
    good = next(good for set_name, good, *_ in ROWS if set_name == name)
    problems, left_out = load_set(name, write(tmp_path / "test.jsonl", [good, row, good]))
    assert [problem["id"] for problem in problems] == [f"{name}/test/0", f"{name}/test/2"]
    assert left_out == [(f"{name}/test/1", reason)]


def test_a_code_set_fits_into_the_table(tmp_path, monkeypatch):
    def code(row):
        return {"prompt": row["text"], "domain": "code", "tests": {"kind": "assert"}}

    monkeypatch.setitem(LOADERS, "mbpp", Loader("text", code))
    (problem,), _ = load_set("mbpp", write(tmp_path / "mbpp.jsonl", [{"text": "Sort."}]))
    assert problem == {
        "id": "mbpp/mbpp/0", "source": "mbpp", "domain": "code", "prompt": "Sort.", "answer": None,
        "tests": {"kind": "assert"},
    }  # fmt: skip


TWO = [{"prompt": "é", "answer": "1"}, {"prompt": "b", "answer": "2"}]
LINES = b'{"prompt": "\xc3\xa9", "answer": "1"}\n\n{"prompt": "b", "answer": "2"}'
FILES = [
    ("a.jsonl", LINES),
    ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n") + b"\r\n"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ("a.json", json.dumps(TWO, indent=1).encode()),
    ("a.json.gz", gzip.compress(json.dumps(TWO).encode(), mtime=0)),
    ("a.json", json.dumps({"prompt": ["é", "b"], "answer": ["1", "2"]}).encode()),
]


@pytest.mark.parametrize("file, data", FILES)
def test_every_format_reads_the_same(file, data, tmp_path):
    (tmp_path / file).write_bytes(data)
    assert read_rows(tmp_path / file) == TWO


def test_a_folder_of_a_file_for_each_row_is_read_in_the_order_of_names(tmp_path):
    """MATH's own form; .sha256.json is what a stage leaves where it has read."""
    folder = tmp_path / "train"
    for name, row in (("b/1.json", TWO[1]), ("a/20.json", TWO[0]), ("a/.sha256.json", {})):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(row))
    assert read_rows(folder) == TWO
    (folder / "a/20.json").write_text("{")
    with pytest.raises(UserError, match=r"a/20\.json: Expecting"):
        read_rows(folder)
    (folder / "a/20.json").write_text("[1]")
    with pytest.raises(UserError, match="train: a folder with no rows, or"):
        read_rows(folder)


BROKEN = [
    ("a.jsonl", b'{"prompt": "a", "answer": "1"}\n{"prompt"\n', r"a\.jsonl:2: "),
    ("a.jsonl", b"prompt,answer\na,1\n", r"a\.jsonl:1: .*; one JSON object a line is wanted"),
    ("a.json", b'[\n{"prompt": "a",\n "answer" 1}]', r"a\.json:3: "),
    ("a.jsonl", b'{"prompt": "\xe9", "answer": "1"}\n', r"a\.jsonl: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], r"a\.jsonl\.gz: not UTF-8"),
    ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: not UTF-8"),
    ("a.jsonl", b"", r"a\.jsonl: no rows"),
    ("a.jsonl", b"[1, 2]\n", r"a\.jsonl: no rows, or"),
    ("a.json", b'{"prompt": "ab", "answer": "cd"}', r"a\.json: no rows, or"),
    ("a.json", b'{"prompt": ["a"], "answer": []}', r"a\.json: no rows, or"),
    ("a.jsonl", b'{"question": "a", "answer": "1"}', r"a\.jsonl: row 0 .* question, answer; jsonl wants prompt, a"),
]  # fmt: skip


@pytest.mark.parametrize("file, data, message", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(file, data, message, tmp_path):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        load_set("jsonl", tmp_path / file)
    assert "\n" not in str(error.value)


def test_an_unknown_set_is_an_error_that_lists_them(tmp_path):
    with pytest.raises(UserError, match="'aime'; there are math, math500, gsm8k"):
        load_set("aime", tmp_path / "a.jsonl")


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    try:
        import pyarrow.parquet
    except ImportError:
        pass
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TWO), path)
        assert read_rows(path) == TWO
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="a.parquet: parquet files need pyarrow"):
        read_rows(path)


def test_every_loader_has_an_instruction_of_one_line():
    assert {loader.kind for loader in LOADERS.values()} - {""} == set(INSTRUCTIONS)
    assert all("\n" not in line for line in INSTRUCTIONS.values())


def test_normalised_question():
    assert normalised_question("  How MANY\napples,  $x_1$?") == normalised_question(
        "how many apples x 1"
    )
    assert normalised_question("Find $a+b$.") != normalised_question("Find $a-b$.")
    assert normalised_question("Is it 3.5?") != normalised_question("Is it 35?")


def test_a_test_question_leaves_training_whatever_the_instruction_after_it(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(GSM8K))  # its answers end in ####
    own = [{"prompt": GSM8K["question"].upper(), "answer": 72}, {"prompt": "2 + 2?", "answer": 4}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, own)))  # these are boxed
    train, test = f"jsonl:{tmp_path}/own.jsonl", f"gsm8k:{tmp_path}/test.jsonl"
    problems = real_problems(Settings(out="", train=train, test=test, valid_share=0.0))
    assert [p["prompt"].splitlines()[0] for p in problems["train"]] == ["2 + 2?"]
    held_out = [{"prompt": f"2 + 2?\n{INSTRUCTIONS['boxed']}"}]
    assert without([{"prompt": "2 + 2?"}], held_out, Settings(out="")) == []  # a demonstration


@pytest.mark.parametrize(
    "name, line",
    [
        ("gsm8k", '{"question": "?", "answer": 6}'),
        ("mawps", '{"input": "?", "target": [1]}'),
        pytest.param("jsonl", "[" * 100_000, id="deep"),
    ],
)
def test_a_row_that_is_none_of_the_set_is_one_line(name, line, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(UserError, match="rows.jsonl"):
        load_set(name, tmp_path / "rows.jsonl")


def test_gsm8k_demos():
    steps = ["Natalia sold 48/2 = 24 clips in May.",
             "Natalia sold 48+24 = 72 clips altogether in April and May.", "#### 72"]  # fmt: skip
    assert gsm8k_demos(GSM8K) == {"prompt": GSM8K["question"], "response": "\n".join(steps)}
    spaced = GSM8K | {"answer": "One <<1=1>>1. \n\n  Two.\n#### 3\n"}
    assert gsm8k_demos(spaced)["response"] == "One 1.\nTwo.\n#### 3"


DEMOS = [  # formulas and answers of ASDiv rows
    ("7+2=9", "9 (apples)", "7 + 2 = 9\n#### 9"),
    ("10-(3+2)=5", "5 (dollars)", "10 - (3 + 2) = 5\n#### 5"),
    ("10 (hour)*60 (min/hour)=600", "600 (minutes)", "10 * 60 = 600\n#### 600"),
    ("329/4=82 r1; 4-1=3", "3 (crayons)", "329 / 4 = 82 r 1\n4 - 1 = 3\n#### 3"),
    ("94/8=11 r6", "11 (boxes)", "94 / 8 = 11 r 6\n#### 11"),
    ("(30+14+14+21+25)/5=20.8", "20.8 (points)", "(30 + 14 + 14 + 21 + 25) / 5 = 20.8\n#### 20.8"),
    ("GCD(18,12)=6", "6 (students)", "GCD(18,12) = 6\n#### 6"),
    ("x:The number; x+15=96", "81", None),
    ("4+5=9 apples < 10 apples", "Yes", None),
    ("18, 22, 26, 30, 34, 38", "38 (flowers)", None),
]


@pytest.mark.parametrize("formula, answer, response", DEMOS)
def test_asdiv_demos(formula, answer, response):
    row = ASDIV | {"formula": formula, "answer": answer}
    if response is None:
        with pytest.raises(LeftOut):
            asdiv_demos(row)
    else:
        prompt = ASDIV["body"] + " " + ASDIV["question"]
        assert asdiv_demos(row) == {"prompt": prompt, "response": response}


MINE = {"prompt": " What is 2 + 2?\n\n", "answer": 4}
CODE = {"prompt": "Write f.\n", "tests": {"kind": "stdin", "inputs": ["1"], "outputs": ["1"]}}
PROMPTS = [  # set, row, --instruction, prompt
    ("gsm8k", GSM8K, None, f"{GSM8K['question']}\n{INSTRUCTIONS['####']}"),
    ("gsm8k", GSM8K, "", GSM8K["question"]),
    ("gsm8k", GSM8K, "Think.", f"{GSM8K['question']}\nThink."),
    ("math", MATH, None, f"{MATH['problem']}\n{INSTRUCTIONS['boxed']}"),
    ("jsonl", MINE, None, MINE["prompt"]),  # a user's own prompts are left as they are
    ("jsonl", MINE, "", MINE["prompt"]),
    ("jsonl", MINE, "Think.", "What is 2 + 2?\n\n\nThink."),
    ("jsonl", CODE, None, CODE["prompt"]),
]


@pytest.mark.parametrize("name, row, instruction, prompt", PROMPTS)
def test_the_instruction_after_a_question(name, row, instruction, prompt, tmp_path):
    path = write(tmp_path / "train.jsonl", [row])
    settings = Settings(out="", instruction=instruction)
    assert [p["prompt"] for p in load(f"{name}:{path}", settings)] == [prompt]


def test_the_flag_tells_an_empty_instruction_from_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", [GSM8K])
    write(tmp_path / "test.jsonl", [GSM8K | {"question": "2 + 2?"}])
    flags = "--train gsm8k:train.jsonl --test gsm8k:test.jsonl --valid_share 0"
    for folder, more in (("default", []), ("empty", ["--instruction", ""])):
        assert toy.stage("prepare.py", [*flags.split(), "--out", folder, *more])[0] == 0
    line = json.loads((tmp_path / "default" / "test.jsonl").read_text())
    assert line["prompt"] == f"2 + 2?\n{INSTRUCTIONS['####']}"
    line = json.loads((tmp_path / "empty" / "test.jsonl").read_text())
    assert line["prompt"] == "2 + 2?"
