"""Notebooks with parameters, run by papermill."""

import os
from pathlib import Path
from typing import Any

from ..errors import InputError, TurboNbError
from ..settings import check_names


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
        InputError: the notebook does not exist, or lacks a parameter (papermill only warns).
        TurboNbError: papermill is not installed.
    """
    try:
        import papermill
    except ImportError as error:
        raise TurboNbError("papermill is not installed. Run: pip install 'turbo-nb[notebook]'") from error
    if not Path(notebook).is_file():
        raise InputError(f"notebook is {str(notebook)!r}, which does not exist. Expected the path of an .ipynb file.")
    parameters = parameters or {}
    check_names(f"a parameter of {Path(notebook).name}", parameters, papermill.inspect_notebook(str(notebook)))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    options = {"progress_bar": False, "store_widget_state": False} | options
    return papermill.execute_notebook(str(notebook), str(output), parameters, **options)
