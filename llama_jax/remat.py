"""What the backward pass finds saved of a layer, by the name of a policy, and what it computes again.

Source: rematerialization, as jax.checkpoint does it, over arrays that the model names. The invariant: a policy
changes memory and time, never a number.
"""

import jax

from llama_jax.kernels import SAVED_NAME

RESIDUAL = "residual"  # what a layer gets
MIDDLE = "middle"  # what its MLP gets, before the norm
QUERY, KEY, VALUE = "query", "key", "value"
GATE, UP = "gate", "up"

_PROJECTED = (QUERY, KEY, VALUE, MIDDLE)


def _saved(*names: str):
    return jax.checkpoint_policies.save_only_these_names(*names)


def _offloaded(*names: str):
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


# From the least memory to the most, each layer's input always kept; then with what is kept in the host's memory.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _saved(SAVED_NAME),
    "qkv": _saved(SAVED_NAME, *_PROJECTED),
    "gate": _saved(SAVED_NAME, *_PROJECTED, GATE),
    "dots": _saved(SAVED_NAME, *_PROJECTED, GATE, UP),
    "none": jax.checkpoint_policies.everything_saveable,
    "offload": _offloaded(RESIDUAL),
    "offload_qkv": _offloaded(RESIDUAL, SAVED_NAME, *_PROJECTED),
}
