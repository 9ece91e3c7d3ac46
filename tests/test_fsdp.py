"""Training in two processes (gloo, on the CPU) is training in one: losses, weights, resume, folders.

The processes that are killed run under torchrun, as a user's do.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
import toy
from safetensors.torch import load_file
from test_kernels import dense, dense_mask
from transformers import AutoModelForCausalLM

import model
import support.architectures
import support.attention
import support.cli
import support.distributed
import support.packing
import support.training

C, A = "train_critic.py", "train_actor.py"
NO_SAVES = "--save_minutes 99"  # where no test needs checkpoints, which take half of the time
# Runs a stage, and kills process `victim` when it has written its second checkpoint; of several
# machines its agent first, as if the machine were lost.
KILLED = """
import os, runpy, signal, sys
import support.distributed, support.training
victim, script = int(sys.argv[1]), sys.argv[2]
save, count = support.training.Checkpoints.save, [0]
def saved(self, step):
    save(self, step)
    count[0] += 1
    if count[0] == 2 and support.distributed.rank() == victim:
        if os.environ["GROUP_WORLD_SIZE"] != "1":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
support.training.Checkpoints.save = saved
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def torchrun(folder, script, victim=None, machines=1):
    """Run a stage of the toy as a user does: on one machine with two processes, or on several with one
    each, which are agents here. -> what subprocess.run says of each machine's command"""
    start = [str(toy.ROOT / script)]
    if victim is not None:
        (folder / "killed.py").write_text(KILLED)
        start = [str(folder / "killed.py"), str(victim), *start]
    running = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for machine in range(machines):
        command = [sys.executable, "-m", "torch.distributed.run"]
        if machines == 1:
            command += ["--standalone", "--nproc-per-node", "2"]
        else:
            command += ["--nnodes", str(machines), "--node-rank", str(machine)]
            command += ["--master-addr", "127.0.0.1", "--master-port", port]
        command += [*start, *toy.FLAGS[script].split()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=folder, **pipes))
    said = []
    for process in running:
        out, err = process.communicate()
        said.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return said


def run_together(folder, script, processes=2, more="", first=None):
    """The same without torchrun, whose fresh processes take most of the time; -> the first one's output."""
    said = toy.together(folder, script, processes, more, first)
    assert [one["code"] for one in said] == [0] * processes, said
    assert all(one["out"] == "" for one in said[1:])  # the first process speaks for all
    return said[0]["out"]


def as_on_cuda():
    """From now on trained models keep of each layer its input alone, and the first pack tries the
    other form of attention, for which a stand-in is there."""
    read = model.read_once  # as model.load_lm knows it

    def read_checkpointed(*args):
        lm = read(*args)
        support.architectures.checkpoint_layers(lm.model)
        return lm

    def tried(lm, shapes):
        print("shapes", sorted(shapes))
        return agrees(lm, shapes)

    model.read_once = read_checkpointed
    place = model.LM.place
    model.LM.place = lambda lm, device: place(lm, device) or setattr(lm, "flex", None)
    support.attention._flex = lambda: (dense, dense_mask)
    agrees, support.attention.flex_agrees = support.attention.flex_agrees, tried


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def both(request, tmp_path_factory):
    """The toy's critic and actor made in one process, and in two from the same trees."""
    one = tmp_path_factory.mktemp("fsdp") / "one"
    one.mkdir()
    with toy.contextlib.chdir(one):
        toy.build(one)
        if not request.param:
            config = AutoModelForCausalLM.from_pretrained("tiny").config
            config.tie_word_embeddings = False
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained("tiny")
        toy.pipeline("sample.py", "label_steps.py")
        two = one.with_name("two")
        shutil.copytree(one, two)
        toy.pipeline(C, A)
    for script in (C, A):
        said = run_together(two, script, more="" if request.param else NO_SAVES)
        assert said.count("written") == 1  # the first process speaks for all
    return one, two


def metrics(folder, name):
    return [json.loads(line) for line in (folder / "run" / f"{name}.work/metrics.jsonl").open()]


def same_weights(mine, wanted):
    assert mine.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(mine[name], want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["critic", "actor"])
