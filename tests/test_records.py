"""Torn, broken, stale and foreign files; the disk and the numbers that go wrong; exact resume of training."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file

import support.stage
from model import LM, load_lm
from support import training
from support.cli import UserError
from support.records import dump, read_jsonl, replace, sha256
from support.stage import Output, code_of, differences
from support.training import fit
from train_actor import advantage_states
from train_critic import load_critic

S, L, C = "sample.py", "label_steps.py", "train_critic.py"
NODE = {"parent": -1, "ids": [], "text": "é\n", "draws": 0, "n": 1, "wins": 1, "reward": None}
RESPONSE = {"ids": [5, 0], "ends": [2], "text": "½ 3\n", "reward": 1, "finished": True}
RECORDS = {
    "samples": {"prompt_ids": [1], "kept": [0], "responses": [RESPONSE]},
    "trees": {"prompt_ids": [1], "nodes": [NODE]},
    "eval": {"text": "→ 18", "prediction": "18", "correct": True, "verdict": "right"},
}


class Stop(Exception):
    pass


@dataclass(frozen=True)
class Settings:
    out: str
    force: bool = False


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Samples and trees of the toy, and a critic."""
    folder = tmp_path_factory.mktemp("records") / "ready"
    toy.finished_run(folder, S, L, C)
    return folder


@pytest.fixture
def work(ready, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(ready, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(kind): a stage's output of three records, not finished. -> its path, its bytes, its records"""
    monkeypatch.setattr(sys, "argv", [str(toy.ROOT / S)])

    def make(kind):
        path = tmp_path / f"{kind}.jsonl"
        records = [{"id": f"p{i}", **RECORDS[kind]} for i in range(3)]
        with pytest.raises(Stop), Output(S, path, Settings(str(path)), {}).open() as out:
            out.append(records[:1])
            out.append(records[1:])
            raise Stop
        return path, path.read_bytes(), records

    return make


# ---------------------------------------------------------------------------------------------- torn and broken files


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECORDS)
def test_cut_at_every_byte(kind, begun, capsys):
    path, whole, records = begun(kind)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        capsys.readouterr()
        with pytest.raises(Stop), Output(S, path, Settings(str(path)), {}).open() as out:
            raise Stop
        kept = whole[:size].count(b"\n")
        assert out.done == {r["id"] for r in records[:kept]}
        assert path.read_bytes() == b"".join(map(dump, records[:kept]))
        torn = size - len(path.read_bytes())
        assert (f"dropped a torn last line of {torn} bytes" in capsys.readouterr().out) == (
            torn > 0
        )


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", RECORDS)
def test_broken_byte_in_the_middle(kind, stride, begun):
    path, whole, _ = begun(kind)
    line = len(whole) // 3  # the second of three
    for at in range(line + 2, 2 * line - 2, stride):
        broken = whole[:at] + b"\xff" + whole[at + 1 :]
        path.write_bytes(broken)
        output = Output(S, path, Settings(str(path)), {})
        with pytest.raises(UserError, match=rf"{kind}\.jsonl:2: "), output.open():
            pass
        assert path.read_bytes() == broken


def test_whole_file_needs_no_last_line_break(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "a"}\n{"id": "b"}')
    assert [r["id"] for r in read_jsonl(tmp_path / "a.jsonl")] == ["a", "b"]


def test_value_head_cut_short_or_of_another_shape(work):
    path = work / "run" / "critic" / "value_head.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 31):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"value_head\.safetensors"):
            load_critic(str(path.parent))
    path.write_bytes(whole.replace(b"[1,16]", b"[2,8] "))
    with pytest.raises(UserError, match=r"value_head\.safetensors"):
        load_critic(str(path.parent))


def test_replace_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a"
    replace(path, lambda p: p.write_text("old"))
    for error in (OSError(28, "full"), RuntimeError("full"), KeyboardInterrupt()):

        def write(p, error=error):
            p.write_text("ne")
            raise error

        with pytest.raises((OSError, KeyboardInterrupt)):
            replace(path, write)
        assert path.read_text() == "old"


# ---------------------------------------------------------------------------------------------- manifests

FIELDS = {  # of a manifest; what is said where it is another now
    ("stage",): "made by else.py, this is sample.py",
    ("grader",): "math-verify was else, is {} now",
    ("settings", "seed"): "--seed was else, is {} now",
    ("settings", "n1"): "--n1 was else, is {} now",
    ("settings", "max_new"): "--max_new was else, is {} now",
    ("inputs", "actor"): "tiny has changed since",
    ("inputs", "problems"): "problems.jsonl has changed since",
    ("facts", "actor"): "actor was else, is {} now",
    ("facts", "tokenizer"): "tokenizer was else, is {} now",
    ("facts", "template"): "template was else, is {} now",
}


def alter(path: Path, field: tuple[str, ...], value="else"):
    manifest = json.loads(path.read_text())
    part = manifest
    for key in field[:-1]:
        part = part[key]
    was, part[field[-1]] = part[field[-1]], value
    path.write_text(json.dumps(manifest))
    return was


@pytest.mark.parametrize("field", FIELDS, ids=" ".join)
def test_same_command_under_other_conditions(field, work):
    path = work / "run" / "samples.jsonl.manifest.json"
    was = alter(path, field)
    if field[0] == "facts":  # follow from the inputs, so a complete run need not look at them
        path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "output"})
        )
    there = toy.hashes(work)
    code, _, err = toy.stage(S, toy.SAMPLE)
    assert code == 2 and err.count("\n") == 1
    for part in (FIELDS[field].format(was), "--force", "--out"):
        assert part in err, err
    assert toy.hashes(work) == there


