"""Every GPU figure in one call, by hand: python tests/bench_gpu.py   (needs CUDA)

1. The two ceilings of this machine: bfloat16 matrix products (FLOP/s) and copies (bytes/s).
2. linear_logprobs at the sizes of a 0.5B and a 7B model, against naive, with its share of the ceiling.
3. Tree packing and the sampler against their rivals on a 0.5B model with random weights; the sampler's share of
   the memory bandwidth.
4. Before all that: is every CUDA path right? flex_attention and the gathered form, log-probs and gradients, decoding,
   each against the CPU in float64 or float32 (which tests/ holds against float64), for several head counts.
5. Checkpointed layers: the peak of memory with and without, and whether the gradients are the same.
6. All stages of the pipeline as run.sh runs them, and again with --offload at 1.5B.

`--tiny` runs the same on the CPU with toy sizes: it shows that the script works, its figures mean nothing.
"""

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_kernels as bench
import torch

ROOT = Path(__file__).resolve().parents[1]
HALF_B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
HALF_B |= {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096}
HALF_B |= {"vocab_size": 151936}
ONE_AND_A_HALF_B = HALF_B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
}
ONE_AND_A_HALF_B |= {"num_attention_heads": 12}


def ceilings(size=8192, mib=4096):
    dtype = torch.bfloat16
    a, b = (torch.randn(size, size, device=bench.DEVICE, dtype=dtype) for _ in range(2))
    flops = 2 * size**3 / bench.seconds(lambda: a @ b, 9)
    x = torch.zeros(mib << 20, dtype=torch.uint8, device=bench.DEVICE)
    y = torch.empty_like(x)
    rate = 2 * x.numel() / bench.seconds(lambda: y.copy_(x), 9)
    print(f"ceilings: {flops / 1e12:.1f} TFLOP/s in bfloat16, {rate / 1e9:.0f} GB/s")
    return flops, rate


def logprob_share(flops, n, d, v):
    """Four products of 2 N d V each: forward, its recomputation, two gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=bench.DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (0.05 * torch.randn(v, d, device=bench.DEVICE)).bfloat16().requires_grad_()
    targets = torch.randint(0, v, (n,), device=bench.DEVICE)
    run = lambda: bench.linear_logprobs(hidden, weight, targets).sum().backward()
    took = bench.seconds(run, 5)
    print(f"  d {d}, V {v}: {took * 1e3:.1f} ms, {8 * n * d * v / took / flops:.0%} of the ceiling")


def sampler_share(rate, sizes, batch, new=80):
    """A decoding step reads every weight once, and the keys and values of every row so far."""
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(folder, sizes)
        lm = bench.LM(folder)
        stop, lm.eos = lm.eos, [len(lm.head)]  # no row ends early
        prefixes = bench.Prefixes(lm, [bench.Tree([[5] * 16], [-1], [True])])
        rows = [(0, 0, i, new) for i in range(batch)]
        took = bench.seconds(lambda: bench.draw(lm, None, rows, batch=batch, prefixes=prefixes), 2)
        weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
        kept = (
            2 * sizes["num_key_value_heads"] * sizes["num_hidden_layers"] * lm.head.element_size()
        )
        kept *= batch * (16 + new / 2) * sizes["hidden_size"] // sizes["num_attention_heads"]
        speed = (weights + kept) * new / took
        print(
            f"  batch {batch}: {batch * new / took:.0f} tokens/s, {speed / rate:.0%} of the bandwidth"
        )
        lm.eos = stop


def correctness():
    """The largest errors of this device's paths, for 1, 2, 4, 7 and 8 query heads a key head."""
    rng = random.Random(0)
    for heads, groups in ((4, 4), (4, 2), (8, 2), (14, 2), (16, 2)):
        sizes = {
            "hidden_size": 64 * heads,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
        }
        sizes = {**bench.SMALL, **sizes, "vocab_size": 512}
        with tempfile.TemporaryDirectory() as folder:
            bench.random_model(folder, sizes)
            trees = [random_tree(rng, n) for n in (1, 4, 9, 30)]
            found = {}
            for name, device, dtype in (
                ("float64", "cpu", "float32"),
                ("float32", bench.DEVICE, "float32"),
                ("bfloat16", bench.DEVICE, "bfloat16"),
            ):
                lm = bench.LM(folder, train=True, device=device, dtype=dtype)
                if name == "float64":
                    lm.model.double()
                packs = bench.pack_trees(trees, 2048)
                logp = torch.cat([bench.step_logprobs(lm, pack) for pack in packs])
                logp.square().mean().backward()
                gradient = torch.cat([p.grad.flatten() for p in lm.model.parameters()])
                found[name] = logp.detach().double().cpu(), gradient.double().cpu(), lm.flex
            for name in ("float32", "bfloat16"):
                logp, gradient, flex = found[name]
                far = (logp - found["float64"][0]).abs().max()
                angle = torch.nn.functional.cosine_similarity(gradient, found["float64"][1], dim=0)
                way = "flex" if flex else "gathered"
                print(f"  {heads}/{groups} heads, {name}, {way}: log-probs off by {far:.1e}, "
                      f"cosine of the gradients {angle:.7f}")  # fmt: skip
            rows = [(0, 0, i, 24) for i in range(48)]
            tree = bench.Tree([[5, 6, 7, 8]], [-1], [True])
            drawn = []
            for device in ("cpu", bench.DEVICE):
                lm = bench.LM(folder, device=device, dtype="float32")
                drawn.append(bench.draw(lm, [tree], rows))
            same = sum(a == b for a, b in zip(*drawn)) / len(rows)
            print(f"  {heads}/{groups} heads, float32: {same:.0%} of the draws are the CPU's")


