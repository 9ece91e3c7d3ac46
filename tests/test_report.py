"""The report of a run, made from files alone: its numbers, what it shows, and that no text in it is run."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import support.cli
import support.embedded
import support.report
from evaluate import Settings, reasoned, shown, stage, summarise
from model import load_lm
from support.page import colour, how_right, short, visible, wrapped
from support.pictures import layout, plot_report, plot_solution, telling_tree
from support.report import (
    TrainedTree,
    actor_words,
    clearest_mistake,
    critic_words,
    evaluation_words,
    pairs_words,
    problem_words,
)

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
            draw = {
                "text": f"{text}drawn",
                "prediction": "7",
                "correct": right,
                "reward": int(right),
            }
            lines.append({"id": name, "text": f"{text}response {k}", "prediction": f"{text}7", "correct": right,
                          "reward": int(right), "verdict": "right" if right else f"{text}wrong", "finished": right, "sampled": [draw] * 2})  # fmt: skip
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
    step = {"loss": 1.0, "do_nothing": 4.0, "nll": 0.5, "ratio_up": 1.0, "pairs_up": 2,
            "ratio_down": -3.0, "pairs_down": 0}  # fmt: skip
    write(it / "actor.work" / "metrics.jsonl", [step] * 3)
    bins = {"bins": [{"states": 3, "value": 0.2, "mc": 0.3}]}
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
    assert printed[:3] == [
        "       tokens                greedy    T=1              greedy gain       p                 T=1 gain",
        "iter0          33.3% [19.2%, 51.2%]  33.3%",
        "iter1   2,550  80.0% [62.7%, 90.5%]  80.0%  +46.7% [+23.3%, +66.7%]  0.0013  +46.7% [+23.3%, +66.7%]",
    ]
    files = ["report.png", "tree.png", "solution.png", "report.html"]
    assert printed[5:] == [str(tmp_path / "run" / name) for name in files]
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
    rows = {"iter1": json.loads((run / "iter1" / "summary.json").read_text())["sets"]["all"]}
    axes = plot_report(run, rows).axes
    assert len(axes[1].lines) == 2  # its critic beside the diagonal
    assert axes[3].lines[1].get_ydata().tolist() == [0.25] * 3  # its loss, of the unmoved actor's
    for name in ("train.jsonl", "test.jsonl", "iter0/eval.jsonl"):
        (run / name).unlink()
    assert report(run).count("details") == 10  # the trees have their prompts
    capsys.readouterr()
    with pytest.raises(support.cli.UserError, match="no iter"):
        support.report.report(tmp_path)


def test_compare_pairs_each_row_with_the_first(tmp_path, capsys):
    run, base = make_run(tmp_path / "run"), make_run(tmp_path / "base", iterations=1)
    first = base / "iter0" / "eval.jsonl"
    stage(Settings(compare=[str(first), str(run), str(base)]))  # a folder is its last iteration
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "30 problems"
    shares, same = "80.0% [62.7%, 90.5%] 80.0%", "+0.0% [+0.0%, +0.0%]"
    gain, start = "+46.7% [+23.3%, +66.7%]", "33.3% [19.2%, 51.2%] 33.3%"
    assert [" ".join(line.split()) for line in printed[2:5]] == [
        f"{first} {start}",
        f"{run}/iter1/eval.jsonl {shares} {gain} 0.0013 {gain}",
        f"{first} {start} {same} 1 {same}",
    ]
    # Other ids, or equal ids of other problem files, are no pairs.
    fewer = make_run(tmp_path / "fewer", problems=29)
    manifest = {"stage": "evaluate", "settings": {}, "facts": {}, "code": {}, "grader": ""}
    for path, problems in ((first, "seed 0"), (run / "iter1" / "eval.jsonl", "seed 1")):
        text = json.dumps(manifest | {"inputs": {"actor": str(path), "problems": problems}})
        path.with_name("eval.jsonl.manifest.json").write_text(text)
    for other in (fewer, run):
        with pytest.raises(
            support.cli.UserError, match=f"{other}.*: not on the problems of {first}"
        ):
            stage(Settings(compare=[str(first), str(other)]))
    with pytest.raises(support.cli.UserError, match="no iter.*pass a run folder"):
        stage(Settings(compare=[str(first), str(tmp_path)]))
    with pytest.raises(support.cli.UserError, match="wrong reward"):
        write(tmp_path / "eval.jsonl", [{"id": 1, "correct": True}])
        stage(Settings(compare=[str(tmp_path / "eval.jsonl")]))


def evaluated(i, rewards, **more):
    """A line of eval.jsonl: the greedy response's reward, then those of the sampled ones."""
    greedy, *drawn = [{"prediction": "7", "reward": r, "correct": r == 1} | more for r in rewards]
    return greedy | {"id": i, "verdict": "right", "finished": True, "sampled": drawn}


