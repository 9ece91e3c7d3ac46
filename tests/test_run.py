"""run.py: the sequence of stages and their flags, what is refused before anything runs, one process or
many, and the server that --engine starts."""

import json
import shlex
import socket
import sys
from pathlib import Path

import pytest
import toy

import run
import support.engine
from model import load_lm
from support.cli import UserError, explained
from support.engine import Engine

FILES = {"--actor", "--problems", "--out", "--samples", "--trees", "--critic_model", "--critic"}
FILES |= {"--against", "--train", "--test", "--no_make_base", "--report", "--seed"}
OWN = {"train": "math:a", "test": "math500:b", "base": "model"}


def planned(**settings) -> dict[str, list[str]]:
    """{name: args} of the whole sequence."""
    s, folder, recipe = run.with_recipe(run.Settings(**settings))
    return {command.name: command.args for command in run.algorithm_1(s, folder, recipe)}


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_sequence_is_algorithm_1():
    steps = planned(run="r", iterations=3)
    one = ["sample", "label_steps", "train_critic", "train_actor", "evaluate"]
    places = ["prepare", "iter0/evaluate"] + [f"iter{i}/{x}" for i in (1, 2, 3) for x in one]
    assert [*steps] == [*places, "report/evaluate"]
    for i, actor in ((1, "r/base"), (2, "r/iter1/actor"), (3, "r/iter2/actor")):
        sample, label, critic, train, evaluate = (steps[f"iter{i}/{x}"] for x in one)
        for words in (sample, label, train):
            assert value(words, "--actor") == actor  # pi_ref is the current actor
        assert ("--first" in sample) == (i > 1) and value(sample, "--limit") == "500"
        assert i == 1 or value(sample, "--first") == str(500 * (i - 1))  # new problems each time
        assert value(sample, "--seed") == value(label, "--seed") == str(i)
        assert value(critic, "--trees") == f"r/iter{i}/trees.jsonl"
        start = f"r/iter{i - 1}/critic" if i > 1 else "r/base"  # the critic goes on
        assert value(critic, "--critic_model") == start
        assert value(evaluate, "--actor") == f"r/iter{i}/actor"
        assert value(evaluate, "--against") == "r/iter0/eval.jsonl"
    frugal = planned(recipe="frugal", run="r", iterations=6)
    replayed, label = frugal["iter6/train_critic"], frugal["iter1/label_steps"]
    assert value(label, "--m") == "0" and "--whole_draws" in label and "True" not in label
    assert value(replayed, "--trees") == ",".join(f"r/iter{i}/trees.jsonl" for i in (3, 4, 5, 6))


def test_own_models_and_data_get_the_papers_settings():
    for words in planned(**OWN).values():
        assert {word for word in words if word.startswith("--")} <= FILES


