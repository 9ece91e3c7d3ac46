"""What a stage writes: its manifest, its lock, going on after a kill. It knows nothing of the algorithm."""

import datetime
import fcntl
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from types import EllipsisType

from support.cli import UserError
from support.distributed import rank, wait_for_all
from support.records import digest, dump, each_record, misfit, replace, sha256

ROOT = Path(__file__).parents[1]
MANIFEST = {"stage": str, "settings": dict, "code": dict, "grader": str, "inputs": dict}


MANIFEST |= {"facts": dict, "output": str | EllipsisType}  # no output yet: unfinished


def read_manifest(path: Path) -> dict:
    """What the stage that made `path` stated about it; empty if no stage did."""
    manifest = Path(f"{path}.manifest.json")
    if not manifest.exists():
        return {}
    with suppress(ValueError):
        made = json.loads(manifest.read_text())
        if not misfit(made, MANIFEST) and all(isinstance(v, str) for v in made["facts"].values()):
            return made
    raise UserError(f"{manifest}: broken; remove it with its output, and make that anew")


def stated_by(path, fact: str, default: str = "") -> str:
    """A fact that the manifest beside `path` states; the default if it has none."""
    return read_manifest(path).get("facts", {}).get(fact, default)


def differences(old: dict, new: dict) -> list[str]:
    """How one manifest differs from another, a line a field: what it was and what it is now.

    {"settings": {"beta": 0.1}}, {"settings": {"beta": 0.2}} -> ["settings beta was 0.1, is 0.2 now"]
    """
    found = []
    for part in ("stage", "settings", "inputs", "facts", "grader"):
        was, now = old.get(part), new.get(part)
        if not isinstance(was, dict) or not isinstance(now, dict):
            was, now, part = {part: was}, {part: now}, ""
        for name in sorted({*was, *now}):
            if was.get(name) != now.get(name):
                what = f"{part} {name}".strip()
                found.append(f"{what} was {was.get(name)}, is {now.get(name)} now")
    return found


def code_of(script: str) -> dict[str, str]:
    """{file: hash} of a stage's script and of all that it imports from this repository."""
    found, waiting = {}, [script]
    while waiting:
        name = waiting.pop()
        path = ROOT / name
        if name not in found and path.exists():
            text = path.read_text("utf-8")
            found[name] = digest(text)[:16]
            for module in re.findall(r"^(?:from|import) ([\w.]+)", text, re.MULTILINE):
                waiting.append(f"{module.replace('.', '/')}.py")
    return dict(sorted(found.items()))


