"""Stage 0: the problems and the base model.

    python prepare.py --out runs/demo    # embedded problems and base model
    python prepare.py --out runs/code --task code
    python prepare.py --out runs/gsm8k --train gsm8k:train.jsonl --test gsm8k:test.jsonl

Reads:  nothing, or data sets in their native files.
Writes: train.jsonl, valid.jsonl, test.jsonl and, without --train or with --demos, base/
    {"id": "demo/train/17", "source": "demo", "domain": "math", "prompt": "Ann has 6 coins. ...",
     "answer": "9", "tests": null}

The embedded problems are chains of relations ("Ben has twice as many as Ann."). A word-level model
of 0.5M parameters learns to solve them, and is then trained briefly on demonstrations in which some
phrases are misread more often than not ("twice as many" as + 2). So the base model fails in a way
that is visible in its steps, and knows the right way well enough to find it by sampling. --task
parity asks of the same chains whether the number is odd or even, so that half of all wrong
reasoning is rewarded; --task code are small functions to write ("Let a be twice x."), graded by
running them. Harder ones, that tell methods apart: --steps 6-6 --wordings 32 --clean_size 48000
(and --careless 4: hardly ever right).
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from model import LM, load_lm, step_logprobs
from support.cli import UserError, flag, main
from support.datasets import DEMOS, INSTRUCTIONS, LOADERS, Loader, load_set, normalised_question
from support.distributed import join, shard, world
from support.embedded import (
    BEGINNINGS,
    ENDINGS,
    MOST_STEPS,
    TASKS,
    Task,
    build_tokenizer,
    demonstrations,
    embedded_problems,
    new_model,
)
from support.memory import require_memory
from support.packing import Tree, pack_trees
from support.records import digest, read_jsonl, replace
from support.stage import Output
from support.training import fit, whole_batches

# ------------------------------------------------------------ fine-tuning on demonstrations

BUDGET = 8192  # tokens of a pack


def demonstration_tree(lm: LM, demo: dict) -> Tree:
    """A demonstration as a tree of two nodes, prompt and response, both scored."""
    ids = [lm.prompt_ids(demo["prompt"]), lm.response_ids(demo["response"])]
    return Tree(ids, [-1, 0], [True, True])


def fine_tune(lm: LM, trees: list[Tree], work: Path, lr, batch, passes, seed, prompt_weight):
    """Next-token training; a prompt's tokens count `prompt_weight`, a response's 1."""
    if prompt_weight == 0:  # prompts are context alone
        trees = [tree._replace(score=[False, True]) for tree in trees]

    def make_packs(rows):
        chosen = [trees[r] for r in rows]
        weight = sum(prompt_weight * len(t.ids[0]) + len(t.ids[1]) for t in chosen)
        return [(pack, weight) for pack in pack_trees(chosen, BUDGET, 1, world(), lm.paths)]

    def loss(pack, weight):
        logp = step_logprobs(lm, pack)  # (M,)
        response = torch.tensor([v > 0 for _, v in pack.owner], device=logp.device)
        nll = -torch.where(response, logp, prompt_weight * logp).sum() / weight
        return nll, {"response_nll": -float(logp.detach()[response].sum()) / weight}

    batches = whole_batches([1] * len(trees), batch, passes, f"fine_tune {seed}")
    fit({"model": lm.model}, batches, make_packs, loss, work, lr, save_minutes=15.0)


# ------------------------------------------------------------ the stage


@dataclass(frozen=True)
class Settings:
    out: str = flag("folder of the run")
    train: str = flag("NAME:PATH of training problems, comma separated; empty: embedded", "")
    test: str = flag("NAME:PATH of test problems, comma separated", "")
    instruction: str | None = flag(
        "put after each question, empty: nothing; default: by the set's kind of answer", None
    )
    limit: int = flag("use at most this many training problems; 0: all", 0)
    valid_share: float = flag(
        "share of --train held out as valid.jsonl, by hash", 0.1, least=0, most=1
    )
    split_seed: int = flag("of that hash", 0)
    make_base: bool = flag("make base/: embedded, or --base fine-tuned on --demos", True)
    base: str = flag("model to fine-tune on --demos", "")
    demos: str = flag("NAME:PATH of demonstrations (gsm8k, asdiv or jsonl)", "")
    lr: float = flag("peak learning rate on --demos", 2e-5, most=1)
    passes: int = flag("passes over --demos", 2)
    offload: bool = flag("hold weights, gradients and moments in the host's memory", False)
    task: str = flag("which embedded problems: math, parity or code", "math")
    steps: str = flag("fewest and most steps of the embedded problems", "2-4")
    careless: float = flag(
        "how often the base misreads: 2 as often as in two readings, 0 never", 1.0, least=0
    )
    wordings: int = flag("ways to word each line of an embedded solution, up to 64", 1)
    clean_size: int = flag("right solutions that the embedded base learns from first", 16000)
    clean_seed: int = flag("of that first training, for benchmarks; -1: --seed", -1, least=0)
    clean: str = flag("folder that keeps models so trained, for benchmarks of many runs", "")
    train_size: int = flag("embedded training problems", 2000)
    valid_size: int = flag("embedded validation problems", 300)
    test_size: int = flag("embedded test problems", 500)
    dtype: str = flag("compute in bfloat16 or float32; default: bfloat16 on CUDA", "")
    seed: int = flag("of the embedded problems and of base training", 0)
    unsafe: bool = flag(
        "run solutions even where they cannot be walled off", False, may_change=True
    )
    force: bool = flag("throw existing outputs away", False)


def stage(s: Settings):
    if bool(s.train) != bool(s.test) or bool(s.base) != bool(s.demos):
        raise UserError("--train and --test go together, and so do --base and --demos")
    join(s.offload)
    if s.task not in TASKS:
        raise UserError(f"--task {s.task}: wanted {' or '.join(TASKS)}")
    ways = 1 if s.task == "code" else len(BEGINNINGS) * len(ENDINGS)
    if s.wordings > ways:
        raise UserError(f"--wordings {s.wordings}: --task {s.task} has up to {ways}")
    steps = steps_of(s)
    folder, task, demos = Path(s.out), TASKS[s.task], load(s.demos, s, DEMOS)
    sizes = {"train": s.train_size, "valid": s.valid_size, "test": s.test_size}
    inputs = {path: path for spec in (s.train, s.test, s.demos) for _, path in parse(spec)}
    outputs = {}
    for split in sizes:
        outputs[split] = Output("prepare.py", folder / f"{split}.jsonl", s, inputs)
    if not all(output.complete for output in outputs.values()):
        problems = real_problems(s) if s.train else embedded_problems(task, s.seed, sizes, steps)
    for split, output in outputs.items():
        if not output.complete:
            with output.open({"date": output.date}) as out:  # the run's: see Output.date
                out.append(problems[split][len(out.done) :])
    if s.make_base and (s.demos or not s.train):
        inputs |= {"base": s.base} if s.base else {}
        output = Output("prepare.py", folder / "base", s, inputs)
        if not output.complete:
            with output.open() as out:
                if s.demos:
                    tune_base(out, demos, folder, s)
                else:
                    make_base(out, task, s)


def steps_of(s: Settings) -> tuple[int, int]:
    """ "2-4" -> (2, 4)"""
    if not (found := re.fullmatch(r"(\d+)-(\d+)", s.steps)):
        raise UserError(f"--steps {s.steps}: two numbers are wanted, such as 2-4")
    fewest, most = int(found[1]), int(found[2])
    if not 1 <= fewest <= most <= MOST_STEPS:
        raise UserError(f"--steps {s.steps}: wanted 1 to {MOST_STEPS}, the fewest first")
    return fewest, most


def parse(spec: str) -> list[tuple[str, str]]:
    """ "gsm8k:a.jsonl,asdiv:b.jsonl" -> [("gsm8k", "a.jsonl"), ("asdiv", "b.jsonl")]"""
    pairs = [part.partition(":")[::2] for part in spec.split(",") if part]
    if bad := [name for name, path in pairs if not path]:
        raise UserError(f"{bad[0]}: NAME:PATH is wanted, such as gsm8k:train.jsonl")
    return pairs


def load(spec: str, s: Settings, loaders: dict[str, Loader] = LOADERS) -> list[dict]:
    """The records of some sets, with their instruction; says what was read and what left out."""
    records = []
    for name, path in parse(spec):
        used, left_out = load_set(name, path, s.unsafe, loaders)
        print(f"{name} {path}: {len(used) + len(left_out)} rows, {len(used)} used")
        ids = {}  # of the rows left out, by reason
        for row_id, reason in left_out:
            ids.setdefault(reason, []).append(row_id)
        for reason in sorted(ids):
            shown = ", ".join(ids[reason][:5]) + (", ..." if len(ids[reason]) > 5 else "")
            print(f"  left out, {reason}: {len(ids[reason])} ({shown})")
        for r in used:
            instruction = s.instruction
            if instruction is None:
                instruction = INSTRUCTIONS.get(loaders[name].kind)
            if instruction:
                r["prompt"] = f"{r['prompt']}\n{instruction}".strip()
        records += used
    return records


def real_problems(s: Settings) -> dict[str, list[dict]]:
    """Train, validation and test problems of data sets; no test question stays in training."""
    test, pool = load(s.test, s), load(s.train, s)
    for problems, spec in ((test, s.test), (pool, s.train)):
        if twice := [i for i, n in Counter(p["id"] for p in problems).items() if n > 1]:
            raise UserError(f"{spec}: two files give the id {twice[0]}; rename one of them")
    train, valid = [], []
    kept = without(pool, test, s)
    dropped = len(pool) - len(kept)
    print(f"dropped from training, because the question is a test question: {dropped}")
    for p in kept:
        key = f"{s.split_seed} {question(p, s)}"
        share = int(digest(key)[:8], 16) / 2**32
        (valid if share < s.valid_share else train).append(p)
    train = without(train, valid, s)[: s.limit or None]
    if not train:
        raise UserError(f"{s.train}: no training problem is left; see the counts above")
    print(f"first prompt:\n{train[0]['prompt']}")
    return {"train": train, "valid": valid, "test": test}


def question(record: dict, s: Settings) -> str:
    """What a prompt asks, whatever the instruction after it."""
    prompt = record["prompt"]
    for instruction in (s.instruction or "", *INSTRUCTIONS.values()):
        prompt = prompt.removesuffix(instruction)
    return normalised_question(prompt)


def without(records: list[dict], others: list[dict], s: Settings) -> list[dict]:
    """The records whose question is none of the others'."""
    known = {question(r, s) for r in others}
    return [r for r in records if question(r, s) not in known]


