"""Speed and memory of the kernels against their rivals, by hand: python benchmarks/bench_kernels.py [errors logprobs tree sampler]

The sampler on a model of yours at batch 64: python benchmarks/bench_kernels.py model FOLDER bfloat16

Every figure is a ratio against a rival timed in the same run, A B A B; the second timing of the same thing shows the
noise. Peak memory is resident memory above what was there before the call, in a process of its own. CPU figures; a
CUDA machine uses device events and its allocator's peak.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import transformers as hf

import support.embedded
from model import linear_logprobs, load_lm, step_logprobs
from support.packing import Tree, pack_trees
from support.sampler import Row, Sampler, draw_key

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def seconds(f, repeats=3, warm_up=1):
    """Median seconds of f() after the warm-up."""
    times = []
    for i in range(-warm_up, repeats):
        if CUDA:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        f()
        if CUDA:
            torch.cuda.synchronize()
        times += [time.perf_counter() - begin] if i >= 0 else []
    return statistics.median(times)


# ------------------------------------------------------------ log-probs


def naive(hidden, weight, targets):
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


def selective(hidden, weight, targets):
    z = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return z.gather(1, targets[:, None])[:, 0] - z.logsumexp(-1)


def chunked(hidden, weight, targets, size=8192):
    """Vocabulary chunks under autograd, in float32: what most trainers' memory savers do."""
    parts = [(hidden.float() @ w.float().T).logsumexp(-1) for w in weight.split(size)]
    target = (hidden.float() * weight[targets].float()).sum(-1)
    return target - torch.stack(parts).logsumexp(0)


RIVALS = {f.__name__: f for f in (linear_logprobs, naive, selective, chunked)}


def one_logprob(name, dtype, n, d, v):
    """Seconds and peak extra MiB of forward + backward; on the CPU in a process of its own."""
    torch.manual_seed(0)
    # made in place: a temporary would raise the peak that extra memory is counted from
    hidden = torch.empty(n, d, dtype=dtype, device=DEVICE).normal_(0, 0.5).requires_grad_()
    weight = torch.empty(v, d, dtype=dtype, device=DEVICE).normal_(0, 0.05).requires_grad_()
    targets = torch.randint(0, v, (n,), device=DEVICE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step():
        hidden.grad = weight.grad = None
        RIVALS[name](hidden, weight, targets).sum().backward()

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1024
    step()  # the warm-up, too
    peak = torch.cuda.max_memory_allocated() / 1024 if CUDA else resource.getrusage(0).ru_maxrss
    return {"seconds": seconds(step, 2, warm_up=0), "mib": (peak - before) / 1024}


def logprobs(n=4096, d=896, v=151936):
    print(
        f"log-probs, forward + backward, N {n}, d {d}, V {v}; ratios to naive log_softmax + gather"
    )
    for dtype in ("float32", "bfloat16"):
        rows = {}
        for name in ("naive", "linear_logprobs", "naive again", "selective", "chunked"):
            if CUDA:
                rows[name] = one_logprob(name.split()[0], getattr(torch, dtype), n, d, v)
                continue
            args = ["one", name.split()[0], dtype, str(n), str(d), str(v)]
            out = subprocess.run([sys.executable, __file__, *args], capture_output=True, check=True)
            rows[name] = json.loads(out.stdout)
        base = rows["naive"]
        for name, row in rows.items():
            print(
                f"  {dtype:9} {name:16} {row['seconds']:7.3f} s {row['seconds'] / base['seconds']:6.2f}x  "
                f"{row['mib']:8.0f} MiB {row['mib'] / max(base['mib'], 1e-9):7.1%}"
            )


def errors(d=896, v=151936, steps=20, length=30):
    """Of a 30-token step's log-prob in bfloat16, against float64 on the same numbers."""
    torch.manual_seed(0)
    hidden = (torch.randn(steps * length, d) * 0.5).bfloat16().to(DEVICE)
    weight = (torch.randn(v, d) * 0.05).bfloat16().to(DEVICE)
    targets = torch.randint(0, v, (steps * length,), device=DEVICE)
    sums = lambda logp: logp.double().view(steps, length).sum(1)
    exact = sums(selective(hidden.double(), weight.double(), targets))
    rounded = lambda h, w, t: (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0]
    print(f"bfloat16, mean error of a {length}-token step's log-prob, d {d}, V {v}")
    rows = {"log_softmax in bfloat16": rounded, "bfloat16 logits, float32 after": selective}
    for name, f in (rows | {"linear_logprobs": linear_logprobs}).items():
        error = (sums(f(hidden, weight, targets)) - exact).abs()
        print(f"  {name:32} {error.mean():.1e}, at most {error.max():.1e}")


# ------------------------------------------------------------ tree packing


SMALL = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def embedded_tokenizer():
    demos = support.embedded.demonstrations(support.embedded.TASKS["math"], 0, 200, True)
    return support.embedded.build_tokenizer([d[k] for d in demos for k in ("prompt", "response")])


def random_model(folder, sizes=SMALL):
    """Random weights in bfloat16 where they will be computed in it, and the embedded tokenizer."""
    tokenizer = embedded_tokenizer()
    eos = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **eos, **sizes}
    torch.manual_seed(0)
    with torch.device(DEVICE):  # seven billion numbers take minutes on a CPU
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).to(torch.bfloat16 if CUDA else None)
    model.generation_config = hf.GenerationConfig(**eos)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pairs_tree(steps, width, length, prompt=80):
    """One response of `steps` steps of `length` tokens, `width` candidate actions at each state."""

    def draw(n):
        return torch.randint(5, 150, (n,)).tolist()

    ids, parent, score, trunk = [draw(prompt)], [-1], [False], 0
    for _ in range(steps):
        first = len(ids)
        for _ in range(width):
            ids.append(draw(length))
            parent.append(trunk)
            score.append(True)
        trunk = first  # the response goes on through the first action
    return Tree(ids, parent, score)


