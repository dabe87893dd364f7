"""All benchmarks of kernels/benchmarks in one process, recorded.

    python benchmarks/kernels.py --out benchmarks/results/kernels-h200.json
    python benchmarks/kernels.py --show benchmarks/results/kernels-h200.json  # for kernels/README.md

Peers that are not installed, or fail, are listed with the reason. --tiny: small sizes, to see that it works.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environment import environment

SCRIPTS = ("attention", "cached_attention", "cross_entropy", "elementwise", "lora", "nf4")
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-triton",
    "triton",
    "torch",
    "liger-kernel",
    "cut-cross-entropy",
    "tokamax",
    "flash-attn3-jax",
    "bitsandbytes",
)

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "benchmarks"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", help="JSON file for the result")
    goal.add_argument(
        "--show", metavar="FILE", help="print a result as a table in Markdown, and measure nothing"
    )
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="some of the ops")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    arguments = parser.parse_args()
    if arguments.show:
        from results import markdown

        record = json.loads(Path(arguments.show).read_text(encoding="utf-8"))
        print(markdown(record))
        print(_text(record["ceilings"]))
        return
    # Before JAX starts: peers of other frameworks need memory of the same GPU.
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")
    import jax
    from lorajax_kernels.device import current_device
    from results import Ceilings, as_json, table

    ceilings = Ceilings.measured(tiny=arguments.tiny)
    about = {
        "benchmark": "kernels",
        **environment(*PACKAGES, commit=arguments.commit),
        "device": current_device().kind,
        "cudnn": current_device().cudnn_version,
        "platform": jax.default_backend(),
        "tiny": arguments.tiny,
        "ceilings": asdict(ceilings),
    }
    rows: list[Any] = []
    for name in arguments.only:
        rows += importlib.import_module(name).benchmark(ceilings, arguments.tiny)
        # After each op, so that a run that is cut short keeps what it has measured.
        record = about | {"rows": [as_json(row, rows) for row in rows]}
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    print(_text(asdict(ceilings)))


def _text(ceilings: dict[str, Any]) -> str:
    return f"ceilings: {ceilings['bytes_per_second'] / 1e12:.2f} TB/s, {ceilings['flops'] / 1e12:.0f} TFLOP/s"


if __name__ == "__main__":
    main()
