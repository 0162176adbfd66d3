"""Judge every causal LM that transformers can build, and write docs/causal-lms.json and docs/causal-lms.md.

python -m tests.causal_lms [--fresh] [--timeout SECONDS] [MODEL_TYPE ...]

Each model has a process of its own, so that a crash or a hang takes no other with it. What is recorded with the same
torch and transformers is skipped, unless it is a fault of ours or was asked for by name; `--fresh` records all again.
Exits with 1 where there is a fault of ours.
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fusepass.bench.results import code_version
from tests.causal_lms import page
from tests.causal_lms.judge import OURS
from tests.causal_lms.process import in_a_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="all of them if none is named")
    parser.add_argument("--fresh", action="store_true", help="forget what is recorded")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model may take (default 300)")
    asked = parser.parse_args()

    records = {} if asked.fresh else page.read()
    commit = code_version()
    for model_type in asked.model_types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = records.get(model_type)
        if known and known["outcome"] != OURS and page.VERSIONS.items() <= known.items() and not asked.model_types:
            continue
        verdict = in_a_process(model_type, asked.timeout)
        print(f"{model_type}: {verdict.outcome} {verdict.reason}", flush=True)
        records[model_type] = {**page.VERSIONS, "commit": commit, **verdict.to_json()}
        page.write(records)
    return any(record["outcome"] == OURS for record in records.values())


if __name__ == "__main__":
    raise SystemExit(main())
