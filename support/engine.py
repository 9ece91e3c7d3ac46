"""Starts an inference server for a model and ends it, so that its memory is free again. It knows nothing
of the algorithm.

Only a process that has ended gives all of its memory back, so a server lives as long as one model is
sampled from, and no longer.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from support.cli import UserError
from support.packing import Tree
from support.sampler import Row
from support.server import Server

PATIENCE_S = 1800  # for a server that loads its model
# From SIGTERM to SIGKILL, in which a healthy server ends its workers; and for its memory to be free.
GRACE_S = 60


class Engine:
    """At most one server at a time, of the model last asked for.

    command   what starts it, such as "vllm serve"; the model and --port are put behind it
    log       its output is appended to this file
    """

    def __init__(self, command: str, port: int, log: Path):
        self.command, self.port, self.log = command, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.process, self.model, self.used_before = None, "", []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def serve(self, model: str):
        """A server of this model, ready to be asked."""
        if self.process and self.model == model:
            return
        self.stop()
        self._require_free_port()
        self.used_before = used_memory()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = [*shlex.split(self.command), model, "--port", str(self.port)]
        print(f"a server of {model} is started; what it says is in {self.log}", flush=True)
        with self.log.open("a") as log:
            print(f"== {shlex.join(words)}", file=log, flush=True)
            # A session of its own: Ctrl-C is for us, and its workers can be ended with it.
            self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        self.model = model
        self._wait_until_ready()

    def require_reads_alike(self, base: str, copy: Path, prompt: str, load_lm):
        """Refuse an engine that reads a folder as this project saves it otherwise than the base's own:
        it would serve the first trained actor wrongly. Both have to go on from a prompt alike.

        copy: where the base is saved for this, and removed again. load_lm: model.load_lm.
        """
        found = []
        load_lm(base, device="cpu", dtype="bfloat16").save(copy)
        for folder in (str(copy), base):
            lm = load_lm(folder, weights=False)
            self.serve(folder)
            tree, row = Tree([lm.prompt_ids(prompt)], [-1], [True]), Row(0, 0, 0, 16)
            found += Server(self.url, lm).draw([tree], [row], 0.0)
        shutil.rmtree(copy)
        if found[0] != found[1]:
            wrong = f"the engine goes on from the first problem with tokens {found[1]} of {base}"
            wrong += f", but with {found[0]} of the same weights as saved here"
            mend = (
                "a newer engine may read both alike, or --dtype bfloat16 if the base is in float16"
            )
            raise UserError(f"--engine {self.command}: {wrong}; {mend}")

    def _require_free_port(self):
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2):
            wrong = "something answers there already, perhaps the server of another run"
            raise UserError(f"port {self.port}: {wrong}; end it, or give another --port")

    def _wait_until_ready(self):
        # Proxies are for other machines; many a box has http_proxy set.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                direct.open(f"{self.url}/v1/models", timeout=10).close()
                return
            except OSError as e:
                error = e
            if (code := self.process.poll()) is not None:
                raise UserError(f"the engine ended with code {code}; {self._last_lines()}")
            if time.monotonic() > give_up:
                raise UserError(f"the engine does not answer ({error}); {self._last_lines()}")
            time.sleep(1)

    def _last_lines(self, count: int = 15) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-count:]
        return "\n".join([f"the end of {self.log}:", *lines])

    def stop(self):
        """End it and its workers, and wait until the cards' memory is as free as before."""
        if self.process is None:
            return
        for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 10)):
            with suppress(ProcessLookupError):  # all of its group has ended
                os.killpg(self.process.pid, number)
            if self._group_ends_within(seconds):
                break
        self.process = None
        give_up = time.monotonic() + GRACE_S
        while time.monotonic() < give_up and not self._memory_is_back():
            time.sleep(1)

    def _group_ends_within(self, seconds: float) -> bool:
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            self.process.poll()  # takes its exit code, or it would count as there
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.1)
        return False

    def _memory_is_back(self) -> bool:
        slack = 1024  # MiB
        return all(new <= old + slack for new, old in zip(used_memory(), self.used_before))


def used_memory() -> list[int]:
    """MiB that are used of each GPU; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return [int(line) for line in said.split() if line.isdigit()]
