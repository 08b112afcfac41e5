"""Host batches onto the mesh."""

import jax
from jax.sharding import NamedSharding, get_mesh

from llama_jax.mesh import ShardingRules
from train.data import Batch


def put_batch(batch: Batch, rules: ShardingRules) -> Batch:
    """A batch [B, T] of this process's rows, split over the mesh as the model splits it."""
    sharding = NamedSharding(get_mesh(), rules("batch", "sequence"))
    return Batch(*(jax.make_array_from_process_local_data(sharding, array) for array in batch))
