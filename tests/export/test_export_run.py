"""From a run to a file and back: the same frames, the same figures, and every contradiction an error at once."""

import shutil

import pytest

from harness.ab.judged import export_run
from harness.commands.export import main as export_command
from harness.config import ConfigError, plan_run
from harness.export.layout import ExportError
from harness.export.read import Export
from harness.report.record import load_record
from harness.run import run
from harness.session import Engine


@pytest.fixture
def judged(game, record, overrides, tmp_path):
    """A judged run, the file it wrote at its end, and the words that roll the file out."""
    path = tmp_path / "taken" / "away.safetensors"
    found = record(*overrides(game, export=path), "quant=mxfp4_mlp", "kv=mx_v_only", "gates=none")
    return found, path, overrides({**game, "model.checkpoint": path})


def test_the_file_alone_gives_the_judged_frames_and_formats(judged, record):
    first, path, words = judged
    again = record(*words)
    assert list(again.arms) == ["candidate"]
    assert [clip.scores["candidate"] for clip in again.clips] == [clip.scores["candidate"] for clip in first.clips]
    before, after = first.arms["candidate"], again.arms["candidate"]
    assert after.numeric_path == before.numeric_path
    assert after.weights_sha256 == before.weights_sha256 == Export(path).header.fingerprint
    assert after.label == "mxfp4_mlp + mx_v_only (exported)"
    assert again.config["quant"]["bits"] == 4
    assert again.gates is None


def test_beside_its_bf16_checkpoint_the_file_is_judged_again(judged, record, game):
    first, _, words = judged
    again = record(*words, f"model.baseline={game['model.checkpoint']}")
    assert [clip.scores for clip in again.clips] == [clip.scores for clip in first.clips]


def test_a_session_plays_the_file(judged, composed):
    _, _, words = judged
    engine = Engine(plan_run(composed(*words)))
    assert list(engine.arms) == ["candidate"]


def test_a_finished_run_is_exported_from_its_folder(judged, tmp_path, capsys):
    _, path, _ = judged
    assert export_command([str(tmp_path / "run"), "--out", str(tmp_path / "later.safetensors")]) == 0
    assert "mxfp4_mlp + mx_v_only" in capsys.readouterr().out
    assert (tmp_path / "later.safetensors").read_bytes() == path.read_bytes()
    assert export_command([str(tmp_path / "run"), "--out", str(path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_resuming_writes_the_export_of_a_run_that_was_killed_before_it_had(judged, composed, game, overrides, capsys):
    _, path, _ = judged
    words = [*overrides(game, export=path), "quant=mxfp4_mlp", "kv=mx_v_only", "gates=none", "resume=true"]
    written = path.read_bytes()
    path.unlink()
    run(composed(*words))
    assert path.read_bytes() == written
    run(composed(*words))
    assert "is there" in capsys.readouterr().out
    shutil.copy(game["model.checkpoint"], path)
    with pytest.raises(ExportError, match="not an exported checkpoint"):
        run(composed(*words))


def test_an_export_that_is_there_before_its_run_has_ended_is_not_replaced(judged, composed, game, overrides, tmp_path):
    _, path, _ = judged
    written = path.read_bytes()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ExportError, match="exists, and this run has not come to its end"):
        run(composed(*overrides(game, export=path), "quant=mxfp8_all", "resume=true"))
    assert path.read_bytes() == written


def test_weights_that_have_changed_since_are_not_exported(judged, tmp_path):
    record = load_record(tmp_path / "run" / "record.json")
    record.arms["candidate"].weights_sha256 = "0" * 64
    with pytest.raises(ExportError, match="not the weights that it judged"):
        export_run(record, tmp_path / "later.safetensors")
    record.status = "failed"
    with pytest.raises(ExportError, match="is failed"):
        export_run(record, tmp_path / "later.safetensors")
    assert not (tmp_path / "later.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["quant=mxfp8_all"], "quant: .* holds other formats than these"),
        (["kv=mx_kv"], "kv: .* holds other formats than these"),
        (["gates=a"], "give model.baseline=CHECKPOINT"),
        (["on_instability=fallback"], "give model.baseline, or use raise"),
        (["+model.arch.n_layers=3"], r"n_layers=3 \(the file: 2\)"),
    ],
)
def test_what_contradicts_the_file_is_an_error(judged, composed, more, message):
    _, _, words = judged
    with pytest.raises(ConfigError, match=message):
        plan_run(composed(*words, *more))


def test_the_same_formats_may_be_typed(judged, composed):
    _, _, words = judged
    assert plan_run(composed(*words, "quant=mxfp4_mlp", "kv=mx_v_only", "quant.kernel=emulated")).export is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export=away.bin", "quant=mxfp8_all"], "name a .safetensors file"),
        (["export=away.safetensors"], "nothing is MX with quant=bf16"),
        ([f"export={__file__}/away.safetensors", "quant=mxfp8_all"], r"cannot be written \(Not a directory\)"),
        (["model.baseline=${model.checkpoint}"], "model.checkpoint is none"),
    ],
)
def test_what_cannot_be_exported_is_said_before_any_work(game, overrides, composed, words, message):
    with pytest.raises(ConfigError, match=message):
        plan_run(composed(*overrides(game), *words))
