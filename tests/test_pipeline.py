"""The whole method on a tiny random model, stage by stage as run.py calls it, and what README says of it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers as tk
import torch
import toy
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import evaluate
import label_steps
import prepare
import sample
import support.cli
import support.records
import train_actor
import train_critic

ROOT = Path(__file__).resolve().parents[1]
# row 0 of GSM8K's train set (MIT, openai/grade-school-math) and two sums of our own
GSM8K = [
    {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many"
        " clips in May. How many clips did Natalia sell altogether in April and May?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = "
        "<<48+24=72>>72 clips altogether in April and May.\n#### 72",
    },
    {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "What is 3 + 2?", "answer": "3 + 2 = <<3+2=5>>5\n#### 5"},
]


def run(module, *flags):
    """A stage as the shell starts it, without a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        support.cli.main(module.stage, module.Settings, module.__doc__)


def iterate(run_folder, base, critic_base, i=1, kappa="4", gap=0.0):
    """One iteration of run.py with the smallest numbers that leave work for every stage."""
    it, train = run_folder / f"iter{i}", run_folder / "train.jsonl"
    actor = ["--actor", base]
    draws = ["--max_new", 24, "--batch", 64]
    run(
        sample,
        *actor,
        "--problems",
        train,
        "--out",
        it / "samples.jsonl",
        "--n1",
        6,
        "--n",
        3,
        *draws,
    )
    run(
        label_steps, *actor, "--problems", train, "--samples", it / "samples.jsonl",
        "--out", it / "trees.jsonl", "--m", 3, *draws,
    )  # fmt: skip
    run(
        train_critic, "--trees", it / "trees.jsonl", "--critic_model", critic_base,
        "--held_out", it / "trees.jsonl", "--out", it / "critic", "--batch", 8, "--lr", 1e-3,
    )  # fmt: skip
    run(
        train_actor, *actor, "--trees", it / "trees.jsonl", "--critic", it / "critic", "--out", it / "actor",
        "--kappa", kappa, "--gap", gap, "--batch", 16, "--lr", 1e-3,
    )  # fmt: skip
    return it


@pytest.fixture(scope="module")
def demo(folder, tmp_path_factory):
    """Two iterations on embedded problems from the tiny model, evaluated; -> the run folder."""
    path = tmp_path_factory.mktemp("run")
    sizes = ["--train_size", 12, "--valid_size", 2, "--test_size", 8]
    run(prepare, "--out", path, "--no_make_base", *sizes)
    actor = critic = folder
    for i in range(3):
        it = path / f"iter{i}"
        if i:
            iterate(path, actor, critic, i)
            actor, critic = it / "actor", it / "critic"
        against = ["--against", path / "iter0" / "eval.jsonl"] if i else []
        run(
            evaluate, "--actor", actor, "--problems", path / "test.jsonl", "--out", it / "eval.jsonl",
            "--samples", 4, "--max_new", 24, *against, *(["--critic", critic] if i else []),
        )  # fmt: skip
    run(evaluate, "--report", path)
    return path


def test_every_file_is_there_and_the_folders_load_with_plain_transformers(demo, folder):
    assert (demo / "report.png").stat().st_size > 10_000
    for i in (1, 2):
        it = demo / f"iter{i}"
        for name in ("actor", "critic"):
            model = AutoModelForCausalLM.from_pretrained(it / name)
            AutoTokenizer.from_pretrained(it / name)
            assert model.config.hidden_size == 64
        head = load_file(it / "critic" / "value_head.safetensors")
        assert head["weight"].shape == (1, 64) and head["weight"].abs().max() > 0
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(demo / "iter1" / "actor").state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_the_first_optimiser_step_has_log_ratio_0_and_the_do_nothing_loss(demo):
    first = json.loads((demo / "iter1" / "actor.work" / "metrics.jsonl").open().readline())
    assert first["ratio_up"] == 0 and first["ratio_down"] == 0
    assert first["loss"] == pytest.approx(first["do_nothing"], rel=1e-5)


