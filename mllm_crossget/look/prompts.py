"""One picture and one question as the model's processor writes them, and the picture as the vision tower sees it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image


def question_inputs(model: Any, processor: Any, picture: Image.Image, question: str) -> Any:
    """The processor's inputs for one question about one picture, on the model's device.

    Raises:
        ValueError: the processor has no chat template.
    """
    chat: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            "the processor has no chat template, so it is not known how this model wants to be asked; set "
            "processor.chat_template, or use a model whose repository has one"
        )
    text = str(processor.apply_chat_template(chat, add_generation_prompt=True))
    return processor(images=[picture], text=[text], return_tensors="pt").to(model.device, model.dtype)


def placeholders(model: Any, inputs: Any) -> int:
    """Number of image placeholders in a prompt: visual tokens of the untouched model. 0 if the model names none."""
    names = ("image_token_id", "image_token_index")
    token = next((one for name in names if (one := getattr(model.config, name, None)) is not None), -1)
    return int((inputs["input_ids"] == token).sum())


def text_tokens(model: Any, inputs: Any) -> int:
    """Number of tokens of a prompt that are no image placeholders."""
    return inputs["input_ids"].numel() - placeholders(model, inputs)


def picture_seen(processor: Any, inputs: Any, picture: Image.Image) -> Image.Image:
    """The first image in the pixel values, with the processor's normalisation undone.

    A processor that cuts a picture into tiles gives the first tile. The picture itself is returned where the pixel
    values are no images (towers that take a sequence of patches).

    Args:
        processor: the model's processor.
        inputs: what it made of the picture.
        picture: the picture that was given.
    """
    values = inputs["pixel_values"]
    if values.ndim < 4 or values.shape[-3] != 3:
        return picture
    pixels = values.flatten(0, -4)[0].detach().float().cpu()
    images = processor.image_processor
    if getattr(images, "do_normalize", False):
        mean, std = (torch.tensor(part)[:, None, None] for part in (images.image_mean, images.image_std))
        pixels = pixels * std + mean
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(levels.numpy())
