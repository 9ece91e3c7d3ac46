"""The sandbox against programs that are right, wrong, broken and hostile: a row each, in every mode there is."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.cli import UserError
from support.judge import decode, encode, same, same_text
from support.programs import extract_program
from support.sandbox import Sandbox, Worker

ROOT = os.getuid() == 0
NONCE = secrets.token_hex(4)  # names the processes and files of this run
NEEDLE = "need" + "le-" + secrets.token_hex(8)  # an expected value that no program can compute

TOO_LONG = 600  # seconds, after which what should end counts as stuck, however busy the machine is

SQUARE = {"entry": "f", "inputs": [[2], [3]], "outputs": [4, 9], "seconds": 0.3, "megabytes": 256}
PRINT = SQUARE | {"kind": "stdin", "inputs": ["2\n", "3\n"], "outputs": ["4\n", "9\n"]}
CHECK = SQUARE | {
    "kind": "assert",
    "code": "def check(g):\n assert g(2) == 4\n assert g(3) == 9\ncheck(f)",
}
TRUE = SQUARE | {"outputs": [True, True]}
HIDDEN = SQUARE | {"outputs": [NEEDLE, NEEDLE], "seconds": 5, "megabytes": 512}
LARGE = {"megabytes": 1024, "seconds": 12}

GOOD = "def f(x): return x * x\n"
BAD = "def f(x): return 3\n"
STRAY = f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{NONCE}')\n"  # PR_SET_NAME; forks inherit it
# what is dangerous runs only where the sandbox works, so that a broken one costs a test and not the machine
CONFINED = "import os\nassert os.getpid() == 1 or os.getuid() > 10**9\n"

HUNT = """
import gc, glob, os, re, sys
def hunt():
    want = re.compile("need" "le-[0-9a-f]{16}")
    frame, seen = sys._getframe(), gc.get_objects()
    while frame:
        seen += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    texts = [repr(thing)[:10**6] for thing in seen if type(thing) in (dict, list, tuple, str)]
    for name in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/fd/*"):
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
            texts.append(os.read(fd, 10**6).decode(errors="replace"))
        except OSError: pass
    for name in glob.glob("/proc/[0-9]*/maps"):
        try:
            memory = open(name.replace("maps", "mem"), "rb", 0)
            for line in open(name):
                if "rw-p" in line:
                    low, high = (int(part, 16) for part in line.split()[0].split("-"))
                    memory.seek(low)
                    texts.append(memory.read(min(high - low, 10**7)).decode(errors="replace"))
        except (OSError, ValueError): pass
    return next((found.group() for text in texts if (found := want.search(text))), None)
