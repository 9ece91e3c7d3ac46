"""Reading and writing files: JSONL records that are checked, files that are whole or not there, hashes.

It knows nothing of the algorithm.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from support.cli import UserError, first_line


def replace(path: Path, write):
    """Make `path`, a file or a folder, whole or not at all: write beside, fsync, rename, fsync."""
    path, beside = Path(path), Path(f"{path}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
    except (RuntimeError, SafetensorError) as e:  # torch's and safetensors' word for a full disk
        raise OSError(errno.EIO, f"not written ({first_line(e)})", str(path)) from e
    put_in_place(beside, path)


def put_in_place(beside: Path, path: Path):
    """fsync what was written beside, then give it its name."""
    for p in (*beside.rglob("*"), beside) if beside.is_dir() else [beside]:
        fsync(p)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(beside, path)
    fsync(path.parent)


def fsync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hash of a file or a folder's files; remembered by size and time in .sha256.json beside."""
    path = Path(path)
    if path.is_dir():
        lines = []
        for file in sorted(path.rglob("*")):
            if file.is_file() and not file.name.startswith(".sha256.json"):
                lines.append(f"{file.relative_to(path)} {sha256(file)}")
        return digest("\n".join(lines))
    memory, stat = path.parent / ".sha256.json", path.stat()
    try:
        known = dict(json.loads(memory.read_text()))
    except (OSError, TypeError, ValueError):
        known = {}
    mark = [stat.st_size, stat.st_mtime_ns]
    if known.get(path.name, [])[:2] != mark:
        with path.open("rb") as f:
            known[path.name] = mark + [hashlib.file_digest(f, "sha256").hexdigest()]
        with suppress(OSError):  # a folder of somebody else's, or two processes that hash at once
            replace(memory, lambda p: p.write_text(json.dumps(known)))
    return known[path.name][2]