def test_a_flag_changes_one_thing_of_the_recipe():
    before, after = planned(run="r"), planned(run="r", actor="--beta 0.2", draw="--max_new 9")
    for place, words in after.items():
        want = list(before[place])
        if place.endswith("train_actor"):
            want[want.index("--beta") : want.index("--beta") + 2] = []
            want += ["--beta", "0.2"]
        if "--max_new" in want:
            want[want.index("--max_new") : want.index("--max_new") + 2] = []
            want += ["--max_new", "9"]
        assert words == want
    given = planned(run="a b", prepare="--instruction 'two  words\nand a line'")["prepare"]
    assert (
        value(given, "--instruction") == "two  words\nand a line" and value(given, "--out") == "a b"
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--recipe papr", "wanted demo or frugal or outcome"),
        ("--iterations abc", "invalid int value: 'abc'"),
        ("--iterations -1", "--iterations -1"),
        ('--actor "--betta 0.2"', "train_actor.py: unrecognized arguments: --betta"),
        ('--label "--m many"', "label_steps.py: argument --m"),
        ('--sample "--n1 -3"', "--n1 -3"),
        ("--problems 1500", "1500 problems are asked for; lower --problems or --iterations, or"),
        ("--train math:a", "--train and --test go together"),
        ("--train math:a --test math:b", "no model for these problems; give --base"),
        ("--engine x --server http://y", "give one of them"),
        ("--critic_model no/such", "no/such: no such folder, and no model of the hub"),
        ("--force iter9/sample", "no such stage; there are prepare, iter0/evaluate"),
        ("--actor '\"--beta'", "no closing quotation"),
    ],
)
def test_every_flag_is_looked_at_before_anything_runs(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = toy.stage("run.py", shlex.split(flags))
    assert code == 2 and said in err and len(err.splitlines()) == 1, err
    assert out == "" and [*tmp_path.iterdir()] == []


def test_dry_run_prints_a_shell_script_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--run", "a b", "--dry_run", "--iterations", "1", "--engine", "serve it"]
    code, out, _ = toy.stage("run.py", flags)
    assert code == 0 and [*tmp_path.iterdir()] == []
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    served = "serve it 'a b/base' --port 8000 &  # until it answers"
    assert lines[1] == served and lines.count("kill %%; wait") == 2
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python")]
    steps = planned(run="a b", iterations=1, engine="serve it")
    assert commands == [[f"{place.rpartition('/')[2]}.py", *w] for place, w in steps.items()]


TOY = [
    "--train", "jsonl:rows.jsonl", "--test", "jsonl:test_rows.jsonl", "--base", "tiny",
    "--recipe", "demo", "--problems", "16", "--iterations", "2", "--draw", "--max_new 10 --batch 64",
    "--label", "--m 2", "--critic", "--passes 1", "--actor", "--gap 0 --passes 1 --may_stay",
    "--evaluate", "--samples 2",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two iterations of a tiny model, in one process."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toy.build(folder)
        code, out, err = toy.stage("run.py", ["--run", "one", *TOY])
        assert code == 0, err
    return folder, out


def test_the_whole_run_prints_its_commands_and_goes_on_where_it_stopped(finished, monkeypatch):
    folder, out = finished
    monkeypatch.chdir(folder)
    steps = planned(run="one", **as_settings(TOY))
    printed = [shlex.split(line)[2:] for line in out.splitlines() if line.startswith("$ ")]
    assert printed == [[f"{place.rpartition('/')[2]}.py", *w] for place, w in steps.items()]
    before = toy.hashes(folder / "one")
    code, again, err = toy.stage("run.py", ["--run", "one", *TOY])
    assert code == 0 and again.count("complete, nothing to do") == 3 + 11, err
    assert toy.hashes(folder / "one") == before


def as_settings(flags: list[str]) -> dict:
    given = dict(zip([name[2:] for name in flags[::2]], flags[1::2]))
    return given | {name: int(given[name]) for name in ("problems", "iterations")}


def test_force_starts_over_from_a_stage(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    before = {p: p.stat().st_mtime_ns for p in (folder / "one").glob("iter*/*.jsonl")}
    code, out, err = toy.stage("run.py", ["--run", "one", "--force", "iter2/label_steps", *TOY])
    assert code == 0, err
    made = {str(p.relative_to(folder)) for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert made == {
        "one/iter2/trees.jsonl",
        "one/iter2/actor.advantages.jsonl",
        "one/iter2/eval.jsonl",
    }
    assert out.count("--force") == 4


@pytest.mark.slow
def test_stages_as_processes_make_the_same_bytes(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    flags = ["--run", "many", "--launch", sys.executable, *TOY, "--iterations", "1"]
    code, _, err = toy.stage("run.py", flags)
    assert code == 0, err
    one, many = toy.hashes(folder / "one"), toy.hashes(folder / "many")
    made = [name for name in one if name.endswith((".safetensors", ".jsonl"))]
    made = [name for name in made if "iter2" not in name]
    assert len(made) == 13 and [name for name in made if one[name] != many.get(name)] == []


@pytest.mark.parametrize("ending, code", [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_a_stage_that_fails_ends_the_run(ending, code, monkeypatch, capfd):
    command = run.Command("iter1/sample", "", [])
    monkeypatch.setattr(
        run.Command, "typed", lambda *_: ["python", "-c", f"import os, sys; {ending}"]
    )
    with pytest.raises(SystemExit) as stopped:
        run.do(command, run.Settings(launch="x"))
    assert stopped.value.code == code
    said = "signal 9 ended sample.py (9: perhaps for want of memory); the same command goes on"
    assert (said in capfd.readouterr().err) == (code == 137)


# ---------------------------------------------------------------- the engine

SERVER = """
import http.server, os, signal, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import signal, time\\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nprint('ready', flush=True)\\ntime.sleep(1000)"], stdout=subprocess.PIPE)
worker.stdout.readline()
print("WORKER", worker.pid, sys.argv[1], flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine whose worker ignores SIGTERM, as one does that hangs."""
    monkeypatch.setattr(support.engine, "GRACE_S", 0.5)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody answers there
    (tmp_path / "server.py").write_text(SERVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Engine(f"{sys.executable} {tmp_path}/server.py", port, tmp_path / "run" / "log") as engine:
        yield engine


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_engine_serves_one_model_at_a_time_and_ends_with_its_workers(engine):
    engine.serve("a")
    engine.serve("a")  # it is there
    with pytest.raises(UserError, match=f"port {engine.port}: something answers there already"):
        Engine(engine.command, engine.port, engine.log).serve("b")
    engine.serve("b")
    engine.stop()
    started = [line.split() for line in engine.log.read_text().splitlines() if "WORKER" in line]
    assert [model for *_, model in started] == ["a", "b"]  # the log is appended to
    if Path("/proc/self/stat").exists():
        assert not any(is_alive(int(pid)) for _, pid, _ in started)


# An engine of any folder; of one that is named "base.copy" it is told how well to read it.
READER = """
import http.server, json, sys
folder, port, misread = sys.argv[-3], int(sys.argv[-1]), "misread" in sys.argv
class Handler(http.server.BaseHTTPRequestHandler):
    def say(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.say({"data": [{"id": "it", "root": folder}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = 6 if misread and folder.endswith("base.copy") else 5
        ids = [first] * asked["max_tokens"]
        choice = {"token_ids": ids, "prompt_token_ids": asked["prompt"], "finish_reason": "length"}
        self.say({"choices": [choice]})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize("how", ["", "misread"])
def test_an_engine_must_read_what_is_saved_here_as_the_base_itself(how, engine, tmp_path):
    toy.build(tmp_path)
    (tmp_path / "reader.py").write_text(READER)
    engine.command = f"{sys.executable} {tmp_path}/reader.py {how}"
    prompt = json.loads((tmp_path / "problems.jsonl").open().readline())["prompt"]
    base, copy = str(tmp_path / "tiny"), tmp_path / "base.copy"
    check = lambda: engine.require_reads_alike(base, copy, prompt, load_lm)
    if how:
        with pytest.raises(UserError, match=r"goes on .* with tokens \[5, .* with \[6, "):
            check()
    else:
        check()
        assert engine.model == base  # which is evaluated next
    assert not copy.exists()


def test_an_engine_that_does_not_come_up_says_why(engine, monkeypatch):
    broken = f"{sys.executable} -c \"import sys; sys.exit('no such model')\""
    with pytest.raises(UserError, match="(?s)ended with code 1; the end of .*no such model"):
        Engine(broken, engine.port, engine.log).serve("a")
    monkeypatch.setattr(support.engine, "PATIENCE_S", 0)
    silent = f'{sys.executable} -c "import time; time.sleep(1000)"'
    with (
        pytest.raises(UserError, match="does not answer"),
        Engine(silent, engine.port, engine.log) as slow,
    ):
        slow.serve("a")
    assert slow.process is None


@pytest.mark.parametrize(
    "typed, again",
    [
        ("run.py --force iter2/train_actor --run r", "run.py --run r"),
        ("run.py --run r --force=label_steps", "run.py --run r"),
        ("sample.py --force --out x", "sample.py --out x"),
        ("sample.py --out x --force", "sample.py --out x"),
        ("run.py --actor '--beta 0.2 --force' --run r", "run.py --actor '--beta 0.2' --run r"),
    ],
)
def test_what_goes_on_after_ctrl_c_can_be_typed(typed, again, monkeypatch):
    monkeypatch.setattr("sys.argv", shlex.split(typed))
    assert explained(KeyboardInterrupt(), "") == (130, f"stopped; to go on: python {again}")
