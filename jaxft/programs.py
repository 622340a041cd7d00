"""Traced programs read as data: the programs inside of one, and the bytes that wait across a named value."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

HIDDEN = "hidden"  # `checkpoint_name` of what the model gives the loss: the forward pass ends there


def equations_in(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The equations of a program, each followed by those of the programs that it runs."""
    for equation in jaxpr.eqns:
        yield equation
        for program in _run_by(equation):
            yield from equations_in(program)


def _programs_in(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    yield jaxpr
    for equation in equations_in(jaxpr):
        yield from _run_by(equation)


def _run_by(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for leaf in jax.tree.leaves(equation.params, is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr)):
        if isinstance(leaf, Jaxpr | ClosedJaxpr):
            yield leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf


def waiting_bytes(jaxpr: Jaxpr, name: str, *, on_host: bool = False) -> int:
    """Bytes of what is computed before the value called `name` by `checkpoint_name` and read after it, itself included.

    What the program is given is not counted; of a program on several devices, the arrays are whole. on_host: with what
    waits in the host's memory. Where `name` was given several times, the first counts. Raises ValueError for a program
    that has no such value.
    """
    for program in _programs_in(jaxpr):
        for at, equation in enumerate(program.eqns):
            if equation.primitive.name == "name" and equation.params["name"] == name:
                made = {variable for earlier in program.eqns[: at + 1] for variable in earlier.outvars}
                read = [*program.outvars, *(variable for later in program.eqns[at + 1 :] for variable in later.invars)]
                waiting = made.intersection(variable for variable in read if isinstance(variable, Var))
                avals: list[Any] = [variable.aval for variable in waiting]
                return sum(
                    math.prod(aval.shape) * aval.dtype.itemsize
                    for aval in avals
                    if on_host or aval.memory_space != jax.memory.Space.Host
                )
    raise ValueError(f"nothing in the program is called {name!r}")