def dump(record: dict) -> bytes:
    """A record as a line of JSONL."""
    return (json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n").encode()


# ------------------------------------------------------------ what a record must be
#
# A function ..._fault says in words what is wrong with a record, and None if nothing is. A record
# that is none would be drawn from, or trained on, without a word.

LARGEST = 1 << 62  # integers beyond it do not fit into a tensor


def is_number(value) -> bool:
    return type(value) in (int, float)  # and not isinstance(), for which True would be a number


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def is_reward(value) -> bool:
    return is_number(value) and 0 <= value <= 1


def are_counts(values) -> bool:
    """Is it a list of counts, such as token ids? All are looked at together: one by one takes minutes
    at full size."""
    if not isinstance(values, list):
        return False
    return not values or (
        set(map(type, values)) == {int} and is_count(min(values)) and is_count(max(values))
    )


def wrong_field(checks: dict[str, bool]) -> str | None:
    """The first of these fields that is not as it should be."""
    return next((name for name, is_right in checks.items() if not is_right), None)


def problem_fault(record: dict) -> str | None:
    """Of a line of problems.jsonl: a prompt, and an answer or tests."""
    prompt, answer, tests = (record.get(name) for name in ("prompt", "answer", "tests"))
    fault = None
    if "id" not in record:
        fault = "no id"
    elif not (isinstance(prompt, str) and prompt):
        fault = "no prompt"
    elif tests and not are_tests(tests):
        fault = "no usable tests"
    elif not tests and not (isinstance(answer, str) and answer):
        fault = "no answer and no tests"
    return fault and f"{fault}; prepare.py makes problems of data sets"


def are_tests(tests) -> bool:
    """The tests of a program, as far as a stage reads them (see support/judge.py)."""
    if not isinstance(tests, dict):
        return False
    return isinstance(tests.get("setup", ""), str) and isinstance(tests.get("outputs", []), list)


def sample_fault(record: dict) -> str | None:
    """Of a line of samples.jsonl: offsets that split steps, and choices that exist."""
    prompt_ids, responses, kept = (record.get(x) for x in ("prompt_ids", "responses", "kept"))
    if not (isinstance(responses, list) and responses):
        return "no responses, so no line of samples.jsonl"
    wrong = wrong_field(
        {
            "prompt_ids": are_counts(prompt_ids) and prompt_ids != [],
            "kept": are_counts(kept) and {*kept} <= {*range(len(responses))},
        }
    )
    for k, response in enumerate(responses):
        if field := response_fault(response):
            wrong = wrong or f"responses[{k}] {field}"
    return wrong and f"wrong {wrong}; draw these samples again"


def response_fault(response) -> str | None:
    if not isinstance(response, dict):
        return "is no object"
    ids, ends = response.get("ids"), response.get("ends")
    split = are_counts(ids) and are_counts(ends)
    return wrong_field(
        {
            "ids": are_counts(ids),
            "ends": split and [0, *ends] == sorted({0, *ends, len(ids)}),
            "text": isinstance(response.get("text"), str),
            "reward": is_reward(response.get("reward")),
            "finished": isinstance(response.get("finished"), bool),
        }
    )


def tree_fault(record: dict) -> str | None:
    """Of a line of trees.jsonl: nodes behind their parents, with counts that fit."""
    prompt_ids, nodes = record.get("prompt_ids"), record.get("nodes")
    if not (isinstance(nodes, list) and nodes):
        return "no nodes, so no line of trees.jsonl"
    wrong = wrong_field(
        {
            "prompt": isinstance(record.get("prompt"), str),
            "prompt_ids": are_counts(prompt_ids) and prompt_ids != [],
        }
    )
    for v, node in enumerate(nodes):
        if field := node_fault(node, v):
            wrong = wrong or f"nodes[{v}] {field}"
    return wrong and f"wrong {wrong}; label these steps again"


def node_fault(node, v: int) -> str | None:
    """Of node v of a tree; node 0 is the prompt, which is nobody's step."""
    if not isinstance(node, dict):
        return "is no object"
    parent, ids, n, wins = (node.get(name) for name in ("parent", "ids", "n", "wins"))
    return wrong_field(
        {
            "parent": parent == -1 if v == 0 else type(parent) is int and 0 <= parent < v,
            "ids": are_counts(ids) and (v == 0 or ids != []),
            "text": isinstance(node.get("text"), str),
            "draws": is_count(node.get("draws")),
            "n": is_count(n),
            "wins": is_number(wins) and is_count(n) and 0 <= wins <= n,
            "reward": node.get("reward", 2) is None or is_reward(node.get("reward")),
            "labelled": isinstance(node.get("labelled"), bool),
        }
    )


def evaluation_fault(record: dict) -> str | None:
    """Of a line of eval.jsonl: how good the greedy response was, and the sampled ones."""
    sampled = record.get("sampled")
    wrong = wrong_field(
        {
            "correct": isinstance(record.get("correct"), bool),
            "reward": is_number(record.get("reward")),
            "verdict": isinstance(record.get("verdict"), str),
            "finished": isinstance(record.get("finished"), bool),
            "sampled": isinstance(sampled, list),
        }
    )
    for line in () if wrong else sampled:
        is_whole = isinstance(line, dict) and isinstance(line.get("correct"), bool)
        if not (is_whole and is_number(line.get("reward"))):
            wrong = "sampled"
    return wrong and f"no line of evaluate.py, wrong {wrong}; pass an eval.jsonl"


# ------------------------------------------------------------ reading JSONL

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which Windows puts in front


def each_record(
    path, fault: Callable[[dict], str | None] | None = None, may_be_empty=False
) -> Iterator[dict]:
    """The records of a JSONL file, one by one. A line that cannot be used is an error that names it.

    fault: one of the ..._fault above; without it a record must have an id of its own, no more.
    """
    path, ids = Path(path), set()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; pass a .jsonl file")
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path, or run the stage that writes it")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.removeprefix(BYTE_ORDER_MARK).strip():
                continue
            where = f"{path}:{number}"
            record = parsed(line, where)
            name = record.get("id")
            wrong = fault and fault(record)
            if not wrong and (type(name) not in (str, int) or name == ""):
                wrong = "no id"
            if wrong:
                found = ", ".join(record) or "no JSON object"
                raise UserError(f"{where}: {wrong} (found: {found}); is this the right file?")
            if name in ids:
                raise UserError(f"{where}: the id {name!r} is there twice; make ids unique")
            ids.add(name)
            yield record
    if not ids and not may_be_empty:
        raise UserError(f"{path}: empty; one JSON object a line is wanted")


def parsed(line: bytes, where: str) -> dict:
    """The JSON object of a line; {} if it is JSON of another kind."""
    try:
        record = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode())
        if b"\\u" in line:  # half a surrogate pair is JSON, but no text
            dump(record)
    except (ValueError, RecursionError) as e:
        why = f"not JSON in UTF-8 ({e}); one object a line is wanted"
        raise UserError(f"{where}: {why}") from e
    return record if isinstance(record, dict) else {}


def read_jsonl(path, fault=None, may_be_empty=False) -> list[dict]:
    """All records of a JSONL file at once."""
    return list(each_record(path, fault, may_be_empty))


def read_problems(path) -> list[dict]:
    return read_jsonl(path, problem_fault)


def each_sample(path) -> Iterator[dict]:
    """The lines of samples.jsonl one by one: all of them may be more than memory holds."""
    return each_record(path, sample_fault)


def read_trees(path) -> list[dict]:
    records, known = [], {}
    for record in each_record(path, tree_fault):
        for node in record["nodes"]:
            # Equal token ids become one object: each takes 8 bytes of memory then, not 36.
            node["ids"] = [known.setdefault(i, i) for i in node["ids"]]
        records.append(record)
    return records
