"""The choice of `--format auto`, from manifests alone; the machines are pretended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infer.embedding import choice
from infer.embedding.choice import Artifact, Choice, Kind, Request, choose, find_exported
from infer.engines import cudart, tensorrt
from infer.engines import import_engine as real_import_engine
from infer.formats import AUTO, AUTO_ORDER, ENGINE_FORMATS, ON_REQUEST, exported_formats
from isic.layout import fold_dir
from isic.runtime.errors import UserError

PLANS = ("tensorrt", "tensorrt_rtx")


def manifest(format_name: str, precision: str, **fields: Any) -> dict[str, Any]:
    """Return the fields of a manifest that decide about the choice."""
    name = "-".join((format_name, precision, *map(str, fields.values())))
    made = {"name": "tiny", "artifact": f"{name}.bin", "sha256": name, "format": format_name}
    defaults: dict[str, Any] = {"precision": precision, "tta": "none"}
    if format_name == "aoti":
        defaults |= {"device": "cuda", "architecture": "cuda-sm90"}
    if format_name in PLANS:
        architectures = fields.pop("gpus", ["sm90"])
        plan = {"architectures": architectures, "version": fields.pop("version", "10.16")}
        defaults |= {"plan": {**plan, "version_compatible": False}, "parity": {}, "device": "cuda"}
    return {**made, **defaults, **fields}


def kinds(*names: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the manifests of artifacts such as `onnx fp16`."""
    return [manifest(*name.split(), **fields) for name in names]


def found(*folds: list[dict[str, Any]]) -> dict[int, list[Artifact]]:
    return {
        fold: [Artifact(Path(f"fold_{fold}", one["artifact"]), one) for one in manifests]
        for fold, manifests in enumerate(folds)
    }


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend a machine: the architecture of its GPU and the engines that run there."""

    def pretend(gpu: str | None, missing: tuple[str, ...] = ()) -> None:
        def unavailable(name: str, device: str) -> str | None:
            if device == "cuda" and gpu is None:
                return "this machine has no NVIDIA GPU; use one that has"
            return f"{name} is not installed; install it" if name in missing else None

        class Library:
            __version__ = "10.16"

        class Package:
            @staticmethod
            def mismatch(fields: dict[str, Any], device: str) -> str | None:
                here = f"cuda-{gpu}" if device == "cuda" else "cpu"
                if fields["architecture"] == here:
                    return None
                return f"was compiled for {fields['architecture']}, this is {here}"

        def import_engine(name: str) -> Any:
            return Package if name == "aoti" else real_import_engine(name)

        monkeypatch.setattr(choice, "unavailable_reason", unavailable)
        monkeypatch.setattr(choice, "gpu_architecture", lambda: gpu)
        monkeypatch.setattr(choice, "has_gpu", lambda: gpu is not None)
        monkeypatch.setattr(choice, "import_engine", import_engine)
        monkeypatch.setattr(tensorrt, "import_runtime", lambda name: Library)
        monkeypatch.setattr(cudart, "architecture", lambda: gpu)

    return pretend


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Trust all artifacts, or those whose digest does not begin with a word."""

    def distrust(word: str) -> None:
        monkeypatch.setattr(choice, "is_trusted", lambda one: not one["sha256"].startswith(word))

    distrust("nothing")
    return distrust


def name_of(chosen: Choice | None) -> str:
    assert chosen is not None
    (kind,) = {str(artifact.kind) for artifact in chosen.artifacts.values()}
    return kind


ALL = kinds(
    "onnx fp32",
    "onnx fp16",
    "onnx bf16",
    "onnx int8",
    "aoti fp32",
    "aoti fp16",
    "aoti bf16",
    "tensorrt fp16",
    "tensorrt int8",
    "tensorrt fp8",
    "tensorrt_rtx fp16",
)