def tune_base(out: Output, demos: list[dict], folder: Path, s: Settings):
    """Fine-tune --base on demonstrations of questions that are neither in valid nor in test."""
    held_out = [folder / "valid.jsonl", folder / "test.jsonl"]
    others = [p for path in held_out for p in read_jsonl(path, may_be_empty=True)]
    chosen = without(demos, others, s)
    if not chosen:
        raise UserError(f"{s.demos}: no demonstration is left beside held-out questions; add some")
    print(f"{len(chosen)} demonstrations; {len(demos) - len(chosen)} are of held-out questions")
    processes = require_memory(s.base, BUDGET, s.offload)
    lm = load_lm(s.base, train=True, dtype=s.dtype)
    shard(lm, None, s.offload, processes)
    trees = [demonstration_tree(lm, d) for d in chosen]
    out.write_manifest()
    fine_tune(lm, trees, out.work, s.lr, batch=32, passes=s.passes, seed=s.seed, prompt_weight=0.0)
    out.save(lm.save)


def make_base(out: Output, task: Task, s: Settings):
    """The embedded base: clean solutions first, then a short while misread ones."""
    out.write_manifest()
    lm = clean_model(out.work, task, s)
    misread = demonstrations(task, s.seed, 3000, s.careless, steps_of(s), s.wordings)
    trees = [demonstration_tree(lm, d) for d in misread]
    fine_tune(lm, trees, out.work / "misread", 6e-4, 16, passes=1, seed=s.seed, prompt_weight=0.2)
    out.save(lm.save)


