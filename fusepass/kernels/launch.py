"""What every launcher needs to know about the machine."""

import functools

import triton


@functools.cache
def is_hip() -> bool:
    """Whether the GPU is AMD's: 64 KB of shared memory where NVIDIA has 99 to 227."""
    return bool(triton.runtime.driver.active.get_current_target().backend == "hip")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, where a program costs 2-4 ms: then few, large programs are best."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def pdl() -> bool:
    """Whether kernels use programmatic dependent launch (NVIDIA, Hopper and later): a kernel may then begin while the
    one before it still runs; `common.begin` says where it waits."""
    if interpreted():
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 90


@functools.cache
def pdl_options() -> dict[str, bool]:
    """Launch options of a kernel with a PDL constexpr. Other back ends do not know `launch_pdl`."""
    return {"PDL": True, "launch_pdl": True} if pdl() else {"PDL": False}


def block_k(k: int, most: int) -> int:
    """Power-of-two tile along K: the whole of K if it fits in `most`, else `most`."""
    return min(triton.next_power_of_2(k), most)


def interpreter_block_n(n: int) -> int:
    """A tile along N that makes a launch about four programs in the interpreter."""
    return min(256, max(16, triton.next_power_of_2(n) // 4))