def tree(sizes=SMALL, shapes=((8, 20), (20, 30))):
    with tempfile.TemporaryDirectory() as folder:
        random_model(folder, sizes)
        lm = load_lm(folder)
        count = sum(p.numel() for p in lm.model.parameters()) / 1e6
        print(
            f"tree packing, forward + backward of all pairs of a response, {count:.1f}M parameters, prompt 80"
        )
        plain = hf.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=lm.head.dtype
        ).to(DEVICE)
        for steps, length in shapes:
            one = pairs_tree(steps, 8, length)

            def packed(one=one, budget=8192):
                for pack in pack_trees([one], budget):
                    step_logprobs(lm, pack).sum().backward()

            def apart(one=one):
                """The honest rival: one padded forward a pair, sorted by length, 16 pairs a batch."""
                rows = []
                for v in range(1, len(one.ids)):
                    path, u = [], v
                    while u >= 0:
                        path[:0] = one.ids[u]
                        u = one.parent[u]
                    rows.append((path, len(one.ids[v])))
                rows.sort(key=lambda r: len(r[0]))
                for i in range(0, len(rows), 16):
                    batch = rows[i : i + 16]
                    width = max(len(p) for p, _ in batch)
                    ids = [p + [0] * (width - len(p)) for p, _ in batch]
                    seen = [[1] * len(p) + [0] * (width - len(p)) for p, _ in batch]
                    ids, seen = torch.tensor(ids, device=DEVICE), torch.tensor(seen, device=DEVICE)
                    hidden = plain.base_model(ids, attention_mask=seen).last_hidden_state
                    keep = [
                        (r, t) for r, (p, n) in enumerate(batch) for t in range(len(p) - n, len(p))
                    ]
                    r, t = torch.tensor(keep, device=DEVICE).T
                    z = plain.lm_head(hidden[r, t - 1])
                    selected = z.gather(1, ids[r, t][:, None])[:, 0] - z.logsumexp(-1)
                    selected.sum().backward()

            a, b, a2, b2 = (seconds(f, 2) for f in (packed, apart, packed, apart))
            print(
                f"  T {steps:2} k 8 steps of {length}: {a:.2f} s against {b:.2f} s, {b / a:.1f}x (again {b2 / a2:.1f}x)"
            )


# ------------------------------------------------------------ sampler


def sampler(sizes=SMALL, batches=(256, 512), new=80, model=None, dtype=""):
    with tempfile.TemporaryDirectory() as folder:
        if not model:
            random_model(folder, sizes)
        lm = load_lm(model or folder, dtype=dtype)
        lm.eos, ids = [lm.eos[0]], lm.prompt_ids("Ann has 6 coins.\nHow many coins does Ann have?")
        plain = hf.AutoModelForCausalLM.from_pretrained(lm.path, dtype=lm.head.dtype).to(DEVICE)
        print(f"sampler, {new} new tokens, {model or 'random weights'}, against generate()")
        for batch in batches:
            prompt = torch.tensor([ids] * batch, device=DEVICE)

            def ours(batch=batch):
                rows = [Row(0, 0, draw_key("bench", i), new) for i in range(batch)]
                return Sampler(lm, batch).draw([Tree([ids], [-1], [True])], rows)

            def generate(prompt=prompt):
                with torch.no_grad():
                    flags = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": new}
                    return plain.generate(prompt, attention_mask=torch.ones_like(prompt), **flags)

            a, b, a2, b2 = (seconds(f, 2) for f in (ours, generate, ours, generate))
            print(
                f"  batch {batch}: {a:.2f} s against {b:.2f} s, {b / a:.2f}x (again {b2 / a2:.2f}x)"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        name, dtype, *sizes = sys.argv[2:]
        print(json.dumps(one_logprob(name, getattr(torch, dtype), *[int(size) for size in sizes])))
    elif sys.argv[1:2] == ["model"]:
        sampler(batches=(64,), new=32, model=sys.argv[2], dtype=sys.argv[3])
    else:
        print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
        for part in sys.argv[1:] or ("errors", "logprobs", "tree", "sampler"):
            globals()[part]()
