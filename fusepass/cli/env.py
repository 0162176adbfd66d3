"""`python -m fusepass env`: what a bug report needs to say."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("fusepass", "torch", "triton", "transformers")
_VARIABLES = ("FUSEPASS_CPU", "FUSEPASS_DISABLE", "TORCH_LOGS", "TRITON_INTERPRET")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def env() -> None:
    """Print versions, GPUs and settings, to paste into a bug report."""
    import torch

    from fusepass import tuning

    lines = [("python", platform.python_version()), ("system", platform.platform())]
    lines += [(package, _version(package)) for package in _PACKAGES]
    lines.append(("cuda of torch", torch.version.cuda or "none"))
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        lines.append((f"gpu {i}", f"{found.name}, compute capability {found.major}.{found.minor}, {memory}"))
    if torch.cuda.is_available():
        lines.append(("tuned configs", f"{len(tuning.table())}, the user's in {tuning.user_table()}"))
    else:
        lines.append(("gpu", "none"))
    lines += [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:{width}}  {text}")
