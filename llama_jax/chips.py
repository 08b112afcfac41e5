"""What chips can do and cost, as a table.

Sources: the Cloud TPU pages on each version and its price, and "How to Scale Your Model" for links;
memory is what libtpu 0.0.42 says is there, and clocks follow from peak and matrix units. Of GPUs:
NVIDIA's data sheets.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip; 0 where nothing is known.

    hbm_bytes: what the compiler may use. flops: peak in bfloat16 a second. hbm_bandwidth,
    link_bandwidth and network_bandwidth: bytes a second, in one direction of a link to a neighbour
    (for a GPU of all its NVLinks), and of the chip's share of what joins slices or nodes. num_links:
    to its neighbours in the torus. clock: cycles a second, those that the compiler's estimates count.
    price: US dollars an hour. cores: how many the vendor's names count. most: chips of the largest
    slice, or GPUs of a node. devices: what jax counts of it; of several all else here is of one, and
    such a device is called a chip wherever chips are counted.
    """

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    num_links: int
    clock: float
    price: float
    cores: int
    most: int
    devices: int = 1


# List prices on demand in US regions, as of 2025, of TPUs at Google and of GPUs at AWS; LLAMA_JAX_PRICES names a file
# of others. v4's share of the network is taken to be v5p's. Not all of a GPU's memory is jax's by default.
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1.228e12, 4.5e10, 6.25e9, 6, 1.05e9, 3.22, 2, 4096),
    "v5p": Chip(int(95.74 * GIB), 459e12, 2.765e12, 9.0e10, 6.25e9, 6, 1.75e9, 4.20, 2, 6144),
    "v5e": Chip(int(15.75 * GIB), 197e12, 8.19e11, 5.0e10, 3.125e9, 4, 1.50e9, 1.20, 1, 256),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.640e12, 9.0e10, 1.25e10, 4, 1.75e9, 2.70, 1, 256),
    "tpu7x": Chip(int(94.75 * GIB), 1153.5e12, 3.690e12, 9.0e10, 6.25e9, 6, 2.20e9, 0.0, 2, 9216, 2),
    "a100-40": Chip(39 * GIB, 312e12, 1.555e12, 3.0e11, 2.5e10, 0, 0.0, 2.74, 1, 8),
    "a100-80": Chip(79 * GIB, 312e12, 2.039e12, 3.0e11, 2.5e10, 0, 0.0, 3.43, 1, 8),
    "h100": Chip(79 * GIB, 989e12, 3.35e12, 4.5e11, 5.0e10, 0, 0.0, 6.88, 1, 8),
    "h100-pcie": Chip(79 * GIB, 756e12, 2.0e12, 3.0e11, 5.0e10, 0, 0.0, 0.0, 1, 8),
    "h100-nvl": Chip(93 * GIB, 835e12, 3.9e12, 3.0e11, 5.0e10, 0, 0.0, 0.0, 1, 8),
    "h200": Chip(139 * GIB, 989e12, 4.8e12, 4.5e11, 5.0e10, 0, 0.0, 7.91, 1, 8),
    "b200": Chip(178 * GIB, 2250e12, 7.7e12, 9.0e11, 5.0e10, 0, 0.0, 14.24, 1, 8),
    "gb200": Chip(184 * GIB, 2500e12, 8.0e12, 9.0e11, 5.0e10, 0, 0.0, 0.0, 1, 72),
    "cpu": Chip(0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 1, 4096),
}
