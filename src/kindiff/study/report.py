"""`kindiff report`: the page of a training run or of a study."""

from __future__ import annotations

from pathlib import Path

from kindiff.checkpoint import write_file


def write_report(path: Path, *, out: Path | None = None, work: Path = Path("runs/studies")) -> Path:
    """Write the page of a run's or a study's folder; returns the file.

    out: the file; PATH/report.html when not given. work: the working folder of a study, where its models are.
    FileNotFoundError when the folder is neither.
    """
    if (path / "study.toml").is_file():
        from kindiff.study.report_study import study_page

        content = study_page(path, work=work)
    elif (path / "run.json").is_file():
        from kindiff.study.report_run import run_page

        content = run_page(path)
    else:
        raise FileNotFoundError(
            f"{path} is neither a run nor a study: it has no run.json and no study.toml. Give the folder of a training "
            "run or of a study."
        )
    out = out or path / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, content.encode())
    return out
