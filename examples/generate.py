"""Generate with `fusepass.decode_loop`, and print tokens per second beside Hugging Face's own loop.

python examples/generate.py                              # the small checkpoint beside this file
python examples/generate.py --model Qwen/Qwen3-0.6B      # a hub name or a local folder
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import fusepass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny-qwen3"), help="hub name or local folder")
    parser.add_argument("--prompt", default="The fox sat by the river.", help="text to continue")
    parser.add_argument("--tokens", type=int, default=256, help="number of tokens to generate")
    args = parser.parse_args()
    if args.tokens < 1:
        parser.error(f"--tokens is {args.tokens}; expected at least 1")
    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if gpu else torch.float32)
    model = model.to("cuda" if gpu else "cpu").eval()
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        parser.error(f"--prompt {args.prompt!r} has no tokens; expected text to continue")

    settings = {"max_new_tokens": args.tokens, "do_sample": False, "cache_implementation": "static"}
    if gpu:  # on a CPU, generate compiles nothing
        settings["compile_config"] = CompileConfig(backend="fusepass")
    loops = {"Hugging Face's loop": None, "decode_loop": fusepass.decode_loop()}
    tokens = {}
    for name, loop in loops.items():
        for _ in range(2):  # the first call compiles
            start = time.perf_counter()
            output = model.generate(**inputs, **settings, custom_generate=loop)
            tokens[name] = output[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
            seconds = time.perf_counter() - start
        torch._dynamo.reset()  # the caches of the two are not of one length, which would make the second graph dynamic
        print(f"{name:20} {len(tokens[name]) / seconds:10,.0f} tokens/s")

    theirs, ours = tokens.values()
    print(f"the same {len(ours)} tokens" if ours == theirs else "other tokens: in bf16 two logits can tie")
    print(args.prompt + tokenizer.decode(ours, skip_special_tokens=True))


if __name__ == "__main__":
    main()