def test_samples_as_trees_and_the_likelihood_of_right_steps(tmp_path, monkeypatch):
    """--whole_draws --m 0: no completion, every sample counts; the loss of the first step by hand."""
    monkeypatch.chdir(tmp_path)
    toy.build(tmp_path)
    label = toy.LABEL.replace("--m 3", "--m 0 --whole_draws")
    for script, flags in (("sample.py", toy.SAMPLE), ("label_steps.py", label), ("train_critic.py", toy.CRITIC)):  # fmt: skip
        code, _, err = toy.stage(script, flags)
        assert code == 0, err
    drawn = {r["id"]: r["responses"] for r in support.records.read_jsonl("run/samples.jsonl")}
    records = {r["id"]: r for r in support.records.read_jsonl("run/trees.jsonl")}
    for name, record in records.items():
        root = record["nodes"][0]
        assert record["tokens"] == 0 and root["n"] == len(drawn[name]) == 5
        assert root["wins"] == sum(response["reward"] for response in drawn[name])
        steps = sum(len(response["ends"]) for response in drawn[name])
        assert (
            sum(node["draws"] for node in record["nodes"]) >= steps
        )  # more where a blank line is cut in two ways
    for gap in (0.0, 0.4):  # eq. 12 leaves out states below it, the likelihood none
        actor = toy.ACTOR.replace("--batch 200", f"--batch 1000000 --gap {gap} --beta 0.5 --force")
        actor += " --value_draws 1 --by_draws --likelihood 2"
        code, said, err = toy.stage("train_actor.py", actor)
        assert code == 0, err
        loss = nll = weights = pairs = regressed = 0
        for line in support.records.read_jsonl("run/actor.advantages.jsonl"):
            for state in line["states"]:
                for action in state["actions"]:
                    node = records[line["id"]]["nodes"][action["node"]]
                    weights += node["draws"]
                    nll -= node["draws"] * node["wins"] / node["n"] * action["logp_ref"]
                    pairs += 1
                    if state["gap"] >= gap:
                        regressed += 1
                        loss += node["draws"] * 0.5 * (action["adv"] / 0.5) ** 2  # log-ratio: 0
        assert nll > 0 and 0 < regressed <= pairs and (regressed < pairs) == (gap > 0)
        assert f"B.1: {regressed} pairs of" in said
        assert f"; {pairs - regressed} pairs more for the likelihood" in said
        first = json.loads(Path("run/actor.work/metrics.jsonl").read_text().splitlines()[0])
        assert first["nll"] == pytest.approx(nll / weights, rel=1e-5)
        assert first["loss"] == pytest.approx((loss + 2 / 0.5 * nll) / weights, rel=1e-5)
        assert first["do_nothing"] == pytest.approx(loss / weights, rel=1e-5)
        assert first["pairs_up"] + first["pairs_down"] == regressed