def test_mean_reward_and_reasoning_stand_beside_accuracy():
    row = summarise([evaluated(0, [0.5, 1, 0.25]), evaluated(1, [1, 0, 0])], {})
    assert (row["accuracy"], row["sampled"]) == (0.5, 0.25)  # right is full reward
    assert (row["reward"], row["reward_sampled"]) == (0.75, 0.3125)
    assert "  mean reward 0.750 greedy, 0.312 at temperature 1 (right is full reward only)" in evaluation_words("x", row, "")  # fmt: skip
    lines = [evaluated(0, [1, 1], reasoned=True), evaluated(1, [1, 0], reasoned=False)]
    row = summarise([*lines, evaluated(2, [0, 0])], {})  # of the last it is not known
    assert (row["reasoning"], row["reasoning_sampled"]) == (0.5, 0.5) and "reward" not in row
    assert evaluation_words("x", row, "")[1].startswith("  reasoning right 50.0% greedy, 50.0% at")
    plain = summarise([evaluated(0, [1])], {})
    assert not {"reward", "reasoning", "reasoning_sampled"} & {*plain}
    assert len(evaluation_words("x", plain, "")) == 2


@pytest.mark.parametrize(
    "number, text, right",
    [
        ("14", "Ben: 7 * 2 = 14\nThe answer is even.", True),
        ("14", "Ben: 7 + 2 = 9\nThe answer is even.", False),
        ("4", "Ben: 7 * 2 = 14\n", False),  # a whole number, not its end
        ("14", "14 coins, and then 15", False),  # the last one
        ("4", "5 - 9 = -4", False),
        ("14", "The answer is even.", False),
    ],
)
def test_reasoned(number, text, right):
    assert reasoned({"number": number}, text) is right
    response = {"text": text, "prediction": "7", "correct": False, "reward": 0.5, "ids": [5]}
    line = {name: response[name] for name in ("text", "prediction", "correct", "reward")}
    assert shown({"number": number}, response) == line | {"reasoned": right}
    assert shown({}, response) == line


def test_stages_say_in_words_what_they_found():
    found = {"auc": 0.912, "states": 784, "calibration_error": 0.031, "siblings": 0.868, "sibling_pairs": 90}  # fmt: skip
    assert critic_words(found) == (
        "critic's AUC 0.91 on 784 held-out states (0.5 is chance); calibration error 0.03 (0 is best); "
        "of 90 pairs of steps from one state 0.87 in order (0.5 is chance)"
    )
    assert critic_words(found | {"siblings": None, "sibling_pairs": 0}).endswith("(0 is best)")
    states = [{"actions": [pair(1, 0.9, 0.3), pair(2, 0.3, -0.3)]}] * 2
    assert pairs_words(states, 0.1) == (
        "4 pairs of a state and a step, of 2 states with gap >= 0.1; advantages from -0.30 to +0.30, "
        "standard deviation 0.30 (near 0: nothing to learn)"
    )
    assert pairs_words([], 0.0) == "0 pairs of a state and a step, of 0 states"
    early = {"loss": 9.0, "do_nothing": 9.0, "nll": 1.0, "ratio_up": 9.0, "pairs_up": 1.0, "ratio_down": 0.0, "pairs_down": 0.0}  # fmt: skip
    late = {"loss": 3.0, "do_nothing": 4.0, "nll": 1.0, "ratio_up": 3.0, "pairs_up": 2.0, "ratio_down": -8.0, "pairs_down": 4.0}  # fmt: skip
    said = actor_words([early] * 6 + [late] * 2, likelihood=1.0)
    assert said == (
        "loss 0.50 of the unmoved actor's (1: nothing learned, 0: all learned); mean log-ratio of better steps "
        "+1.50; mean log-ratio of worse steps -2.00 (last 2 of 8 training steps)"
    )


