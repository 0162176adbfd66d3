"""What a report holds, prints and costs."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fusepass
from fusepass.report import CODES, SCHEMA_VERSION, GraphReport, Input, Report, Site, Work
from tests.models import fused, small_qwen3, static_cache

LAYERS, PROMPT = 3, 17


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    monkeypatch.setenv("COLUMNS", "140")


def ids(length: int = PROMPT) -> torch.Tensor:
    return torch.randint(152, (1, length))


@torch.no_grad()
def explained(**kwargs: Any) -> Report:
    return fusepass.explain(small_qwen3(LAYERS), ids(), use_cache=False, **kwargs)


def test_a_site_says_which_nodes_it_takes_what_it_reads_and_which_call_runs_it() -> None:
    (graph,) = explained().graphs
    site = next(site for site in graph.sites if (site.fusion, site.path) == ("norm_gated_mlp", "model.layers.1.mlp"))
    assert (site.op, site.fused, site.reason) == ("norm_gated_mlp", True, None)
    assert graph.before is not None
    assert graph.after is not None
    assert re.search(rf"\b{site.call}\b.* = torch.ops.fusepass.norm_gated_mlp", graph.after)
    for name in site.nodes:
        assert re.search(rf"\b{name}\b.* = ", graph.before), name
    # The op's node takes no name of the region's: a reader can tell the two graphs' nodes apart.
    assert len(site.nodes) == len(set(site.nodes)) == 14
    shapes = [(read.shape, read.dtype, read.weight) for read in site.inputs]
    assert shapes == [
        ((1, PROMPT, 56), "float32", False),
        ((56,), "float32", True),
        ((88, 56), "float32", True),
        ((88, 56), "float32", True),
        ((56, 88), "float32", True),
    ]  # the residual is the first of them again
    assert all(read.name in graph.before for read in site.inputs)


@torch.no_grad()
def test_a_site_that_a_join_runs_names_the_joins_call() -> None:
    model = small_qwen3(LAYERS)
    (graph,) = fusepass.explain(model, ids(1), past_key_values=static_cache(model, 1, 16)).graphs
    pair = [site for site in graph.sites if site.path == "model.layers.2.self_attn"]
    assert {site.fusion for site in pair} == {"norm_qkv_rope", "attention"}
    assert {site.op for site in pair} == {"self_attention"}
    assert len({site.call for site in pair}) == 1
    assert re.search(rf"\b{pair[0].call}\b.* = torch.ops.fusepass.self_attention", str(graph.after))


def test_the_work_counts_operators_reads_and_weights() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            y = self.linear(x.view(-1, 8)).to(x.dtype)  # 1 operator, 1 read: the view and the cast are none
            return (torch.relu(r) + y) * x.shape[0]  # 3 operators, 4 reads

    with torch.no_grad():
        (graph,) = fusepass.explain(Net(), torch.randn(4, 8), torch.randn(4, 8)).graphs
    assert graph.work_before == graph.work_after == Work(operators=4, activation_reads=5, weight_bytes=8 * 8 * 4)


def test_the_weights_of_a_model_are_counted_once_where_they_are_tied() -> None:
    with torch.no_grad():
        model = small_qwen3(1, tie_word_embeddings=True)
        (graph,) = fusepass.explain(model, ids(), use_cache=False).graphs
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert graph.work_before.weight_bytes == graph.work_after.weight_bytes == size


def test_the_diff_takes_out_the_norms_and_puts_in_the_ops() -> None:
    (graph,) = explained().graphs
    taken = [line for line in graph.diff().splitlines() if re.match(r"-\s+rsqrt", line)]
    put = [line for line in graph.diff().splitlines() if line.startswith("+") and "torch.ops.fusepass." in line]
    assert len(taken) == 4 * LAYERS + 1
    assert len(put) == 3 * LAYERS + 1


@torch.no_grad()
def test_code_is_kept_by_the_backend_only_under_debug_logging(caplog: pytest.LogCaptureFixture) -> None:
    def compiled() -> GraphReport:
        torch._dynamo.reset()
        torch.compile(small_qwen3(1), backend="fusepass", options={"remainder": "eager"})(ids(), use_cache=False)
        return fusepass.reports()[-1]

    quiet = compiled()
    assert quiet.before is quiet.after is None
    with pytest.raises(ValueError, match="no code; use fusepass.explain"):
        quiet.diff()
    caplog.set_level(logging.DEBUG, "fusepass")
    assert "torch.ops.fusepass.norm_gated_mlp" in compiled().diff()
    lines = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    assert "model.layers.0.mlp: norm_gated_mlp fused" in lines


def site(path: str, fusion: str = "rms_norm", code: str | None = None, reason: str | None = None) -> Site:
    return Site(fusion, path, "model.py:7, in forward: y", code, reason, op=None if code else fusion)


def test_the_table_collapses_layers_and_ends_with_reasons_and_totals() -> None:
    sites = [site(f"model.layers.{i}.norm", "norm_qkv_rope") for i in range(36)]
    sites += [site(f"model.layers.{i}.mlp", "norm_gated_mlp", "extra-user", f"'mul_{i}' is used") for i in (0, 2)]
    graph = GraphReport("0/0", sites, work_before=Work(100, 90, 2**31), work_after=Work(10, 9, 2**31))
    rows = [re.sub(r"\s+", " ", line) for line in str(Report([graph])).splitlines()]
    assert "model.layers.{0-35}.norm norm_qkv_rope fused 36" in rows
    assert "model.layers.{0,2}.mlp norm_gated_mlp refused: extra-user 2" in rows
    assert "model.layers.{0,2}.mlp norm_gated_mlp x2: 'mul_0' is used" in rows
    assert " model.py:7, in forward: y" in rows
    assert f" extra-user: {CODES['extra-user']}" in rows
    assert "sites 36 fused, 2 refused" in rows
    assert "operators 100 -> 10" in rows
    assert "activation reads 90 -> 9 (81 saved)" in rows
    assert "weights 2.00 GiB" in rows


def test_the_table_is_coloured_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report([GraphReport("0/0", [site("norm")])])
    assert "\x1b[" not in str(report)
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32mfused" in str(report)


def test_a_report_without_sites_says_so() -> None:
    assert "no region of the model matches a fusion" in str(Report([GraphReport("0/0")]))
    assert "graph 0/0: untouched: a fault" in str(Report([GraphReport("0/0", untouched="a fault")]))
    assert "not traced to the end: values" in str(Report([], stopped="values"))


def schema() -> dict[str, dict[str, str]]:
    """Type by field by object, from the tables of docs/report-schema.md."""
    text = (Path(__file__).parent.parent / "docs" / "report-schema.md").read_text()
    sections = re.split(r"^## (\w+)$", text, flags=re.M)[1:]
    rows = {
        name: re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", body, re.M) for name, body in zip(sections[::2], sections[1::2])
    }
    return {name: dict(found) for name, found in rows.items()}


def assert_is(kind: str, item: Any) -> None:
    plain = {"string": str, "integer": int, "boolean": bool, "null": type(None)}
    if kind.startswith("list of "):
        assert isinstance(item, list)
        for each in item:
            assert_is(kind.removeprefix("list of "), each)
    elif " or " in kind:
        assert type(item) in [plain[name] for name in kind.split(" or ")], (kind, item)
    elif kind in plain:
        assert type(item) is plain[kind], (kind, item)
    else:
        fields = schema()[kind]
        assert set(item) == set(fields), kind
        for name, of in fields.items():
            assert_is(of, item[name])


def test_the_json_is_what_the_documentation_says() -> None:
    refused = Site(
        "rms_norm", "norm", "", "grad", "'x' needs a gradient", inputs=(Input("x", ("s0", 8), "float32", False),)
    )
    report = explained()
    report.graphs.append(GraphReport("1", [refused]))
    content = json.loads(report.to_json())
    assert_is("Report", content)
    assert content["schema_version"] == SCHEMA_VERSION
    assert [found["fused"] for graph in content["graphs"] for found in graph["sites"]] == [
        found.fused for found in report.sites
    ]
    assert content["graphs"][1]["sites"][0]["inputs"][0]["shape"] == ["s0", 8]


@torch.no_grad()
def test_the_reports_of_what_was_compiled_print_the_same_table() -> None:
    model, tokens = small_qwen3(LAYERS), ids()
    torch.compile(model, backend="fusepass", options={"remainder": "eager"})(tokens, use_cache=False)
    assert str(Report(fusepass.reports())) == str(fusepass.explain(model, tokens, use_cache=False))


@torch.no_grad()
def test_reset_forgets_the_reports_and_nothing_else() -> None:
    report = explained()
    torch.compile(small_qwen3(1), backend="fusepass", options={"remainder": "eager"})(ids(), use_cache=False)
    assert len(fusepass.reports()) == 1
    fusepass.reset()
    assert fusepass.reports() == []
    assert report.counts()["norm_gated_mlp"] == LAYERS


@torch.no_grad()
def test_a_report_keeps_no_graph_alive() -> None:
    import gc
    import weakref

    _, (report,), graphs = fused(small_qwen3(1), ids(), use_cache=False)
    alive = [weakref.ref(gm) for gm in graphs]
    graphs.clear()
    torch._dynamo.reset()
    gc.collect()
    assert report.sites
    assert [ref() for ref in alive] == [None]


@torch.no_grad()
def test_tlparse_gets_the_report_and_both_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logs = torch._logging._internal
    handler = logs.LazyTraceHandler(str(tmp_path))
    handler.setFormatter(logs.TorchLogsFormatter(trace=True))
    monkeypatch.setattr(logs, "LOG_TRACE_HANDLER", handler)
    monkeypatch.setattr(logs.trace_log, "handlers", [handler])
    torch.compile(small_qwen3(1), backend="fusepass", options={"remainder": "eager"})(ids(), use_cache=False)
    handler.close()
    (file,) = tmp_path.iterdir()
    # A record is a line of JSON, and its payload the lines after it, with a tab before each.
    records = re.findall(r"^V\d+ .*?\] (\{.*\})\n((?:\t.*\n)*)", file.read_text(), re.M)
    artifacts = {
        meta["artifact"]["name"]: re.sub("^\t", "", payload, flags=re.M)
        for meta, payload in ((json.loads(line), payload) for line, payload in records)
        if "artifact" in meta
    }
    assert "rsqrt" in artifacts["fusepass_before"]
    assert "torch.ops.fusepass.norm_qkv_rope" in artifacts["fusepass_after"]
    assert_is("Report", json.loads(artifacts["fusepass_report"]))
