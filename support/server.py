"""Draws by inference servers (vLLM, SGLang). It knows nothing of the algorithm.

The servers are OpenAI-compatible and take and return token ids. `Endpoint` sends a question,
`judge` says what an answer is worth, `Server` shares out the questions and asks again where a server
fails. `Server` has the same `draw` as `support/sampler.py`'s Sampler; its draws are its own, since no
seed is sent: they differ from run to run, and what is stored stays. Log-probs are never taken from a
server.
"""

import http.client
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from support.cli import UserError
from support.packing import Tree, path_ids
from support.sampler import Row, Sampler
from support.stage import fingerprint


class Fault(Exception):
    """A server's answer that cannot be used, for a reason that may pass."""


class NoTokenIds(Fault):
    """What a server says that cannot return token ids."""


class Late(Fault):
    """No answer came in time: the server, or one of its engines, may hang."""


# ------------------------------------------------------------ one server


class Endpoint:
    """The address of a server, what it serves, and how it fares.

    url: its root, such as "http://127.0.0.1:8000". It is asked directly, whatever proxy is set.
    """

    def __init__(self, url: str):
        try:
            parts = urlsplit(url)
            self.address = parts.hostname, parts.port
        except ValueError:  # a port that is none
            parts = self.address = None
        if not parts or parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--server {url}: wanted a URL such as http://127.0.0.1:8000")
        self.url, self.root = url, parts.path
        https = parts.scheme == "https"
        self.connect = http.client.HTTPSConnection if https else http.client.HTTPConnection
        self.model, self.context = "", math.inf  # what it calls the model; its tokens at most
        self.engines, self.hung = 1, set()  # data-parallel ones behind it; those that were Late
        self.faults, self.rest = 0, 0.0  # in a row; until when it is not asked (time.monotonic())

    def send(
        self, path: str, question: dict | None = None, timeout=10.0, engine: int | None = None
    ) -> bytes:
        """What it answers to a GET, or to a POST of the question; engine: the one to answer.

        Raises Fault where the answer may be better another time, UserError where the question
        itself is refused.
        """
        connection = self.connect(*self.address, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        headers |= {} if engine is None else {"X-data-parallel-rank": str(engine)}
        body = None if question is None else json.dumps(question)
        kind = "GET" if question is None else "POST"
        try:
            connection.request(kind, self.root + path, body, headers)
            answer = connection.getresponse()
            said = answer.read()
        except TimeoutError as e:
            raise Late(f"no answer within {timeout:g} s") from e
        except (OSError, http.client.HTTPException) as e:
            raise Fault(str(e) or type(e).__name__) from e
        finally:
            connection.close()
        if answer.status == 200:
            return said
        wrong = f"answered {answer.status}: {said.decode(errors='replace')[:300]}"
        if 400 <= answer.status < 500 and answer.status not in (408, 429):
            raise UserError(f"{self.url}: {wrong}")
        raise Fault(wrong)

    def ask(self, *question, **how) -> dict:
        """The JSON object that it answers; as `send`."""
        said = self.send(*question, **how)
        try:
            answer = json.loads(said)
        except ValueError as e:
            raise Fault(f"it answered no JSON ({e})") from e
        if not isinstance(answer, dict):
            raise Fault("it answered no JSON object")
        return answer

    def find_model(self, lm):
        """Learn under which name it serves `lm`, known by its path or its weights' fingerprint, and
        what it can. UserError if it will not do."""
        own = {lm.path, str(Path(lm.path).resolve()), fingerprint(lm.path)[:16]}
        served = set()
        for model in list_of_objects(self.ask("/v1/models"), "data"):
            names = {str(name) for name in (model.get("id"), model.get("root")) if name}
            if names & own:
                if model.get("owned_by") == "vllm":
                    self.require_version()
                self.model = model.get("id")
                self.context = min(model.get("max_model_len") or math.inf, lm.max_length)
                return
            served |= names
        others = ", ".join(sorted(served))
        raise UserError(f"{self.url}: serves {others}, not {lm.path}; start it with that folder")

    def require_version(self):
        """Refuse a vLLM that cannot read what transformers 5 saves, which would serve the base model
        and fail at the first trained actor, or compute it with another rope_theta."""
        try:
            version = str(self.ask("/version").get("version"))
        except (Fault, UserError):  # it does not say
            return
        found = tuple(map(int, re.findall(r"\d+", version)[:3]))
        if found and found < OLDEST_VLLM:
            oldest = ".".join(map(str, OLDEST_VLLM))
            wrong = f"vLLM {version} cannot read models saved by transformers 5"
            raise UserError(f"{self.url}: {wrong}; install vLLM {oldest} or later there")


OLDEST_VLLM = 0, 19, 1  # that takes transformers 5


def list_of_objects(answer: dict, field: str) -> list[dict]:
    found = answer.get(field)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Fault(f"its answer has no list of {field}")
    return found


def judge(answer: dict, prompt: list[int], count: int, max_new: int, lm) -> list[list[int]]:
    """The continuations of `prompt` in a server's answer, at most `count`, each up to an EOS (kept)
    or `max_new` tokens. Raises Fault if they are not what was asked for.

    A continuation with a token that the tokenizer does not have (rows of the head beyond it are
    padding) is left out, to be drawn again.
    """
    choices, drawn = list_of_objects(answer, "choices"), []
    if not 1 <= len(choices) <= count:
        raise Fault(f"{len(choices)} continuations came where {count} were asked for")
    for choice in choices:
        ids, echoed = choice.get("token_ids"), choice.get("prompt_token_ids")
        echoed = answer.get("prompt_token_ids") if echoed is None else echoed
        if not isinstance(ids, list) or not isinstance(echoed, list):
            raise NoTokenIds("its answers have no token ids")
        if echoed != prompt:
            raise Fault("it answered another prompt than it was sent")
        if not set(map(type, ids)) <= {int}:
            raise Fault("a token id of its answer is no whole number")
        if choice.get("finish_reason") == "stop" and not (ids and ids[-1] in lm.eos):
            end = choice.get("stop_reason")  # the EOS, where the server leaves it out
            ids = [*ids, end if type(end) is int else lm.own_eos]  # none said: the tokenizer's
        whole = len(ids) == max_new or (ids and len(ids) < max_new and ids[-1] in lm.eos)
        if not whole or not set(lm.eos).isdisjoint(ids[:-1]):
            raise Fault(f"{len(ids)} tokens came where {max_new} or an end were asked for")
        if 0 <= min(ids) and max(ids) < len(lm.tokenizer):
            drawn.append(ids)
    return drawn


# ------------------------------------------------------------ who draws


def sampler_for(lm, s):
    """Who draws for a stage with settings `s`: the servers that --server names, or the model itself."""
    if s.server:
        return Server(s.server, lm, s.workers, s.engines)
    return Sampler(lm, s.batch)


class Server:
    """Draws by one or several servers of the same model.

    urls: comma separated. lm: a model.LM, the tokenizer and config of the model that they must
    serve (its weights are not needed). workers: processes that ask, decode and grade, each for some
    of the problems; one asks for 1,000 to 2,000 completions per second. engines: of each server,
    if it runs several side by side (data parallel) and does not say so; 0: as many as it says.
    """

    all_wait = False  # where hardly a draw is saved, all requests of a problem are sent at once

    requests = 64  # that each engine is asked at once
    most = 64  # continuations that a request asks for
    tries = 8  # of one request, on whichever server is free
    late_tries = 2  # of one request that no answer came to
    timeout = 900.0  # seconds for one answer
    pause = 1.0  # seconds that a server rests after a fault, doubled with each further one

    def __init__(self, urls: str, lm, workers: int = 1, engines: int = 0):
        self.lm, self.workers = lm, workers
        self.provenance = {"draws": "server"}  # what a manifest says of draws
        self.endpoints = [Endpoint(url.strip().rstrip("/")) for url in urls.split(",")]
        for endpoint in self.endpoints:
            self._check(endpoint, engines)
        self._open(share=1)

    def _check(self, endpoint: Endpoint, engines: int):
        """Refuse a server that serves another model, or gives no token ids."""
        try:
            endpoint.find_model(self.lm)
            found = self._count_engines(endpoint)
        except NoTokenIds as e:
            raise UserError(
                f"{endpoint.url}: {e}; a server that returns token ids is needed"
            ) from e
        except Fault as e:
            raise ConnectionError(f"{endpoint.url}: {e}; is the server up?") from e
        endpoint.engines = engines or found
        if endpoint.engines > 1:
            print(f"{endpoint.url}: {endpoint.engines} data-parallel engines")

    def _count_engines(self, endpoint: Endpoint) -> int:
        """Ask each data-parallel engine for a token, by its number: one that is not there is refused. A
        server that knows of no such numbers refuses none, and is asked once."""

        def refusal(engine: int) -> UserError | None:
            try:
                self._complete(endpoint, [self.lm.eos[0]], 1, 1, 0.0, engine)
            except UserError as e:
                return e

        if not refusal(1 << 20):
            return 1
        if wrong := refusal(0):  # this one is there, so the server has another reason
            raise wrong
        return next(engine for engine in itertools.count(1) if refusal(engine))

    def _open(self, share: int):
        """Free seats, a request each: this process may have one in `share` of all."""
        self.seats = queue.PriorityQueue()  # (when it may be used, number, endpoint)
        for endpoint in self.endpoints:
            for _ in range(-(-self.requests * endpoint.engines // share)):
                self.seats.put((0.0, self.seats.qsize(), endpoint))
        self.threads = self.seats.qsize()
        self.pool = ThreadPoolExecutor(self.threads)  # a thread per request

    def _complete(
        self, endpoint, prompt: list[int], count: int, max_new: int, temperature, engine=None
    ) -> list[list[int]]:
        """Up to `count` continuations of a prompt by one request."""
        # A server cuts off what does not fit. Asked again until nothing is cut off, it would draw
        # short responses alone.
        if len(prompt) + max_new > endpoint.context:
            wrong = f"a prefix and its new tokens are {len(prompt) + max_new}"
            wrong += f", the server's context is {endpoint.context}; lower --max_new"
            raise UserError(f"{endpoint.url}: {wrong}, or start it with a longer context")
        question = {
            "model": endpoint.model, "prompt": prompt, "n": count, "max_tokens": max_new,
            "temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": False, "stop_token_ids": self.lm.eos, "return_token_ids": True,
        }  # fmt: skip
        answer = endpoint.ask("/v1/completions", question, self.timeout, engine)
        return judge(answer, prompt, count, max_new, self.lm)

    def _continuations(
        self, prompt: list[int], count: int, max_new: int, temperature, home: int = 0
    ) -> list[list[int]]:
        """`count` continuations, by whichever server is free, asked for again where one fails.

        home: a number of the problem. The same engine of a server gets all of its requests, since
        their prefixes are in that engine's cache.
        """
        drawn, failed, late = [], 0, 0
        while len(drawn) < count:
            usable, number, endpoint = self.seats.get()
            if usable < endpoint.rest:  # a fault at another of its seats: the whole server rests
                self.seats.put((endpoint.rest, number, endpoint))
                continue
            time.sleep(max(0.0, usable - time.monotonic()))
            began, engine = time.monotonic(), None
            if endpoint.engines > 1 and home % endpoint.engines not in endpoint.hung:
                engine = home % endpoint.engines
            try:
                if endpoint.faults:  # does it answer at all, and is it still this model?
                    endpoint.find_model(self.lm)
                # At temperature 0 a request for several is refused.
                asked = min(self.most if temperature else 1, count - len(drawn))
                more = self._complete(endpoint, prompt, asked, max_new, temperature, engine)
                if not more:
                    raise Fault("it draws tokens that the tokenizer does not have")
                drawn += more
                endpoint.faults, endpoint.rest = 0, 0.0
            except Fault as e:
                failed, late = failed + 1, late + isinstance(e, Late)
                if isinstance(e, Late) and engine is not None:
                    endpoint.hung.add(engine)
                if began >= endpoint.rest:  # requests in flight together fail together, once
                    endpoint.faults += 1
                    rest = self.pause * 2 ** min(endpoint.faults - 1, 6)
                    endpoint.rest = time.monotonic() + rest
                if failed >= self.tries or late >= self.late_tries:
                    raise ConnectionError(f"{endpoint.url}: {e}, {failed} times") from e
            finally:
                self.seats.put((endpoint.rest, number, endpoint))
        return drawn

    def fits(self, trees: list[Tree]) -> bool:
        """The prefixes are the server's concern."""
        return True

    def draw(
        self, trees: list[Tree], rows: list[Row], temperature: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """As Sampler.draw, but a row's key counts for nothing: rows of one state and length are one
        request. Raises ConnectionError where no server answers as it should."""
        asked = {}  # (tree, node, max_new): the numbers of its rows
        for r, row in enumerate(rows):
            asked.setdefault((row.tree, row.node, row.max_new), []).append(r)

        def ask(state):
            tree, node, max_new = state
            home, prompt = hash(tuple(trees[tree].ids[0])), path_ids(trees[tree], node)
            return self._continuations(prompt, len(asked[state]), max_new, temperature, home)

        results = [None] * len(rows)
        for state, drawn in zip(asked, self.pool.map(ask, asked)):
            for r, ids in zip(asked[state], drawn):
                results[r] = ids
            if progress:
                progress(len(drawn), sum(map(len, drawn)))
        return results

    # -------------------------------------------------------- many problems at once

    def work_through(self, todo: Iterable, process: Callable, progress, write: Callable):
        """As Sampler.work_through, an item at a time: requests are in flight over the borders of
        problems, and records are written, by this process alone, as problems finish."""
        if self.workers > 1:
            return self._by_processes(todo, process, progress, write)
        items = iter(todo)
        with ThreadPoolExecutor(self.threads) as pool:  # a thread per problem
            running = set()
            try:
                while True:
                    for item in itertools.islice(items, 2 * self.threads - len(running)):
                        running.add(pool.submit(process, [item], progress))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        write(future.result())
            finally:
                for future in running:
                    future.cancel()

    def _by_processes(self, todo: Iterable, process: Callable, progress, write: Callable):
        """Share the items out to forks of this process, each of which has some in flight."""
        # The tokenizer's threads would not be in a fork; what asks in parallel here are processes.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        fork, items, waiting = multiprocessing.get_context("fork"), iter(todo), {}
        in_flight = 2 * -(-self.threads // self.workers)
        children = []
        try:
            for _ in range(self.workers):
                ours, theirs = fork.Pipe()
                others = [*waiting, ours]  # our ends, of which a fork has copies
                child = fork.Process(target=self._work, args=(theirs, process, others), daemon=True)
                child.start()
                theirs.close()
                children.append((child, ours))
                waiting[ours] = 0  # items that it has not answered
            for _, pipe in children * in_flight:
                self._send_next(items, pipe, waiting)
            while any(waiting.values()):
                for pipe in multiprocessing.connection.wait([p for p in waiting if waiting[p]]):
                    with self._alive():
                        kind, what = pipe.recv()
                    if kind == "error":
                        raise what
                    if kind == "progress":
                        done, counts = what
                        progress(done, **counts)
                    else:
                        write(what)
                        waiting[pipe] -= 1
                        self._send_next(items, pipe, waiting)
        finally:
            for child, _ in children:
                child.terminate()
            for child, _ in children:
                child.join()

    @contextmanager
    def _alive(self):
        """What is said to or heard from a process that is gone is an error in words."""
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError):
            wrong = "a process that asks has been killed, perhaps for want of memory"
            raise ConnectionError(f"--workers {self.workers}: {wrong}") from None

    def _send_next(self, items, pipe, waiting: dict):
        for item in itertools.islice(items, 1):
            with self._alive():
                pipe.send(item)
            waiting[pipe] += 1

    def _work(self, pipe, process: Callable, others: list):
        """What a fork does: answer each item by its records, and say how far it is meanwhile."""
        for other in others:  # while one of them is open here, the first process never seems gone
            other.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the first process hears, too
        self._open(share=self.workers)
        one_at_a_time = threading.Lock()

        def say(kind: str, what):
            with one_at_a_time:
                pipe.send((kind, what))

        def progress(done: float = 0, **counts):
            say("progress", (done, counts))

        def answer(item):
            try:
                say("records", process([item], progress))
            except Exception as e:  # noqa: BLE001  the first process raises it
                if not isinstance(e, UserError | ConnectionError):  # many an error cannot be sent
                    e = RuntimeError(traceback.format_exc())
                say("error", e)

        with ThreadPoolExecutor(self.threads) as pool:
            while True:
                try:
                    pool.submit(answer, pipe.recv())
                except (EOFError, ConnectionResetError):  # the first process is gone
                    os._exit(1)
