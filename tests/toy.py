"""A model of 17 tokens whose random draws are right now and then, its problems, and ways to run a stage on them.

`stage` runs a script in this process, as fast as it gets; `Child` runs it in a process of its own that kills itself with
SIGKILL at a named point or at the k-th Python call. Flags name files of the current folder, so no record holds a path.
"""

import ast
import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "--actor tiny --problems problems.jsonl --out run/samples.jsonl --n1 5 --n 4 --max_new 10"
LABEL = (
    "--actor tiny --problems problems.jsonl --samples run/samples.jsonl --out run/trees.jsonl "
    "--m 3 --max_new 10"
)
CRITIC = (
    "--trees run/trees.jsonl --critic_model tiny --out run/critic --lr 1e-2 --passes 1 --batch 40 "
    "--states all --token_share 0.5 --save_minutes 1e-9"
)
ACTOR = (
    "--actor tiny --trees run/trees.jsonl --critic run/critic --out run/actor --kappa 1 --lr 1e-2 "
    "--batch 200 --likelihood 1 --save_minutes 1e-9"
)
EVALUATE = "--actor run/actor --problems test.jsonl --out run/eval.jsonl --samples 2 --max_new 10"
PREPARE = (
    "--out run --train jsonl:rows.jsonl --test jsonl:test_rows.jsonl --base tiny "
    "--demos jsonl:demos.jsonl --passes 1"
)
FLAGS = {
    "sample.py": SAMPLE,
    "label_steps.py": LABEL,
    "train_critic.py": CRITIC,
    "train_actor.py": ACTOR,
    "evaluate.py": EVALUATE,
    "prepare.py": PREPARE,
}
OUTPUT = {  # what a stage writes, beside manifests and *.work
    "sample.py": "samples.jsonl",
    "label_steps.py": "trees.jsonl",
    "train_critic.py": "critic",
    "train_actor.py": "actor",
    "evaluate.py": "eval.jsonl",
    "prepare.py": "base",
}


def tokenizer(extra=()):
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    words = ["<|end|>", "<|user|>", "\n", "?", *(f" {i}" for i in range(10)), *extra]
    words += [f"The answer is {i}.\n" for i in range(3)]  # numbers only: no grader process to start
    model = tk.Tokenizer(tk.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    pieces = tk.Regex(r"<\|\w+\|>|The answer is \d\.\n|\n| \d|.")
    model.pre_tokenizer = tk.pre_tokenizers.Split(pieces, "isolated")
    model.decoder = tk.decoders.Fuse()
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "?"}
    made = PreTrainedTokenizerFast(tokenizer_object=model, **names)
    made.chat_template = "<|user|>{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    return made


def build(folder: Path):
    """tiny/ and the problem files, in `folder`."""
    from support.embedded import new_model
    from support.records import dump

    words = tokenizer()
    model = new_model(words, seed=0, layers=1, width=16)
    model.save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")

    def write(name, records):
        (folder / name).write_bytes(b"".join(map(dump, records)))

    def digits(i):
        return f" {i // 10 % 10} {i % 10} {i // 100}"

    base = {"source": "toy", "domain": "math", "tests": None}
    for name, start, count in (("problems.jsonl", 0, 70), ("test.jsonl", 500, 66)):
        rows = [
            {"id": f"toy/{start + i}", **base, "prompt": digits(start + i), "answer": str(i % 3)}
            for i in range(count)
        ]
        write(name, rows)
    write("rows.jsonl", [{"prompt": digits(i), "answer": "1"} for i in range(40)])
    write("test_rows.jsonl", [{"prompt": digits(i), "answer": "1"} for i in range(200, 210)])
    demos = [{"prompt": digits(i), "response": f" {i % 10}\nThe answer is 1.\n"} for i in range(96)]
    write("demos.jsonl", demos)


def stage(script: str, flags: str | list[str]) -> tuple[int, str, str]:
    """Run a script as __main__ in this process and folder. -> (exit code, stdout, stderr)"""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [str(ROOT / script), *(flags.split() if isinstance(flags, str) else flags)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        finally:
            sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def pipeline(*scripts):
    """Run these stages; any error is the test's."""
    for script in scripts:
        code, _, err = stage(script, FLAGS[script])
        assert code == 0, (script, err)


def finished_run(folder: Path, *scripts):
    """Make `folder` with the model, the problems and what these stages write."""
    folder.mkdir()
    with contextlib.chdir(folder):
        build(folder)
        pipeline(*scripts)


def content(path: Path) -> bytes:
    """A file's bytes; of a checkpoint its tensors', since pickle numbers equal strings by where they came from."""
    if path.suffix != ".pt":
        return path.read_bytes()
    with zipfile.ZipFile(path) as z:
        return b"".join(z.read(name) for name in z.namelist() if "/data/" in name)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but clocks, locks and the memory of hashes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(content(p)).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "timing.jsonl" and not p.name.startswith((".lock", ".sha256"))
    }


# ---------------------------------------------------------------------------------------------- processes that die


