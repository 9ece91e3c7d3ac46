"""Grades one program after another, in a process of its own and by the standard library alone. It knows
nothing of the algorithm.

    python support/judge.py MODE        as sandbox.py starts it; MODE is one of its MODES

Each line of the input is [tests, program, each], each line of the output [verdict, values]. Read it
from top to bottom: values as JSON; when two values are the same; the judge; the walls that a
candidate runs behind; the candidate.
"""

import atexit
import builtins
import contextlib
import ctypes
import importlib
import json
import math
import os
import re
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import types


def encode(value):
    """A plain value as JSON; what JSON lacks has a "!": (1, 2) is {"!tuple": [1, 2]}.

    An object of another type, or of an int's subclass, is a TypeError: no foreign code gets across.
    """
    kind = type(value)
    if kind in (bool, str, type(None)):
        return value
    if kind is re.Match:
        return True  # programs return it for a truth value
    if kind is int and abs(value) < 2**63 or kind is float and math.isfinite(value):
        return value
    if kind in (int, float, complex, bytes):
        return {f"!{kind.__name__}": {int: hex, bytes: bytes.hex}.get(kind, repr)(value)}
    if isinstance(value, dict):  # or a Counter: every benchmark takes it for a dict
        return {"!dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if kind in (list, tuple, set, frozenset):
        items = [encode(item) for item in value]
        return items if kind is list else {f"!{kind.__name__}": items}
    raise TypeError(f"{kind.__name__} is not a plain value")


def decode(value):
    """The inverse of encode; also takes JSON's own objects, if no key begins with "!"."""
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    if not any(key.startswith("!") for key in value):
        return {key: decode(item) for key, item in value.items()}
    ((kind, body),) = value.items()
    makers = {"!int": lambda text: int(text, 16), "!bytes": bytes.fromhex, "!float": float}
    makers |= {"!complex": complex, "!tuple": tuple, "!set": set, "!frozenset": frozenset}
    return (makers | {"!dict": dict})[kind](decode(body))


def identity(value):
    """Of an element or key: what is equal exactly where `same` finds it so."""
    kind = type(value)
    if kind in (int, float, complex):  # a NaN is equal to nothing, its repr is
        return "number", repr(value) if "nan" in repr(value) else value
    if kind in (tuple, frozenset):
        return kind, kind(identity(item) for item in value)
    return kind, value


def same(want, got, atol):
    """Equal values of equal types all through; but 2 equals 2.0, as in every benchmark.

    atol: how far a float may be from a wanted float, and 1e-7 of it beside. Integers are exact.
    """
    if {type(want), type(got)} <= {int, float, complex}:  # so no bool
        if want == got or repr(want) == repr(got):  # repr for NaN
            return True
        if type(want) is int:  # a count is right or wrong: 1000000006 is not 1000000000
            return False
        return atol > 0 and abs(want - got) <= atol + 1e-7 * abs(want) < math.inf
    if type(want) is not type(got):
        return False
    if type(want) in (list, tuple):
        return len(want) == len(got) and all(same(w, g, atol) for w, g in zip(want, got))
    if type(want) in (set, frozenset):  # == would take {True} for {1}
        return {identity(w) for w in want} == {identity(g) for g in got}
    if type(want) is dict:
        ours = {identity(key): item for key, item in want.items()}
        theirs = {identity(key): item for key, item in got.items()}
        if ours.keys() != theirs.keys():
            return False
        return all(same(item, theirs[key], atol) for key, item in ours.items())
    return want == got


def same_text(want, got, atol):
    """The same words on the same lines; space around words and empty lines do not count. Where a float
    is wanted ("0.5", "1e-07"), another spelling of it will do, and one within atol."""

    def words(text):
        found = []
        for row in text.split("\n"):
            found += [*row.split(), "\n"] if row.strip() else []
        return found

    want, got = words(want), words(got)
    try:
        equal = (
            w == g or is_float(w) and same(float(w), float(g), atol) for w, g in zip(want, got)
        )
        return len(want) == len(got) and all(equal)
    except ValueError:  # a word that is no number
        return False


def is_float(word):
    return re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", word) is not None


class Verdict(BaseException):
    """Ends the grading of a program; not an Exception, for test code may catch those."""


class Judge:
    """Grades programs. It holds the tests; its zygote is forked before they come."""

    def __init__(self, mode):
        self.walled = mode in ("root", "user")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            self.control.close()
            zygote(theirs, mode)
        theirs.close()
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a program may return a lot

    def grade(self, tests, program, each):
        """-> verdict, values. each: try every test, and the values are whether it passed; else the
        first failure ends it, and the values are what was returned if tests["outputs"] is None."""
        self.tests, self.each, self.values = tests, each, []
        self.verdict, self.failures = "right", 0
        self.task = {key: tests[key] for key in ("kind", "entry", "setup")} | {"program": program}
        self.begin, self.spent, self.idle = time.monotonic(), 0, 0
        with contextlib.suppress(Verdict):
            given, wanted = tests["inputs"], tests["outputs"]
            if tests["kind"] == "assert":
                given, wanted = tests["code"], None
            if not given or (wanted is not None and len(given) != len(wanted)):
                self.stop("error")  # without a test there is no pass
            getattr(self, f"run_{tests['kind']}")()
        return self.verdict, self.values

    def stop(self, verdict):
        self.verdict = verdict  # kept, should test code with a bare except catch this
        self.failures += 1
        raise Verdict

    @contextlib.contextmanager
    def one_of_each(self):
        """A test of its own: with `each` its failure is only a False among the values."""
        before = self.failures
        try:
            yield
        except Verdict:
            if not self.each:
                raise
        if self.each:
            self.values.append(self.failures == before)

    def run_stdin(self):
        """A candidate for each input; what it prints is its answer."""
        for text, want in zip(self.tests["inputs"], self.tests["outputs"], strict=True):
            with self.one_of_each():
                with self.candidate():
                    got = self.ask(self.task | {"stdin": text})
                if type(got) is not str or not same_text(want, got, self.tests["atol"]):
                    self.stop("wrong")

    def run_call(self):
        """One candidate answers all, but with `each` every input has its own: an exception ends it."""
        inputs, outputs = self.tests["inputs"], self.tests["outputs"]
        if self.each:
            for args, want in zip(inputs, outputs, strict=True):
                with self.one_of_each(), self.candidate():
                    self.ask(self.task)
                    self.compare(want, self.ask(args))
            return
        with self.candidate():
            self.ask(self.task)
            for number, args in enumerate(inputs):
                got = self.ask(args)
                if outputs is None:
                    self.values.append(encode(got))
                else:
                    self.compare(outputs[number], got)

    def compare(self, want, got):
        """Stops unless they are the same; a wanted {"!json": v} is met by all that JSON writes as v."""
        try:
            if type(want) is dict and "!json" in want:
                want, got = want["!json"], json.loads(json.dumps(got))
            if not same(decode(want), got, self.tests["atol"]):
                self.stop("wrong")
        except (TypeError, ValueError, OverflowError):
            self.stop("wrong")  # nothing for JSON, or numbers beyond a float

    def run_assert(self):
        """The test code runs here; the function it calls is a proxy and returns plain values."""
        names = {key: decode(self.tests[key]) for key in ("inputs", "outputs")}
        proxy = {self.tests["entry"]: lambda *args: self.ask([encode(arg) for arg in args])}
        with self.one_of_each(), self.candidate():
            self.ask(self.task)
            try:
                exec(self.tests["setup"], names)  # noqa: S102
                exec(self.tests["code"], names | proxy)  # noqa: S102
            except Exception:  # noqa: BLE001  an assertion, or an unfit value
                self.stop("wrong")

    @contextlib.contextmanager
    def candidate(self):
        """Has a candidate started, and at the end killed with all that it started."""
        self.data, theirs = socket.socketpair()
        limits = [self.tests["seconds"], self.tests["megabytes"]]
        socket.send_fds(self.control, [json.dumps(limits).encode()], [theirs.fileno()])
        theirs.close()
        self.cpu = 0
        self.pid, (self.proc,), _, _ = socket.recv_fds(self.data, 9, 1)  # of its own /proc
        try:
            yield
        finally:
            self.spent += self.cpu
            self.control.send(b"kill")
            self.control.recv(9)
            self.data.close()
            os.close(self.proc)

    def ask(self, question):
        """Sends a line and decodes the line that answers it."""
        unsent, answer = memoryview(json.dumps(question).encode() + b"\n"), bytearray()
        before, checked = self.cpu, time.monotonic()
        while not answer.endswith(b"\n"):
            reads, writes, _ = select.select([0, self.data], [self.data][: len(unsent)], [], 0.05)
            if 0 in reads:
                os._exit(1)  # the trainer is gone
            try:
                if writes:
                    unsent = unsent[self.data.send(unsent, socket.MSG_DONTWAIT) :]
                chunk = self.data.recv(1 << 20) if self.data in reads else None
            except ConnectionError:
                chunk = b""
            answer += chunk or b""
            if chunk == b"" or len(answer) > 16 << 20:
                self.stop("error")  # it has ended, or does not
            if chunk is None or time.monotonic() - checked > 0.05 or answer.endswith(b"\n"):
                checked = self.check(before, checked)
        try:
            return decode(json.loads(answer))
        except (KeyError, TypeError, ValueError, RecursionError, MemoryError):
            self.stop("wrong")  # no plain value, or a forged line

    def check(self, before, checked):
        """Stops a candidate that uses too much; -> the time."""
        ticks = pages = running = 0
        for pid in os.listdir(self.proc) if self.walled else [self.pid.decode()]:
            with contextlib.suppress(OSError):  # it ends while we look
                if pid.isdigit():
                    with open(os.open(f"{pid}/stat", os.O_RDONLY, dir_fd=self.proc), "rb") as file:
                        stat = file.read().rpartition(b")")[2].split()  # proc(5), from field 3 on
                    running |= stat[0] in b"RD"
                    ticks += sum(map(int, stat[11:15]))
                    pages += int(stat[21])
        now, last, self.cpu = time.monotonic(), self.cpu, ticks / os.sysconf("SC_CLK_TCK")
        if not running and self.cpu == last:
            self.idle += now - checked
        if pages * resource.getpagesize() > self.tests["megabytes"] << 20:
            self.stop("error")
        # CPU and idle time: a busy machine changes no verdict. The wall clock is the backstop.
        total, wall = self.spent + self.cpu, now - self.begin
        if max(self.cpu - before, self.idle, total / 10, wall / 40) > self.tests["seconds"]:
            self.stop("timed out")
        return now


FREQUENT = "bisect collections copy datetime functools heapq itertools math operator queue random"
FREQUENT += " statistics string typing"  # with what programs import, or their setup does


def libc(name, *args):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)


