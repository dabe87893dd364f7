"""GPUs that a plan can be made for without having one.

Sizes and rates are those of NVIDIA's data sheets and architecture papers. V100, A100, H100, H200 and B200 are
described as in XLA (openxla/xla, xla/backends/gpu/target_config/specs), the others like a GPU that is there,
with their own sizes: A10G, L4, L40S, RTX 3090 and RTX 4090 like the RTX A6000, the T4 like the V100, and the
RTX 5090 like the RTX PRO 6000.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lorajax_kernels.device import BLACKWELL, HOPPER, Device, why_no_mosaic

from lorajax.errors import UserError
from lorajax.memory.costs import Rates

# Shares of a vendor's figures that large products and copies reach, as measured on an H200.
_PRODUCTS, _COPIES = 0.75, 0.87
# (major, minor, patch) of the cuDNN that JAX' wheels for CUDA bring along.
_CUDNN = (9, 19, 0)
# The oldest that the assembler of CUDA 13 knows. Volta is described to XLA as if it were Turing.
_OLDEST = (7, 5)


@dataclass(frozen=True)
class Target:
    """A GPU, by its vendor's data sheet.

    Attributes:
        name: as users write it.
        kind: as JAX calls it.
        compute_capability: (major, minor).
        cores: multiprocessors, and how many 32-bit units each has.
        shared_memory: bytes of a multiprocessor, and the most of them that a block can have.
        threads: most resident on a multiprocessor.
        clock: highest, in GHz.
        cache: bytes of the second level.
        memory: bytes that a process sees: those of the data sheet less what the driver and ECC keep.
        bandwidth: bytes per second of its memory.
        flops: operations per second in 16 bits with float32 sums, dense.
        link: bytes per second to and from the host, each way: what PCIe of its generation is known to move.
    """

    name: str
    kind: str
    compute_capability: tuple[int, int]
    cores: tuple[int, int]
    shared_memory: tuple[int, int]
    threads: int
    clock: float
    cache: int
    memory: int
    bandwidth: float
    flops: float
    link: float

    @property
    def rates(self) -> Rates:
        return Rates(self.flops * _PRODUCTS, self.bandwidth * _COPIES, self.link)

    @property
    def device(self) -> Device:
        """For lorajax_kernels, with the libraries that the cuda13 extra installs."""
        no_mosaic = why_no_mosaic(self.compute_capability)
        cudnn = _CUDNN[0] * 10_000 + _CUDNN[1] * 100 + _CUDNN[2]
        return Device(
            self.kind,
            self.compute_capability,
            cudnn,
            no_mosaic=no_mosaic,
            multiprocessors=self.cores[0],
        )

    @property
    def config(self) -> str:
        """For XLA's compiler, a stream_executor.GpuTargetConfigProto as text."""
        major, minor = max(self.compute_capability, _OLDEST)
        has_features = (major, minor) in (HOPPER, BLACKWELL)
        accelerated = " feature_extension: ACCELERATED_FEATURES" if has_features else ""
        multiprocessors, units = self.cores
        cudnn = dict(zip(("major", "minor", "patch"), _CUDNN, strict=True))
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory[1]}
  shared_memory_per_core: {self.shared_memory[0]}
  threads_per_core_limit: {self.threads}
  core_count: {multiprocessors}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  name: "{self.kind}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "{".".join(map(str, _CUDNN))}"
}}
platform_name: "CUDA"
dnn_version_info {{ {" ".join(f"{name}: {number}" for name, number in cudnn.items())} }}
device_description_str: "{self.kind}"
"""


_KIB, _MIB = 2**10, 2**20
_VOLTA, _TURING, _HOPPER = (96 * _KIB, 96 * _KIB), (64 * _KIB, 64 * _KIB), (228 * _KIB, 227 * _KIB)
_A100, _AMPERE = (164 * _KIB, 163 * _KIB), (100 * _KIB, 99 * _KIB)
_GEFORCE_50 = (128 * _KIB, 99 * _KIB)
_PCIE3, _PCIE4, _PCIE5 = 12e9, 24e9, 52e9

_TARGETS = (
    Target("v100", "Tesla V100-SXM2-16GB", (7, 0), (80, 64), _VOLTA, 2048, 1.53, 6 * _MIB,
           16_150 * _MIB, 898e9, 125e12, _PCIE3),
    Target("v100-32gb", "Tesla V100-SXM2-32GB", (7, 0), (80, 64), _VOLTA, 2048, 1.53, 6 * _MIB,
           32_500 * _MIB, 898e9, 125e12, _PCIE3),
    Target("t4", "Tesla T4", (7, 5), (40, 64), _TURING, 1024, 1.59, 4 * _MIB, 15_095 * _MIB,
           320e9, 65e12, _PCIE3),
    Target("a100-40gb", "NVIDIA A100-SXM4-40GB", (8, 0), (108, 64), _A100, 2048, 1.41, 40 * _MIB,
           40_330 * _MIB, 1555e9, 312e12, _PCIE4),
    Target("a100-80gb", "NVIDIA A100-SXM4-80GB", (8, 0), (108, 64), _A100, 2048, 1.41, 40 * _MIB,
           81_050 * _MIB, 2039e9, 312e12, _PCIE4),
    Target("a10g", "NVIDIA A10G", (8, 6), (80, 128), _AMPERE, 1536, 1.71, 6 * _MIB, 22_580 * _MIB,
           600e9, 70e12, _PCIE4),
    Target("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), (82, 128), _AMPERE, 1536, 1.7, 6 * _MIB,
           24_120 * _MIB, 936e9, 71e12, _PCIE4),
    Target("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), (128, 128), _AMPERE, 1536, 2.52, 72 * _MIB,
           24_080 * _MIB, 1008e9, 165e12, _PCIE4),
    Target("l4", "NVIDIA L4", (8, 9), (58, 128), _AMPERE, 1536, 2.04, 48 * _MIB, 22_570 * _MIB,
           300e9, 121e12, _PCIE4),
    Target("l40s", "NVIDIA L40S", (8, 9), (142, 128), _AMPERE, 1536, 2.52, 96 * _MIB, 45_470 * _MIB,
           864e9, 362e12, _PCIE4),
    Target("h100", "NVIDIA H100 80GB HBM3", (9, 0), (132, 128), _HOPPER, 2048, 1.98, 50 * _MIB,
           81_000 * _MIB, 3352e9, 989e12, _PCIE5),
    Target("h200", "NVIDIA H200", (9, 0), (132, 128), _HOPPER, 2048, 1.98, 50 * _MIB, 143_150 * _MIB,
           4800e9, 989e12, _PCIE5),
    Target("b200", "NVIDIA B200", (10, 0), (148, 128), _HOPPER, 2048, 1.965, 126 * _MIB, 182_640 * _MIB,
           8000e9, 2250e12, _PCIE5),
    Target("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), (170, 128), _GEFORCE_50, 1536, 2.41, 96 * _MIB,
           32_110 * _MIB, 1792e9, 209e12, _PCIE5),
)  # fmt: skip
TARGETS = {target.name: target for target in _TARGETS}


def target_of_kind(kind: str) -> Target | None:
    """The GPU that JAX calls so; None: it is none of them."""
    return next((target for target in TARGETS.values() if target.kind == kind), None)


def find_target(name: str) -> Target:
    """The GPU of a name, in any case, with or without its spaces and hyphens.

    Raises:
        UserError: it is unknown; the message names the nearest and lists all.
    """
    wanted = re.sub(r"[-_ ]", "", name.lower())
    names = {known.replace("-", ""): known for known in TARGETS}
    if wanted in names:
        return TARGETS[names[wanted]]
    near = [known for known in names if wanted and known.startswith(wanted)]
    near = near or difflib.get_close_matches(wanted, names, n=1)
    hint = f", did you mean {' or '.join(names[known] for known in near)}?" if near else "."
    raise UserError(f"unknown device {name!r}{hint} Known are {', '.join(TARGETS)}")
