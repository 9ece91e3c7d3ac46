r"""Algorithm 1 from one command: problems and base model, then per iteration A.1 to B.2 and an evaluation.

    python run.py                            # embedded problems and model, minutes on a CPU
    python run.py --task parity --run runs/parity
    python run.py --recipe frugal --run runs/frugal
    python run.py --run runs/math --base MODEL --train math:train.jsonl --test math500:test.jsonl
    python run.py --dry_run                  # the whole sequence as a shell script; nothing runs

The same command goes on where it stopped. Each stage is printed as one can type it, and reads and
writes plain files, so that any of them may be run by hand. Flags of a stage go into one string, and
change just what they name:

    python run.py --run runs/beta --actor "--beta 0.2" --label "--m 8" --critic=--offload

On a CPU without --launch all stages run in this process; elsewhere each is a process of its own.
"""

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from support import cli
from support.cli import UserError, flag
from support.engine import Engine
from support.records import read_jsonl
from support.stage import read_manifest

# What each recipe passes to the stages. What is not named here is the stage's default, the paper's value.
# fmt: off
DEMO = {
    "about": "the paper's Algorithm 1; only the numbers are those of a tiny model",
    "iterations": 2,  # as in the paper's tables 4 and 10
    "problems": 500,  # new ones per iteration; the 2,000 embedded ones last for four
    "replay": 1,  # the critic trains on the trees of this iteration alone
    "draw": {"max_new": 64, "batch": 512},  # no right solution is longer
    "sample": {"n1": 8, "n": 4},  # the paper: 32 and 6; where 40 % are right 8 hold both kinds
    "label": {"m": 4},  # the paper: 16; a critic averages over states that look alike
    "critic": {"lr": 1e-3, "passes": 8, "batch": 128},  # a rate for 0.5M parameters
    "actor": {
        "beta": 0.1,  # asks for log-ratios A / 0.1, from about -7 to +7; 0.05 and 0.2 do worse
        "lr": 1.5e-4, "passes": 4, "batch": 256,  # about 30 optimiser steps
    },
    "evaluate": {"samples": 8},
}
RECIPES = {
    "demo": DEMO,
    "frugal": DEMO | {
        "about": "leaves the paper to save tokens: no completions (the samples are the tree), Q of counts "
                 "and critic, V(s) in the mean of eq. 13, right steps' likelihood beside eq. 12",
        "iterations": 4, "problems": 25,  # small rounds: each draws from a better actor
        "replay": 4,  # so few problems teach a critic little
        "sample": {"n1": 4, "n": 4},
        "label": {"whole_draws": True, "m": 0},
        "critic": {"states": "all", "token_share": 0.5, "lr": 1e-3, "passes": 2, "batch": 128},
        "actor": {"kappa": 4, "value_draws": 1, "by_draws": True, "likelihood": 4, "gap": 0.05, "may_stay": True,
                  "beta": 0.05, "lr": 2e-4, "passes": 4, "batch": 64},
    },
    "outcome": DEMO | {
        "about": "a baseline without steps: eq. 12 on whole responses, outcome minus mean outcome",
        "sample": {"step": "response", "n1": 16, "n": 16},  # about as many tokens as the demo
        "label": {"whole_draws": True, "m": 0},
        "critic": None,  # the outcome is known
        "actor": {"kappa": 0, "beta": 0.05, "lr": 2e-4, "passes": 4, "batch": 256},
    },
    "rejection": DEMO | {
        "about": "a baseline that imitates: the likelihood of right responses, without eq. 12",
        "sample": {"step": "response", "n1": 16, "n": 16},
        "label": {"whole_draws": True, "m": 0},
        "critic": None,
        "actor": {"kappa": 0, "gap": 2, "likelihood": 1, "lr": 4e-4, "passes": 2, "batch": 64},
    },
    "paper": {
        "about": "the paper's Algorithm 1 with the paper's numbers, for a model of 7B or 8B",
        "iterations": 1, "problems": 0, "replay": 1,  # problems 0: all, in every iteration
    },
}
# fmt: on
# The stages, and what their flags are called here; those that draw from the actor have --draw's too.
FLAGS_OF = {
    "prepare": "prepare",
    "sample": "sample",
    "label_steps": "label",
    "train_critic": "critic",
}
FLAGS_OF |= {"train_actor": "actor", "evaluate": "evaluate"}
DRAWING = ("sample", "label_steps", "evaluate")


