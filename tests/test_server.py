"""Drawing by a server: a stub on loopback that draws from the tiny model, well and badly."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import toy

import evaluate
import label_steps
import model
import sample
import support.cli
import support.sampler
import support.server
from model import load_lm
from support.cli import UserError
from support.packing import Tree

FAULTS = ["500", "half a body", "dies", "hangs", "short", "other prompt", "no JSON", "too many"]
FAULTS += ["no list"]


class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible server of `lm`; faults: what goes wrong with the next completions.

    It draws every token alike, about as the toy's random model does; exact: as `lm` itself, slowly.
    after: an event that its completions wait for, such as another's `failed` or `busy`.
    """

    daemon_threads = True

    context = None  # tokens that it takes and draws at most; None: it does not say
    engines = None  # data-parallel ones; None: it does not know what that is

    def __init__(self, lm, name, faults=(), always=None, exact=False, after=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lm, self.name, self.faults, self.always = lm, name, list(faults), always
        self.exact, self.after = exact, after
        self.failed, self.busy = threading.Event(), threading.Event()  # busy: asked more than five
        self.lock, self.asked, self.released = threading.Lock(), [], threading.Event()
        self.pages, self.ranks = {}, []  # what it says of itself; engines that it was asked for
        self.url = f"http://127.0.0.1:{self.server_port}"

    def draw(self, number: int, asked: dict) -> list[list[int]]:
        """Token ids of the continuations that question `number` asks for."""
        keys = [support.sampler.draw_key("stub", number, k) for k in range(asked["n"])]
        if self.exact:
            rows = [support.sampler.Row(0, 0, key, asked["max_tokens"]) for key in keys]
            tree = Tree([asked["prompt"]], [-1], [True])
            return support.sampler.Sampler(self.lm).draw([tree], rows, asked["temperature"])
        drawn = []
        for key in keys:
            rng = random.Random(key if asked["temperature"] else str(asked["prompt"]))
            ids = [rng.randrange(len(self.lm.tokenizer)) for _ in range(asked["max_tokens"])]
            ends = [k for k, token in enumerate(ids) if token in self.lm.eos]
            drawn.append(ids[: ends[0] + 1] if ends else ids)
        return drawn

    def handle_error(self, *_):
        """A client that gave up waiting is not this server's concern."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body: bytes, code=200, size=None):
        self.send_response(code)
        self.send_header("Content-Length", str(size or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path in self.server.pages:
            return self.answer(self.server.pages[self.path].encode())
        model = {"id": "it", "root": self.server.name, "max_model_len": self.server.context}
        self.answer(json.dumps({"data": [model]}).encode())

    def do_POST(self):
        stub = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            engine = self.headers.get("X-data-parallel-rank")
            stub.ranks.append((asked["prompt"], engine))
            if stub.engines and engine and int(engine) >= stub.engines:
                return self.answer(b"data_parallel_rank is out of range", 400)
            stub.asked.append(asked)
            check = len(stub.asked) == 1  # the stage's own question, whether this server will do
            fault = stub.always or (stub.faults.pop(0) if stub.faults and not check else None)
            drawn = stub.draw(len(stub.asked), asked)
            if len(stub.asked) > 5:
                stub.busy.set()
        if fault:
            stub.failed.set()
        if stub.after and not check:
            stub.after.wait(60)
        choices = []
        for ids in drawn:
            ended = ids[-1] in stub.lm.eos
            # like one kind of server, it leaves the end out
            choice = {"token_ids": ids[:-1] if ended else ids, "prompt_token_ids": asked["prompt"]}
            choice |= {"stop_reason": ids[-1]} if ended else {}
            choices.append(choice | {"finish_reason": "stop" if ended else "length"})
        if fault == "short":
            choices[0] |= {"token_ids": [5, 5], "finish_reason": "length"}
        if fault == "other prompt":
            choices[0]["prompt_token_ids"] = [1, 2, 3]
        if fault == "too many":
            choices *= 2
        if fault == "no ids":
            choices = [{"text": "hello", "finish_reason": "stop"}]
        if fault == "padding row":  # a token beyond the tokenizer
            choices[0]["token_ids"] = [len(stub.lm.tokenizer)] + choices[0]["token_ids"][1:]
        body = json.dumps({"choices": "no" if fault == "no list" else choices}).encode()
        if fault == "dies":
            self.connection.close()
        elif fault == "hangs":
            stub.released.wait(60)
        elif fault == "no JSON":
            self.answer(b"<html>")
        elif fault == "half a body":
            self.answer(body[: len(body) // 2], size=len(body))
        elif fault == "500":
            self.answer(b"out of memory", 500)
        else:
            self.answer(body)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "ready"
    folder.mkdir()
    toy.build(folder)
    return folder


@pytest.fixture
def work(ready, tmp_path, monkeypatch):
    """A folder with the tiny model, and a client that does not wait long."""
    shutil.copytree(ready, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(support.server.Server, "pause", 0.0)
    monkeypatch.setattr(support.server.Server, "timeout", 60.0)
    monkeypatch.setattr(support.server.Server, "requests", 4)
    return tmp_path / "work"


@contextlib.contextmanager
def serving(*stubs):
    for stub in stubs:
        threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield ",".join(stub.url for stub in stubs)
    finally:
        for stub in stubs:
            stub.released.set()
            stub.shutdown()
            stub.server_close()


def run(module, flags, capsys):
    """-> exit code, stderr"""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *flags.split()]
    try:
        support.cli.main(module.stage, module.Settings, module.__doc__)
        return 0, capsys.readouterr().err
    except SystemExit as e:
        return e.code, capsys.readouterr().err
    finally:
        sys.argv = argv


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_all_stages_by_a_server_and_no_weights_are_loaded(work, capsys, monkeypatch):
    own = load_lm("tiny")
    stub = Stub(own, "tiny")
    with serving(stub) as url, monkeypatch.context() as patch:
        patch.setattr(model, "read_weights", lambda *_: pytest.fail("weights are loaded"))
        for module, script in ((sample, "sample.py"), (label_steps, "label_steps.py")):
            assert run(module, f"{toy.FLAGS[script]} --server {url}", capsys)[0] == 0
        flags = toy.EVALUATE.replace("run/actor", "tiny")
        assert run(evaluate, f"{flags} --server {url}", capsys)[0] == 0
    samples, trees = lines("run/samples.jsonl"), lines("run/trees.jsonl")
    problems = lines("problems.jsonl")
    assert {x["id"] for x in samples} == {p["id"] for p in problems}
    for record in samples:
        assert len(record["responses"]) == 5
        for response in record["responses"]:
            ids = response["ids"]
            assert response["finished"] == (ids[-1] in own.eos)
            assert len(ids) == 10 or response["finished"]
            assert not set(ids[:-1]) & set(own.eos)
    for record in trees:
        for v, node in enumerate(record["nodes"]):
            below = [n for n in record["nodes"] if n["parent"] == v]
            if node["labelled"]:
                assert node["n"] >= 3 and sum(n["draws"] for n in below) == node["n"]
    assert len(lines("run/eval.jsonl")) == 66
    for name in ("samples.jsonl", "trees.jsonl", "eval.jsonl"):
        manifest = json.loads(Path(f"run/{name}.manifest.json").read_text())
        assert manifest["facts"]["draws"] == "server"
    for asked in stub.asked:
        assert asked["top_p"] == 1 and asked["top_k"] == -1 and "seed" not in asked
        # what is not said, a server takes from the model's generation_config.json
        assert asked["min_p"] == asked["presence_penalty"] == asked["frequency_penalty"] == 0
        assert asked["repetition_penalty"] == 1
        assert asked["return_token_ids"] and asked["stop_token_ids"] == own.eos
    assert {asked["temperature"] for asked in stub.asked} == {0.0, 1.0}
    # and the next stage takes them
    assert toy.stage("train_critic.py", toy.CRITIC)[0] == 0


def test_draws_come_from_the_model_s_distribution(work):
    """The stub draws as `draw` does; what comes back must be counted to the right rows."""
    lm = load_lm("tiny")
    prompts = [lm.prompt_ids(p["prompt"]) for p in lines("problems.jsonl")[:3]]
    trees = [Tree([ids], [-1], [True]) for ids in prompts]
    rows = [support.sampler.Row(t, 0, 0, 1 + t) for t in (2, 0, 1) for _ in range(200)]
    with serving(Stub(lm, "tiny", exact=True)) as url:
        drawn = support.server.Server(url, lm).draw(trees, rows)
    own = [row._replace(key=support.sampler.draw_key(i)) for i, row in enumerate(rows)]
    for t in range(3):
        first = Counter(ids[0] for ids, row in zip(drawn, rows) if row[0] == t)
        twin = Counter(
            ids[0]
            for ids, row in zip(support.sampler.Sampler(lm).draw(trees, own), rows)
            if row[0] == t
        )
        assert sum(first.values()) == 200
        assert sum(abs(first[i] - twin[i]) for i in first | twin) < 120  # of 400; others: 300
        assert all(len(ids) <= 1 + t for ids, row in zip(drawn, rows) if row[0] == t)


@pytest.mark.parametrize("fault", [*FAULTS, "padding row"])
def test_a_fault_that_passes_leaves_no_trace(fault, work, capsys, monkeypatch):
    if fault == "hangs":
        monkeypatch.setattr(support.server.Server, "timeout", 3.0)
    with serving(Stub(load_lm("tiny"), "tiny", [fault] * 3)) as url:
        code, err = run(sample, f"{toy.SAMPLE} --limit 12 --server {url}", capsys)
    assert code == 0 and not err
    records = lines("run/samples.jsonl")
    assert len({x["id"] for x in records}) == len(records) == 12
    size = len(load_lm("tiny").tokenizer)
    for record in records:
        assert len(record["responses"]) == 5
        assert all(0 <= i < size for r in record["responses"] for i in r["ids"])


def test_a_server_that_is_away_for_seconds_rests_as_a_whole(work, monkeypatch):
    """One request's tries must not go to all seats of a server at once."""

    class Clock:
        now, slept = 100.0, []

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds
            self.slept += [seconds] if seconds else []

    def complete(*question):
        if clock.now < 103.5:
            raise support.server.Fault("refused")
        return [[5, 0]]

    clock = Clock()
    with serving(Stub(load_lm("tiny"), "tiny")) as url:
        server = support.server.Server(url, load_lm("tiny", weights=False))
        monkeypatch.setattr(support.server, "time", clock)
        monkeypatch.setattr(server, "_complete", complete)
        monkeypatch.setattr(server, "pause", 1.0)
        assert server._continuations([1], 1, 2, 1.0) == [[5, 0]]
        assert clock.slept == [1.0, 2.0, 4.0]
        assert server._continuations([1], 1, 2, 1.0) == [[5, 0]]  # no seat rests on
        assert server.endpoints[0].faults == 0 and clock.slept == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_one_line_and_the_same_command_goes_on(
    fault, work, capsys, monkeypatch
):
    monkeypatch.setattr(support.server.Server, "tries", 2)
    lm = load_lm("tiny")
    flags = f"{toy.SAMPLE} --limit 12"
    with (
        serving(Stub(lm, "tiny", [None] * 5 + [fault] * 99)) as url,
        monkeypatch.context() as patch,
    ):
        if fault == "hangs":
            patch.setattr(support.server.Server, "timeout", 1.0)
        code, err = run(sample, f"{flags} --server {url}", capsys)
    assert code == 1 and err.count("\n") == 1 and url in err and "same command" in err
    before = lines("run/samples.jsonl") if Path("run/samples.jsonl").exists() else []
    assert len(before) < 12
    with serving(Stub(lm, "tiny")) as url:  # at another address
        assert run(sample, f"{flags} --server {url}", capsys)[0] == 0
    after = lines("run/samples.jsonl")
    assert after[: len(before)] == before and len({x["id"] for x in after}) == len(after) == 12


def test_work_goes_to_whoever_is_free_and_a_server_that_fails_is_left_out(work, capsys):
    lm = load_lm("tiny")
    bad = Stub(lm, "tiny", ["500"] * 9)
    slow = Stub(lm, "tiny", after=bad.failed)  # each is asked, whatever threads are scheduled how
    good = Stub(lm, "tiny", after=slow.busy)
    with serving(good, slow, bad) as urls:
        code, err = run(sample, f"{toy.SAMPLE} --limit 40 --server {urls}", capsys)
    assert code == 0 and not err
    assert len(good.asked) > 5 and len(slow.asked) > 5 and len(bad.asked) >= 2
    assert len(lines("run/samples.jsonl")) == 40


def test_own_draws_and_a_server_s_do_not_mix(work, capsys):
    with serving(Stub(load_lm("tiny"), "tiny", [None] * 4 + ["500"] * 99)) as url:
        assert run(sample, f"{toy.SAMPLE} --server {url}", capsys)[0] == 1
    code, err = run(sample, toy.SAMPLE, capsys)
    assert code == 2 and "draws was server" in err


@pytest.mark.parametrize(
    "name, always, said",
    [("other/model", None, "serves it, other/model, not tiny"), ("tiny", "no ids", "no token ids")],
)
def test_a_server_that_will_not_do_is_refused(name, always, said, work, capsys):
    with serving(Stub(load_lm("tiny"), name, always=always)) as url:
        code, err = run(sample, f"{toy.SAMPLE} --server {url}", capsys)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not Path("run/samples.jsonl").exists()


def test_tokens_beyond_the_tokenizer_do_not_go_on_for_ever(work, capsys, monkeypatch):
    monkeypatch.setattr(support.server.Server, "tries", 2)
    lm = load_lm("tiny")
    with serving(Stub(lm, "tiny", [None] + ["padding row"] * 99)) as url:
        flags = f"{toy.SAMPLE} --n1 1 --n 1 --limit 2 --server {url}"
        code, err = run(sample, flags, capsys)
    assert code == 1 and "the tokenizer does not have, 2 times" in err and err.count("\n") == 1


def test_torchrun_is_no_way_to_draw(work, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for module, flags in (
        (sample, toy.SAMPLE),
        (label_steps, toy.LABEL),
        (evaluate, f"{toy.EVALUATE} --actor tiny --server http://127.0.0.1:9"),
        (evaluate, f"{toy.EVALUATE} --actor tiny --critic tiny"),
    ):
        code, err = run(module, flags, capsys)
        assert code == 2 and "runs as one process" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9", "file:///etc/hosts", "ftp://host", "http://", "http://host:port", ""]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="wanted a URL such as"):
        support.server.Endpoint(url)


def test_a_server_that_is_not_there(work, capsys):
    code, err = run(sample, f"{toy.SAMPLE} --server http://127.0.0.1:9", capsys)
    assert code == 1 and "is the server up" in err and err.count("\n") == 1


@pytest.mark.parametrize("fault", ["500", "hangs"])
def test_a_fault_of_the_first_answer_may_pass(fault, work, capsys, monkeypatch):
    monkeypatch.setattr(support.server.Server, "timeout", 3.0)
    with serving(Stub(load_lm("tiny"), "tiny", always=fault)) as url:
        code, err = run(sample, f"{toy.SAMPLE} --server {url}", capsys)
    assert code == 1 and "is the server up" in err and "same command" in err
    assert err.count("\n") == 1


def test_a_prompt_that_a_server_refuses_is_said_at_once(work):
    class Refuses(Handler):
        def do_POST(self):
            self.answer(b"prompt is too long", 400)

    stub = Stub(load_lm("tiny"), "tiny")
    stub.RequestHandlerClass = Refuses
    began = time.monotonic()
    with serving(stub) as url, pytest.raises(UserError, match="too long"):
        support.server.Server(url, load_lm("tiny", weights=False))
    assert time.monotonic() - began < 30


def test_a_context_that_would_cut_responses_off_is_refused(work, capsys):
    """A server cuts off silently; asked again and again it would give short responses alone."""
    stub = Stub(load_lm("tiny"), "tiny")
    stub.context = 12
    with serving(stub) as url:
        code, err = run(sample, f"{toy.SAMPLE} --limit 12 --server {url}", capsys)
        own = support.server.Server(url, load_lm("tiny", weights=False))
        assert len(own._continuations([5] * 8, 3, 4, 1.0)) == 3
        with pytest.raises(UserError, match="are 13, the server's context is 12; lower --max_new"):
            own._continuations([5] * 9, 3, 4, 1.0)
    assert code == 2 and "the server's context is 12" in err and err.count("\n") == 1
    assert not Path("run/samples.jsonl").exists() or not lines("run/samples.jsonl")


def test_greedy_responses_of_one_state_are_a_request_each(work):
    """vLLM refuses to draw several at temperature 0."""
    stub = Stub(load_lm("tiny"), "tiny")
    with serving(stub) as url:
        server = support.server.Server(url, load_lm("tiny", weights=False))
        tree = Tree([[1, 5, 9]], [-1], [True])
        drawn = server.draw([tree], [support.sampler.Row(0, 0, 0, 4)] * 3, 0.0)
    assert drawn[0] == drawn[1] == drawn[2]
    assert [asked["n"] for asked in stub.asked] == [1] * 4  # the first is the stage's own question


def test_the_tokenizer_s_own_end_ends_draws_here_as_it_does_at_a_server(work):
    """vLLM ends at the tokenizer's EOS, whatever generation_config.json says."""
    path = Path("tiny/generation_config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": [5]}))
    assert toy.stage("sample.py", toy.SAMPLE)[0] == 0
    last = {0: 0, 5: 0}
    for record in lines("run/samples.jsonl"):
        for response in record["responses"]:
            assert not {*response["ids"][:-1]} & {0, 5}
            for end in last:
                last[end] += response["finished"] and response["ids"][-1] == end
    assert min(last.values()) > 3, last


