"""records. It knows nothing of the algorithm."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import EllipsisType
from typing import get_args

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


LARGEST = 1 << 62  # integers beyond it do not fit into a tensor


def misfit(value, shape, name: str = "") -> str | None:
    """Where a value first differs from a shape; None if it fits.

    A shape is a type or a union of types, [the shape of each item] or {field: its shape}; a field
    whose shape includes EllipsisType may be missing.
    {"ids": [3, "4"]} against {"ids": [int]} -> "ids[1]"
    """
    if isinstance(shape, list) and isinstance(value, list):
        # Token ids are looked at all together: one by one takes minutes at full size.
        ints = shape == [int] and set(map(type, value)) == {int}
        if ints and -LARGEST < min(value) and max(value) < LARGEST:
            return None
        for i, item in enumerate(value):
            if found := misfit(item, shape[0], f"{name}[{i}]"):
                return found
        return None
    if isinstance(shape, dict) and isinstance(value, dict):
        for field, inner in shape.items():
            if found := misfit(value.get(field, ...), inner, f"{name} {field}".strip()):
                return found
        return None
    wanted = get_args(shape) or (shape,)
    # type() and not isinstance(), for which True would be an int
    fits = type(value) in wanted and not (type(value) is int and abs(value) >= LARGEST)
    return None if fits else name or "all of it"


KINDS = {"id": str | int, "prompt": str, "answer": str, "tests": dict}


KINDS |= {"prompt_ids": list, "nodes": list, "responses": list}


TESTS_SHAPE = {"setup": str | EllipsisType, "outputs": list | EllipsisType}


def unusable(record: dict, needs: tuple[str, ...]) -> list[str]:
    """The fields of `needs` that a record lacks, or that are empty or of another type."""
    if record.get("tests") and misfit(record["tests"], TESTS_SHAPE):
        return ["tests"]
    missing = []
    for need in needs:
        for name in need.split(" or "):
            value = record.get(name)
            if isinstance(value, KINDS[name]) and value not in ("", [], {}):
                break
        else:
            missing.append(need)
    return missing


def each_record(path, needs: tuple[str, ...] = ("id",), may_be_empty=False) -> Iterator[dict]:
    """The records of a JSONL file, one by one. A broken line is an error that names file and line.

    needs: fields that must be there and not empty; "answer or tests": one of them.
    """
    path, ids = Path(path), set()
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path, or run the stage that writes it")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where, line = f"{path}:{number}", line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
                if b"\\u" in line:  # half a surrogate pair is JSON, but no text
                    dump(record)
            except (ValueError, RecursionError) as e:
                why = f"not JSON in UTF-8 ({e}); one object a line is wanted"
                raise UserError(f"{where}: {why}") from e
            record = record if isinstance(record, dict) else {}
            if missing := unusable(record, needs):
                found = (
                    f"no usable {', '.join(missing)} (found: {', '.join(record) or 'no object'})"
                )
                sets = " prepare.py makes problems of data sets" if "prompt" in needs else ""
                raise UserError(f"{where}: {found}; is this the right file?{sets}")
            if record["id"] in ids:
                raise UserError(f"{where}: the id {record['id']!r} is there twice; make ids unique")
            ids.add(record["id"])
            yield record
    if not ids and not may_be_empty:
        raise UserError(f"{path}: empty; one JSON object a line is wanted")


def read_jsonl(path, needs: tuple[str, ...] = ("id",), may_be_empty=False) -> list[dict]:
    """All records of a JSONL file at once."""
    return list(each_record(path, needs, may_be_empty))


REWARD = int | float  # from 0 to 1


RESPONSE = {"ids": [int], "ends": [int], "text": str, "reward": REWARD, "finished": bool}


def each_sample(path: str) -> Iterator[dict]:
    """The lines of samples.jsonl one by one: offsets that cut steps, and choices that exist."""
    for record in each_record(path, ("id", "prompt_ids", "responses")):
        if bad := broken_samples(record):
            raise UserError(f"{path}: {record['id']}, {bad}: no samples; make them anew")
        yield record


def broken_samples(record: dict) -> str | None:
    """What is wrong with a line of samples.jsonl; None if nothing is."""
    if bad := misfit(record, {"prompt_ids": [int], "kept": [int], "responses": [RESPONSE]}):
        return bad
    for response in record["responses"]:
        ends = [0, *response["ends"]]
        if ends != sorted({*ends, len(response["ids"])}):
            return "ends"
        if not 0 <= response["reward"] <= 1:
            return "reward"
    if not {*record["kept"]} <= {*range(len(record["responses"]))}:
        return "kept"
    return None


NODE = {"parent": int, "ids": [int], "text": str, "draws": int, "n": int, "wins": REWARD}


NODE |= {"reward": REWARD | None, "labelled": bool}


def read_trees(path: str) -> list[dict]:
    """trees.jsonl, looked at whole: a tree that is none would be trained on without a word."""
    records, known = [], {}
    for record in each_record(path, ("id", "prompt_ids", "nodes")):
        if bad := broken_tree(record):
            raise UserError(f"{path}: {record['id']}, {bad}: no step tree; make it anew")
        for node in record["nodes"]:
            share_numbers(node, known)
        records.append(record)
    return records


def share_numbers(node: dict, known: dict[int, int]):
    """Make equal token ids one object: in a list each takes 8 bytes of memory then, not 36."""
    node["ids"] = [known.setdefault(i, i) for i in node["ids"]]


def broken_tree(record: dict) -> str | None:
    """What is wrong with a line of trees.jsonl; None if it is a step tree."""
    shape = {"prompt": str | EllipsisType, "prompt_ids": [int], "nodes": [NODE]}
    if bad := misfit(record, shape):
        return bad
    for v, node in enumerate(record["nodes"]):
        grows = node["parent"] in range(v) and node["ids"] if v else node["parent"] == -1
        counts = 0 <= node["wins"] <= node["n"] and node["draws"] >= 0
        if not (grows and counts):
            return f"nodes[{v}]"
        if not 0 <= (node["reward"] or 0) <= 1:
            return f"nodes[{v}] reward"
    return None