def f(x): return hunt()
"""

# name: tests, program, verdicts that will do. A right verdict is asked for where a program is right all the same.
CASES = {
    "right": (SQUARE, GOOD, "right"),
    "right, printed": (PRINT, "print(int(input()) ** 2)", "right"),
    "right, asserted": (CHECK, GOOD, "right"),
    "keyword, asserted": (CHECK | {"code": "assert f(x=2) == 4"}, GOOD, "wrong"),
    "exception, asserted": (
        CHECK | {"code": "try: f(2)\nexcept ValueError: pass\nelse: assert False"},
        "def f(x): raise ValueError",
        "error",
    ),
    "noisy prints": (
        SQUARE,
        "def f(x):\n print('x' * 10**6, flush=True)\n return x * x\nprint('passed')",
        "right",
    ),
    "class Solution": (SQUARE, "class Solution:\n def f(self, x): return x * x", "right"),
    "recursion, stack of a thread": (
        PRINT | LARGE,
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
            "def down(n): return 0 if n == 0 else 1 + max([down(n - 1)], key=lambda v: v)\n"
            "def main(): down(30000); print(int(input()) ** 2)\nthreading.Thread(target=main).start()"
        ),
        "right",
    ),
    "recursion, main stack": (
        SQUARE | LARGE,
        (
            "import sys\nsys.setrecursionlimit(10**6)\ndef down(n): return n and down(n - 1)\n"
            "def f(x): return down(50000) + x * x"
        ),
        "right",
    ),
    "setsid child": (
        SQUARE,
        STRAY
        + "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(99)\n os._exit(0)\n"
        + GOOD,
        "right",
    ),
    "child that holds stdout": (
        PRINT,
        STRAY + "print(int(input()) ** 2, flush=True)\nif os.fork() == 0: time.sleep(99)",
        "right",
    ),
    "main guard": (
        PRINT,
        "def main(): print(int(input()) ** 2)\nif __name__ == '__main__': main()",
        "right",
    ),
    "no main guard in a call": (SQUARE, GOOD + "if __name__ == '__main__': input()", "right"),
    "exit after the answer": (PRINT, "print(int(input()) ** 2); exit()", "right"),
    "answer at exit": (
        PRINT,
        "import atexit\natexit.register(lambda: print(int(input()) ** 2))",
        "right",
    ),
    "reads and writes bytes": (
        PRINT,
        "import os\nos.write(1, b'%d' % (int(os.read(0, 9)) ** 2))",
        "right",
    ),
    "extra white space": (PRINT, "print('\\n ', int(input()) ** 2, ' \\n\\n')", "right"),
    "mutates its arguments": (
        CHECK | {"code": "a = [2]\nassert f(a) == 2\nassert a == [2]"},
        "def f(a): return a.pop()",
        "right",
    ),
    "plain values": (
        SQUARE
        | {
            "inputs": [[1]],
            "outputs": [encode((1, {2.5: {3}}, b"x", 1j, float("inf"), 10**5000, "\ud800"))],
        },
        "def f(x): return (1, {2.5: {3}}, b'x', 1j, float('inf'), 10**5000, '\\ud800')",
        "right",
    ),
    "JSON's view": (
        SQUARE | {"outputs": [{"!json": [[2, 2], {"1": 2}]}] * 2},
        "def f(x): return (2, 2), {1: 2}",
        "right",
    ),
    "wrong": (SQUARE, BAD, "wrong"),
    "wrong, printed": (PRINT, "print(3)", "wrong"),
    "wrong, asserted": (CHECK, BAD, "wrong"),
    "half right": (SQUARE, "def f(x): return 4", "wrong"),
    "half right, printed": (PRINT, "print(4)", "wrong"),
    "half right, asserted": (CHECK, "def f(x): return 4", "wrong"),
    "bare except in the test code": (
        CHECK | {"code": "try: f(2)\nexcept: pass"},
        "def f(x): 1 / 0",
        "error",
    ),
    "syntax error": (SQUARE, "def f(x) return x * x", "error"),
    "missing function": (SQUARE, "def g(x): return x * x", "error"),
    "empty": (SQUARE, " \n", "no answer"),
    "none": (PRINT, None, "no answer"),
    "no test": (SQUARE | {"inputs": [], "outputs": []}, GOOD, "error"),
    "no assertion": (CHECK | {"code": ""}, GOOD, "error"),
    "prints passed": (PRINT, "print('passed')", "wrong"),
    "sys.exit(0)": (SQUARE, "import sys; sys.exit(0)", "error"),
    "os._exit(0)": (SQUARE, "import os; os._exit(0)", "error"),
    "sys.exit(0) in the call": (SQUARE, "import sys\ndef f(x): sys.exit(0)", "error"),
    "os._exit(0) in the call": (CHECK, "import os\ndef f(x): os._exit(0)", "error"),
    "raises AssertionError": (CHECK, "def f(x): raise AssertionError", "error"),
    "__eq__ is always true": (
        SQUARE,
        "class A:\n def __eq__(s, o): return True\ndef f(x): return A()",
        "wrong",
    ),
    "__eq__, asserted": (
        CHECK,
        "class A:\n def __eq__(s, o): return True\ndef f(x): return A()",
        "wrong",
    ),
    "int subclass": (SQUARE, "class I(int): pass\ndef f(x): return I(x * x)", "wrong"),
    "True for 1": (SQUARE | {"outputs": [1, 1]}, "def f(x): return True", "wrong"),
    "1 for True": (TRUE, "def f(x): return 1", "wrong"),
    "tuple for list": (SQUARE | {"outputs": [[2], [3]]}, "def f(x): return x,", "wrong"),
    "NaN": (SQUARE | {"atol": 1e-6}, "def f(x): return float('nan')", "wrong"),
    "NaN, asserted": (CHECK, "def f(x): return float('nan')", "wrong"),
    "patches": (
        SQUARE,
        "import builtins, json, sys\njson.dumps = lambda *a: '4'\njson.loads = lambda *a: [2]\n"
        "builtins.all = lambda *a: True\nsys.stdout = None\nbuiltins.type = lambda *a: int\n" + BAD,
        "wrong|error",
    ),
    "forged replies": (
        SQUARE,
        "import os\nfor fd in range(64):\n try: os.write(fd, b'4\\n' + b'[\"right\", []]\\n')\n except OSError: pass\n"
        + BAD,
        "wrong|error",
    ),
    "forged tag": (SQUARE, "import os\ndef f(x): os.write(3, b'{\"!set\": [[]]}\\n')\n", "wrong"),
    "hunts for the expected value": (HIDDEN, HUNT, "wrong|error"),
    "kills the parent": (
        SQUARE,
        CONFINED
        + "for pid in (os.getppid(), -1):\n try: pid and os.kill(pid, 9)\n except OSError: pass\n"
        + BAD,
        "wrong|error",
    ),
    "endless loop": (SQUARE, "while True: pass", "timed out"),
    "endless loop in the call": (CHECK, "def f(x):\n while True: pass", "timed out"),
    "endless loop, printed": (PRINT, "while True: pass", "timed out"),
    "sleeps": (SQUARE, "import time\ndef f(x): time.sleep(99)", "timed out"),
    "ignores signals": (
        SQUARE,
        (
            "import signal\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except (OSError, ValueError): pass\n"
            "while True:\n try:\n  while True: pass\n except: pass"
        ),
        "timed out",
    ),
    "9**9**9": (SQUARE, "def f(x): return 9**9**9", "timed out|error"),
    "memory at once": (SQUARE, "def f(x):\n a = bytearray(2**29)\n return x * x", "error"),
    "memory bit by bit": (
        SQUARE | {"seconds": 4},
        "def f(x):\n a = []\n for _ in range(500): a.append(b'x' * 2**20)\n return x * x",
        "error",
    ),
    "memory of children": (
        SQUARE | {"seconds": 4},
        STRAY
        + "for _ in range(8):\n if os.fork() == 0:\n  a = b'x' * 100 * 2**20; time.sleep(9)\n"
        + "for _ in range(8): os.wait()\n"
        + GOOD,
        "error",
    ),
    "fork bomb": (
        SQUARE | {"seconds": 0.1},
        CONFINED + STRAY + "while True:\n try: os.fork()\n except OSError: pass",
        "timed out|error",
    ),
    "thread bomb": (
        SQUARE,
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "timed out|error",
    ),
    "endless output": (PRINT, "while True: print('x' * 10**6)", "timed out|error"),
    "endless output in a call": (SQUARE, "def f(x):\n while True: print('x' * 10**6)", "timed out"),
    "256 MB return": (SQUARE | LARGE, "def f(x): return 'x' * 2**28", "error"),
    "100,000 deep return": (
        SQUARE,
        "def f(x):\n a = []\n for _ in range(10**5): a = [a]\n return a",
        "wrong|error",
    ),
    "the same, no limit": (
        SQUARE | LARGE,
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n a = []\n for _ in range(10**5): a = [a]\n return a",
        "wrong|error",
    ),
    "deep forged reply": (
        SQUARE,
        "import os\ndef f(x): os.write(3, b'[' * 10**5 + b'\\n')",
        "wrong|error",
    ),
    "long forged number": (
        SQUARE,
        "import os\ndef f(x): os.write(3, b'9' * 10**5 + b'\\n')",
        "wrong|error",
    ),
    "trickles": (
        SQUARE | {"seconds": 0.1},
        "import os, time\ndef f(x):\n while True: os.write(3, b'1'); time.sleep(.01)",
        "timed out",
    ),
    "fills the disk": (
        SQUARE | LARGE,
        (
            "def f(x):\n for n in range(9):\n  with open(f'file{n}', 'wb') as file:\n"
            "   for _ in range(20): file.write(b'x' * 2**20)\n return x * x"
        ),
        "error",
    ),
    "raises its limits": (
        SQUARE,
        "import resource\nfor name in dir(resource):\n if name.startswith('RLIMIT'):\n"
        "  try: resource.setrlimit(getattr(resource, name), (-1, -1))\n  except (OSError, ValueError): pass\n"
        "a = bytearray(2**29)\n" + GOOD,
        "error",
    ),
    "becomes another user": (
        SQUARE,
        "import os\nfor call in (os.setuid, os.setgid):\n try:\n  call(0)\n  call(1)\n except OSError: continue\n "
        + BAD,
        "error|wrong",
    ),
    "segfault": (SQUARE, "import ctypes\ndef f(x): ctypes.string_at(0)", "error"),
    "surrogates, printed": (PRINT, "print('\\ud800')", "error|wrong"),
    "surrogates": (SQUARE, "def f(x): return '\\ud800'", "wrong"),
    "null byte": (SQUARE, GOOD + "\0", "error"),
    "surrogate in the program": (SQUARE, GOOD + "# \ud800", "error|right"),
}

FALLBACK = {"fills the disk", "memory of children"}  # not kept in by a user id alone
UNSAFE = [
    "right",
    "right, printed",
    "wrong",
    "setsid child",
    "child that holds stdout",
    "endless loop",
    "sleeps",
]


def python_for(mode):
    """The interpreter, unless an unprivileged user cannot import its library; then the system's."""
    return sys.executable if mode != "uid" else "/usr/bin/python3"


