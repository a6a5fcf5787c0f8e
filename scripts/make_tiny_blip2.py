"""Write a small BLIP-2 with random weights and its processor, to try fine-tuning on a CPU.

python scripts/make_tiny_blip2.py                      # into runs/tiny_blip2; its words are those of the toy data
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    HfArgumentParser,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from mllm_crossget.embedded.architecture import BOS, EOS, PAD, UNKNOWN, build_tokenizer
from mllm_crossget.embedded.scenes import CANVAS, PATCH

QUERIES = 8


@dataclass
class Options:
    """What to write."""

    folder: str = field(default="runs/tiny_blip2", metadata={"help": "output folder"})
    text: str = field(default="opt", metadata={"help": "language model: opt or t5"})
    seed: int = field(default=0, metadata={"help": "of the weights"})


def build_processor() -> Blip2Processor:
    """BLIP-2's processor for the pictures and words of the embedded model's scenes."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    pictures = BlipImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Blip2Processor(pictures, tokenizer, num_query_tokens=QUERIES)


def build_model(processor: Blip2Processor, text: str = "opt", seed: int = 0) -> Blip2ForConditionalGeneration:
    """A BLIP-2 of about a million parameters; ``text`` is "opt" or "t5"."""
    tokenizer = processor.tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}  # fmt: skip
    if text == "opt":
        language = OPTConfig(hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=128, **special)  # fmt: skip
    elif text == "t5":
        language = T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                            decoder_start_token_id=tokenizer.pad_token_id, **special)  # fmt: skip
    else:
        raise ValueError(f"text must be opt or t5, got {text!r}")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config={**sizes, "num_hidden_layers": 4, "image_size": CANVAS, "patch_size": PATCH,
                       "initializer_range": 0.02},
        qformer_config={**sizes, "num_hidden_layers": 2, "cross_attention_frequency": 2, "vocab_size": len(tokenizer)},
        text_config=language.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=0.02)  # equal queries would never become different
    return model


def main() -> None:
    """Write model and processor."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(args_filename=None)
    folder = Path(options.folder)
    processor = build_processor()
    build_model(processor, options.text, options.seed).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
