"""Every GPU figure, by hand: python benchmarks/bench_gpu.py [PART ...]   (needs CUDA; `--tiny`: toy sizes on the CPU)

  correctness    every CUDA path against the CPU in float64, for several counts of heads: log-probs, gradients, draws
  logprobs       linear_logprobs at the sizes of a 0.5B and a 7B model, against its rivals
  tree, sampler  tree packing and the sampler on a 0.5B model with random weights, against their rivals
  big            a 7B model: decoding, a training pass by flex_attention and by the gathered form, memory
  architectures  the table of tests/test_architectures.py, wider: packed or per path, error, speed against Llama
  training       `fit` of a 1.5B model, checkpointed, with --offload, and not checkpointed: seconds a step, memory against support.memory.memory
  pipeline       run.py with a random 0.5B model
  demo           run.py as it is, only where it is named

Shares are of what the machine can do, measured too: bfloat16 matrix products and copies.
Parts run in this order, in about ten minutes on an H100; one that fails says so and the others go on. With `--tiny` the figures
mean nothing.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import bench_kernels as bench
import torch

import support.attention
import support.distributed
import support.memory
import support.training
from support.architectures import checkpoint_layers, own_attention

ROOT = Path(__file__).resolve().parents[1]
TINY = "--tiny" in sys.argv
LLAMA = {"max_position_embeddings": 4096, "vocab_size": 151936}
HALF_B = LLAMA | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
HALF_B |= {"num_attention_heads": 14, "num_key_value_heads": 2}
ONE_AND_A_HALF_B = HALF_B | {"hidden_size": 1536, "intermediate_size": 8960}
ONE_AND_A_HALF_B |= {"num_hidden_layers": 28, "num_attention_heads": 12}
SEVEN_B = LLAMA | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
SEVEN_B |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
SEVEN_B |= {"tie_word_embeddings": False}
if TINY:
    HALF_B = ONE_AND_A_HALF_B = SEVEN_B = {**bench.SMALL, "vocab_size": 512}
TOKENS = 512 if TINY else 8192  # of a pack
HEADS = ((4, 4, 64), (4, 2, 64), (14, 2, 64), (16, 2, 64), (32, 8, 128))  # query, key/value, size
HEADS += ((4, 2, 32, "dynamic"),)  # rotary embeddings that cannot be captured


# ------------------------------------------------------------ is every CUDA path right?


def correctness():
    """Each count of heads in a process of its own, all at once: most of the time torch compiles."""
    runs = []
    for heads in HEADS:
        words = [sys.executable, __file__, "heads", json.dumps(heads)]
        runs.append(subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "2"}))
    failed = [run.args for run in runs if run.wait()]
    if failed:
        raise RuntimeError(f"{failed} failed")


def one_correctness(heads: int, groups: int, size: int, rope="default"):
    """The largest errors of this device's paths, for one count of heads."""
    rng = random.Random(0)
    sizes = {**bench.SMALL, "hidden_size": size * heads, "vocab_size": 512}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": 2}
    sizes["rope_parameters"] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    title = f"  {heads}/{groups} heads of {size}"
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(folder, sizes)
        trees = [random_tree(rng, n) for n in (1, 4, 9, 30)]
        exact = scores(bench.load_lm(folder, train=True, device="cpu"), trees, double=True)
        for dtype in ("float32", "bfloat16"):
            begin = time.perf_counter()
            lm = bench.load_lm(folder, train=True, device=bench.DEVICE, dtype=dtype)
            logp, gradient = scores(lm, trees)
            seconds, way = time.perf_counter() - begin, "flex" if lm.flex else "gathered"
            far = (logp - exact[0]).abs().max()
            angle = torch.nn.functional.cosine_similarity(gradient, exact[1], dim=0)
            print(f"{title}, {dtype}, {way}: log-probs off by {far:.1e}, cosine of the gradients "
                  f"{angle:.7f} ({seconds:.0f} s)")  # fmt: skip
            assert angle > 0.999 and far < (0.5 if dtype == "bfloat16" else 1e-3)
        rows = [bench.Row(0, 0, i, 24 + 3 * i) for i in range(48)]  # past one graph's columns
        tree = bench.Tree([[5, 6, 7, 8]], [-1], [True])
        drawn, captured, on_cpu = {}, {}, bench.load_lm(folder, device="cpu", dtype="float32")
        for dtype in ("float32", "bfloat16"):
            for graphs in (True, False):
                lm = bench.load_lm(folder, device=bench.DEVICE, dtype=dtype)
                lm.may_capture &= graphs
                drawn[graphs] = bench.Sampler(lm).draw([tree], rows)
                captured[graphs] = lm.may_capture
            print(f"{title}, {dtype}, rotary {rope}: captured as CUDA graphs: {captured[True]}, draws the same as "
                  f"without: {drawn[True] == drawn[False]}")  # fmt: skip
            assert drawn[True] == drawn[False]
            if dtype == "float32":
                wanted = bench.Sampler(on_cpu).draw([tree], rows)
                same = sum(a == b for a, b in zip(wanted, drawn[True])) / len(rows)
                print(f"{title}, float32, rotary {rope}: {same:.0%} of the draws are the CPU's")