@pytest.fixture(scope="module", params=["root", "user", "uid", "none"])
def sandbox(request):
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "executable", python_for(request.param))
    own = tempfile.mkdtemp()  # of these judges: what others do in /tmp is no matter of ours
    os.chmod(own, 0o711)
    patch.setenv("TMPDIR", own)
    try:
        with started(1, unsafe=True, modes=[request.param]) as sandbox:
            yield sandbox
    except UserError:
        pytest.skip(f"mode {request.param} is not to be had on this machine by this user")
    finally:
        patch.undo()
        shutil.rmtree(own)


@contextlib.contextmanager
def started(*args, **kwargs):
    sandbox = Sandbox(*args, **kwargs)
    try:
        yield sandbox
    finally:
        sandbox.close()


def run(sandbox, jobs):
    """(verdict, values) of each (tests, program), as many at once as there are judges."""
    with ThreadPoolExecutor(sandbox.workers) as pool:
        return list(pool.map(sandbox.run, *zip(*jobs)))


def verdicts(sandbox, jobs):
    return [verdict for verdict, _ in run(sandbox, jobs)]


def answers(sandbox, jobs):
    """What each program's function returns for the inputs."""
    found = run(sandbox, [(tests | {"outputs": None}, program) for tests, program in jobs])
    return [values if verdict == "right" else verdict for verdict, values in found]