# ---------------------------------------------------------------- what an answer is worth


class Words:
    """As much of an LM as `judge` asks for."""

    eos, own_eos, tokenizer = [0, 7], 0, range(10)


GOOD = {"token_ids": [5, 4, 0], "finish_reason": "stop"}


@pytest.mark.parametrize(
    "choices, found",
    [
        ([GOOD], [[5, 4, 0]]),
        (
            [GOOD, GOOD | {"token_ids": [1, 2, 3, 4], "finish_reason": "length"}],
            [[5, 4, 0], [1, 2, 3, 4]],
        ),
        ([GOOD | {"token_ids": [5], "stop_reason": 7}], [[5, 7]]),  # the end is left out
        ([GOOD | {"token_ids": [5], "stop_reason": None}], [[5, 0]]),
        ([GOOD | {"token_ids": []}], [[0]]),
        ([GOOD | {"token_ids": [5, 12, 0]}], []),  # not in the tokenizer: drawn again
        ([GOOD] * 3, "3 continuations came where 2"),
        ([], "0 continuations"),
        ("no", "no list of choices"),
        (["no"], "no list of choices"),
        ([GOOD | {"token_ids": None}], "no token ids"),
        ([GOOD | {"token_ids": [5, "4", 0]}], "no whole number"),
        ([GOOD | {"token_ids": [5, True, 0]}], "no whole number"),
        ([GOOD | {"prompt_token_ids": [1]}], "another prompt"),
        ([GOOD | {"token_ids": [5, 4], "finish_reason": "length"}], "2 tokens came where 4"),
        ([GOOD | {"token_ids": [5, 7, 4, 0]}], "4 tokens came"),  # it went on behind an end
        ([GOOD | {"token_ids": [1, 2, 3, 4, 0]}], "5 tokens came"),
    ],
)
def test_judge(choices, found):
    answer = {"choices": choices, "prompt_token_ids": [3, 3]}
    if isinstance(found, list):
        assert support.server.judge(answer, [3, 3], 2, 4, Words) == found
    else:
        with pytest.raises(support.server.Fault, match=found):
            support.server.judge(answer, [3, 3], 2, 4, Words)