def chain_tree(advantages, rewards=(0, 1), step="x = 1\n"):
    """A wrong response with these advantages (None: no pair), and a right one of one step."""
    nodes = [node(-1, "prompt", n=4, wins=2)]
    for v in range(len(advantages)):
        end = rewards[0] if v == len(advantages) - 1 else None
        nodes.append(node(v, step, draws=1, n=1, reward=end))
    nodes.append(node(0, "right", draws=1, n=1, wins=1, reward=rewards[1]))
    action = {v: pair(v, 0.5, a) for v, a in enumerate(advantages, 1) if a is not None}
    return TrainedTree(str(advantages), nodes, action | {len(nodes) - 1: pair(len(nodes) - 1, 1.0, 0.5)}, {})  # fmt: skip


def test_the_clearest_mistake_is_one_step_that_stands_out():
    clear, blurred = chain_tree([0.1, -0.6, None]), chain_tree([-0.5, -0.7, 0.0])
    at_the_end = chain_tree([0.1, 0.2, -0.9])  # its reward says that, no critic is needed
    never_right, long = (
        chain_tree([0.1, -0.8, 0.0], rewards=(0, 0)),
        chain_tree([-0.9] + [0.1] * 11),
    )
    trees = [blurred, clear, at_the_end, never_right, long]
    assert clearest_mistake(trees) == (clear, [1, 2, 3])
    parting = chain_tree([-0.3, 0.1, None])  # less clear, but a right response parts just there
    assert clearest_mistake([*trees, parting]) == (parting, [1, 2, 3])
    assert clearest_mistake([at_the_end, never_right, long]) is None and plot_solution(None) is None
    drawn = [text.get_text() for text in plot_solution((clear, [1, 2, 3])).axes[0].texts]
    assert "-0.60" in drawn and "drawn there, too" in drawn
    words = problem_words(trees)
    assert words[0] == "One of the problems, [0.1, -0.6, None]:"
    numbers = [line.split("x = 1")[1].split() for line in words if "x = 1" in line]
    assert numbers == [
        ["0.50", "+0.10", "0", "of", "1", "right"],
        ["0.50", "-0.60", "0", "of", "1", "right"],
        ["wrong"],
    ]
    known = clear._replace(value=[0.5, 0.5, 0.5, 0.25, 1.0])
    assert any(line.endswith("0.25           wrong") for line in problem_words([known]))
    assert problem_words([never_right]) == [
        "no problem has both a right and a wrong response to show"
    ]


def test_the_tree_drawn_branches_twice_where_counts_and_advantages_agree():
    def tree(wins):  # two states with two actions each
        nodes = [node(-1, "p", n=4, wins=2), node(0, "a", 2, 4, 4), node(0, "b", 2, 4, 0)]
        nodes += [node(1, "c", 2, 4, wins), node(1, "d", 2, 4, 0)]
        nodes += [node(3, "end", 4, 4, 4, reward=1), node(4, "end", 4, 4, 0, reward=0)]
        action = {v: pair(v, 0.5, a) for v, a in ((1, 0.4), (2, -0.4), (3, 0.4), (4, -0.4))}
        return TrainedTree(f"{wins}", nodes, action, {0: 0.5, 1: 0.5})

    assert telling_tree([tree(0), tree(4), tree(2)], most=7).id == "4"
    assert telling_tree([tree(4)], most=6) is None


def test_rewards_between_0_and_1_are_no_counts():
    assert how_right(node(0, "", n=4, wins=3)) == "3 of 4 right" and how_right(node(0, "")) == ""
    assert how_right(node(0, "", n=4, wins=2.16667)) == "mean reward 0.54 of 4"
    ends = [how_right(node(0, "", reward=reward)) for reward in (0, 1, 0.5)]
    assert ends == ["wrong", "right", "reward 0.50"]
    half = TrainedTree("x", [node(-1, ""), node(0, "", reward=0.9)], {}, {})
    assert half.outcomes() == {False}


def test_a_picture_that_is_not_drawn_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    support.report.report(run)
    (run / "iter1" / "trees.jsonl").unlink()
    capsys.readouterr()
    support.report.report(run)
    said = "not drawn: tree.png, solution.png (iter1 has no trees and advantages)\n"
    assert said in capsys.readouterr().out and not (run / "solution.png").exists()


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


def test_no_library_draws_bars_while_models_are_saved_and_loaded(folder, tmp_path, capfd):
    words = AutoTokenizer.from_pretrained(folder)
    new, copy = tmp_path / "new", tmp_path / "copy"
    support.embedded.new_model(words, seed=0, layers=1, width=16).save_pretrained(new)
    words.save_pretrained(new)
    load_lm(new).save(copy)
    assert (copy / "model.safetensors").exists() and capfd.readouterr() == ("", "")
