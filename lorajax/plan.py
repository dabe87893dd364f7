"""python -m lorajax.plan CONFIG.yaml [--device NAME] [--plot FILE] [--estimate] [--section.key VALUE ...]"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lorajax.command import run_command
from lorajax.config import parse_arguments

_FLAGS = ("device", "budget", "plot", "estimate")
_USAGE = (
    "%(prog)s CONFIG.yaml [--device NAME] [--budget SIZE] [--plot FILE] [--estimate] "
    "[--section.key VALUE ...]"
)


def main(argv: Sequence[str]) -> int:
    """Plan a run's memory and print the plan; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lorajax.plan",
        usage=_USAGE,
        description="Say which activations to keep, offload or recompute, in which micro-batches, and what "
        "that takes and reaches. The rest of the arguments are those of python -m lorajax.train; neither "
        "weights nor data are read.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="a GPU that need not be here, such as rtx4090; its host has 64 GiB to offload to, unless "
        "--memory.host_budget says otherwise",
    )
    parser.add_argument("--budget", help="as memory.budget: most GPU memory, such as 24GiB")
    parser.add_argument("--plot", metavar="FILE", help="draw memory against tokens/s (needs matplotlib)")
    parser.add_argument(
        "--estimate", action="store_true", help="do not compile the step: at once, but less exact"
    )
    own, rest = parser.parse_known_args(argv)
    if own.budget is not None:
        rest.append(f"--memory.budget={own.budget}")
    config, _ = parse_arguments(rest, prog=parser.prog, own_flags=_FLAGS)
    if own.device != "auto":
        # Nothing runs here: if there is a GPU, it is left alone.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # These take seconds to import: mistakes answer at once.
    from lorajax.memory.plan import Plan, check_picture
    from lorajax.training.planning import plan_memory

    def estimated(plan: Plan) -> None:
        print(f"Estimated, before it is compiled:\n{plan.table()}\n\nCompiled:", flush=True)

    if own.plot:
        check_picture(own.plot)
    plan = plan_memory(config, own.device, compiles=not own.estimate, estimated=estimated)
    print(f"{plan.table()}\n\nWhat else there is:\n{plan.frontier()}")
    if own.plot:
        plan.plot(own.plot)
        print(f"drawn in {own.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
