"""What a fusion is, and which ones there are.

A fusion is one class in one file of `patterns/` (or of another package, through the entry-point group
`fusepass.fusions`) with three verbs: `match` finds a candidate, `check` says whether it is valid here and if not
why, `rewrite` names the op and its arguments. None of them changes the graph: `fusepass.rewrite` does.
"""

import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch.fx import Node


class Refused(Exception):
    """Raised by `check`: this match must not be rewritten. `code` is one of `fusepass.report.CODES`."""

    def __init__(self, code: str, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Match:
    """A region of the graph that one op can stand for."""

    anchor: Node
    """The node whose module path and source line stand for the site."""
    activation: Node
    """The tensor that the region transforms. Nodes that read only the shape of an interior value read its instead."""
    parameters: tuple[Node, ...]
    """Weights, norm weights and biases."""
    others: tuple[Node, ...]
    """The other tensors it reads: cos, sin, a residual."""
    interior: tuple[Node, ...]
    """Every node that the op makes superfluous, the outputs included."""
    outputs: tuple[Node, ...]
    """The values that live on, in the order of the op's results."""
    writes: tuple[Node, ...] = field(default=(), kw_only=True)
    """The tensors that the region writes in place, and the op in its stead."""
    joined: tuple[Node, ...] = field(default=(), kw_only=True)
    """The ops of other sites that a join takes in."""
    read_early: tuple[Node, ...] = field(default=(), kw_only=True)
    """What the op may read early besides its parameters (see `fusepass.ops.library.define`)."""

    @property
    def tensors(self) -> tuple[Node, ...]:
        return (self.activation, *self.parameters, *self.others)


MatchT = TypeVar("MatchT", bound=Match)


class Fusion(ABC, Generic[MatchT]):
    """One rule. Subclasses set the class variables and the three verbs, and hold no state."""

    name: ClassVar[str]
    """Public name: the key in `options={"fusions": ...}`, the site's `fusion`, the op's name."""
    summary: ClassVar[str]
    """One line for people."""
    order: ClassVar[int]
    """Fusions run in this order, longest first: a node belongs to one site."""
    default: ClassVar[bool] = True
    """Whether it is on unless the options say otherwise."""
    joins: ClassVar[bool] = False
    """Whether it lowers ops that other fusions put in to one op. It makes no site: those say which op runs them."""

    @abstractmethod
    def match(self, node: Node) -> MatchT | None:
        """The region that ends at `node`, if there is one."""

    def near_miss(self, node: Node) -> Refused | None:
        """Why what looks like this fusion at `node` is none, if it does: what stands there instead of what was
        expected. Asked of each node that is in no site, when this fusion has been tried everywhere."""
        return None

    @abstractmethod
    def check(self, match: MatchT) -> None:
        """Raise `Refused` if the op would not compute what the region does. What holds for every fusion (users,
        mutation, autocast, grad, plain tensors, one device and dtype) is checked by `fusepass.validity` already."""

    @abstractmethod
    def rewrite(self, match: MatchT, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """The op and its arguments (nodes and constants); its results replace `match.outputs`."""


@functools.cache
def fusions() -> tuple[Fusion[Any], ...]:
    """The registered fusions in the order they run: `fusepass.patterns` and other packages' entry points."""
    patterns = importlib.import_module("fusepass.patterns")
    names = [module.name for module in pkgutil.iter_modules(patterns.__path__)]
    modules = [importlib.import_module(f"{patterns.__name__}.{name}") for name in names]
    classes = {
        cls
        for module in modules
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Fusion) and cls.__module__ == module.__name__
    }
    classes |= {entry.load() for entry in entry_points(group="fusepass.fusions")}
    return tuple(sorted((cls() for cls in classes), key=lambda fusion: (fusion.order, fusion.name)))