class Halves:
    """A file whose every write happens in two halves, with points to die between and after them."""

    def __init__(self, file, tick):
        self.file, self.tick, self.name = file, tick, Path(file.name).name

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.tick(f"mid {self.name}")
        self.file.write(data[len(data) // 2 :])
        self.file.flush()
        self.tick(f"after {self.name}")
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.file.close()


def install(tick):
    """Call tick(name) around everything that changes the disk."""
    import safetensors.torch
    import torch
    import transformers.modeling_utils

    def around(module, name):
        real = getattr(module, name)

        def wrapper(*args, **kwargs):
            tick(f"before {name}")
            result = real(*args, **kwargs)
            tick(f"after {name}")
            return result

        setattr(module, name, wrapper)

    def halved(module, name):  # a file that a library writes: left half written
        real = getattr(module, name)

        def wrapper(data, path, *args, **kwargs):
            real(data, path, *args, **kwargs)
            whole = Path(path).read_bytes()
            with open(path, "wb") as f:
                f.write(whole[: len(whole) // 2])
                f.flush()
                tick(f"half a {name}")
                f.write(whole[len(whole) // 2 :])

        setattr(module, name, wrapper)

    for name in ("fsync", "replace", "truncate"):
        around(os, name)
    around(Path, "unlink")
    halved(torch, "save")
    halved(safetensors.torch, "save_file")
    halved(transformers.modeling_utils, "safe_save_file")
    real_open = Path.open

    def open_halved(self, mode="r", *args, **kwargs):
        file = real_open(self, mode, *args, **kwargs)
        return file if mode in ("r", "rb") else Halves(file, tick)

    Path.open = open_halved


def _run(script, flags, folder, point, call, full, log):
    """In the child: at point (name, occurrence) die, or if `full` find the disk full from there on; die at the call-th
    Python call; else log what was passed."""
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    import safetensors

    drawn, count, calls, no_room = set(), Counter(), 0, False

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def tick(name):
        nonlocal no_room
        count[name] += 1
        if point == (name, count[name]):
            no_room = full
            if not full:
                die()
        if no_room and name == "half a save":
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        if no_room and name.startswith("half"):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        if no_room and name.startswith(("mid", "before fsync", "before truncate")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def profile(frame, event, arg):
        nonlocal calls
        calls += event == "call"
        if calls == call:
            die()

    real_hash = hashlib.blake2b  # what `draw_key` hashes is (seed, stage, problem, ...)

    def blake2b(data, **options):
        problem = ast.literal_eval(data.decode())[2]
        if problem not in drawn:
            drawn.add(problem)
            os.write(record, f"{problem}\n".encode())
        return real_hash(data, **options)

    record = os.open(f"{log}.drawn", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    hashlib.blake2b = blake2b
    if point is not None:
        install(tick)
    if call is not None:
        sys.setprofile(profile)
    code, out, err = stage(script, flags)
    sys.setprofile(None)
    with open(log, "w") as f:
        json.dump({"out": out, "err": err, "points": count, "calls": calls}, f)
    sys.stdout.flush()
    os._exit(code)


def forks():
    """Processes forked from one that has the libraries loaded: a fresh one would take seconds to start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["prepare", "transformers.models.llama.modeling_llama", "safetensors.torch"]
    )
    return context


def _rank(environment, function, arguments):
    os.environ.update(environment)
    function(*arguments)


def ranks(processes: int, function, *arguments) -> list[int]:
    """Run function(rank, *arguments) in several processes, in the environment that torchrun gives;
    -> their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        process = forks().Process(target=_rank, args=(environment, function, (rank, *arguments)))
        process.start()
        running.append(process)
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def _stage_of_rank(rank, script, flags, folder, first):
    os.chdir(folder)
    if first:
        first()
    code, out, err = stage(script, flags)
    _log(folder, rank).write_text(json.dumps({"out": out, "err": err}))
    os._exit(code)


def _log(folder: Path, rank: int) -> Path:
    return folder.parent / f"{folder.name}.{rank}.log"


def together(folder: Path, script: str, processes: int, more="", first=None) -> list[dict]:
    """Run a stage in several processes, as torchrun does; first: called in each before it.

    -> what each said, {"code", "out", "err"}; one that dies is not noticed by the others.
    """
    codes = ranks(processes, _stage_of_rank, script, f"{FLAGS[script]} {more}", folder, first)
    said = []
    for rank, code in enumerate(codes):
        said.append({"code": code, **json.loads(_log(folder, rank).read_text())})
    return said


class Child:
    """Runs a stage in a process of its own that may die; `log` is what the last one said."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder.parent / f"{folder.name}.log"
        self.context = forks()

    def __call__(self, script, point=None, call=None, timeout=None, full=False) -> int:
        """-> exit code; -9: killed. timeout: seconds after which it is killed from outside."""
        self.file.unlink(missing_ok=True)
        arguments = (script, FLAGS[script], self.folder, point, call, full, self.file)
        process = self.context.Process(target=_run, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        self.log = json.loads(self.file.read_text()) if self.file.exists() else None
        drawn = Path(f"{self.file}.drawn")
        self.drawn = set(drawn.read_text().split()) if drawn.exists() else set()
        return process.exitcode


def watch(pid):
    """-> a function that waits for the process to end, at most 30 s, and says whether it did."""
    fd = os.pidfd_open(int(pid))
    return lambda *_: bool(select.select([fd], [], [], 30)[0])
