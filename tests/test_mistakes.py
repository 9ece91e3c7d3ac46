"""What users do wrong: exit code 2, one line on stderr that names it, no traceback, nothing changed on disk."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from safetensors.torch import load_file, save_file

import prepare
import support.cli

S, L, C = "sample.py", "label_steps.py", "train_critic.py"
A, E, P = "train_actor.py", "evaluate.py", "prepare.py"
SAMPLE = "--actor tiny --problems problems.jsonl --out new/samples.jsonl --n1 2 --n 1 --max_new 4"
LABEL = toy.LABEL.replace("run/trees", "new/trees")
CRITIC = toy.CRITIC.replace("--out run", "--out new")
ACTOR = toy.ACTOR.replace("--out run", "--out new")
EVALUATE = "--actor tiny --problems test.jsonl --out new/eval.jsonl --max_new 4"
REAL = "--out new --train jsonl:rows.jsonl --test jsonl:test_rows.jsonl"


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A finished run of all stages, beside it the foreign files of the table."""
    folder = tmp_path_factory.mktemp("mistakes") / "ready"
    toy.finished_run(folder, S, L, C, A, E)
    foreign(folder)
    return folder


def foreign(folder: Path):
    """Files and model folders that are wrong in one way each."""
    first, second = (folder / "problems.jsonl").read_text().splitlines()[:2]
    line = json.loads(first)

    def write(name, *lines):
        (folder / name).write_bytes(
            b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines)
        )

    def without(key, **more):
        return json.dumps({k: v for k, v in line.items() if k != key} | more)

    write("empty.jsonl", b"")
    write("blank.jsonl", "", "  ", "")
    write("twice.jsonl", first, second, first)
    write("text.jsonl", first, "What is 1 + 1?")
    write("cut.jsonl", first, second[:30])
    write("list.jsonl", json.dumps([line]))
    write("no_prompt.jsonl", without("prompt"))
    write("no_answer.jsonl", without("answer"))
    write("number.jsonl", without("answer", answer=18))
    write("id_list.jsonl", without("id", id=["a"]))
    write("bad_tests.jsonl", without("tests", tests="assert f(1) == 2"))
    write("bad_setup.jsonl", without("tests", tests={"setup": 1}))
    write("empty_prompt.jsonl", without("prompt", prompt=""))
    write("windows.jsonl", without("prompt", prompt="caf\u00e9 1").encode("cp1252"), b"\n")
    text = json.dumps(line | {"prompt": "caf\u00e9 1"}, ensure_ascii=False)
    write("windows.jsonl", text.encode("cp1252") + b"\n")
    write("utf16.jsonl", text.encode("utf-16"))
    write("nul.jsonl", first.encode() + b"\n" + bytes(20) + b"\n")
    write("deep.jsonl", "[" * 100_000)
    write("surrogate.jsonl", without("prompt", prompt="?").replace("?", "\\ud800"))
    write("bom.jsonl", b"\xef\xbb\xbf" + first.encode() + b"\n")
    write("crlf.jsonl", first.encode() + b"\r\n" + second.encode() + b"\r\n")
    write("other_ids.jsonl", without("id", id="else/1"))
    write("file", "x")
    write("rows.csv", "prompt,answer")
    (folder / "folder").mkdir()

    def model(name, change):
        shutil.copytree(folder / "tiny", folder / name)
        change(folder / name)

    model("no_tokenizer", lambda f: [p.unlink() for p in f.glob("tokenizer*")])
    model("no_config", lambda f: (f / "config.json").unlink())
    model("no_weights", lambda f: (f / "model.safetensors").unlink())
    model("half", lambda f: os.truncate(f / "model.safetensors", 4000))
    toy.tokenizer([" x"]).save_pretrained(folder / "other_tokenizer")
    model("other_words", lambda f: toy.tokenizer([" x"]).save_pretrained(f))

    def no_eos(f):
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            known = json.loads((f / name).read_text())
            (f / name).write_text(json.dumps({k: v for k, v in known.items() if "eos" not in k}))

    model("no_eos", no_eos)

    def no_break(f):
        text = (f / "tokenizer.json").read_text()
        known = json.loads(text)
        known["model"]["vocab"] = {
            w.replace("\n", "_"): i for w, i in known["model"]["vocab"].items()
        }
        (f / "tokenizer.json").write_text(json.dumps(known))

    model("no_break", no_break)

    def weights(change):
        def edit(f):
            known = {k: v.clone() for k, v in load_file(f / "model.safetensors").items()}
            change(known)
            save_file(known, f / "model.safetensors", {"format": "pt"})

        return edit

    name = "model.layers.0.mlp.up_proj.weight"
    model("misshapen", weights(lambda w: w.update({name: w[name][:3].clone()})))
    model("lacking", weights(lambda w: w.pop(name)))
    model("nan", weights(lambda w: w[name].fill_(float("nan"))))
    # found by fuzz_readers.py
    tree = json.loads((folder / "run" / "trees.jsonl").read_text().splitlines()[0])
    samples = json.loads((folder / "run" / "samples.jsonl").read_text().splitlines()[0])
    response = samples["responses"][0]
    for name, change in (
        ("parent", {"parent": 5}),
        ("wins", {"wins": 99}),
        ("huge", {"ids": [10**30]}),
        ("empty", {"ids": []}),
        ("reward", {"reward": 1.5}),
        ("flag", {"reward": True}),
    ):
        nodes = [*tree["nodes"]]
        nodes[1] = nodes[1] | change
        write(f"tree_{name}.jsonl", json.dumps(tree | {"nodes": nodes}))
    for name, change in (("ends", {"ends": [3, 2]}), ("text", {"text": None})):
        write(f"sample_{name}.jsonl", json.dumps(samples | {"responses": [response | change] * 5}))
    write("sample_kept.jsonl", json.dumps(samples | {"kept": [5]}))
    lines = (folder / "run" / "eval.jsonl").read_text().splitlines()
    write("eval_line.jsonl", *(x.replace('"sampled"', '"sample"') for x in lines))
    (folder / "odd").mkdir()
    shutil.copy(folder / "run" / "trees.jsonl", folder / "odd")
    made = json.loads((folder / "run" / "trees.jsonl.manifest.json").read_text())
    made["facts"]["tokenizer"] = {"a": 1}
    (folder / "odd" / "trees.jsonl.manifest.json").write_text(json.dumps(made))
    write("demo_list.jsonl", json.dumps({"prompt": " 1", "response": [1]}))
    shutil.copytree(folder / "run" / "critic", folder / "bad_head")
    os.truncate(folder / "bad_head" / "value_head.safetensors", 100)
    shutil.copytree(folder / "run", folder / "changed")
    flipped = (
        (folder / "changed" / "samples.jsonl").read_text().replace('"reward": 0', '"reward": 1', 1)
    )
    (folder / "changed" / "samples.jsonl").write_text(flipped)
    shutil.copytree(folder / "run", folder / "unfinished")
    for output in ("samples.jsonl", "trees.jsonl", "critic"):
        path = folder / "unfinished" / f"{output}.manifest.json"
        made = json.loads(path.read_text())
        del made["output"]
        path.write_text(json.dumps(made))
    shutil.copytree(folder / "run", folder / "broken")
    (folder / "broken" / "samples.jsonl.manifest.json").write_text("{")


