"""A LLaVA of the embedded shape for other pictures and another vocabulary: what its training needs.

End-to-end training, also from the embedded weights, does not find new shapes in minutes; labels of patches before it
do. A label is a word: a group of words that exclude one another, the last of which says that the patch shows nothing.
Shapes: B pictures, P = 144 patches, V vision width, T text width.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from .architecture import VISION_WIDTH, vocabulary
from .pretraining import IGNORE, patch_loss, word_scores
from .questions import WORDS

Groups = Mapping[str, Sequence[str]]


class WordHeads(nn.Module):
    """Heads that exist only in training: for every group of words one on patches and one on the class token."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, len(words)) for name, words in groups.items()})
        self.shown = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, len(words)) for name, words in groups.items()})


def adopt_weights(
    model: LlavaForConditionalGeneration, donor: LlavaForConditionalGeneration, words: Sequence[str]
) -> None:
    """Copy the embedded model's weights into one with another word list; words that it lacks keep their own rows.

    Args:
        model: result of ``architecture.build_model(seed, words)``.
        donor: the embedded model.
        words: the word list.
    """
    known, new = vocabulary(WORDS), vocabulary(words)
    shared = [word for word in new if word in known]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                rows = donor.get_parameter(name)[[known.index(word) for word in shared]]
                weight[[new.index(word) for word in shared]] = rows
            else:
                weight.copy_(donor.get_parameter(name))


def word_label_loss(
    model: LlavaForConditionalGeneration,
    heads: WordHeads,
    hidden: Tensor,
    visual: Tensor,
    labels: Mapping[str, tuple[Tensor, Tensor]],
    groups: Mapping[str, Sequence[int]],
) -> tuple[Tensor, dict[str, float]]:
    """The loss of patch labels, and its parts by name.

    Args:
        model: the LLaVA.
        heads: its training-only heads.
        hidden: class token and patches [B, 1 + P, V], from ``pretraining.see``.
        visual: visual tokens [B, P, T], from the same.
        labels: for every group, labels of patches [B, P] and of the whole picture [B]; `IGNORE` where not known.
        groups: token ids of every group's words.

    Returns:
        The sum over the groups of three cross-entropies: of the patches' heads, of visual tokens and the words'
        embeddings, and of the class token's head.
    """
    total, report = hidden.new_zeros(()), {}
    for name, (patches, shown) in labels.items():
        nothing = len(groups[name]) - 1
        logits = heads.patch[name](hidden[:, 1:]).float()
        scores = word_scores(model.lm_head.weight, visual.float(), groups[name])
        total = total + patch_loss(logits, patches, nothing) + patch_loss(scores, patches, nothing)
        total = total + _known_loss(heads.shown[name](hidden[:, 0]).float(), shown)
        named = (patches != IGNORE) & (patches != nothing)
        report[name] = (logits.argmax(-1) == patches)[named].float().mean().item()
    return total, report


def _known_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the pictures whose label is known; 0 if there is none."""
    known = (target != IGNORE).sum().clamp(min=1)
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / known
