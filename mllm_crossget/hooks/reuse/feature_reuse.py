"""A cache of encoded images for further questions about them.

The mixin comes before all other mixins of the features' owner. Each image is recognised by the content of its pixels,
and only images that are not in the cache are encoded. At inference an image's features do not depend on the text: cross
tokens are the image's class token plus a learned vector, and alignment tokens are learned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import Family, families, module_at
from mllm_crossget.hooks.ground.call_state import lent
from mllm_crossget.hooks.ground.cross_tokens import RECORD
from mllm_crossget.hooks.ground.hosts import FeaturesOwner
from mllm_crossget.hooks.ground.state import CALIBRATION, RUNNING, TRACE
from mllm_crossget.hooks.ground.vision_cache import Encoded, VisionCache, content_key
from mllm_crossget.hooks.projector.features import encoded_ahead
from mllm_crossget.hooks.reuse.image_packing import ImageCall, image_call
from mllm_crossget.hooks.tower.encoder import SIZES
from mllm_crossget.methods.method import Method

if TYPE_CHECKING:
    from mllm_crossget.hooks.ground.state import Handle

_REUSE = "_mllm_crossget_reuse"
_READ = ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy", "vision_aspect_ratio",
         "downsample_mode")  # fmt: skip
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters")


def check_reuse(model: nn.Module, family: Family, wanted: bool | VisionCache | None) -> None:
    """Raise ``TypeError`` for a setting of another type, ``ValueError`` for a model without features to cache."""
    if wanted is not None and not isinstance(wanted, (bool, VisionCache)):
        raise TypeError(f"reuse_vision must be True, False or a VisionCache(max_bytes=...), got {wanted!r}")
    if wanted is None or wanted is False or family.features_owner is not None:
        return
    able = ", ".join(sorted({known.model_type for known in families().values() if known.features_owner is not None}))
    raise ValueError(
        f"{type(model).__name__} (model type {family.model_type!r}) cannot reuse encoded images: its language side, if "
        "there is one, does not read features that get_image_features makes of the image alone (but through a Q-Former "
        f"or by cross-attention); model types that can: {able}. Leave reuse_vision out"
    )


def refuse_reuse(method: Method, wanted: bool | VisionCache | None) -> None:
    """Raise ``ValueError`` if images are to be cached although their tokens depend on the question."""
    if wanted is not None and wanted is not False and method.sees_question:
        raise ValueError(
            f"the tokens of {type(method).__name__} depend on the question, so an image encoded for one question is "
            "of no use for the next: leave reuse_vision out or give reuse_vision=False, or use a method that sees "
            "images alone"
        )


def use_cache(model: nn.Module, handle: Handle, wanted: bool | VisionCache) -> None:
    """Switch the cache of encoded images on or off; ``True`` keeps a cache that exists already. Checked before."""
    if isinstance(wanted, VisionCache) or not wanted:
        if handle.vision_cache is not None and handle.vision_cache is not wanted:
            handle.vision_cache.clear()
        handle.vision_cache = wanted if isinstance(wanted, VisionCache) else None
    elif handle.vision_cache is None:
        handle.vision_cache = VisionCache()
    owner = module_at(model, handle.family.features_owner or "")
    if handle.vision_cache is not None and _REUSE not in owner.__dict__:
        handle.journal.set_attribute(owner, _REUSE, handle)
        handle.journal.swap_class(owner, ReusedFeatures)


class ReusedFeatures(FeaturesOwner):
    """Mixin for the owner of ``get_image_features``."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. If an image came from the cache, the output holds features alone: hidden states are None."""
        stock, handle = super().get_image_features, self.__dict__[_REUSE]
        call = _image_call(self, handle, stock, args, kwargs)
        if call is None:
            return stock(*args, **kwargs)
        handle.vision_cache.belongs_to(_maker(self, handle))
        return _reused(handle.vision_cache, call, stock)

    def train(self, mode: bool = True) -> Any:
        """As the original; training mode empties the cache."""
        cache = self.__dict__[_REUSE].vision_cache
        if mode and cache is not None:
            cache.clear()
        return super().train(mode)