@pytest.mark.parametrize("error", [TypeError("ours"), AttributeError("ours")])
def test_an_error_of_our_own_is_no_fault_of_a_server_s(error, work, monkeypatch):
    calls = []

    def broken(*_):
        calls.append(1)
        raise error

    with serving(Stub(load_lm("tiny"), "tiny")) as url:
        server = support.server.Server(url, load_lm("tiny", weights=False))
        monkeypatch.setattr(support.server, "judge", broken)
        with pytest.raises(type(error), match="ours"):
            server._continuations([1], 1, 2, 1.0)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "version, refused",
    [("0.19.0", True), ("0.8.5.post1", True), ("0.19.1", False), ("0.20.0rc1", False), ("1.0", False),
     ("0.9", True), ("", False)],
)  # fmt: skip
def test_an_engine_that_cannot_read_our_models_is_refused(version, refused, work):
    stub, lm = Stub(load_lm("tiny"), "tiny"), load_lm("tiny", weights=False)
    model = {"id": "it", "root": "tiny", "owned_by": "vllm"}
    stub.pages["/v1/models"] = json.dumps({"data": [model]})
    stub.pages["/version"] = json.dumps({"version": version})
    with serving(stub) as url:
        if refused:
            with pytest.raises(UserError, match=f"vLLM {version} cannot .*0.19.1 or later"):
                support.server.Server(url, lm)
        else:
            support.server.Server(url, lm)