def processes():
    """{pid: (name, parent)}"""
    found = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                name, fields = file.read().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        found[int(path.split("/")[2])] = name, int(fields.split()[1])
    return found


def stragglers(judge):
    """What a program left: processes that it named, and children of the judge's zygote."""
    alive = processes()
    zygotes = [pid for pid, (_, parent) in alive.items() if parent == judge.pid]
    return [pid for pid, (name, parent) in alive.items() if name == NONCE or parent in zygotes]


@pytest.mark.parametrize("name", CASES)
def test_case(sandbox, name):
    if (
        sandbox.mode in ("uid", "none")
        and name in FALLBACK
        or sandbox.mode == "none"
        and name not in UNSAFE
    ):
        pytest.skip(f"mode {sandbox.mode} does not promise it")
    if name == "fork bomb" and sandbox.mode == "user" and ROOT:
        pytest.skip("the kernel limits the processes of users, but not of root")
    tests, program, allowed = CASES[name]
    if program and program.strip():
        program = STRAY + program
    judge = sandbox._judges.get()
    sandbox._judges.put(judge)
    begin = time.monotonic()
    (verdict,) = verdicts(sandbox, [(tests, program)])
    assert time.monotonic() - begin < TOO_LONG
    assert verdict in allowed.split("|")
    assert judge.poll() is None, "the judge has died"
    while left := stragglers(judge):  # a candidate's warden says that it is gone, and then goes
        assert time.monotonic() - begin < TOO_LONG, left
    while left := glob.glob(os.environ["TMPDIR"] + "/*"):  # of the judges alone
        assert time.monotonic() - begin < TOO_LONG, left
    assert verdicts(sandbox, [(SQUARE, f"{GOOD}# {name}")]) == ["right"]


def test_no_file_outside(sandbox, tmp_path):
    if not sandbox.mode in ("root", "user"):
        pytest.skip(f"mode {sandbox.mode} does not promise it")
    folders = [
        "/",
        "/tmp",
        "/var/tmp",
        "/dev",
        "/dev/shm",
        "/usr",
        "/usr/lib",
        "/run",
        f"/proc/1/root{tempfile.gettempdir()}",
    ]
    folders += [
        sys.base_prefix,
        os.path.expanduser("~"),
        os.getcwd(),
        str(tmp_path),
        os.path.dirname(os.__file__),
    ]
    program = f"""
def f(x):
    for folder in {folders}:
        try: open(folder + "/{NONCE}", "w").close()
        except OSError: pass
    with open("{NONCE}", "w") as file: file.write("x")
    return len(open("{NONCE}").read())
"""
    jobs = [(SQUARE | {"inputs": [[0]], "outputs": [1]}, program)]
    assert verdicts(sandbox, jobs) == ["right"]
    assert not [folder for folder in folders if os.path.exists(f"{folder}/{NONCE}")]
    empty = "import os\ndef f(x): return os.listdir()"
    assert answers(sandbox, [(SQUARE, empty)]) == [[[], []]], (
        "the next program finds an empty folder"
    )


def test_the_files_of_others_are_out_of_sight(sandbox, tmp_path):
    if not sandbox.mode in ("root", "user"):
        pytest.skip(f"mode {sandbox.mode} does not promise it")
    (tmp_path / "problems.jsonl").write_text(NEEDLE)
    look = f"import os\ndef f(x): return os.path.exists({str(tmp_path)!r}) or os.path.exists('/etc/passwd')"
    assert answers(sandbox, [(SQUARE, look)]) == [[False, False]]


def test_network(sandbox):
    """A listener on loopback sees nothing, by address or by name in the abstract space."""
    if not sandbox.mode in ("root", "user"):
        pytest.skip(f"mode {sandbox.mode} does not promise it")
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as named:
        listener.bind(("127.0.0.1", 0))
        named.bind(f"\0{NONCE}")
        for server in (listener, named):
            server.listen()
            server.settimeout(0.2)
        program = f"""
import socket
def f(x):
    for family, address in ((socket.AF_INET, ("127.0.0.1", {listener.getsockname()[1]})), (socket.AF_UNIX, "\\0{NONCE}")):
        try: socket.socket(family).connect(address)
        except OSError: pass
    return x * x
"""
        assert verdicts(sandbox, [(SQUARE, program)]) == ["right"]
        for server in (listener, named):
            with pytest.raises(TimeoutError):
                server.accept()


