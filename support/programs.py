"""Finds the program in a response: which of its code blocks, and what of the others it needs. It knows
nothing of the algorithm.

Models write code between fences of back ticks or tildes, and get fences wrong in many ways: they
leave one open, open one behind words, close one behind the last line of code, quote one in a
docstring. And the last block is not always the program: it may be its tests or its output.

Read from top to bottom: the choice among the blocks; fences; what names a block gives and uses.
"""

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from bisect import bisect_left
from typing import NamedTuple

DEFINES = re.compile(r"^(async def|def|class) ", re.MULTILINE)
STARTS = re.compile(r"^(import |from |async def |def |class |@)", re.MULTILINE)
READS = re.compile(r"\binput\(|\bstdin\b|\bopen\(0\b")  # standard input


class Block(NamedTuple):
    label: str  # what stands behind the opening fence: "python"
    code: str

    @property
    def is_program(self) -> bool:
        """By its label, or by what it defines or reads; a session (">>> f(2)") is none."""
        if self.label.startswith("pycon") or self.code.startswith(">>> "):
            return False
        acts = DEFINES.search(self.code) or READS.search(self.code)
        return self.label.startswith("py") or acts is not None


def extract_program(setup: str, text: str, entry: str | None = None) -> str | None:
    """The program in a response, None if there is none.

    setup   code that the problem's tests run first; of HumanEval's kind it opens a function that the
            response may complete by its body alone
    entry   the function that is tested, where there is one
    """
    opened = setup if re.search(r"^def \w+\(", setup, re.MULTILINE) else ""
    # Tokenizers of SentencePiece's kind put a space before a response, which is no indentation.
    if not opened or STARTS.match(text.removeprefix(" ")):
        text = text.removeprefix(" ")
    thoughts, ended, answer = text.rpartition("</think>")
    if ended and (found := program_in(answer, opened, entry)):
        return found
    return program_in(thoughts if ended else text, opened, entry)


def program_in(text: str, opened: str, entry: str | None) -> str | None:
    """opened: code that ends in a function without a body, or empty."""
    before, blocks = split_blocks(text)
    if opened and (whole := completed(opened, before)):
        return whole
    if DEFINES.search(before):  # code without an opening fence: all from the margin on
        blocks.insert(0, Block("python", without_words(before[STARTS.search(before).start() :])))
    if blocks:
        return from_blocks(blocks, opened, entry)
    if opened:  # a body that is no Python is an error, and words are no answer
        body = as_far_as_the_margin(before)
        return f"{opened.rstrip()}\n{body}" if body.strip() else None
    return text if parsed(text).body else None


def from_blocks(blocks: list[Block], opened: str, entry: str | None) -> str:
    """The program of a response with code blocks: the last one that defines what is tested, or reads
    the input, or at least is no test of another."""
    codes = [b.code for b in blocks if b.is_program or (opened and completed(opened, b.code))]
    codes = codes or [without_prompts(blocks[-1].code)]
    known = definitions(codes) if len(codes) > 1 else {}
    if entry:
        fit = [code for code in codes if entry in names_defined(code, methods=True)]
    else:
        fit = [code for code in codes if READS.search(with_helpers(code, known))]
    if not fit:
        others = [*codes, f"{opened.rstrip()}\n    pass"] if opened else codes
        defined = [(code, names_defined(code)) for code in others]
        fit = [code for code in codes if not only_tests(code, defined)] or codes
        if opened and (whole := completed(opened, with_helpers(fit[-1], known))):
            return whole
    return with_helpers(fit[-1], known)


def completed(opened: str, code: str) -> str | None:
    """`opened` with this code for its function's body, None if that is no program. Bodies come indented,
    not indented, or with an indentation that their first line has lost."""
    bodies = [as_far_as_the_margin(code)]
    if not compiles(code):  # for it has a `return`
        bodies += [textwrap.indent(code, "    "), f"    {code}"]
    for body in bodies:
        whole = f"{opened.rstrip()}\n{body}"
        if body.strip() and compiles(whole):
            return with_helpers(whole, definitions([code[len(body) :]]))
    return None


def as_far_as_the_margin(code: str) -> str:
    """The indented lines with which it begins."""
    return re.split(r"^(?=\S)", code, maxsplit=1, flags=re.MULTILINE)[0]


def without_prompts(code: str) -> str:
    """The statements of an interactive session; other code as it is."""
    if not code.startswith(">>> "):
        return code
    typed = [line[4:] for line in code.split("\n") if line.startswith((">>>", "..."))]
    return "\n".join([*typed, ""])


def without_words(code: str) -> str:
    """A program without the words behind it; as it is if they are none, but code that is no Python."""
    try:
        ast.parse(code, "program")
    except SyntaxError as error:
        lines = code.split("\n")
        wrong = (error.lineno or 1) - 1
        program, words = "\n".join([*lines[:wrong], ""]), "\n".join(lines[wrong:])
        if re.match(r"\S", words) and not STARTS.search(words) and is_python(program):
            return program
    except NO_PYTHON:
        pass
    return code


# ------------------------------------------------------------ fences

# An opening fence stands alone, or behind words ("So: ```python"); ```python title="a.py" is one, too.
OPENING = re.compile(
    r"(?P<words>[^`~]*)(?P<fence>`{3,}|~{3,}) *\{?\.?(?P<label>\w*)(?P<rest>[^`~]*)$"
)
LABELLED = re.compile(r" *(`{3,}|~{3,}) *\w+ *$")  # it opens and does not close


