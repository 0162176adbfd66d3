"""What users can set: `torch.compile(model, backend="fusepass", options={...})`, and the environment."""

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from fusepass.fusion import Fusion, fusions

CpuMode = Literal["off", "reference", "interpret"]


@dataclass(frozen=True)
class Options:
    """Options of the backend. All have defaults; an unknown one is an error that names the known ones."""

    fusions: Mapping[str, bool] = field(default_factory=dict)
    """Switches by fusion name: `{"norm_qkv_rope": False}`. Fusions not named keep their default."""
    precision: Literal["match", "high"] = "match"
    """"match" rounds intermediate values where the eager graph does; "high" keeps f32 through each fused region."""
    remainder: Literal["inductor", "eager"] = "inductor"
    """What runs the rewritten graph: Inductor, or eager PyTorch node by node (for debugging)."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's own options (`torch._inductor.list_options()`), passed through."""
    mode: str | None = None
    """As `torch.compile(mode=...)`, which torch does not allow together with `options`: "default",
    "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs"."""
    strict: bool = False
    """Raise when a graph that has RMSNorms got no fusion, whatever the cause."""
    verify: bool | Literal["raise"] = False
    """Compare the first and third call of each graph, with each new combination of shapes, with the original graph, and
    each site with its reference. What fails is reported and runs the original eagerly from then on; "raise" raises."""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> "Options":
        """Validated options. Raises ValueError or TypeError that names the option and what was expected."""
        if not isinstance(options, Mapping | None):
            raise TypeError(f"fusepass: options is {options!r}; expected a dict")
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"fusepass: unknown option '{name}'{_near(name, known)}; known options: {', '.join(known)}"
                )
        if mode is not None and given.get("mode") not in (None, mode):
            raise ValueError(f"fusepass: mode is given twice, as {mode!r} and as options['mode']={given['mode']!r}")
        given["mode"] = mode or given.get("mode")
        parsed = cls(**given)
        parsed._validate()
        return parsed

    def _validate(self) -> None:
        from torch._inductor import list_mode_options

        hints = get_type_hints(type(self))
        choices = {name: get_args(hints[name]) for name in ("precision", "remainder")}
        choices["mode"] = (None, *list_mode_options())
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"fusepass: option '{name}' is {getattr(self, name)!r}; expected one of {allowed}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"fusepass: option 'strict' is {self.strict!r}; expected True or False")
        if not isinstance(self.verify, bool) and self.verify != "raise":
            raise ValueError(f"fusepass: option 'verify' is {self.verify!r}; expected True, False or 'raise'")
        for name in ("fusions", "inductor"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"fusepass: option '{name}' is {getattr(self, name)!r}; expected a dict")
        for name in self.inductor:
            if not isinstance(name, str):
                raise TypeError(f"fusepass: option 'inductor' has the key {name!r}; expected an option's name")
        registered = [fusion.name for fusion in fusions()]
        for name, switch in self.fusions.items():
            if name not in registered:
                near = _near(name, registered)
                raise ValueError(
                    f"fusepass: unknown fusion '{name}'{near}; registered fusions: {', '.join(registered)}"
                )
            if not isinstance(switch, bool):
                raise TypeError(f"fusepass: the switch of fusion '{name}' is {switch!r}; expected True or False")

    def enabled(self, fusion: Fusion[Any]) -> bool:
        """Whether `fusion` is to be tried."""
        return self.fusions.get(fusion.name, fusion.default)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def disabled() -> bool:
    """Whether FUSEPASS_DISABLE is 1: the backend is then exactly Inductor. Raises ValueError for an unknown value."""
    setting = os.environ.get("FUSEPASS_DISABLE", "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"FUSEPASS_DISABLE is {setting!r}; expected 0 or 1")
    return setting == "1"


def cpu_mode() -> CpuMode:
    """What to do with a CPU graph: FUSEPASS_CPU. Raises ValueError for an unknown value, and RuntimeError for
    "interpret" in a process where Triton was imported without its interpreter."""
    mode = os.environ.get("FUSEPASS_CPU") or "off"
    if mode not in get_args(CpuMode):
        raise ValueError(f"FUSEPASS_CPU is {mode!r}; expected one of {', '.join(get_args(CpuMode))}")
    # A function of Triton's language is made for the interpreter or for the compiler when it is imported.
    triton = sys.modules.get("triton")
    compiles = triton is not None and isinstance(triton.language.sum, triton.JITFunction)
    if mode == "interpret" and (compiles or os.environ.get("TRITON_INTERPRET") != "1"):
        raise RuntimeError("FUSEPASS_CPU=interpret needs TRITON_INTERPRET=1 in the environment before Python starts")
    return mode  # type: ignore[return-value]