@pytest.fixture
def untold(monkeypatch):
    """As in a new process, which has not spoken of changed code."""
    monkeypatch.setattr(support.stage, "told", set())


DECIDING = ["model.py", "reward.py", "support/tokens.py", "support/math_answers.py"]
DECIDING += ["support/sandbox.py", "support/judge.py", "support/algebra.py", "support/units.py"]
DECIDING += ["support/programs.py", "support/spelling.py"]
USUAL = {"support/cli.py", "reward.py", "support/units.py"}  # the others before a release


def test_what_decides_a_reward_or_a_step():
    """Whatever reward.py alone stands on, so also a file that a fork imports there."""
    assert {*DECIDING} <= support.stage.deciding_files() <= {*code_of(S), *DECIDING}
    assert not {"support/cli.py", "support/attention.py", S} & support.stage.deciding_files()
    assert not {L, C, "run.py", "evaluate.py"} & {*code_of(S)}


def test_code_is_followed_by_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(support.stage, "ROOT", tmp_path)
    (tmp_path / "support").mkdir()
    (tmp_path / "a.py").write_text(
        "from support import b, c\nimport d\ndef f():\n    import support.e\n"
    )
    for name in ("support/b", "support/c", "d", "support/e", "f"):
        (tmp_path / f"{name}.py").write_text("import json\n")
    files = ["a.py", "d.py", "support/b.py", "support/c.py", "support/e.py"]
    assert [*code_of("a.py")] == files


@pytest.mark.parametrize("half_done", [False, True])
@pytest.mark.parametrize("name", [S, "support/cli.py", *DECIDING])
def test_changed_code_is_said_unless_its_own_stage_is_half_done(name, half_done, work, untold):
    path = work / "run" / "samples.jsonl.manifest.json"
    alter(path, ("code", name))
    manifest = json.loads(path.read_text())
    if half_done:
        del manifest["output"]
    path.write_text(json.dumps(manifest))
    there = toy.hashes(work)
    code, out, err = toy.stage(S, toy.SAMPLE)
    if half_done and name == S:
        assert code == 2 and err.count("\n") == 1 and S in err and "--force" in err
        assert toy.hashes(work) == there
    else:
        assert code == 0 and not err
        assert (f"made with another {name}; all rewards" in out) == (name in DECIDING)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow)
        for name in ("support/cli.py", *DECIDING)
    ],
)
def test_rewards_and_steps_of_other_code_are_named_once(name, work, untold):
    """Labels of samples that an edited reward() or step_ends did not make: both would be mixed."""
    for output in ("samples.jsonl", "trees.jsonl", "critic"):
        path = work / "run" / f"{output}.manifest.json"
        if name in json.loads(path.read_text())["code"]:
            alter(path, ("code", name))
    code, out, _ = toy.stage(L, f"{toy.LABEL} --force")
    said = f"samples.jsonl: made with another {name}; all rewards and steps made by it are taken"
    assert code == 0 and (said in out) == (name in DECIDING)
    for script, flags in ((S, toy.SAMPLE), (C, f"{toy.CRITIC} --force")):
        code, out, _ = toy.stage(script, flags)
        assert code == 0 and "made with another" not in out