@pytest.mark.parametrize(
    ("gpu", "missing", "best"),
    [
        ("sm90", (), "tensorrt fp16"),
        ("sm90", ("tensorrt",), "tensorrt_rtx fp16"),
        ("sm90", PLANS, "aoti bf16"),
        ("sm90", (*PLANS, "aoti"), "onnx fp16"),
        ("sm75", (), "onnx fp16"),
        (None, (), "onnx fp32"),
        (None, ("onnx",), "aoti fp32"),
    ],
)
def test_the_best_kind_for_a_machine_is_chosen(
    gpu: str | None, missing: tuple[str, ...], best: str, machine: Callable[..., None]
) -> None:
    machine(gpu, missing)
    on_cpu = kinds("aoti fp32", "aoti bf16", device="cpu", architecture="cpu")
    assert name_of(choose(found(ALL + on_cpu, ALL + on_cpu), Request(AUTO))) == best


@pytest.mark.parametrize("gpu", ["sm75", "sm80", "sm89", "sm90", "sm120"])
def test_bfloat16_is_chosen_from_ampere_on(gpu: str, machine: Callable[..., None]) -> None:
    machine(gpu)
    exported = kinds("aoti fp16", "aoti bf16", architecture=f"cuda-{gpu}")
    chosen = choose(found(exported), Request(AUTO))
    assert name_of(chosen) == ("aoti fp16" if gpu == "sm75" else "aoti bf16")
    only = choose(found(kinds("onnx bf16", "onnx fp32")), Request(AUTO))
    assert name_of(only) == ("onnx fp32" if gpu == "sm75" else "onnx bf16")


def test_the_order_is_kept_in_full(machine: Callable[..., None]) -> None:
    """Without its best kind, a machine takes the next one of the table."""
    for gpu, device in (("sm90", "cuda"), (None, "cpu")):
        machine(gpu)
        architecture = "cuda-sm90" if gpu else "cpu"
        manifests = {
            pair: manifest(*pair, device=device)
            | ({"architecture": architecture} if pair[0] == "aoti" else {})
            for pair in AUTO_ORDER[device]
        }
        while manifests:
            rest = [pair for pair in manifests if pair[1] not in ON_REQUEST]
            chosen = choose(found(list(manifests.values())), Request(AUTO))
            if not rest:
                assert chosen is None, "what changes scores is never chosen unasked"
                break
            assert name_of(chosen) == " ".join(rest[0])
            del manifests[rest[0]]


def test_the_table_has_every_format_and_precision_once() -> None:
    for device, order in AUTO_ORDER.items():
        offered = {
            (name, precision)
            for name in exported_formats()
            for precision in ENGINE_FORMATS[name].precisions.get(device, ())
        }
        assert set(order) == offered
        assert len(order) == len(offered)


def test_precision_and_device_restrict_the_choice(machine: Callable[..., None]) -> None:
    machine("sm90")
    exported = found(ALL)
    for request, best in (
        (Request(AUTO, precision="fp32"), "aoti fp32"),
        (Request(AUTO, precision="int8"), "tensorrt int8"),
        (Request(AUTO, precision="fp8"), "tensorrt fp8"),
        (Request(AUTO, device="cpu"), "onnx fp32"),
        (Request(AUTO, precision="int8", device="cpu"), "onnx int8"),
        (Request("onnx", precision="fp16"), "onnx fp16"),
    ):
        assert name_of(choose(exported, request)) == best
    with pytest.raises(UserError, match=r"onnx-fp16\.bin, .*choose with --precision"):
        choose(exported, Request("onnx"))
    for name, low in (("onnx", "int8"), ("tensorrt", "fp8")):
        assert choose(found(kinds(f"{name} {low}")), Request(name)) is None, "it must be named"
        both = found(kinds(f"{name} {low}", f"{name} fp16"))
        assert name_of(choose(both, Request(name))) == f"{name} fp16"