def zygote(control, mode):
    """Builds the walls once, then forks a warden for each candidate, until the judge is gone."""
    for name in FREQUENT.split():
        importlib.import_module(name)  # once here, and no more in each candidate
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if mode in ("root", "uid") and os.getuid() != 0:
        os._exit(1)  # only root becomes somebody else
    if mode in ("root", "user"):
        wall_off(mode == "user")
    uid = 2_000_000_000 + os.getpid() if mode in ("root", "uid") else None  # nobody else's
    while True:
        limits, fds, _, _ = socket.recv_fds(control, 99, 1)
        if not limits:
            os._exit(0)
        if os.fork() == 0:
            warden(control, mode in ("root", "user"), uid, json.loads(limits), fds[0])
        os.close(fds[0])
        os.wait()


def wall_off(as_user):
    """Own network, own mounts; of the files only libraries and Python are left, to be read."""
    uid, gid = os.getuid(), os.getgid()
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    if as_user:
        libc("unshare", 0x10000000)  # CLONE_NEWUSER
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    libc("unshare", 0x40020000)  # CLONE_NEWNET | CLONE_NEWNS
    libc("mount", None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: no mount shows outside
    root = "/sys"  # any directory will do to mount on
    libc("mount", b"tmpfs", root.encode(), b"tmpfs", 0, b"size=1m,mode=755")
    for path in ("/proc", "/box"):
        os.mkdir(root + path)
    for path in filter(os.path.isdir, ("/usr", "/lib", "/lib64", sys.base_prefix)):
        target = (root + path).encode()
        os.makedirs(target, exist_ok=True)
        libc("mount", path.encode(), target, None, 0x5000, None)  # MS_BIND | MS_REC
        kept = os.statvfs(path).f_flag & 0xC0E  # nosuid, nodev, ...: a user may not lift them
        libc("mount", None, target, None, 0x1023 | kept, None)  # remount: read-only, nosuid
    libc("mount", None, root.encode(), None, 0x1023, None)
    os.chroot(root)  # from where, besides, nobody can make a user namespace
    os.chdir("/")


def warden(control, walled, uid, limits, data):
    """Forks a candidate, waits for the judge's word, and leaves no process of it behind."""
    box = "/box"
    if walled:
        libc("unshare", 0x20000000)  # CLONE_NEWPID: its first process, our child, takes all along
    else:
        libc("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become our children
        box = tempfile.mkdtemp()
        os.chown(box, uid or -1, -1)
    pid = os.fork()
    if pid == 0:
        confine(walled, uid, *limits, box, data)
        candidate()
    os.close(data)
    control.recv(9)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if not walled:
        sweep(uid)
        shutil.rmtree(box, ignore_errors=True)
    control.send(b"gone")
    os._exit(0)


def sweep(uid):
    """Kills what is left: all processes of a uid at a stroke; without one, children one by one."""
    if uid and os.fork() == 0:
        os.setresuid(uid, uid, uid)
        os.kill(-1, signal.SIGKILL)
        os._exit(0)
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        while children := file.read().split():
            for child in map(int, children):
                os.kill(child, 0 if uid else signal.SIGKILL)
                os.waitpid(child, 0)
            file.seek(0)


def confine(walled, uid, seconds, megabytes, box, data):
    """Takes from a candidate what it must not have, before it reads the program."""
    os.setsid()
    os.dup2(data, 3)
    os.closerange(4, 1024)
    if walled:
        libc("unshare", 0x08020000)  # CLONE_NEWIPC | CLONE_NEWNS
        libc("mount", b"proc", b"/proc", b"proc", 0, None)
        libc("mount", b"tmpfs", b"/box", b"tmpfs", 0, b"size=64m,nr_inodes=4k,mode=777")
    os.chdir(box)
    limits = {"CPU": 10 * math.ceil(seconds) + 1, "AS": megabytes << 20, "FSIZE": 32 << 20}
    limits |= {"NPROC": 64 if walled or uid else 4096, "NOFILE": 64, "STACK": 64 << 20, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # no capability
    libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def candidate():
    """Runs the program and sends what it prints, or what its function returns for each question."""
    data = socket.socket(fileno=3)
    socket.send_fds(data, [b"%d" % os.getpid()], [os.open("/proc", os.O_RDONLY)])
    lines = data.makefile("rb")
    task = json.loads(lines.readline())
    sys.argv = ["program.py"]
    sys.setrecursionlimit(50_000)  # as LiveCodeBench's own grader does; the stack has 64 MB
    builtins.exit = builtins.quit = sys.exit  # by site, which we do without
    name = "__main__" if task["kind"] == "stdin" else "program"
    module = sys.modules[name] = types.ModuleType(name)

    def load():
        for part in ("setup", "program"):
            code = compile(task[part], f"{part}.py", "exec", dont_inherit=True)
            exec(code, vars(module))  # noqa: S102

    def send(value):
        try:
            line = json.dumps(encode(value))
        except (TypeError, RecursionError):
            line = '{"!other": 0}'  # which decode refuses
        data.sendall(line.encode() + b"\n")

    try:
        if task["kind"] == "stdin":
            return send(printed(load, task["stdin"]))  # by way of finally
        load()
        value = None
        while True:
            send(value)
            args = decode(json.loads(lines.readline()))
            solution = getattr(module, "Solution", None)  # LeetCode's
            owner = solution() if hasattr(solution, task["entry"]) else module
            value = getattr(owner, task["entry"])(*args)
    finally:
        os._exit(1)


def printed(program, stdin):
    """What a program prints that runs to its end: its threads and its atexit functions, too."""
    out = os.memfd_create("out")
    os.dup2(out, 1)
    os.dup2(os.memfd_create("in"), 0)
    os.pwrite(0, stdin.encode(), 0)
    try:
        program()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    threading._shutdown()  # joins the threads that are no daemons
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(ValueError):  # it may be closed
            file.flush()
    return os.pread(out, os.fstat(out).st_size, 0).decode(errors="replace")


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # answers may be longer than 4,300; holds in what is forked, too
    judge = Judge(sys.argv[1])
    for line in sys.stdin.buffer:
        print(json.dumps(judge.grade(*json.loads(line))), flush=True)
