"""Draws by inference servers (vLLM, SGLang). It knows nothing of the algorithm.

The servers are OpenAI-compatible and take and return token ids. `Endpoint` sends a question,
`judge` says what an answer is worth, `Server` shares out the questions and asks again where a server
fails. `Server` has the same `draw` as `support/sampler.py`'s Sampler; its draws are its own, since no
seed is sent: they differ from run to run, and what is stored stays. Log-probs are never taken from a
server.
"""

import http.client
import json
import math
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from support.cli import UserError
from support.packing import Tree
from support.sampler import Row
from support.stage import fingerprint


class Fault(Exception):
    """A server's answer that cannot be used, for a reason that may pass."""


class NoTokenIds(Fault):
    """What a server says that cannot return token ids."""


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
        self.faults, self.rest = 0, 0.0  # in a row; until when it is not asked (time.monotonic())

    def send(self, path: str, question: dict | None = None, timeout: float = 900.0) -> bytes:
        """What it answers to a GET, or to a POST of the question. Raises Fault where that may be
        better another time, UserError where the question itself is refused."""
        connection = self.connect(*self.address, timeout=timeout)
        body = None if question is None else json.dumps(question)
        kind = "GET" if question is None else "POST"
        try:
            connection.request(kind, self.root + path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
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

    def ask(self, path: str, question: dict | None = None, timeout: float = 900.0) -> dict:
        """The JSON object that it answers."""
        said = self.send(path, question, timeout)
        try:
            answer = json.loads(said)
        except ValueError as e:
            raise Fault(f"it answered no JSON ({e})") from e
        if not isinstance(answer, dict):
            raise Fault("it answered no JSON object")
        return answer


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


class Server:
    """Draws by one or several servers of the same model.

    urls: comma separated. lm: a model.LM, the tokenizer and config of the model that they must
    serve (its weights are not needed).
    """

    prefilled = 0  # tokens of prefixes that were computed in this process

    requests = 64  # that each server is asked at once
    most = 64  # continuations that a request asks for
    tries = 8  # of one request, on whichever server is free
    timeout = 900.0  # seconds for one answer
    pause = 1.0  # seconds that a server rests after a fault, doubled with each further one

    def __init__(self, urls: str, lm):
        self.lm, self.provenance = lm, {"draws": "server"}  # what a manifest says of draws
        self.endpoints = [Endpoint(url.strip().rstrip("/")) for url in urls.split(",")]
        self.seats = queue.PriorityQueue()  # (when it may be used, number, endpoint): free requests
        for endpoint in self.endpoints:
            self._check(endpoint)
            for _ in range(self.requests):
                self.seats.put((0.0, self.seats.qsize(), endpoint))

    def _check(self, endpoint: Endpoint):
        """Refuse a server that serves another model, or gives no token ids."""
        try:
            self._find_model(endpoint)
            self._complete(endpoint, [self.lm.eos[0]], 1, 1, 0.0)
        except NoTokenIds as e:
            raise UserError(
                f"{endpoint.url}: {e}; a server that returns token ids is needed"
            ) from e
        except Fault as e:
            raise ConnectionError(f"{endpoint.url}: {e}; is the server up?") from e

    def _find_model(self, endpoint: Endpoint):
        """Under which name it serves the model, known by its path or its weights' fingerprint."""
        own = {self.lm.path, str(Path(self.lm.path).resolve()), fingerprint(self.lm.path)[:16]}
        served = set()
        for model in list_of_objects(endpoint.ask("/v1/models", timeout=self.timeout), "data"):
            names = {str(name) for name in (model.get("id"), model.get("root")) if name}
            if names & own:
                endpoint.model = model["id"]
                length = model.get("max_model_len") or math.inf
                endpoint.context = min(length, self.lm.max_length)
                return
            served |= names
        others = ", ".join(sorted(served))
        wrong = f"serves {others}, not {self.lm.path}"
        raise UserError(f"{endpoint.url}: {wrong}; start it with that folder")

    def _complete(self, endpoint, prompt: list[int], count: int, max_new: int, temperature) -> list:
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
        answer = endpoint.ask("/v1/completions", question, self.timeout)
        return judge(answer, prompt, count, max_new, self.lm)

    def _continuations(self, prompt: list[int], count: int, max_new: int, temperature) -> list:
        """`count` continuations, by whichever server is free, asked for again where one fails."""
        drawn, failed = [], 0
        while len(drawn) < count:
            usable, number, endpoint = self.seats.get()
            if usable < endpoint.rest:  # a fault at another of its seats: the whole server rests
                self.seats.put((endpoint.rest, number, endpoint))
                continue
            time.sleep(max(0.0, usable - time.monotonic()))
            began = time.monotonic()
            try:
                if endpoint.faults:  # it may have been started again, with another model
                    self._find_model(endpoint)
                # At temperature 0 a request for several is refused.
                asked = min(self.most if temperature else 1, count - len(drawn))
                more = self._complete(endpoint, prompt, asked, max_new, temperature)
                if not more:
                    raise Fault("it draws tokens that the tokenizer does not have")
                drawn += more
                endpoint.faults, endpoint.rest = 0, 0.0
            except Fault as e:
                failed += 1
                if began >= endpoint.rest:  # requests in flight together fail together, once
                    endpoint.faults += 1
                    rest = self.pause * 2 ** min(endpoint.faults - 1, 6)
                    endpoint.rest = time.monotonic() + rest
                if failed >= self.tries:
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
            prompt = []
            while node >= 0:
                prompt = trees[tree].ids[node] + prompt
                node = trees[tree].parent[node]
            return self._continuations(prompt, len(asked[state]), max_new, temperature)

        results = [None] * len(rows)
        with ThreadPoolExecutor(self.requests) as pool:
            for state, drawn in zip(asked, pool.map(ask, asked)):
                for r, ids in zip(asked[state], drawn):
                    results[r] = ids
                if progress:
                    progress(len(drawn), sum(map(len, drawn)))
        return results

    def work_through(self, todo: Iterable, process: Callable, progress, write: Callable):
        """As Sampler.work_through, a thread per item: requests are in flight over the borders of
        problems, and records are written as problems finish."""
        items, threads = iter(todo), self.requests * len(self.endpoints)
        with ThreadPoolExecutor(threads) as pool:
            running = set()
            try:
                while True:
                    for item in islice(items, 2 * threads - len(running)):
                        running.add(pool.submit(process, [item], progress))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        write(future.result())
            finally:
                for future in running:
                    future.cancel()
