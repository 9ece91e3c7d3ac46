"""What a stage writes: its manifest, its lock, and going on after a kill. It knows nothing of the algorithm."""

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

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError

from support.cli import UserError, first_line
from support.distributed import rank, wait_for_all
from support.records import digest, dump, each_record, replace, sha256

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------ manifests


def read_manifest(path) -> dict:
    """What the stage that made `path` stated about it; empty if no stage did.

    stage, settings, code, grader    whose output it is, its flags, {file: hash}, math-verify's version
    inputs, paths                    {name: hash} of what it was made from, and where that lay
    facts                            {fact: value}: the provenance that later stages must agree with
    output                           the output's hash; it is not there while the output is unfinished
    """
    manifest = Path(f"{path}.manifest.json")
    if not manifest.exists():
        return {}
    with suppress(ValueError):
        found = json.loads(manifest.read_text())
        if is_manifest(found):
            # They are stated from the output's folder, so that a run may be moved as a whole.
            paths = {name: manifest.parent / x for name, x in found.get("paths", {}).items()}
            return found | {"paths": {name: os.path.normpath(x) for name, x in paths.items()}}
    raise UserError(f"{manifest}: broken; remove it with its output, and make that again")


def is_manifest(found) -> bool:
    if not isinstance(found, dict):
        return False
    for name in ("settings", "code", "inputs", "facts"):
        if not isinstance(found.get(name), dict):
            return False
    texts = [found.get("stage"), found.get("grader"), found.get("output", "")]
    paths = found.get("paths", {})
    if not isinstance(paths, dict):
        return False
    return all(isinstance(x, str) for x in (*texts, *found["facts"].values(), *paths.values()))


def stated_by(path, fact: str, default: str = "") -> str:
    """A fact that the manifest beside `path` states; the default if it has none."""
    return read_manifest(path).get("facts", {}).get(fact, default)


def differences(old: dict, new: dict, defaults: dict) -> list[str]:
    """Why an output that was begun under manifest `old` is not the one that `new` would make, a line
    each; empty: it is. What only says how it is made does not count, nor does code.

    defaults   {flag: its default} of the flags that decide the output. A flag younger than `old` had
               its default then; one that is no more is not looked at

    {"settings": {"beta": 0.1}}, {"settings": {"beta": 0.2}} -> ["--beta was 0.1, is 0.2 now"]
    """
    found = []
    if old["stage"] != new["stage"]:
        found.append(f"made by {old['stage']}.py, this is {new['stage']}.py")
    for flag, default in defaults.items():
        before, now = old["settings"].get(flag, default), new["settings"][flag]
        if before != now:
            found.append(f"--{flag} was {before}, is {now} now")
    for name in sorted({*old["inputs"], *new["inputs"]}):
        if old["inputs"].get(name) != new["inputs"].get(name):
            found.append(of_other_files(origin(old, name), origin(new, name)))
    for fact in sorted({*old["facts"], *new.get("facts", old["facts"])}):
        before, now = old["facts"].get(fact), new.get("facts", old["facts"]).get(fact)
        if before != now:
            found.append(f"{fact} was {before}, is {now} now")
    if old["grader"] != new["grader"]:
        found.append(f"math-verify was {old['grader']}, is {new['grader']} now")
    return found


def disagreement(manifest: dict, new: dict, expects: dict) -> tuple[str, bool] | None:
    """How the manifest of an input does not fit: the first fact of `expects` that it states otherwise.

    -> (what is wrong, is it another file that was meant), or None if all agree or are not stated.
    """
    for fact, wanted in expects.items():
        stated = manifest.get("facts", {}).get(fact, wanted)
        if stated == wanted:
            continue
        name = next((name for name, x in manifest["inputs"].items() if x == stated), fact)
        old, now = origin(manifest, name), origin(new, fact)
        if name in manifest["paths"] and fact in new["paths"]:
            return of_other_files(old, now), old != now
        other = f"another {fact}" if is_hash(stated) else f"{fact} {stated}, this run has {wanted}"
        return f"made with {other}", False
    return None


def origin(manifest: dict, name: str) -> str:
    """Where an input lay; its hash or its name on the hub if that is not stated."""
    known = manifest["paths"].get(name) or manifest["inputs"].get(name, "nothing")
    return known[:16] if is_hash(known) else known


def is_hash(text: str) -> bool:
    return bool(re.fullmatch("[0-9a-f]{16,}", text))


def of_other_files(old: str, new: str) -> str:
    return f"{new} has changed since" if old == new else f"made from {old}, this is {new}"