def test_a_flag_younger_than_the_manifest_had_its_default(work):
    path = work / "run" / "samples.jsonl.manifest.json"
    made = json.loads(path.read_text())
    del made["settings"]["mixed"]
    made["settings"]["gone"] = 3  # and one that is no more
    path.write_text(json.dumps(made))
    assert toy.stage(S, toy.SAMPLE)[0] == 0
    code, _, err = toy.stage(S, f"{toy.SAMPLE} --mixed")
    assert code == 2 and "--mixed was False, is True now" in err


def test_a_stage_from_a_notebook(work, monkeypatch, capsys):
    """No command line: stage(Settings(...)); an error leaves no lock that the corrected call meets."""
    import sample

    monkeypatch.setattr("sys.argv", ["notebook"])
    flags = {"actor": "tiny", "problems": "problems.jsonl", "n1": 5, "n": 4}
    # a notebook holds the last traceback, and with it all that the failed stage had open
    with pytest.raises(UserError) as held:
        sample.stage(sample.Settings(**flags, out="new/samples.jsonl", max_new=5000))
    assert "max_new" in str(held.value)
    sample.stage(sample.Settings(**flags, out="new/samples.jsonl", max_new=10))
    new, old = work / "new" / "samples.jsonl", work / "run" / "samples.jsonl"
    assert new.read_bytes() == old.read_bytes()
    with pytest.raises(UserError, match="made by sample.py, this is label_steps.py"):
        Output(L, "new/samples.jsonl", Settings("new/samples.jsonl"), {})


def test_differences():
    old = {"stage": "sample", "settings": {"n": 1, "gone": 2}, "inputs": {"p": "h"}, "grader": "1"}
    old |= {"paths": {"p": "a/p.jsonl"}, "facts": {"step": "line"}}
    defaults = {"n": 4, "young": 5}
    new = old | {"settings": {"n": 1, "young": 5, "batch": 6}}
    assert differences(old, new, defaults) == []
    for change, says in (
        ({"stage": "other"}, "made by sample.py, this is other.py"),
        ({"settings": {"n": 3, "young": 5}}, "--n was 1, is 3 now"),
        ({"settings": {"n": 1, "young": 6}}, "--young was 5, is 6 now"),
        ({"inputs": {"p": "i"}}, "a/p.jsonl has changed since"),
        (
            {"inputs": {"p": "i"}, "paths": {"p": "b/p.jsonl"}},
            "made from a/p.jsonl, this is b/p.jsonl",
        ),
        ({"inputs": {}, "paths": {}}, "made from a/p.jsonl, this is nothing"),
        ({"facts": {"step": "8"}}, "step was line, is 8 now"),
        ({"grader": "2"}, "math-verify was 1, is 2 now"),
    ):
        assert differences(old, new | change, defaults) == [says]


FACTS = {  # of the samples; what is said where the next stage has another
    "actor": "tiny has changed since",
    "problems": "problems.jsonl has changed since",
    "tokenizer": "made with another tokenizer",
    "template": "made with another template",
    "max_new": "made with max_new {}, this run has 10",
    "grader": "made with grader {}, this run has",
}


@pytest.mark.parametrize("fact", FACTS)
def test_next_stage_refuses_another_fact(fact, work):
    other = "12" if fact in ("max_new", "grader") else "0123456789abcdef"
    alter(work / "run" / "samples.jsonl.manifest.json", ("facts", fact), other)
    code, _, err = toy.stage(L, toy.LABEL.replace("run/trees", "new/trees"))
    assert code == 2 and err.count("\n") == 1
    assert f"run/samples.jsonl: {FACTS[fact].format(other)}" in err
    assert not (work / "new" / "trees.jsonl").exists()


