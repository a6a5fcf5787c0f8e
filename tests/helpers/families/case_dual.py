"""CLIP, MetaCLIP 2 and SigLIP dual encoders, with ragged captions, and CLIP's towers with their projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, MetaClip2Config, MetaClip2Model

from mllm_crossget.ops.guidance.contrastive import contrastive_loss
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.tiny import pixels, text_batch, tiny_dual


def batch(model: nn.Module) -> Batch:
    texts = text_batch(model, full=model.config.model_type == "siglip")
    return {**texts, "pixel_values": pixels(model, 3)}


def row(batch: Batch, index: int) -> Batch:
    alone = {name: value[index : index + 1] for name, value in batch.items()}
    if "attention_mask" in alone:
        length = int(alone["attention_mask"].sum())
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
    return alone


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    output = model(**batch)
    return list(torch.cat([output.image_embeds, output.text_embeds], dim=-1))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    task = contrastive_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp())
    return task + getattr(output, "alignment_loss", torch.zeros(()))


def tower_of(kind: type, attention: str) -> nn.Module:
    whole = tiny_dual(attention=attention)
    vision = kind is CLIPVisionModelWithProjection
    model = kind(whole.config.vision_config if vision else whole.config.text_config)
    state = whole.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.set_attn_implementation(attention)
    return model.eval()


for kind in ("clip", "siglip"):
    add_case(
        Case(
            name=kind,
            model_type=kind,
            build=lambda attention, kind=kind: tiny_dual(kind, attention=attention),
            batch=batch,
            row=row,
            answers=answers,
            dial={"keep_ratio": 0.5, "text_keep_ratio": 0.5},
            loss=loss,
            skip_methods={"madtp": "its text tower is not causal"} if kind == "siglip" else {},
        )
    )


def tiny_metaclip(attention: str) -> nn.Module:
    """CLIP's tiny model in MetaCLIP's classes, with the same weights."""
    clip = tiny_dual("clip", attention=attention)
    parts = {name: getattr(clip.config, name).to_dict() for name in ("text_config", "vision_config")}
    for part in parts.values():
        del part["model_type"]
    config = MetaClip2Config(**parts, projection_dim=clip.config.projection_dim)
    config._attn_implementation = attention
    model = MetaClip2Model(config)
    model.load_state_dict(clip.state_dict())
    return model.eval()


add_case(
    Case(
        name="metaclip_2",
        model_type="metaclip_2",
        build=tiny_metaclip,
        batch=batch,
        row=row,
        answers=answers,
        dial={"keep_ratio": 0.5, "text_keep_ratio": 0.5},
        loss=loss,
        methods=("crossget", "madtp"),
    )
)

add_case(
    Case(
        name="siglip-vision-dial",
        model_type="siglip",
        build=lambda attention: tiny_dual("siglip", attention=attention),
        batch=batch,
        row=row,
        answers=answers,
        loss=loss,
        skip_methods=dict.fromkeys(("crossget", "random", "tome"), "with both dials above"),
    )
)

add_case(
    Case(
        name="clip-vision-projection",
        model_type="clip_vision_model:projection",
        build=lambda attention: tower_of(CLIPVisionModelWithProjection, attention),
        batch=lambda model: {"pixel_values": pixels(model, 3)},
        row=row,
        answers=lambda model, batch: list(model(**batch).image_embeds),
        loss=lambda model, batch: model(**batch).image_embeds.square().mean(),
    )
)

add_case(
    Case(
        name="clip-text-projection",
        model_type="clip_text_model",
        build=lambda attention: tower_of(CLIPTextModelWithProjection, attention),
        batch=text_batch,
        row=row,
        answers=lambda model, batch: list(model(**batch).text_embeds),
        dial={"text_keep_ratio": 0.5},
        has_vision=False,
    )
)
