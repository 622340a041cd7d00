"""What a rule is that says what becomes of a setting of another library, and the kinds of rules there are."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What a given setting becomes: settings of `jaxft.train`, what to know about it, and whether it is lost."""

    settings: dict[str, Any]
    remark: str = ""
    lost: bool = False


class Rule(NamedTuple):
    """Some settings of theirs; `ours` as a reader is told it ('' where there is none), and what is to be known.

    act: (name, value) -> Outcome. lost: whether something is given up where there is no setting of ours.
    """

    names: tuple[str, ...]
    ours: str
    remark: str
    act: Callable[[str, Any], Outcome]
    lost: bool = False


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: None, False, 0, '', 'no', 'none', {}."""
    return value in (None, False, 0, "", "no", "none", "None", "false", "False", "0") or value in ({}, [])


def is_on(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("true", "yes", "1"))


def same(names: str) -> Rule:
    """Settings with the same name and meaning."""
    return Rule(
        tuple(names.split()), "the same", "", lambda name, value: Outcome({} if value is None else {name: value})
    )


def asked(names: str) -> Rule:
    """Settings with the same name and meaning; a value that asks for nothing needs no setting."""

    def act(name: str, value: Any) -> Outcome:
        return Outcome({}, "as it is here") if is_off(value) else Outcome({name: value})

    return Rule(tuple(names.split()), "the same", "", act)


def renamed(theirs: str, ours: str, remark: str = "") -> Rule:
    return Rule(tuple(theirs.split()), f"`{ours}`", remark, lambda _, v: Outcome({} if v is None else {ours: v}))


def changed(names: str, ours: str, remark: str, act: Callable[[Any], Outcome]) -> Rule:
    """Settings whose values are put otherwise; `ours` and `remark` are for the reader."""
    return Rule(tuple(names.split()), ours, remark, lambda _, value: act(value))


def needless(remark: str, names: str) -> Rule:
    """Settings of which nothing is lost, whatever their value."""
    return Rule(tuple(names.split()), "", remark, lambda *_: Outcome({}, remark))


def missing(remark: str, names: str, unless: Callable[[Any], bool] = is_off) -> Rule:
    """Settings that are not here; nothing is lost where the value is one that asks for nothing."""
    lost = lambda _, value: Outcome({}, "as it is here" if unless(value) else remark, not unless(value))  # noqa: E731
    return Rule(tuple(names.split()), "", remark, lost, True)
