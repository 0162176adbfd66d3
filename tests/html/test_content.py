"""What is on the page of a report; no browser is needed."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fusepass
from fusepass.cli import build
from fusepass.html.code import Code, folds, located, shortened
from fusepass.report import GraphReport, Report, Site
from tests.html.conftest import LAYERS, ODD
from tests.models import small_qwen3

TINY = str(Path(__file__).parents[2] / "examples" / "tiny-qwen3")
Written = Callable[[Report], Path]


def codes(report: Report) -> tuple[Code, Code]:
    (graph,) = report.graphs
    assert graph.before is not None
    assert graph.after is not None
    return Code(graph.before), Code(graph.after)


def data(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found)


def names(lines: list[str], at: list[int]) -> set[str]:
    return {re.split(r"[: ]", lines[i])[0] for i in at}


@pytest.mark.parametrize("which", ["fused", "mixed"])
def test_a_fused_site_is_linked_to_its_nodes_before_and_to_its_op_after(
    which: str, request: pytest.FixtureRequest
) -> None:
    report: Report = request.getfixturevalue(which)
    before, after = codes(report)
    for site, (left, right) in zip(report.sites, located(report.sites, before, after)):
        assert names(before.lines, left) == set(site.nodes)
        if site.fused:
            assert f"torch.ops.fusepass.{site.op}.default(" in after.lines[right[0]]
            assert all(re.search(rf" = {site.call}\[\d\]$", after.lines[i]) for i in right[1:])
    several = [right for _, right in located(report.sites, before, after) if len(right) > 1]
    assert bool(several) == (which == "mixed"), "norm_qkv_rope has three results, unless it is joined"


def test_a_refused_site_is_linked_to_what_became_of_it(mixed: Report) -> None:
    before, after = codes(mixed)
    (left, right) = next(
        lines for site, lines in zip(mixed.sites, located(mixed.sites, before, after)) if not site.fused
    )
    assert [before.lines[i] for i in left] == [after.lines[i] for i in right]
    assert "tanh" in before.lines[left[0]]


def test_what_a_refused_site_shares_with_a_fused_one_is_linked_to_its_op() -> None:
    before, after = (
        Code("def forward(self):\nadd = x + y\nmul = add * 2"),
        Code("def forward(self):\nop = ops.op(x, y)"),
    )
    sites = [
        Site("a", "", "", "structure", "", nodes=("add",)),
        Site("b", "", "", op="b", call="op", nodes=("add", "mul")),
    ]
    assert located(sites, before, after) == [([1], [1]), ([1, 2], [1])]


def test_checkpointed_layers_have_names_of_their_own() -> None:
    model = small_qwen3(3)
    model.gradient_checkpointing_enable()
    model.train().requires_grad_(True)
    report = fusepass.explain(model, torch.zeros(1, 9, dtype=torch.int64), use_cache=False)
    before, after = codes(report)
    assert len(before.blocks) == 4
    for site, (left, right) in zip(report.sites, located(report.sites, before, after)):
        assert names(before.lines, left) == set(site.nodes)
        assert left == right, "all need a gradient"
        layers = re.findall(r"model\.layers\.(\d+)\.", "\n".join(before.lines[i] for i in left))
        assert all(site.path.startswith(f"model.layers.{layer}.") for layer in layers)


def test_equal_layers_are_folded_on_both_sides(fused: Report) -> None:
    before, after = codes(fused)
    for code, places in zip((before, after), zip(*located(fused.sites, before, after))):
        ((start, end, name),) = folds(code.lines, fused.sites, places)
        assert name == f"model.layers.2-{LAYERS - 1}: the same as 1"
        inside = "\n".join(code.lines[start:end])
        assert all(f"model.layers.{i}.mlp.down_proj.weight" in inside for i in range(2, LAYERS))
        assert "model.layers.1.mlp" not in inside
        assert "model.norm.weight" not in inside


def test_a_layer_that_differs_is_not_folded(mixed: Report) -> None:
    before, after = codes(mixed)
    places = [left for left, _ in located(mixed.sites, before, after)]
    assert not any(start <= i < end for start, end, _ in folds(before.lines, mixed.sites, places) for i in odd(before))


def odd(code: Code) -> list[int]:
    return [i for i, line in enumerate(code.lines) if f"model.layers.{ODD}.mlp" in line]


def test_layers_of_other_sizes_are_not_folded() -> None:
    sites = [Site("f", f"layers.{i}", "") for i in range(5)]
    places = [[2 * i + 1] for i in range(5)]

    def lines(width: int) -> list[str]:
        return [line for i in range(5) for line in ("# file.py:7 y", f'y_{i}: "f32[{width if i == 4 else 8}]" = x_{i}')]

    assert folds(lines(8), sites, places) == [(2, 10, "layers.1-4: the same as 0")]
    assert folds(lines(9), sites, places) == [(2, 8, "layers.1-3: the same as 0")]


def test_the_code_shown_is_the_code_without_aliases_and_deletions(fused: Report) -> None:
    before, _ = codes(fused)
    assert fused.graphs[0].before is not None
    assert len(before.lines) < fused.graphs[0].before.count("\n")
    assert not any("= None" in line or "L_self" in line or "l_self" in line for line in before.lines)
    assert (
        'linear: "f32[1, 1, 96]" = torch._C._nn.linear(hidden_states_2, model.layers.0.self_attn.q_proj.weight, None)'
        in (before.lines)
    )


def test_weights_have_the_names_they_have_in_the_model() -> None:
    assert shortened("l_self_modules_model_modules_norm_parameters_weight_ * x") == "model.norm.weight * x"
    assert shortened("f(l_self_modules_a_b_buffers_inv_freq_)") == "f(a_b.inv_freq)"
    assert shortened("l_self_parameters_scale_") == "scale"
    assert shortened("l_args_0_ + pow_1") == "l_args_0_ + pow_1"


def test_what_a_site_reads_is_named_as_in_the_code_before(fused: Report) -> None:
    assert fused.graphs[0].before is not None
    known = set(re.findall(r"\w+", fused.graphs[0].before))
    assert {item.name for site in fused.sites for item in site.inputs} <= known


def test_the_tree_has_a_line_for_all_layers_that_are_alike(fused: Report, written: Written) -> None:
    page = written(fused).read_text()
    rows = re.findall(r'<span class="row module">(.*?)</span>', page)
    assert rows == [f"model.layers.{{0-{LAYERS - 1}}}", "self_attn", "o_proj", "mlp", "lm_head"]
    assert len(re.findall(r'<li role="treeitem"', page)) == len(rows) + 5
    assert re.findall(r'class="count">(.*?)<', page) == [f"x{LAYERS}"] * 4


def test_layers_that_are_alike_are_named_by_ranges(mixed: Report, written: Written) -> None:
    assert f"model.layers.{{0-{ODD - 1},{ODD + 1}}}.mlp" in str(mixed)
    assert f'<span class="row module">{{0-{ODD - 1},{ODD + 1}}}.mlp</span>' in written(mixed).read_text()


def test_the_page_says_the_reason_and_holds_the_references(mixed: Report, written: Written) -> None:
    found = data(written(mixed).read_text())
    (miss,) = (site for site in found["graphs"][0]["sites"] if site["code"])
    assert miss["path"] == f"model.layers.{ODD}.mlp"
    assert miss["reason"] == next(site.reason for site in mixed.sites if not site.fused)
    assert "def reference(" in found["references"]["norm_gated_mlp"]
    assert found["codes"] == fusepass.report.CODES


def test_the_page_needs_nothing_but_itself(mixed: Report, written: Written) -> None:
    page = written(mixed).read_text()
    shell = (
        page.replace(json.dumps(data(page)), "").split('<script type="application/json"')[0]
        + page.split("</script>")[-2]
    )
    assert not re.search(
        r"""\b(src|href|action)\s*=|url\(|@import|\bimport\(|fetch\(|XMLHttpRequest|WebSocket""", shell
    )
    assert "default-src 'none'" in shell, "the browser sees to it"


def test_texts_cannot_leave_their_place(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    site = Site("f", evil, evil, "structure", evil)
    code = f"def forward(self):\n{evil}"
    graph = GraphReport(evil, [site], untouched=evil, before=code, after=code)
    Report([graph], stopped=evil).to_html(tmp_path / "page.html", title=evil)
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page
    assert page.count("</script>") == 2


def test_a_report_without_code_or_sites_or_graphs_has_a_page(tmp_path: Path, mixed: Report) -> None:
    path = tmp_path / "page.html"
    bare = dataclasses.replace(mixed.graphs[0], before=None, after=None, faults=["a fault"])
    Report([bare, GraphReport("1/0", untouched="it runs on a CPU")]).to_html(path)
    page = path.read_text()
    assert "graph 0</span>" in page
    assert "Graph 1/0: it runs on a CPU" in page
    assert "Graph 0: a fault" in page
    assert [graph["code"] for graph in data(page)["graphs"]] == [None, None]
    Report([], stopped="values").to_html(path)
    page = path.read_text()
    assert "Not traced to the end: values" in page
    assert "No region of the model matches a fusion" in page


def test_without_jinja2_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install fusepass\[html\]"):
        Report([]).to_html(tmp_path / "page.html")


def test_explain_writes_a_page(tmp_path: Path) -> None:
    done = CliRunner().invoke(build(), ["explain", TINY, "--decode", "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "<h1>tiny-qwen3: a decode step, cache of 128</h1>" in (tmp_path / "page.html").read_text()
    assert "norm_gated_mlp" in done.stdout


def test_explain_says_in_one_line_that_it_cannot_write(tmp_path: Path) -> None:
    done = CliRunner().invoke(build(), ["explain", TINY, "--seq", "7", "--html", str(tmp_path / "none" / "page.html")])
    assert done.exit_code == 2
    assert done.stderr == f"fusepass: cannot write {tmp_path}/none/page.html: No such file or directory\n"
