"""Who may import whom: support/ knows nothing of the algorithm, and stages do not import each other but
for what one makes for the next."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {path.stem for path in ROOT.glob("*.py")}
ORDER = ["model", "reward", "prepare sample label_steps train_critic train_actor evaluate", "run"]
FROM_A_STAGE = {  # what one stage takes from another
    ("train_actor", "train_critic"): {"load_critic", "print_unknown", "tree_values"},
    ("evaluate", "train_critic"): {"load_critic", "tree_values"},
    ("evaluate", "sample"): {"respond"},
}


def imported(path: Path) -> dict[str, set[str]]:
    """{module: names taken from it} of all imports of a file, those inside functions too."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(name.name for name in node.names)
        elif isinstance(node, ast.Import):
            for name in node.names:
                found.setdefault(name.name, set())
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "support").glob("[!_]*.py")), ids=lambda p: p.name)
def test_support_knows_nothing_of_the_algorithm(path):
    assert not TOP & {module.split(".")[0] for module in imported(path)}
    doc = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    assert "knows nothing of the algorithm" in doc.split("  ")[0][:400].lower()


@pytest.mark.parametrize("name", sorted(TOP))
def test_imports_at_the_top_run_one_way(name):
    rank = {n: i for i, names in enumerate(ORDER) for n in names.split()}
    for module, names in imported(ROOT / f"{name}.py").items():
        if module in TOP and rank[module] == rank[name]:
            assert names <= FROM_A_STAGE.get((name, module), set()), (module, names)
        elif module in TOP:
            assert rank[module] < rank[name], module
