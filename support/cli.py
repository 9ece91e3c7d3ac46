"""A command line: flags, users' mistakes in one line, progress. It knows nothing of the algorithm."""

import argparse
import errno
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import get_type_hints

from tqdm import tqdm
from transformers import HfArgumentParser

from support.distributed import leave, rank

# Data sets, programs and answers hold integers of more than 4,300 digits, which Python refuses to read.
sys.set_int_max_str_digits(0)


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend; exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as a line of ours has room for it."""
    return str(error).strip().split("\n")[0]


def flag(help: str, default=MISSING, least=None, most=math.inf, may_change=False):
    """A field of a stage's Settings: its line in --help, and the paper's value.

    least, most   of a number; without `least` it must be above 0, or 0 where that is the default
    may_change    it says how the output is made and not what it is: an output that is half done may
                  go on with another value
    """
    limits = {"least": least, "most": most, "may_change": may_change}
    return field(default=default, metadata={"help": help, **limits})


class Progress(tqdm):
    """A bar in a terminal; in a log a line a minute: done of all, tokens/s, time left."""

    def __init__(self, what: str, total: int, unit: str = "problems", initial: int = 0):
        self.counts, self.lock = Counter(), threading.Lock()
        form = {"desc": what, "total": total, "unit": f" {unit}", "initial": initial}
        form |= {"disable": rank() > 0, "smoothing": 0}  # time left: by the rate of all so far
        bar = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total}"
        form["bar_format"] = bar + " [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        if not sys.stderr.isatty():
            line = "{desc}: {n:.0f} of {total}{unit}{postfix}, {remaining} left"
            form |= {"bar_format": line, "delay": 60, "mininterval": 60, "maxinterval": 60}
        super().__init__(**form)

    @staticmethod
    def status_printer(file):
        """tqdm's way to write: over the last line in a terminal, a line of its own elsewhere."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: text.strip() and print(text.strip(), file=file, flush=True)

    def close(self):
        self.disable |= not sys.stderr.isatty()  # no last line of blanks
        super().close()

    def add(self, done: float = 0, **counts: int):
        """So much more is done (a part of a problem, too); counts: what to sum up beside it, such
        as tokens. Shown when it is time. Any thread may call it."""
        with self.lock:
            self.counts.update(counts)
            if self.disable:
                return
            self.n += done
            now = self._time()
            rate = self.counts["tokens"] / max(1e-9, now - self.start_t)
            self.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            if now - self.last_print_t >= self.mininterval and now - self.start_t >= self.delay:
                self.last_print_t = now
                self.refresh()


class Help(argparse.RawDescriptionHelpFormatter):
    """--help: the docstring as it is written; a default where there is one."""

    def _get_help_string(self, action):
        shown = not action.required and action.default not in (None, "", argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


def without_limits(settings_class):
    """The same dataclass with the help alone as metadata, which is all that HfArgumentParser bears."""
    types, flags = get_type_hints(settings_class), []
    for f in fields(settings_class):
        only_help = field(default=f.default, metadata={"help": f.metadata["help"]})
        flags.append((f.name, types[f.name], only_help))
    return make_dataclass(settings_class.__name__, flags)


def parse(settings_class, doc: str, words: list[str], script: str):
    """The Settings that these words of a command line give; UserError where they give none."""
    plain = without_limits(settings_class)
    parser = HfArgumentParser(plain, description=doc, formatter_class=Help, allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{script}: {message}; --help lists the flags")

    parser.error = refuse
    settings = settings_class(**vars(parser.parse_args(words)))
    check_numbers(settings)
    return settings


def main(stage, settings_class, doc: str):
    """Parse the flags and run the stage. What a user can mend is one line on stderr, see `explained`."""

    def stop(*_):  # a record in hand is dropped; a second Ctrl-C ends the process at once
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    if rank() > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    signal.signal(signal.SIGINT, stop)
    out = "the disk"
    try:
        settings = parse(settings_class, doc, sys.argv[1:], Path(sys.argv[0]).name)
        out = getattr(settings, "out", out)
        stage(settings)
        return leave()
    except (Exception, KeyboardInterrupt) as error:
        found = explained(error, out)
        if found is None:
            sys.stderr = sys.__stderr__  # whichever process met it shows it whole
            raise
        code, line = found
    if rank() > 0 and code != 130:  # If the first process has met it too, it says it, and torchrun
        time.sleep(3)  # ends this one meanwhile; else nobody but this one knows.
        sys.stderr = sys.__stderr__
    print(*line.splitlines(), file=sys.stderr)
    sys.exit(code)


def explained(error: BaseException, out: str) -> tuple[int, str] | None:
    """(exit code, line) of an error that is not our own fault; None of one that is.

    2: the user can mend it. 1: the machine's fault, and the same command goes on. 130: Ctrl-C.
    """
    match error:
        case UserError():
            return 2, f"error: {error}"
        case FileNotFoundError() | FileExistsError() | PermissionError() | NotADirectoryError():
            return 2, f"error: {error.filename}: {error.strerror}"
        case ConnectionError():  # of a server
            return 1, f"error: {error}; nothing is lost, the same command goes on"
        case OSError():
            room = "make room, " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            wrong = f"{error.filename or out}: {error.strerror or error}"
            return 1, f"error: {wrong}; {room}the same command goes on"
        case KeyboardInterrupt():
            # Without --force, and without the stage that run.py's names.
            again = re.sub(r" --force\b(=\S+| (?!-)\S+)?", "", shlex.join(sys.argv))
            return 130, f"stopped; to go on: python {again}"
    return None


def check_numbers(settings):
    """Refuse numbers outside of what their flag allows. A default is never refused: -1 or inf may
    stand for something."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value == f.default:
            continue
        least, most = f.metadata.get("least"), f.metadata.get("most", math.inf)
        least = 0 if least is None and f.default == 0 else least
        above = value > 0 if least is None else value >= least
        if not (above and value <= most and value < math.inf):
            wanted = "above 0" if least is None else f"{least} or more"
            wanted += f", at most {most}" if most < math.inf else ""
            raise UserError(f"--{f.name} {value}: wanted a finite number, {wanted}")
