"""report.html: one page that shows a run and needs no network; and text made fit to be shown. It knows
nothing of the algorithm."""

import base64
import json
import textwrap
from html import escape
from pathlib import Path

from support.records import read_jsonl, read_problems


def colour(adv: float | None) -> str:
    """Of an advantage: white at 0 to green at 1 and orange at -1, told apart by all eyes; None: grey.

    0.5 -> "#7fceb9", half way from (255, 255, 255) to (0, 158, 115)
    """
    if adv is None:
        return "#eeeeee"
    end = (0, 158, 115) if adv > 0 else (213, 94, 0)
    share = min(1.0, abs(adv))
    return "#" + "".join(f"{int(255 + share * (x - 255)):02x}" for x in end)


def wrapped(text: str, width: int, most: int) -> list[str]:
    """The lines of a text, long ones cut into several; of more than `most` the first ones."""
    lines = []
    for line in visible(text).strip().splitlines():
        lines += textwrap.wrap(line, width) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], "..."]


def short(text: str, most: int) -> str:
    """The text on one line, or its beginning and three dots where it is longer than `most`
    characters."""
    text = " ".join(visible(text).splitlines())
    return text if len(text) <= most else text[: most - 3] + "..."


def visible(text: str) -> str:
    """The text with control characters, lone surrogates and the like as U+FFFD."""
    return "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)


def how_right(node: dict) -> str:
    """How good the responses from or through a node of trees.jsonl were; "" if none was counted.

    wins 3 of n 4 -> "3 of 4 right"; wins 2.5 of n 4 -> "mean reward 0.62 of 4"
    """
    if node["reward"] is not None:
        word = {0: "wrong", 1: "right"}.get(node["reward"])
        return word or f"reward {node['reward']:.2f}"
    if not node["n"]:
        return ""
    if node["wins"] % 1 == 0:
        return f"{node['wins']:g} of {node['n']} right"
    return f"mean reward {node['wins'] / node['n']:.2f} of {node['n']}"


# No script runs and nothing is fetched, whatever a model wrote: all text is escaped, and the policy
# forbids both should some escape have been forgotten.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 0 1rem 4rem;
  color: #222; background: #fff; overflow-wrap: anywhere }
