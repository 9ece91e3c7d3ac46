"""Programs as answers: the embedded code task, and every stage with rewards from the sandbox."""

import ast
import json
import random
import re
import textwrap
from itertools import takewhile

import pytest
import tokenizers as tk
import toy
from transformers import PreTrainedTokenizerFast

import reward
import support.embedded
import support.records
import support.sandbox
from reward import grade

MATH = support.embedded.TASKS["math"]
CODE = support.embedded.TASKS["code"]
SIZES = {"train": 60, "valid": 20, "test": 20}


@pytest.mark.parametrize("kind", support.embedded.OPERATIONS)
def test_the_right_reading_passes_and_the_misreading_does_not(kind):
    skeleton = [("more", 1), (kind, 3)]
    problem = {"id": kind, **CODE.check(skeleton)[0]}
    right = CODE.solve(random.Random(0), skeleton)
    reading, misreading = (
        text.format(x="a", k=3) for text in support.embedded.OPERATIONS[kind][1:3]
    )
    assert reading in right
    texts = [right, right.replace(reading, misreading), right.replace("    return b", "    return")]
    verdicts = [grade(problem, text, unsafe=True)[0] for text in texts]
    assert verdicts == ["right", "wrong", "wrong"]


def test_a_problem_that_a_misreading_would_solve_is_lucky():
    assert CODE.check([("least", 5), ("thrice", 0), ("over", 6)])[1]
    # 1 twice is 2, half of that 1; read as 1 + 2 = 3, 3 - 2 = 1
    assert MATH.check((1, [("twice", 2), ("half", 2)])) == ({"answer": "1"}, True)
    assert MATH.check((3, [("twice", 2), ("half", 2)])) == ({"answer": "3"}, True)
    assert MATH.check((3, [("twice", 2), ("more", 4)])) == ({"answer": "10"}, False)


def test_the_rule_against_luck_gives_way_where_it_would_leave_nothing(capsys):
    for steps, lucky in (((3, 3), False), ((12, 12), True)):
        problems = support.embedded.embedded_problems(MATH, 0, SIZES, steps)["train"]
        assert {p["prompt"].count(" has ") for p in problems} == {steps[0] + 1}
        assert ("100 of 100 problems can be solved by luck" in capsys.readouterr().out) == lucky


def test_wordings_change_how_a_solution_is_said_and_nothing_else():
    plain = support.embedded.demonstrations(MATH, 0, 200, misread=False, steps=(6, 6))
    worded = support.embedded.demonstrations(
        MATH, 0, 2000, misread=False, steps=(6, 6), wordings=20
    )
    assert plain == support.embedded.demonstrations(
        MATH, 0, 200, misread=False, steps=(6, 6), wordings=1
    )
    said = set()
    for demo in worded:
        *lines, answer = demo["response"].splitlines()
        assert answer.split()[:3] == ["The", "answer", "is"]
        for line in lines:
            before, core, after = re.fullmatch(r"(\w+ )?(\w+: .* = \d+)( \w+)?", line).groups()
            assert eval(core.split(":")[1].replace("=", "==").replace("/", "//"))
            said.add((before, after))
    assert len(said) == 20


def test_a_more_careless_reader_misreads_more():
    def wrong(careless):
        demos = support.embedded.demonstrations(MATH, 0, 1000, careless)
        lines = [line for demo in demos for line in demo["prompt"].splitlines() if "twice" in line]
        right = [line for demo in demos for line in demo["response"].splitlines() if "* 2 " in line]
        return 1 - len(right) / len(lines)

    assert wrong(0.0) == 0.0
    assert abs(wrong(1.0) - 0.72) < 0.05
    assert abs(wrong(3.0) - (1 - 0.28**3)) < 0.02


def test_splits_share_no_skeleton_and_texts_come_back_from_their_tokens():
    problems = support.embedded.embedded_problems(CODE, 0, SIZES)
    prompts = [p["prompt"] for split in problems.values() for p in split]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())
    assert all(p["domain"] == "code" and p["answer"] is None for p in problems["train"])
    demos = support.embedded.demonstrations(CODE, 0, 300, misread=True)
    held_out = {p["prompt"] for split in ("valid", "test") for p in problems[split]}
    assert held_out.isdisjoint(d["prompt"] for d in demos)
    texts = prompts + [d["response"] for d in demos]
    tokenizer = support.embedded.build_tokenizer(texts)
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "    " in tokenizer.get_vocab()


SETUP = "def f(x):\n 'Do it.'\n"
LINES = [" return x + 1\n", " return x - 1\n", " x = x * 2\n", " x = x / 0\n"]


