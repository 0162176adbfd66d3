"""Which records are finished, what they say, and how they are shown."""

import json
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

import fusepass
from fusepass.bench import picture, results
from fusepass.bench.results import Record, best, over_inductor, read, read_all, troubles, unfinished, write
from fusepass.bench.table import show
from tests.bench.conftest import measured, rows

WHERE = {"gpu": "GPU 1", "torch": "2.11", "triton": "3.6", "transformers": "5.17", "commit": "abc"}


def record(tmp_path: Path, changes: dict[str, Any] | None = None, **shape: Any) -> Record:
    """A record on disk."""
    row = rows(**shape)[-1]
    return write(tmp_path / row.file, row, WHERE, measured(**changes or {}))


def test_a_record_of_the_same_row_and_environment_is_finished(tmp_path: Path) -> None:
    (row,) = rows()
    assert unfinished(row, WHERE, read(tmp_path / row.file)) == "not measured yet"
    record(tmp_path)
    assert unfinished(row, WHERE, read(tmp_path / row.file)) is None


@pytest.mark.parametrize("name", list(WHERE))
def test_another_environment_is_measured_again_and_the_reason_names_it(tmp_path: Path, name: str) -> None:
    (row,) = rows()
    assert unfinished(row, {**WHERE, name: "new"}, record(tmp_path)) == f"{name} was {WHERE[name]}, is new"


@pytest.mark.parametrize(("name", "value"), [("cache", 64), ("steps", 5), ("rounds", 2), ("device", "cuda")])
def test_other_settings_are_measured_again_and_the_reason_names_them(tmp_path: Path, name: str, value: Any) -> None:
    (row,) = rows(**{name: value})
    assert unfinished(row, WHERE, record(tmp_path)).startswith(f"{name} was ")


@pytest.mark.parametrize("change", [{"context": 9}, {"batches": [2]}, {"dtype": "float16"}, {"model": "Qwen3-8B"}])
def test_another_shape_has_a_file_of_its_own(change: dict[str, Any]) -> None:
    assert rows(**change)[0].file != rows()[0].file


def test_a_record_without_a_mode_that_is_asked_for_is_not_finished_but_one_with_more_is(tmp_path: Path) -> None:
    found = record(tmp_path)
    assert unfinished(rows(modes=("eager", "fusepass-max"))[0], WHERE, found) == "without fusepass-max"
    assert unfinished(rows(modes=("eager",))[0], WHERE, found) is None


def test_a_row_that_failed_is_tried_again_but_not_one_in_which_a_mode_failed(tmp_path: Path) -> None:
    (row,) = rows()
    assert (
        unfinished(row, WHERE, write(tmp_path / "r", row, WHERE, {"error": "no memory"})) == "failed before: no memory"
    )
    assert unfinished(row, WHERE, record(tmp_path, {"inductor": {"error": "no memory"}})) is None


