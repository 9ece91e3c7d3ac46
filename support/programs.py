"""Finds the program in a response: which of its code blocks, and what of the others it needs. It knows
nothing of the algorithm.

Models write code between fences of back ticks or tildes, and get fences wrong in many ways: they
leave one open, open one in the middle of a line, close one behind the last line of code, quote one
in a docstring. And the last block is not always the program: it may be its tests or its output.
"""

import ast
import builtins
import re
import textwrap
from typing import NamedTuple

DEFINES = re.compile(r"^(async def|def|class) ", re.MULTILINE)
STARTS = re.compile(r"^(import |from |async def |def |class |@)", re.MULTILINE)


class Block(NamedTuple):
    info: str  # what stands behind the opening fence: "python"
    code: str

    @property
    def is_python(self) -> bool:
        """Is it a program, by its label or by what it defines? A session (">>> f(2)") is none."""
        is_labelled = self.info.startswith("py") and self.info != "pycon"
        return (is_labelled or bool(DEFINES.search(self.code))) and ">>> " not in self.code[:4]


def extract_program(setup: str, text: str, entry: str | None = None) -> str | None:
    """The program in a response, None if there is none.

    setup   code that the problem's tests run first; of HumanEval's kind it opens a function that the
            response may complete by its body alone
    entry   the function that is tested, where there is one
    """
    completes = re.search(r"^def \w+\(", setup, re.MULTILINE) is not None
    # Tokenizers of SentencePiece's kind put a space before a response, which is no indentation.
    if not completes or STARTS.match(text.removeprefix(" ")):
        text = text.removeprefix(" ")
    blocks = code_blocks(after_thoughts(text))
    if blocks:
        return from_blocks(blocks, setup if completes else "", entry)
    if DEFINES.search(text):  # all from the margin on, to a fence that only closes
        return re.split(r"^ *(?:```|~~~)", text[STARTS.search(text).start() :], flags=re.MULTILINE)[
            0
        ]
    if completes:
        body = re.split(r"^(?=\S)", text, maxsplit=1, flags=re.MULTILINE)[0]
        return f"{setup.rstrip()}\n{body}" if body.strip() else None
    tree = parsed(text)
    return text if tree and tree.body else None


def after_thoughts(text: str) -> str:
    """What a reasoning model says after its thoughts, if it ends them and says anything then."""
    _, ended, answer = text.rpartition("</think>")
    return answer if ended and answer.strip() else text


# ------------------------------------------------------------ fences


def code_blocks(text: str) -> list[Block]:
    """The blocks between fences that hold anything, in their order."""
    lines, blocks, i = text.split("\n"), [], 0
    while i < len(lines):
        opened = re.match(r"( *)(`{3,}|~{3,})([^`~]*)$", lines[i])
        # An opening fence may stand behind words, if it says that code begins: "So: ```python".
        opened = opened or re.match(r"()\S.*?(`{3,})(python|py)\d? *$", lines[i])
        i += 1
        if not opened:
            continue
        closes = closing_lines(lines, i, opened[2][:3])
        end = next((e for e in closes if parsed(block_of(lines, i, e))), None)  # not in a docstring
        end = closes[0] if end is None else end
        code = block_of(lines, i, end)
        if code.strip():
            blocks.append(Block(opened[3].strip().lower(), code))
        i = end if end < len(lines) and opens(lines[end]) else end + 1
    return blocks


def opens(line: str) -> bool:
    """A fence with a label only opens: the block before it was left open."""
    return re.match(r" *(```+|~~~+) *\w+ *$", line) is not None


def closing_lines(lines: list[str], first: int, fence: str) -> list[int]:
    """The lines at which a block that begins at `first` may end; the text's end if there is none.

    A fence behind the last line of code closes, too: "    return x```".
    """
    found = []
    for i in range(first, len(lines)):
        if re.match(rf" *{fence}+ *$", lines[i]) or lines[i].rstrip().endswith(fence):
            found.append(i)
        elif opens(lines[i]):
            found.append(i)
            break  # what follows is another block
    return found or [len(lines)]


