"""A small CLIP for image-text retrieval on the embedded scenes: sizes, tokenizer, captions, training-only heads.

A caption names every digit of a scene with its colour, in any order and one of several wordings. The package has no
weights of it: ``scripts/train_retrieval.py`` trains it from scratch in a quarter of an hour on one core.
Shapes: B scenes, P = 144 patches, V vision width, E embedding width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from .architecture import grid_positions, look_at_alike
from .pretraining import NO_COLOUR, NO_DIGIT, PatchLabels, patch_loss
from .scenes import CANVAS, COLOURS, PATCH, Layout, Scene, render, sample_layouts

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<start>", "<end>"
_WORDS = ("a", "and", ",", ".", "the", "digit", "digits", "is", "are", "in", "there", "with", "photo", "of", "scene")
# CLIP's convention: the end mark has the largest id.
VOCABULARY = (PAD, UNKNOWN, *_WORDS, *(str(digit) for digit in range(10)), *COLOURS, BOS, EOS)
WIDTH, EMBEDDING, LAYERS, LONGEST = 128, 128, 6, 48
TEST_SEED = 4048
_OPENINGS = ("", "there is", "a photo of", "a scene with", "the digits are")


@dataclass
class RetrievalSet:
    """Held-out pictures and their captions.

    Attributes:
        pixels: [B, 3, S, S] in -1..1, the model's input.
        captions: several captions for every picture, picture by picture.
        image_of_caption: [captions] index of the picture that a caption belongs to.
    """

    pixels: Tensor
    captions: list[str]
    image_of_caption: Tensor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, with ``<start>`` first and ``<end>`` last, padded on the right."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, ids[BOS]), (EOS, ids[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )


def build_config() -> CLIPConfig:
    """Configuration with six layers in both towers; the alignment loss of the reference needs equal depths."""
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "projection_dim": EMBEDDING,
    }
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    marks = {"pad_token_id": ids[PAD], "bos_token_id": ids[BOS], "eos_token_id": ids[EOS]}
    text = {**sizes, **marks, "vocab_size": len(VOCABULARY), "max_position_embeddings": LONGEST}
    vision = {**sizes, "image_size": CANVAS, "patch_size": PATCH}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING)


def build_model(seed: int = 0) -> CLIPModel:
    """The untrained model, with initial weights that train in minutes (see ``architecture.build_model``)."""
    torch.manual_seed(seed)
    model = CLIPModel(build_config())
    with torch.no_grad():
        embeddings = model.vision_model.embeddings
        embeddings.position_embedding.weight[1:] = grid_positions(CANVAS // PATCH, WIDTH)
        embeddings.position_embedding.weight[0].zero_()
        embeddings.patch_embedding.weight.normal_(std=0.06)
        model.text_model.embeddings.token_embedding.weight.normal_(std=0.1)
        for tower in (model.vision_model, model.text_model):
            for layer in tower.encoder.layers:
                look_at_alike(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    return model


def caption(scene: Scene, chance: random.Random) -> str:
    """A caption that names every digit of a scene with its colour."""
    items = chance.sample(scene.items, len(scene.items))
    if chance.random() < 0.5:
        words = [f"a {item.colour} {item.digit}" for item in items]
    else:
        words = [f"{item.digit} in {item.colour}" for item in items]
    listed = " , ".join(words[:-1]) + " and " + words[-1]
    return f"{chance.choice(_OPENINGS)} {listed} .".strip()


def held_out_set(images: int = 1000, captions: int = 3, seed: int = TEST_SEED) -> RetrievalSet:
    """Pictures with held-out digits and backgrounds; no two pictures show the same digits in the same colours."""
    if images < 1 or captions < 1:
        raise ValueError(f"images and captions must be at least 1, got {images} and {captions}")
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    layout = sample_layouts(2 * images, "test", generator)
    seen: set[frozenset[tuple[int, str]]] = set()
    rows: list[int] = []
    texts: list[str] = []
    for index, scene in enumerate(layout.scenes()):
        content = frozenset((item.digit, item.colour) for item in scene.items)
        if content not in seen and len(rows) < images:
            seen.add(content)
            rows.append(index)
            texts += [caption(scene, chance) for _ in range(captions)]
    pixels = torch.cat([render(layout.select(slice(row, row + 1)))[0] for row in rows])
    return RetrievalSet(pixels * 2 - 1, texts, torch.arange(len(rows)).repeat_interleave(captions))


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> dict[str, Tensor]:
    """Captions padded to the longest: ``input_ids`` and ``attention_mask``."""
    batch = tokenizer(list(captions), padding=True, return_tensors="pt", return_token_type_ids=False)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


class SceneHeads(nn.Module):
    """Heads that exist only in training: digit and colour of every patch, coloured digits of the whole picture."""

    def __init__(self) -> None:
        super().__init__()
        self.digit = nn.Linear(WIDTH, NO_DIGIT + 1)
        self.colour = nn.Linear(WIDTH, NO_COLOUR + 1)
        self.shown = nn.Linear(EMBEDDING, 10 * len(COLOURS))

    def patch_losses(self, patches_BPV: Tensor, labels: PatchLabels) -> Tensor:
        """Cross-entropy of the patches' digits and colours."""
        digit = patch_loss(self.digit(patches_BPV).float(), labels.digit, NO_DIGIT)
        return digit + patch_loss(self.colour(patches_BPV).float(), labels.colour, NO_COLOUR)

    def shown_loss(self, embeds_BE: Tensor, layout: Layout) -> Tensor:
        """Loss of which of the 80 coloured digits the picture shows, read from its embedding; summed over the 80."""
        pair = (layout.value * len(COLOURS) + layout.colour).masked_fill(~layout.present, 0)
        target = torch.zeros(len(layout), 10 * len(COLOURS)).scatter_add_(1, pair, layout.present.float()).clamp(max=1)
        logits = self.shown(embeds_BE).float()
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(layout)