def test_all_folds_must_have_the_chosen_kind(machine: Callable[..., None]) -> None:
    machine("sm90")
    first, second = kinds("tensorrt fp16", "onnx fp16", "onnx fp32"), kinds("onnx fp32")
    chosen = choose(found(first, second, []), Request(AUTO))
    assert name_of(chosen) == "onnx fp32"
    assert chosen is not None
    assert set(chosen.artifacts) == {0, 1}, "a fold that was not exported does not count"
    assert chosen.reason == (
        "onnx fp32 on the GPU: not tensorrt fp16, because fold_1 has none; "
        "not onnx fp16, because fold_1 has none"
    )
    assert choose(found(kinds("onnx fp16"), kinds("onnx fp32")), Request(AUTO)) is None
    assert choose(found([], []), Request(AUTO)) is None


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"gpus": ["sm80", "sm89"]}, "was built for sm80 and sm89, and this GPU is sm90"),
        ({"version": "10.15"}, "was built by TensorRT 10.15, and this is 10.16"),
        ({"parity": None}, "has not passed the parity check"),
    ],
)
def test_a_plan_that_does_not_run_here_is_skipped(
    fields: dict[str, Any], cause: str, machine: Callable[..., None]
) -> None:
    machine("sm90")
    exported = [manifest("tensorrt", "fp16", **fields), *kinds("onnx fp32")]
    chosen = choose(found(exported), Request(AUTO))
    assert name_of(chosen) == "onnx fp32"
    assert chosen is not None
    assert chosen.reason.startswith("onnx fp32 on the GPU: not tensorrt fp16, because ")
    assert cause in chosen.reason
    assert "export it again" not in chosen.reason


def test_of_plans_for_several_gpus_this_ones_is_chosen(machine: Callable[..., None]) -> None:
    plans = [manifest("tensorrt", "fp16", gpus=[gpu]) for gpu in ("sm80", "sm89", "sm90")]
    for gpu in ("sm80", "sm89", "sm90"):
        machine(gpu)
        for request in (Request(AUTO), Request("tensorrt"), Request("tensorrt", "fp16")):
            chosen = choose(found(plans), request)
            assert chosen is not None
            assert chosen.artifacts[0].manifest["plan"]["architectures"] == [gpu]
    anywhere = manifest(
        "tensorrt", "fp16", gpus=["sm80plus"], options={"hardware_compatible": True}
    )
    for manifests in ([anywhere, plans[2]], [plans[2], anywhere]):
        chosen = choose(found(manifests), Request(AUTO))
        assert chosen is not None
        assert chosen.artifacts[0].manifest is plans[2], "the plan for one GPU is faster"


def test_of_packages_for_two_devices_this_machines_is_chosen(machine: Callable[..., None]) -> None:
    packages = kinds("aoti bf16") + kinds("aoti bf16", device="cpu", architecture="cpu")
    for gpu, device in (("sm90", "cuda"), (None, "cpu")):
        machine(gpu)
        for request in (Request(AUTO), Request("aoti")):
            chosen = choose(found(packages), request)
            assert chosen is not None
            assert chosen.artifacts[0].manifest["device"] == device


def test_views_inside_the_graph_are_preferred_and_never_other_ones(
    machine: Callable[..., None],
) -> None:
    machine("sm90")
    plain, d4, flips = (kinds("onnx fp16", "aoti bf16", tta=tta) for tta in ("none", "d4", "flips"))
    everything = found(plain + d4 + flips)
    for tta, best in (
        ("none", "aoti bf16"),
        ("d4", "aoti bf16 with d4 inside"),
        ("flips", "aoti bf16 with flips inside"),
    ):
        assert name_of(choose(everything, Request(AUTO, tta=tta))) == best
        named = choose(everything, Request("aoti", tta=tta))
        assert name_of(named) == best
    only_onnx = found(plain + kinds("onnx fp16", tta="d4"))
    assert name_of(choose(only_onnx, Request(AUTO, tta="d4"))) == "aoti bf16", "the format is first"
    assert name_of(choose(only_onnx, Request("onnx", tta="d4"))) == "onnx fp16 with d4 inside"
    assert choose(found(d4), Request(AUTO)) is None
    assert choose(found(d4), Request(AUTO, tta="flips")) is None
    missing = found(plain + d4, plain)
    assert name_of(choose(missing, Request(AUTO, tta="d4"))) == "aoti bf16", "all folds have it"


