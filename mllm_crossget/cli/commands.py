"""The commands of ``mllm-crossget``. A new one is one entry of ``COMMANDS``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Args:
        options: "module:dataclass". The first fields without a default may be given first, without their
            option names.
        function: "module:function", called with the options (and the method's settings).
        help: description in one line.
        group: heading of the overview that it stands under, one of ``GROUPS``.
        example: a command line, without the program's name.
        takes_method: whether ``--method`` and that method's fields are options too.
        extra: the extra of the package that the command needs, as in ``pip install 'mllm-crossget[viz]'``.
        settings: "module:dataclass" of further options; the object is the function's last argument.
        takes_file: whether a YAML file with values for any of the options may be the first word.
        names: modules whose annotated fields are all names of options; a command that has them tells a mistyped name
            before anything heavy is imported.
        early: "module:function" that checks the files which the options name, before anything heavy is imported.
        details: "module:text" to print after the options of ``--help``.
        leading: the list whose option name may be left out where its values come first.
        takes_rest: whether all words behind ``--`` are for another program; the function's last argument. The method is
            then None if no option of it is given.
        quiet: whether other packages' progress bars and notes about deprecations are kept off the screen.
    """

    options: str
    function: str
    help: str
    group: str = ""
    example: str = ""
    takes_method: bool = False
    extra: str = ""
    settings: str = ""
    takes_file: bool = False
    names: tuple[str, ...] = ()
    early: str = ""
    details: str = ""
    leading: str = ""
    takes_rest: bool = False
    quiet: bool = True


