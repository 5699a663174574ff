"""Images from Python: the same outputs as `infer embed`, all kinds of input, and refusals."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer import EmbeddedImages, ImageEmbedder, ResultWarning, UserError, load_embedder
from infer.embedding.outputs import NamedOutputs
from infer.embedding.store import read_run, scan_embeddings
from infer.engines import IN_FLIGHT
from infer.engines.null import NULL_FILE
from isic.dataset import Dataset
from isic.layout import ALL
from isic.preprocess import decode
from tests.support.commands import Cli
from tests.support.datasets import jpeg
from tests.support.fake_run import FakeRun, embed_flags


@pytest.fixture(scope="module")
def embedder(fake_run: FakeRun) -> Iterator[ImageEmbedder]:
    """Three null engines, in batches of four. The logit is the grey value plus the fold."""
    with load_embedder(fake_run.model_dir, format=NULL_FILE, batch_size=4) as loaded:
        yield loaded


def read_test_split(data: Path) -> tuple[list[str], list[bytes]]:
    dataset = Dataset(data)
    ids = dataset.metadata("test")["isic_id"].to_list()
    return ids, dataset.images("test").read(ids)


def assert_same(embedded: EmbeddedImages, root: Path, ids: list[str]) -> None:
    """Fail unless the outputs are those that `infer embed` has stored in float32."""
    for fold, outputs in embedded.by_fold.items():
        rows = scan_embeddings(root, "test", only_fold=fold).collect()
        assert rows["isic_id"].to_list() == ids
        np.testing.assert_array_equal(outputs.logits, rows["logit"])
        np.testing.assert_array_equal(outputs.features, rows["features"].to_numpy())
        assert outputs.features.dtype == outputs.logits.dtype == np.float32


@pytest.mark.parametrize("tta", ["none", "flips"])
def test_outputs_are_those_of_infer_embed(
    exported: Path, synth_dataset: Path, tmp_path: Path, tta: str, cli: Cli
) -> None:
    more = ("--dtype", "float32", "--split", "test", "--tta", tta)
    assert cli("infer", *embed_flags(exported, synth_dataset, tmp_path, *more)).code == 0
    ids, files = read_test_split(synth_dataset)
    with load_embedder(exported, tta=tta) as loaded:
        embedded = loaded.embed(files)
        assert (loaded.name, loaded.folds, loaded.num_features) == ("tiny", [0, 1, 2], 64)
    assert_same(embedded, tmp_path / "tiny", ids)
    run = read_run(tmp_path / "tiny", "test")
    assert {key: run[key] for key in embedded.origin} == embedded.origin
    by_fold = [outputs.logits for outputs in embedded.by_fold.values()]
    np.testing.assert_allclose(embedded.logits, np.mean(by_fold, axis=0), rtol=1e-6)


def test_the_network_of_all_rows_and_one_artifact(
    exported_all: Path, embedded_all: Path, synth_dataset: Path
) -> None:
    ids, files = read_test_split(synth_dataset)
    with load_embedder(exported_all, fold=ALL) as loaded:
        embedded = loaded.embed(files)
    stored = scan_embeddings(embedded_all, "test").collect()
    np.testing.assert_array_equal(embedded.logits, stored["logit"])
    artifact = exported_all / "fold_2" / "model.onnx"
    with load_embedder(str(artifact)) as one, load_embedder(exported_all, fold=2) as same:
        assert one.folds == same.folds == [2]
        first, second = one.embed(files[:3]), same.embed(files[:3])
    np.testing.assert_array_equal(first.features, second.features)
    assert first.features.shape == (3, 64)
    assert len(embedded) == len(ids)


def test_every_kind_of_image_has_the_same_pixels(embedder: ImageEmbedder, tmp_path: Path) -> None:
    data = jpeg(40, seed=3)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    pixels = decode(data)
    mirrored = np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]  # negative strides
    features = embedder.embed([path, str(path), data, pixels, mirrored]).by_fold[0].features
    assert (features == features[0]).all()
    assert len(np.unique(features[0])) > 1
    np.testing.assert_array_equal(embedder.decode([path])[0], embedder.decode([pixels])[0])
    assert embedder.decode([path]).shape == (1, embedder.spec.size, embedder.spec.size, 3)


def test_a_generator_is_read_as_batches_are_needed(embedder: ImageEmbedder) -> None:
    num_read = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal num_read
        for grey in range(30):
            num_read += 1
            yield np.full((20, 20, 3), grey, np.uint8)

    num_yielded = 0
    logits = []
    for part in embedder.batches(images()):
        num_yielded += len(part)
        assert num_read <= num_yielded + 4 * IN_FLIGHT
        logits.append(part.by_fold[0].logits)
    np.testing.assert_allclose(np.concatenate(logits), np.arange(30) / 255, atol=1e-6)


def test_images_that_cannot_be_used(embedder: ImageEmbedder, tmp_path: Path) -> None:
    good = jpeg(30, 100)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(jpeg(30)[:200])
    images = [good, b"", good, good, good, cut, tmp_path / "absent.jpg", good, "a\0b.jpg"]
    with pytest.raises(UserError, match=r"image 1 cannot be used: zero bytes; .*on_error=\"skip\""):
        embedder.embed(images)
    with pytest.raises(UserError, match=r"image 1 \(.*cut\.jpg\) cannot be used: truncated JPEG"):
        embedder.embed([good, cut])
    with pytest.raises(UserError, match=r"image 0 \(.*cut\.jpg\) cannot be used"):
        embedder.decode([cut])
    some = embedder.embed(images, on_error="skip")
    assert list(some.failed) == [1, 5, 6, 8]
    assert some.failed[6] == "cannot be read: No such file or directory"
    assert np.flatnonzero(np.isnan(some.logits)).tolist() == [1, 5, 6, 8]
    assert np.isnan(some.by_fold[2].features).all(axis=1).nonzero()[0].tolist() == [1, 5, 6, 8]
    none = embedder.embed([b"", b"no image"], on_error="skip")
    assert np.isnan(none.logits).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        ("a.jpg", "images is one path or file; give a list"),
        (b"\xff\xd8", "images is one path or file"),
        ([np.zeros((4, 4, 3), np.uint8), 7], "image 1 is a int; give a path"),
        ([np.zeros((4, 4, 3))], r"image 0 is an array float64 \[4, 4, 3\]"),
        ([np.zeros((4, 4), np.uint8)], r"image 0 is an array uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.uint8), r"image 0 is an array uint8 \[4, 3\]"),
        ([np.zeros((0, 4, 3), np.uint8)], r"image 0 is an array uint8 \[0, 4, 3\]"),
    ],
)
def test_other_objects_are_refused_even_if_images_are_skipped(
    embedder: ImageEmbedder, images: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        embedder.embed(images, on_error="skip")  # type: ignore[arg-type]


def test_one_call_at_a_time_and_none_after_the_end(fake_run: FakeRun) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    with load_embedder(fake_run.model_dir, format=NULL_FILE, batch_size=1) as loaded:
        running = loaded.batches([image] * 9)
        next(running)
        with pytest.raises(UserError, match="in use by another call"):
            loaded.embed([image])
        running.close()
        assert len(loaded.embed([image])) == 1
        with pytest.raises(UserError, match='on_error is "ignore"'):
            loaded.embed([image], on_error="ignore")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"folds 0, 1, 2 each have features of their own"):
            loaded.embed([image]).features  # noqa: B018
    with pytest.raises(UserError, match="this embedder is closed"):
        loaded.embed([image])


def test_what_cannot_be_loaded_is_refused(exported: Path, tmp_path: Path) -> None:
    artifact = exported / "fold_0" / "model.onnx"
    cases: list[tuple[Path, dict[str, object], str]] = [
        (tmp_path / "none", {}, "no such file or folder: .*none; give a run's folder"),
        (tmp_path, {}, "has no fold_<k> with an exported model; run `python -m export"),
        (exported, {"device": "gpu"}, "--device: input should be 'auto', 'cpu' or 'cuda'"),
        (exported, {"tta": "flip"}, "--tta: input should be 'none', 'flips' or 'd4'"),
        (exported, {"batch_size": 0}, "--batch_size"),
        (exported, {"fold": 7}, "has no fold_7 with an exported model"),
        (artifact, {"fold": 0}, "is one artifact; leave out fold, format and precision"),
        (exported / "fold_0" / "best_model.pth", {}, "is not an exported artifact; give one"),
    ]
    for path, more, message in cases:
        with pytest.raises(UserError, match=message):
            load_embedder(path, **more)  # type: ignore[arg-type]


def test_doubts_about_an_artifact_are_python_warnings(
    exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exported / "fold_0", tmp_path / "fold_0"))
    path = folder / "model.onnx.json"
    manifest = json.loads(path.read_text())
    other = {"precision": "int8", "parity": {"cpu": {"architecture": "another"}}}
    path.write_text(json.dumps(manifest | other))
    with pytest.warns(ResultWarning, match="fold 0 in int8 was checked on another") as caught:
        load_embedder(folder / "model.onnx").close()
    assert caught[0].filename == __file__
    assert capfd.readouterr().err == ""


def test_rows_of_images_that_failed_are_left_out_of_embeddings_in_memory(
    embedder: ImageEmbedder,
) -> None:
    embedded = embedder.embed([jpeg(30, 10), b"", jpeg(30, 20)], on_error="skip")
    named = NamedOutputs(pl.Series(["a", "b", "c"]), embedded)
    rows = scan_embeddings(named, "test").collect()
    assert rows.columns == ["isic_id", "fold", "features", "logit"]
    assert rows["isic_id"].to_list() == ["a", "c"] * 3
    assert rows["fold"].to_list() == [0, 0, 1, 1, 2, 2]
    assert rows.schema["fold"] == pl.Int8
    assert scan_embeddings(named, "test", ["logit"], 1).collect().width == 3
    assert named.skipped.to_list() == ["b"]
