"""Nested dicts of arrays: walking them by path, joining them, choosing a subtree."""

from collections.abc import Iterator
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('a/b/c', leaf) of every leaf, in the dicts' own order."""
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, dict):
            yield from flatten(value, path)
        else:
            yield path, value


def unflatten(leaves: dict[str, Any]) -> Tree:
    """The tree that `flatten` took apart."""
    tree: Tree = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def join(*trees: Tree) -> Tree:
    """One tree with the leaves of all. Raises ValueError where two have the same leaf.

    Example: join({"a": {"x": 1}}, {"a": {"y": 2}}) == {"a": {"x": 1, "y": 2}}
    """
    leaves: dict[str, Any] = {}
    for tree in trees:
        for path, value in flatten(tree):
            if path in leaves:
                raise ValueError(f"both trees have a leaf {path}")
            leaves[path] = value
    return unflatten(leaves)


def like(tree: Tree, pattern: Tree) -> Tree:
    """The part of `tree` whose paths stand in `pattern`, in pattern's order."""
    leaves = dict(flatten(tree))
    return unflatten({path: leaves[path] for path, _ in flatten(pattern)})