def tokenizer():
    """A token is a line: a random model of few tokens writes a right program now and then."""
    words = ["<|end|>", "<|user|>", "?", "\n", *(str(i) for i in range(10)), *LINES]
    model = tk.Tokenizer(tk.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    pieces = tk.Regex(r"<\|\w+\|>| [^\n]*\n|.|\n")
    model.pre_tokenizer = tk.pre_tokenizers.Split(pieces, "isolated")
    model.decoder = tk.decoders.Fuse()
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "?"}
    made = PreTrainedTokenizerFast(tokenizer_object=model, **names)
    made.chat_template = "<|user|>{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    return made


def passes(problem, text):
    """By an exec of our own lines what the sandbox is to find."""
    names, lines = {}, text.splitlines(keepends=True)
    body = "".join(takewhile(lambda line: line[0].isspace(), lines))
    try:
        exec(SETUP + body, names)  # noqa: S102
        return [names["f"](*x) for x in problem["tests"]["inputs"]] == problem["tests"]["outputs"]
    except (SyntaxError, NameError, ZeroDivisionError):
        return False


def test_the_forms_of_tests_that_the_docstring_shows():
    forms = re.findall(r"^ +(\{.kind.*\})", reward.__doc__, re.MULTILINE)
    shown = [ast.literal_eval(line) for line in forms]
    assert [tests["kind"] for tests in shown] == ["call", "stdin", "assert"]
    add = "def f(a, b): return a + b"
    texts = [add, "print(sum(map(int, input().split())))", add]
    problems = [{"id": i, "tests": tests} for i, tests in enumerate(shown)]
    for problem, text in zip(problems, texts):
        assert grade(problem, text, unsafe=True)[0] == "right"
        bad = text.replace("+", "-").replace("sum", "max")
        assert grade(problem, bad, unsafe=True)[0] == "wrong"


def records(path):
    return [json.loads(line) for line in path.open()]


def test_every_stage_with_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = tokenizer()
    support.embedded.new_model(words, seed=0, layers=1, width=16).save_pretrained("tiny")
    words.save_pretrained("tiny")
    rows = []
    for i in range(24):
        tests = {"entry": "f", "setup": SETUP, "inputs": [[1], [i]]}
        tests["outputs"] = [2, i + 1] if i % 2 else [0, i - 1]
        rows.append({"prompt": f"{i % 10}{i // 10}", "tests": tests})
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(support.records.dump, rows[:16])))
    (tmp_path / "more.jsonl").write_bytes(b"".join(map(support.records.dump, rows[16:])))
    actor, draws = "--actor tiny --problems run/train.jsonl", "--max_new 6 --unsafe"
    for script, flags in (
        (
            "prepare.py",
            "--train jsonl:rows.jsonl --test jsonl:more.jsonl --out run --valid_share 0",
        ),
        ("sample.py", f"{actor} --out run/samples.jsonl --n1 24 --n 6 {draws}"),
        (
            "label_steps.py",
            f"{actor} --samples run/samples.jsonl --out run/trees.jsonl --m 8 {draws}",
        ),
        ("train_critic.py", "--trees run/trees.jsonl --critic_model tiny --out run/critic"),
        (
            "train_actor.py",
            "--actor tiny --trees run/trees.jsonl --critic run/critic --out run/actor",
        ),
        (
            "evaluate.py",
            f"--actor run/actor --problems run/test.jsonl --out run/eval.jsonl --samples 16 {draws}",
        ),
    ):
        code, _, err = toy.stage(script, flags)
        assert code == 0, (script, err)
    problems = {
        p["id"]: p for split in ("train", "test") for p in records(tmp_path / f"run/{split}.jsonl")
    }
    asked = {row["prompt"] for row in rows}  # a user's own prompts are left as they are
    assert all(p["prompt"] in asked and p["domain"] == "code" for p in problems.values())
    rewards = []
    for x in records(tmp_path / "run/samples.jsonl"):
        for r in x["responses"]:
            assert r["reward"] == (r["finished"] and passes(problems[x["id"]], r["text"]))
            rewards.append(r["reward"])
    assert 0 < sum(rewards) < len(rewards)
    rewards = []
    for tree in records(tmp_path / "run/trees.jsonl"):
        for node in tree["nodes"][1:]:
            if node["reward"] is not None and node["ids"][-1] == 0:  # <|end|>
                v, text = node, ""
                while v["parent"] >= 0:
                    v, text = tree["nodes"][v["parent"]], v["text"] + text
                assert node["reward"] == passes(problems[tree["id"]], text)
                rewards.append(node["reward"])
    assert 0 < sum(rewards) < len(rewards)
    lines = records(tmp_path / "run/eval.jsonl")
    drawn = [(problems[x["id"]], s) for x in lines for s in x["sampled"]]
    for problem, s in drawn:
        assert s["prediction"] is None or (SETUP + s["text"]).startswith(s["prediction"])
        assert not s["correct"] or passes(problem, s["text"])
    assert 0 < sum(s["correct"] for _, s in drawn) < len(drawn)
    row = json.loads((tmp_path / "run/summary.json").read_text())["sets"]["jsonl"]
    assert 0 <= row["maj"] <= row["pass@16"] <= 1
    assert row["verdicts"].keys() <= {"right", "wrong", "no answer", "error"}


