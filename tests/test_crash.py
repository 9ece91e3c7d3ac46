"""Each stage is killed with SIGKILL, started again with the same command, and ends with the files of a run left alone.

The short version kills in the middle of a line, between a line and its fsync, in the middle of a checkpoint, between
writing and renaming, after the last record, and at a random Python call. `pytest tests/test_crash.py --kills 100` kills
at every point that changes the disk, and 100 times more a stage, half of them from outside at a random time.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import toy

STAGES = list(toy.FLAGS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Uninterrupted runs: {script: (folder before it, folder after it, {point: how often it is passed})}"""
    folder = tmp_path_factory.mktemp("crash") / "alone"
    folder.mkdir()
    toy.build(folder)
    child, runs = toy.Child(folder), {}
    for script in STAGES:
        if script == "prepare.py":
            shutil.rmtree(folder / "run")
        copies = [folder.parent / f"{script} {when}" for when in ("before", "after")]
        shutil.copytree(folder, copies[0])
        assert child(script, point=("none", 0)) == 0, child.log
        shutil.copytree(folder, copies[1])
        runs[script] = (*copies, child.log["points"])
    return runs


def finished(folder, script) -> set[str]:
    """Ids of the whole lines of a stage's output."""
    path = folder / "run" / toy.OUTPUT[script]
    if path.suffix != ".jsonl" or not path.exists():
        return set()
    return {json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]}


def newest_checkpoint(folder, script) -> int:
    work = folder / "run" / f"{toy.OUTPUT[script]}.work"
    return max((int(p.stem[5:]) for p in work.glob("step-*.pt")), default=0)


def survive(script, alone, folder, kills):
    """Die at each of `kills` (keywords of Child) on the way; whenever the stage gets through, compare and start anew."""
    start, end, _ = alone[script]
    child, died, wanted = toy.Child(folder), 0, toy.hashes(end)
    shutil.copytree(start, folder)
    for kill in [*kills, {}, {}]:
        done, step = finished(folder, script), newest_checkpoint(folder, script)
        code = child(script, **kill)
        assert not done & child.drawn, (kill, "finished records were generated again")
        if code == -signal.SIGKILL:
            died += 1
            assert done <= finished(folder, script), (kill, "finished records are gone")
            continue
        assert code == 0, (kill, child.log)
        said = child.log["out"]
        assert not step or f"at step {step} of" in said or "complete, nothing to do" in said, said
        assert toy.hashes(folder) == wanted, kill
        if kill:
            shutil.rmtree(folder)
            shutil.copytree(start, folder)
    assert died > len(kills) // 2
    assert "complete, nothing to do" in said and not child.drawn


@pytest.mark.parametrize("script", STAGES)
def test_killed_anywhere(script, alone, tmp_path, pytestconfig):
    points = alone[script][2]
    more, rng = int(pytestconfig.getoption("--kills")), random.Random(script)
    name = toy.OUTPUT[script]
    must = (
        f"mid {name}",
        f"after {name}",
        "half a save",
        "half a safe_save_file",
        "before replace",
    )
    chosen = {k: n for k, n in points.items() if more or k in must}
    kills = [{"point": (k, rng.randint(1, n))} for k, n in chosen.items()]
    kills += [{"point": ("after replace", points["after replace"])}]
    kills += [{"call": int(10 ** rng.uniform(4, 5.5))} for _ in range(1 + more // 2)]
    kills += [{"timeout": rng.uniform(0, 1.5)} for _ in range(more // 2)]
    rng.shuffle(kills)
    survive(script, alone, tmp_path / "work", kills)


FULL = {  # where the disk is full from, one after the other: (point, occurrence in that run)
    "sample.py": [
        ("mid samples.jsonl", 2),
        ("before fsync", 1),
        ("mid samples.jsonl.manifest.json.new", 1),
    ],
    "train_critic.py": [
        ("mid metrics.jsonl", 11),
        ("half a save", 4),
        ("half a safe_save_file", 1),
    ],
}


@pytest.mark.parametrize("script", FULL)
def test_disk_full(script, alone, tmp_path):
    """Every write fails from some point on: one line, exit code not 0, records kept; after room is made it goes on."""
    start, end, _ = alone[script]
    folder = tmp_path / "work"
    shutil.copytree(start, folder)
    child = toy.Child(folder)
    for point in FULL[script]:
        done = finished(folder, script)
        code = child(script, point=point, full=True)
        assert code in (1, 2), child.log
        err = child.log["err"]
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert done <= finished(folder, script)
    assert child(script) == 0, child.log
    assert toy.hashes(folder) == toy.hashes(end)


def test_small_disk(alone, tmp_path):
    """A real file system of 20 KB, made larger when it was full."""
    start, end, _ = alone["sample.py"]
    folder = tmp_path / "work"
    shutil.copytree(start, folder)
    run, child = folder / "run", toy.Child(folder)
    run.mkdir(exist_ok=True)
    kept = {p.name: p.read_bytes() for p in run.iterdir()}

    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", run], check=False, capture_output=True
        )

    if shutil.which("mount") is None or mount("size=20k").returncode:
        pytest.skip("this user may not mount a file system")
    try:
        for name, data in kept.items():
            (run / name).write_bytes(data)
        assert child("sample.py") == 1
        assert "No space left" in child.log["err"] and child.log["err"].count("\n") == 1
        mount("remount,size=4m")
        assert child("sample.py") == 0, child.log
        assert toy.hashes(folder) == toy.hashes(end)
    finally:
        subprocess.run(["umount", run], check=True)


@pytest.mark.parametrize(
    ("signals", "ends"),
    [
        pytest.param("9", -9, id="SIGKILL", marks=pytest.mark.slow),
        pytest.param("2", 130, id="Ctrl-C"),
        pytest.param("2, 2", -2, id="twice", marks=pytest.mark.slow),
    ],
)
def test_as_a_user_would(signals, ends, alone, tmp_path):
    """The real command line: stopped in the middle of a line, then started again."""
    folder, (start, end, _) = tmp_path / "work", alone["sample.py"]
    shutil.copytree(start, folder)
    flags = toy.FLAGS["sample.py"].split()
    code = (
        "import toy, os, sys, runpy\n"
        "def die(first, *rest):\n"
        "    try: os.kill(os.getpid(), first)\n"
        "    finally: rest and die(*rest)\n"
        "def tick(name):\n"
        f"    if name == 'mid samples.jsonl': die({signals})\n"
        "toy.install(tick)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = str(toy.ROOT / "sample.py")
    path = os.pathsep.join([str(toy.ROOT), str(toy.ROOT / "tests")])
    options = {"cwd": folder, "capture_output": True, "text": True}
    options["env"] = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    prefix = f"import sys; sys.argv = {[script, *flags]!r}\n"
    # Behind a shell's & the signal would be ignored.
    prefix += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    killed = subprocess.run([sys.executable, "-c", prefix + code], check=False, **options)
    assert killed.returncode == ends, killed.stderr
    if ends == 130:
        command = shlex.join([script, *flags])
        assert killed.stderr == f"stopped; to go on: python {command}\n"
    child = toy.Child(folder)
    assert child("sample.py") == 0 and "torn last line" in child.log["out"], child.log
    assert toy.hashes(folder) == toy.hashes(end)
