import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from isic.runtime.cli import report_error
from isic.runtime.errors import did_you_mean
from isic.synth.rows import draw_rows
from tests.support.commands import ROOT, Cli


def test_the_nearest_word() -> None:
    assert did_you_mean("epoch", ["epochs", "lr"]) == 'did you mean "epochs"?'
    assert did_you_mean("zzz", ["epochs", "lr"]) == "known are: epochs, lr"
    assert did_you_mean("zzz", map(str, range(50))).startswith("the nearest known is")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "--config", "vit_tiny", "--epoch", "3"],
            'unknown key "epoch", did you mean "epochs"?',
        ),
        (
            ["train", "--config", "vit_tiny", "--no_such_key", "1"],
            'unknown key "no_such_key", the nearest known is',
        ),
        (["train", "--config", "vit_tiny", "--lr", "fast"], "--lr: input should be a valid number"),
        (
            ["train", "--config", "vit_tiny", "--epochs", "0"],
            "--epochs: input should be greater than or equal to 1",
        ),
        (["train", "--config", "vit_tiny", "--fp16", "--bf16"], "choose one of --fp16 and --bf16"),
        (
            ["train", "--config", "vit_tiny", "--precision", "fp8"],
            "--precision: input should be 'auto', 'fp32', 'bf16' or 'fp16', got 'fp8'",
        ),
        (["train", "--config", "vit_tiny", "--fold", "5"], "--fold 5 is not one of 0..4"),
        (["train", "--config", "vit_tinny"], 'no config "vit_tinny", did you mean "vit_tiny"?'),
        (["train", "--config", "none.yaml"], "no config file none.yaml"),
        (["train", "--config", "demo", "--model_config", "demo"], "two names for one thing"),
        (["train", "vit_tiny"], 'unexpected argument "vit_tiny"'),
        (["train"], "give --config"),
        (["infer", "embedd"], 'unknown command "embedd", did you mean "embed"?'),
        (["infer", "embed"], "--config is required"),
        (["infer", "embed", "--config", "x", "--splitt", "train"], 'did you mean "split"?'),
        (
            ["export", "--config", "x", "--formats", "onix"],
            'no format "onix", did you mean "onnx"?',
        ),
        (["isic", "check", "--dta", "x"], 'did you mean "data"?'),
    ],
)
def test_a_wrong_command_line_is_one_message_and_exit_2(
    cli: Cli, arguments: list[str], words: str
) -> None:
    ended = cli(*arguments)
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert ended.out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "is not valid YAML"),
        ("just words", 'must hold "key: value" lines'),
        ("model: test_vit\nepochz: 3", 'broken.yaml: unknown key "epochz", did you mean "epochs"?'),
        ("model: test_vit\nepochs: many", "broken.yaml: --epochs"),
        ("", "--model is required"),
    ],
)
def test_a_broken_config_names_the_file(cli: Cli, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    ended = cli("train", "--config", tmp_path / "broken.yaml")
    assert ended.code == 2
    assert words in ended.err


def test_a_message_stays_one_short_line_whatever_it_quotes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report_error(f'a.csv: row 7 has "{"x" * 100_000}\n\x1b[31m\u202e"; correct it') == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a.csv: row 7 has ")
    assert err.endswith('\\n\\x1b[31m\\u202e"; correct it\n')
    assert err.count("\n") == 1
    assert len(err) < 1000
    report_error("Ørsted: 7 °C")
    assert capsys.readouterr().err == "error: Ørsted: 7 °C\n"


def test_help_lists_every_key() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    text = ended.stdout
    for key in ("--epochs", "--lr_backbone", "--focal_gamma", "--use_sample"):
        assert key in text
    assert "images per micro-batch" in text


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        (("train",), "one of focal, bce, asl\n"),
        (("infer", "embed"), "one of none, flips, d4\n"),
        (("infer", "predict"), "one of warn, refuse, raw\n"),
    ],
)
def test_help_lists_the_values_of_a_choice(
    cli: Cli, command: tuple[str, ...], choices: str
) -> None:
    assert choices in cli(*command, "--help").out


@pytest.mark.parametrize("module", ["isic", "export", "infer"])
def test_version_is_that_of_the_package(cli: Cli, module: str) -> None:
    ended = cli(module, "--version")
    assert ended.code == 0
    assert ended.out == f"isic-toolkit {version('isic-toolkit')}\n"


@pytest.mark.parametrize("arguments", [["isic"], ["infer", "embed", "--help"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full, so x.bin was not written; free space"),
        (errno.EROFS, "cannot write x.bin (Read-only file system); choose another output folder"),
        (errno.EFBIG, "cannot write x.bin (File too large); choose another output folder"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_message_whatever_writes(
    number: int, words: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: object) -> None:
        raise OSError(number, os.strerror(number), "x.bin")

    monkeypatch.setattr("isic.check.check", fail)
    ended = cli("isic", "check", "--data", tmp_path)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {words}")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_full_memory_is_one_message(
    error: Exception, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: object) -> None:
        raise error

    monkeypatch.setattr("isic.check.check", fail)
    ended = cli("isic", "check", "--data", tmp_path)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith("error: the memory is full; ")


def test_an_error_of_reading_is_not_taken_for_one_of_writing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x.bin")

    monkeypatch.setattr("isic.check.check", fail)
    with pytest.raises(OSError, match="Input/output error"):
        cli("isic", "check", "--data", tmp_path)


def test_ctrl_c_is_a_word(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "isic",
        "synth",
        "--out",
        str(tmp_path / "data"),
        "--images",
        "200000",
    ]
    former = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in the background it would be ignored
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        signal.signal(signal.SIGINT, former)
        assert process.stdout
        assert "sampling" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "stopped by SIGINT\n")


def write_tables(data: Path) -> None:
    """A dataset of tables only."""
    data.mkdir()
    ids, patients = (
        [f"{kind}_{row:07d}" for row in range(n)] for kind, n in (("ISIC", 200), ("IP", 20))
    )
    draw_rows(ids, patients, 40, np.random.default_rng(3)).table.write_csv(
        data / "train-metadata.csv"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_character_that_the_output_lacks_loses_no_result(encoding: str, tmp_path: Path) -> None:
    """`infer fit` prints `±`, and the text of an option, before it writes its report."""
    data = tmp_path / "data"
    write_tables(data)
    flags = ["--features", "raw", "--num_rounds", "5", "--seeds", "1", "--num_folds", "3"]
    where = ["--data", str(data), "--output_dir", str(tmp_path / "皮膚"), "--num_threads", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "infer", "fit", *flags, *where],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        encoding=encoding,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ("±" if encoding != "ascii" else "\\xb1") in ended.stdout
    assert "\\u76ae" in ended.stdout
    assert (tmp_path / "皮膚" / "raw" / "report.html").is_file()


def test_a_path_that_is_no_unicode_is_printed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    command = [sys.executable, "-m", "isic", "check", "--data", path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == 2
    assert b"caf\\udce9" in ended.stderr
    assert b"Traceback" not in ended.stderr


def test_closed_outputs_are_no_error() -> None:
    script = 'exec "$0" -m isic >&- 2>&-'
    assert (
        subprocess.run(["sh", "-c", script, sys.executable], cwd=ROOT, check=False).returncode == 0
    )