def test_one_engine_has_all_requests_of_a_problem(work, monkeypatch):
    """And it is left alone once it did not answer in time."""
    stub, lm = Stub(load_lm("tiny"), "tiny"), load_lm("tiny", weights=False)
    stub.engines = 3
    trees = [Tree([[1, 4 + t], [2]], [-1, 0], [True, True]) for t in range(9)]
    rows = [support.sampler.Row(t, v, 0, 2) for t in range(9) for v in range(2)]
    with serving(stub) as url:
        server = support.server.Server(url, lm)
        assert server.seats.qsize() == 3 * server.requests == 12
        server.draw(trees, rows)
        # One that cannot be, and then each until one is not there.
        checks = ["1048576", "0", "1", "2", "3"]
        assert [rank for _, rank in stub.ranks[:5]] == checks
        home = {}  # (first two tokens, which are the problem's prompt): engines
        for prompt, rank in stub.ranks[5:]:
            home.setdefault(tuple(prompt[:2]), set()).add(rank)
        assert len(home) == 9 and all(len(ranks) == 1 for ranks in home.values())
        assert set.union(*home.values()) == {"0", "1", "2"}
        assert support.server.Server(url, lm, engines=2).seats.qsize() == 8
        stub.faults.append("500")  # of an engine that is there: it must not be taken for missing
        with pytest.raises(ConnectionError, match="answered 500"):
            support.server.Server(url, lm)
        hung, send = next(iter(home[1, 4])), support.server.Endpoint.send

        def late(endpoint, path, question=None, timeout=10.0, engine=None):
            if str(engine) == hung:
                raise support.server.Late("no answer within 900 s")
            return send(endpoint, path, question, timeout, engine)

        monkeypatch.setattr(support.server.Endpoint, "send", late)
        stub.ranks.clear()
        server.draw(trees[:1], rows[:2])
        assert server.endpoints[0].hung == {int(hung)}
        assert [rank for _, rank in stub.ranks] == [None, None]


