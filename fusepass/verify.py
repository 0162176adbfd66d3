"""`options={"verify": ...}`: a compiled graph that compares itself with the original one.

Two questions are asked, of copies of whatever the graph writes and with the random state of the call:

- Are the outputs, and the inputs that the graph writes, those of the original graph run eagerly? Two correct runs in
  one dtype differ by what rounding does to this graph with these weights. That is measured, not guessed: the original
  runs again with every result in it moved by up to half a unit in the last place (Monte Carlo arithmetic,
  https://doi.org/10.1109/5992.852391), and how far this moves its outputs is the yardstick.
- Does each site's op, given the same inputs as its reference, come as near to the reference in f64 as the reference in
  the graph's own dtype does, its inputs moved the same way? This names the site that is at fault.

Where the outputs are wrong and every op is right, a fusion may have put the wrong op, or its right one with the wrong
arguments: the first site whose reference gives something else than the original graph does there is named.
"""

import copy
import itertools
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fusepass.graph import mutated, storages
from fusepass.ops import OPS
from fusepass.report import GraphReport
from fusepass.validity import DTYPES

log = logging.getLogger(__name__)

CALLS = (1, 3)
"""Which calls of a graph with the same shapes are verified. Under CUDA graphs the first runs the kernels to warm up,
the second records them, the third replays them."""
ROUNDINGS = 4
"""Runs that set the yardstick; the one farthest off counts. Where one number decides (a saturated softmax), the ratio
of two single errors has no variance; that of one to the largest of four exceeds r with a chance that falls as r^-4."""
FACTOR = 4.0
"""How much farther off a correct result may be. In 207 draws of Qwen3 and Qwen2 in f16, f32 and bf16 the worst came to
0.32 of the limit; in 32 steps of two layers with k_norm weights of 96.5, to 0.65 of it in f32 and 0.3 in f16."""
FLOOR = 16 * torch.finfo(torch.float32).eps
"""What the order of summation may do in f32 that no rounding of operands shows; beside one unit in the last place."""


class VerificationError(RuntimeError):
    """`"verify": "raise"`: a compiled graph does not compute what the original graph does."""


def pristine(gm: GraphModule) -> GraphModule:
    """A copy of `gm` that shares its parameters and buffers; neither a rewrite of `gm` nor Inductor changes it."""
    return copy.deepcopy(gm, {id(tensor): tensor for tensor in itertools.chain(gm.parameters(), gm.buffers())})


def written_inputs(graph: Graph) -> list[int]:
    """Which of the graph's inputs it writes in place, views of them and what it calls included."""
    written = set().union(*(storages(target) for node in graph.nodes for target in mutated(node)))
    return [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if storages(node) & written]


