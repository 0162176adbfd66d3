"""A report as one HTML page that needs nothing but itself."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from fusepass.html.code import Code, folds, located, shortened
from fusepass.report import CODES, GraphReport, Report, Site, alike, ranged


@dataclass
class Module:
    """A line of the tree: modules with one path but for their numbers, and the sites at them."""

    name: str
    modules: dict[str, "Module"] = field(default_factory=dict)
    groups: list[tuple[Site, list[int]]] = field(default_factory=list)
    """One of the sites that are alike, and the numbers of all."""


def page(report: Report, title: str) -> str:
    """The page. Raises ImportError where jinja2 is missing."""
    try:
        import jinja2
    except ImportError as missing:
        raise ImportError("Report.to_html needs jinja2: pip install fusepass[html]") from missing

    graphs = [_graph(graph) for graph in report.graphs]
    loader = jinja2.PackageLoader("fusepass", "html")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja").render(
        title=title,
        report=report,
        trees=[_tree(graph, content) for graph, content in zip(report.graphs, graphs)],
        data={"graphs": graphs, "codes": CODES, "references": _references(report)},
        fused=sum(site.fused for site in report.sites),
        work=_work(report),
    )


def _graph(graph: GraphReport) -> dict[str, Any]:
    """What the script shows of a graph. Lines are counted in the code as it is shown."""
    content: dict[str, Any] = {"code": None, "sites": [_site(site) for site in graph.sites]}
    if graph.before is not None and graph.after is not None:
        before, after = Code(graph.before), Code(graph.after)
        places = list(zip(*located(graph.sites, before, after))) or [(), ()]
        content["code"] = [
            {"lines": code.lines, "sites": lines, "folds": folds(code.lines, graph.sites, lines)}
            for code, lines in zip((before, after), places)
        ]
    return content


def _site(site: Site) -> dict[str, Any]:
    inputs = [(shortened(item.name), list(item.shape), item.dtype) for item in site.inputs]
    texts = {name: getattr(site, name) for name in ("fusion", "path", "source", "code", "op")}
    return {**texts, "reason": site.reason and shortened(site.reason), "nodes": len(site.nodes), "inputs": inputs}


def _tree(graph: GraphReport, content: dict[str, Any]) -> Module:
    root = Module("")
    groups = alike(graph.sites)
    if content["code"]:  # in its order
        groups.sort(key=lambda same: content["code"][0]["sites"][same[0]][:1])
    for same in groups:
        module = root
        for name in filter(None, ranged([graph.sites[i].path for i in same]).split(".")):
            module = module.modules.setdefault(name, Module(name))
        module.groups.append((graph.sites[same[0]], same))
    return _joined(root)


def _joined(module: Module) -> Module:
    """`module` with chains of single modules on one line."""
    modules = [_joined(inner) for inner in module.modules.values()]
    if len(modules) == 1 and not module.groups:
        (only,) = modules
        return Module(".".join(filter(None, (module.name, only.name))), only.modules, only.groups)
    return Module(module.name, {inner.name: inner for inner in modules}, module.groups)


def _references(report: Report) -> dict[str, str]:
    """The source of each op's definition in plain torch."""
    from fusepass.ops.library import OPS

    names = {name for site in report.sites for name in (site.fusion, site.op) if name}
    return {name: inspect.getsource(OPS[name].reference) for name in sorted(names) if name in OPS}


def _work(report: Report) -> dict[str, tuple[int, int]]:
    return {
        name: (
            sum(getattr(graph.work_before, name) for graph in report.graphs),
            sum(getattr(graph.work_after, name) for graph in report.graphs),
        )
        for name in ("operators", "activation_reads", "weight_bytes")
    }
