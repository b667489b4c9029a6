"""The job: what is refused, what is kept, and what is cleared away."""

import os
from pathlib import Path

import pytest

from compress.job import Job, check_apart, check_replace

RECIPE = {"scheme": "fp8"}


def _write(directory: Path, name: str = "config.json", text: str = "{}") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def _finish_half(out: Path, recipe: dict[str, str]) -> None:
    """A run that ends after its first step, as if it were killed."""
    with Job(out, recipe) as job:
        _write(job.checkpoint, "shard", "half")
        job.note("shard", {"sha256": "ab"})


def test_the_output_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with Job(out, RECIPE) as job:
        assert not job.resumed
        _write(job.checkpoint)
        assert not out.exists()
        job.finish()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "{}"


def test_the_same_recipe_goes_on_and_another_starts_afresh(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _finish_half(out, RECIPE)
    with Job(out, RECIPE) as job:
        assert job.resumed and job.recall("shard") == {"sha256": "ab"}
        assert (job.checkpoint / "shard").read_text() == "half"
    with Job(out, {"scheme": "int4"}) as job:
        assert not job.resumed and job.recall("shard") is None
        assert not any(job.checkpoint.iterdir())


def test_a_note_that_cannot_be_read_counts_as_not_finished(tmp_path: Path) -> None:
    _finish_half(tmp_path / "out", RECIPE)
    (tmp_path / "out.partial" / "journal" / "shard.json").write_text('{"sha')
    with Job(tmp_path / "out", RECIPE) as job:
        assert job.resumed and job.recall("shard") is None


def test_a_journal_whose_checkpoint_was_removed_is_of_no_use(tmp_path: Path) -> None:
    _finish_half(tmp_path / "out", RECIPE)
    (tmp_path / "out.partial" / "checkpoint" / "shard").unlink()
    (tmp_path / "out.partial" / "checkpoint").rmdir()
    with Job(tmp_path / "out", RECIPE) as job:
        assert not job.resumed and job.recall("shard") is None


def test_an_error_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), Job(tmp_path / "out", RECIPE) as job:
        _write(job.checkpoint, "shard.tmp", "half")
        raise OSError("disk")
    assert not any(tmp_path.iterdir())


def test_an_error_after_the_first_step_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), Job(tmp_path / "out", RECIPE) as job:
        job.note("shard", {})
        raise OSError("disk")
    with Job(tmp_path / "out", RECIPE) as job:
        assert job.resumed and job.recall("shard") == {}


def test_a_second_run_is_refused_and_the_first_is_not_disturbed(tmp_path: Path) -> None:
    with Job(tmp_path / "out", RECIPE) as first:
        _write(first.checkpoint)
        for recipe in (RECIPE, {"scheme": "int4"}):
            with pytest.raises(ValueError, match="another run is writing"), Job(tmp_path / "out", recipe):
                pass
        first.finish()
    assert (tmp_path / "out" / "config.json").exists()


def test_a_directory_of_that_name_that_is_not_ours_stays(tmp_path: Path) -> None:
    _write(tmp_path / "out.partial", "thesis.txt")
    with pytest.raises(ValueError, match="is in the way and not ours"), Job(tmp_path / "out", RECIPE):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").exists()
    (tmp_path / "file.partial").write_text("mine")
    with pytest.raises(ValueError, match="is in the way and not ours"), Job(tmp_path / "file", RECIPE):
        pass
    assert (tmp_path / "file.partial").read_text() == "mine"


def test_an_existing_output_is_replaced_only_when_asked_and_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _write(out, text='{"old": 1}')
    with pytest.raises(ValueError, match="--overwrite"), Job(out, RECIPE):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with Job(out, RECIPE, overwrite=True) as job:
        _write(job.checkpoint, text='{"new": 1}')
        assert (out / "config.json").read_text() == '{"old": 1}'
        job.finish()
    assert (out / "config.json").read_text() == '{"new": 1}'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_going_on_without_overwrite_does_not_replace_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _finish_half(out, RECIPE)
    _write(out, text='{"old": 1}')
    with pytest.raises(ValueError, match="--overwrite"), Job(out, RECIPE):
        pass
    with Job(out, RECIPE, overwrite=True) as job:
        assert job.resumed and job.recall("shard") == {"sha256": "ab"}


def test_an_output_moved_away_by_an_interrupted_replacement_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _finish_half(out, RECIPE)
    _write(tmp_path / "out.partial" / "replaced", text='{"old": 1}')
    with Job(out, RECIPE, overwrite=True) as job:
        job.discard()  # the run turns out to be impossible
    assert (out / "config.json").read_text() == '{"old": 1}'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_leaves_alone_what_is_no_checkpoint(tmp_path: Path) -> None:
    _write(tmp_path / "home", "thesis.txt")
    with pytest.raises(ValueError, match="is no checkpoint, so --overwrite leaves it alone"):
        check_replace(tmp_path / "home", overwrite=True)


def test_an_empty_directory_and_a_link_to_one_can_be_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    with Job(tmp_path / "link", RECIPE) as job:
        _write(job.checkpoint)
        job.finish()
    assert (tmp_path / "link").is_symlink() and (real / "config.json").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with Job(Path("."), RECIPE) as job:
        _write(job.checkpoint)
        job.finish()
    assert (tmp_path / "here" / "config.json").exists()


def test_the_root_directory_and_a_mount_point_are_refused() -> None:
    with pytest.raises(ValueError, match="is the root directory"):
        Job(Path("/"), RECIPE)
    mount = next(path for path in map(Path, ("/proc", "/dev", "/sys")) if os.path.ismount(path))
    with pytest.raises(ValueError, match="is a mount point"):
        check_replace(mount, overwrite=True)


def test_output_and_model_must_lie_apart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    for out in (model, model / "out", tmp_path, tmp_path / "link", tmp_path / "link" / "out", model / ".." / "model"):
        with pytest.raises(ValueError, match="lie inside one another"):
            check_apart(out, model)
    check_apart(tmp_path / "model-int4", model)


def test_a_model_inside_the_partial_output_is_not_cleared_away(tmp_path: Path) -> None:
    model = tmp_path / "out.partial" / "checkpoint"
    model.mkdir(parents=True)
    with pytest.raises(ValueError, match="lie inside one another"):
        check_apart(tmp_path / "out", model)


def test_a_replaced_output_that_is_half_removed_does_not_come_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _finish_half(out, RECIPE)
    partial = tmp_path / "out.partial"
    (partial / "checkpoint").rename(out)  # as a run leaves it that is killed while it tidies up,
    _write(partial / "replaced")
    out.rename(tmp_path / "elsewhere")  # and then the user takes the result away
    with Job(out, RECIPE) as job:
        assert not job.resumed and not out.exists() and not job.replaced.exists()
