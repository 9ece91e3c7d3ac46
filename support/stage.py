"""stage. It knows nothing of the algorithm."""

import datetime
import fcntl
import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from types import EllipsisType

from support.cli import UserError, held_locks
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


class Stage:
    """One output of one stage: its lock, its manifest, and for JSONL its records.

    The manifest `OUT.manifest.json` holds settings, code, hashes of the inputs, and facts. Started
    again with the same ones, the stage goes on where it stopped (`done`: the ids of the records
    that are there); with others it is refused. Code is treated mildly, since people change it: a
    difference is a warning, unless the output is half done and the stage's own file is another now.
    The order of calls: Stage(...) only looks, and `complete` says that nothing is left to do,
    before any model is loaded; `begin` locks the folder and finds what is done; `start` writes the
    manifest (`append` does it for JSONL); `append` or `finish(folder)` write the output.

    script    "sample.py": whose output this is
    inputs    {name: path}; an input made by a stage must be complete and as that stage left it
    """

    TRUTH = ("model.py", "reward.py", "support/tokens.py")  # where steps end, and what is right

    def __init__(self, script: str, out, settings, inputs: dict):
        self.out, self.inputs, self.force = Path(out), inputs, settings.force
        self.path, self.work = Path(f"{out}.manifest.json"), Path(f"{out}.work")
        self.began, self.done = time.perf_counter(), set()
        if self.out.exists() and not self.path.exists():
            raise UserError(f"{out}: there already, and not by this pipeline; choose another --out")
        if self.out.resolve() in [Path(path).resolve() for path in inputs.values()]:
            raise UserError(f"{out}: is an input too; choose another --out")
        flags = {
            k: v
            for k, v in asdict(settings).items()
            if k not in ("out", "force", "server", *inputs)
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
        self.complete = "output" in self._earlier() and self.out.exists()
        if self.complete:
            _checked_input("out", str(self.out))
            self._drop_checkpoints()
            print(f"{self.out}: complete, nothing to do")

    @property
    def date(self) -> str:
        """The date of this run's prompts, for chat templates that ask for one: an earlier start's or
        an input's, so that a run over midnight has one date; else today's."""
        paths = sorted(self.inputs.values(), key=os.path.isdir)  # records, then models
        for path in paths if self.force else [self.out, *paths]:
            if stated := stated_by(path, "date"):
                return stated
        return datetime.date.today().isoformat()

    def _earlier(self) -> dict:
        """The manifest of an earlier start, {} if there is none; an error if this is another run."""
        old = {} if self.force else read_manifest(self.out)
        if not old:
            return {}
        # A flag younger than it had its default; one that is no more is not compared.
        was = {name: old["settings"].get(name, x) for name, x in self.defaults.items()}
        now = {name: self.manifest["settings"][name] for name in self.defaults}
        facts = self.manifest.get("facts", old["facts"])  # they come with `begin`
        new = self.manifest | {"settings": now, "facts": facts}
        if found := differences(old | {"settings": was}, new):
            raise UserError(f"{self.out}: {found[0]}; --force starts over, or change --out")
        changed = changed_files(old, self.manifest)
        own = f"{self.manifest['stage']}.py"
        if own in changed and "output" not in old:
            half = f"half done by another {own}"
            raise UserError(f"{self.out}: {half}; restore that, or --force starts over")
        if changed and self.manifest.get("facts") is None:  # say it once
            print(f"{self.out}: made with another {', '.join(changed)}; taken as it is")
        return old

    def begin(self, facts: dict | None = None, expects: dict | None = None):
        """Take the folder's lock and find the records that are there; a torn last line is dropped.

        facts     {fact: value} that the manifest states for the stages that come after
        expects   {fact: value} that inputs' manifests must agree with, where they state that fact
        """
        for path in self.inputs.values():
            made = read_manifest(path)
            for fact, now in (expects or {}).items():
                was = made.get("facts", {}).get(fact, now)
                if was != now:
                    wrong = f"made with {fact} {was[:16]}, this run has {now[:16]}"
                    raise UserError(f"{path}: {wrong}; pass that {fact}, or make it anew")
            if made.get("stage") in ("sample", "label_steps"):
                other = [f for f in changed_files(made, self.manifest) if f in self.TRUTH]
                if other:
                    taken = "its rewards and steps are taken as they are"
                    print(f"{path}: made with another {', '.join(other)}; {taken}")
        self.manifest["facts"] = facts or {}
        if rank() == 0:
            self._own_folder()
        wait_for_all()
        if self.out.is_file():
            self.done = {record["id"] for record in each_record(self.out, may_be_empty=True)}
            if self.done:
                print(f"{self.out}: resuming after {len(self.done)} records")
        return self

    def _own_folder(self):
        """Lock the folder and make the output fit to go on from; with --force throw it away."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        while held_locks:  # a notebook's last stage may have ended in an error
            held_locks.pop().close()
        self.lock = (self.out.parent / ".lock").open("w")
        held_locks.append(self.lock)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.out.parent}: another stage is writing here; wait") from None
        self._earlier()
        # The manifest goes last: a kill in between leaves the rest owned.
        for path in (self.out, self.work, self.path) if self.force else ():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.out.is_file():
            with self.out.open("rb") as lines:
                whole = sum(len(line) for line in lines if line.endswith(b"\n"))
            torn = self.out.stat().st_size - whole
            if torn:
                print(f"{self.out}: dropped a torn last line of {torn} bytes")
                os.truncate(self.out, whole)

    def start(self):
        """Write the manifest; a run that was refused before this leaves nothing behind."""
        if rank() > 0:
            return
        replace(self.path, lambda p: p.write_text(json.dumps(self.manifest, indent=1)))

    def append(self, records: list[dict]):
        """Write whole lines, flushed and fsynced before the next ones are made."""
        if rank() > 0:
            return
        if not self.out.exists():
            self.start()
            replace(self.out, Path.touch)
        with self.out.open("ab") as f:
            f.write(b"".join(dump(record) for record in records))
            f.flush()
            os.fsync(f.fileno())

    def finish(self, folder=None):
        """State that the output is whole; `folder(path)`, if given, writes it as a folder first.

        Of several processes all call `folder`, since each has a part of the weights; one writes.
        """
        if rank() > 0:
            if folder is not None:
                folder(self.out)
            wait_for_all()
            return
        if folder is not None:
            replace(self.out, folder)
        elif not self.out.exists():
            self.append([])
        self.manifest["output"] = sha256(self.out)
        self.start()
        self._drop_checkpoints()
        self.lock.close()
        wait_for_all()
        print(f"{self.out}: written, {time.perf_counter() - self.began:.0f} s")

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