@dataclass(frozen=True)
class Settings:
    run: str = flag("folder of the run; default: runs/ and the recipe's name", "")
    recipe: str = flag(f"{', '.join(RECIPES)}; default: demo, and paper where --train is given", "")
    iterations: int = flag("how many; 0: the recipe's number", 0)
    problems: int = flag("new problems per iteration; 0: the recipe's number", 0)
    task: str = flag("embedded problems: math, parity or code", "math")
    seed: int = flag("of problems, base model, draws and training", 0)
    base: str = flag("a model folder or hub id to start from, instead of making one", "")
    train: str = flag("NAME:PATH of your training problems (see prepare.py)", "")
    test: str = flag("NAME:PATH of your test problems", "")
    critic_model: str = flag("what the first critic starts from; default: the base", "")
    launch: str = flag('what starts training, such as "torchrun --nproc-per-node 8"', "")
    engine: str = flag('what starts a server of each actor, such as "vllm serve"', "")
    port: int = flag("of the server that --engine starts", 8000)
    server: str = flag("URL of a server that is there; it must serve each actor in turn", "")
    draw: str = flag("flags of the three stages that draw, in one string", "")
    prepare: str = flag("flags of prepare.py", "")
    sample: str = flag("flags of sample.py", "")
    label: str = flag("flags of label_steps.py", "")
    critic: str = flag("flags of train_critic.py", "")
    actor: str = flag("flags of train_actor.py", "")
    evaluate: str = flag("flags of evaluate.py", "")
    force: str = flag("start over from a stage: label_steps, or iter2/train_actor", "")
    dry_run: bool = flag("print the sequence as a shell script and run nothing", False)


def split(flags: str) -> list[str]:
    """The words of a string of flags, as a shell would cut them."""
    try:
        return shlex.split(flags)
    except ValueError as e:
        raise UserError(f"{flags}: {str(e).lower()}; quote it as for a shell") from e


class Step(NamedTuple):
    """One command of the sequence: `python SCRIPT.py WORDS`."""

    place: str  # "iter1/sample": what --force calls it
    title: str
    words: list[str]

    @property
    def script(self) -> str:
        return self.place.rpartition("/")[2]

    def value(self, name: str) -> str:
        """Of a flag, "" if it is not there."""
        return self.words[self.words.index(name) + 1] if name in self.words else ""

    @property
    def served(self) -> str:
        """The actor that a server would serve for this stage."""
        return self.value("--actor") if self.script in DRAWING else ""

    def command(self, s: Settings) -> list[str]:
        """As one can type it. What trains is started by --launch, and evaluation without a server."""
        trains = "--demos" in self.words or self.script.startswith("train")
        evaluates = self.script == "evaluate" and self.served and not self.value("--server")
        launch = split(s.launch) if s.launch and (trains or evaluates) else ["python"]
        return [*launch, f"{self.script}.py", *self.words]


# ------------------------------------------------------------ Algorithm 1


def algorithm_1(s: Settings, run: Path, recipe: dict) -> Iterator[Step]:
    """The stages in order, with all of their flags."""

    def step(place: str, title: str, **flags) -> Step:
        return Step(place, title, words_of(place.rpartition("/")[2], flags, s, recipe))

    yield step(
        "prepare", "Problems and base model", out=run, seed=s.seed, task="" if s.train else s.task,
        train=s.train, test=s.test, no_make_base=bool(s.base),
    )  # fmt: skip
    problems, test = run / "train.jsonl", run / "test.jsonl"
    actor = s.base or run / "base"
    critic, every_tree = s.critic_model or actor, []
    with_critic = recipe.get("critic", {}) is not None
    base_eval = run / "iter0" / "eval.jsonl"
    yield step("iter0/evaluate", "The base model", actor=actor, problems=test, out=base_eval)
    for i in range(1, s.iterations + 1):
        name, it, seed = f"Iteration {i}", run / f"iter{i}", 1000 * s.seed + i
        samples, trees = it / "samples.jsonl", it / "trees.jsonl"
        yield step(
            f"iter{i}/sample", f"{name}, A.1: sample responses", actor=actor, problems=problems,
            out=samples, first=(i - 1) * s.problems or "", limit=s.problems or "", seed=seed,
        )  # fmt: skip
        yield step(
            f"iter{i}/label_steps", f"{name}, A.2: completions from every state", actor=actor,
            problems=problems, samples=samples, out=trees, seed=seed,
        )  # fmt: skip
        every_tree.append(str(trees))
        if with_critic:
            yield step(
                f"iter{i}/train_critic", f"{name}, A.3: train the critic", critic_model=critic,
                trees=",".join(every_tree[-recipe["replay"] :]), out=it / "critic", seed=s.seed,
            )  # fmt: skip
            critic = it / "critic"
        yield step(
            f"iter{i}/train_actor", f"{name}, B: advantages, then the actor", actor=actor,
            trees=trees, critic=critic if with_critic else "",
            out=it / "actor", seed=s.seed,
        )  # fmt: skip
        actor = it / "actor"  # the next policy to improve, pi_ref, and the generator
        yield step(
            f"iter{i}/evaluate", f"{name}: evaluate", actor=actor, problems=test,
            out=it / "eval.jsonl", against=base_eval,
        )  # fmt: skip
    yield Step("report/evaluate", "The run in one page", ["--report", str(run)])


def words_of(script: str, flags: dict, s: Settings, recipe: dict) -> list[str]:
    """The words of a stage's command: its files, what the recipe says, then the user's own, which take
    the place of the recipe's."""
    name = FLAGS_OF[script]
    own, flags = split(getattr(s, name)), flags | (recipe.get(name) or {})
    if script in DRAWING:
        own = split(s.draw) + own
        server = s.server or (f"http://127.0.0.1:{s.port}" if s.engine else "")
        flags |= recipe.get("draw", {}) | {"server": server}
    named, words = {word.partition("=")[0] for word in own}, []
    for flag_name, value in flags.items():
        if value is not False and value != "" and f"--{flag_name}" not in named:
            words += [f"--{flag_name}"] if value is True else [f"--{flag_name}", str(value)]
    return words + own