def split_blocks(text: str) -> tuple[str, list[Block]]:
    """-> the text before the first fence, and the blocks between fences that hold anything."""
    # Code on the line of its opening fence gets a line of its own.
    text = re.sub(r"(```(?:py\w*)?) *((?:def|class|import) \w|from \w+ import )", r"\1\n\2", text)
    lines = text.split("\n")
    labelled = [i for i, line in enumerate(lines) if LABELLED.match(line)]
    closing = {}  # by the kind of fence: the lines that it may close
    for fence in ("```", "~~~"):
        closing[fence] = [i for i, line in enumerate(lines) if line.rstrip().endswith(fence)]
    before, blocks, i = None, [], 0
    while i < len(lines):
        opening = OPENING.match(lines[i])
        i += 1
        if not opening or (opening["words"].strip() and opening["rest"].strip(" \r}")):
            continue  # "close it with ``` at the end" opens nothing
        if before is None:
            before = "\n".join([*lines[: i - 1], opening["words"].rstrip()])
        ends = closing[opening["fence"][:3]]
        k, j = bisect_left(ends, i), bisect_left(labelled, i)
        # Eight, for no docstring quotes more fences.
        end, code = block_at(lines, i, ends[k : k + 8], labelled[j : j + 1])
        if code.strip():
            blocks.append(Block(opening["label"].lower(), code))
        i = end if LABELLED.match("".join(lines[end : end + 1])) else end + 1
    return text if before is None else before, blocks


def block_at(lines: list[str], first: int, closing: list, labelled: list) -> tuple[int, str]:
    """-> the line at which the block that begins at `first` ends, and the block's code.

    The first closing fence with which it is Python, for a docstring may quote fences; if there is
    none the first fence at all, or the text's end.
    """
    for end in closing:
        code = code_between(lines, first, end)
        if is_python(code):
            return end, code
    end = min([*closing[:1], *labelled, len(lines)])
    return end, code_between(lines, first, end)


def code_between(lines: list[str], first: int, end: int) -> str:
    """The lines before a closing fence, and what stands before it on its line: "    return x```"."""
    code = lines[first:end]
    if end < len(lines):
        last = "" if LABELLED.match(lines[end]) else lines[end].rstrip().rstrip("`~").rstrip()
        code += [last] if last.strip() else []
        code += [""] if code else []
    return textwrap.dedent("\n".join(code))


# ------------------------------------------------------------ names


class Definition(NamedTuple):
    text: str
    uses: set[str]  # names


def only_tests(code: str, defined: list[tuple[str, set[str]]]) -> bool:
    """Does a block only try what another one defines: asserts, prints, test functions? defined: each
    block and its names."""
    plain = (ast.Import, ast.ImportFrom, ast.Assert, ast.Assign, ast.Expr, ast.If, ast.For, ast.Try)
    for node in parsed(code).body:
        name = getattr(node, "name", "").lower()
        if not (isinstance(node, plain) or name.startswith(("test", "check")) or name == "main"):
            return False
    tried = names_used(code) | names_imported(code)  # from solution import f
    return any(tried & names for other, names in defined if other != code)


def definitions(codes: list[str]) -> dict[str, Definition]:
    """{name: what defines it} of all that blocks define or import at their margin."""
    known = {}
    for code in codes:
        lines = code.split("\n")
        for node in parsed(code).body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            text = "\n".join(lines[first - 1 : node.end_lineno])
            names = names_defined(text) | names_imported(text)
            known |= dict.fromkeys(names, Definition(text, names_used(text)))
    return known


def with_helpers(code: str, known: dict[str, Definition]) -> str:
    """The code behind those known definitions that it uses and does not have."""
    missing = names_used(code) & known.keys() if known else set()
    own, texts = names_defined(code) | names_imported(code) if missing else set(), []
    seen = set(missing)
    while missing:
        found = [known[name] for name in sorted(missing)]
        texts = [definition.text for definition in found] + texts
        missing = set().union(*(d.uses for d in found)) & known.keys() - seen - own
        seen |= missing
    return "\n".join([*dict.fromkeys(texts), code])


def names_defined(code: str, methods: bool = False) -> set[str]:
    """The names that a block defines at its margin; methods: those of its classes, too."""
    tables = [scopes(code)]
    if methods:
        tables += [table for table in tables[0].get_children() if table.get_type() == "class"]
    symbols = [symbol for table in tables for symbol in table.get_symbols()]
    return {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()}


def names_imported(code: str) -> set[str]:
    return {symbol.get_name() for symbol in scopes(code).get_symbols() if symbol.is_imported()}


def names_used(code: str) -> set[str]:
    """The names that a block takes from elsewhere: neither its own nor Python's."""
    found, waiting = set(), [scopes(code)]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        at_margin = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (at_margin or symbol.is_global()):
                found.add(symbol.get_name())
    return found - names_defined(code) - names_imported(code) - set(dir(builtins))


NO_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)
warnings.filterwarnings("ignore", module="program$")  # of code that a model wrote: "x is 1"


def scopes(code: str) -> symtable.SymbolTable:
    """What Python knows of the names in a block; of none, if it is no Python."""
    try:
        return symtable.symtable(code, "program", "exec")
    except NO_PYTHON:
        return symtable.symtable("", "program", "exec")


def parsed(code: str) -> ast.Module:
    """Its syntax tree, empty if it is no Python."""
    try:
        return ast.parse(code, "program")
    except NO_PYTHON:
        return ast.Module([], [])


def is_python(code: str) -> bool:
    try:
        ast.parse(code, "program")
    except NO_PYTHON:
        return False
    return True


def compiles(code: str) -> bool:
    """Is it whole? A body alone is Python, but its `return` stands outside a function."""
    try:
        compile(code, "program", "exec", dont_inherit=True)
    except NO_PYTHON:
        return False
    return True
