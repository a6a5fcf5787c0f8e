"""``mllm-crossget serve``: the command that it makes of its options, and what it refuses."""

from __future__ import annotations

import json
import shlex

import pytest

from mllm_crossget import cli, save_crossget
from mllm_crossget.api import accelerate_mllm
from mllm_crossget.embedded import WEIGHTS_FOLDER, load_embedded
from mllm_crossget.integrations.vllm.serve import split_overrides

MODEL = str(WEIGHTS_FOLDER)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The server's command, as words; and the lines printed above it."""
    assert cli.main(["serve", MODEL, "--dry_run", *words]) == 0
    return capsys.readouterr().out.strip().splitlines()


def test_the_command_has_the_settings_and_vllms_own_arguments(capsys) -> None:
    words = ("--method", "tome", "--keep-ratio", "0.25", "--", "--port", "9", "--hf-overrides", '{"a": {"b": 1}}')
    *above, last = printed(capsys, *words)
    command = shlex.split(last)
    place = command.index("--hf-overrides")
    assert command[command.index("serve") + 1] == MODEL
    assert json.loads(command[place + 1]) == {"a": {"b": 1}, "crossget": {"method": "tome", "keep_ratio": 0.25}}
    assert command[place + 2 :] == ["--port", "9"]
    assert above[0].startswith("36 of 144 tokens")
    assert "http://localhost:9/v1" in above[2]
    assert above[3].startswith(f'client.chat.completions.create(model="{MODEL}"')


def test_saved_settings_are_served_and_an_option_replaces_them(capsys, tmp_path) -> None:
    model, _ = load_embedded()
    accelerate_mllm(model, keep_ratio=0.25).save_pretrained(tmp_path)
    save_crossget(model, tmp_path)
    for words, kept in (([], "36 of"), (["--keep_ratio", "0.5"], "72 of")):
        assert cli.main(["serve", str(tmp_path), "--dry_run", *words]) == 0
        assert capsys.readouterr().out.startswith(kept)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no saved settings; say how many tokens to keep"),
        (["--method", "madtp"], "content of an image"),
        (["--keep_ratio", "0.5", "--r", "3"], "spellings of the same dial"),
        (["--keep_ratio", "0.5", "--text_r", "3"], "text_keep_ratio and text_r"),
        (["--keep_ratio", "0.5", "--", "--hf-overrides", '{"crossget": {}}'], "give the settings once"),
        (["--keep_ratio", "0.5", "--", "--hf-overrides={"], "is no JSON"),
        (["--keep_ratio", "0.5", "--", "--hf-overrides", "[1]"], "holds a list"),
        (["--keep_ratio", "0.5", "--", "--hf-overrides"], "has no value"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(capsys, words: list[str], reason: str) -> None:
    assert cli.main(["serve", MODEL, "--dry_run", *words]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_without_vllm_it_says_what_to_install(capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", MODEL, "--keep_ratio", "0.5"]) == 2
    written = capsys.readouterr()
    assert "vLLM is not installed here" in written.err
    assert written.out == ""


def test_overrides_are_found_in_both_spellings() -> None:
    assert split_overrides(["--a", "--hf_overrides={}", "b"]) == (["--a", "b"], {})
    with pytest.raises(ValueError, match="twice"):
        split_overrides(["--hf-overrides", "{}", "--hf-overrides={}"])
