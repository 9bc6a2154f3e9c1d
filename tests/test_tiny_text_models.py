"""The tiny pipelines are what they claim: stock diffusers draws from each, and the prompt reaches the image."""

import pytest
import torch

from tests.tiny_text_models import KINDS, WORDS, tiny_pipeline, tiny_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_draws_from_it(kind, tmp_path):
    import diffusers

    tiny_pipeline(tmp_path, kind)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(pipeline).__name__ == ("StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline")
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    assert pipeline.tokenizer("red cat").input_ids == tiny_tokenizer()("red cat").input_ids
    assert sum(f.stat().st_size for f in tmp_path.rglob("*")) < 3 << 20
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    images = [
        pipeline(prompt, generator=torch.Generator().manual_seed(0), **size).images[0]
        for prompt in ("a red cat", "a blue circle", "a red cat")
    ]
    assert images[0].shape == (3, 32, 32)
    assert torch.equal(images[0], images[2])
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_the_seed_alone_decides_the_weights(tmp_path):
    state = torch.get_rng_state()
    paths = [tiny_pipeline(tmp_path / str(i), "sd1", seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(state, torch.get_rng_state())
    first, same, other = ((path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for path in paths)
    assert first == same != other
    ids = tiny_tokenizer().get_vocab()
    assert all(tiny_tokenizer().get_vocab() == ids for _ in range(3))


def test_words_are_single_tokens_and_other_text_still_tokenizes():
    tokenizer = tiny_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    ids = tokenizer("Zebra ünïcode 7!").input_ids
    assert len(ids) > 6
    assert tokenizer.unk_token_id not in ids[1:-1]