# ------------------------------------------------------------ before anything runs


def completed(s: Settings) -> tuple[Settings, Path, dict]:
    """The settings with the recipe's numbers in place of 0, the run's folder, and the recipe."""
    name = s.recipe or ("paper" if s.train else "demo")
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: wanted {' or '.join(RECIPES)}")
    if bool(s.train) != bool(s.test):
        raise UserError("--train and --test go together")
    if s.train and not s.base and "--demos" not in s.prepare:
        mend = 'give --base MODEL, or --prepare "--base MODEL --demos NAME:PATH"'
        raise UserError(f"--train {s.train}: no model for these problems; {mend}")
    if s.engine and s.server:
        raise UserError("--engine starts a server, --server is one that is there; give one of them")
    recipe = RECIPES[name]
    numbers = {n: getattr(s, n) or recipe[n] for n in ("iterations", "problems")}
    return replace(s, **numbers), Path(s.run or f"runs/{name}"), recipe


def parsed(step: Step):
    """(module, its Settings) of a step; UserError where a flag is misspelt or a number is wrong."""
    module = importlib.import_module(step.script)
    return module, cli.parse(module.Settings, module.__doc__, step.words, f"{step.script}.py")


def require_problems(there: int, s: Settings, where):
    if s.problems * s.iterations > there:
        wanted = f"{s.iterations} iterations of {s.problems} problems"
        mend = "lower --problems or --iterations"
        mend += "" if s.train else f', or --prepare "--train_size {s.problems * s.iterations}"'
        raise UserError(f"{where}: {there} training problems, {wanted} are asked for; {mend}")


def forced(steps: list[Step], place: str) -> list[Step]:
    """The steps with --force from the one that --force names."""
    places = [step.place for step in steps]
    named = [place, f"iter1/{place}"]
    begin = next((places.index(p) for p in named if p in places), None)
    if begin is None:
        raise UserError(f"--force {place}: no such stage; there are {', '.join(places)}")
    again = [step._replace(words=[*step.words, "--force"]) for step in steps[begin:-1]]
    return [*steps[:begin], *again, steps[-1]]  # the report is drawn each time


# ------------------------------------------------------------ the run


def stage(s: Settings):
    s, run, recipe = completed(s)
    steps = list(algorithm_1(s, run, recipe))
    if s.force:
        steps = forced(steps, s.force)
    checked = [settings for _, settings in map(parsed, steps)]
    if not s.train:
        require_problems(checked[0].train_size, s, "--train_size")
    if s.dry_run:
        return print("\n".join(shell_lines(steps, s)))
    print(f"{run}: {recipe['about']}")
    # A server on this machine is asked directly, whatever proxy the box has for other machines.
    os.environ["no_proxy"] = f"{os.environ.get('no_proxy', '')},127.0.0.1,localhost"
    with Engine(s.engine, s.port, run / "engine.log") as engine:
        for step in steps:
            print(f"\n== {step.title}\n$ {shlex.join(step.command(s))}", flush=True)
            if s.engine and step.served and not is_complete(step):
                engine.serve(step.served)
            elif not step.served:
                engine.stop()  # training needs the memory
            do(step, s)
            if step.place == "prepare":
                require_problems(len(read_jsonl(run / "train.jsonl")), s, run / "train.jsonl")


def shell_lines(steps: list[Step], s: Settings) -> Iterator[str]:
    """The sequence as a shell script."""
    served = ""
    for step in steps:
        yield f"# {step.title}"
        if s.engine and step.served not in ("", served):
            yield f"{s.engine} {shlex.quote(step.served)} --port {s.port} &  # until it answers"
        if served and step.served != served:
            yield "kill %%; wait"
        served = step.served if s.engine else ""
        yield shlex.join(step.command(s))


def is_complete(step: Step) -> bool:
    """Is there nothing to do for a server?"""
    return "output" in read_manifest(Path(step.value("--out"))) and "--force" not in step.words


def do(step: Step, s: Settings):
    """Run a stage: on a CPU in this process, which saves the import of torch; elsewhere in its own,
    since only a process that ends gives a GPU's memory back."""
    if not s.launch and not torch.cuda.is_available():
        module, settings = parsed(step)
        return module.stage(settings)
    script = str(Path(__file__).with_name(f"{step.script}.py"))  # wherever run.py was started
    words = [sys.executable if word == "python" else word for word in step.command(s)]
    process = subprocess.Popen([script if word == f"{step.script}.py" else word for word in words])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # it got the Ctrl-C too, and says how to go on
    if code < 0:
        hint = " (9: perhaps for want of memory)"
        print(
            f"error: signal {-code} ended {step.script}.py{hint}; the same command goes on",
            file=sys.stderr,
        )
    if code:
        sys.exit(code if code > 0 else 128 - code)  # as a shell counts signals


if __name__ == "__main__":
    cli.main(stage, Settings, __doc__)
