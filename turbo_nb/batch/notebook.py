"""Notebooks: those with parameters, run by papermill, and what a notebook shows of a run."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError, first_line, not_installed
from ..machine import environment
from ..settings import RunOptions, build, check_names
from ..values import PathLike, shown
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
        InputError: papermill is not installed, the notebook does not exist or cannot be read, or it lacks a parameter
            (papermill only warns).
        OutputError: the copy cannot be written.
    """
    try:
        import papermill
    except ImportError as error:
        raise not_installed("papermill", "notebook") from error
    notebook, output = Path(PathLike()("notebook", notebook)), Path(PathLike()("output", output))
    if not environment.is_file(notebook):
        raise InputError(f"notebook is {shown(notebook)}, which does not exist. Expected the path of an .ipynb file.")
    parameters = parameters or {}
    try:
        known = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # nbformat and papermill raise errors of many types
        raise InputError(
            f"notebook is {shown(notebook)}, which cannot be read ({first_line(error)}). Expected an .ipynb file."
        ) from error
    check_names(f"a parameter of {notebook.name}", parameters, known)
    try:
        if environment.is_dir(output):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with suppress(FileNotFoundError):
            output.stat()  # raises for a name that is too long
        environment.require_writable(output.parent)
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"output is {shown(output)}, which cannot be written ({error.strerror}). Expected the path of an .ipynb "
            "file. Choose another."
        ) from error
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
