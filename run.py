r"""Algorithm 1 from one command: problems and base model, then per iteration A.1 to B.2 and an evaluation.

    python run.py                            # embedded problems and model, minutes on a CPU
    python run.py --task parity --run runs/parity
    python run.py --recipe frugal --run runs/frugal
    python run.py --run runs/math --base MODEL --train math:train.jsonl --test math500:test.jsonl
    python run.py --dry_run                  # the whole sequence as commands; nothing runs

The same command goes on where it stopped. Each stage is printed as one can type it, and reads and
writes plain files, so that any of them may be run by hand. Flags of a stage go into one string, and
change just what they name:

    python run.py --run runs/beta --actor "--beta 0.2" --label "--m 8" --critic=--offload

(One word that begins with -- needs the =, or it is taken for a flag of run.py.)
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
from support.stage import checked_input, read_manifest

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
        "beta": 0.1,  # the paper: 0.01. This asks for log-ratios A / 0.1, from about -7 to +7; with
        # 0.05 only 71 % are right greedily after one iteration of 1,000 problems, with 0.1 99 %
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
        "actor": {"kappa": 0, "beta": 0.1, "lr": 2e-4, "passes": 4, "batch": 256},
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
        "iterations": 1,  # the paper's tables 4 and 10 add a second: --iterations 2
        "problems": 0, "replay": 1,  # problems 0: all, in every iteration
    },
}
# fmt: on
# The stages, and what their flags are called here; those that draw from the actor have --draw's too.
FLAGS_OF = {
    "prepare": "prepare",
    "sample": "sample",
    "label_steps": "label",
    "train_critic": "critic",
    "train_actor": "actor",
    "evaluate": "evaluate",
}
DRAWING = ("sample", "label_steps", "evaluate")


@dataclass(frozen=True)
class Settings:
    run: str = flag("folder of the run; default: runs/ and the recipe's name", "")
    recipe: str = flag(f"{', '.join(RECIPES)}; default: demo, and paper where --train is given", "")
    iterations: int = flag("how many; 0: the recipe's number", 0)
    problems: int = flag("new problems per iteration; 0: the recipe's number (paper: all)", 0)
    task: str = flag("embedded problems: math, parity or code", "math")
    seed: int = flag("of problems, base model, draws and training", 0)
    base: str = flag("a model folder or hub id to start from, instead of making one", "")
    train: str = flag("NAME:PATH of your training problems (see prepare.py)", "")
    test: str = flag("NAME:PATH of your test problems", "")
    critic_model: str = flag("what the first critic starts from; default: the base", "")
    launch: str = flag(
        'what starts training, such as "torchrun --standalone --nproc-per-node 8"', ""
    )
    engine: str = flag('what starts a server of each actor, such as "vllm serve"', "")
    port: int = flag("of the server that --engine starts", 8000)
    server: str = flag("URL of a server that is there; it must serve each actor in turn", "")
    draw: str = flag("flags of sample.py, label_steps.py and evaluate.py, in one string", "")
    prepare: str = flag("flags of prepare.py", "")
    sample: str = flag("flags of sample.py", "")
    label: str = flag("flags of label_steps.py", "")
    critic: str = flag("flags of train_critic.py", "")
    actor: str = flag("flags of train_actor.py", "")
    evaluate: str = flag("flags of evaluate.py", "")
    force: str = flag("start over from a stage: label_steps, or iter2/train_actor", "")
    dry_run: bool = flag("print the sequence as commands and run nothing", False)


def split(flags: str) -> list[str]:
    """The words of a string of flags, as a shell would cut them."""
    try:
        return shlex.split(flags)
    except ValueError as e:
        raise UserError(f"{flags}: {str(e).lower()}; quote it as for a shell") from e


class Command(NamedTuple):
    """One command of the sequence: `python SCRIPT.py ARGS`."""

    name: str  # "iter1/sample": what --force calls it
    title: str
    args: list[str]

    @property
    def script(self) -> str:
        return self.name.rpartition("/")[2]

    def value(self, flag_name: str) -> str:
        """Of a flag, "" if it is not there."""
        return self.args[self.args.index(flag_name) + 1] if flag_name in self.args else ""

    @property
    def served(self) -> str:
        """The actor that a server would serve for this stage."""
        return self.value("--actor") if self.script in DRAWING else ""

    def typed(self, s: Settings) -> list[str]:
        """As one can type it. --launch starts training, and evaluation where no server draws."""
        trains = "--demos" in self.args or self.script.startswith("train")
        evaluates = self.script == "evaluate" and self.served and not self.value("--server")
        launch = split(s.launch) if s.launch and (trains or evaluates) else ["python"]
        return [*launch, f"{self.script}.py", *self.args]


# ------------------------------------------------------------ Algorithm 1


def algorithm_1(s: Settings, run: Path, recipe: dict) -> Iterator[Command]:
    """The stages in order, with all of their flags."""

    def command(name: str, title: str, **flags) -> Command:
        return Command(name, title, args_of(name.rpartition("/")[2], flags, s, recipe))

    yield command(
        "prepare", "Problems and base model", out=run, seed=s.seed, task="" if s.train else s.task,
        train=s.train, test=s.test, no_make_base=bool(s.base),
    )  # fmt: skip
    problems, test = run / "train.jsonl", run / "test.jsonl"
    actor = s.base or run / "base"
    critic, every_tree = s.critic_model or actor, []
    with_critic = recipe.get("critic", {}) is not None
    base_eval = run / "iter0" / "eval.jsonl"
    yield command("iter0/evaluate", "The base model", actor=actor, problems=test, out=base_eval)
    for i in range(1, s.iterations + 1):
        name, it, seed = f"Iteration {i}", run / f"iter{i}", 1000 * s.seed + i
        samples, trees = it / "samples.jsonl", it / "trees.jsonl"
        yield command(
            f"iter{i}/sample", f"{name}, A.1: sample responses", actor=actor, problems=problems,
            out=samples, first=(i - 1) * s.problems or "", limit=s.problems or "", seed=seed,
        )  # fmt: skip
        yield command(
            f"iter{i}/label_steps", f"{name}, A.2: completions from every state", actor=actor,
            problems=problems, samples=samples, out=trees, seed=seed,
        )  # fmt: skip
        every_tree.append(str(trees))
        if with_critic:
            yield command(
                f"iter{i}/train_critic", f"{name}, A.3: train the critic", critic_model=critic,
                trees=",".join(every_tree[-recipe["replay"] :]), out=it / "critic", seed=s.seed,
            )  # fmt: skip
            critic = it / "critic"
        yield command(
            f"iter{i}/train_actor", f"{name}, B: advantages, then the actor", actor=actor,
            trees=trees, critic=critic if with_critic else "",
            out=it / "actor", seed=s.seed,
        )  # fmt: skip
        actor = it / "actor"  # the next policy to improve, pi_ref, and the generator
        yield command(
            f"iter{i}/evaluate", f"{name}: evaluate", actor=actor, problems=test,
            out=it / "eval.jsonl", against=base_eval,
        )  # fmt: skip
    yield Command("report/evaluate", "The run in one page", ["--report", str(run)])


def args_of(script: str, flags: dict, s: Settings, recipe: dict) -> list[str]:
    """A stage's arguments: its files, what the recipe says, then the user's own, which take the
    place of the recipe's."""
    name = FLAGS_OF[script]
    own, flags = split(getattr(s, name)), flags | (recipe.get(name) or {})
    if script in DRAWING:
        own = split(s.draw) + own
        server = s.server or (f"http://127.0.0.1:{s.port}" if s.engine else "")
        flags |= recipe.get("draw", {}) | {"server": server}
    named, args = {word.partition("=")[0] for word in own}, []
    for flag_name, value in flags.items():
        if value is not False and value != "" and f"--{flag_name}" not in named:
            args += [f"--{flag_name}"] if value is True else [f"--{flag_name}", str(value)]
    return args + own