def test_two_processes_learn_what_one_learns(both, name):
    one, two = (metrics(folder, name) for folder in both)
    assert len(one) == len(two) > 1
    for mine, wanted in zip(two, one):
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    one, two = both
    files = ["model.safetensors"] + (["value_head.safetensors"] if name == "critic" else [])
    for file in files:
        same_weights(load_file(two / "run" / name / file), load_file(one / "run" / name / file))
    config = json.loads((two / "run" / name / "config.json").read_text())
    assert config == json.loads((one / "run" / name / "config.json").read_text())
    made = AutoModelForCausalLM.from_pretrained(two / "run" / name)
    moved = made.state_dict()["model.embed_tokens.weight"]
    start = load_file(two / "tiny" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(moved, start)


def test_advantages_of_two_processes_are_those_of_one(both):
    one, two = (folder / "run" / "actor.advantages.jsonl" for folder in both)
    for mine, wanted in zip(two.open(), one.open(), strict=True):
        mine, wanted = json.loads(mine), json.loads(wanted)
        assert mine["id"] == wanted["id"] and len(mine["states"]) == len(wanted["states"])
        for state, other in zip(mine["states"], wanted["states"]):
            for action, its_twin in zip(state["actions"], other["actions"]):
                assert action == pytest.approx(its_twin, abs=2e-5)


@pytest.mark.parametrize("name, script", [("critic", C), ("actor", A)])
def test_offloaded_training_is_the_same(both, name, script, tmp_path):
    """--offload, without torchrun: weights, gradients and moments in the host's memory."""
    one, _ = both
    folder = tmp_path / "work"
    shutil.copytree(one, folder)
    for path in (folder / "run").glob(f"{name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_together(folder, script, 1, f"--offload {NO_SAVES}")
    for mine, wanted in zip(metrics(folder, name), metrics(one, name), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    files = ["model.safetensors"] + (["value_head.safetensors"] if name == "critic" else [])
    for file in files:
        same_weights(load_file(folder / "run" / name / file), load_file(one / "run" / name / file))


@pytest.mark.slow
@pytest.mark.parametrize("victim, processes", [(0, 2), (1, 3)])
def test_a_killed_process_ends_all_and_the_run_goes_on(both, victim, processes, tmp_path):
    """Also with another number of processes: the same weights as without the kill."""
    _, two = both
    folder = tmp_path / "work"
    shutil.copytree(two, folder)
    for path in (folder / "run").glob("critic*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (killed,) = torchrun(folder, C, victim=victim)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert not (folder / "run" / "critic").exists()
    with toy.contextlib.chdir(folder):  # one process cannot go on with what several began
        code, _, err = toy.stage(C, toy.CRITIC)
    assert code == 2 and err.count("\n") == 1 and "torchrun" in err
    if processes == 2:
        (again,) = torchrun(folder, C)
        assert again.returncode == 0 and again.stdout.count("written") == 1, again.stderr
        said = again.stdout
    else:
        said = run_together(folder, C, processes)
    assert "resuming" in said
    for file in ("model.safetensors", "value_head.safetensors"):
        path = f"run/critic/{file}"
        same_weights(load_file(folder / path), load_file(two / path))
    assert len(metrics(folder, "critic")) == len(metrics(two, "critic"))


def two_machines():
    """From now on four processes are those of two machines."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"


@pytest.mark.parametrize("both", [True], indirect=True, ids=["tied"])
def test_two_machines_of_two_processes_learn_what_one_process_learns(both, tmp_path):
    """Each machine shards whole weights over its processes; gradients are added up between them."""
    one, _ = both
    folder = tmp_path / "work"
    shutil.copytree(one, folder)
    for path in (folder / "run").glob("critic*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_together(folder, C, 4, NO_SAVES, first=two_machines)
    for file in ("model.safetensors", "value_head.safetensors"):
        path = f"run/critic/{file}"
        same_weights(load_file(folder / path), load_file(one / path))
    for mine, wanted in zip(metrics(folder, "critic"), metrics(one, "critic"), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.fixture
def sharded(both):
    """(function that loads the toy's model sharded over this one process, its packs)"""
    trees = [support.packing.Tree([[3, 4], [5, 6], [7]], [-1, 0, 0], [False, True, True])]
    packs = support.packing.pack_trees(trees, 99)

    def load(offload):
        support.distributed.join(True)
        lm = model.load_lm(both[0] / "tiny", train=True)
        support.distributed.shard(lm, offload=offload)
        return lm

    yield load, packs
    support.distributed.leave()


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_shards_before_a_step_s_last_pack(sharded, offload):
    """Kept whole they would take 4 bytes a parameter of every card: only --offload counts on that."""
    load, packs = sharded
    lm = load(offload)
    for last in (False, True):
        support.training.synchronise({"model": lm.model}, last)
        model.step_logprobs(lm, *packs).sum().backward()
        shards = all(hasattr(p.grad, "full_tensor") for p in lm.model.parameters())
        assert shards == (last or not offload)


def test_a_broken_checkpoint_of_several_files_is_one_line(sharded, tmp_path, monkeypatch):
    load, packs = sharded
    lm = load(True)

    def train():
        loss = lambda pack: (model.step_logprobs(lm, pack).mean(), {})
        make = lambda batch: [(pack,) for pack in packs]
        support.training.fit({"m": lm.model}, [0, 1], make, loss, tmp_path, lr=1e-3, save_minutes=0)

    train()
    newest = max(tmp_path.glob("step-*.dcp"))
    for part in newest.iterdir():
        part.write_bytes(b"")
    with pytest.raises(support.cli.UserError, match=f"{newest.name}: broken"):
        train()
    shutil.rmtree(newest)

    def full(*_, **__):
        raise dcp.CheckpointException("save", {0: (OSError("the disk is full"), None)})

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OSError, match="the disk is full"):
        train()


def test_two_processes_as_on_cuda_learn_the_same(both, tmp_path):
    """Layers are computed again in the backward pass, when their weights are gathered anew."""
    _, two = both
    folder = tmp_path / "work"
    shutil.copytree(two, folder)
    for path in (folder / "run").glob("actor*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = run_together(folder, A, more=NO_SAVES, first=as_on_cuda)
    assert said.count("shapes [(4, 2, ") == 2  # of the critic and of the actor
    same_weights(
        load_file(folder / "run/actor/model.safetensors"),
        load_file(two / "run/actor/model.safetensors"),
    )


def test_two_processes_evaluate_as_one(both, tmp_path):
    """They share out the problems; draws have keys, so the records are the same."""
    one, _ = both
    folder = tmp_path / "work"
    shutil.copytree(one, folder)
    with toy.contextlib.chdir(folder):
        toy.pipeline("evaluate.py")
    wanted = (folder / "run/eval.jsonl").read_bytes()
    for path in (folder / "run").glob("eval.jsonl*"):
        path.unlink()
    run_together(folder, "evaluate.py")
    assert (folder / "run/eval.jsonl").read_bytes() == wanted


def test_two_processes_learn_demonstrations_as_one(both, tmp_path):
    one, _ = both
    for name in ("one", "two"):
        shutil.copytree(one, tmp_path / name)
        shutil.rmtree(tmp_path / name / "run")
    with toy.contextlib.chdir(tmp_path / "one"):
        toy.pipeline("prepare.py")
    run_together(tmp_path / "two", "prepare.py")
    file = "run/base/model.safetensors"
    same_weights(load_file(tmp_path / "two" / file), load_file(tmp_path / "one" / file))
    for split in ("train", "valid", "test"):
        mine, wanted = [(tmp_path / n / f"run/{split}.jsonl").read_bytes() for n in ("two", "one")]
        assert mine == wanted


@pytest.mark.slow
@pytest.mark.parametrize("both", [True], indirect=True, ids=["tied"])
def test_two_machines_learn_what_one_process_learns(both, tmp_path):
    """Also when one of them is lost: the same commands go on."""
    one, _ = both
    folder = tmp_path / "work"
    shutil.copytree(one, folder)
    for path in (folder / "run").glob("*"):
        if path.name.startswith(("critic", "actor")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for script, victim, name in ((C, 1, "critic"), (A, 0, "actor")):
        lost = torchrun(folder, script, victim, machines=2)
        assert all(machine.returncode != 0 for machine in lost)
        assert not (folder / "run" / name).exists()
        first, second = torchrun(folder, script, machines=2)
        assert first.returncode == second.returncode == 0, (first.stderr, second.stderr)
        assert "resuming" in first.stdout and first.stdout.count("written") == 1
        assert second.stdout == ""  # the first process speaks for all
        for file in ["model.safetensors"] + ["value_head.safetensors"] * (script == C):
            path = f"run/{name}/{file}"
            same_weights(load_file(folder / path), load_file(one / path))
        assert len(metrics(folder, name)) == len(metrics(one, name))
