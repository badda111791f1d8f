"""Accelerators that are not here: XLA compiles for them ahead of time, and counts memory.

TPUs need `pip install "jax[tpu]"`; the H100 `pip install jax-cuda13-plugin jax-cuda13-pjrt` of
jax's version, and no CUDA. Set `JAX_PLATFORMS=cpu`, or JAX looks for the chips.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.experimental import topologies

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPUS = {"TPU v5e": "v5e:2x2", "TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2"}
NAMES = (*TPUS, "H100")


def sharding(name: str) -> jax.sharding.Sharding:
    """One device of this kind, to be given to `jax.ShapeDtypeStruct`."""
    if name == "H100":
        topology = topologies.get_topology_desc(
            "h100", "cuda", target_config=H100, topology="1x1x1"
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def mesh(topology: str, shape: tuple[int, int]) -> jax.sharding.Mesh:
    """All chips of a TPU slice such as "v5e:16x16", as an explicit mesh (data, model)."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    return jax.sharding.Mesh(np.array(chips).reshape(shape), ("data", "model"), axis_types=kinds)


def needs(name: str) -> str:
    """What to install where `sharding` or `mesh` raises."""
    cuda = "`pip install jax-cuda13-plugin jax-cuda13-pjrt` of jax's version"
    return cuda if name == "H100" else '`pip install "jax[tpu]"`'