def random_tree(rng, nodes):
    ids = [[rng.randrange(512) for _ in range(rng.randint(1, 24))] for _ in range(nodes)]
    parent = [-1] + [rng.randrange(max(0, v - 4), v) for v in range(1, nodes)]
    return bench.Tree(ids, parent, [True] * nodes)


def checkpointing(sizes, tokens):
    """A forward and backward pass of a chain of `tokens` tokens, with layers kept and checkpointed."""
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(folder, sizes)
        tree = bench.Tree([[5] * (tokens // 4)] * 4, [-1, 0, 1, 2], [True] * 4)
        (pack,) = bench.pack_trees([tree], tokens)
        gradients = []
        for checkpointed in (False, True):
            lm = bench.LM(folder, train=True, checkpointed=False)
            if checkpointed:
                lm.checkpoint_layers()
            if bench.CUDA:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if bench.CUDA else 0
            bench.step_logprobs(lm, pack).square().mean().backward()
            peak = torch.cuda.max_memory_allocated() - before if bench.CUDA else 0
            gradients.append([p.grad for p in lm.model.parameters()])
            print(f"  checkpointed {checkpointed}: {peak / 2**30:.2f} GiB above the weights")
        same = all(torch.equal(a, b) for a, b in zip(*gradients))
        print(f"  the same gradients to the last bit: {same}")


def pipeline(sizes, more=""):
    """run.sh with a random model of these sizes: every stage on this device."""
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(f"{folder}/model", sizes)
        recipe = {"RUN": f"{folder}/run", "BASE": f"{folder}/model", "ITERATIONS": "1"}
        recipe |= {"PROBLEMS": "64", "SAMPLE": "--n1 8 --n 2", "LABEL": "--m 4"}
        recipe |= {
            "LENGTH": "--max_new 32",
            "CRITIC": f"--lr 1e-5 {more}",
            "EVALUATE": "--samples 2",
        }
        recipe |= {"ACTOR": f"--gap 0 --lr 1e-6 --beta 0.1 --batch 256 {more}"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(
            ["bash", ROOT / "run.sh"], check=True, env={**os.environ, **recipe, "PATH": path}
        )


if __name__ == "__main__":
    tiny = "--tiny" in sys.argv
    if not (tiny or bench.CUDA):
        sys.exit("no CUDA here; --tiny shows that the script works")
    name = torch.cuda.get_device_name() if bench.CUDA else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {bench.hf.__version__}")
    sizes = {**bench.SMALL, "vocab_size": 512} if tiny else HALF_B
    correctness()
    checkpointing(sizes, 512 if tiny else 8192)
    flops, rate = ceilings(256, 16) if tiny else ceilings()
    shapes = [(64, 32, 512)] if tiny else [(4096, 896, 151936), (4096, 3584, 152064)]
    for shape in shapes:
        bench.errors(*shape[1:])
        bench.logprobs(*shape)
        logprob_share(flops, *shape)
    bench.tree(sizes)
    bench.sampler(sizes, (16,) if tiny else (256, 512))
    sampler_share(rate, sizes, 16 if tiny else 256)
    pipeline(sizes)
    pipeline(sizes if tiny else ONE_AND_A_HALF_B, "--offload")
