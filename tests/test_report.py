"""The report of a run, made from files alone: its numbers, what it shows, and that no text in it is run."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import support.cli
import support.embedded
import support.report
from evaluate import summarise
from support.page import colour, short, visible, wrapped
from support.report import TrainedTree, layout

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = (
    "</pre></div></style></title><script>document.title='run'</script>"
    "<img src=x onerror=\"document.title='run'\"><svg onload=document.title='run'>"
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><style>*{display:none}</style>"
    "<!-- &lt; $\\frac{ $x_ \u202e \x1b[31m \x00 '\" 日本 ]]>"
)


def write(path: Path, lines: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def node(parent, text, draws=0, n=0, wins=0, reward=None):
    return {"parent": parent, "ids": [5], "text": text, "draws": draws, "n": n, "wins": wins,
            "reward": reward, "labelled": n >= 4}  # fmt: skip


def make_run(run: Path, text: str = "", iterations: int = 2, problems: int = 30) -> Path:
    """A finished run of `problems` test and as many training problems; `text` is put into every text of a model.

    Test problem i is right before training if i % 3 == 0, and after it if i % 5 > 0.
    """
    ids = {split: [f"{text}{split}/{i}" for i in range(problems)] for split in ("test", "train")}
    for split, names in ids.items():
        rows = [{"id": i, "prompt": f"{text}prompt of {i}", "answer": f"{text}7"} for i in names]
        write(run / f"{split}.jsonl", rows)
    before = {}
    for k in range(iterations):
        lines = []
        for i, name in enumerate(ids["test"]):
            right = i % 3 == 0 if k == 0 else i % 5 > 0
            draw = {"text": f"{text}drawn", "prediction": "7", "correct": right}
            lines.append({"id": name, "text": f"{text}response {k}", "prediction": f"{text}7", "correct": right,
                          "verdict": "right" if right else f"{text}wrong", "finished": right, "sampled": [draw] * 2})  # fmt: skip
        write(run / f"iter{k}" / "eval.jsonl", lines)
        figures = {"sets": {"all": summarise(lines, before)}}
        (run / f"iter{k}" / "summary.json").write_text(json.dumps(figures))
        before = {line["id"]: line for line in lines} if k == 0 else before
    if iterations == 1:
        return run
    nodes = [
        node(-1, f"{text}prompt", n=4, wins=2),
        node(0, f"{text}good\n", draws=3, n=4, wins=3),
        node(0, f"{text}bad\n", draws=1, n=1, wins=0),
        node(1, f"{text}best", draws=3, n=3, wins=3, reward=1),
        node(1, f"{text}slip\n", draws=1, n=4, wins=0),
        node(4, f"{text}end", draws=4, n=4, wins=0, reward=0),
    ]
    states = [
        {"node": 0, "mean": 0.5, "gap": 0.6, "actions": [pair(1, 0.65, 0.15), pair(2, 0.05, -0.45)]},
        {"node": 1, "mean": 0.75, "gap": 1.0, "actions": [pair(3, 1.0, 0.25), pair(4, 0.0, -0.75)]},
        {"node": 4, "mean": 0.1, "gap": 0.1, "actions": [pair(5, 0.0, -0.1)]},
    ]  # fmt: skip
    it = run / "iter1"
    tree = {"prompt_ids": [1], "tokens": 80, "nodes": nodes}
    write(it / "trees.jsonl", [{"id": i, **tree} for i in ids["train"]])
    responses = [{"ids": [5, 6, 0]}, {"ids": [5, 0]}]
    write(it / "samples.jsonl", [{"id": i, "responses": responses} for i in ids["train"]])
    write(it / "actor.advantages.jsonl", [{"id": i, "states": states} for i in ids["train"]])
    step = {"ratio_up": 1.0, "pairs_up": 2, "ratio_down": -3.0, "pairs_down": 0}
    write(it / "actor.work" / "metrics.jsonl", [step] * 3)
    bins = {"bins": [{"states": 3, "value": 0.2, "mc": 0.3}, {"states": 0}]}
    (it / "critic.metrics.json").write_text(json.dumps(bins))
    return run


def pair(v, q, adv):
    return {"node": v, "q": q, "adv": adv, "logp_ref": -1.0}


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page as a browser would cut it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def report(run: Path) -> Page:
    support.report.report(run)
    return Page((run / "report.html").read_text())


def test_the_report_has_table_pictures_and_twenty_problems(tmp_path, capsys):
    page = report(make_run(tmp_path / "run"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[:3]] == [
        ["tokens", "greedy"], ["iter0", "33.3%"], ["iter1", "2,550"]]  # fmt: skip
    files = ["report.png", "tree.png", "solution.png", "report.html"]
    assert printed[3:] == [str(tmp_path / "run" / name) for name in files]
    assert page.count("details") == 20 and page.count("img") == 3 and page.count("tr") == 3
    words = "\n".join(page.words)
    for there in ("80.0%", "prompt of train/0", "prompt of test/0", "response 0", "response 1"):
        assert there in words, there
    # problems 0, 15 are lost, 1, 2, 4, 7, .. gained, 5, 10, .. wrong twice, 3, 6, .. right twice
    shown = [word.split(":")[0] for word in page.words if word.startswith("test/") and "→" in word]
    assert shown == [f"test/{i}" for i in (0, 1, 5, 3, 15, 2, 10, 6, 4, 20)]
    assert "best" in words and "3 of 4 right · Q 0.65 · A +0.15" in words
    assert words.count("cut off") == 3 + 5 + 2 + 1  # as often as a shown response did not end
    styles = [attrs["style"] for _, attrs in page.tags if "style" in attrs]
    assert styles[:2] == [f"background:{colour(a)}" for a in (0.15, 0.25)]


def test_nothing_that_a_model_wrote_is_more_than_text(tmp_path):
    page, plain = report(make_run(tmp_path / "a", HOSTILE)), report(make_run(tmp_path / "b"))
    # the very tags of a harmless run (the pictures' bytes apart), and nothing from elsewhere
    for (tag, attrs), (other, attributes) in zip(page.tags, plain.tags, strict=True):
        assert tag == other and attrs.keys() == attributes.keys()
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    names = {name for _, attrs in page.tags for name in attrs}
    assert names == {"lang", "charset", "http-equiv", "content", "name", "class", "style", "open", "alt", "src"}  # fmt: skip
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    allowed = {part.split()[0]: part.split()[1:] for part in policy.split(";")}
    assert allowed.pop("style-src") == ["'unsafe-inline'"] and allowed.pop("img-src") == ["data:"]
    assert allowed == {"default-src": ["'none'"], "base-uri": ["'none'"], "form-action": ["'none'"]}
    assert page.words.count(f"{visible(HOSTILE)}response 1") == 10  # shown whole all the same
    assert "\x1b" not in "".join(page.words) and "\u202e" not in "".join(page.words)


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no chromium on this machine")
    return path


def test_a_browser_runs_nothing_of_a_hostile_page(tmp_path, chromium):
    report(make_run(tmp_path / "run", HOSTILE))
    # the test sees scripts: without escape and policy this one would have run
    (tmp_path / "bare.html").write_text(f"<title>t</title><body>{HOSTILE[:100]}")
    for name, title in (("bare.html", "run"), ("run/report.html", None)):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / name}"]
        seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        titled = seen.split("<title>")[1].split("</title>")[0]
        assert titled == (title or "Direct Advantage Policy Optimization: run")
        assert ("<script" in seen) == (title is not None)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_phone(tmp_path, chromium, width):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    report(make_run(tmp_path / "run", HOSTILE + "long" * 40))
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{tmp_path}/run/report.html")
        for summary in page.locator("summary").all():
            if summary.locator("..").get_attribute("open") is None:
                summary.click()
        assert page.locator("details[open]").count() == 20
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert {url.split(":")[0] for url in requests} <= {"file", "data"} and len(requests) <= 4
        browser.close()


def test_reports_of_less(tmp_path, capsys):
    base = make_run(tmp_path / "base", iterations=1)
    page = report(base)  # the base alone: no training to show, no comparison
    assert page.count("details") == 10 and not (base / "tree.png").exists()
    run = make_run(tmp_path / "run")
    assert report(run).count("details") == 20
    settings = {"advantage": "outcome"}
    manifest = {"stage": "train_actor", "settings": settings, "inputs": {}, "facts": {}}
    manifest |= {"code": {}, "grader": ""}
    (run / "iter1" / "actor.manifest.json").write_text(json.dumps(manifest))
    assert report(run).count("details") == 10  # its pairs are whole responses, not the trees' steps
    rows = {"iter1": json.loads((run / "iter1" / "summary.json").read_text())["sets"]["all"]}
    assert (
        len(support.report.plot_report(run, rows).axes[1].lines) == 2
    )  # its critic beside the diagonal
    for name in ("train.jsonl", "test.jsonl", "iter0/eval.jsonl"):
        (run / name).unlink()
    assert report(run).count("details") == 0
    capsys.readouterr()
    with pytest.raises(support.cli.UserError, match="no iter"):
        support.report.report(tmp_path)


def test_layout_keeps_rows_apart(rng):
    for _ in range(50):
        parents = [-1] + [rng.randrange(v) for v in range(1, rng.randint(2, 12))]
        tree = TrainedTree("x", [node(p, "") for p in parents], {}, {})
        place = layout(tree)
        leaves = sorted(place[v][1] for v in place if v not in parents)
        assert place[0][0] == 0 and leaves == [*range(len(leaves))]
        for v, parent in enumerate(parents[1:], 1):
            assert place[v][0] == place[parent][0] + 1
            rows = [place[u][1] for u, p in enumerate(parents) if p == parent]
            assert min(rows) <= place[parent][1] <= max(rows)
        spots = [*place.values()]
        assert len(set(spots)) == len(spots)


def test_text_and_colours_of_pictures():
    assert colour(None) == "#eeeeee" and colour(0.0) == "#ffffff"
    assert (colour(1.0), colour(-1.0), colour(7.0)) == ("#009e73", "#d55e00", "#009e73")
    assert colour(0.5) == "#7fceb9"
    assert short("abcdef", 6) == "abcdef" and short("abcdefg", 6) == "abc..."
    assert wrapped("a b c\n\n  d", 3, 9) == ["a b", "c", "", "  d"]
    assert wrapped("a\nb\nc\nd", 3, 3) == ["a", "b", "..."]


def test_no_library_draws_bars_while_models_are_saved_and_loaded(folder, tmp_path):
    code = f"""
from pathlib import Path
from transformers import AutoTokenizer
import prepare
words = AutoTokenizer.from_pretrained({str(folder)!r})
new, copy = Path({str(tmp_path)!r}, "new"), Path({str(tmp_path)!r}, "copy")
support.embedded.new_model(words, seed=0, layers=1, width=16).save_pretrained(new)
words.save_pretrained(new)
prepare.load_lm(new).save(copy)
assert (copy / "model.safetensors").exists()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