def test_other_files_are_named(work):
    """Not by their hashes; and a run that is moved as a whole knows where its files are."""
    shutil.copytree("tiny", "other_model")
    with (work / "other_model" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x01")
    (work / "more.jsonl").write_bytes((work / "problems.jsonl").read_bytes() + b"\n")
    (work / "moved").mkdir()
    for name in ("tiny", "run", "problems.jsonl"):
        shutil.move(name, "moved")
    flags = toy.LABEL.replace("run/", "moved/run/").replace("tiny", "moved/tiny")
    flags = flags.replace("problems.jsonl", "moved/problems.jsonl")
    code, _, err = toy.stage(L, f"{flags} --out new/trees.jsonl --actor other_model")
    assert code == 2 and "made from moved/tiny, this is other_model" in err
    code, _, err = toy.stage(L, f"{flags} --out new/trees.jsonl --problems more.jsonl")
    assert code == 2 and "made from moved/problems.jsonl, this is more.jsonl" in err
    code, _, err = toy.stage(L, f"{flags} --problems more.jsonl")
    assert code == 2 and "made from moved/problems.jsonl, this is more.jsonl" in err


def test_a_critic_of_other_trees(work):
    """On purpose (m 2's critic, m 8's trees) it is a warning; a critic of trees that have changed since
    is refused."""
    flags = toy.LABEL.replace("run/trees", "more/trees").replace("--m 3", "--m 4")
    assert toy.stage(L, flags)[0] == 0
    actor = toy.ACTOR.replace("--out run", "--out new")
    code, out, err = toy.stage("train_actor.py", actor.replace("run/trees", "more/trees"))
    assert code == 0, err
    said = (
        "warning: run/critic: made from run/trees.jsonl, this is more/trees.jsonl; taken as it is"
    )
    assert said in out
    assert toy.stage(L, toy.LABEL.replace("--m 3", "--m 4") + " --force")[0] == 0
    code, _, err = toy.stage("train_actor.py", actor.replace("--out new", "--out newer"))
    assert code == 2 and "run/critic: run/trees.jsonl has changed since" in err
    assert err.count("\n") == 1 and not (work / "newer" / "actor").exists()


def test_changed_input(work):
    """One byte of an input, and the same command is refused, whether it was through or not."""
    path = work / "problems.jsonl"
    path.write_bytes(path.read_bytes().replace(b" 1 2 0", b" 1 3 0", 1))
    code, _, err = toy.stage(S, toy.SAMPLE)
    assert code == 2 and "problems.jsonl has changed since" in err and err.count("\n") == 1


def test_changed_output(work):
    path = work / "run" / "samples.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"reward": 0', b'"reward": 1', 1))
    code, _, err = toy.stage(S, toy.SAMPLE)
    assert code == 2 and "samples.jsonl: changed since" in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["[]", "3", "{"])
def test_a_broken_memory_of_hashes_is_made_again(text, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / ".sha256.json").write_text(text)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"x").hexdigest()


def test_complete_run_says_so(work, monkeypatch):
    """At once: before a model is loaded."""
    there = toy.hashes(work)
    monkeypatch.setattr(LM, "__init__", None)
    for script in (S, L, C):
        code, out, err = toy.stage(script, toy.FLAGS[script])
        assert code == 0 and out.endswith("complete, nothing to do\n") and not err
    assert toy.hashes(work) == there


def test_how_it_is_made_may_change_on_the_way(work):
    """After a full memory a smaller batch goes on, to the same bytes; another seed is refused."""
    path = work / "run" / "samples.jsonl"
    whole, manifest = path.read_bytes(), Path(f"{path}.manifest.json")
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    half = json.loads(manifest.read_text())
    del half["output"]
    manifest.write_text(json.dumps(half))
    code, _, err = toy.stage(S, f"{toy.FLAGS[S]} --seed 9")
    assert code == 2 and "--seed was" in err
    code, _, err = toy.stage(S, f"{toy.FLAGS[S]} --batch 16 --unsafe")
    assert code == 0 and not err and path.read_bytes() == whole
    assert json.loads(manifest.read_text())["settings"]["batch"] == 16


def test_deleted_output_is_made_again(work):
    there = toy.hashes(work)
    (work / "run" / "samples.jsonl").unlink()
    shutil.rmtree(work / "run" / "critic")
    for script in (S, C):
        assert toy.stage(script, toy.FLAGS[script])[0] == 0
    assert toy.hashes(work) == there