def test_no_privilege(sandbox):
    """No root, no capability, none to be had by setuid programs or a user namespace."""
    if sandbox.mode not in ("root", "user"):
        pytest.skip(f"mode {sandbox.mode} does not promise it")
    look = """
import ctypes, os
def f(x):
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
    found = [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs")]
    return found + [os.getuid() > 10**9, ctypes.CDLL(None).unshare(0x10000000)]
"""
    expected = [0, 0, 0, 0, 1, sandbox.mode == "root", -1]
    assert answers(sandbox, [(SQUARE, look)]) == [[expected, expected]]


def test_shared_memory_does_not_outlive_a_program(sandbox):
    if not sandbox.mode in ("root", "user"):
        pytest.skip(f"mode {sandbox.mode} does not promise it")
    make = "import ctypes\ndef f(x): return ctypes.CDLL(None).shmget(4711, 4096, 0o1666) >= 0"
    find = "import ctypes\ndef f(x): return ctypes.CDLL(None).shmget(4711, 4096, 0o666) >= 0"
    assert answers(sandbox, [(SQUARE, make), (SQUARE, find)]) == [[True, True], [False, False]]


def test_a_busy_machine_changes_no_verdict():
    """Half a second of work, four times slowed down by others on the same CPU, is still half a second."""
    cpu = min(os.sched_getaffinity(0))
    everyone = os.sched_getaffinity(0)
    work = "import time\ndef f(x):\n while time.process_time() < 0.5: pass\n return x * x"
    os.sched_setaffinity(0, {cpu})
    spin = [sys.executable, "-Sc", "while True: pass"]
    # a session each, or Linux may give the three together no more than the program alone
    busy = [subprocess.Popen(spin, start_new_session=True) for _ in range(3)]
    try:
        with started(1, unsafe=True) as sandbox:
            begin = time.monotonic()
            assert verdicts(sandbox, [(SQUARE | {"seconds": 1}, work)]) == ["right"]
            assert time.monotonic() - begin > 1, "it was not slowed down: the test shows nothing"
    finally:
        for process in busy:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, everyone)


def test_a_set_has_the_same_order_in_every_run():
    order = "def f(x): return ''.join(set('abcdefghijklmnop'))"
    found = []
    for _ in range(2):
        with started(1, unsafe=True) as sandbox:
            found += answers(sandbox, [(SQUARE, order)])
    assert found[0] == found[1]


def test_identical_jobs_are_not_graded_again_and_come_in_order(monkeypatch):
    usual, asked = Worker.ask, []
    with started(2, unsafe=True) as sandbox:
        monkeypatch.setattr(Worker, "ask", lambda *job: asked.append(job) or usual(*job))
        found = verdicts(sandbox, [(dict(SQUARE), program) for program in [GOOD, BAD, None] * 20])
    assert found == ["right", "wrong", "no answer"] * 20
    assert 2 <= len(asked) <= 4  # two that are in flight at once may be the same job


def test_a_judge_that_cannot_be_replaced_is_not_lost(monkeypatch):
    """A sandbox without its judge would wait for ever, in the next question and at the end."""

    def fails():
        raise BlockingIOError

    with started(1, unsafe=True) as sandbox:
        judge = sandbox._judges.get()
        judge.kill()
        judge.wait()
        sandbox._judges.put(judge)
        with monkeypatch.context() as patch, pytest.raises(BlockingIOError):
            patch.setattr(sandbox, "_start", fails)
            sandbox.run(dict(SQUARE), GOOD)
        assert sandbox.run(SQUARE | {"seconds": 40000}, GOOD)[0] == "right"


def test_a_verdict_of_a_judge_that_died_is_not_remembered(monkeypatch):
    with started(1, unsafe=True) as sandbox:
        usual = Worker.ask
        monkeypatch.setattr(Worker, "ask", lambda judge, *job: judge.kill() or usual(judge, *job))
        assert sandbox.run(dict(SQUARE), GOOD)[0] == "error"
        monkeypatch.undo()
        assert sandbox.run(dict(SQUARE), GOOD)[0] == "right"


def test_the_trainer_is_told_when_nothing_is_walled_off(capsys):
    with pytest.raises(UserError, match="--unsafe"):
        Sandbox(1, modes=["none"])
    with started(1, unsafe=True, modes=["none"]):
        assert capsys.readouterr().err.count("\n") == 1


def test_nothing_survives_a_trainer_that_is_killed(tmp_path):
    code = (
        "from support.sandbox import Sandbox\n"
        f"Sandbox(1, unsafe=True).run({SQUARE!r} | {{'seconds': 60}}, {STRAY + 'time.sleep(99)'!r})"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code])
    while not (alive := [pid for pid, (name, _) in processes().items() if name == NONCE]):
        assert trainer.poll() is None
        time.sleep(0.1)  # or the trainer would have to share a core with this loop
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + TOO_LONG
    while alive := [pid for pid, (name, _) in processes().items() if name == NONCE]:
        assert time.monotonic() < deadline, alive