# ------------------------------------------------------------ before anything runs


def with_recipe(s: Settings) -> tuple[Settings, Path, dict]:
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


def parsed(command: Command):
    """(module, its Settings) of a command; UserError where a flag is misspelt or a number is wrong."""
    module = importlib.import_module(command.script)
    name = f"{command.script}.py"
    return module, cli.parse(module.Settings, module.__doc__, command.args, name)


def require_problems(there: int, s: Settings, where):
    if s.problems * s.iterations > there:
        wanted = f"{s.iterations} iterations of {s.problems} problems"
        mend = "lower --problems or --iterations"
        mend += "" if s.train else f', or --prepare "--train_size {s.problems * s.iterations}"'
        raise UserError(f"{where}: {there} training problems, {wanted} are asked for; {mend}")


def forced(commands: list[Command], name: str) -> list[Command]:
    """The commands with --force from the one that --force names."""
    names = [command.name for command in commands]
    begin = next((names.index(n) for n in (name, f"iter1/{name}") if n in names), None)
    if begin is None:
        raise UserError(f"--force {name}: no such stage; there are {', '.join(names)}")
    again = [c._replace(args=[*c.args, "--force"]) for c in commands[begin:-1]]
    return [*commands[:begin], *again, commands[-1]]  # the report is drawn each time