# ------------------------------------------------------------ code


def code_of(script: str) -> dict[str, str]:
    """{file: hash} of a script and of all that it imports, or starts, from this repository."""
    found, waiting = {}, [script]
    while waiting:
        name = waiting.pop()
        path = ROOT / name
        if name not in found and path.exists():
            text = path.read_text("utf-8")
            found[name] = digest(text)[:16]
            for module, names in re.findall(
                r"^ *(?:from|import) ([\w.]+)(?: import ([\w, ]+))?", text, re.MULTILINE
            ):
                # `from support import judge` names a file too, `from support.judge import X` one
                inner = [f"{module}.{one.strip()}" for one in names.split(",")]
                waiting += [f"{one.replace('.', '/')}.py" for one in (module, *inner)]
            for started in re.findall(r'with_name\("(\w+\.py)"\)', text):  # as a process of its own
                waiting.append(str(Path(name).with_name(started)))
    return dict(sorted(found.items()))


def deciding_files() -> set[str]:
    """The files that decide what is right and where steps end: reward.py and all that it alone stands
    on, model.py, and tokens. Where one of them has changed, records made before and after are mixed."""
    return {*code_of("reward.py")} - {*code_of("model.py")} | {"model.py", "support/tokens.py"}


def changed_files(old: dict, new: dict) -> list[str]:
    """Names of the files of code that are not as they were."""
    before, now = old.get("code", {}), new["code"]
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


told = set()  # of which changed files this process has said so


def tell_of_changed_code(path, manifest: dict, new: dict):
    """Say once, not of every file of a run, that what decides a reward or a step is not as it was."""
    # A stage that does not import reward.py makes no rewards that could differ from these.
    both = deciding_files() & manifest.get("code", {}).keys() & new["code"].keys()
    changed = tuple(name for name in changed_files(manifest, new) if name in both)
    if changed and changed not in told:
        told.add(changed)
        taken = "all rewards and steps made by it are taken as they are"
        print(f"{path}: made with another {', '.join(changed)}; {taken}")