def test_verdicts_are_remembered_and_a_judge_that_dies_is_replaced():
    with started(1, unsafe=True) as sandbox:
        assert verdicts(sandbox, [(SQUARE, GOOD)]) == ["right"]
        judge = sandbox._judges.get()
        sandbox._judges.put(judge)
        judge.kill()
        judge.wait()
        for program, is_same in ((GOOD, True), (GOOD + "# 2", False)):  # the first needs no judge
            assert verdicts(sandbox, [(dict(SQUARE), program)]) == ["right"]
            now = sandbox._judges.get()
            sandbox._judges.put(now)
            assert (now is judge) is is_same


def test_judge_and_candidate_import_no_site_package():
    with started(1, unsafe=True) as sandbox:
        look = "import sys\ndef f(x): return any('site-packages' in p for p in sys.path) or 'torch' in sys.modules"
        assert answers(sandbox, [(SQUARE, look)]) == [[False, False]]


def test_speed():
    """Trivial programs, a core each: 25 a second is what a trainer needs; the CPU time counts, not the load."""
    jobs = [(SQUARE, f"{GOOD}# {number}") for number in range(60)]
    with started(1, unsafe=True) as sandbox:
        judge = sandbox._judges.get()
        sandbox._judges.put(judge)
        begin = time.monotonic()
        assert set(verdicts(sandbox, jobs)) == {"right"}
        print(f"{len(jobs) / (time.monotonic() - begin):.0f} programs a second")
        zygote = next(pid for pid, (_, parent) in processes().items() if parent == judge.pid)
        ticks = 0
        for pid in (judge.pid, zygote):
            with open(f"/proc/{pid}/stat") as file:
                ticks += sum(map(int, file.read().rsplit(")", 1)[1].split()[11:15]))
        assert ticks / os.sysconf("SC_CLK_TCK") < len(jobs) / 25


@pytest.mark.parametrize(
    "want, got, atol, equal",
    [
        (1, 1, 0, True), (2, 2.0, 0, True), (1, True, 0, False), (0, None, 0, False), ("1", 1, 0, False),
        ([1, [2]], [1, [2]], 0, True), ([1], (1,), 0, False), ({1: (2,)}, {1: (2,)}, 0, True), ({1: 2}, {True: 2}, 0, False),
        ({1, 2}, {2, 1}, 0, True), ({1}, {True}, 0, False), ({1}, frozenset({1}), 0, False), (b"1", "1", 0, False),
        (1.0, 1.0 + 1e-7, 0, False), (1.0, 1.0 + 1e-7, 1e-6, True), (1.0, 1.1, 1e-6, False), (1j, 1j + 1e-9, 1e-6, True),
        ([0.1], [0.1 + 1e-9], 1e-6, True), (float("nan"), float("nan"), 0, True), (1.0, float("nan"), 1e-6, False),
        (1000000006, 1000000000, 1e-6, False), (1000000006, 1000000006.0, 1e-6, True), ([20000001], [20000002], 1e-6, False),
        (20000001.5, 20000002.5, 1e-6, True), ({"a": 20000001}, {"a": 20000002}, 1e-6, False), (5, 5.0000001, 1e-6, False),
        ({1, 2}, {1.0, 2.0}, 0, True), ({1: 2}, {1.0: 2}, 0, True), ({True}, {1}, 0, False), ({(1, 2)}, {(1, 2.0)}, 0, True),
        ({frozenset([0, 8])}, {frozenset([8, 0])}, 0, True), ({float("nan"): 1}, {float("nan"): 1}, 0, True),
        ({1: 0.5}, {1: 0.6}, 0, False), ({1, 2}, {1, 3}, 0, False),
        (float("inf"), 1e308, 1e-6, False), ({"a": 1}, {"a": 1, "b": 2}, 0, False), ("\ud800", "\ud800", 0, True),
    ],
)  # fmt: skip
def test_same(want, got, atol, equal):
    assert same(want, got, atol) is equal
    assert same(decode(json.loads(json.dumps(encode(want)))), decode(encode(got)), atol) is equal


def test_encode_refuses_what_has_code_of_its_own():
    for value in (
        type("I", (int,), {})(1),
        type("S", (str,), {})("x"),
        object(),
        len,
        int,
        range(3),
        [iter([])],
    ):
        with pytest.raises(TypeError):
            encode(value)


@pytest.mark.parametrize(
    "want, got, atol, equal",
    [
        ("1 2\n3\n", "1 2\n3", 0, True), ("1 2\n3\n", " 1  2 \n\n3\r\n", 0, True), ("1 2 3", "1 2\n3", 0, False),
        ("1", "1.0", 0, False), ("0.5", "0.50", 0, True), ("0.5", "0.5000001", 1e-6, True), ("0.5", "0.51", 1e-6, False),
        ("10000000", "10000001", 1e-6, False), ("0.5", "nan", 1e-6, False), ("x.y", "z", 1e-6, False), ("", "", 0, True),
        ("1e-07", "0.0000001", 0, True), ("1e-07", "0.0000002", 0, False), ("1E5", "100000", 1e-6, True), ("1e5x", "100000", 0, False),
        ("YES", "yes", 0, False), ("a\nb", "a", 0, False),
    ],
)  # fmt: skip
def test_same_text(want, got, atol, equal):
    assert same_text(want, got, atol) is equal


