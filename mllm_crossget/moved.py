"""Import paths of version 0.1 that have moved. They still work, and warn once with the new path."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "mllm_crossget"
# Old module: new module, both without the package's name.
MOVED = {
    "benchmark.blip_geometries": "costs.geometries.blip",
    "benchmark.budget": "costs.budget",
    "benchmark.family_table": "costs.family_table",
    "benchmark.flops": "costs.flops",
    "benchmark.geometries": "costs.geometries.llava",
    "benchmark.inputs": "benchmark.sample_inputs",
    "benchmark.inspect_model": "costs.inspect_model",
    "benchmark.language": "arithmetic.language_flops",
    "benchmark.relative_geometries": "costs.geometries.relatives",
    "benchmark.reuse": "benchmark.reuse_timing",
    "embedded.retrieval": "embedded.small_clip",
    "families.base": "families.family",
    "families.grid": "families.tile_packing",
    "hooks.alignment": "hooks.model.cross_loss",
    "hooks.alignment_tokens": "hooks.ground.alignment_tokens",
    "hooks.attention": "hooks.tower.attention",
    "hooks.calibration": "hooks.model.thresholds",
    "hooks.concatenated": "hooks.projector.multi_layer",
    "hooks.counts": "hooks.request.placeholders",
    "hooks.cross_tokens": "hooks.ground.cross_tokens",
    "hooks.dual": "hooks.model.dual_encoder",
    "hooks.features": "hooks.projector.features",
    "hooks.generation": "hooks.request.user_view",
    "hooks.grid": "hooks.projector.tiles",
    "hooks.guidance": "hooks.model.madtp_loss",
    "hooks.handle": "hooks.ground.state",
    "hooks.inputs": "hooks.request.compact_call",
    "hooks.journal": "hooks.ground.journal",
    "hooks.kv_cache": "hooks.ground.kv_cache",
    "hooks.own_tower": "hooks.projector.video_tower",
    "hooks.persistence": "hooks.model.cross_files",
    "hooks.pieces": "hooks.reuse.image_packing",
    "hooks.pooled_grid": "hooks.projector.pooled_tiles",
    "hooks.pooling": "hooks.tower.pooling_head",
    "hooks.positions": "hooks.request.rope_positions",
    "hooks.post_merge": "hooks.projector.post_merge",
    "hooks.prompt": "hooks.request.compaction",
    "hooks.question": "hooks.text.answer_decoder",
    "hooks.ragged_features": "hooks.projector.ragged_features",
    "hooks.ragged_reader": "hooks.projector.readers",
    "hooks.ragged_text": "hooks.text.counts_per_text",
    "hooks.ragged_tower": "hooks.tower.counts_per_image",
    "hooks.resampled": "hooks.projector.resampler",
    "hooks.saving": "hooks.model.saved_model",
    "hooks.text_encoder": "hooks.text.bert_text",
    "hooks.text_rows": "hooks.text.text_rows",
    "hooks.text_tower": "hooks.text.clip_text",
    "hooks.vision_cache": "hooks.ground.vision_cache",
    "hooks.whole_grid": "hooks.projector.whole_grid",
    "integrations.lmms_eval.costs": "integrations.lmms_eval.token_costs",
    "kernels.graph": "kernels.triton_graph",
    "kernels.importance": "kernels.triton_importance",
    "methods.base": "methods.method",
    "ops.alignment": "ops.guidance.alignment",
    "ops.alignment_attention": "ops.guidance.alignment_attention",
    "ops.attention_maps": "ops.guidance.attention_maps",
    "ops.contrastive": "ops.guidance.contrastive",
    "ops.importance": "ops.guidance.importance",
    "training.budget": "training.compute_budget",
    "training.columns": "files.record_columns",
    "training.records": "files.records",
    "visualize": "look.visualize",
}


def moved_names(package: str, *modules: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package that has the name of a module of version 0.1.

    Args:
        package: its dotted name.
        modules: the modules that hold the names of the old module now, as dotted names inside the package.
    """

    def find(name: str) -> Any:
        if not name.startswith("__"):
            for module in modules:
                names = vars(importlib.import_module(f"{_PACKAGE}.{module}"))
                if name in names:
                    _warn(f"{package}.{name}", f"{_PACKAGE}.{module}.{name}")
                    return names[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


class _OldPaths(MetaPathFinder, Loader):
    """Finder and loader for the old paths; a module of an old path has the names of the new module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``MetaPathFinder``."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """See ``Loader``."""
        new = f"{_PACKAGE}.{MOVED[module.__name__.partition('.')[2]]}"
        _warn(module.__name__, new)
        names = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} has moved to {new}; the old path will go with version 0.3", FutureWarning, stacklevel=3)


def answer_for_old_paths() -> None:
    """Make imports of old paths work; calling it again changes nothing."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
