"""Options of ``mllm-crossget compare``. This file imports no model code, so that a mistake is reported at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from mllm_crossget.field_types import check_choice, check_field_types, check_least, checked_ratio

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@dataclass
class CompareOptions:
    """Answer questions of your own under every method and budget, and compare accuracy and cost.

    Args:
        model: folder or repository of the hub with the model; "embedded" is the small one that ships with the package.
        data: questions with answers, in the forms that ``mllm-crossget train`` reads: a JSON or JSONL file in LLaVA's
            form or as chat messages, a parquet file, a folder of ``datasets.save_to_disk``, or a hub name.
        methods: reduction methods, also with an ending: "-published" is the method as its authors published it, and
            the variants of ``mllm-crossget demo``. By default all that the model can serve.
        keep_ratios: shares of the visual tokens that reach the language model.
        image_folder: folder that relative image paths start from; by default the data file's folder.
        limit: number of questions, drawn at random; all if not given.
        seed: seed of that draw.
        prompt_template: text around each question, which replaces {}; such as "{} Answer with one word."
        max_new_tokens: largest number of tokens of an answer.
        batch_size: questions in a batch.
        rounds: timed rounds, in which all settings take turns; 0 measures no times.
        timed_questions: questions in the timed batch.
        dtype: "auto" (float32 on a CPU, elsewhere as stored), "float32", "bfloat16" or "float16".
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        device: such as cuda:1 or cpu; by default a GPU if there is one.
        output_dir: folder of the results: runs.jsonl, compare.md, compare.html and compare.png.
        json: print the result as JSON instead of a table.
    """

    model: str
    data: str
    methods: list[str] = field(default_factory=list)
    keep_ratios: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.11])
    image_folder: str | None = None
    limit: int | None = None
    seed: int = 0
    prompt_template: str = "{}"
    max_new_tokens: int = 32
    batch_size: int = 16
    rounds: int = 3
    timed_questions: int = 8
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    device: str | None = None
    output_dir: str = "runs/compare"
    json: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, limit=1, max_new_tokens=1, batch_size=1, rounds=0, timed_questions=1)
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "attn_implementation", ATTENTIONS)
        if not self.keep_ratios:
            raise ValueError("keep_ratios is empty; give one value at least, such as 0.25")
        for keep_ratio in self.keep_ratios:
            if checked_ratio("keep_ratios", keep_ratio) == 1:
                raise ValueError("keep_ratios has 1, which is the untouched model; it is always run, leave it out")
        for name in ("methods", "keep_ratios"):
            values = getattr(self, name)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} has {twice[0]!r} twice; leave one out")
        if "{}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} has no {{}}, where the question goes")