# ------------------------------------------------------------ outputs


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

    Started again with other settings, inputs or facts the stage is refused. Code is treated mildly,
    since people change it: rewards and steps made by other code are said to be so, once; only an
    output that is half done by another file of the stage itself is refused.

    script    "sample.py": whose output this is
    settings  the stage's dataclass; flags made with may_change=True may differ on the way
    inputs    {name: path}; an input made by a stage must be complete and as that stage left it
    """

    def __init__(self, script: str, out, settings, inputs: dict):
        self.path, self.inputs, self.force = Path(out), inputs, settings.force
        self.manifest_path, self.work = Path(f"{out}.manifest.json"), Path(f"{out}.work")
        self.began, self.done = time.perf_counter(), set()
        self.count, self.totals = None, Counter()  # of all records
        if self.path.exists() and not self.manifest_path.exists():
            raise UserError(f"{out}: there already, and not by this pipeline; choose another --out")
        if self.path.resolve() in [Path(path).resolve() for path in inputs.values()]:
            raise UserError(f"{out}: is an input too; choose another --out")
        left_out = {"out", "force", "server", "workers", "engines", *inputs}
        flags = {name: x for name, x in asdict(settings).items() if name not in left_out}
        self.defaults = {}
        for field in fields(settings):
            if field.name in flags and not field.metadata.get("may_change"):
                self.defaults[field.name] = field.default
        self.manifest = {
            "stage": script.removesuffix(".py"),
            "settings": flags,
            "code": code_of(script),
            "grader": version("math-verify"),
            "inputs": {name: checked_input(name, str(path)) for name, path in inputs.items()},
            "paths": {name: str(path) for name, path in inputs.items() if Path(path).exists()},
        }
        old = self._earlier()
        tell_of_changed_code(self.path, old, self.manifest)
        self.complete = "output" in old and self.path.exists()
        if self.complete:
            checked_input("out", str(self.path))
            self._drop_checkpoints()
            print(f"{self.path}: complete, nothing to do")

    def _earlier(self) -> dict:
        """The manifest of an earlier start, {} if there is none; an error if this is another run."""
        old = {} if self.force else read_manifest(self.path)
        if old and (found := differences(old, self.manifest, self.defaults)):
            raise UserError(f"{self.path}: {found[0]}; --force starts over, or change --out")
        own = f"{self.manifest['stage']}.py"
        if old and "output" not in old and own in changed_files(old, self.manifest):
            half = f"half done by another {own}"
            raise UserError(f"{self.path}: {half}; restore that, or --force starts over")
        return old

    @property
    def date(self) -> str:
        """The date of this run's prompts, for chat templates that ask for one: an earlier start's or
        an input's, so that a run over midnight has one date; else today's."""
        paths = sorted(self.inputs.values(), key=os.path.isdir)  # records, then models
        for path in paths if self.force else [self.path, *paths]:
            if stated := stated_by(path, "date"):
                return stated
        return datetime.date.today().isoformat()

    @contextmanager
    def open(
        self,
        provenance: dict | None = None,
        expects: dict | None = None,
        prefers: dict | None = None,
        count=None,
    ) -> Iterator["Output"]:
        """A block that writes the output. Of several processes all enter it; the first one writes.

        provenance   {fact: value} that the manifest states for the stages that come after
        expects      {fact: value} that inputs' manifests must agree with, where they state that fact
        prefers      likewise, but an input made from another file is taken, with a warning
        count        record -> {name: number}: their sums over all records are `totals`, which the
                     manifest states in the end
        """
        self._check_inputs(expects or {}, prefers or {})
        self.manifest["facts"], self.count = provenance or {}, count
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

    def _check_inputs(self, expects: dict, prefers: dict):
        for path in self.inputs.values():
            manifest = read_manifest(path)
            if not manifest:
                continue
            if found := disagreement(manifest, self.manifest, expects):
                raise UserError(f"{path}: {found[0]}; pass the same, or make this again")
            if found := disagreement(manifest, self.manifest, prefers):
                wrong, is_meant = found
                if not is_meant:
                    raise UserError(f"{path}: {wrong}; pass the same, or make this again")
                print(f"warning: {path}: {wrong}; taken as it is")
            if manifest["stage"] in ("sample", "label_steps"):  # critics and actors hold no rewards
                tell_of_changed_code(path, manifest, self.manifest)

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
            paths = self.manifest["paths"].items()
            paths = {name: os.path.relpath(path, self.path.parent) for name, path in paths}
            text = json.dumps(self.manifest | {"paths": paths}, indent=1)
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


# ------------------------------------------------------------ inputs


def checked_input(name: str, path: str) -> str:
    """Hash of an input; refuses an unfinished or changed one."""
    if not Path(path).exists():
        if name in ("actor", "base", "critic_model"):
            require_on_hub(path)
            return path
        raise UserError(f"{path}: no such file; check the path, or run the stage that writes it")
    found, manifest = sha256(path), read_manifest(path)
    if manifest and "output" not in manifest:
        raise UserError(f"{path}: unfinished; run {manifest['stage']}.py again with the same flags")
    if manifest and manifest["output"] != found:
        change = f"changed since {manifest['stage']}.py wrote it"
        raise UserError(f"{path}: {change}; restore it, or make it again with --force")
    return found


def require_on_hub(name: str):
    """Refuse what is neither a folder nor a model of the hub. The hub is asked once: loading would ask
    again and again for a minute, where a path is misspelt and there is no network."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except GatedRepoError:  # it is there; loading says what it asks for
        pass
    except Exception as e:
        wrong = f"no such folder, and no model of the hub ({first_line(e)})"
        raise UserError(f"{name}: {wrong}; check the path") from e


def fingerprint(model: str) -> str:
    """What identifies a model: the hash of its weights, or the name of one on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    weights = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin")]
    return digest("".join(sha256(file) for file in weights))


def tokenizer_provenance(lm) -> dict:
    """Hashes of the vocabulary, of the chat template and of a prompt: records made with others do
    not fit. And the date, if prompts have it (set lm.codec.date first)."""
    vocabulary = json.dumps(sorted(lm.tokenizer.get_vocab().items()))
    template = str(lm.tokenizer.chat_template)
    prompt = str(lm.prompt_ids("What is 2 + 3?"))
    hashes = {"tokenizer": vocabulary, "template": template, "prompt": prompt}
    provenance = {name: digest(text)[:16] for name, text in hashes.items()}
    return provenance | ({"date": lm.codec.date} if lm.codec.asks_for_date else {})


def actor_provenance(lm, max_new: int) -> dict:
    """What two stages must agree on if one's responses are to fit the other's."""
    provenance = {"actor": fingerprint(lm.path), "eos": str(lm.eos), "max_new": str(max_new)}
    provenance |= {"grader": version("math-verify"), "step": lm.step}
    return {**provenance, **tokenizer_provenance(lm)}
