import pytest

from edgediffusion import registry
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.optimize.recipe import load_placement, load_recipe


@pytest.mark.parametrize("name", registry.names("optimize.recipes", ".toml"))
def test_every_recipe_loads(name):
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", registry.names("optimize.placements", ".toml"))
def test_every_placement_loads(name):
    assert load_placement(name).name == name


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UnknownName, match="int8"):
        load_recipe("int9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights = 3 4", "not valid TOML"),
        ('weights = "int8"\nactivation = "int8"', "unknown keys"),
        ('weights = "int8"', "lacks a key"),
        ('weights = "int2"\nactivations = "int8"', "cannot write"),
        ('weights = "int4"\nactivations = "int8"\ngroup = 64', "Leave out group"),
        ('weights = "int4"\nactivations = "float"\ngroup = 65', "65"),
        ('weights = "int4"\nactivations = "int8"\nrank = "32"', "'32'"),
        ('weights = "int4"\nactivations = "int8"\nrank = 8\nranges = "modelopt-mse"', "Leave out rank"),
        ('weights = "int8"\nactivations = "int8"\nexclude = "conv_in"', "no list of texts for exclude"),
        ('weights = "fp8"\nactivations = "fp8"\nrounding = "adaround"', "for integers"),
        ('weights = "int8"\nactivations = "int8"\nbalance = "seesaw"', "seesaw"),
        ('weights = "int8"\nactivations = "int8"\nrounding = "up"', "up"),
        ('weights = "int8"\nactivations = "int8"\nexclude = ["("]', "expression"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_reason(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ArgumentError, match=message):
        load_recipe(str(file))


def test_the_int8_recipe_keeps_the_ends_and_the_time_embedding_float():
    recipe = load_recipe("int8")
    for layer in (
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "mid_block.resnets.0.time_emb_proj",
        "proj_out",
        "transformer_blocks.0.norm1.linear",
    ):
        assert recipe.excludes(layer), layer
    for layer in (
        "mid_block.attentions.0.proj_out",
        "down_blocks.0.resnets.0.conv1",
        "transformer_blocks.0.attn.to_q",
        "up_blocks.0.resnets.0.conv_shortcut",
    ):
        assert recipe.excludes(layer) is None, layer