# ------------------------------------------------------------ the run


def stage(s: Settings):
    s, run, recipe = with_recipe(s)
    commands = list(algorithm_1(s, run, recipe))
    if s.force:
        commands = forced(commands, s.force)
    checked = [settings for _, settings in map(parsed, commands)]
    if not s.train:
        require_problems(checked[0].train_size, s, "--train_size")
    if s.dry_run:
        return print("\n".join(shell_lines(commands, s)))
    if s.critic_model:  # asked for first when the draws, which take hours, are done
        checked_input("critic_model", s.critic_model)
    print(f"{run}: {recipe['about']}")
    # A server on this machine is asked directly, whatever proxy the box has for other machines.
    os.environ["no_proxy"] = f"{os.environ.get('no_proxy', '')},127.0.0.1,localhost"
    with Engine(s.engine, s.port, run / "engine.log") as engine:
        for command in commands:
            print(f"\n== {command.title}\n$ {shlex.join(command.typed(s))}", flush=True)
            if s.engine and command.served and not is_complete(command):
                if command.name == "iter0/evaluate" and s.base:
                    from model import load_lm  # late: --help need not wait for it

                    prompt = read_jsonl(run / "train.jsonl")[0]["prompt"]
                    engine.require_reads_alike(s.base, run / "base.copy", prompt, load_lm)
                engine.serve(command.served)
            elif not command.served:
                engine.stop()  # training needs the memory
            do(command, s)
            if command.name == "prepare":
                require_problems(len(read_jsonl(run / "train.jsonl")), s, run / "train.jsonl")


def shell_lines(commands: list[Command], s: Settings) -> Iterator[str]:
    """The sequence as one can type it."""
    served = ""
    for command in commands:
        yield f"# {command.title}"
        if served and command.served != served:
            yield "kill %%; wait"
        if s.engine and command.served not in ("", served):
            yield f"{s.engine} {shlex.quote(command.served)} --port {s.port} &  # until it answers"
        served = command.served if s.engine else ""
        yield shlex.join(command.typed(s))


def is_complete(command: Command) -> bool:
    """Is there nothing to do for a server?"""
    return "output" in read_manifest(Path(command.value("--out"))) and "--force" not in command.args


def do(command: Command, s: Settings):
    """Run a stage: on a CPU in this process, which saves the import of torch; elsewhere in its own,
    since only a process that ends gives a GPU's memory back."""
    if not s.launch and not torch.cuda.is_available():
        module, settings = parsed(command)
        return module.stage(settings)
    script = str(Path(__file__).with_name(f"{command.script}.py"))  # wherever run.py was started
    actual = {"python": sys.executable, f"{command.script}.py": script}
    process = subprocess.Popen([actual.get(word, word) for word in command.typed(s)])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # it got the Ctrl-C too, and says how to go on
    if code < 0:
        hint = " (9: perhaps for want of memory)"
        print(
            f"error: signal {-code} ended {command.script}.py{hint}; the same command goes on",
            file=sys.stderr,
        )
    if code:
        sys.exit(code if code > 0 else 128 - code)  # as a shell counts signals


if __name__ == "__main__":
    cli.main(stage, Settings, __doc__)
