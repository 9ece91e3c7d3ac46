"""A random model of the embedded default's kind, and the repository on the path."""

import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
if "PYTEST_XDIST_WORKER" in os.environ:  # -n: as many processes as cores, so a thread in each
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported, so set before


def pytest_addoption(parser):
    parser.addoption("--kills", default=0, type=int, help="random kills a stage in test_crash.py")


def pytest_collection_modifyitems(items):
    """The longest test first, or one core would wait for it alone at the end."""
    items.sort(key=lambda item: "stages_as_processes" not in item.name)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random 2-layer model with the embedded tokenizer, as an ordinary folder."""
    import support.embedded  # takes seconds, which pytest's first process need not spend

    texts = [
        d[k]
        for d in support.embedded.demonstrations(support.embedded.TASKS["math"], 0, 200, True)
        for k in ("prompt", "response")
    ]
    tokenizer = support.embedded.build_tokenizer(texts)
    model = support.embedded.new_model(tokenizer, seed=0, layers=2, width=64)
    path = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def lm(folder):
    from model import load_lm

    return load_lm(folder, device="cpu")


@pytest.fixture
def rng():
    return random.Random(0)
