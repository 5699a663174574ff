"""URLs in settings: the paths that stand for them, and the keys that refuse them."""

from pathlib import Path

import pytest

from infer.embedding.settings import EmbedSettings
from isic.runtime.errors import UserError
from isic.runtime.urls import local_path, shown, url_of
from tests.support.commands import Cli
from train.config import TrainSettings, load_settings

URLS = (
    "s3://bucket",
    "s3://bucket/isic-2024",
    "gs://bucket/a b/ISIC%20ä+=&,(1)",
    "hf://datasets/owner/name@main/data",
    "memory://set",
)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("area", ["fetched", "staged"])
def test_a_path_contains_its_url(url: str, area: str) -> None:
    path = local_path(url, area)
    assert path.name == url.rsplit("/", 1)[-1]
    assert path == local_path(url + "/", area)
    assert url_of(path) == url_of(path, area) == url
    assert url_of(path / "train" / "run.json") == f"{url}/train/run.json"
    assert shown(path / "train") == f"{url}/train"


def test_two_urls_never_share_a_path() -> None:
    paths = [local_path(url, "fetched") for url in (*URLS, "s3://bucket%2Fisic-2024", "s3://set")]
    assert len({path.parent for path in paths}) == len(paths)


def test_other_paths_stand_for_no_url(tmp_path: Path) -> None:
    fetched = local_path("s3://bucket/set", "fetched")
    others = (tmp_path, Path("data"), fetched.parents[1], fetched.parent, "eva02")
    assert [url_of(path) for path in others] == [None] * len(others)
    assert url_of(fetched, "staged") is None
    assert shown(tmp_path) == str(tmp_path)


def test_a_file_url_is_its_path() -> None:
    assert local_path("file:///data/isic", "fetched") == Path("/data/isic")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://", "no such URL"),
        ("://bucket", "no such URL"),
        ("s3://bucket//set", "a name between any two slashes"),
        ("s3://bucket/../set", "neither . nor .."),
        ("sftp://me:secret@host/set", "leave the password out"),
        ("s3://bucket/" + "x" * 300, "too long by"),
    ],
)
def test_other_urls_are_refused(url: str, reason: str, cli: Cli) -> None:
    ended = cli("infer", "embed", "--config", "tiny", "--data", url)
    assert ended.code == 2
    assert reason in ended.err
    assert ended.err.count("\n") == 1


def test_settings_hold_paths_and_are_saved_with_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {
        "model": "test_vit",
        "data": "s3://bucket/set",
        "extra_data": "s3://bucket/2019,data/local, gs://other/2020",
        "pretrained": "s3://bucket/weights.safetensors",
    }
    settings = load_settings(TrainSettings, flags)
    assert settings.data.is_absolute()
    assert settings.data.name == "set"
    saved = settings.model_dump(mode="json")
    assert saved["data"] == flags["data"]
    assert saved["extra_data"] == ["s3://bucket/2019", "data/local", "gs://other/2020"]
    assert saved["pretrained"] == flags["pretrained"]
    assert TrainSettings(**saved) == settings
    monkeypatch.setenv("ISIC_CACHE_DIR", "/elsewhere")
    assert TrainSettings(**saved).data.is_relative_to("/elsewhere")


@pytest.mark.parametrize(
    "command",
    [
        "isic synth --out {url}",
        "isic folds --group site --data {url}",
        "isic import ham10000 --source {url} --out imported",
        "train --config demo --output_dir {url}",
        "export --config demo --model_dir {url}",
        "infer embed --config demo --images {url}",
        "infer embed --config demo --model_dir {url}",
        "infer fit --embeddings outputs/a,{url}",
        "infer predict --output {url}/submission.csv",
        "infer bundle --ensemble {url} --output_dir bundle",
        "benchmarks embed --config demo --data {url}",
    ],
)
def test_every_other_key_refuses_a_url(
    command: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli(*command.format(url="s3://bucket/set").split())
    assert ended.code == 2
    assert "a URL cannot be used here" in ended.err
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_url_as_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="a URL cannot be used here"):
        EmbedSettings(config="tiny", output_dir=Path("s3://bucket/embeddings"))


def test_without_a_cache_folder_a_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isic.runtime.urls.cache_folder", lambda: None)
    with pytest.raises(UserError, match="set ISIC_CACHE_DIR"):
        load_settings(TrainSettings, {"model": "test_vit", "data": "s3://bucket/set"})
