"""How many completions per second the client of a server handles, by hand:

    python benchmarks/bench_server.py [--problems 64] [--workers 1 2] [--latency 0]

A stub server in a process of its own answers label_steps.py's requests with ready texts of about 200
tokens, so that what is measured is the client: it asks, checks, decodes, grades, counts and writes.
Printed for each number of workers: completions per second, and milliseconds of CPU per completion
of the process that writes (one worker: it does all) and of those that ask. --latency: seconds per request, to see what waiting for levels
costs; --all_wait: label level by level. Needs no GPU and no network but loopback.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS, STEP_TOKENS = 10, 20  # of a response


def words():
    """A tokenizer of 1,000 words: a token per word, and a line break."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    names = [
        "<|end|>",
        "?",
        "\n",
        *(f" word{i}" for i in range(1000)),
        *(f" {i}" for i in range(10)),
    ]
    model = tk.Tokenizer(tk.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="?"))
    model.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(r" \w+|\n|."), "isolated")
    model.decoder = tk.decoders.Fuse()
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "?"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **names)


def response(rng: random.Random, length: int) -> list[int]:
    """Steps of random words; the last is the answer."""
    ids = []
    while len(ids) < length - 2:
        ids += [rng.randrange(3, 1003) for _ in range(STEP_TOKENS - 1)] + [2]
    return [*ids[: length - 2], rng.randrange(1003, 1013), 0]


def make(folder: Path, problems: int):
    """The model's folder, problems, and the samples that are to be labelled."""
    from support.embedded import new_model
    from support.records import dump

    tokenizer = words()
    new_model(tokenizer, seed=0, layers=1, width=16).save_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    (folder / "model" / "config.json").write_text(json.dumps(config))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    tokenizer.save_pretrained(folder / "model")
    rng, lines, samples = random.Random(0), [], []
    for i in range(problems):
        prompt = tokenizer.decode([rng.randrange(3, 1003) for _ in range(100)])
        problem = {"id": f"p/{i}", "source": "bench", "domain": "math", "prompt": prompt}
        lines.append(problem | {"answer": "1", "tests": None})
        drawn = []
        for k in range(6):
            ids = response(rng, STEPS * STEP_TOKENS + 2)
            ends = [*range(STEP_TOKENS, STEPS * STEP_TOKENS + 1, STEP_TOKENS), len(ids)]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            line = {"ids": ids, "ends": ends, "text": text, "reward": k % 2, "finished": True}
            drawn.append(line)
        prompt_ids = tokenizer(prompt + "\n")["input_ids"]
        record = {"id": problem["id"], "prompt_ids": prompt_ids, "kept": list(range(6))}
        samples.append(record | {"responses": drawn})
    (folder / "problems.jsonl").write_bytes(b"".join(map(dump, lines)))
    (folder / "samples.jsonl").write_bytes(b"".join(map(dump, samples)))


class Stub(BaseHTTPRequestHandler):
    """Answers of ready bytes: only the prompt is put in."""

    protocol_version = "HTTP/1.0"
    model, latency, ready = "", 0.0, {}

    def log_message(self, *_):
        pass

    def say(self, body: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.say(json.dumps({"data": [{"id": self.model, "root": self.model}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rng, room = random.Random(len(asked["prompt"])), asked["max_tokens"]
        choices, longest = [], 0
        for k in range(asked["n"]):
            length = min(room, 2 + (room - 2) // STEP_TOKENS * STEP_TOKENS)
            if (k, length) not in self.ready:
                ids = response(rng, length) if length > 2 else [3] * (length - 1) + [0]
                text = " word123" * length
                choice = {"index": k, "text": text, "logprobs": None, "finish_reason": "stop"}
                self.ready[k, length] = choice | {"stop_reason": None, "token_ids": ids}
            longest = max(longest, length)
            echo = asked["prompt"] if k == 0 else None
            choices.append(self.ready[k, length] | {"prompt_token_ids": echo or asked["prompt"]})
        time.sleep(self.latency * longest / (STEPS * STEP_TOKENS))
        self.say(json.dumps({"id": "x", "object": "text_completion", "choices": choices}).encode())


def serve(model: str, latency: float, pipe):
    Stub.model, Stub.latency = model, latency
    ThreadingHTTPServer.request_queue_size = 1024
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    pipe.send(server.server_port)
    server.serve_forever()


def used() -> tuple[float, float]:
    """Seconds of CPU of this process, and of its ended children."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return tuple(usage.ru_utime + usage.ru_stime for usage in usages)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--m", type=int, default=16)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--all_wait", action="store_true")
    args = parser.parse_args()
    import label_steps
    import support.server

    support.server.Server.requests = args.requests
    if hasattr(support.server.Server, "all_wait"):
        support.server.Server.all_wait = args.all_wait
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.problems)
        os.chdir(folder)
        ours, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        stub = spawn.Process(target=serve, args=("model", args.latency, theirs), daemon=True)
        stub.start()
        url = f"http://127.0.0.1:{ours.recv()}"
        for workers in args.workers:
            files = {"problems": "problems.jsonl", "samples": "samples.jsonl"}
            flags = {"out": f"trees{workers}.jsonl", "m": args.m, "max_new": 202, "server": url}
            if workers > 1:
                flags["workers"] = workers
            began, before = time.perf_counter(), used()
            label_steps.stage(label_steps.Settings(actor="model", **files, **flags))
            wall = time.perf_counter() - began
            writer, asking = (after - start for after, start in zip(used(), before))
            trees = [
                json.loads(line) for line in Path(f"trees{workers}.jsonl").read_text().splitlines()
            ]
            tokens = sum(tree["tokens"] for tree in trees)
            # Completions end in leaves, which each of them counts once (no blank line here).
            drawn = sum(n["n"] for t in trees for n in t["nodes"] if not n["labelled"])
            print(
                f"workers {workers}: {drawn} completions, {drawn / wall:.0f} per second, "
                f"ms of CPU each: {1000 * writer / drawn:.2f} of the process that writes, "
                f"{1000 * asking / drawn:.2f} of those that ask; {tokens / drawn:.0f} tokens each, "
                f"{wall:.1f} s"
            )
        stub.terminate()


if __name__ == "__main__":
    main()
