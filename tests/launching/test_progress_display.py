"""The progress line: step, loss, time left; a damaged line of the file is no reason to stop."""

from nbutils.common.progress_file import ProgressReader, read_progress
from nbutils.launching.progress_display import progress_line


def test_the_progress_line_tells_step_loss_and_time_left():
    lines = [
        {"step": 0, "max_steps": 8, "seconds": 0.0},
        {"step": 2, "max_steps": 8, "seconds": 30.0, "loss": 5.5},
    ]
    assert progress_line(lines, 40) == "[#####...............] step 2/8 | loss 5.5000 | 1:30 left"
    assert progress_line([], 61).endswith("1:01")


def test_after_a_resume_the_time_left_follows_from_the_steps_of_this_launch():
    lines = [
        {"step": 96, "max_steps": 100, "seconds": 0.004},
        {"step": 97, "max_steps": 100, "seconds": 3600.0},
    ]
    assert progress_line(lines, 3700).endswith("step 97/100 | 3:00:00 left")
    assert "left" not in progress_line(lines[:1], 10)


def test_lines_of_other_programs_are_no_step():
    assert progress_line([{"loss": 1.0}], 5).startswith("starting the ranks")


def test_a_torn_line_is_left_out_wherever_it_stands(tmp_path):
    """A full disk cuts a line; the resume writes on behind the cut."""
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "los{"step": 1}\n\xff\x00\n3\n{"step": 2}\n{"step": 3')
    assert read_progress(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_reader_reads_on_from_where_it_was(tmp_path, monkeypatch):
    path = tmp_path / "progress.jsonl"
    reader = ProgressReader(tmp_path)
    assert reader.read() == []
    path.write_text('{"step": 1}\n{"st')
    assert reader.read() == [{"step": 1}]
    with path.open("a") as out:
        out.write('ep": 2}\n')
    parsed = []
    monkeypatch.setattr(
        "nbutils.common.progress_file.json.loads", lambda line: parsed.append(line) or {"step": 2}
    )
    assert reader.read() == [{"step": 1}, {"step": 2}]
    assert parsed == [b'{"step": 2}']  # and not the first line again
    reader.read()
    assert len(parsed) == 1


def test_a_reader_tells_an_older_run_and_a_new_file_from_this_run(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text('{"step": 8}\n{"step": 9, "cut')
    reader = ProgressReader(tmp_path, from_end=True)
    assert reader.read() == []
    with path.open("a") as out:
        out.write('{"step": 1}\n')
    assert reader.read() == [{"step": 1}]
    (tmp_path / "new").write_text('{"step": 0}\n' * 9)
    (tmp_path / "new").rename(path)
    assert len(reader.read()) == 9
    path.unlink()
    assert reader.read() == []