def test_a_hung_server_costs_one_long_wait(work, monkeypatch):
    with serving(Stub(load_lm("tiny"), "tiny")) as url:
        server = support.server.Server(url, load_lm("tiny", weights=False))
    waited = []

    def send(endpoint, path, question=None, timeout=10.0, engine=None):
        waited.append(timeout)
        raise support.server.Late(f"no answer within {timeout:g} s")

    monkeypatch.setattr(support.server.Endpoint, "send", send)
    monkeypatch.setattr(server, "timeout", 900.0)
    with pytest.raises(ConnectionError, match="no answer within 10 s, 2 times"):
        server._continuations([1], 1, 2, 1.0)
    assert waited == [900.0, 10.0]  # a request, and whether it answers at all


# ---------------------------------------------------------------- several processes


def test_several_processes_ask_and_one_writes(work, capsys):
    """All lines are whole, figures are of all of them, and a later start goes on."""
    stub = Stub(load_lm("tiny"), "tiny")
    with serving(stub) as url:
        flags = f"--server {url} --workers 3"
        code, err = run(sample, f"{toy.SAMPLE} {flags}", capsys)
        assert code == 0, err
        whole, manifest = Path("run/samples.jsonl"), Path("run/samples.jsonl.manifest.json")
        stated = json.loads(manifest.read_text())
        assert "workers" not in stated["settings"]
        assert stated["totals"]["problems"] == 70 and stated["totals"]["responses"] == 350
        # half of it, as a kill leaves it
        records = whole.read_bytes().splitlines(keepends=True)
        assert len(records) == 70
        whole.write_bytes(b"".join(records[:40]) + records[40][:20])
        del stated["output"], stated["totals"]
        manifest.write_text(json.dumps(stated))
        asked = len(stub.asked)
        code, err = run(sample, f"{toy.SAMPLE} {flags}", capsys)
        assert code == 0, err
        assert len(stub.asked) == asked + 1 + 30  # the stage's own question, and what was missing
        assert run(label_steps, f"{toy.LABEL} {flags}", capsys)[0] == 0
    records = lines("run/samples.jsonl")
    assert {x["id"] for x in records} == {x["id"] for x in lines("problems.jsonl")}
    total = json.loads(manifest.read_text())["totals"]
    assert total["problems"] == 70 and total["responses"] == 350
    assert total["tokens"] == sum(len(r["ids"]) for x in records for r in x["responses"])
    for record in lines("run/trees.jsonl"):
        for v, node in enumerate(record["nodes"]):
            below = [n for n in record["nodes"] if n["parent"] == v]
            if node["labelled"]:
                assert node["n"] >= 3 and sum(n["draws"] for n in below) == node["n"]