def compare(got: Tensor, rounded: Sequence[Tensor], want: Tensor) -> tuple[float, float]:
    """The error of `got` against `want`, and the limit set by `rounded`: correct results, each rounded another way.

    An element counts in units of the size of its channel (the last dimension), or of a tenth of the tensor's where that
    is larger, so that an outlier channel hides nothing in the others. Of the root mean square, which sees what is a
    little wrong everywhere, and the largest element, which sees one wrong row in many, the one nearer its limit is
    returned. NaN and infinities must be in the same places, and what is no float must be equal, except where `rounded`
    and `want` differ, so that rounding alone decides (an argmax at a tie, an overflow).
    """
    like = rounded[0]
    if (got.shape, got.dtype, got.device) != (like.shape, like.dtype, like.device):
        return torch.inf, 0.0
    if got.is_complex():
        return compare(torch.view_as_real(got), [*map(torch.view_as_real, rounded)], torch.view_as_real(want))
    if not got.is_floating_point():
        settled = torch.stack([other == want for other in rounded]).all(0)
        return (0.0 if bool((got == want)[settled].all()) else torch.inf), 0.0
    got, want, *others = (t.double().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (got, want, *rounded))
    settled = torch.stack([other.isfinite() == want.isfinite() for other in others]).all(0)
    finite = settled & want.isfinite()
    same = torch.where(finite, got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
    if not bool(same[settled].all()):
        return torch.inf, 0.0
    if not bool(finite.any()):
        return 0.0, 0.0
    got, want, *others = (torch.where(finite, t, 0.0) for t in (got, want, *others))
    squares = want.square()
    unit = (squares.mean(0) + 0.01 * squares.mean()).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    results = []
    for size in (_root_mean_square, _largest):
        error, floor = size((got - want) / unit), (torch.finfo(like.dtype).eps + FLOOR) * size(want / unit)
        results.append((error, FACTOR * max(size((other - want) / unit) for other in others) + floor))
    return max(results, key=_excess)


def _excess(found: tuple[float, float]) -> float:
    error, limit = found
    return error / limit if limit else error and torch.inf


def _root_mean_square(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def _largest(t: Tensor) -> float:
    return float(t.abs().max())


class _Kept(Interpreter):
    """Runs a graph and keeps the values of the nodes named in `keep`, under the names it gives."""

    def __init__(self, gm: GraphModule, keep: Mapping[str, str] | None = None) -> None:
        super().__init__(gm)
        self.kept: dict[str, Tensor] = {}
        self._keep = keep or {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self._keep:
            self.kept[self._keep[n.name]] = result.clone()
        return result


class _Shaken(_Kept):
    """Runs a graph with every new floating-point result moved by up to half a unit in the last place, at random."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._shaken(super().call_function(target, args, kwargs), (args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._shaken(super().call_method(target, args, kwargs), (args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._shaken(super().call_module(target, args, kwargs), (args, kwargs))

    def _shaken(self, result: Any, operands: Any) -> Any:
        read = {_memory(t) for t in tree_leaves(operands) if isinstance(t, Tensor)}
        return tree_map_only(Tensor, lambda t: t if _memory(t) in read else moved(t), result)


_seeds = itertools.count()


def moved(t: Tensor) -> Tensor:
    """`t`, each element of it moved by up to half a unit in the last place, at random; only in dtypes that ops have."""
    if t.dtype not in DTYPES:
        return t
    # A generator of its own: the default one's numbers are the graph's.
    generator = torch.Generator(t.device).manual_seed(next(_seeds))
    steps = torch.rand(t.shape, generator=generator, device=t.device, dtype=torch.float64) - 0.5
    result = (t.double() * (1 + torch.finfo(t.dtype).eps * steps)).to(t.dtype)
    return torch.where(result.isfinite(), result, t)


class _InF64(TorchFunctionMode):
    """References take statistics in f32, `x.float()`; what is f64 stays f64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Sites(_Kept):
    """Runs a rewritten graph with the ops' references, and compares each op with its reference in f64 on the way.

    What it goes on with are the references' results: a fault of one site does not reach the next.
    """

    def __init__(self, gm: GraphModule, names: Mapping[str, str], keep: Mapping[str, str] | None = None) -> None:
        super().__init__(gm, keep)
        self.faults: list[str] = []
        self._names = names

    def run_node(self, n: Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        op = next((op for op in OPS.values() if op.overload is target), None)
        if op is None:
            return super().call_function(target, args, kwargs)
        schema = op.overload._schema.arguments
        given = {**dict(zip((arg.name for arg in schema), args)), **kwargs}
        given.pop("early", None)  # a promise about the kernels before it, which are others here
        written = {arg.name for arg in schema if arg.alias_info is not None and arg.alias_info.is_write}

        def left(run: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
            """What it returns, and what it writes."""
            result = run(**arguments) if run is op.overload else run(*arguments.values())
            return [*tree_leaves(result), *(arguments[name] for name in written)]

        got = left(op.overload, {name: t.clone() if name in written else t for name, t in given.items()})
        if "high" in given:
            given["high"] = False  # the yardstick is what eager rounds
        rounded = [left(op.reference, tree_map_only(Tensor, moved, given)) for _ in range(ROUNDINGS)]
        with _InF64():
            want = left(op.reference, tree_map_only(Tensor, _in_f64, given))
        found = [compare(mine, others, true) for mine, true, *others in zip(got, want, *rounded, strict=True)]
        name = self._names.get(self._node.name, self._node.name)
        self.faults += _sentences([name], [max(found, key=_excess)])
        return op.reference(*given.values())


def _in_f64(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class _Before:
    """What a call may change, as it was before: the random state, and the inputs that share memory with `written`."""

    def __init__(self, args: Sequence[Any], written: Sequence[int]) -> None:
        self._random = _Random(args)
        memory = {_memory(args[i]) for i in written}
        self._shared = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and _memory(arg) in memory]
        self._args = self._copied(args)

    def _copied(self, args: Sequence[Any]) -> list[Any]:
        result = list(args)
        # One deepcopy of all: what shares memory shares it in the copy.
        for i, tensor in zip(self._shared, copy.deepcopy([args[i].detach() for i in self._shared])):
            result[i] = tensor
        return result

    def again(self) -> list[Any]:
        """The arguments for one more run, which may write them; the random state is set back."""
        self._random.restore()
        return self._copied(self._args)

    def undo(self, args: Sequence[Any]) -> None:
        """Make the user's tensors and the random state what they were."""
        self._random.restore()
        for i in self._shared:
            args[i].untyped_storage().copy_(self._args[i].untyped_storage())


class _Random:
    """The state of the CPU's generator, and of those of the devices that `args` are on."""

    def __init__(self, args: Sequence[Any]) -> None:
        devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda}
        self._cpu, self._cuda = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Verified:
    """A compiled graph that is verified at the calls numbered in `CALLS`, counted for each combination of shapes.

    A call leaves the outputs, the inputs and the random state of `compiled`. Where that is wrong, an ERROR and the
    report say so, and this call and all that follow are the original's, eagerly; with `raises`, the call raises
    `VerificationError` and leaves nothing written.

    original: `pristine` of the graph before it was rewritten; rewritten: after; report: of the rewriting.
    """

    def __init__(
        self,
        original: GraphModule,
        rewritten: GraphModule,
        compiled: Callable[..., Any],
        report: GraphReport,
        raises: bool,
    ) -> None:
        self._original, self._rewritten, self._compiled = original, rewritten, compiled
        self._report, self._raises = report, raises
        self._written = written_inputs(original.graph)
        self._names: dict[str, str] = {}
        for site in report.sites:
            if site.call is not None:
                before = [self._names[site.call]] if site.call in self._names else []
                self._names[site.call] = " and ".join([*before, f"{site.fusion} at {site.path} ({site.source})"])
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()

    def __call__(self, *args: Any) -> Any:
        if self._report.faults:
            return self._original(*args)
        shapes = tuple(arg.shape for arg in args if isinstance(arg, Tensor))
        self._calls[shapes] += 1
        return self._verified(args) if self._calls[shapes] in CALLS else self._compiled(*args)

    def _verified(self, args: tuple[Any, ...]) -> Any:
        before = _Before(args, self._written)
        outputs = self._compiled(*args)
        after = _Random(args)
        faults = []
        try:
            with torch.no_grad():
                for fault in self._faults(self._values(outputs, args), before):
                    faults.append(fault)
        except Exception:
            log.exception("graph %s could not be verified; please report this", self._report.compile_id)
        if not faults:
            after.restore()
            return outputs
        before.undo(args)
        self._report.faults = faults
        message = f"graph {self._report.compile_id} does not compute what the original does:\n  " + "\n  ".join(faults)
        if self._raises:
            raise VerificationError(message)
        log.error("%s\nIt runs the original eagerly from now on.", message)
        return self._original(*args)

    def _values(self, outputs: Any, args: Sequence[Any]) -> list[Any]:
        """All that a run leaves: the outputs, and the inputs that it wrote."""
        return [*tree_leaves(outputs), *(args[i] for i in self._written)]

    def _run(self, run: Callable[..., Any], before: _Before) -> list[Any]:
        args = before.again()
        return self._values(run(*args), args)

    def _faults(self, got: list[Any], before: _Before) -> Iterator[str]:
        """What is wrong, in sentences: outputs and inputs, then sites."""
        want = self._run(self._original, before)
        rounded = [self._run(_Shaken(self._original).run, before) for _ in range(ROUNDINGS)]
        found = [_compare_any(mine, others, true) for mine, true, *others in zip(got, want, *rounded, strict=True)]
        inputs = [n.name for n in self._original.graph.find_nodes(op="placeholder")]
        outputs = [f"output {i}" for i in range(len(got) - len(self._written))]
        wrong = _sentences([*outputs, *(f"input '{inputs[i]}', which it writes" for i in self._written)], found)
        yield from wrong
        sites = _Sites(self._rewritten, self._names)
        sites.run(*before.again())
        yield from sites.faults
        if wrong and not sites.faults:
            yield self._misplaced(before)

    def _misplaced(self, before: _Before) -> str:
        """The first site whose reference gives something else than the original graph does there."""
        stand_ins = {n: n.meta["stands_for"] for n in self._rewritten.graph.nodes if "stands_for" in n.meta}
        keep = {name: name for name in stand_ins.values()}
        ours = _Sites(self._rewritten, self._names, {n.name: name for n, name in stand_ins.items()})
        eager, *shaken = _Kept(self._original, keep), *(_Shaken(self._original, keep) for _ in range(ROUNDINGS))
        for run in (ours, eager, *shaken):
            run.run(*before.again())
        for node, name in stand_ins.items():
            call = node.args[0] if node.target is operator.getitem else node
            assert isinstance(call, Node)
            found = compare(ours.kept[name], [run.kept[name] for run in shaken], eager.kept[name])
            if wrong := _sentences([f"{self._names[call.name]}, which is not what the graph computes there"], [found]):
                return wrong[0]
        return "no site by itself: what is wrong is in the rest of the graph, or in how it is run"


def _compare_any(got: Any, rounded: Sequence[Any], want: Any) -> tuple[float, float]:
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        return compare(got, rounded, want)
    return (0.0 if got == want else torch.inf), 0.0


def _sentences(names: Iterable[str], found: Iterable[tuple[float, float]]) -> list[str]:
    return [f"{name}: error {e:.3g}, the limit is {limit:.3g}" for name, (e, limit) in zip(names, found) if e > limit]
