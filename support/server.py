"""server. It knows nothing of the algorithm."""

import http.client
import json
import math
import queue
import time
import urllib.request
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

from support.cli import UserError
from support.packing import Tree
from support.sampler import Row
from support.stage import Output, fingerprint


class Fault(Exception):
    """A server's answer that cannot be used, for a reason that may pass."""


class NoTokenIds(Fault):
    """What a server says that cannot return token ids."""


# Of the connection, and of answers that hold anything else than what was asked for.
FAULTS = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


FAULTS += (Fault,)


class Server:
    """Draws by OpenAI-compatible servers that take and return token ids (vLLM, SGLang).

    urls: comma separated, each the root of a server ("http://127.0.0.1:8000"). lm: tokenizer and
    config of the model that they must serve (its weights are not needed). Log-probs are never taken
    from a server, and no seed is sent: draws differ from run to run, what is stored stays.
    """

    requests = 64  # that each server is asked at once
    most = 64  # continuations that a request asks for
    tries = 8  # of one request, on whichever server is free
    timeout = 900.0  # seconds for one answer
    pause = 1.0  # seconds that a server rests after a fault, doubled with each further one

    def __init__(self, urls: str, lm):
        self.lm, self.names, self.contexts = lm, {}, {}
        self.faults, self.rest = {}, {}  # of each server: faults in a row, and until when it rests
        if wrong := [url for url in urls.split(",") if "://" not in url]:
            raise UserError(f"--server {wrong[0]}: wanted a URL such as http://127.0.0.1:8000")
        self.seats = queue.PriorityQueue()  # (when it may be used, number, url): free requests
        for url in [url.strip().rstrip("/") for url in urls.split(",")]:
            self.faults[url], self.rest[url] = 0, 0.0
            self._check(url)
            for _ in range(self.requests):
                self.seats.put((0.0, self.seats.qsize(), url))

    def _check(self, url: str):
        """Refuse a server that serves another model, or gives no token ids."""
        try:
            self._name_of_model(url)
            self._complete(url, [self.lm.eos[0]], 1, 1, 0.0)
        except NoTokenIds as e:
            raise UserError(f"{url}: {e}; a server that returns token ids is needed") from e
        except FAULTS as e:
            raise ConnectionError(f"{url}: {e}; is the server up?") from e

    def _name_of_model(self, url: str) -> str:
        """What the server calls the actor: it is known by its path, or by its weights' fingerprint."""
        models = self._ask(url, "/v1/models")["data"]
        own = {self.lm.path, str(Path(self.lm.path).resolve()), fingerprint(self.lm.path)[:16]}
        served = set()
        for model in models:
            names = {model.get("id"), model.get("root")}
            if names & own:
                self.names[url] = model["id"]
                self.contexts[url] = min(model.get("max_model_len") or math.inf, self.lm.max_length)
                return model["id"]
            served |= names
        others = ", ".join(sorted(str(name) for name in served if name))
        raise UserError(f"{url}: serves {others}, not {self.lm.path}; start it with that folder")

    def _ask(self, url: str, path: str, question: dict | None = None) -> dict:
        data = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as e:
            said = e.read().decode(errors="replace")[:300]
            if 400 <= e.code < 500 and e.code not in (408, 429):
                raise UserError(f"{url}: answered {e.code}: {said}") from e
            raise Fault(f"answered {e.code}: {said}") from e

    def _complete(self, url, prompt: list[int], count: int, room: int, temperature) -> list:
        """Up to `count` continuations of a prompt; Fault if the answer is not to be trusted."""
        # A server cuts off what does not fit. Asked again until nothing is cut off, it would draw
        # short responses alone.
        if len(prompt) + room > self.contexts[url]:
            wrong = f"a prefix and its new tokens are {len(prompt) + room}"
            wrong += f", the server's context is {self.contexts[url]}"
            raise UserError(f"{url}: {wrong}; lower --max_new, or start it with a longer context")
        question = {
            "model": self.names[url], "prompt": prompt, "n": count, "max_tokens": room,
            "temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": False, "stop_token_ids": self.lm.eos, "return_token_ids": True,
        }  # fmt: skip
        answer = self._ask(url, "/v1/completions", question)
        drawn = []
        for choice in answer.get("choices") or ():
            ids, echoed = choice.get("token_ids"), choice.get("prompt_token_ids")
            echoed = answer.get("prompt_token_ids") if echoed is None else echoed
            if not isinstance(ids, list) or not isinstance(echoed, list):
                raise NoTokenIds("its answers have no token ids")
            if echoed != prompt:
                raise Fault("it answered another prompt than it was sent")
            if choice.get("finish_reason") == "stop" and not (ids and ids[-1] in self.lm.eos):
                end = choice.get("stop_reason")
                ids = [*ids, self.lm.own_eos if end is None else end]  # none said: the tokenizer's
            whole = len(ids) == room or (ids and len(ids) < room and ids[-1] in self.lm.eos)
            if not whole or set(ids[:-1]) & set(self.lm.eos):
                raise Fault(f"{len(ids)} tokens came where {room} or an end were asked for")
            # Rows of the head beyond the tokenizer are padding: such a draw is made anew.
            if all(type(i) is int and 0 <= i < len(self.lm.tokenizer) for i in ids):
                drawn.append(ids)
        if not answer.get("choices") or len(drawn) > count:
            raise Fault(f"{len(drawn)} continuations came where {count} were asked for")
        return drawn

    def _continuations(self, prompt: list[int], count: int, room: int, temperature) -> list:
        """`count` continuations, by whichever server is free, tried again where one fails."""
        drawn, failed = [], 0
        while len(drawn) < count:
            usable, number, url = self.seats.get()
            if usable < self.rest[url]:  # a fault at another of its seats: the whole server rests
                self.seats.put((self.rest[url], number, url))
                continue
            time.sleep(max(0.0, usable - time.monotonic()))
            began = time.monotonic()
            try:
                if self.faults[url]:  # it may have been started anew, with another model
                    self._name_of_model(url)
                # At temperature 0 a request for several is refused.
                asked = min(self.most if temperature else 1, count - len(drawn))
                more = self._complete(url, prompt, asked, room, temperature)
                if not more:
                    raise Fault("it draws tokens that the tokenizer does not have")
                drawn = drawn + more
                self.faults[url], self.rest[url] = 0, 0.0
            except FAULTS as e:
                failed += 1
                if began >= self.rest[url]:  # requests in flight together fail together, once
                    self.faults[url] += 1
                    rest = self.pause * 2 ** min(self.faults[url] - 1, 6)
                    self.rest[url] = time.monotonic() + rest
                if failed >= self.tries:
                    raise ConnectionError(f"{url}: {e}, {failed} times") from e
            finally:
                self.seats.put((self.rest[url], number, url))
        return drawn

    def draw(self, trees: list[Tree], rows: list[Row], temperature: float, progress):
        """As the function `draw`: rows of one state and room are one request."""
        asked = {}  # (tree, node, room): the numbers of its rows
        for r, row in enumerate(rows):
            asked.setdefault((row.tree, row.node, row.room), []).append(r)

        def ask(state):
            tree, node, room = state
            prompt = []
            while node >= 0:
                prompt = trees[tree].ids[node] + prompt
                node = trees[tree].parent[node]
            return self._continuations(prompt, len(asked[state]), room, temperature)

        results = [None] * len(rows)
        with ThreadPoolExecutor(self.requests) as pool:
            for state, drawn in zip(asked, pool.map(ask, asked)):
                for r, ids in zip(asked[state], drawn):
                    results[r] = ids
                    if progress is not None:
                        progress.add(len(ids))
        return results


def work_through(todo: Iterable, process, out: Output, server: Server | None, chunk: int = 64):
    """Append process(list of items) -> records of all items: the loop of every stage that draws.

    Here: `chunk` problems at a time, since they decode in one batch. By a server: a thread a problem,
    so that requests are in flight over the problems' borders, and records come as problems finish.
    """
    items = iter(todo)
    if server is None:
        while some := list(islice(items, chunk)):
            out.append(process(some))
        return
    threads = server.requests * len(server.faults)
    with ThreadPoolExecutor(threads) as pool:
        running = set()
        try:
            while True:
                for item in islice(items, 2 * threads - len(running)):
                    running.add(pool.submit(process, [item]))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    out.append(future.result())
        finally:
            for future in running:
                future.cancel()