def test_a_file_that_cannot_be_read_counts_as_not_measured(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"model": "Qw')
    assert read(tmp_path / "half.json") is None


@pytest.mark.parametrize(
    "change", [{"batch": "1"}, {"modes": []}, {"modes": {"eager": 1}}, {"modes": {"eager": {"ms": 1}}}, {"date": None}]
)
def test_a_record_with_other_contents_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    found = record(tmp_path)
    (path,) = tmp_path.iterdir()
    assert read(path) == found
    path.write_text(json.dumps(found | change))
    assert read(path) is None


def test_rows_that_would_share_a_file_are_refused_and_both_are_named() -> None:
    for two in (["a/m", "b/m"], ["Qwen3-0.6B", "Qwen/Qwen3-0.6B"]):
        with pytest.raises(ValueError, match=f"{two[0]} and {two[1]} would share the record prefill-"):
            rows(models=two, decode=False, prefill=[5])
    assert len(rows(models=["a/m", "a/m", "b/n"])) == 2


@pytest.mark.parametrize("model", [".", "..", "sub/.."])
def test_a_folder_without_a_name_of_its_own_is_recorded_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub" if model == ".." else tmp_path)
    (row,) = rows(model)
    assert row.model == str(tmp_path)
    assert row.file == f"decode-{tmp_path.name}-b1-c8-float32.json"


def test_the_best_mode_ran_and_agrees_with_eager(tmp_path: Path) -> None:
    found = record(tmp_path)
    assert (best(found, "inductor"), best(found, "fusepass")) == ("inductor-max-autotune", "fusepass-reduce-overhead")
    assert over_inductor(found, "fusepass-reduce-overhead") == pytest.approx(2.0)
    wrong = record(tmp_path, {"inductor_max_autotune": {"wrong": True}})
    assert best(wrong, "inductor") == "inductor"
    assert over_inductor(wrong, "inductor-max-autotune") is None
    failed = record(tmp_path, {"inductor_max_autotune": {"error": "x"}, "inductor": {"error": "x"}})
    assert best(failed, "inductor") is None
    assert over_inductor(failed, "fusepass") is None


def test_troubles_are_errors_wrong_logits_and_graphs_that_were_not_replayed(tmp_path: Path) -> None:
    assert troubles(record(tmp_path)) == []
    found = record(
        tmp_path,
        {
            "eager": {"graph_replays": 0},
            "inductor": {"wrong": True, "logits_error": 0.9},
            "inductor_max_autotune": {"error": "no memory"},
            "fusepass_reduce_overhead": {"graph_replays": 0},
        },
    )
    assert troubles(found) == [
        "inductor: WRONG: its logits are 0.9 off eager's, the limit is 0.05",
        "inductor-max-autotune: no memory",
        "fusepass-reduce-overhead: no CUDA graph was replayed",
    ]


def shown(found: Record) -> str:
    console = Console(record=True, width=140)
    show(found, console)
    return console.export_text()


def test_the_table_shows_each_mode_and_flags_a_wrong_one(tmp_path: Path) -> None:
    lines = shown(record(tmp_path, {"inductor": {"wrong": True, "logits_error": 0.9}})).splitlines()
    (ours,) = (line for line in lines if "fusepass-reduce-overhead" in line)
    assert ours.split("│")[2:-1] == [
        *("  1.000 ", " 0.010 ", " 1,000 ", "       2.00 ", "    50.0 ", "     300 ", "      1 ", "     9.0 "),
        *("    1.50 ", "       1.0e-02 "),
    ]
    (wrong,) = (line for line in lines if "inductor " in line)
    assert "9.0e-01 WRONG" in wrong
    assert wrong.split("│")[5].strip() == "-"  # it has no place in the comparison


def test_the_table_shows_a_mode_that_failed_without_figures(tmp_path: Path) -> None:
    found = record(tmp_path)
    found["modes"]["inductor"] = {"error": "no memory"}
    (line,) = (line for line in shown(found).splitlines() if "inductor " in line)
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["-"] * 10


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_picture_has_a_line_for_each_record_and_is_not_blank(tmp_path: Path, kind: str) -> None:
    assert picture.draw(tmp_path, kind) is None
    shape = {} if kind == "decode" else {"decode": False, "prefill": [5]}
    record(tmp_path, {"inductor": {"error": "no memory"}}, **shape)
    heights = []
    for batch in (1, 2):
        record(tmp_path, batches=[batch], **shape)
        path = picture.draw(tmp_path, kind)
        assert path == tmp_path / f"{kind}.png"
        pixels = matplotlib.image.imread(path)
        heights.append(pixels.shape[0])
        assert (pixels[..., :3] == 1).all(-1).mean() > 0.8  # light
        assert len({tuple(color) for color in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()}) > 10
    assert heights[1] > heights[0]


def test_what_all_records_share_is_in_the_title_and_the_rest_in_the_labels(tmp_path: Path) -> None:
    for context in (8, 9):
        record(tmp_path, context=context)
    assert picture._labels(read_all(tmp_path, "decode")) == (
        "GPU 1, float32",
        ["Qwen3-0.6B, batch 1, context 8", "Qwen3-0.6B, batch 1, context 9"],
    )


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_code_that_differs_from_its_commit_or_has_none_is_named_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fusepass"
    for folder in (package, tmp_path / "patterns"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (package / "patterns").symlink_to("../patterns")
    monkeypatch.setattr(fusepass, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(results, "code_identity", lambda: bytes.fromhex("00112233445566"))
    assert results.code_version() == f"{fusepass.__version__}+00112233"

    git(tmp_path, "init", "-q")
    assert results.code_version() == f"{fusepass.__version__}+00112233"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert results.code_version() == head

    (tmp_path / "README.md").write_text("results are no code")
    assert results.code_version() == head
    (tmp_path / "patterns" / "new.py").write_text("")
    assert results.code_version() == f"{head}+00112233"


def test_the_readme_shows_the_records_in_the_repository() -> None:
    from benchmarks import readme_table

    text = (readme_table.ROOT / "README.md").read_text()
    assert readme_table.section() == text.split(readme_table.BEGIN)[1].split(readme_table.END)[0].strip()


def test_the_readme_leaves_out_a_mode_that_failed_or_is_wrong(tmp_path: Path) -> None:
    from benchmarks import readme_table

    cells = "| Qwen3-0.6B, batch 1 | 50 | 167 | - | 500 | **1,000** | 2.00x | 50 % | 300 → 300 |"
    assert readme_table.row(record(tmp_path), "decode") == cells
    found = record(tmp_path, {"inductor_max_autotune": {"wrong": True}, "eager": {"error": "x"}})
    assert readme_table.row(found, "decode") == (
        "| Qwen3-0.6B, batch 1 | - | 167 | - | - | **1,000** | 6.00x | 50 % | 300 → 300 |"
    )


def test_a_record_is_json_that_any_program_can_read(tmp_path: Path) -> None:
    (row,) = rows()
    record(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / row.file).read_text(), parse_constant=refuse)
    assert {"gpu", "torch", "triton", "transformers", "commit", "date", "dtype", "context", "modes"} <= found.keys()
    assert not list(tmp_path.glob("*.part"))
