from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_quant.recipe import Recipe, as_recipe, as_scheme, matches
from lightning_quant.spec import PRESETS, QuantScheme, QuantSpec


@pytest.mark.parametrize(
    ("pattern", "name", "types", "found"),
    [
        ("fc", "fc", [], True),
        ("fc", "fc1", [], False),
        ("*.fc", "block.0.fc", [], True),
        ("*.fc", "fc", [], False),
        ("block.?.fc", "block.0.fc", [], True),
        ("block.[01].fc", "block.2.fc", [], False),
        ("FC", "fc", [], False),
        ("re:block[.]", "block.3.fc", [], True),
        ("re:fc", "block.fc", [], False),
        ("re:.*fc$", "block.fc", [], True),
        ("Linear", "block.fc", ["MyLinear", "Linear"], True),
        ("Conv2d", "block.fc", ["MyLinear", "Linear"], False),
        ("re:Linear", "block.fc", ["Linear"], False),
    ],
)
def test_patterns(pattern, name, types, found):
    assert matches(pattern, name, types) is found


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_dict_yaml_and_weights_only(name, tmp_path):
    for recipe in (Recipe(name), Recipe(name, ignore="head", schemes={"re:a[.]": "w8a16", "b": None}, algorithms=["gptq"])):
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        path = tmp_path / "recipe.yaml"
        recipe.to_yaml(path)
        assert Recipe.from_yaml(path) == recipe
        assert as_recipe(str(path)) == recipe
        torch.save(recipe.to_dict(), tmp_path / "recipe.pt")
        assert Recipe.from_dict(torch.load(tmp_path / "recipe.pt", weights_only=True)) == recipe
    assert [path.name for path in tmp_path.glob("*.yaml*")] == ["recipe.yaml"]


@pytest.mark.parametrize("fold", [None, [], [("conv", "norm"), ["a.0", "a.1"]]])
def test_pairs_to_fold_survive_a_dict(fold):
    recipe = Recipe("w8a8", fold=fold)
    assert recipe.fold == (None if fold is None else tuple(tuple(pair) for pair in fold))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert (recipe == Recipe("w8a8")) == (fold is None)


def test_the_order_of_patterns_survives_yaml(tmp_path):
    recipe = Recipe(schemes={"z": "w8a16", "a*": None, "*": "w4a16"})
    recipe.to_yaml(tmp_path / "r.yml")
    assert list(Recipe.from_yaml(tmp_path / "r.yml").schemes) == ["z", "a*", "*"]


def test_the_first_match_wins():
    recipe = Recipe("w8a8", schemes={"block.0.*": "w4a16", "re:block[.]": None, "Linear": "nf4"})
    schemes = {name: PRESETS[name].scheme for name in PRESETS}
    assert recipe.lookup("block.0.fc", ["Linear"]) == (schemes["w4a16"], "block.0.*")
    assert recipe.lookup("block.1.fc", ["Linear"]) == (None, "re:block[.]")
    assert recipe.lookup("head", ["Linear"]) == (schemes["nf4"], "Linear")
    assert recipe.lookup("conv", ["Conv2d"]) == (schemes["w8a8"], None)


def test_ignore():
    recipe = Recipe("w8a8", ignore=["head", "re:.*[.]norm", "Conv2d"])
    assert recipe.ignored("head") == "head"
    assert recipe.ignored("a.norm") == "re:.*[.]norm"
    assert recipe.ignored("stem", ["Conv2d"]) == "Conv2d"
    assert recipe.ignored("body", ["Linear"]) is None
    assert Recipe("w8a8", ignore="head").ignore == ("head",)


def test_overrides_change_the_default_weight_only():
    recipe = Recipe("w4a16", group_size=64, symmetric=False, ignore=["lm_head"], schemes={"*.down_proj": "w8a16"})
    assert recipe.scheme == QuantScheme(QuantSpec(4, symmetric=False, granularity="group", group_size=64))
    assert recipe.schemes == {"*.down_proj": PRESETS["w8a16"].scheme}
    assert Recipe("w8a8", bits=4).scheme.weight == QuantSpec(4)
    assert Recipe("w8a8", bits=4).scheme.input == PRESETS["w8a8"].scheme.input
    assert Recipe("w4a16", granularity="channel").scheme.weight == QuantSpec(4)
    assert Recipe.from_dict({"scheme": "w4a16", "group_size": 32}) == Recipe("w4a16", group_size=32)