@pytest.mark.parametrize("kill", [True, False])
def test_a_process_that_asks_and_fails_ends_all(kill, work, monkeypatch):
    with serving(Stub(load_lm("tiny"), "tiny")) as url:
        server = support.server.Server(url, load_lm("tiny", weights=False), workers=2)
        children = []

        def process(items, progress):
            progress(1, tokens=5)
            if items == [7]:
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise UserError("the seventh")
            return [{"id": items[0], "pid": os.getpid()}]

        error, wrong = (ConnectionError, "killed") if kill else (UserError, "the seventh")
        with pytest.raises(error, match=wrong):
            server.work_through(range(40), process, lambda done, **counts: None, children.extend)
        for record in children:
            assert record["pid"] != os.getpid()
            with pytest.raises(ProcessLookupError):
                os.kill(record["pid"], 0)


class Odd(Exception):
    """One that cannot be sent to another process."""

    def __init__(self, *_):
        self.lock = threading.Lock()


def test_an_error_that_cannot_be_sent_is_told_in_words(work):
    def process(items, progress):
        raise Odd

    with serving(Stub(load_lm("tiny"), "tiny")) as url:
        server = support.server.Server(url, load_lm("tiny", weights=False), workers=2)
        with pytest.raises(RuntimeError, match="Odd"):
            server.work_through(range(4), process, None, None)