# script, flags, what to change in them (a flag given twice: the last counts), what the line says
TABLE = [
    # flags
    (S, SAMPLE, "--bogus 3", "--bogus"),
    (S, SAMPLE, "--temprature=1", "--temprature"),
    (S, SAMPLE, "extra", "extra"),
    (S, "--actor tiny", "", "--problems, --out"),
    (P, "", "", "--out"),
    (E, "--actor tiny", "", "--problems"),
    (S, SAMPLE, "--n many", "--n"),
    (S, SAMPLE, "--n 1.5", "--n"),
    (S, SAMPLE, "--n", "--n"),
    (A, ACTOR, "--lr fast", "--lr"),
    (S, SAMPLE, "--n 40 --n1 32", "n1 = 32"),
    (S, SAMPLE, "--n 0", "--n 0"),
    (S, SAMPLE, "--max_new 0", "--max_new 0"),
    (S, SAMPLE, "--max_new -5", "--max_new -5"),
    (S, SAMPLE, "--batch 0", "--batch 0"),
    (S, SAMPLE, "--limit -1", "--limit -1: wanted a finite number, 0 or more"),
    (S, SAMPLE, "--first 5000", "--first 5000"),
    (S, SAMPLE, "--max_new 5000", "--max_new"),
    (L, LABEL, "--m 0", "--m 0"),
    (L, LABEL, "--max_new 4", "max_new"),
    (C, CRITIC, "--lr -1", "--lr -1"),
    (C, CRITIC, "--passes 0", "--passes 0"),
    (C, CRITIC, "--save_minutes 0", "--save_minutes 0"),
    (C, CRITIC, "--states some", "--states some"),
    (A, ACTOR, "--beta 0", "--beta 0"),
    (A, ACTOR, "--beta -0.1", "--beta -0.1"),
    (A, ACTOR, "--lr nan", "--lr nan"),
    (A, ACTOR, "--lr inf", "--lr inf"),
    (A, ACTOR, "--lr 1e3", "--lr 1000.0: wanted a finite number, above 0, at most 1"),
    (A, ACTOR, "--gap -1", "--gap -1.0: wanted a finite number, 0 or more"),
    (C, CRITIC, "--budget 10", "--budget 10: wanted a finite number, 256 or more"),
    (C, CRITIC, "--token_share 2", "0 or more, at most 1"),
    (A, ACTOR, "--kappa -1", "--kappa -1"),
    (A, ACTOR, "--kappa 0 --value_draws 1", "--value_draws 1.0"),
    (A, ACTOR, "--likelihood 0 --gap 1000", "--gap 1000"),
    (A, ACTOR.replace("--critic run/critic", ""), "", "--critic is missing"),
    (E, EVALUATE, "--samples -1", "--samples -1"),
    # paths
    (S, SAMPLE, "--problems nowhere.jsonl", "nowhere.jsonl"),
    (S, SAMPLE, "--problems folder", "error: folder: is a folder"),
    (S, SAMPLE, "--actor nowhere", "error: nowhere: no such folder"),
    (S, SAMPLE, "--actor run/nowhere", "error: run/nowhere: no such folder"),
    (S, SAMPLE, "--actor file", "error: file: "),
    (S, SAMPLE, "--out problems.jsonl", "problems.jsonl"),
    (S, SAMPLE, "--out problems.jsonl --force", "problems.jsonl"),
    (S, SAMPLE, "--out file/samples.jsonl", "error: file"),
    (S, SAMPLE, "--out folder", "error: folder: "),
    (A, ACTOR, "--out tiny", "tiny"),
    (A, ACTOR, "--out tiny --force", "tiny"),
    (A, ACTOR, "--critic nowhere", "nowhere"),
    (C, CRITIC, "--trees run/trees.json", "trees.json"),
    (C, CRITIC, "--held_out nowhere.jsonl", "nowhere.jsonl"),
    (E, EVALUATE, "--against nowhere.jsonl", "nowhere.jsonl"),
    (E, "--report nowhere", "", "nowhere"),
    # files swapped, of another run, unfinished or changed
    (S, SAMPLE, "--problems run/samples.jsonl", "prompt"),
    (S, SAMPLE, "--problems tiny/config.json", "config.json:1"),
    (S, SAMPLE, "--problems tiny/model.safetensors", "model.safetensors:1"),
    (L, LABEL, "--samples run/trees.jsonl", "responses"),
    (L, LABEL, "--problems run/samples.jsonl --samples problems.jsonl", "prompt"),
    (L, LABEL, "--problems test.jsonl", "made from problems.jsonl, this is test.jsonl"),
    (L, LABEL, "--actor run/actor", "made from tiny, this is run/actor"),
    (L, LABEL, "--actor other_words", "made with"),
    (L, LABEL, "--samples changed/samples.jsonl", "changed since"),
    (L, LABEL, "--samples unfinished/samples.jsonl", "unfinished"),
    (L, LABEL, "--samples broken/samples.jsonl", "manifest"),
    (C, CRITIC, "--trees run/samples.jsonl", "nodes"),
    (C, CRITIC, "--trees unfinished/trees.jsonl", "unfinished"),
    (A, ACTOR, "--trees run/samples.jsonl", "nodes"),
    (A, ACTOR, "--actor other_words", "made with"),
    (A, ACTOR, "--critic unfinished/critic", "unfinished"),
    (A, ACTOR, "--trees changed/trees.jsonl --critic bad_head", "value_head.safetensors"),
    (E, EVALUATE, "--against run/eval.jsonl --problems problems.jsonl", "toy/0"),
    (E, EVALUATE, "--problems test.jsonl,test.jsonl", "two of these files"),
    # the same output again, otherwise
    (S, toy.SAMPLE, "--seed 1", "seed was 0, is 1 now"),
    (S, toy.SAMPLE, "--problems test.jsonl", "problems"),
    (S, toy.SAMPLE, "--out run/trees.jsonl", "label_steps"),
    # what is in a file
    (S, SAMPLE, "--problems empty.jsonl", "empty"),
    (S, SAMPLE, "--problems blank.jsonl", "empty"),
    (S, SAMPLE, "--problems twice.jsonl", "twice.jsonl:3"),
    (S, SAMPLE, "--problems text.jsonl", "text.jsonl:2"),
    (S, SAMPLE, "--problems cut.jsonl", "cut.jsonl:2"),
    (S, SAMPLE, "--problems list.jsonl", "list.jsonl:1"),
    (S, SAMPLE, "--problems no_prompt.jsonl", "no_prompt.jsonl:1"),
    (S, SAMPLE, "--problems no_answer.jsonl", "no_answer.jsonl:1"),
    (S, SAMPLE, "--problems number.jsonl", "number.jsonl:1"),
    (S, SAMPLE, "--problems id_list.jsonl", "id_list.jsonl:1"),
    (S, SAMPLE, "--problems bad_tests.jsonl", "no usable tests"),
    (S, SAMPLE, "--problems bad_setup.jsonl", "no usable tests"),
    (S, SAMPLE, "--problems empty_prompt.jsonl", "empty_prompt.jsonl:1"),
    (S, SAMPLE, "--problems windows.jsonl", "UTF-8"),
    (S, SAMPLE, "--problems utf16.jsonl", "UTF-8"),
    (S, SAMPLE, "--problems nul.jsonl", "nul.jsonl:2"),
    (S, SAMPLE, "--problems deep.jsonl", "deep.jsonl:1"),
    (S, SAMPLE, "--problems surrogate.jsonl", "surrogate.jsonl:1"),
    (C, CRITIC, "--trees tree_parent.jsonl", "nodes[1]"),
    (C, CRITIC, "--trees tree_wins.jsonl", "nodes[1]"),
    (C, CRITIC, "--trees tree_huge.jsonl", "nodes[1] ids"),
    (C, CRITIC, "--trees tree_empty.jsonl", "nodes[1]"),
    (C, CRITIC, "--trees tree_reward.jsonl", "nodes[1] reward"),
    (C, CRITIC, "--trees tree_flag.jsonl", "nodes[1] reward"),
    (A, ACTOR, "--trees tree_parent.jsonl", "nodes[1]"),
    (L, LABEL, "--samples sample_ends.jsonl", "responses[0] ends; draw"),
    (L, LABEL, "--samples sample_kept.jsonl", "wrong kept; draw"),
    (L, LABEL, "--samples sample_text.jsonl", "responses[0] text"),
    (E, EVALUATE, "--against eval_line.jsonl", "no line of evaluate.py"),
    (C, CRITIC, "--trees odd/trees.jsonl", "manifest"),
    (C, CRITIC, "--held_out odd/trees.jsonl", "manifest"),
    (P, REAL, "--base tiny --demos jsonl:demo_list.jsonl", "response"),
    # models
    (S, SAMPLE, "--actor no_tokenizer", "no_tokenizer"),
    (S, SAMPLE, "--actor other_tokenizer", "other_tokenizer"),
    (S, SAMPLE, "--actor no_config", "no_config"),
    (S, SAMPLE, "--actor no_weights", "no_weights"),
    (S, SAMPLE, "--actor half", "error: half: "),
    (S, SAMPLE, "--actor misshapen", "misshapen"),
    (S, SAMPLE, "--actor lacking", "lacking"),
    (S, SAMPLE, "--actor nan", "nan: its logits are NaN"),
    (S, SAMPLE, "--actor no_eos", "EOS"),
    (S, SAMPLE, "--actor no_break", "line break"),
    # data sets
    (P, REAL, "--train gsm9k:rows.jsonl", "gsm9k"),
    (P, REAL, "--train rows.jsonl", "NAME:PATH"),
    (P, REAL, "--train jsonl:rows.jsonl,jsonl:rows.jsonl", "the id jsonl/rows/0"),
    (P, REAL, "--train jsonl:nowhere.jsonl", "nowhere.jsonl"),
    (P, "--out new", "--train jsonl:nowhere.jsonl --test jsonl:rows.jsonl", "check the path"),
    (S, SAMPLE, "--problems rows.jsonl", "prepare.py makes problems"),
    (P, REAL, "--train gsm8k:rows.jsonl", "question"),
    (P, REAL, "--train jsonl:rows.csv", "rows.csv"),
    (P, REAL, "--train jsonl:empty.jsonl", "empty.jsonl"),
    (P, REAL, "--train jsonl:windows.jsonl", "windows.jsonl"),
    (P, REAL, "--valid_share 1", "no training problem"),
    (P, REAL, "--train jsonl:test_rows.jsonl", "no training problem"),
    (P, "--out new --test jsonl:test_rows.jsonl", "", "--train"),
    (P, "--out new --train jsonl:rows.jsonl", "", "--test"),
    (P, REAL, "--base tiny", "--demos"),
    (P, REAL, "--demos jsonl:demos.jsonl", "--base"),
    (P, "--out new", "--steps 6", "--steps 6"),
    (P, "--out new", "--steps 4-2", "--steps 4-2"),
    (P, "--out new", "--steps 2-13", "1 to 12"),
    (P, "--out new", "--steps 1-1", "there are only"),
    (P, "--out new", "--wordings 65", "--wordings 65"),
    (P, "--out new", "--task code --wordings 2", "--wordings 2"),
    (P, "--out new", "--base tiny --demos math:rows.jsonl", "demonstrations"),
    (P, "--out new", "--base tiny --demos jsonl:rows.jsonl", "response"),
]