def scores(lm, trees, double=False):
    """(log-probs, gradient of their mean square); double: computed in float64."""
    if double:
        lm.model.double()
    lm.model.zero_grad()
    packs = bench.pack_trees(trees, 2048, paths=lm.paths)
    logp = torch.cat([bench.step_logprobs(lm, pack) for pack in packs])
    logp.square().mean().backward()
    owner = [node for pack in packs for node in pack.owner]
    logp = logp[sorted(range(len(owner)), key=lambda k: owner[k])]  # by tree and node
    gradient = torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None])
    return logp.detach().double().cpu(), gradient.double().cpu()


def random_tree(rng, nodes, vocabulary=512):
    ids = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 24))] for _ in range(nodes)]
    parent = [-1] + [rng.randrange(max(0, v - 4), v) for v in range(1, nodes)]
    return bench.Tree(ids, parent, [True] * nodes)


# ------------------------------------------------------------ speed


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large product of random numbers; bytes/s of a copy, read and written."""
    size, mib = (256, 16) if TINY else (8192, 4096)
    a = torch.randn(size, size, device=bench.DEVICE, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=bench.DEVICE, dtype=torch.bfloat16)
    flops = 2 * size**3 / bench.seconds(lambda: a @ b, 9)
    x = torch.zeros(mib << 20, dtype=torch.uint8, device=bench.DEVICE)
    y = torch.empty_like(x)
    rate = 2 * x.numel() / bench.seconds(lambda: y.copy_(x), 9)
    print(f"ceilings: {flops / 1e12:.1f} TFLOP/s in bfloat16, {rate / 1e9:.0f} GB/s")
    return flops, rate


def logprobs():
    flops, _ = ceilings()
    for n, d, v in [(64, 32, 512)] if TINY else [(4096, 896, 151936), (4096, 3584, 152064)]:
        bench.errors(d, v)
        bench.logprobs(n, d, v)
        torch.manual_seed(0)
        hidden = torch.randn(n, d, device=bench.DEVICE, dtype=torch.bfloat16).requires_grad_()
        weight = (0.05 * torch.randn(v, d, device=bench.DEVICE)).bfloat16().requires_grad_()
        targets = torch.randint(0, v, (n,), device=bench.DEVICE)
        took = bench.seconds(
            lambda h=hidden, w=weight, t=targets: bench.linear_logprobs(h, w, t).sum().backward(), 5
        )
        # Four products of 2 N d V each: forward, its recomputation, two gradients.
        share = 8 * n * d * v / took / flops
        print(f"  d {d}, V {v}: {took * 1e3:.1f} ms, {share:.0%} of the ceiling")


def tree():
    bench.tree(HALF_B, ((8, 20),) if TINY else ((8, 20), (20, 30)))


def sampler():
    bench.sampler(HALF_B, (16,) if TINY else (256, 512))
    _, rate = ceilings()
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(folder, HALF_B)
        decoding(bench.load_lm(folder), rate, batch=16 if TINY else 256, prompt=16, new=80)


def decoding(lm, rate: float, batch: int, prompt: int, new: int):
    """A decoding step reads every weight that it uses once, and every row's keys and values so far."""
    weights = used_parameters(lm) * lm.head.element_size()
    stop, lm.eos = lm.eos, [len(lm.head)]  # no row ends early
    sampler, trees = bench.Sampler(lm, batch), [bench.Tree([[5] * prompt], [-1], [True])]
    sampler.draw(trees, [bench.Row(0, 0, 0, 1)])  # computes the prefix, which is not measured
    rows = [bench.Row(0, 0, i, new) for i in range(batch)]
    size = lm.head.element_size()
    kept = batch * support.attention.row_bytes(lm.config, prompt + new // 2, size)
    for graphs in (True, False):
        lm.may_capture = graphs and bench.CUDA
        took = bench.seconds(lambda: sampler.draw(trees, rows), 2)
        share = (weights + kept) * new / took / rate
        print(f"  batch {batch}, prompt {prompt}, {new} new, CUDA graphs {graphs}: "
              f"{batch * new / took:.0f} tokens/s, {share:.0%} of the bandwidth")  # fmt: skip
    lm.eos = stop


def used_parameters(lm) -> int:
    """How many numbers a token's products take: of input embeddings that are no head only rows."""
    table = lm.model.get_input_embeddings().weight
    count = sum(p.numel() for p in lm.model.parameters())
    return count if table is lm.head else count - table.numel()


def peak(f) -> tuple[float, float]:
    """(seconds, GB that were allocated at most) of f()."""
    if bench.CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    f()
    if bench.CUDA:
        torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() if bench.CUDA else 0
    return time.perf_counter() - begin, most / 1e9


def long_tree(tokens: int):
    """A prompt, and responses of 8 steps that fill a pack of `tokens`."""
    step = tokens // 32
    ids, parent = [[5] * step], [-1]
    for v in range(1, 31):
        ids.append([5 + v] * step)
        parent.append(0 if v % 8 == 1 else v - 1)
    return bench.Tree(ids, parent, [True] * 31)


def big():
    """Decoding and a training pass of a 7B model whose weights are bfloat16, as FSDP2's layers are."""
    flops, rate = ceilings()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        bench.random_model(folder, SEVEN_B)
        lm = bench.load_lm(folder)
        count = sum(p.numel() for p in lm.model.parameters())
        print(f"a model of {count / 1e9:.2f}B parameters ({time.perf_counter() - begin:.0f} s)")
        if bench.CUDA:
            torch.cuda.reset_peak_memory_stats()
        for batch, prompt, new in [(16, 8, 16)] if TINY else [(256, 512, 256), (64, 512, 128)]:
            decoding(lm, rate, batch, prompt, new)
        if bench.CUDA:
            most = torch.cuda.max_memory_allocated() / 1e9
            found = support.memory.memory(lm.model.config, 768, TOKENS, 256, 1, False)["sampling"]
            print(f"  sampling took {most:.1f} GB, computed {sum(found.values()) / 1e9:.1f}")
            torch.cuda.empty_cache()
        (pack,) = bench.pack_trees([long_tree(TOKENS)], TOKENS)
        checkpoint_layers(lm.model)

        def forward_backward():
            bench.step_logprobs(lm, pack).square().mean().backward()

        for flex in (None, False):
            lm.flex = flex if bench.CUDA else False
            lm.model.zero_grad(set_to_none=True)
            first, _ = peak(forward_backward)  # compiles, and makes the gradients
            held = torch.cuda.memory_allocated() / 1e9 if bench.CUDA else 0
            took, most = peak(forward_backward)
            share = 8 * used_parameters(lm) * TOKENS / took / flops  # forward twice, two gradients
            print(f"  training pass of {TOKENS} tokens, flex {bool(lm.flex)}: {took:.2f} s (first {first:.0f}), "
                  f"{TOKENS / took:.0f} tokens/s, {share:.0%} of the ceiling, "
                  f"{most - held:.1f} GB beside weights and gradients")  # fmt: skip
        found = support.memory.memory(lm.model.config, 768, TOKENS, 256, 8, False)["training"]
        found = {part: size / 1e9 for part, size in found.items()}
        print(f"  computed beside them: {sum(list(found.values())[2:]):.1f} GB")


def architectures():
    """A line per architecture: how trees are computed, how far its log-probs are from the CPU's by one
    path at a time, and a training pass against that of a Llama of the same width and depth."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_architectures as table

    tokenizer = bench.embedded_tokenizer()
    rng, wide = random.Random(0), {"hidden_size": 128, "n_embd": 128, "intermediate_size": 256}
    trees = [random_tree(rng, 24, len(tokenizer)) for _ in range(2)]
    folder = tempfile.TemporaryDirectory()

    def load(name: str, device=bench.DEVICE):
        place, fields = Path(folder.name, name), (table.PACKED | table.PATHS)[name]
        if not place.exists():
            wider = {k: x for k, x in wide.items() if isinstance(fields.get(k), int)}
            wider |= {"head_dim": 32} if fields.get("head_dim") == 8 else {}
            table.build(place, name, tokenizer, wider)
        return bench.load_lm(place, train=True, device=device, dtype="float32")

    def path_by_path(lm):
        own_attention(lm.model)
        lm.paths = True
        return lm

    def print_row(name: str, lm, how: str):
        """Llama is timed beside each, since other work on the machine changes."""
        exact = scores(path_by_path(load(name.split(": ")[0], "cpu")), trees)[0]
        far = float((scores(lm, trees)[0] - exact).abs().max())
        times = [], []
        for _ in range(4):
            for one, kept in zip((llama, lm), times):
                kept.append(bench.seconds(lambda one=one: scores(one, trees), 1, 0))
        speed = min(times[0]) / min(times[1])
        print(f"| {name} | {how} | {far:.0e} | {speed:.2g} |", flush=True)

    llama = load("Llama")
    print("| architecture | trees | largest difference of a step's log-prob | speed, Llama is 1 |")
    print("| --- | --- | --- | --- |")
    print_row("Llama: path by path", path_by_path(load("Llama")), "per path")
    for name in (*table.PACKED, *table.PATHS):
        lm = load(name)
        print_row(name, lm, "per path" if lm.paths else "packed")
    folder.cleanup()


def training():
    """`fit` of a 1.5B model on packs of 8,192 tokens, two a step; losses must be the same thrice."""
    for how in ("checkpointed", "offload", "kept"):  # kept: every layer's activations
        subprocess.run([sys.executable, __file__, "fit", how, *sys.argv[1:]], check=True)


def one_training(how: str):
    offload = how == "offload"
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(f"{folder}/model", ONE_AND_A_HALF_B)
        support.distributed.join(offload)
        lm = bench.load_lm(f"{folder}/model", train=True, checkpointed=how != "kept")
        if offload:
            support.distributed.shard(lm, offload=True)
        tree = long_tree(TOKENS)
        packs = bench.pack_trees([tree, tree], TOKENS)
        support.training.Checkpoints.save = lambda self, step: (
            None
        )  # the disk's speed is none of ours

        def loss(pack):
            return 0.5 * bench.step_logprobs(lm, pack).mean().square(), {}

        batches, work = [[0, 1]] * 5, Path(folder) / "work"

        def run():
            make_packs = lambda batch: [(pack,) for pack in packs]
            support.training.fit(
                {"actor": lm.model}, batches, make_packs, loss, work, lr=1e-6, save_minutes=99
            )

        _, most = peak(run)
        timing, metrics = (work / "timing.jsonl").read_text(), (work / "metrics.jsonl").read_text()
        steps = [json.loads(line)["seconds"] for line in timing.splitlines()]
        losses = [json.loads(line)["loss"] for line in metrics.splitlines()]
        found = support.memory.memory(lm.model.config, 0, TOKENS, 0, 1, offload)["training"]
        step = sorted(steps)[len(steps) // 2]
        print(f"1.5B, {how}: {step:.2f} s a step of {2 * TOKENS} tokens ({2 * TOKENS / step:.0f} "
              f"tokens/s), first {steps[0]:.0f} s; {most:.1f} GB of the card, computed "
              f"{sum(found.values()) / 1e9:.1f}; losses {losses[0]:.4f} to {losses[-1]:.4f}")  # fmt: skip
        support.distributed.leave()


# ------------------------------------------------------------ the stages


def run_py(*words: str):
    subprocess.run([sys.executable, ROOT / "run.py", *words], check=True)


def pipeline():
    """run.py with a random model: every stage on this device."""
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(f"{folder}/model", HALF_B)
        recipe = {"base": f"{folder}/model", "iterations": "1", "problems": "64"}
        recipe |= {"sample": "--n1 8 --n 2", "label": "--m 4", "draw": "--max_new 32"}
        recipe |= {"critic": "--lr 1e-5 --offload", "evaluate": "--samples 2"}
        recipe |= {"actor": "--gap 0 --lr 1e-6 --beta 0.1 --batch 256"}
        run_py(f"--run={folder}/run", *(f"--{name}={value}" for name, value in recipe.items()))


def demo():
    with tempfile.TemporaryDirectory() as folder:
        run_py(f"--run={folder}/run", *(["--iterations=1"] if TINY else []))


PARTS = (correctness, logprobs, tree, sampler, big, architectures, training, pipeline)

if __name__ == "__main__":
    if sys.argv[1:2] == ["heads"]:
        one_correctness(*json.loads(sys.argv[2]))
        sys.exit()
    if sys.argv[1:2] == ["fit"]:
        one_training(sys.argv[2])
        sys.exit()
    if not (TINY or bench.CUDA):
        sys.exit("no CUDA here; --tiny shows that the script works")
    name = torch.cuda.get_device_name() if bench.CUDA else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {bench.hf.__version__}")
    wanted = [word for word in sys.argv[1:] if word != "--tiny"]
    for part in (*PARTS, demo):
        if part.__name__ not in (wanted or [part.__name__ for part in PARTS]):
            continue
        begin = time.perf_counter()
        try:
            part()
        except Exception:  # noqa: BLE001  the other parts go on
            traceback.print_exc(file=sys.stdout)
            print(f"FAILED: {part.__name__}")
        if bench.CUDA:
            torch.cuda.empty_cache()
        print(f"({part.__name__}: {time.perf_counter() - begin:.0f} s)", flush=True)