def block_of(lines: list[str], first: int, end: int) -> str:
    code = lines[first:end]
    last = lines[end].rstrip() if end < len(lines) else ""
    behind = last[:-3].rstrip("`~") if last.endswith(("```", "~~~")) else ""
    if behind.strip() and not opens(last):
        code = [*code, behind]
    ends_open = end == len(lines) and not behind
    return textwrap.dedent("\n".join(code) + ("" if ends_open or not code else "\n"))


# ------------------------------------------------------------ which block


def from_blocks(blocks: list[Block], setup: str, entry: str | None) -> str:
    """The program of a response with code blocks; setup: of a function to complete, or empty."""
    programs = [block for block in blocks if block.is_python]
    if not programs:  # perhaps without a label: the last one, whose prompts are no code
        return without_prompts(blocks[-1].code)
    named = [b for b in programs if entry and entry in defined(b.code, methods=True)]
    solving = [b for b in programs if not holds_only_tests(b.code)]
    chosen = (named or solving or programs)[-1]
    if setup and not named and not compiles(chosen.code):
        body = textwrap.indent(textwrap.dedent(chosen.code), "    ")
        if compiles(f"{setup.rstrip()}\n{body}"):
            return f"{setup.rstrip()}\n{body}"
    return with_helpers(chosen.code, [b.code for b in programs[: programs.index(chosen)]])


def without_prompts(code: str) -> str:
    """The statements of an interactive session; other code as it is."""
    if not code.startswith(">>> "):
        return code
    typed = [line[4:] for line in code.split("\n") if line.startswith((">>> ", "... "))]
    return "\n".join([*typed, ""])


def holds_only_tests(code: str) -> bool:
    """Does a block only try something that stands elsewhere: asserts, prints, test functions?"""
    tree = parsed(code)
    if tree is None or "input(" in code or "stdin" in code:
        return False
    for node in tree.body:
        name = getattr(node, "name", "")
        is_test = name.lower().startswith(("test", "check")) or name == "main"
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        if not (is_test or is_import or isinstance(node, (ast.Assert, ast.Expr, ast.If, ast.For))):
            return False
    calls = {node.func.id for node in ast.walk(tree) if is_call_of_a_name(node)}
    own = defined(code)
    return bool(calls - own - set(dir(builtins)))  # it calls what it does not define


def is_call_of_a_name(node) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def with_helpers(code: str, earlier: list[str]) -> str:
    """The code behind the definitions of earlier blocks that it uses and does not have."""
    tree = parsed(code)
    for block in reversed(earlier) if tree else ():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        missing = used - defined(code) - set(dir(builtins))
        if missing & defined(block):
            parts = [ast.get_source_segment(block, node) for node in definitions(block)]
            code = "\n".join([*parts, code])
            tree = parsed(code)
    return code


def definitions(code: str) -> list[ast.AST]:
    """What only gives names, and does nothing else: functions, classes, imports and constants."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    tree = parsed(code)
    found = []
    for node in tree.body if tree else ():
        is_constant = isinstance(node, ast.Assign) and not any(
            isinstance(part, ast.Call) for part in ast.walk(node)
        )
        if isinstance(node, kinds) or is_constant:
            found.append(node)
    return found


def defined(code: str, methods: bool = False) -> set[str]:
    """The names that a block gives at its margin; methods: those of its classes, too."""
    names = set()
    for node in definitions(code):
        names.add(getattr(node, "name", ""))
        if isinstance(node, ast.Assign):
            names |= {
                part.id
                for target in node.targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            }
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        if methods and isinstance(node, ast.ClassDef):
            names |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def compiles(code: str) -> bool:
    """Is it whole? A body alone parses, but its `return` stands outside a function."""
    try:
        compile(code, "program", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
