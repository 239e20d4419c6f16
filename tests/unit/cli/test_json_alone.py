"""With --json stdout has JSON alone, whatever a model's or an edited piece's code prints."""

import argparse
import json

import pytest

from onegraph.cli.flags import json_alone
from onegraph.cli.main import main


@pytest.mark.parametrize("is_json", [True, False])
def test_what_others_print(is_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with json_alone(argparse.Namespace(json=is_json)):
        print("said by a model")
    told = capsys.readouterr()
    assert (told.err if is_json else told.out) == "said by a model\n"


@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_model_that_prints(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def printing(self: LlamaForCausalLM, *args: object, **kwargs: object) -> object:
        print("a step")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", printing)
    words = ["--enforce-eager", "--num-kv-blocks", "16", "--json"]
    assert main([command, *words, *(["--prompt", "def ", "--max-tokens", "2"] if command == "run" else [])]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) and (command == "explain" or "a step" in told.err)
