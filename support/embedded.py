"""The embedded problems, their demonstrations, and a tiny model: what the demo needs so that nothing
is downloaded. It knows nothing of the algorithm.

Three tasks: `math`, chains of relations ("Ben has twice as many as Ann. How many ...?"); `parity`,
the same chains with a question that wrong reasoning answers right half of the time ("Has Ben an odd
or an even number of coins?"); `code`, small functions to write. Each is four functions (`Task`). A
skeleton is what a problem says, without words: a first value and steps [(kind, k)].
"""

import json
import math
import random
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from support.cli import UserError
from support.records import digest

# kind of step: phrase, right reading, misreading, share of demonstrations that misread it
RELATIONS = {
    "more": ("{k} more than {x}", "{x} + {k}", "{x} - {k}", 0.03),
    "fewer": ("{k} fewer than {x}", "{x} - {k}", "{x} + {k}", 0.15),
    "twice": ("twice as many as {x}", "{x} * 2", "{x} + 2", 0.72),
    "thrice": ("3 times as many as {x}", "{x} * 3", "{x} + 3", 0.38),
    "half": ("half as many as {x}", "{x} / 2", "{x} - 2", 0.60),
}


OPERATIONS = {
    "more": ("{k} more than {x}", "{x} + {k}", "{x} - {k}", 0.03),
    "less": ("{k} less than {x}", "{x} - {k}", "{k} - {x}", 0.15),
    "twice": ("twice {x}", "{x} * 2", "{x} + 2", 0.72),
    "double": ("the double of {x}", "{x} * 2", "{x} + 2", 0.72),
    "thrice": ("3 times {x}", "{x} * 3", "{x} + 3", 0.38),
    "least": ("{x}, but at least {k}", "max({x}, {k})", "min({x}, {k})", 0.25),
    "half": ("half of {x}, rounded down", "{x} // 2", "{x} - 2", 0.30),
    "over": ("{k} if {x} is over 9, else {x}", "{k} if {x} > 9 else {x}", "{k} if {x} < 9 else {x}", 0.10),
}  # fmt: skip


NAMES = "Ann Ben Cai Dia Eli Fay Gus Hal Ida Jon Kim Leo Mia".split()  # noqa: SIM905


VARIABLES = "xabcdeghijkmn"


MOST_STEPS = len(NAMES) - 1


# harmless words before and after a line of a chain's solution: 64 ways to say the same
BEGINNINGS = ["", "So ", "Then ", "Now ", "Next ", "Thus ", "Here ", "Hence "]


ENDINGS = ["", " coins", " now", " exactly", " then", " here", " clearly", " indeed"]


INPUTS = [-8, -1, 2, 5, 11, 32]


class Task(NamedTuple):
    draw: Callable  # (rng, fewest, most steps) -> what a problem says, its skeleton
    tell: Callable  # skeleton -> prompt
    solve: Callable  # (rng, skeleton, misread, slip) -> response, a line a step
    check: Callable  # skeleton -> {"answer"} or {"tests"}, and whether luck would solve it


def read(rng: random.Random, phrase: tuple, misread: float) -> str:
    """A phrase's right reading, or its misreading as often as a careless reader's.

    misread 1: in the phrase's share of the readings, 2: as if read twice and wrong at least once,
    0: never
    """
    _, right, wrong, share = phrase
    return wrong if misread and rng.random() < 1 - (1 - share) ** misread else right


def outcomes(phrases: dict, steps: list, values: tuple[int, ...]) -> tuple[tuple, set[tuple]]:
    """What steps [(kind, k)] make of some values: read right throughout; misread at least once."""
    right, wrong = values, set()
    for kind, k in steps:
        _, good, bad, _ = phrases[kind]
        good, bad = good.format(x="x", k=k), bad.format(x="x", k=k)
        wrong = {after(v, text) for v in wrong for text in (good, bad)} | {after(right, bad)}
        right = after(right, good)
    return right, wrong


def after(values: tuple[int, ...], text: str) -> tuple[int, ...]:
    """Each x after an expression of x: (5, 8) and "x / 2" -> (2, 4)"""
    return tuple(math.floor(expression(text)(x)) for x in values)


@cache
def expression(text: str) -> Callable[[int], float]:
    return eval(f"lambda x: {text}")  # ours, of RELATIONS or OPERATIONS


