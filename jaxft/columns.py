"""Templates over the columns of a table: how rows of any columns become questions and answers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.errors import InputError
from jaxft.messages import shown

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}  # as they are typed in a shell
# one piece of a template: a doubled brace, a column, a bound of an optional part, or any other character
_PIECE = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<column>[^{}]*)\}|(?P<bound>\[\[|\]\])|(?P<text>.)", re.DOTALL)
ANSWERS = {"question": "answer", "instruction": "output", "prompt": "completion"}  # of formats that have one


@dataclass(frozen=True)
class Part:
    """Texts and columns in turn: (text, None) or ("", column). An optional part is left out where a column is empty."""

    pieces: tuple[tuple[str, str | None], ...]
    optional: bool


@dataclass(frozen=True)
class Template:
    """A text with {columns}: 'Q: {question}[[ Hint: {hint}]]' leaves the hint out where the row has none.

    `{{` and `}}` are braces; `\\n`, `\\t` and `\\\\` are what they are in Python.
    """

    parts: tuple[Part, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that it names, in order."""
        found = (column for part in self.parts for _, column in part.pieces if column is not None)
        return tuple(dict.fromkeys(found))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text of a row. Raises InputError for an empty cell outside of [[…]], or one of no text or number."""
        return "".join(_fill(part, row) for part in self.parts)


def parse_template(text: str, flag: str) -> Template:
    """A template from its text; `flag` is what errors call it. Raises InputError where it cannot be read."""
    text = re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], text)
    parts: list[Part] = []
    pieces: list[tuple[str, str | None]] = []
    optional = False

    def close() -> None:
        if pieces:
            parts.append(Part(tuple(pieces), optional))
            pieces.clear()

    for found in _PIECE.finditer(text):
        column, bound = found["column"], found["bound"]
        if bound:
            if (bound == "[[") == optional:
                inside = "stands inside another one" if optional else "has no [[ before it"
                raise InputError(
                    f"{flag}: {bound} at character {found.start() + 1} {inside}; write [[…]], never nested"
                )
            if optional and not any(name for _, name in pieces):
                raise InputError(f"{flag}: the part [[…]] that ends at character {found.end()} has no {{column}} in it")
            close()
            optional = bound == "[["
        elif column is not None:
            if not column.strip():
                raise InputError(
                    f"{flag}: {{}} at character {found.start() + 1} names no column; write {{{{}}}} for braces"
                )
            pieces.append(("", column.strip()))
        else:
            character = found["brace"][0] if found["brace"] else found["text"]
            if character in "{}" and not found["brace"]:
                at = found.start() + 1
                raise InputError(
                    f"{flag}: {character} at character {at} stands alone; write {character * 2} for a brace"
                )
            pieces.append((character, None))
    if optional:
        raise InputError(f"{flag}: a part [[ is not closed; end it with ]]")
    close()
    template = Template(tuple(parts))
    if not template.columns:
        raise InputError(f"{flag} {text!r} names no column; write one in braces, such as {{question}}")
    return template


def _fill(part: Part, row: Mapping[str, Any]) -> str:
    texts = []
    for text, column in part.pieces:
        if column is None:
            texts.append(text)
            continue
        value = row[column]
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty and part.optional:
            return ""
        if value is None:
            raise InputError(f"{column} is empty; put what it belongs to into [[…]] to leave it out in such rows")
        if not isinstance(value, str | int | float):
            raise InputError(f"{column} is {shown(value)}; a template takes text and numbers")
        texts.append(str(value))
    return "".join(texts)


@dataclass(frozen=True)
class Columns:
    """How rows become conversations where flags say it.

    question, answer: templates of the two turns; None where the rows' own format says so. turns: how many rows make one
    conversation; they are drawn by `seed`, each row stands in one conversation, and the last may be shorter.
    """

    question: Template | None = None
    answer: Template | None = None
    turns: int = 1
    seed: int = 0

    def fitted(self, columns: Sequence[str]) -> "Columns":
        """With the answer found, where only a question was given: the column that goes with it in a known format.

        Raises InputError for a column that is not there, naming those that are, and where no answer is known.
        """
        if self.question is None:
            return self
        answer = self.answer
        if answer is None:
            usual = [there for asked, there in ANSWERS.items() if there in columns and asked in columns]
            usual = [name for name in usual if name not in self.question.columns]
            if len(usual) != 1:
                raise InputError(
                    "--template says what is asked, and --response_template is missing: it says what is answered, "
                    f"such as {{answer}}; the columns are {', '.join(columns)}"
                )
            answer = Template((Part((("", usual[0]),), optional=False),))
        for flag, template in (("--template", self.question), ("--response_template", answer)):
            if absent := [name for name in template.columns if name not in columns]:
                raise InputError(f"{flag} names {', '.join(absent)}; the columns are {', '.join(columns)}")
        return Columns(self.question, answer, self.turns, self.seed)

    def key(self) -> dict[str, Any]:
        """What of it changes tokens, for the cache."""
        return {"question": self.question, "answer": self.answer, "turns": self.turns,
                "seed": self.seed if self.turns > 1 else None}  # fmt: skip
