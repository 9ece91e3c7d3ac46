"""Each stage is killed with SIGKILL, started again with the same command, and ends with the files of a run left alone.

The short version kills in the middle of a line, between a line and its fsync, in the middle of a checkpoint, between
writing and renaming, after the last record, and at a random Python call. `pytest tests/test_crash.py --kills 100` kills
at every point that changes the disk, and 100 times more a stage, half of them from outside at a random time.
"""

import json
import os
import random
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


def test_as_a_user_would(alone, tmp_path):
    """The real command line: killed in the middle of a line, then started again."""
    folder, (start, end, _) = tmp_path / "work", alone["sample.py"]
    shutil.copytree(start, folder)
    flags = toy.FLAGS["sample.py"].split()
    code = (
        "import toy, os, signal, sys, runpy\n"
        "def tick(name):\n"
        "    if name == 'mid samples.jsonl': os.kill(os.getpid(), signal.SIGKILL)\n"
        "toy.install(tick)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = str(toy.ROOT / "sample.py")
    path = os.pathsep.join([str(toy.ROOT), str(toy.ROOT / "tests")])
    options = {"cwd": folder, "capture_output": True, "text": True, "check": False}
    options["env"] = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    prefix = f"import sys; sys.argv = {[script, *flags]!r}\n"
    killed = subprocess.run([sys.executable, "-c", prefix + code], **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = subprocess.run([sys.executable, script, *flags], **options)
    assert again.returncode == 0 and "torn last line" in again.stdout, again.stderr
    assert toy.hashes(folder) == toy.hashes(end)
