"""fusepass: a torch.compile backend that runs Hugging Face models on fused Triton kernels.

    torch.compile(model, backend="fusepass")      # or model.compile(backend="fusepass")
    fusepass.reports()                            # what was fused where, and why not elsewhere
    fusepass.explain(model, input_ids)            # the same ahead, without running anything
    model.generate(..., custom_generate=fusepass.decode_loop())  # tokens without waiting for each

No import is needed for the backend itself. Importing this package imports neither torch nor Triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusepass.decoding import decode_loop
    from fusepass.explanation import explain
    from fusepass.fusion import fusions
    from fusepass.options import Options
    from fusepass.report import GraphReport, Report, Site, reports, reset

__version__ = "0.1.0"
__all__ = ["GraphReport", "Options", "Report", "Site", "decode_loop", "explain", "fusions", "reports", "reset"]

_HOMES = {
    "GraphReport": "report",
    "Options": "options",
    "Report": "report",
    "Site": "report",
    "decode_loop": "decoding",
    "explain": "explanation",
    "fusions": "fusion",
    "reports": "report",
    "reset": "report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