def draw_chain(rng: random.Random, fewest: int, most: int) -> tuple[int, list]:
    """A first value and some relations; all values are whole, from 1 to 20."""
    x = first = rng.randint(1, 20)
    steps = []
    for _ in range(rng.randint(fewest, most)):
        new = 0
        while new not in range(1, 21):
            kind, k = rng.choice(list(RELATIONS)), rng.randint(1, 9)
            text = RELATIONS[kind][1].format(x="x", k=k)
            new = expression(text)(x)
        steps.append((kind, int(text.split()[-1])))  # of "twice", which names no k, 2
        x = int(new)
    return first, steps


def tell_chain(skeleton: tuple[int, list]) -> str:
    first, steps = skeleton
    lines = [f"{NAMES[0]} has {first} coins."]
    for (kind, k), x, y in zip(steps, NAMES, NAMES[1:]):
        lines.append(f"{y} has {RELATIONS[kind][0].format(x=x, k=k)}.")
    return "\n".join([*lines, f"How many coins does {NAMES[len(steps)]} have?"])


def solve_chain(rng: random.Random, skeleton: tuple[int, list], misread=0.0, slip=0.0) -> str:
    """A solution, a line a relation: "Ben: 6 * 2 = 12"."""
    x, steps = skeleton
    lines = []
    for (kind, k), name in zip(steps, NAMES[1:]):
        text = read(rng, RELATIONS[kind], misread)
        (new,) = after((x,), text.format(x="x", k=k))
        if rng.random() < slip:
            new += rng.choice([-1, 1])
        lines.append(f"{name}: {text.format(x=x, k=k)} = {new}")
        x = new
    return "\n".join([*lines, f"The answer is {x}."])


def check_chain(skeleton: tuple[int, list]) -> tuple[dict, bool]:
    """Its answer, and whether some of its misreadings would end in the same."""
    first, steps = skeleton
    right, wrong = outcomes(RELATIONS, steps, (first,))
    return {"answer": str(right[0])}, right in wrong


def tell_parity(skeleton: tuple[int, list]) -> str:
    """The same chain, with a question whose answer a wrong reasoning finds half of the time."""
    *lines, _ = tell_chain(skeleton).split("\n")
    return "\n".join([*lines, f"Has {NAMES[len(skeleton[1])]} an odd or an even number of coins?"])


def solve_parity(rng: random.Random, skeleton: tuple[int, list], misread=0.0, slip=0.0) -> str:
    """The same solution, line by line; it ends in "The answer is even."."""
    *lines, answer = solve_chain(rng, skeleton, misread, slip).split("\n")
    x = int(answer.removeprefix("The answer is ").rstrip("."))
    return "\n".join([*lines, f"The answer is {parity(x)}."])


def check_parity(skeleton: tuple[int, list]) -> tuple[dict, bool]:
    """Its answer, and the number behind it, by which evaluation tells right reasoning from luck. No
    problem is left out for luck: that wrong reasoning is rewarded is the point of this task."""
    first, steps = skeleton
    (number,), _ = outcomes(RELATIONS, steps, (first,))
    return {"answer": parity(number), "number": str(number)}, False


def parity(x: int) -> str:
    return "odd" if x % 2 else "even"


def draw_function(rng: random.Random, fewest: int, most: int) -> list:
    """Some operations; a k that the phrase does not name is 0."""
    steps = []
    for _ in range(rng.randint(fewest, most)):
        kind, k = rng.choice(list(OPERATIONS)), rng.randint(1, 9)
        steps.append((kind, k if "{k}" in OPERATIONS[kind][0] else 0))
    return steps


def tell_function(steps: list) -> str:
    lines = ["Write f(x)."]
    for (kind, k), x, y in zip(steps, VARIABLES, VARIABLES[1:]):
        lines.append(f"Let {y} be {OPERATIONS[kind][0].format(x=x, k=k)}.")
    return "\n".join([*lines, f"Return {VARIABLES[len(steps)]}."])


def solve_function(rng: random.Random, steps: list, misread=0.0, slip=0.0) -> str:
    """The function, a line an operation: "    a = x * 2"."""
    lines = ["def f(x):"]
    for (kind, k), x, y in zip(steps, VARIABLES, VARIABLES[1:]):
        if rng.random() < slip:
            k += rng.choice([-1, 1])
        lines.append(f"{y} = {read(rng, OPERATIONS[kind], misread).format(x=x, k=k)}")
    return "\n    ".join([*lines, f"return {VARIABLES[len(steps)]}"])