def test_a_resumed_run_keeps_its_engines_while_they_exist(machine: Callable[..., None]) -> None:
    machine("sm90")
    one = [*kinds("onnx fp32"), manifest("tensorrt", "fp16"), manifest("tensorrt", "fp16", fold=1)]
    exported = found(one, one)
    earlier = frozenset({"onnx-fp32"})
    chosen = choose(exported, Request(AUTO, earlier=earlier))
    assert name_of(chosen) == "onnx fp32"
    assert chosen is not None and "to resume" in chosen.reason
    second = choose(exported, Request(AUTO, earlier=frozenset({"tensorrt-fp16-1"})))
    assert second is not None
    assert {one.path.name for one in second.artifacts.values()} == {"tensorrt-fp16-1.bin"}
    for gone in (frozenset({"onnx-fp32", "other"}), frozenset({"other"})):
        assert name_of(choose(exported, Request(AUTO, earlier=gone))) == "tensorrt fp16"
    precise = Request(AUTO, precision="fp16", earlier=earlier)
    assert name_of(choose(exported, precise)) == "tensorrt fp16"


def test_a_gpu_that_is_not_used_is_explained_and_a_missing_one_is_not(
    machine: Callable[..., None],
) -> None:
    exported = found(kinds("onnx fp32", "onnx fp16"))
    machine(None)
    chosen = choose(exported, Request(AUTO))
    assert chosen is not None
    assert chosen.reason == "onnx fp32: the best exported artifact for the CPU"
    machine("sm90", missing=("aoti",))
    mixed = kinds("aoti bf16") + kinds("onnx fp16")
    chosen = choose(found(mixed), Request(AUTO))
    assert chosen is not None
    assert chosen.reason == "onnx fp16 on the GPU: not aoti bf16, because aoti is not installed"


def test_native_code_of_others_is_skipped_unless_there_is_nothing_else(
    machine: Callable[..., None], trusted: Callable[[str], None]
) -> None:
    machine("sm90")
    trusted("tensorrt")
    exported = found(kinds("tensorrt fp16", "onnx fp16"))
    chosen = choose(exported, Request(AUTO))
    assert chosen is not None
    assert chosen.reason == (
        "onnx fp16 on the GPU: not tensorrt fp16, because it is native code that you have not "
        "exported here, which takes --trust true"
    )
    assert name_of(choose(exported, Request(AUTO, trust=True))) == "tensorrt fp16"
    assert name_of(choose(exported, Request("tensorrt"))) == "tensorrt fp16", "refused later"
    assert name_of(choose(found(kinds("tensorrt fp16")), Request(AUTO))) == "tensorrt fp16"


def test_if_nothing_runs_here_the_engine_reports_why(machine: Callable[..., None]) -> None:
    machine(None)
    chosen = choose(found(kinds("tensorrt fp16", "tensorrt_rtx fp16")), Request(AUTO))
    assert name_of(chosen) == "tensorrt fp16"
    assert chosen is not None
    assert chosen.reason == "tensorrt fp16, although this machine has no NVIDIA GPU"


def test_artifacts_are_found_by_their_manifests(tmp_path: Path) -> None:
    folder = fold_dir(tmp_path, 3)
    folder.mkdir()
    fold_dir(tmp_path, 4).mkdir()
    (folder / "parity.json").write_text("{}")
    for name in ("model.onnx", "other.onnx"):
        fields = {"artifact": name, "format": "onnx", "precision": "fp32", "sha256": "0"}
        fields |= {"name": "tiny", "fold": 3, "num_features": 8, "preprocess": {"size": 32}}
        (folder / f"{name}.json").write_text(json.dumps(fields))
    (folder / "model.onnx").touch()
    exported = find_exported(tmp_path)
    assert {fold: [one.path.name for one in found] for fold, found in exported.items()} == {
        3: ["model.onnx"],
        4: [],
    }
    assert exported[3][0].kind == Kind("onnx", "fp32", "none"), "manifests may lack the views"
    (folder / "model.onnx.json").unlink()
    with pytest.raises(UserError, match=r"model\.onnx\.json is missing"):
        find_exported(tmp_path)