SIGNATURE = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """Double x."""\n'


@pytest.mark.parametrize(
    "setup, text, program",
    [
        (
            "",
            "Here:\n```python\ndef f(x): return 1\n```\nor\n```\ndef f(x): return 2\n```\n",
            "def f(x): return 2\n",
        ),
        ("", "```python\ndef f(x):\n    return 1", "def f(x):\n    return 1"),
        ("", "1. So:\n   ```py\n   x = 1\n   ```", "x = 1\n"),
        ("", "```python\ndef f(x): return 1\n```\n```\n>>> f(2)\n1\n```", "def f(x): return 1\n"),
        ("", "```py\ndef f(x): return 1\n```\nOutput:\n```\n4\n```\n```\n", "def f(x): return 1\n"),
        ("", "def f(x):\n    return 1\n```", "def f(x):\n    return 1\n"),
        ("", "def f(x):\n    return 1\n```\n", "def f(x):\n    return 1\n"),
        ("", "Sure.\nimport math\n\ndef f(x): return 1\n", "import math\n\ndef f(x): return 1\n"),
        ("", "def f(x):\n  y = x\n  return y", "def f(x):\n  y = x\n  return y"),
        ("", "n = int(input())\nprint(n)", "n = int(input())\nprint(n)"),
        ("", "I do not know.", None),
        ("", "", None),
        ("", "(" * 5000, None),
        (SIGNATURE, "    return 2 * x\n\nprint(f(1))", SIGNATURE + "    return 2 * x\n\n"),
        (SIGNATURE, "def f(x):\n    return 2 * x", "def f(x):\n    return 2 * x"),
        (SIGNATURE, "I do not know.", None),
        # the last block is its tests, its output, or an example: the one before is the program
        ("", "```python\ndef f(x): return 1\n```\nTests:\n```python\nassert f(1) == 1\n```", "def f(x): return 1\n"),
        ("", "```python\ndef f(x): return 1\n```\n```python\nprint(f(2))\n```", "def f(x): return 1\n"),
        ("", "```python\ndef f(x): return 1\n```\n```python\ndef test_f():\n    assert f(1) == 1\n\ntest_f()\n```", "def f(x): return 1\n"),
        ("", "```python\ndef f(x): return 1\n```\n```pycon\n>>> f(2)\n1\n```", "def f(x): return 1\n"),
        ("", "```pycon\n>>> x = 1\n>>> print(x)\n1\n```", "x = 1\nprint(x)\n"),
        ("", "```python\nn = int(input())\nprint(n)\n```\n```python\nprint(int(input()) + 1)\n```", "print(int(input()) + 1)\n"),
        ("", "~~~python\ndef f(x): return 1\n~~~\nDone.", "def f(x): return 1\n"),
        ("", "The code is ```python\ndef f(x): return 1\n```\nDone.", "def f(x): return 1\n"),
        ("", "```python\ndef f(x):\n    return 1```\nDone.", "def f(x):\n    return 1\n"),
        ("", "<think>Try ```python\ndef f(x): return 0\n\nno.</think>\n```python\ndef f(x): return 1\n```", "def f(x): return 1\n"),
        ("", "```python\ndef f(x): return 0\n\nWait, better:\n\n```python\ndef f(x): return 1\n```", "def f(x): return 1\n"),
        ("", '```python\ndef f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return 1\n```\nDone.',
         'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return 1\n'),
        (SIGNATURE, "```python\n    return 2 * x\n```", SIGNATURE + "    return 2 * x\n"),
        (SIGNATURE, "```python\nreturn 2 * x\n```", SIGNATURE + "    return 2 * x\n"),
        ("", "```python\ndef g(x): return 1\n```\nThen:\n```python\ndef f(x): return g(x)\n```",
         "def g(x): return 1\ndef f(x): return g(x)\n"),
        ("", "```python\ndef g(x): return 1\nprint(g(2))\n```\n```python\ndef f(x): return 3\n```", "def f(x): return 3\n"),
        # more of each kind
        ("", '```python\ndef f(x):\n    """Doc\n\n    ```python\n    f(1)\n    ```\n    """\n    return 1\n```',
         'def f(x):\n    """Doc\n\n    ```python\n    f(1)\n    ```\n    """\n    return 1\n'),
        ("", "Answer: ```python def f(x): return x```", "def f(x): return x\n"),
        ("", "```python\ndef f(x): return x\n```\n```python\nresult = f(2)\nprint(result)\n```", "def f(x): return x\n"),
        ("", "```python\ndef f(x): return x\n```\n```python\nfrom solution import f\nassert f(1) == 1\n```", "def f(x): return x\n"),
        ("", "```python\nprint(int(input()) * 2)\n```\nFor 3 it is\n```python\nprint(6)\n```", "print(int(input()) * 2)\n"),
        ("", "```python\ndef solve():\n    print(int(input()))\n```\nRun it:\n```python\nif __name__ == '__main__':\n    solve()\n```",
         "def solve():\n    print(int(input()))\nif __name__ == '__main__':\n    solve()\n"),
        ("", "```python\nMOD = pow(10, 9) + 7\n```\n```python\ndef f(x): return x % MOD\n```", "MOD = pow(10, 9) + 7\ndef f(x): return x % MOD\n"),
        ("", "<think>```python\ndef f(x): return 0\n```</think>\ndef f(x): return 1\n", "def f(x): return 1\n"),
        ("", "def f(x):\n    return x\n\nThis function returns x.", "def f(x):\n    return x\n\n"),
        ("", "def f(x):\n    return x\n\nBut better:\ndef f(x: return 2", "def f(x):\n    return x\n\nBut better:\ndef f(x: return 2"),
        (SIGNATURE, "    return 2 * x\n```\nThat is it.", SIGNATURE + "    return 2 * x\n"),
        (SIGNATURE, "```\ny = 2 * x\n    return y\n```", SIGNATURE + "    y = 2 * x\n    return y\n"),
        (SIGNATURE, "```\n    return 2 * x\n```\nOutput:\n```\n4\n```", SIGNATURE + "    return 2 * x\n"),
        (SIGNATURE, "```python\n    return 2 * x\n\nprint(f(2))\n```", SIGNATURE + "    return 2 * x\n\n"),
        (SIGNATURE, "```python\n    return 2 * x\n```\n```python\nassert f(2) == 4\n```", SIGNATURE + "    return 2 * x\n"),
        (SIGNATURE, "    return g(x)\n\ndef g(x):\n    return 2 * x\n", "def g(x):\n    return 2 * x\n" + SIGNATURE + "    return g(x)\n\n"),
        # as Llama 2 begins a response: the space is no indentation, but of a body it is
        ("", " def f(x):\n    return 1\n\ndef g(): pass", "def f(x):\n    return 1\n\ndef g(): pass"),
        ("", " n = int(input())\nprint(n)", "n = int(input())\nprint(n)"),
        (SIGNATURE, " def f(x):\n    return 2 * x", "def f(x):\n    return 2 * x"),
        (SIGNATURE, " y = 2 * x\n return y", SIGNATURE + " y = 2 * x\n return y"),
    ],
)  # fmt: skip
def test_extract_program(setup, text, program):
    assert extract_program(setup, text) == program


