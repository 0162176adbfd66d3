"""The package as it is installed."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path | None = None, **env: str) -> str:
    """What `code` prints in a fresh process. The working directory comes first on its path."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_is_cheap_and_needs_neither_torch_nor_triton() -> None:
    code = "import sys, fusepass; print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    assert python(code) == "[]"


def test_the_backend_and_its_ops_load_without_triton() -> None:
    hide = "import sys; sys.modules['triton'] = None; "
    code = hide + "import fusepass; print(*[f.name for f in fusepass.fusions()])"
    assert python(code) == "norm_gated_mlp norm_qkv_rope attention self_attention linear_residual norm_linear rms_norm"


def test_the_backend_is_found_by_name_without_an_import() -> None:
    assert [e.value for e in entry_points(group="torch_dynamo_backends", name="fusepass")] == [
        "fusepass.backend:fusepass"
    ]
    assert python("import torch; print('fusepass' in torch._dynamo.list_backends())") == "True"


def test_a_wheel_holds_the_patterns_as_a_subpackage(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "fusepass/patterns/norm_qkv_rope.py" in names
    assert "fusepass/py.typed" in names
    assert {f"fusepass/html/{name}" for name in ("page.html.jinja", "script.js", "style.css")} <= set(names)
    assert not any(name.startswith(("tests/", "patterns/", "benchmarks/", "examples/")) for name in names)
    code = "import fusepass; print(fusepass.__file__, len(fusepass.fusions()))"
    home, count = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert home.startswith(str(tmp_path))
    assert int(count) >= 4


@pytest.mark.parametrize("name", ["GraphReport", "Options", "Site", "fusions", "reports", "reset"])
def test_public_names_exist_and_are_documented(name: str) -> None:
    import fusepass

    assert name in fusepass.__all__
    assert getattr(fusepass, name).__doc__


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import fusepass

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fusepass.nothing