def check_function(steps: list) -> tuple[dict, bool]:
    """Its tests, and whether some of its misreadings would pass them."""
    right, wrong = outcomes(OPERATIONS, steps, tuple(INPUTS))
    tests = {"kind": "call", "entry": "f", "inputs": [[x] for x in INPUTS], "outputs": list(right)}
    return {"domain": "code", "tests": tests}, right in wrong


TASKS = {
    "math": Task(draw_chain, tell_chain, solve_chain, check_chain),
    "parity": Task(draw_chain, tell_parity, solve_parity, check_parity),
    "code": Task(draw_function, tell_function, solve_function, check_function),
}


def split_of(skeleton) -> str:
    bucket = int(digest(json.dumps(skeleton))[:2], 16) % 10
    return "test" if bucket < 2 else "valid" if bucket < 4 else "train"


def embedded_problems(
    task: Task, seed: int, sizes: dict[str, int], steps: tuple[int, int] = (2, 4)
) -> dict[str, list[dict]]:
    """Problems of each split; the hash of a skeleton says which split.

    A problem that some misreading would solve by luck is left out, but the longer problems are, the
    fewer are without one: where hardly any is, they stay, and their number is printed.
    """
    rng = random.Random("luck")
    fair = sum(not task.check(task.draw(rng, *steps))[1] for _ in range(1000))
    rng, problems, seen = random.Random(f"problems {seed}"), {s: [] for s in sizes}, set()
    total = in_vain = 0
    while any(len(problems[s]) < n for s, n in sizes.items()):
        if in_vain == 100_000:
            few = {split: len(found) for split, found in problems.items()}
            raise UserError(f"--steps: there are only {few} problems; more steps, or smaller sizes")
        skeleton = task.draw(rng, *steps)
        key, split = json.dumps(skeleton), split_of(skeleton)
        in_vain += 1
        if key in seen or len(problems[split]) >= sizes[split]:
            continue
        in_vain = 0
        seen.add(key)
        goal, lucky = task.check(skeleton)
        if lucky and fair >= 20:
            continue
        total += lucky
        problem = {"id": f"demo/{split}/{len(problems[split])}", "source": "demo"}
        problem |= {"domain": "math", "prompt": task.tell(skeleton)}
        problems[split].append(problem | {"answer": None, "tests": None} | goal)
    if total:
        print(f"{total} of {sum(sizes.values())} problems can be solved by luck, misread somewhere")
    return problems


def demonstrations(
    task: Task, seed: int, count: int, misread: float, steps: tuple[int, int] = (2, 4), wordings=1
) -> list[dict]:
    """{"prompt", "response"} of training skeletons; clean ones include drills of one step."""
    rng, demos = random.Random(f"demonstrations {seed} {misread > 0}"), []
    fewest, most = steps
    while len(demos) < count:
        skeleton = task.draw(rng, fewest if misread else 1, most)
        if split_of(skeleton) == "train":
            response = task.solve(rng, skeleton, misread, 0.02 if misread else 0.0)
            if wordings > 1:
                response = reword(rng, response, wordings)
            demos.append({"prompt": task.tell(skeleton), "response": response})
    return demos


def reword(rng: random.Random, response: str, wordings: int) -> str:
    """Each line but the answer's in one of some ways: "Then Ben: 6 * 2 = 12 coins"."""
    *lines, answer = response.split("\n")
    said = []
    for line in lines:
        ending, beginning = divmod(rng.randrange(wordings), len(BEGINNINGS))
        said.append(BEGINNINGS[beginning] + line + ENDINGS[ending])
    return "\n".join([*said, answer])


def build_tokenizer(texts: list[str]):
    """Word level: a word, number or sign and the space before it are a token, and so is an
    indentation; exact round trip."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    pieces = r"<\|\w+\|>|\n| {4}| ?[A-Za-z]+| ?-?\d+| ?[^\sA-Za-z\d]"
    words = {w for text in texts for w in re.findall(pieces, text)}
    words |= {f" {i}" for i in range(-20, 100)}
    ids = {w: i for i, w in enumerate([*special, "\n", *sorted(words - {"\n"})])}
    model = tk.Tokenizer(tk.models.WordLevel(ids, unk_token="<|unknown|>"))
    model.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(pieces), "isolated")
    model.decoder = tk.decoders.Fuse()
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|unknown|>"}
    options = {"additional_special_tokens": special[1:3], "clean_up_tokenization_spaces": False}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **names, **options)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def new_model(tokenizer, seed: int, layers: int = 3, width: int = 128):
    """A Llama of 0.5M parameters with random weights."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **end)
    return model
