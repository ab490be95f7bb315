"""Notebooks: those with parameters, run by papermill, and what a notebook shows of a run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, not_installed
from ..settings import RunOptions, build, check_names
from ..values import local
from ..video.player import play

if TYPE_CHECKING:
    from .manifest import JobRecord
    from .summary import Progress


def run_notebook(
    notebook: str | os.PathLike, output: str | os.PathLike, parameters: dict | None = None, **options: Any
) -> Any:
    """Run a notebook with papermill.

    Args:
        notebook: the .ipynb to run.
        output: where its executed copy goes.
        parameters: values for the notebook's cell of parameters. None: its own.
        options: of `papermill.execute_notebook`.

    Returns:
        The executed notebook.

    Raises:
        InputError: papermill is not installed, the notebook does not exist, or it lacks a parameter (papermill only
            warns).
    """
    try:
        import papermill
    except ImportError as error:
        raise not_installed("papermill", "notebook") from error
    notebook, output = Path(local(notebook, "notebook")), Path(local(output, "output"))
    if not notebook.is_file():
        raise InputError(f"notebook is {str(notebook)!r}, which does not exist. Expected the path of an .ipynb file.")
    parameters = parameters or {}
    check_names(f"a parameter of {notebook.name}", parameters, papermill.inspect_notebook(str(notebook)))
    output.parent.mkdir(parents=True, exist_ok=True)
    options = {"progress_bar": False, "store_widget_state": False} | options
    return papermill.execute_notebook(str(notebook), str(output), parameters, **options)


def live(output_dir: str | os.PathLike) -> dict[str, Any]:
    """Return callbacks of `run` that show it in a notebook: a line with the time left, and the latest video.

    Args:
        output_dir: the folder of the run. None: that of `run`.
    """
    from IPython.display import Pretty, display

    folder = Path(build(RunOptions, {"output_dir": output_dir}).output_dir)

    handles = [display(Pretty(text), display_id=True) for text in ("loading the model", "")]
    status, clip = (handle.update if handle else lambda _: None for handle in handles)  # None outside a notebook

    def on_record(record: "JobRecord", number: int, total: int) -> None:
        clip(play(folder / record.file) if record.status == "done" else Pretty(str(record.error)))

    def on_status(progress: "Progress") -> None:
        status(Pretty(str(progress)))

    return {"on_record": on_record, "on_status": on_status}
