from __future__ import annotations

import dataclasses
import json

import pytest

from lightning_quant.spec import PRESETS, QuantScheme, QuantSpec, get_preset

SPECS = [
    QuantSpec(),
    QuantSpec(4, granularity="group", group_size=128),
    QuantSpec(3, signed=False, symmetric=False, granularity="tensor"),
    QuantSpec(8, granularity="token", dynamic=True),
    QuantSpec(8, "float8_e4m3fn"),
    QuantSpec(8, "float8_e5m2", granularity="tensor", dynamic=True),
    QuantSpec(4, "nf4", granularity="group", group_size=64),
    QuantSpec(4, "fp4", granularity="group", group_size=32),
]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dtype": "int8"}, ["'int8'", "int", "float8_e4m3fn", "float8_e5m2", "fp4", "nf4"]),
        ({"granularity": "row"}, ["'row'", "tensor", "channel", "group", "token"]),
        ({"bits": 1}, ["bits=1", "2 to 8"]),
        ({"bits": 9}, ["bits=9", "2 to 8"]),
        ({"bits": 4.0}, ["bits=4.0", "int"]),
        ({"bits": True}, ["bits=True", "int"]),
        ({"dtype": "nf4"}, ["'nf4'", "bits=4", "not 8"]),
        ({"dtype": "float8_e4m3fn", "bits": 4}, ["'float8_e4m3fn'", "bits=8", "not 4"]),
        ({"dtype": "float8_e4m3fn", "symmetric": False}, ["'float8_e4m3fn'", "symmetric"]),
        ({"dtype": "nf4", "bits": 4, "signed": False}, ["'nf4'", "signed"]),
        ({"granularity": "group"}, ["group_size=None", "positive"]),
        ({"granularity": "group", "group_size": 0}, ["group_size=0", "positive"]),
        ({"granularity": "group", "group_size": 64.0}, ["group_size=64.0", "positive"]),
        ({"granularity": "group", "group_size": True}, ["group_size=True", "positive"]),
        ({"group_size": 64}, ["group_size=64", "granularity='group'"]),
        ({"granularity": "token"}, ["'token'", "dynamic=True"]),
    ],
)
def test_a_spec_that_does_not_exist_raises(fields, told):
    with pytest.raises(ValueError, match="QuantSpec") as error:
        QuantSpec(**fields)
    for part in told:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"input": SPECS[3]}, "weight"),
        ({"weight": "w8a8"}, "'w8a8'"),
        ({"weight": QuantSpec(), "input": 8}, "input=8"),
        ({"weight": SPECS[3]}, "weight"),
        ({"weight": QuantSpec(dynamic=True)}, "weight"),
        ({"weight": QuantSpec(), "input": QuantSpec()}, "input granularity='channel'"),
        ({"weight": QuantSpec(), "output": SPECS[1]}, "output granularity='group'"),
        ({"weight": QuantSpec(), "input": QuantSpec(4, "nf4", granularity="tensor")}, "input dtype='nf4'"),
    ],
)
def test_a_scheme_that_does_not_exist_raises(fields, told):
    with pytest.raises(ValueError, match="QuantScheme") as error:
        QuantScheme(**fields)
    assert told in str(error.value)


def test_unknown_fields_are_named_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"'bit'.*bits, dtype, signed, symmetric, granularity, group_size, dynamic"):
        QuantSpec.from_dict({"bit": 4})
    with pytest.raises(ValueError, match=r"'weights'.*weight, input, output"):
        QuantScheme.from_dict({"weights": {}})


@pytest.mark.parametrize("value", [8, "int8", [8]])
def test_a_spec_that_is_not_a_mapping_raises(value):
    with pytest.raises(ValueError, match=repr(value).replace("[", r"\[")):
        QuantScheme.from_dict({"weight": value})


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_specs_survive_dict_json_and_text(spec):
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert QuantSpec.decode(spec.encode()) == spec


def test_every_spec_has_its_own_text():
    assert len({spec.encode() for spec in SPECS}) == len({spec.label for spec in SPECS}) == len(SPECS)


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantScheme(QuantSpec()).weight = None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_dict(name):
    scheme = PRESETS[name].scheme
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert get_preset(name) is PRESETS[name]
    edges = PRESETS[name].edges
    assert edges is None or edges in PRESETS


def test_an_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'w5a5'") as error:
        get_preset("w5a5")
    assert all(name in str(error.value) for name in PRESETS)


TOKEN = QuantSpec(8, granularity="token", dynamic=True)
DESIGN = {
    "w8a8": (QuantSpec(8), QuantSpec(8, symmetric=False, granularity="tensor"), None),
    "w8a8-dynamic": (QuantSpec(8), TOKEN, None),
    "w8a16": (QuantSpec(8), None, None),
    "w4a16": (QuantSpec(4, granularity="group", group_size=128), None, None),
    "w4a8-dynamic": (QuantSpec(4, granularity="group", group_size=128), TOKEN, None),
    "w3a16": (QuantSpec(3, symmetric=False, granularity="group", group_size=64), None, None),
    "w2a16": (QuantSpec(2, symmetric=False, granularity="group", group_size=64), None, None),
    "w4a4": (QuantSpec(4), QuantSpec(4, symmetric=False, granularity="tensor"), "w8a8"),
    "w3a3": (QuantSpec(3), QuantSpec(3, symmetric=False, granularity="tensor"), "w8a8"),
    "w2a2": (QuantSpec(2), QuantSpec(2, symmetric=False, granularity="tensor"), "w8a8"),
    "fp8": (QuantSpec(8, "float8_e4m3fn"), QuantSpec(8, "float8_e4m3fn", granularity="token", dynamic=True), None),
    "nf4": (QuantSpec(4, "nf4", granularity="group", group_size=64), None, None),
}


def test_presets_are_those_of_the_design():
    found = {name: (preset.scheme.weight, preset.scheme.input, preset.edges) for name, preset in PRESETS.items()}
    assert {name: found.get(name) for name in DESIGN} == DESIGN
    assert all(preset.scheme.output is None for preset in PRESETS.values())


@pytest.mark.parametrize("name", PRESETS)
def test_data_is_needed_for_static_activations_only(name):
    scheme = PRESETS[name].scheme
    assert scheme.needs_data == (scheme.input is not None and not scheme.input.dynamic)


def test_overrides_of_the_weight():
    scheme = PRESETS["w8a8-dynamic"].scheme
    grouped = scheme.with_weight(bits=4, group_size=32)
    assert grouped.weight == QuantSpec(4, granularity="group", group_size=32)
    assert grouped.input == scheme.input
    assert grouped.with_weight(granularity="tensor").weight == QuantSpec(4, granularity="tensor")
    with pytest.raises(ValueError, match="'width'"):
        scheme.with_weight(width=4)
    with pytest.raises(ValueError, match="bits=4, not 3"):
        PRESETS["nf4"].scheme.with_weight(bits=3)
    with pytest.raises(ValueError, match="nothing to override"):
        QuantScheme().with_weight(bits=3)
