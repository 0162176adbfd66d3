"""Clock, memory and profile of the device that is measured. The CPU's stand-in lets the tests run the whole path."""

import gc
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch

Work = Callable[[], object]


class Cuda:
    """The current CUDA device."""

    name: ClassVar[str] = "cuda"

    def bandwidth(self) -> float:
        """Bytes per second of a plain read."""
        from fusepass.bench import stream

        measured = stream.bandwidth()
        self.collect()
        return measured

    def milliseconds(self, before: Work, work: Work, times: int) -> float:
        """Time on the device of `times` calls of `work`; `before` runs ahead of each, untimed. The host waits once."""
        events = []
        for _ in range(times):
            before()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            events.append((begin, end))
        self.wait()
        return sum(begin.elapsed_time(end) for begin, end in events)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def collect(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        torch.cuda.empty_cache()

    def reset_peak(self) -> int:
        """Forget the peak of memory; bytes allocated now."""
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most bytes allocated since `reset_peak`."""
        return torch.cuda.max_memory_allocated()

    def profile(self, work: Work) -> dict[str, Any]:
        """What one call of `work` runs on the device: kernels (copies and fills count), CUDA graphs replayed, and the
        40 longest by name with their counts and microseconds. Empty where the profiler sees nothing."""
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            work()
            self.wait()
        events = trace.key_averages()
        rows = [
            {"kernel": e.key, "count": e.count, "us": round(e.self_device_time_total, 1)}
            for e in events
            if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        if not rows:
            return {}  # the driver may keep its counters to root
        return {
            "kernels": sum(row["count"] for row in rows),
            "graph_replays": sum(e.count for e in events if e.key == "cudaGraphLaunch"),
            "profile": sorted(rows, key=lambda row: -row["us"])[:40],
        }


class Cpu(Cuda):
    """The same on a CPU, where there are neither kernels to count nor memory to watch."""

    name = "cpu"

    def bandwidth(self) -> float:
        x = torch.ones(1 << 24)
        x.sum()
        return x.nbytes / self.milliseconds(lambda: None, x.sum, 4) * 4e3

    def milliseconds(self, before: Work, work: Work, times: int) -> float:
        total = 0.0
        for _ in range(times):
            before()
            begin = time.perf_counter()
            work()
            total += time.perf_counter() - begin
        return total * 1e3

    def wait(self) -> None: ...

    def collect(self) -> None:
        gc.collect()

    def reset_peak(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def profile(self, work: Work) -> dict[str, Any]:
        return {}


def device(name: str) -> Cuda:
    """The device called "cuda" or "cpu"."""
    return Cpu() if name == "cpu" else Cuda()
