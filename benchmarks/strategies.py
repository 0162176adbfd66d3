"""Time each op by strategy and number of rows, beside the unfused layers it replaces.

    python benchmarks/strategies.py --model Qwen3-0.6B

Every launch has weights of its own, in one CUDA graph, so that they come from memory. The limits in
`fusepass/ops/library.py` come from this table.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fusepass import ops
from fusepass.bench.models import qwen3_config
from fusepass.ops import force_strategy
from fusepass.ops.library import ROWS_LIMIT, SKINNY_LIMIT, Strategy

LIMITS: dict[Strategy, int] = {"rows": ROWS_LIMIT, "skinny": SKINNY_LIMIT, "library": 1 << 30}


def microseconds(chain: list[Callable[[], object]]) -> float:
    """Median time of one call in a CUDA graph of all."""
    for call in chain[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in chain:
            call()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 200 / len(chain))
    return statistics.median(times[1:])


def calls(model: str, rows: int) -> Iterator[tuple[str, Callable[..., object], Callable[..., object], tuple]]:
    """Name, op, reference and a fresh set of arguments of each op with weights."""
    c = qwen3_config(model)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.05

    k, i, d = c.hidden_size, c.intermediate_size, c.head_dim
    q, kv = c.num_attention_heads * d, c.num_key_value_heads * d
    x, table = new(1, rows, k), new(1, 1, rows, d)
    qkv = (x, new(k), 1e-6, new(q, k), new(kv, k), new(kv, k), None, None, None, new(d), 1e-6, new(d), 1e-6)
    yield "norm_qkv_rope", torch.ops.fusepass.norm_qkv_rope, ops.norm_qkv_rope.reference, (*qkv, table, table, d, False)
    mlp = (x, new(k), 1e-6, new(i, k), new(i, k), new(k, i), None, None, None, x, "silu", False)
    yield "norm_gated_mlp", torch.ops.fusepass.norm_gated_mlp, ops.norm_gated_mlp.reference, mlp
    o = (new(1, rows, q), new(k, q), None, x, False)
    head = (x, new(k), 1e-6, new(c.vocab_size, k), None, 0, False)
    yield "norm_linear", torch.ops.fusepass.norm_linear, ops.norm_linear.reference, head
    yield "linear_residual", torch.ops.fusepass.linear_residual, ops.linear_residual.reference, o


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 512, 2048])
    args = parser.parse_args()
    print(f"{args.model}, microseconds{'rows':>10}{'skinny':>10}{'library':>10}{'unfused':>10}")
    with torch.no_grad():
        for rows in args.rows:
            sets = [list(calls(args.model, rows)) for _ in range(12)]
            for same in zip(*sets):
                name, op, reference, _ = same[0]
                cells = []
                for strategy, limit in LIMITS.items():
                    if rows > limit:
                        cells.append(f"{'-':>10}")
                        continue
                    with force_strategy(strategy):
                        cells.append(f"{microseconds([partial(op, *case[3]) for case in same]):10.2f}")
                cells.append(f"{microseconds([partial(reference, *case[3]) for case in same]):10.2f}")
                print(f"{rows:6d} {name:16} {''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