@pytest.mark.parametrize(
    ("script", "flags", "change", "says"), TABLE, ids=[f"{s[:-3]} {c or f}" for s, f, c, _ in TABLE]
)
def test_mistake(script, flags, change, says, ready, monkeypatch):
    monkeypatch.chdir(ready)
    there = toy.hashes(ready)
    code, _, err = toy.stage(script, f"{flags} {change}")
    after = toy.hashes(ready)
    after.pop("new/actor.work/values.jsonl", None)  # V, which the corrected command need not repeat
    if (ready / "new").exists():
        shutil.rmtree(ready / "new")
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert says in err, err
    assert after == there


def test_a_zero_that_has_a_use_is_no_mistake():
    support.cli.check_numbers(prepare.Settings(out="new", clean_seed=0, careless=0.0))


@pytest.mark.parametrize("name", ["bom.jsonl", "crlf.jsonl"])
def test_files_from_windows_work(name, ready, monkeypatch, tmp_path):
    monkeypatch.chdir(ready)
    flags = SAMPLE.replace("problems.jsonl", name).replace("new/", f"{tmp_path}/")
    code, _, err = toy.stage(S, flags)
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == ["toy/0", "toy/1"][: len(records)] and records


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(ready, monkeypatch, tmp_path):
    monkeypatch.chdir(ready)
    tmp_path.chmod(0o500)
    code, _, err = toy.stage(S, SAMPLE.replace("new/", f"{tmp_path}/"))
    assert code == 2 and str(tmp_path) in err and err.count("\n") == 1


