"""Traced programs read as data: the equations inside of one, and the bytes that wait across a named value."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

# what gives the same numbers again, and what gives some of them
SAME = {"name", "reshape", "squeeze", "expand_dims"}
SOME = {"slice", "dynamic_slice"}


def equations_in(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The equations of a program, each followed by those of the programs that it runs."""
    for equation in jaxpr.eqns:
        yield equation
        for program in _run_by(equation):
            yield from equations_in(program)


def waiting_bytes(jaxpr: Jaxpr, name: str, *, on_host: bool = False) -> int:
    """Bytes of what is computed before the value called `name` by `checkpoint_name` and read after it, itself included.

    Of the program alone in which that value stands: what programs around it keep is not counted. Nor is what the
    program is given, or a slice of it. Of a program on several devices, the arrays are whole. on_host: with what waits
    in the host's memory. Where `name` was given several times, the first counts. Raises ValueError for a program that
    has no such value.
    """
    for program in _programs_in(jaxpr):
        for at, equation in enumerate(program.eqns):
            if equation.primitive.name == "name" and equation.params["name"] == name:
                read = [*program.outvars, *(variable for later in program.eqns[at + 1 :] for variable in later.invars)]
                return _bytes_of(_made(program, at + 1), read, on_host)
    raise ValueError(f"nothing in the program is called {name!r}")


def _programs_in(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    yield jaxpr
    for equation in equations_in(jaxpr):
        yield from _run_by(equation)


def _run_by(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for leaf in jax.tree.leaves(equation.params, is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr)):
        if isinstance(leaf, Jaxpr | ClosedJaxpr):
            yield leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf


def _made(program: Jaxpr, count: int) -> dict[Var, Var | None]:
    """What the first `count` equations make, each with that whose numbers it has: None for numbers that are given."""
    made: dict[Var, Var | None] = {}
    for equation in program.eqns[:count]:
        for variable in equation.outvars:
            made[variable] = variable
        source = equation.invars[0] if equation.invars and equation.primitive.name in SAME | SOME else None
        if isinstance(source, Var):
            origin = made.get(source)
            if origin is None or equation.primitive.name in SAME:
                made[equation.outvars[0]] = origin
    return made


def _bytes_of(made: dict[Var, Var | None], read: list[Any], on_host: bool) -> int:
    origins = {made.get(variable) for variable in read if isinstance(variable, Var)}
    avals: list[Any] = [origin.aval for origin in origins if origin is not None]
    return sum(
        math.prod(aval.shape) * aval.dtype.itemsize
        for aval in avals
        if on_host or aval.memory_space != jax.memory.Space.Host
    )
