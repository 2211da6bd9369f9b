import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from edgediffusion.cli._demo import prompts as fashion_prompts
from edgediffusion.optimize.calibrate import read_prompts
from training import assemble, judge, loop, networks, train
from training.loop import Plan, Trainer

REFERENCE = Path(assemble.REFERENCE)
SHIPPED = sorted(p.parent.name for p in REFERENCE.glob("*/model_index.json"))


def small_unet(**more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=networks.TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def make(kind: str) -> DiffusionPipeline:
    torch.manual_seed(0)
    vae, tokenizer = networks.vae(1), networks.fashion_tokenizer()
    vae.register_to_config(scaling_factor=0.5, force_upcast=False)
    if kind == "fashion":
        return assemble.stable_diffusion(vae, small_unet(), networks.text_encoder(tokenizer), tokenizer)
    if kind == "fashion-lcm":
        return assemble.latent_consistency(vae, small_unet(time_cond_proj_dim=256), networks.text_encoder(tokenizer), tokenizer)
    parts = train.dit_modules(tokenizer)
    return assemble.stable_diffusion_3(vae, parts["transformer"], parts["text_encoder"], parts["text_encoder_2"], tokenizer)


def digest(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def draw(pipeline: DiffusionPipeline, prompt: str = "a bag", steps: int = 2):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, num_inference_steps=steps, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images[0]


@pytest.mark.parametrize("kind", ["fashion", "fashion-dit", "fashion-lcm"])
def test_folder_loads_draws_and_is_the_same_bytes_twice(kind, tmp_path):
    for name in ("one", "two"):
        assemble.replace_folder(tmp_path / name, make(kind), ["a bag", "a dark boot"])
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    check_files(tmp_path / "one")
    assert (tmp_path / "one" / "prompts.txt").read_text() == "a bag\na dark boot\n"
    pipeline = assemble.load(tmp_path / "one")
    dtypes = {c.dtype for c in pipeline.components.values() if isinstance(c, torch.nn.Module)}
    assert dtypes == {torch.float32}
    assert draw(pipeline).size == (32, 32)


def test_weights_written_are_the_weights_read(tmp_path):
    made = make("fashion")
    expected = {k: v.half() for k, v in made.text_encoder.state_dict().items()}
    assemble.replace_folder(tmp_path / "p", made)
    read = DiffusionPipeline.from_pretrained(tmp_path / "p").text_encoder.state_dict()
    assert all(torch.equal(read[k].half(), v) for k, v in expected.items())


def test_replacing_leaves_only_the_new_folder(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "old").write_text("old")
    assemble.replace_folder(tmp_path / "p", make("fashion"))
    assert [f.name for f in tmp_path.iterdir()] == ["p"]
    assert not (tmp_path / "p" / "old").exists()


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "old").write_text("old")
    with pytest.raises(AttributeError):
        assemble.replace_folder(tmp_path / "p", object())
    assert (tmp_path / "p" / "old").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_the_moving_average_is_what_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path)
    monkeypatch.setattr(assemble, "RUNS", tmp_path)
    monkeypatch.setitem(train.PLANS, "tiny", Plan(1, 1, 1e-2))
    run = Trainer("tiny", {"net": torch.nn.Linear(2, 2)}, train.PLANS["tiny"])
    run.average = [torch.full_like(p, 7.0) for p in run.parameters]
    run.save()
    weights = assemble.trained("tiny", {"net": torch.nn.Linear(2, 2)})["net"].weight
    assert torch.equal(weights, torch.full((2, 2), 7.0))


def test_a_run_that_is_not_there_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "RUNS", tmp_path)
    with pytest.raises(SystemExit, match=r"python -m training\.train fashion"):
        assemble.trained("fashion", {})


def check_files(folder: Path) -> None:
    """No pickles, no names of the machine, float16 throughout, the hub's names in text encoders."""
    for file in (f for f in folder.rglob("*") if f.is_file()):
        assert file.suffix in (".json", ".safetensors", ".txt"), file
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert {tensors.get_tensor(k).dtype for k in tensors.keys()} == {torch.float16}  # noqa: SIM118
                if file.parent.name.startswith("text_encoder"):
                    assert all(k.startswith(("text_model.", "text_projection.")) for k in tensors.keys())  # noqa: SIM118
        elif file.name.endswith(("config.json", "model_index.json")):
            facts = json.loads(file.read_text(encoding="utf-8"))
            assert "_name_or_path" not in facts
            assert not [v for v in facts.values() if isinstance(v, str) and "/" in v], file


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_folder_loads_and_draws(name):
    check_files(REFERENCE / name)
    image = draw(assemble.load(REFERENCE / name), steps=4)
    assert image.size[0] == image.size[1]
    assert image.getextrema() != (0, 0)


@pytest.mark.parametrize("name", assemble.FASHION)
def test_shipped_folders_bring_prompts_to_calibrate_with(name):
    assert read_prompts(REFERENCE / name) == fashion_prompts()


def test_shipped_folders_are_small_together():
    assert sum(f.stat().st_size for f in REFERENCE.rglob("*") if f.is_file()) <= 40_000_000


@pytest.mark.parametrize("name", [n for n in SHIPPED if n in judge.STEPS])
def test_model_card_tells_the_numbers_of_the_report(name):
    report, card = judge.DOCS / f"{name}.json", (judge.DOCS / f"{name}.md").read_text(encoding="utf-8")
    facts = json.loads(report.read_text(encoding="utf-8"))
    assert judge.with_numbers(card, judge.table(facts)) == card
    assert digest_of_weights(name) == facts["weights_sha256"], "the weights changed after they were judged"
    assert (judge.DOCS / f"{name}.png").exists()


def digest_of_weights(name: str) -> dict[str, str]:
    return {k: v for k, v in digest(REFERENCE / name).items() if k.endswith(".safetensors")}


def test_judge_draws_what_the_pipeline_draws():
    """The short cut around Stable Diffusion 3's 256 zero tokens, and the plain way of the others."""
    for kind in ("fashion", "fashion-dit"):
        pipeline = make(kind)
        pipeline.set_progress_bar_config(disable=True)

        def settings():
            generator = torch.Generator().manual_seed(0)
            return {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator, "output_type": "np"}

        prompts = ["a bag", "dark boot"]
        plain, ours = pipeline(prompts, **settings()).images, judge.draw_batch(pipeline, prompts, settings())
        assert abs(plain - ours).max() < 1e-4  # of 1, after two steps and the decoder; an 8-bit level is 4e-3


def test_classifier_is_rebuilt_from_its_own_description():
    from training import classifier

    network = classifier.load()
    config = json.loads((classifier.FOLDER / "config.json").read_text())
    assert config["layers"] == classifier.layers()
    assert config["test_accuracy"] >= 0.9
    chosen, features = classifier.evaluate(network, torch.zeros(3, 1, 32, 32))
    assert (chosen.shape, features.shape) == ((3,), (3, 96))
