"""Many prompts become videos, here or on every GPU of this machine; stopped at any moment, the next run goes on.

A job's id is the hash of what determines its video, and the video carries it. So what is done can be seen from the
folder alone: the manifest says it quickly, and a file that the manifest does not know yet says it itself.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, TurboNbError
from .prompts import _meant

if TYPE_CHECKING:
    pass


# The notebook


def run_notebook(notebook: str | os.PathLike, output: str | os.PathLike, parameters: dict | None = None, **options):
    """Run a notebook with papermill and return it; `output` is where its executed copy goes.

    options are those of `papermill.execute_notebook`. Raises InputError for parameters that the notebook does not have
    (papermill only warns of them), TurboNbError if papermill is not installed.
    """
    try:
        import papermill
    except ImportError as error:
        raise TurboNbError("papermill is not installed; pip install 'turbo-nb[notebook]'") from error
    if not Path(notebook).is_file():
        raise InputError(f"no notebook {str(notebook)!r}; give the path of an .ipynb file")
    parameters = parameters or {}
    known = papermill.inspect_notebook(str(notebook))
    if unknown := sorted(parameters.keys() - known.keys()):
        raise InputError(
            f"{Path(notebook).name} has no parameter {', '.join(map(repr, unknown))}; it has: {', '.join(known)}"
            f"{_meant(unknown[0], known)}"
        )
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    return papermill.execute_notebook(
        str(notebook), str(output), parameters, **{"progress_bar": False, "store_widget_state": False} | options
    )
