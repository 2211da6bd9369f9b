import hashlib
import json

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from training import assemble, data, networks, train


@pytest.fixture(scope="module")
def tokenizer():
    return networks.fashion_tokenizer()


def test_tokenizer_gives_words_back_and_marks_both_ends(tokenizer):
    ids = tokenizer("A photo of a dark T-shirt").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "aphotoofadarkt-shirt"
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # CLIP pools at the largest id


def test_tokenizer_is_the_same_in_every_process():
    """Ties between merges once went by a hash that is new in every process: this is what the shipped weights know."""
    captions = [c for label in range(10) for tone in (None, 0, 1, 2) for c in data.fashion_captions(label, tone)]
    ids = train.token_ids(networks.fashion_tokenizer(), captions).numpy().astype("<i8")
    assert hashlib.sha256(ids.tobytes()).hexdigest() == "cce530e2bca5c5acfc4558803a42d225d1b525640242e70c5ca0873932eea1bf"


def test_every_caption_fits(tokenizer):
    assert max(len(tokenizer(c).input_ids) for c in ("a photo of a bright running shoe", "a photo of an ankle boot")) <= networks.TOKENS


def test_words_never_seen_have_tokens_too(tokenizer):
    ids = tokenizer("zebra €").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_tokenizer_written_is_the_tokenizer_read(tokenizer, tmp_path):
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    assemble._write_tokenizer(tokenizer, tmp_path)
    prompts = ["", "a photo of a bright running shoe", "GREY   handbag", "it's 20 €!", "word " * 40]
    read, raw = CLIPTokenizer.from_pretrained(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    old = _as_transformers_4_reads(tmp_path)
    for prompt in prompts:
        expected = networks.fashion_tokenizer()(prompt).input_ids
        assert read(prompt).input_ids == raw.encode(prompt).ids == old(prompt).input_ids == expected
    padded = read(prompts, padding="max_length", truncation=True, max_length=read.model_max_length).input_ids
    assert torch.equal(torch.tensor(padded), train.token_ids(networks.fashion_tokenizer(), prompts))


def _as_transformers_4_reads(folder):
    """A tokenizer of vocab.json and merges.txt alone."""
    from transformers import CLIPTokenizer

    header, *lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert header == "#version: 0.2"
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert list(vocab.values()) == list(range(len(vocab)))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines])


def test_one_zero_token_that_counts_256_times_is_256_zero_tokens(tokenizer):
    """fashion-dit trains on 17 context tokens, StableDiffusion3Pipeline feeds 272: the same velocity."""
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict(train.dit_modules(tokenizer)).eval()
    ids = train.token_ids(tokenizer, ["a dark coat", "boot"])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([200.0, 900.0])
    with torch.no_grad():
        context, pooled = train.sd3_conditions(modules, ids)
        with train.stand_in_for_absent_t5():
            short = modules["transformer"](x, context, pooled, t).sample
        pipeline = assemble.stable_diffusion_3(
            networks.vae(1), modules["transformer"], modules["text_encoder"], modules["text_encoder_2"], tokenizer
        )
        fed, _, fed_pooled, _ = pipeline.encode_prompt(["a dark coat", "boot"], None, None, do_classifier_free_guidance=False)
        assert fed.shape == (2, networks.TOKENS + 256, networks.TEXT_WIDTH)
        assert torch.allclose(fed_pooled, pooled, atol=1e-6)
        long = modules["transformer"](x, fed, fed_pooled, t).sample
        unweighted = modules["transformer"](x, context, pooled, t).sample
    # Sums in another order, six blocks deep, in float32; without the bias the difference is a thousand times larger.
    assert torch.allclose(short, long, atol=1e-5), (short - long).abs().max()
    assert (unweighted - long).abs().max() > 100 * (short - long).abs().max()


def test_guidance_is_embedded_as_the_pipeline_embeds_it():
    w = torch.tensor([0.5, 2.0, 6.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=train.GUIDANCE_WIDTH)
    assert torch.allclose(train.guidance_embedding(w), theirs, atol=1e-3)  # sines of angles up to 6000: eps * 6000


def test_consistency_function_is_the_schedulers_step():
    """With noise removed in one step, LCMScheduler returns f(x, t) as the student was trained to give it."""
    schedule = networks.few_step_schedule()
    schedule.set_timesteps(4, original_inference_steps=train.SOLVER_STEPS)
    x, v, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), schedule.timesteps[1]
    schedule._step_index = 1
    theirs = schedule.step(v, t, x).denoised

    def unet(*_, **__):
        return type("Output", (), {"sample": v})

    ours = train.consistency(unet, schedule.alphas_cumprod, x, t.repeat(2), None, torch.ones(2))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_latent_noise_is_nearly_all_there_is_at_the_last_time_step():
    assert networks.diffusion_schedule().alphas_cumprod[-1] < 1e-4
    assert not networks.diffusion_schedule().config.clip_sample
