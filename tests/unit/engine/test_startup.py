"""What the engine takes from a loaded model."""

from types import SimpleNamespace

from transformers import GenerationConfig, LlamaConfig

from onegraph.engine.startup import eos_token_ids, vocab_size


def model(generation: object, config: object, tokenizer: object) -> SimpleNamespace:
    return SimpleNamespace(
        generation_config=GenerationConfig(eos_token_id=generation),
        config=LlamaConfig(eos_token_id=config, vocab_size=50),
        tokenizer=SimpleNamespace(eos_token_id=tokenizer),
    )


def test_the_end_of_text_is_what_the_first_source_names():
    assert eos_token_ids(model([1, 2], 3, 4)) == {1, 2}
    assert eos_token_ids(model(None, 3, 4)) == {3}
    assert eos_token_ids(model(None, [3, 5], 4)) == {3, 5}
    assert eos_token_ids(model(None, None, 4)) == {4}
    assert eos_token_ids(model(None, None, None)) == set()
    assert vocab_size(model(None, None, None).config) == 50