@pytest.mark.parametrize("name", PRESETS)
def test_edges_are_the_presets_unless_given(name):
    edges = PRESETS[name].edges
    assert Recipe(name).edges == (edges and PRESETS[edges].scheme)
    assert Recipe(name, edges=None).edges is None
    assert Recipe(name, edges="w8a16").edges == PRESETS["w8a16"].scheme
    assert Recipe(PRESETS[name].scheme).edges is None


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Recipe("w5a5"), ["'w5a5'", *PRESETS]),
        (lambda: Recipe("w4a4", edges="w9"), ["'w9'", *PRESETS]),
        (lambda: Recipe(schemes={"a": "w9"}), ["'w9'", *PRESETS]),
        (lambda: Recipe(8), ["int", "preset"]),
        (lambda: Recipe(bits=4), ["bits", *PRESETS]),
        (lambda: Recipe("w8a8", bits=9), ["bits=9"]),
        (lambda: Recipe("w8a8", granularity="group"), ["group_size=None"]),
        (lambda: Recipe("w8a8", granularity="row"), ["'row'", "channel"]),
        (lambda: Recipe("w8a8", ignore=["re:("]), ["'re:('", "ignore", "regular expression"]),
        (lambda: Recipe("w8a8", ignore=[3]), ["3", "ignore", "string"]),
        (lambda: Recipe(schemes={"re:[": None}), ["'re:['", "schemes"]),
        (lambda: Recipe.from_dict({"preset": "w8a8"}), ["'preset'", "scheme", "ignore", "edges", "algorithms"]),
        (lambda: Recipe({"weigth": {}}), ["'weigth'", "weight, input, output"]),
    ],
)
def test_errors_name_the_value_and_the_valid_names(build, told):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build()
    for part in told:
        assert part in str(error.value)


def test_as_recipe_accepts(tmp_path):
    recipe = Recipe("w4a4")
    assert as_recipe(recipe) is recipe
    assert as_recipe("w4a4") == recipe
    assert as_recipe({"scheme": "w4a4"}) == recipe
    assert as_recipe(recipe.to_dict()) == recipe
    assert as_recipe(PRESETS["w4a4"].scheme) == Recipe("w4a4", edges=None)
    path = tmp_path / "r.yaml"
    path.write_text("scheme: w4a4\n")
    assert as_recipe(path) == as_recipe(str(path)) == recipe


@pytest.mark.parametrize("value", ["w5a5", "", Path("recipe.json"), Path("w8a8"), 3, None, ["w8a8"], QuantSpec()])
def test_as_recipe_rejects(value):
    with pytest.raises(ValueError, match="recipe") as error:
        as_recipe(value)
    assert (str(value) if isinstance(value, (str, Path)) else type(value).__name__) in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [("a: [1", "not YAML"), ("- w8a8", "list"), ("", "NoneType"), ("shceme: w8a8", "'shceme'")],
)
def test_a_yaml_file_that_holds_no_recipe_is_named(text, told, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        as_recipe(path)


def test_a_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.yaml.*does not exist"):
        as_recipe(tmp_path / "gone.yaml")


def test_as_scheme():
    scheme = PRESETS["w8a8"].scheme
    assert as_scheme("w8a8") == as_scheme(scheme) == as_scheme(scheme.to_dict()) == scheme
    assert as_scheme(None) is None


def test_yaml_is_readable_by_hand(tmp_path):
    Recipe("w4a16", ignore=["head"]).to_yaml(tmp_path / "r.yaml")
    plain = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert plain["scheme"]["weight"]["bits"] == 4
    assert plain["ignore"] == ["head"]