def clean_model(work: Path, task: Task, s: Settings) -> LM:
    """A model that solves the embedded problems; --clean keeps it, since it takes the most time."""
    seed = s.seed if s.clean_seed == -1 else s.clean_seed
    kept = Path(s.clean) / f"{s.task}-{s.steps}-{s.wordings}-{s.clean_size}-{seed}"
    if s.clean and kept.exists():
        return load_lm(kept, train=True)
    clean = demonstrations(task, seed, s.clean_size, 0.0, steps_of(s), s.wordings)
    # Of the misread ones only the words are needed, for the tokenizer.
    misread = demonstrations(task, seed, 3000, 1.0, steps_of(s), s.wordings)
    tokenizer = build_tokenizer([d[k] for d in clean + misread for k in ("prompt", "response")])
    model, start = new_model(tokenizer, seed), work / "random"
    replace(start, lambda p: (model.save_pretrained(p), tokenizer.save_pretrained(p)))
    lm = load_lm(start, train=True)
    trees = [demonstration_tree(lm, d) for d in clean]
    fine_tune(lm, trees, work / "clean", 3e-3, 16, passes=1, seed=seed, prompt_weight=0.2)
    if s.clean:
        replace(kept, lm.save)
    return lm


if __name__ == "__main__":
    main(stage, Settings, __doc__)