def test_the_function_that_is_tested_says_which_block_is_the_program():
    text = "```python\ndef f(x): return g(x)\ndef g(x): return x\n```\n```python\ndef main():\n    f(1)\n\ndef show(y): print(y)\n```"
    assert extract_program("", text, "f").startswith("def f(x)")
    assert extract_program("", text).endswith("def show(y): print(y)\n")
    leetcode = "```python\nclass Solution:\n    def f(self, x): return x\n```\n```python\ns = Solution()\nclass T: pass\n```"
    assert extract_program("", leetcode, "f").startswith("class Solution")


def test_no_response_takes_long_to_read():
    """CPU time grows as the text does, not as its square."""
    chain = "".join(f"```python\ndef f{i}(x):\n    return f{i + 1}(x)\n```\n" for i in range(300))
    for text in (
        "```\n" * 20_000,
        "```python\n" * 5_000,
        '"""\n```\n' * 3_000,
        "(" * 100_000,
        chain,
    ):
        for setup, entry in (("", "f"), (SIGNATURE, None)):
            begin = time.thread_time()
            extract_program(setup, text, entry)
            assert time.thread_time() - begin < 10, text[:20]


def test_deep_recursion_and_long_integers():
    deep = "def f(x): return 0 if x == 0 else 1 + f(x - 1)"
    memo = "from functools import lru_cache\n@lru_cache(None)\n" + deep
    long = "def f(x): return 10 ** x"
    tests = LARGE | {"entry": "f", "inputs": [[5000]], "outputs": [5000]}
    power = LARGE | {"entry": "f", "inputs": [[5000]], "outputs": [10**5000]}
    read = LARGE | {"kind": "stdin", "inputs": ["1" * 5000], "outputs": ["1" * 4999 + "2"]}
    jobs = [(tests, deep), (tests, memo), (power, long), (read, "print(int(input()) + 1)")]
    wrong = [(power, "def f(x): return 10 ** x + 1"), (read, "print(int(input()) + 2)")]
    with started(1, unsafe=True) as sandbox:
        assert verdicts(sandbox, jobs) == ["right"] * 4
        assert verdicts(sandbox, wrong) == ["wrong"] * 2