def test_second_writer(work):
    (work / "run" / "samples.jsonl.manifest.json").unlink()
    (work / "run" / "samples.jsonl").unlink()
    there = toy.hashes(work)
    with (work / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = toy.stage(S, toy.SAMPLE)
    assert code == 2 and "another stage is writing" in err and err.count("\n") == 1
    assert toy.hashes(work) == there
    assert toy.stage(S, toy.SAMPLE)[0] == 0


def test_output_of_any_name_resumes(work):
    """A JSONL that is not called .jsonl: no record twice."""
    flags = toy.SAMPLE.replace("run/samples.jsonl", "new/samples.txt")
    assert toy.stage(S, flags)[0] == 0
    path, whole = work / "new" / "samples.txt", (work / "new" / "samples.txt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    manifest = Path(f"{path}.manifest.json")
    made = json.loads(manifest.read_text())
    del made["output"]
    manifest.write_text(json.dumps(made))
    assert toy.stage(S, flags)[0] == 0
    assert path.read_bytes() == whole


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as `fit` sees them pass: none but where a test adds some."""
    now = [0.0]
    monkeypatch.setattr(training, "perf_counter", lambda: now[0])
    return now


def noise(i: int, part: int) -> torch.Tensor:
    """Of pack `part` of step i, (2, 3)."""
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(2 * i + part))


def regression(work: Path, clock, stop=None, poison=None, steps=13):
    """fit a linear model, with other noise in each pack; die in pack 1 of step `stop`. A minute
    passes every four steps, after which a checkpoint is due. -> its parameters"""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    data = torch.randn(4, 3)
    calls = []

    def loss(i, part):
        if (i, part) == (stop, 1):
            raise Stop
        calls.append(i)
        clock[0] += 61 if part == 1 and i % 4 == 3 else 0
        value = net(data[2 * part : 2 * part + 2] + noise(i, part)).square().mean() / 2
        return value * (poison[1] if poison and i == poison[0] else 1.0), {}

    fit(
        {"net": net},
        list(range(steps)),
        lambda i: [(i, 0), (i, 1)],
        loss,
        work,
        lr=0.1,
        save_minutes=1.0,
        name=lambda i: [f"problem {i}"],
    )
    return torch.cat([p.detach().flatten() for p in net.parameters()]), calls


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 8, 12])
def test_training_resumes_exactly(stop, tmp_path, clock):
    """Killed within step `stop` (4, 8, 12: the first after a checkpoint; 12: the last), then gone on: n steps, to the bit."""
    whole, _ = regression(tmp_path / "whole", clock)
    with pytest.raises(Stop):
        regression(tmp_path / "parts", clock, stop)
    resumed, calls = regression(tmp_path / "parts", clock)
    assert torch.equal(whole, resumed)
    assert calls[0] == stop // 4 * 4
    lines = [(tmp_path / f / "metrics.jsonl").read_text() for f in ("whole", "parts")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 13
    assert len(list((tmp_path / "parts").glob("step-*.pt"))) == 2
    again, calls = regression(tmp_path / "parts", clock)
    assert torch.equal(whole, again) and set(calls) == {12}  # none after the last step


def test_a_step_is_adamw_s_of_clipped_gradients_at_a_rate_that_rises_and_falls(tmp_path, clock):
    """Against formulas in float64, with gradients below and above the norm to which they are clipped."""
    found, _ = regression(tmp_path, clock, steps=40)
    torch.manual_seed(0)
    net, data = torch.nn.Linear(3, 1).double(), torch.randn(4, 3).double()
    w = torch.cat([p.detach().flatten() for p in net.parameters()])
    m, v, norms = torch.zeros(4).double(), torch.zeros(4).double(), []
    for i in range(40):
        g = torch.zeros(4).double()
        for part in (0, 1):
            x = data[2 * part : 2 * part + 2] + noise(i, part)
            x = torch.cat([x, torch.ones(2, 1)], 1)
            g += x.T @ (x @ w) / 2  # of the mean of squares / 2
        norms.append(float(g.norm()))
        g *= min(1.0, 1 / norms[-1])
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        rate = 0.1 * min((i + 1) / 2, 1 - 0.9 * i / 40)  # 5 % of 40 steps are 2
        w -= rate * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.95 ** (i + 1))).sqrt() + 1e-8)
    assert min(norms) < 0.7 and max(norms) > 2
    torch.testing.assert_close(found.double(), w, rtol=1e-4, atol=1e-5)


def test_broken_checkpoint(tmp_path, clock):
    regression(tmp_path, clock)
    os.truncate(tmp_path / "step-00000012.pt", 500)
    with pytest.raises(UserError, match="step-00000012.pt: broken"):
        regression(tmp_path, clock)
    (tmp_path / "step-00000012.pt").unlink()
    resumed, calls = regression(tmp_path, clock)
    assert calls[0] == 8 and torch.equal(resumed, regression(tmp_path / "whole", clock)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_go_wrong(value, tmp_path, clock):
    with pytest.raises(UserError, match="step 5: .*not finite"):
        regression(tmp_path, clock, poison=(5, value))
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert report["step"] == 5 and report["batch"] == ["problem 5"]
    assert [p.name for p in tmp_path.glob("step-*.pt")] == ["step-00000004.pt"]


def test_half_a_checkpoint_of_a_killed_run_is_removed(tmp_path, clock):
    (tmp_path / "step-00000003.new").mkdir()
    (tmp_path / "step-00000003.new" / "part").touch()
    (tmp_path / "step-00000007.pt.new").touch()
    regression(tmp_path, clock)
    assert not list(tmp_path.glob("*.new"))


def test_a_finished_stage_leaves_no_checkpoint(tmp_path):
    output = Output("train_actor.py", tmp_path / "actor", Settings(str(tmp_path / "actor")), {})
    (output.work / "clean" / "step-00000002.dcp").mkdir(parents=True)
    (output.work / "step-00000002.pt").touch()
    (output.work / "metrics.jsonl").touch()
    with output.open() as out:
        out.save(Path.mkdir)
    assert {path.name for path in output.work.rglob("*")} == {"clean", "metrics.jsonl"}


def test_no_room_for_checkpoints(tmp_path, monkeypatch, clock):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=100))
    with pytest.raises(UserError, match="checkpoints need"):
        regression(tmp_path, clock)
    assert not list(tmp_path.glob("step-*.pt"))


# ---------------------------------------------------------------------------------------------- data that is hardly there


def test_state_without_siblings():
    """One action has advantage 0 and no gap: the state is left out, its neighbours stay."""
    nodes = [{**NODE, "n": 2}, *({**NODE, "parent": p, "draws": 1} for p in (0, 1, 1))]
    q = torch.tensor([0.5, 0.5, 1.0, 0.0], dtype=torch.float64)
    states = advantage_states({"nodes": nodes}, q, gap=0.1)
    assert [s["node"] for s in states] == [1]


@pytest.mark.parametrize(
    ("text", "ends"), [("", []), ("\n", [1]), ("\n\n\n", [3]), ("\n 1\n\n 2", [4, 5])]
)
def test_empty_and_blank_responses(text, ends, ready):
    lm = load_lm(str(ready / "tiny"), device="cpu")
    assert lm.step_ends(lm.response_ids(text)[:-1]) == ends


def test_model_that_never_ends(work):
    """Every response is cut off: reward 0, no EOS in ids, and stage B says that nothing differs."""
    path = work / "tiny" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 99}))
    path = work / "tiny" / "tokenizer_config.json"  # whose own EOS would end a response too
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    shutil.rmtree(work / "run")
    toy.pipeline(S, L, C)
    responses = [x for r in read_jsonl(work / "run" / "samples.jsonl") for x in r["responses"]]
    assert all(not x["finished"] and x["reward"] == 0 and len(x["ids"]) == 10 for x in responses)
    code, _, err = toy.stage("train_actor.py", toy.ACTOR)
    assert code == 2 and "no state" in err and err.count("\n") == 1
    code, out, err = toy.stage("train_actor.py", f"{toy.ACTOR} --may_stay --force")
    assert code == 0 and "the actor stays as it is" in out, err
    start, end = [load_file(work / name / "model.safetensors") for name in ("tiny", "run/actor")]
    assert start.keys() == end.keys() and all(start[key].equal(end[key]) for key in start)
    assert (work / "run" / "actor.advantages.jsonl").read_bytes() == b""
    said = toy.together(work, "train_actor.py", 2, "--may_stay --force")
    assert [one["code"] for one in said] == [0, 0], said
