"""Writes the tables of docs/from-trl.md and docs/from-unsloth.md: what `jaxft.convert args` makes of each setting.

python scripts/list_arguments.py            # writes them between their two marks
python scripts/list_arguments.py --check    # exits with 1 where a page is not what it would write
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxft.config import parse
from jaxft.convert.arguments_rules import Rule
from jaxft.convert.arguments_table import (
    COMMAND,
    DEFAULTS,
    PEFT,
    TRAINER,
    TRAINING,
    UNSLOTH,
    taken_by_name,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- made by scripts/list_arguments.py; do not edit -->", "<!-- made until here -->"
# page -> title of each part, its rules, and whose defaults belong to it
PAGES: dict[str, list[tuple[str, list[Rule], tuple[str, ...]]]] = {
    "from-trl.md": [
        ("`SFTConfig` and `TrainingArguments`", TRAINING, ("SFTConfig", "TrainingArguments")),
        ("`trl sft`: ModelConfig, ScriptArguments", COMMAND, ("trl", "trl with --use_peft")),
        ("`LoraConfig`", PEFT, ("LoraConfig",)),
        ("`SFTTrainer`", TRAINER, ()),
    ],
    "from-unsloth.md": [
        ("`FastLanguageModel`", UNSLOTH, ("FastLanguageModel.from_pretrained",)),
    ],
}


def tables(page: str) -> str:
    """What stands between the marks of a page."""
    return "\n".join(line for part in PAGES[page] for line in table(*part)) + "\n"


def table(title: str, rules: list[Rule], origins: tuple[str, ...]) -> Iterator[str]:
    yield from ("", f"### {title}", "")
    same = [name for rule in rules for name in rule.names if rule.ours == "the same" or taken_by_name(rule, name)]
    if same:
        yield from (f"The same name and meaning: {listed(same)}.", "")
    changed = [rule for rule in rules if rule.ours not in ("", "the same")]
    if changed:
        yield from ("| there | here | |", "|---|---|---|")
        yield from (f"| {listed(rule.names)} | {rule.ours} | {cell(rule.remark)} |" for rule in changed)
        yield ""
    for lost, heading in ((True, "no counterpart"), (False, "nothing to set")):
        kept = [(rule, [name for name in rule.names if name not in same]) for rule in rules
                if rule.ours == "" and rule.lost is lost]  # fmt: skip
        if any(names for _, names in kept):
            yield from (f"| {heading} | why |", "|---|---|")
            yield from (f"| {listed(names)} | {cell(rule.remark)} |" for rule, names in kept if names)
            yield ""
    for origin in origins:
        usual, _ = parse("train", [])
        for name, value in DEFAULTS[origin].items():
            ours = getattr(usual, name)
            if ours != value:
                yield f"- Where `{origin}` is silent, `{name}` is `{text(value)}` there and `{text(ours)}` here."


def listed(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def cell(remark: str) -> str:
    return remark.replace("|", "\\|")


def with_tables(page: str) -> str:
    """A page with its tables made anew."""
    before, _, rest = (DOCS / page).read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{tables(page)}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check = parser.parse_args().check
    for page in PAGES:
        made = with_tables(page)
        if check and (DOCS / page).read_text(encoding="utf-8") != made:
            print(f"docs/{page} is not up to date; run python scripts/list_arguments.py", file=sys.stderr)
            return 1
        if not check:
            (DOCS / page).write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
