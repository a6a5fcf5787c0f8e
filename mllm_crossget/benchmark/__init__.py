"""What a model costs with fewer visual tokens: FLOPs by formula, for published geometries and any configuration."""

from mllm_crossget.benchmark.flops import Flops, model_flops
from mllm_crossget.benchmark.geometries import geometry_names, resolve

__all__ = ["Flops", "geometry_names", "model_flops", "resolve"]
