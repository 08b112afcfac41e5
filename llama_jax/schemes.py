"""How weights can be quantized: the schemes by name. Nothing here imports jax, so that commands can name them at once.

Sources: QLoRA (arXiv 2305.14314) for NF4 and scales that are quantized themselves; The Llama 3 Herd of Models section
6.2 for FP8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Quantization(NamedTuple):
    """What the arrays of a quantized weight do not say.

    code: None (linear) or "nf4". inputs: None (activations as they are), "int8" or "float8_e4m3fn" (each token's
    rounded, scaled by its largest value, which is taken as at most bound; or where a scale is given all alike, to
    values that stand for (value - zero) * scale).
    """

    code: str | None = None
    inputs: str | None = None
    bound: float = math.inf
    scale: float | None = None
    zero: int = 0


# The weights of products, each with its dimensions that are inputs. The embedding, the head and the norms stay float.
INPUT_DIMS = {
    "wq": (-1,),
    "wk": (-1,),
    "wv": (-1,),
    "wo": (-4, -3, -2),
    "w_gate": (-2,),
    "w_up": (-2,),
    "w_down": (-2,),
}


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized: values of dtype, each group of inputs (0: all) of each output with its own scale.

    symmetric: without zero points. nested: the scales are quantized themselves, to int8, those of an output together.
    inner_mlp_only: Llama 3's rule for FP8, by which attention and the first and the last layer stay float.
    """

    dtype: str
    group: int = 0
    symmetric: bool = True
    nested: bool = False
    inner_mlp_only: bool = False
    rest: Quantization = Quantization()

    def covers(self, path: str, num_layers: int) -> bool:
        """Whether the weight at a path in the model is quantized: "layers.3.attention.wq"; of all layers.

        Raises ValueError for stacked layers that are not all quantized alike.
        """
        name = path.rpartition(".")[2]
        if name not in INPUT_DIMS or not self.inner_mlp_only:
            return name in INPUT_DIMS
        layer = path.split(".")[1]
        if not layer.isdigit():
            raise ValueError('fp8 leaves the first and the last layer as they are: use layout="layers"')
        return name.startswith("w_") and 0 < int(layer) < num_layers - 1


_FP8 = Quantization(inputs="float8_e4m3fn", bound=1200.0)

SCHEMES = {
    "int8": Scheme("int8"),
    "int8-a8": Scheme("int8", rest=Quantization(inputs="int8")),
    "int4": Scheme("int4", 32),
    "int4-g64": Scheme("int4", 64),
    "int4-g128": Scheme("int4", 128),
    "int4-asym": Scheme("int4", 32, symmetric=False),
    "int4-g64-asym": Scheme("int4", 64, symmetric=False),
    "int4-g128-asym": Scheme("int4", 128, symmetric=False),
    "fp8": Scheme("float8_e4m3fn", inner_mlp_only=True, rest=_FP8),
    "nf4": Scheme("int4", 64, nested=True, rest=Quantization("nf4")),
}

# How the values of a scheme are found, with whether a scheme can be it: to nearest, or by what a text's inputs are.
METHODS: dict[str, Callable[[Scheme], bool]] = {
    "rtn": lambda scheme: True,
    "gptq": lambda scheme: scheme.rest.code is None,
    "awq": lambda scheme: scheme.rest == Quantization(),
    "smoothquant": lambda scheme: scheme.rest.inputs == "int8",
}


def find_scheme(name: str) -> Scheme:
    """The scheme of this name. Raises ValueError that lists those there are."""
    if name not in SCHEMES:
        raise ValueError(f"unknown quantization {name!r}; expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def check_method(method: str, name: str) -> None:
    """Raises ValueError that says what would suit, if a method is not for the scheme of this name."""
    scheme = find_scheme(name)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if not METHODS[method](scheme):
        methods = [other for other, suits in METHODS.items() if suits(scheme)]
        schemes = [other for other in SCHEMES if METHODS[method](SCHEMES[other])]
        raise ValueError(f"{method} is for {', '.join(schemes)}; {name} takes --method {' or '.join(methods)}")