def test_corrected_command_goes_on(ready, monkeypatch):
    """A refused run leaves nothing behind that refuses the corrected one."""
    monkeypatch.chdir(ready)
    for script, flags, wrong in (
        (A, ACTOR, "--likelihood 0 --gap 1000"),
        (S, SAMPLE, "--max_new 5000"),
    ):
        assert toy.stage(script, f"{flags} {wrong}")[0] == 2
        code, _, err = toy.stage(script, flags)
        shutil.rmtree(ready / "new")
        assert code == 0, err


@pytest.mark.parametrize("flags", [["--bogus", "1"], []])
def test_as_a_user_would(flags, ready):
    done = subprocess.run(
        [sys.executable, toy.ROOT / S, *flags],
        cwd=ready,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("script", [S, L, C, A, E, P])
def test_help_is_the_docstring_as_written_and_every_default(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = toy.stage(script, "--help")
    assert code == 0 and not err
    module = importlib.import_module(script[:-3])
    assert f"\n\n{module.__doc__}" in out
    assert "None" not in out and "(default: )" not in out
    words = " ".join(out[out.index("options:") :].split())
    for f in dataclasses.fields(module.Settings):
        assert f"--{f.name} " in words and " ".join(f.metadata["help"].split()) in words
        if f.default not in (dataclasses.MISSING, "", None):
            assert f"{f.metadata['help']} (default: {f.default})" in words