def changed_files(old: dict, new: dict) -> list[str]:
    """Names of the files of code that are not as they were."""
    was, now = old["code"], new["code"]
    return [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one stage at a time writes into a folder; another one is refused at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another stage is writing here; wait") from None
        yield


class Output:
    """One output of one stage: a JSONL file or a folder, and the manifest that says what made it.

        output = Output("sample.py", s.out, s, {"problems": s.problems})
        if output.complete:
            return
        with output.open({"problems": sha256(s.problems)}) as out:
            out.append(records)    # to a JSONL file; a folder is written by out.save(write)

    Output(...) only looks, so that a stage with nothing left to do says so before a model is loaded.
    Within the block the folder is locked, and `done` holds the ids of the records that are there. A
    block that comes to its end states that the output is whole. One that ends in an error leaves it
    half done, and the same command goes on with it.

    The manifest `OUT.manifest.json` holds settings, code, hashes of the inputs, and facts. With
    others the stage is refused. Code is treated mildly, since people change it: a difference is a
    warning, unless the output is half done and the stage's own file is another now.

    script    "sample.py": whose output this is
    inputs    {name: path}; an input made by a stage must be complete and as that stage left it
    """

    TRUTH = ("model.py", "reward.py", "support/tokens.py")  # where steps end, and what is right

    def __init__(self, script: str, out, settings, inputs: dict):
        self.path, self.inputs, self.force = Path(out), inputs, settings.force
        self.manifest_path, self.work = Path(f"{out}.manifest.json"), Path(f"{out}.work")
        self.began, self.done = time.perf_counter(), set()
        self.count, self.totals = None, Counter()  # of all records
        if self.path.exists() and not self.manifest_path.exists():
            raise UserError(f"{out}: there already, and not by this pipeline; choose another --out")
        if self.path.resolve() in [Path(path).resolve() for path in inputs.values()]:
            raise UserError(f"{out}: is an input too; choose another --out")
        flags = {
            k: v
            for k, v in asdict(settings).items()
            if k not in ("out", "force", "server", "workers", "engines", *inputs)
        }
        # How the output is made and not what it is: a half-done one may go on with another.
        how = {"budget", "save_minutes", "unsafe"} | ({"batch"} if "max_new" in flags else set())
        self.defaults = {
            f.name: f.default for f in fields(settings) if f.name in flags.keys() - how
        }
        self.manifest = {
            "stage": script.removesuffix(".py"),
            "settings": flags,
            "code": code_of(script),
            "grader": version("math-verify"),
            "inputs": {key: _checked_input(key, str(path)) for key, path in inputs.items()},
        }
        self.complete = "output" in self._earlier() and self.path.exists()
        if self.complete:
            _checked_input("out", str(self.path))
            self._drop_checkpoints()
            print(f"{self.path}: complete, nothing to do")

    @property
    def date(self) -> str:
        """The date of this run's prompts, for chat templates that ask for one: an earlier start's or
        an input's, so that a run over midnight has one date; else today's."""
        paths = sorted(self.inputs.values(), key=os.path.isdir)  # records, then models
        for path in paths if self.force else [self.path, *paths]:
            if stated := stated_by(path, "date"):
                return stated
        return datetime.date.today().isoformat()

    def _earlier(self) -> dict:
        """The manifest of an earlier start, {} if there is none; an error if this is another run."""
        old = {} if self.force else read_manifest(self.path)
        if not old:
            return {}
        # A flag younger than it had its default; one that is no more is not compared.
        was = {name: old["settings"].get(name, x) for name, x in self.defaults.items()}
        now = {name: self.manifest["settings"][name] for name in self.defaults}
        facts = self.manifest.get("facts", old["facts"])  # they come with `open`
        new = self.manifest | {"settings": now, "facts": facts}
        if found := differences(old | {"settings": was}, new):
            raise UserError(f"{self.path}: {found[0]}; --force starts over, or change --out")
        changed = changed_files(old, self.manifest)
        own = f"{self.manifest['stage']}.py"
        if own in changed and "output" not in old:
            half = f"half done by another {own}"
            raise UserError(f"{self.path}: {half}; restore that, or --force starts over")
        if changed and self.manifest.get("facts") is None:  # say it once
            print(f"{self.path}: made with another {', '.join(changed)}; taken as it is")
        return old

    @contextmanager
    def open(
        self, facts: dict | None = None, expects: dict | None = None, count=None
    ) -> Iterator["Output"]:
        """A block that writes the output. Of several processes all enter it; the first one writes.

        count     record -> {name: number}: their sums over all records are `totals`, which the
                  manifest states in the end
        facts     {fact: value} that the manifest states for the stages that come after
        expects   {fact: value} that inputs' manifests must agree with, where they state that fact
        """
        self._check_inputs(expects or {})
        self.manifest["facts"], self.count = facts or {}, count
        with locked(self.path.parent) if rank() == 0 else nullcontext():
            if rank() == 0:
                self._clean()
            wait_for_all()
            if self.path.is_file():
                for record in each_record(self.path, may_be_empty=True):
                    self.done.add(record["id"])
                    self.totals.update(count(record) if count else {})
                if self.done:
                    print(f"{self.path}: resuming after {len(self.done)} records")
            yield self
            if rank() == 0:
                self._finish()
        wait_for_all()
        print(f"{self.path}: written, {time.perf_counter() - self.began:.0f} s")

    def _check_inputs(self, expects: dict):
        for path in self.inputs.values():
            made = read_manifest(path)
            for fact, now in expects.items():
                was = made.get("facts", {}).get(fact, now)
                if was != now:
                    wrong = f"made with {fact} {was[:16]}, this run has {now[:16]}"
                    raise UserError(f"{path}: {wrong}; pass that {fact}, or make it anew")
            if made.get("stage") in ("sample", "label_steps"):
                other = [f for f in changed_files(made, self.manifest) if f in self.TRUTH]
                if other:
                    taken = "its rewards and steps are taken as they are"
                    print(f"{path}: made with another {', '.join(other)}; {taken}")

    def _clean(self):
        """Make what is there fit to go on from: without a torn last line; with --force nothing."""
        self._earlier()  # another process may have written since this one looked
        # The manifest goes last: a kill in between leaves the rest owned.
        for path in (self.path, self.work, self.manifest_path) if self.force else ():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.path.is_file():
            with self.path.open("rb") as lines:
                whole = sum(len(line) for line in lines if line.endswith(b"\n"))
            torn = self.path.stat().st_size - whole
            if torn:
                print(f"{self.path}: dropped a torn last line of {torn} bytes")
                os.truncate(self.path, whole)

    def write_manifest(self, **more):
        """Claim the output for these settings, before anything of it is there. `append` does so too; a
        stage that makes a folder calls this when nothing can be refused any more, since a run that
        was refused must leave nothing behind that refuses the corrected one."""
        self.manifest |= more
        if rank() == 0:
            text = json.dumps(self.manifest, indent=1)
            replace(self.manifest_path, lambda path: path.write_text(text))

    def append(self, records: list[dict]):
        """Write whole lines, flushed and fsynced before the next ones are made."""
        if rank() > 0:
            return
        if not self.path.exists():
            self.write_manifest()
            replace(self.path, Path.touch)
        with self.path.open("ab") as f:
            f.write(b"".join(dump(record) for record in records))
            f.flush()
            os.fsync(f.fileno())
        for record in records if self.count else ():
            self.totals.update(self.count(record))

    def save(self, write):
        """Write the output as a folder, by `write(path)`. Of several processes all call it, since each
        has a part of the weights."""
        if rank() == 0:
            replace(self.path, write)
        else:
            write(self.path)

    def _finish(self):
        if not self.path.exists():
            self.append([])
        if self.totals:
            self.manifest["totals"] = dict(self.totals)
        self.write_manifest(output=sha256(self.path))
        self._drop_checkpoints()

    def _drop_checkpoints(self):
        """Of a finished stage: of an 8B model they take 96 GB each. A kill may leave some behind,
        which the next start drops."""
        if rank() == 0:
            for checkpoint in [*self.work.rglob("step-*")]:
                shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()


def _checked_input(key: str, path: str) -> str:
    """Hash of an input; refuses an unfinished or changed one."""
    if not Path(path).exists():
        if key in ("actor", "base", "critic_model"):
            return path  # a hub id
        raise UserError(f"{path}: no such file; check the path, or run the stage that writes it")
    found, made = sha256(path), read_manifest(path)
    if made and "output" not in made:
        raise UserError(f"{path}: unfinished; run {made['stage']}.py again with the same flags")
    if made and made["output"] != found:
        change = f"changed since {made['stage']}.py wrote it"
        raise UserError(f"{path}: {change}; restore it, or make it anew with --force")
    return found


def fingerprint(model: str) -> str:
    """What identifies a model: the hash of its weights, or the name of one on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    weights = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin")]
    return digest("".join(sha256(file) for file in weights))


def tokenizer_facts(lm) -> dict:
    """Hashes of the vocabulary, of the chat template and of a prompt: records made with others do
    not fit. And the date, if prompts have it (set lm.codec.date first)."""
    vocabulary = json.dumps(sorted(lm.tokenizer.get_vocab().items()))
    template = str(lm.tokenizer.chat_template)
    prompt = str(lm.prompt_ids("What is 2 + 3?"))
    hashes = {"tokenizer": vocabulary, "template": template, "prompt": prompt}
    facts = {name: digest(text)[:16] for name, text in hashes.items()}
    return facts | ({"date": lm.codec.date} if lm.codec.asks_for_date else {})


def actor_facts(lm, max_new: int) -> dict:
    """What two stages must agree on if one's responses are to fit the other's."""
    facts = {"actor": fingerprint(lm.path), "eos": str(lm.eos), "max_new": str(max_new)}
    facts |= {"grader": version("math-verify"), "step": lm.step}
    return {**facts, **tokenizer_facts(lm)}