ORPHANS = """
import os, sys, threading
sys.path.insert(0, {root!r})
from support.server import Server
class Asks(Server):
    threads, workers, _open = 1, 2, lambda self, share: None
    def __init__(self): pass
def process(items, progress):
    os.write(1, b"%d " % os.getpid())
    threading.Event().wait()
Asks().work_through(range(4), process, None, None)
"""


def test_processes_that_ask_end_with_the_first_one():
    code = ORPHANS.format(root=str(toy.ROOT))
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    said = b""
    while said.count(b" ") < 2:
        said += first.stdout.read1()
    ended = [toy.watch(pid) for pid in said.split()]
    first.kill()
    first.wait()
    assert all(end() for end in ended)


def test_levels_wait_where_responses_share_states():
    tree = label_steps.StepTree([1])
    for ids, ends in (([5, 6, 7], [1, 2, 3]), ([5, 8, 7], [1, 2, 3]), ([9, 6, 7], [1, 2, 3])):
        tree.put_in(ids, ends, 1)
    state = {tuple(tree.response(v)): v for v in range(len(tree.nodes))}
    by_path = lambda levels: [sorted(tree.response(v) for v in level) for level in levels]
    assert by_path(tree.levels()) == [[[]], [[5], [9]], [[5, 6], [5, 8], [9, 6]]]
    assert by_path(tree.levels(all_wait=False)) == [[[], [9], [9, 6]], [[5], [5, 6], [5, 8]]]
    assert len(state) == len(tree.nodes)


def test_time_left_is_told_response_by_response(work, capsys, monkeypatch):
    """In parts of problems, which sum up to all of them: not in chunks of 64."""
    told, add = [], support.cli.Progress.add

    def listen(bar, done=0, **counts):
        told.append(done)
        add(bar, done, **counts)

    monkeypatch.setattr(support.cli.Progress, "add", listen)
    evaluated = toy.EVALUATE.replace("run/actor", "tiny")
    for module, flags, problems, responses in (
        (sample, toy.SAMPLE, 70, 350),
        (label_steps, toy.LABEL, 70, 1000),
        (evaluate, evaluated, 66, 198),
    ):
        told.clear()
        assert run(module, flags, capsys)[0] == 0
        assert sum(told) == pytest.approx(problems)
        assert sum(0 < done < 0.5 for done in told) >= responses
