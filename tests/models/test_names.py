import pytest

from lorajax.models import FAMILIES
from lorajax.models.names import hf_name, tree_path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("embed", "model.embed_tokens"),
        ("layers.0.attention.q_proj", "model.layers.0.self_attn.q_proj"),
        ("layers.27.mlp_norm", "model.layers.27.post_attention_layernorm"),
        ("norm", "model.norm"),
        ("head", "lm_head"),
    ],
)
def test_names_of_llama(path, name):
    assert hf_name("llama", path) == name
    assert tree_path("llama", name) == path


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_name_goes_there_and_back(family):
    paths = [template.replace("{i}", "13") for template in FAMILIES[family].NAMES]
    assert [tree_path(family, hf_name(family, path)) for path in paths] == paths
    assert len({hf_name(family, path) for path in paths}) == len(paths)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb", "model.layers.x.mlp.up_proj", "model.layers.0.mlp", "norm"],
)
def test_unknown_name(name):
    with pytest.raises(KeyError):
        tree_path("llama", name)
