"""quantization_config, both ways: what is written is read back, what is not W8A8 is refused with the reason."""

import copy
from typing import Any

import pytest

from qcompile.checkpoint.formats import Layout, Scheme, read, write
from qcompile.checkpoint.patterns import Patterns
from qcompile.errors import CheckpointError

SCHEMES = [Scheme("int8", False), Scheme("int8", True), Scheme("fp8", False), Scheme("fp8", True)]


def written(scheme: Scheme = SCHEMES[0]) -> dict[str, Any]:
    return write("compressed-tensors", {scheme: ["a.q", "a.k"]}, ["lm_head"], ["Linear"])


def test_the_example_of_the_format_page() -> None:
    assert written() == {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None, "version": "0.17.0",
        "config_groups": {"group_0": {"targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
                        "group_size": None},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
                                  "group_size": None},
            "output_activations": None}},
    }  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_written_is_read_back(scheme: Scheme) -> None:
    layout = read(written(scheme))
    assert layout.format == "compressed-tensors"
    assert layout.scheme_of("a.q", ["Linear", "Module"]) == scheme
    assert layout.scheme_of("lm_head", ["Linear"]) is None
    assert layout.scheme_of("a.norm", ["LayerNorm"]) is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_compressed_tensors_package_takes_it(scheme: Scheme) -> None:
    package = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    parsed = package.QuantizationConfig.model_validate(written(scheme))
    group = parsed.config_groups["group_0"]
    assert group.weights.num_bits == 8
    assert group.input_activations.dynamic is not scheme.static


def test_several_schemes_name_their_modules() -> None:
    config = write("compressed-tensors", {SCHEMES[0]: ["a"], SCHEMES[2]: ["b"]}, [], ["Linear"])
    layout = read(config)
    assert [layout.scheme_of(name, ["Linear"]) for name in "abc"] == [SCHEMES[0], SCHEMES[2], None]


@pytest.mark.parametrize("dtype", ["int8", "fp8", "fp8_e5m2"])
def test_lmdeploy_both_ways(dtype: str) -> None:
    config = write("lmdeploy", {Scheme(dtype, False): ["a"]}, ["lm_head"], ["Linear"])
    assert set(config) == {"quant_method", "quant_dtype", "modules_to_not_convert"}
    layout = read(config)
    assert layout.scheme_of("model.q", ["Linear"]) == Scheme(dtype, False)
    assert layout.scheme_of("lm_head", ["Linear"]) is None
    assert layout.scheme_of("model.lm_head.x", ["Linear"]) is None


def test_lmdeploy_may_leave_out_thousands() -> None:
    config = {"quant_method": "smooth_quant", "modules_to_not_convert": [f"experts.{i}.up" for i in range(2000)]}
    layout = read(config)
    found = [layout.scheme_of(f"model.layers.{i}.mlp.experts.{i}.up", ["Linear"]) for i in range(1000)]
    assert found == [None] * 1000
    assert [layout.scheme_of(name, ["Linear"]) for name in ("experts.2.upper", "xexperts.2.up")] == [SCHEMES[0]] * 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("lmdeploy", {Scheme("int8", True): ["a"]}), "holds no activation scales"),
        (("lmdeploy", {SCHEMES[0]: ["a"], SCHEMES[2]: ["b"]}), "holds one dtype"),
        (("compressed-tensors", {Scheme("fp8_e5m2", False): ["a"]}), "got fp8_e5m2"),
        (("gguf", {SCHEMES[0]: ["a"]}), "format must be one of compressed-tensors, lmdeploy; got 'gguf'"),
    ],
)
def test_what_a_format_cannot_express_is_refused(arguments: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        write(*arguments, [], ["Linear"])


def group(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["group_0"]
    return found


BROKEN: dict[str, tuple[Any, str]] = {
    "method": (lambda c: c.update(quant_method="gptq"), "quant_method must be .* got 'gptq'"),
    "no method": (lambda c: c.pop("quant_method"), "got None"),
    "kv cache": (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "no kv_cache_scheme"),
    "sparse": (lambda c: c.update(sparsity_config={"format": "sparse"}), "no sparsity_config"),
    "rotated": (lambda c: c.update(transform_config={"config_groups": 1}), "no transform_config"),
    "uncompressed": (lambda c: c.update(quantization_status="frozen"), "must be compressed; got 'frozen'"),
    "no groups": (lambda c: c.update(config_groups={}), "must have config_groups"),
    "group is text": (lambda c: c.update(config_groups={"group_0": "x"}), "must be an object"),
    "weights alone": (lambda c: group(c).update(input_activations=None), "W8A8"),
    "outputs too": (lambda c: group(c).update(output_activations={"num_bits": 8}), "output_activations"),
    "4 bits": (lambda c: group(c)["weights"].update(num_bits=4), "weights: num_bits must be 8; got 4"),
    "true bits": (lambda c: group(c)["weights"].update(num_bits=True), "num_bits must be 8; got True"),
    "asymmetric": (lambda c: group(c)["input_activations"].update(symmetric=False), "symmetric must be True"),
    "groups of 128": (lambda c: group(c)["weights"].update(strategy="group", group_size=128), "strategy must be"),
    "blocks": (lambda c: group(c)["weights"].update(block_structure=[128, 128]), "block_structure"),
    "dynamic weights": (lambda c: group(c)["weights"].update(dynamic=True), "dynamic must be False"),
    "static tokens": (lambda c: group(c)["input_activations"].update(dynamic=False), "strategy must be tensor"),
    "mixed types": (lambda c: group(c)["weights"].update(type="float"), "one number type"),
    "no targets": (lambda c: group(c).update(targets=[]), "must name its targets"),
    "targets": (lambda c: group(c).update(targets="Linear"), "targets must be a list of names"),
    "ignore": (lambda c: c.update(ignore=[1]), "ignore must be a list of names"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_symmetric_w8a8_is_refused(name: str) -> None:
    config = copy.deepcopy(written())
    edit, reason = BROKEN[name]
    edit(config)
    with pytest.raises(CheckpointError, match=reason):
        read(config)


@pytest.mark.parametrize("config", [None, 3, "x", [], {}])
def test_anything_else_is_refused(config: Any) -> None:
    with pytest.raises(CheckpointError):
        read(config)


def test_an_unknown_lmdeploy_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quant_dtype must be one of int8"):
        read({"quant_method": "smooth_quant", "quant_dtype": "int4"})


def test_targets_and_ignore_may_be_patterns_or_names() -> None:
    layout = Layout("compressed-tensors", read(written()).groups, ("re:.*mlp.*", "a.q"))
    assert layout.scheme_of("x.mlp.up", ["Linear"]) is None
    assert layout.scheme_of("a.q", ["Linear"]) is None
    assert layout.scheme_of("a.qq", ["Linear"]) == SCHEMES[0]
    bad = Layout("compressed-tensors", read(written()).groups, ("re:(",))
    with pytest.raises(CheckpointError, match="must be regular"):
        bad.scheme_of("a", ["Linear"])
    slow = Layout("compressed-tensors", read(written()).groups, ("re:.*(a|aa)+$",), Patterns(seconds=0.2))
    with pytest.raises(CheckpointError, match=r"must match in .* does not"):
        slow.scheme_of("a" * 100 + ".b", ["Linear"])
