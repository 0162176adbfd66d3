"""What fusepass would fuse in a model, found from its configuration alone: no weights, no GPU, nothing runs.

python examples/inspect_graphs.py                                        # the small model beside this file
python examples/inspect_graphs.py --model Qwen/Qwen3-8B --html 8b.html   # a hub name or a local folder, and a page
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import fusepass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny-qwen3"), help="hub name or local folder")
    parser.add_argument("--cache", type=int, default=1024, help="length of the static cache")
    parser.add_argument("--html", type=Path, help="write the report as a page, too")
    args = parser.parse_args()
    if args.cache < 1:
        parser.error(f"--cache is {args.cache}; expected at least 1")

    config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):  # shapes and dtypes, and no memory
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        token = torch.zeros(1, 1, dtype=torch.int64)

    cache = StaticCache(config=config, max_cache_len=args.cache)
    with torch.no_grad():  # as in generate: what needs gradients is not fused
        model(token, past_key_values=cache)  # the cache gets its tensors, which else are born in the graph
        report = fusepass.explain(model, token, past_key_values=cache)
    print(f"One decode step of {Path(args.model).name}, with a static cache of {args.cache}:\n")
    print(report)

    print("\nWhat each fusion stands for, where it is first found:\n")
    first = {site.fusion: site for site in reversed(report.sites) if site.fused}
    for site in reversed(first.values()):
        print(f"  {site.fusion:16} {len(site.nodes):3} nodes at {site.path}, {len(site.inputs)} tensors read")
    if args.html:
        try:
            report.to_html(args.html, title=f"{Path(args.model).name}: a decode step")
        except OSError as fault:
            parser.exit(2, f"cannot write {args.html}: {fault.strerror}\n")
        print(f"\nThe code before and after: {args.html}")


if __name__ == "__main__":
    main()
