"""FLOPs of a model with fewer visual tokens, by formula, for published geometries and any configuration.

Read ``flops`` (a whole model), ``language`` (its language model), ``budget`` (counts of a batch), ``inspect_model`` and
``family_table`` (the command line's tables).
"""

from mllm_crossget.costs.flops import Flops, model_flops
from mllm_crossget.costs.geometries.llava import geometry_names, resolve
from mllm_crossget.moved import moved_names

__all__ = ["Flops", "geometry_names", "model_flops", "resolve"]

__getattr__ = moved_names(__name__, "arithmetic.flop_formulas")