pre, table { font: 14px/1.5 ui-monospace, monospace; margin: 0 }
pre { white-space: pre-wrap; unicode-bidi: isolate }
th, td { text-align: right; padding: 0 .6rem; white-space: nowrap }
img { width: max(100%, 44rem); max-width: 88rem }
details { border-top: 1px solid #ccc; padding: .4rem 0 }
summary { cursor: pointer }
h3 { font-size: 1rem; margin: .8rem 0 .2rem }
.wide { overflow-x: auto }
.pair { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.step { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem;
  padding: .1rem .4rem; margin-bottom: 2px }
.right { border-left: 5px solid #009e73; padding-left: .5rem }
.wrong { border-left: 5px solid #d55e00; padding-left: .5rem }
.step span, .note { font-size: 14px }
</style>
"""


EXPLAINED = """Each step is coloured by its advantage A: green is better than the state's average step,
orange is worse, grey was not trained on. "3 of 4 right": of the draws from the state after the
step. Q is the value that training gave that state: the critic's V, the counts, or both (--kappa).
A = Q - the mean Q of what was drawn at the state before (eq. 13; with --value_draws its V counts,
too)."""


def page(
    run: Path, table, note: str, pictures: dict[Path, str], iterations: list[str], trees
) -> str:
    """report.html: the table, the pictures inside it, ten test and ten training problems."""
    problems = {}
    for name in ("train.jsonl", "test.jsonl"):
        if (run / name).exists():
            problems |= {p["id"]: p for p in read_problems(run / name)}
    title = f"Direct Advantage Policy Optimization: {safe(run.resolve().name)}"
    parts = [PAGE, f"<title>{title}</title><h1>{title}</h1><div class='wide'><table>"]
    for cells in table:
        parts.append("<tr>" + "".join(f"<td>{safe(cell)}" for cell in cells))
    parts.append(f"</table></div><p class='note'>{safe(note)}")
    for picture, title_of in pictures.items():
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f"<img alt='{picture.name}' src='data:image/png;base64,{data}'>"
        parts.append(f"<h2>{title_of}</h2><div class='wide'>{image}</div>")
    parts += test_part(run, iterations, problems)
    both = [tree for tree in trees if tree.outcomes() == {True, False}][:10]
    if both:
        parts.append(f"<h2>Training problems</h2><p class='note'>{safe(EXPLAINED)} ")
        parts.append("The first problems of iteration 1 that have a right and a wrong response.")
    for tree in both:
        shown = "open" if tree is both[0] else ""
        parts.append(f"<details {shown}><summary>{safe(str(tree.id))}</summary>")
        parts.append(question_html(problems.get(tree.id, {"prompt": tree.nodes[0]["text"]})))
        parts.append("<div class='pair'>")
        for wanted in (True, False):
            responses = [r for r in tree.responses() if tree.right(r) == wanted]
            parts.append(f"<div><h3>{'a right' if wanted else 'a wrong'} response</h3>")
            parts += [step_html(tree, v) for v in max(responses, key=tree.spread)]
            parts.append("</div>")
        parts.append("</div></details>")
    return "\n".join(parts)


def test_part(run: Path, iterations: list[str], problems: dict[str, dict]) -> list[str]:
    """Ten test problems with the greedy responses of the first actor and of the last, side by side."""
    evaluated = {}
    for name in {iterations[0]: None, iterations[-1]: None}:  # one, if there is no other
        file = run / name / "eval.jsonl"
        if not file.exists():
            return []
        evaluated[name] = {line["id"]: line for line in read_jsonl(file)}
    before, after = evaluated[iterations[0]], evaluated[iterations[-1]]
    groups = {(True, False): [], (False, True): [], (False, False): [], (True, True): []}
    for problem, line in after.items():
        if problem in before:
            groups[before[problem]["correct"], line["correct"]].append(problem)
    chosen = []
    for turn in range(10):
        for group in groups.values():
            chosen += group[turn : turn + 1]
    names = safe(" and ".join(evaluated))
    parts = [f"<h2>Test problems</h2><p class='note'>Greedy responses of {names}, "]
    parts.append("in turns of problems lost, gained, wrong both times and right both times: ")
    parts.append("no fair sample, the table above is.")
    for problem in chosen[:10]:
        verdicts = " → ".join(lines[problem]["verdict"] for lines in evaluated.values())
        shown = "open" if problem == chosen[0] else ""
        parts.append(f"<details {shown}><summary>{safe(f'{problem}: {verdicts}')}</summary>")
        parts.append(question_html(problems.get(problem, {})) + "<div class='pair'>")
        for name, lines in evaluated.items():
            line, sampled = lines[problem], lines[problem]["sampled"]
            facts = [line["verdict"]] + ([] if line["finished"] else ["cut off"])
            if line.get("reward") not in (0, 1, None):
                facts.append(f"reward {line['reward']:.2f}")
            if line.get("reasoned") is False:
                facts.append("wrong reasoning")
            if sampled:
                right = sum(response["correct"] for response in sampled)
                facts.append(f"{right} of {len(sampled)} right at temperature 1")
            parts.append(f"<div><h3>{safe(name)}: {safe(', '.join(facts))}</h3>")
            parts.append(f"<div class='{'right' if line['correct'] else 'wrong'}'>")
            parts.append(pre_html(line["text"]) + "</div></div>")
        parts.append("</div></details>")
    return parts


def question_html(problem: dict) -> str:
    """Prompt and gold answer of a problem, or its tests."""
    text = ""
    if "prompt" in problem:
        text += f"<h3>prompt</h3>{pre_html(problem['prompt'])}"
    if problem.get("answer") is not None:
        text += f"<h3>gold answer</h3>{pre_html(str(problem['answer']))}"
    if problem.get("tests"):
        text += f"<h3>tests</h3>{pre_html(short(json.dumps(problem['tests']), 1000))}"
    return text


def safe(text: str) -> str:
    """Text for the page: nothing of it is read as HTML."""
    return escape(visible(text))


def pre_html(text: str) -> str:
    return f"<pre>{safe(text)}</pre>"


def step_html(tree, v: int) -> str:
    """One step of a training problem's response: its text, what is known of it, and its colour."""
    node, action = tree.nodes[v], tree.action.get(v)
    known = [how_right(node)] if node["n"] else []
    known += [f"Q {action['q']:.2f}", f"A {action['adv']:+.2f}"] if action else []
    shade = colour(action["adv"] if action else None)
    numbers = f"<span>{' · '.join(known)}</span>"
    text = pre_html(node["text"].rstrip())
    return f"<div class='step' style='background:{shade}'>{text}{numbers}</div>"