GROUPS = ("see what it does", "choose a method and a budget", "train and evaluate", "serve", "measure speed", "set up")
COMMANDS: dict[str, Command] = {
    "bench": Command(
        "mllm_crossget.benchmark.speed:BenchOptions",
        "mllm_crossget.benchmark.speed:run",
        "time a model with and without reduction, by part, beside the ceiling that the device sets",
        group="measure speed",
        example="bench --geometry llava-1.5-7b --llm_layers 2 --keep_ratios 0.25 --plot speed.png",
    ),
    "bench-layers": Command(
        "mllm_crossget.benchmark.layer_timing:LayerTimesOptions",
        "mllm_crossget.benchmark.layer_timing:run",
        "time the layers of a vision tower and the language model, for schedule auto by time (--layer_times)",
        group="measure speed",
        example="bench-layers llava-1.5-7b --llm_layers 2 --output layer_times.json",
    ),
    "bench-reducer": Command(
        "mllm_crossget.benchmark.reducer:ReducerOptions",
        "mllm_crossget.benchmark.reducer:run",
        "time matching, importance and merging alone, against the number of tokens",
        group="measure speed",
        example="bench-reducer --tokens 576 2880",
    ),
    "bench-reuse": Command(
        "mllm_crossget.benchmark.reuse_timing:ReuseOptions",
        "mllm_crossget.benchmark.reuse_timing:run",
        "time the second question about an image whose features were kept",
        takes_method=True,
        group="measure speed",
        example="bench-reuse --keep_ratio 0.25",
    ),
    "bench-serve": Command(
        "mllm_crossget.benchmark.serving_load:BenchServeOptions",
        "mllm_crossget.benchmark.serving_load:run",
        "ask running servers in turns: time to the first token, between tokens, throughput, tokens and KV blocks",
        group="serve",
        example="bench-serve untouched=http://localhost:8000 reduced=http://localhost:8001 --concurrency 1 8 32",
        leading="servers",
    ),
    "ceilings": Command(
        "mllm_crossget.benchmark.gain_ceilings:CeilingsOptions",
        "mllm_crossget.benchmark.gain_ceilings:run",
        "by how much a reduction can help at most, by batch and answer length, for an assumed device",
        takes_method=True,
        extra="viz",
        group="choose a method and a budget",
        example="ceilings llava-1.5-7b --keep_ratio 0.25 --plot ceilings.png",
    ),
    "compare": Command(
        "mllm_crossget.compare.compare_options:CompareOptions",
        "mllm_crossget.compare.command:run",
        "compare methods and budgets on a model and questions of your own: mllm-crossget compare MODEL DATA.json",
        extra="viz",
        group="choose a method and a budget",
        example="compare embedded questions.json --methods tome visionzip --keep_ratios 0.5 0.25",
    ),
    "completion": Command(
        "mllm_crossget.cli.completion:CompletionOptions",
        "mllm_crossget.cli.completion:completion",
        "print the script that lets a shell complete commands and options: bash, zsh, fish or tcsh",
        group="set up",
        example="completion bash",
    ),
    "demo": Command(
        "mllm_crossget.embedded.demo:DemoOptions",
        "mllm_crossget.embedded.demo:run",
        "accelerate the small model that ships with the package and show what it costs",
        extra="viz",
        group="see what it does",
        example="demo --limit 60",
    ),
    "eval": Command(
        "mllm_crossget.integrations.lmms_eval.experiment:EvalOptions",
        "mllm_crossget.integrations.lmms_eval.experiment:run",
        "run a suite of lmms-eval tasks over methods and keep ratios: mllm-crossget eval experiment.yaml",
        extra="eval",
        takes_file=True,
        quiet=False,
        group="train and evaluate",
        example="eval eval/experiments/embedded.yaml --limit 100",
    ),
    "families": Command(
        "mllm_crossget.costs.family_table:FamiliesOptions",
        "mllm_crossget.costs.family_table:list_families",
        "list the supported model families, and those that are refused and why",
        group="choose a method and a budget",
        example="families",
    ),
    "inspect": Command(
        "mllm_crossget.costs.inspect_model:InspectOptions",
        "mllm_crossget.costs.inspect_model:inspect_model",
        "tokens and FLOPs of a model before and after, without its weights",
        takes_method=True,
        group="choose a method and a budget",
        example="inspect llava-1.5-7b --keep_ratio 0.25",
    ),
    "serve": Command(
        "mllm_crossget.integrations.vllm.serve:ServeOptions",
        "mllm_crossget.integrations.vllm.serve:serve",
        "start vLLM's server with fewer image tokens; what is behind -- goes to vllm serve",
        takes_method=True,
        takes_rest=True,
        quiet=False,
        group="serve",
        example="serve llava-hf/llava-1.5-7b-hf --keep_ratio 0.25 -- --port 8000",
    ),
    "show": Command(
        "mllm_crossget.embedded.show:ShowOptions",
        "mllm_crossget.embedded.show:run",
        "draw, for each image, what was merged into what and how many tokens every layer of the tower kept",
        takes_method=True,
        group="see what it does",
        example="show photo.jpg --keep_ratio 0.25 --methods tome random --html out.html",
        leading="images",
    ),
    "train": Command(
        "mllm_crossget.training.train_options:TrainOptions",
        "mllm_crossget.training.finetune:run",
        "fine-tune an accelerated model: mllm-crossget train config.yaml [--any_option value]",
        takes_method=True,
        extra="train",
        settings="mllm_crossget.training.options:TrainerSettings",
        takes_file=True,
        details="mllm_crossget.training.train_options:DATA_FORMS",
        quiet=False,
        group="train and evaluate",
        example="train scripts/configs/embedded.yaml --learning_rate 1e-4",
        names=(
            "mllm_crossget.config",
            "mllm_crossget.methods",
            "mllm_crossget.training.train_options",
            "mllm_crossget.training.options",
            "transformers.training_args",
        ),
        early="mllm_crossget.training.train_options:check_files",
    ),
    "ui": Command(
        "mllm_crossget.look.session:UiOptions",
        "mllm_crossget.look.app:run",
        "a page in the browser: ask about a picture with two settings side by side",
        extra="ui",
        group="see what it does",
        example="ui --port 7860",
    ),
}