def example(title: str):
    """The function `reward` that reward.py's docstring shows under a line that begins so."""
    lines = reward.__doc__.split(title)[1].split(":\n\n", 1)[1].split("\n\n")[0]
    found = {}
    exec(textwrap.dedent(lines), vars(reward), found)  # noqa: S102
    return found["reward"]


def test_the_share_of_tests_as_reward_says_it(monkeypatch):
    """In one run of each program; the verdict is "right" where all pass."""
    monkeypatch.setattr(reward, "reward", example("The share of a program's tests"))
    box, runs = support.sandbox.sandbox(True), []
    usual = box.run
    monkeypatch.setattr(box, "run", lambda *job, **more: runs.append(job) or usual(*job, **more))
    call = {"kind": "call", "entry": "f", "inputs": [[1], [2], [3]], "outputs": [1, 4, 9]}
    stdin = {"kind": "stdin", "inputs": ["1", "2"], "outputs": ["1", "4"]}
    check = {"kind": "assert", "entry": "f", "code": "assert f(2) == 4"}
    right, wrong, none = ("right", True), ("wrong", False), ("no answer", False)
    rows = [
        (call, "def f(x): return x * x", 1, right),
        (call, "def f(x): return x * x if x != 2 else 1 / 0", 2 / 3, wrong),  # and goes on after it
        (call, "def f(x): return [1, 2, 3][x]", 0, wrong),
        (call, "def f(x): return True", 0, wrong),  # which is not 1
        (stdin, "print(int(input()) ** 2)", 1, right),
        (stdin, "print(1)", 1 / 2, wrong),
        (check, "def f(x): return x * x", 1, right),
        (check, "def f(x): return x", 0, wrong),
    ]
    for tests, text, share, verdict in [*rows, (call, "No program at all, sorry.", 0, none)]:
        problem = {"id": "p", "answer": None, "tests": tests}
        found = reward.judged(problem, text, True, True)
        assert found["reward"] == pytest.approx(share), text
        assert (found["verdict"], found["correct"]) == verdict, text
    assert len(runs) == len(rows) + 1


def test_a_verdict_agrees_with_the_reward(monkeypatch):
    """Right is reward 1: a right answer with less is wrong, and other verdicts stay as they are."""
    monkeypatch.setattr(reward, "reward", example("Two rewards"))
    problem = {"id": "p", "answer": "5"}
    long = "and so on " * 30
    for text, value, verdict in (
        ("#### 5", 1, "right"), (f"{long}#### 5", 0.9, "wrong"),
        ("#### 6", 0.1, "wrong"), ("I do not know", 0.1, "no answer"),
    ):  # fmt: skip
        found = reward.judged(problem, text, True, True)
        assert (found["reward"], found["verdict"]) == (value, verdict)
        assert found["correct"] is (value == 1)
    cut_off = reward.judged(problem, "#### 5", False, True)
    assert (cut_off["reward"], cut_off["verdict"], cut_off["prediction"]) == (0, "wrong", "5")


def test_a_response_is_graded_once(monkeypatch):
    asked = []
    usual = reward.grade_answer
    monkeypatch.setattr(reward, "grade_answer", lambda *x: asked.append(x) or usual(*x))
    found = reward.judged({"id": "p", "answer": "5"}, r"\boxed{6}", True, True)
    assert (found["verdict"], found["prediction"], len(asked)) == ("wrong", "6", 1)


@pytest.mark.parametrize(
    "gold, answer, verdict",
    [
        (r"3.2 \text{ cm}", "3.2", "right"), (r"3.2 \text{ cm}", r"d = 3.27 \text{ cm}", "right"),
        ("3.2", "3.3", "right"), ("3.2", "3.31", "wrong"), ("3.2", r"\frac{13}{4}", "right"), ("3.2", "-3.2", "wrong"),
        (r"3.2 \text{ cm}", r"3.2 \text{ km}", "wrong"), ("3.2", "x", "wrong"), ("3.2", "3.2, 3.2", "wrong"),
        ("1.5, 3.2", "3.25, 1.45", "right"), ("1.5, 3.2", "3.25, 1.35", "wrong"), ("1.5, 3.2", "1.5", "wrong"),
        ("(1.5, 3.2)", "(1.55, 3.1)", "right"), ("(1.5, 3.2)", "(3.2, 1.5)", "wrong"),
    ],
)  # fmt: skip
def test_an_answer_within_the_tolerance_of_a_problem_is_right(gold, answer, verdict):
    problem = {"id": "o", "answer": gold, "tests": None, "tolerance": 0.1}
    assert grade(problem, rf"So \boxed{{{answer}}}")[0] == verdict


def test_without_a_tolerance_there_is_none():
    assert grade({"id": "o", "answer": "3.2", "tolerance": None}, r"\boxed{3.27}")[0] == "wrong"
