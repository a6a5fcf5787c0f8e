"""The alignment loss between vision and text cross tokens (CrossGET section 3.4, LLaVA code). torch only.

Shape suffixes: L layers, N images, B rows, D width of the text model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def layer_repeats(vision_layers: int, text_layers: int) -> list[int]:
    """How often each vision layer is repeated to line up with the text layers; sums to ``text_layers``."""
    return [(i + 1) * text_layers // vision_layers - i * text_layers // vision_layers for i in range(vision_layers)]


def alignment_loss(
    vision_LND: Tensor, text_LBD: Tensor, row_of_image_N: Tensor, kl: str = "reference"
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of the channel distributions of vision and text cross tokens.

    P is the softmax over channels of an image's projected vision token, Q that of its row's text token, and M = (P + Q)
    / 2. "reference" is ½[KL(M‖P) + KL(M‖Q)] as in the official code, "js" is ½[KL(P‖M) + KL(Q‖M)]. The divergence is
    summed over channels and averaged over text layers and images. Rows without an image are left out; a batch without
    images gives 0 with a gradient of 0.

    Args:
        vision_LND: (vision layers, images, D) cross tokens after the projector.
        text_LBD: (text layers, rows, D) cross tokens.
        row_of_image_N: (images,) row that holds each image.
        kl: "reference" or "js".

    Returns:
        Loss, its vision term and its text term (scalars, float32); the loss is the mean of the terms.
    """
    if row_of_image_N.numel() == 0:
        zero = (text_LBD.sum() + vision_LND.sum()) * 0.0
        return zero, zero, zero
    repeats = torch.tensor(layer_repeats(vision_LND.shape[0], text_LBD.shape[0]), device=vision_LND.device)
    vision = vision_LND.float().repeat_interleave(repeats, dim=0)
    text = text_LBD.float().to(vision.device)[:, row_of_image_N.to(vision.device)]
    log_p, log_q = vision.log_softmax(dim=-1), text.log_softmax(dim=-1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)  # finite even if both probabilities round to 0
    rows = log_p.shape[0] * log_p.shape[1]
    if kl == "js":
        terms = [(part.exp() * (part - log_mean)).sum() / rows for part in (log_p, log_q)]
    else:
        terms = [(log_mean.exp() * (log_mean - part)).sum() / rows for part in (log_p, log_q)]
    return (terms[0] + terms[1]) / 2, terms[0], terms[1]
