"""Writes docs/errors.md: every InputError and RunError of the source, as a table by what the user was doing.

python scripts/list_errors.py            # writes the file
python scripts/list_errors.py --check    # exits with 1 where the file is not what it would write
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "errors.md"
SOURCES = ("jaxft", "convert", "kernels")
EXIT = {"InputError": 2, "RunError": 1}

# what the user was doing, by the beginning of a file's path; the longest beginning that fits counts
GROUPS = {
    "Typing settings": ("jaxft/config.py", "jaxft/settings.py", "jaxft/typed.py", "jaxft/contradictions.py"),
    "Bringing settings of another library": ("convert/arguments", "convert/script.py"),
    "Choosing devices and processes": ("jaxft/sharding.py", "jaxft/processes.py"),
    "Naming a model, its weights and its tokenizer": (
        "jaxft/load.py", "jaxft/models/", "jaxft/quant.py", "jaxft/prepare.py",
    ),
    "Reading and writing weight files": ("convert/",),
    "Naming an adapter": ("jaxft/lora", "jaxft/initial.py", "jaxft/adalora.py", "convert/peft.py"),
    "Reading data": ("jaxft/data", "jaxft/run_data.py", "jaxft/columns.py", "jaxft/files.py", "jaxft/packing.py"),
    "Rendering conversations": ("jaxft/chat.py", "jaxft/templates.py"),
    "Training": (
        "jaxft/train.py", "jaxft/make_run.py", "jaxft/loop.py", "jaxft/optim", "jaxft/schedules.py",
        "jaxft/metrics.py", "jaxft/step.py", "jaxft/loss.py", "jaxft/budget.py", "jaxft/stopping.py", "jaxft/tasks.py",
        "jaxft/reporters.py",
    ),
    "Saving and resuming": ("jaxft/checkpoint.py", "jaxft/output.py"),
    "Evaluating": ("jaxft/evaluate.py",),
    "Generating": ("jaxft/generate.py", "jaxft/decode.py", "jaxft/prompts.py", "jaxft/sampling.py"),
    "Measuring": ("jaxft/bench.py", "jaxft/profile.py"),
    "Calling an operation": ("kernels/",),
    "Elsewhere": ("jaxft/",),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Listed:
    """One error: in which group and file it stands, its class, and its message with {placeholders}."""

    group: str
    file: str
    line: int
    kind: str
    message: str


@dataclass(frozen=True)
class Module:
    """What messages are put together from: the functions and the constants of a file."""

    functions: dict[str, ast.FunctionDef]
    constants: dict[str, str]


def errors_in(path: Path) -> Iterator[Listed]:
    """Every call of InputError or RunError in one file, in its order."""
    file = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = Module(
        {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)},
        {
            target.id: str(value.value)
            for node in tree.body if isinstance(node, ast.Assign)
            for target, value in zip(parts(node.targets[0]), parts(node.value), strict=False)
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant)
        },
    )  # fmt: skip

    def visit(node: ast.AST, scope: ast.AST) -> Iterator[Listed]:
        for child in ast.iter_child_nodes(node):
            inside = child if isinstance(child, ast.FunctionDef) else scope
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in EXIT:
                message = " ".join(template(child.args[0], scope, module).split())
                yield Listed(group_of(file), file, child.lineno, child.func.id, message)
            yield from visit(child, inside)

    yield from visit(tree, tree)


def parts(node: ast.expr) -> list[ast.expr]:
    """Both sides of `A, B = 1, 2` and of `A = 1` alike."""
    return node.elts if isinstance(node, ast.Tuple) else [node]


def group_of(file: str) -> str:
    """What the user was doing when an error of this file came."""
    fitting = [(start, group) for group, starts in GROUPS.items() for start in starts if file.startswith(start)]
    return max(fitting, key=lambda pair: len(pair[0]))[1]


def template(node: ast.expr, scope: ast.AST, module: Module) -> str:
    """The text that an expression makes, with what is known only in a run in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, scope, module) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return (
            f"{{{name_of(node.value)}}}" if isinstance(node.value, ast.BinOp) else template(node.value, scope, module)
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, scope, module) + template(node.right, scope, module)
    if isinstance(node, ast.IfExp):
        return " / ".join(template(part, scope, module) for part in (node.body, node.orelse))
    if isinstance(node, ast.Name):  # a constant, or a text that was put together before
        values = [found.value for found in ast.walk(scope) if isinstance(found, ast.Assign) and _sets(found, node.id)]
        if values or node.id in module.constants:
            # without the scope: a text may be put together from its own name
            return template(values[-1], ast.Pass(), module) if values else module.constants[node.id]
    if isinstance(node, ast.Call) and called(node) in module.functions:
        made = module.functions[called(node)]
        returned = [found.value for found in ast.walk(made) if isinstance(found, ast.Return) and found.value]
        if returned and _is_text(returned[-1]):
            return template(returned[-1], made, module)
    return f"{{{name_of(node)}}}"


def name_of(node: ast.expr) -> str:
    """One word for a value: of settings.max_length it is max_length, of ', '.join(names) names."""
    if isinstance(node, ast.Attribute):
        return name_of(node.value) if node.attr in ("__name__", "name", "msg", "strerror") else node.attr
    if isinstance(node, ast.Subscript):
        return node.slice.value if _is_word(node.slice) else name_of(node.value)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and not node.args and isinstance(node.func.value, ast.Name):
            return node.func.attr
        inner = [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
        return next((name_of(part) for part in inner if not isinstance(part, ast.Constant)), "…")
    if isinstance(node, ast.BoolOp):
        return name_of(node.values[0])
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return name_of(node.generators[0].iter)
    if isinstance(node, ast.BinOp):
        return ast.unparse(node)
    return node.id if isinstance(node, ast.Name) else "…"


def called(node: ast.Call) -> str:
    """The name of a function or method that is called."""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _is_word(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier()


def _is_text(node: ast.expr) -> bool:
    added = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return added or constant or isinstance(node, ast.JoinedStr)


def _sets(node: ast.Assign, name: str) -> bool:
    return _is_text(node.value) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def advice(message: str) -> tuple[str, str]:
    """What was seen, and what to do about it: the part behind the last semicolon or full stop."""
    at = max(message.replace("e.g. ", "e.g._").rfind(mark) for mark in ("; ", ". ", ": expected "))
    return (message, "") if at < 0 else (message[:at], message[at:].lstrip(";.: "))


def page() -> str:
    """docs/errors.md."""
    files = sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py"))
    found = [error for path in files if not any(p.is_symlink() for p in path.parents) for error in errors_in(path)]
    lines = [
        "# Errors",
        "",
        "What a command can refuse or fail with. It prints one line, `error: …`, on stderr; `--debug` adds the",
        "traceback. It exits with 2 where what was asked for cannot be done as asked, and with 1 where the run failed.",
        "What stands in braces is known only then. Made by `python scripts/list_errors.py`; do not edit.",
    ]
    for group in GROUPS:
        rows = [error for error in found if error.group == group]
        if rows:
            lines += ["", f"## {group}", "", "| seen | what to do | exit | raised in |", "|---|---|---|---|"]
        for error in rows:
            seen, do = map(cell, advice(error.message))
            lines.append(f"| {seen} | {do} | {EXIT[error.kind]} | `{error.file}` |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """A text inside a table: nothing in it is markup."""
    for character in "\\`*|<":
        text = text.replace(character, "\\" + character)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    if parser.parse_args().check:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page():
            return 0
        print(f"{TARGET} is not up to date; run python scripts/list_errors.py", file=sys.stderr)
        return 1
    TARGET.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
