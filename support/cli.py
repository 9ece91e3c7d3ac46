"""cli. It knows nothing of the algorithm."""

import argparse
import errno
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import MISSING, field, fields
from pathlib import Path

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


def flag(help: str, default=MISSING):
    """A field of a stage's Settings: its line in --help, and the paper's value."""
    return field(default=default, metadata={"help": help})


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


def parse(settings_class, doc: str, words: list[str], script: str):
    """The Settings that these words of a command line give; UserError where they give none."""
    parser = HfArgumentParser(
        settings_class, description=doc, formatter_class=Help, allow_abbrev=False
    )

    def refuse(message):
        raise UserError(f"{script}: {message}; --help lists the flags")

    parser.error = refuse
    settings = settings_class(**vars(parser.parse_args(words)))
    check_numbers(settings)
    return settings


def main(stage, settings_class, doc: str):
    """Parse the flags, run the stage, turn users' mistakes into one line on stderr and code 2."""

    def stop(*_):  # a record in hand is dropped; a second Ctrl-C ends the process at once
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    if rank() > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    signal.signal(signal.SIGINT, stop)
    try:
        settings = parse(settings_class, doc, sys.argv[1:], Path(sys.argv[0]).name)
        stage(settings)
        return leave()
    except UserError as e:
        code, line = 2, f"error: {e}"
    except (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError) as e:
        code, line = 2, f"error: {e.filename}: {e.strerror}"
    except ConnectionError as e:  # of a server
        code, line = 1, f"error: {e}; nothing is lost, the same command goes on"
    except OSError as e:
        room = "make room, " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        where = e.filename or getattr(settings, "out", "the disk")
        code, line = 1, f"error: {where}: {e.strerror or e}; {room}the same command goes on"
    except KeyboardInterrupt:
        again = shlex.join(a for a in sys.argv if a != "--force")
        code, line = 130, f"stopped; to go on: python {again}"
    except Exception:
        sys.stderr = sys.__stderr__  # our own fault, whichever process found it, is shown whole
        raise
    if rank() > 0 and code != 130:  # If the first process has met it too, it says it, and torchrun
        time.sleep(3)  # ends this one meanwhile; else nobody but this one knows.
        sys.stderr = sys.__stderr__
    print(*line.splitlines(), file=sys.stderr)
    sys.exit(code)


def check_numbers(settings):
    """Refuse numbers that are negative or not finite, and 0 unless it is the default or has a use."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        zero = f.name in (
            "m",
            "kappa",
            "gap",
            "valid_share",
            "token_share",
            "clean_seed",
            "careless",
        )
        good = isinstance(value, bool) or value == f.default or (value == 0 and zero)
        if isinstance(value, int | float) and not (good or 0 < value < math.inf):
            raise UserError(f"--{f.name} {value}: wanted a finite number above 0")