def _reused(cache: VisionCache, call: ImageCall, stock: Callable[..., Any]) -> Any:
    """The output of a call. Only images that are not in the cache are encoded, each of them once."""
    words = _words(call)
    keys = [content_key(call.content(image), words) for image in range(len(call))]
    known: dict[bytes, Encoded] = {}
    missing: dict[bytes, int] = {}
    for image, key in enumerate(keys):
        if key in missing:
            cache.count_hit()
        elif (entry := cache.find(key)) is not None:
            known[key] = entry
        else:
            missing[key] = image
    if len(missing) == len(keys):
        output = stock(**call.arguments)
        if hasattr(output, "pooler_output"):
            for key, entry in zip(keys, call.split(output, len(keys)), strict=True):
                cache.keep(key, entry)
        return output
    if missing:
        images = call.encodable(list(missing.values()))
        encoded = call.split(stock(**call.select(images)), len(images))
        for image, entry in zip(images, encoded, strict=True):
            known[keys[image]] = entry
            cache.keep(keys[image], entry)
    return call.join([known[key] for key in keys])


def _image_call(
    owner: nn.Module, handle: Handle, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ImageCall | None:
    """The images of a call whose features may come from the cache, or None."""
    if handle.vision_cache is None or torch.compiler.is_compiling() or _is_watched(owner, handle):
        return None
    if encoded_ahead(owner, "get_image_features", args, kwargs) is not None:
        return None
    arguments = {**dict(zip(inspect.signature(stock).parameters, args, strict=False)), **kwargs}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if not arguments.get("return_dict", getattr(owner.config, "return_dict", True)):
        return None
    if torch.is_grad_enabled() and _needs_gradient(owner, handle, arguments):
        return None
    return image_call(owner, arguments, ("return_dict", "use_cache", *_READ))


def _is_watched(owner: nn.Module, handle: Handle) -> bool:
    """True if the call serves more than its features: training, a trace, a calibration, an inner call for videos."""
    tower = handle.tower
    if owner.training or any(child.training for child in _vision_side(owner, handle)):
        return True
    states = (tower, handle.merge, handle.second_merge)
    if any(lent(TRACE, state) is not None for state in states if state is not None):
        return True
    if handle.merging is not None and lent(RUNNING, handle.merging) is not None:
        return True
    if tower is None:
        return False
    encoder = module_at(owner, handle.encoder_path.removeprefix(f"{handle.family.features_owner}."))
    watchers = (lent(CALIBRATION, tower), lent(RECORD, encoder), lent(SIZES, encoder))
    return any(one is not None for one in watchers)


def _vision_side(owner: nn.Module, handle: Handle) -> Iterator[nn.Module]:
    """The owner's modules except the language model."""
    path = (handle.family.language_model or "").removeprefix(f"{handle.family.features_owner}.")
    language = path.split(".")[0]
    return (child for name, child in owner.named_children() if name != language)


def _needs_gradient(owner: nn.Module, handle: Handle, arguments: dict[str, Any]) -> bool:
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    tensors += [*owner.parameters(recurse=False), *(p for m in _vision_side(owner, handle) for p in m.parameters())]
    return any(tensor.requires_grad for tensor in tensors)


def _words(call: ImageCall) -> tuple[Any, ...]:
    """Settings that hold for the whole call and change its features."""
    device = call.values.device
    chosen = {name: value for name, value in call.arguments.items() if name in _READ}
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return (type(call).__name__, str(device), autocast, sorted(chosen.items()))


def _maker(owner: Any, handle: Handle) -> Hashable:
    """A key for the settings and weights of the vision side. It changes with every change that PyTorch counts.

    PyTorch does not count writes into ``parameter.data``. PEFT makes such writes, so the state of its adapters enters
    the key.
    """
    values = list(owner._parameters.values())
    adapters = []
    for child in _vision_side(owner, handle):
        for module in child.modules():
            values += [*module._parameters.values(), *module._buffers.values()]
            if "_disable_adapters" in module.__dict__:
                adapters.append(str([module.__dict__.get(name) for name in _ADAPTER_STATE]))
    weights = tuple(_version(value) for value in values if value is not None)
    config = tuple(str(getattr(owner.config, name, None)) for name in _READ)
    return (repr(handle.method), config, weights, tuple(adapters))


def _version(value: Tensor) -> tuple[int, int]:
    value = getattr(value, "_local_tensor", value)  # the local shard of a sharded parameter
    return value.data_ptr(), 0 if value.is_inference() else value._version