def test_b1_is_not_computed_again_by_a_run_that_goes_on(demo, folder, tmp_path, monkeypatch):
    """Ended between B.1 and B.2: no critic is loaded then, and the weights are the same."""

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    def train(name):
        it = demo / "iter1"
        given = ["--actor", folder, "--trees", it / "trees.jsonl", "--critic", it / "critic"]
        flags = ["--kappa", 4, "--gap", 0, "--batch", 16, "--lr", 1e-3]
        run(train_actor, *given, "--out", tmp_path / name, *flags)

    train("whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train_actor, "train", stop)
        train("parts")
    for again in ("load_critic", "reference_logprobs"):
        monkeypatch.setattr(train_actor, again, stop)
    train("parts")
    for name in ("whole/model.safetensors", "whole.advantages.jsonl"):
        whole, parts = tmp_path / name, tmp_path / name.replace("whole", "parts")
        assert whole.read_bytes() == parts.read_bytes() != b""


def test_trees_hold_what_the_model_drew(demo):
    samples = {x["id"]: x for x in map(json.loads, (demo / "iter1" / "samples.jsonl").open())}
    for tree in map(json.loads, (demo / "iter1" / "trees.jsonl").open()):
        nodes, path = tree["nodes"], {0: []}
        for v, node in enumerate(nodes[1:], 1):
            path[v] = path[node["parent"]] + node["ids"]
        responses = samples[tree["id"]]["responses"]
        kept = [responses[k]["ids"] for k in samples[tree["id"]]["kept"]]
        for ids in kept:
            assert ids in path.values()
        for v, node in enumerate(nodes):
            if node["labelled"]:
                assert node["n"] >= 3 and node["reward"] is None
                assert node["n"] == sum(c["draws"] for c in nodes if c["parent"] == v)
            assert 0 <= node["wins"] <= node["n"]


def test_starting_again_changes_nothing(demo, folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file() and p.name != ".lock"}
    it = demo / "iter1"
    draws = ["--n1", 6, "--n", 3, "--max_new", 24, "--batch", 64]
    flags = ["--actor", folder, "--problems", demo / "train.jsonl", "--out", it / "samples.jsonl"]
    run(sample, *flags, *draws)
    assert "complete" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_finished_evaluation_is_compared_with_another_actor_at_once(demo, capsys):
    last, before = demo / "iter2", (demo / "iter2" / "summary.json").read_text()
    flags = [
        "--actor",
        last / "actor",
        "--critic",
        last / "critic",
        "--samples",
        4,
        "--max_new",
        24,
    ]
    flags += ["--problems", demo / "test.jsonl", "--out", last / "eval.jsonl"]
    run(evaluate, *flags, "--against", demo / "iter1" / "eval.jsonl")
    printed = capsys.readouterr().out
    assert "complete, nothing to do" in printed
    shown = rf"  greedy [+-].+% \[[+-].+%, [+-].+%\], p .+, against {demo}/iter1/eval.jsonl\n"
    assert re.search(shown, printed)
    assert json.loads((last / "summary.json").read_text())["against"].endswith("iter1/eval.jsonl")
    run(evaluate, *flags, "--against", demo / "iter0" / "eval.jsonl")
    assert (last / "summary.json").read_text() == before


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A random byte-level BPE model without a chat template: another tokenizer than the embedded one."""
    path = tmp_path_factory.mktemp("bpe") / "model"
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([row["answer"] for row in GSM8K], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def test_a_critic_of_another_tokenizer(demo, folder, bpe, tmp_path, capsys):
    it = tmp_path / "iter1"
    it.mkdir()
    for name in ("trees.jsonl", "trees.jsonl.manifest.json"):
        shutil.copy(demo / "iter1" / name, it / name)
    trees = it / "trees.jsonl"
    run(
        train_critic, "--trees", trees, "--critic_model", bpe, "--held_out", trees,
        "--out", it / "critic", "--batch", 8, "--lr", 1e-3, "--token_share", 0,
    )  # fmt: skip
    said = r"its tokenizer is not the actor's, so it reads the trees' texts; 0 of [1-9]\d* tokens are unknown"
    assert re.search(said, capsys.readouterr().out)
    metrics = json.loads((it / "critic.metrics.json").read_text())
    assert 0 <= metrics["brier"] <= 1 and metrics["states"] > 0
    run(
        train_actor, "--actor", folder, "--trees", trees, "--critic", it / "critic", "--out", it / "actor",
        "--gap", 0, "--batch", 16, "--lr", 1e-3,
    )  # fmt: skip
    assert re.search(said, capsys.readouterr().out)
    with pytest.raises(SystemExit, match="2"):  # the actor's ids mean nothing to it
        run(
            evaluate, "--actor", folder, "--critic", it / "critic", "--problems", demo / "test.jsonl",
            "--out", it / "eval.jsonl", "--samples", 2, "--max_new", 8,
        )  # fmt: skip
    assert "tokenizer is not the actor's" in capsys.readouterr().err


def test_gsm8k_with_a_bpe_model_through_every_stage(bpe, tmp_path):
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    test = tmp_path / "gsm8k_test.jsonl"
    test.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "#### 2"}) + "\n")
    path = tmp_path / "run"
    run(
        prepare, "--out", path, "--train", f"gsm8k:{data}", "--test", f"gsm8k:{test}", "--valid_share", 0,
        "--base", bpe, "--demos", f"gsm8k:{data}", "--passes", 1,
    )  # fmt: skip
    problem = json.loads((path / "train.jsonl").open().readline())
    assert problem["answer"] == "72" and problem["prompt"].endswith("the answer.")
    it = iterate(path, path / "base", path / "base", kappa="inf")
    run(
        evaluate, "--actor", it / "actor", "--problems", path / "test.jsonl", "--out", it / "eval.jsonl",
        "--max_new", 8,
    )  # fmt: skip
    assert json.loads((it / "summary.json").read_text())["sets"]["gsm8k"]["n"] == 1


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


MODULES = {
    m.__name__: m for m in (prepare, sample, label_steps, train_critic, train_actor, evaluate)
}


def commands(text: str) -> list[list[str]]:
    """The commands of a block as the shell would run them, variables filled in."""
    spy = "python() { printf '%q ' python \"$@\"; echo; }; bash() { printf '%q ' bash \"$@\"; echo; }\n"
    spy += "pip() { :; }; cp() { :; }; rm() { :; }\n"
    ran = subprocess.run(["bash", "-c", spy + text], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in ran.stdout.splitlines()]


def test_every_command_of_the_readme_can_be_typed(tmp_path, monkeypatch):
    """Each flag is known and each value fits; run.py plans its sequence, in which every stage's are, too."""
    monkeypatch.chdir(tmp_path)
    seen = Counter()
    for block in blocks("bash"):
        for command in commands(block):
            name = command[1].removesuffix(".py")
            seen[name] += 1
            if name == "run":
                code, said, err = toy.stage("run.py", [*command[2:], "--dry_run"])
                assert code == 0 and "train_actor.py" in said, err
            elif name in MODULES:
                module = MODULES[name]
                support.cli.parse(module.Settings, module.__doc__, command[2:], command[1])
            else:
                assert command[1:] == ["-m", "pytest", "-q", "-n", "auto"], command
    assert seen["run"] >= 8 and seen["evaluate"] >= 2 and seen["train_actor"] == 1, seen


def test_readme_shows_what_dry_run_prints():
    (shown,) = [block for block in blocks("bash") if "python sample.py" in block]
    code, printed, _ = toy.stage("run.py", ["--dry_run"])
    assert code == 0 and " ".join(shown.replace("\\\n", " ").split()) in " ".join(printed.split())


def test_readme_sample_lines_have_the_keys_of_the_files(demo):
    files = {
        "problems": demo / "train.jsonl",
        "samples": demo / "iter1" / "samples.jsonl",
        "trees": demo / "iter1" / "trees.jsonl",
        "advantages": demo / "iter1" / "actor.advantages.jsonl",
        "eval": demo / "iter1" / "eval.jsonl",
    }
    shown = {}
    for block in blocks("json"):
        for line in block.strip().splitlines():
            name, _, text = line.partition(" ")
            shown[name] = json.loads(text)
    assert shown.keys() == files.keys()
    for name, path in files.items():
        real = json.loads(path.open().readline())
        same_keys(shown[name], real, name)


def same_keys(shown, real, where):
    if isinstance(shown, dict):
        assert isinstance(real, dict), where
        assert shown.keys() - {"by_critic"} == real.keys() - {"by_critic"}, where
        for key in shown.keys() & real.keys():
            same_keys(shown[key], real[key], f"{where}.{key}")
    elif isinstance(shown, list) and shown and real:
        same_keys(shown[0], real[0], where)
