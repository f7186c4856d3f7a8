"""Devices: what their makers say they can do, and how much of it a training gets."""

from dataclasses import dataclass

from morex.loading import ConfigError

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator in a machine of several, or this machine's processor."""

    name: str
    flops_bf16: float
    """Dense matrix products, FLOP/s."""
    flops_fp32: float
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second to and from its memory."""
    link: float
    """Bytes a second that it receives from the others of its machine."""
    network: float
    """Bytes a second that it receives from other machines."""
    per_node: int
    """Devices of a machine."""
    source: str
    matmul_share: float = 0.75
    """Share of its FLOP/s that large matrix products reach."""
    bandwidth_share: float = 0.85
    """Share of its memory's bandwidth that elementwise work reaches."""
    link_share: float = 0.75
    """Share of the bandwidth between devices that collectives reach."""
    latency: float = 15e-6
    """Seconds that a collective takes for each machine that it passes, beside its bytes."""
    usable: float = 0.9
    """Share of its memory that tensors may take: the rest is the driver's, the libraries' and lost between blocks."""
    overlaps: bool = True
    """Whether exchange between ranks and computing go on at the same time."""
    has_fast_paths: bool = False
    """Whether the fast paths for a CPU run."""


_H100 = "NVIDIA H100 data sheet (SXM, without sparsity); DGX H100 data sheet: 8 ConnectX-7 of 400 Gb/s"
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h100", 989 * TERA, 67 * TERA, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 8, _H100),
        Device(
            "h200", 989 * TERA, 67 * TERA, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8,
            "NVIDIA H200 data sheet (SXM, without sparsity); DGX H200 data sheet: 8 ConnectX-7 of 400 Gb/s",
        ),
        Device(
            "a100-80", 312 * TERA, 19.5 * TERA, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 8,
            "NVIDIA A100 data sheet (80 GB SXM, without sparsity); DGX A100 data sheet: 8 ConnectX-6 of 200 Gb/s",
        ),
        Device(
            "b200", 2250 * TERA, 80 * TERA, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 8,
            "NVIDIA HGX and DGX B200 data sheets, an eighth of the machine, without sparsity; ConnectX-7 of 400 Gb/s",
        ),
        Device(
            "l40s", 362 * TERA, 91.6 * TERA, 48 * GB, 864 * GB, 32 * GB, 25 * GB, 8,
            "NVIDIA L40S data sheet (without sparsity), PCIe 4.0 x16; 200 Gb/s for each GPU is an assumption",
        ),
        Device(
            "rtx4090", 165 * TERA, 82.6 * TERA, 24 * GB, 1008 * GB, 25 * GB, 3.1 * GB, 4,
            "NVIDIA Ada GPU architecture white paper (sums in fp32, without sparsity), PCIe 4.0 x16 through the host; "
            "4 GPUs a machine and 25 Gb/s for each are assumptions",
        ),
        Device(
            "mi300x", 1307 * TERA, 163 * TERA, 192 * GB, 5300 * GB, 448 * GB, 50 * GB, 8,
            "AMD Instinct MI300X data sheet (without sparsity), 7 links of 64 GB/s; 400 Gb/s for each GPU is an "
            "assumption",
        ),
    )
}  # fmt: skip
"""By name; the bandwidth between devices is that of one direction."""
CPU = "cpu"
"""Name of this machine's processor, which is measured."""


def find_device(name: str) -> Device:
    """The device of this name. Raises ConfigError for one that is not known."""
    if name not in DEVICES:
        known = [*DEVICES, CPU]
        raise ConfigError(f"--device '{name}' is unknown; use {', '.join(known[:-1])} or {known[-1]}")
    return DEVICES[name]
