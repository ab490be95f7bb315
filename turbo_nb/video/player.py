"""A player for a finished clip that works in every front end of a notebook.

A page can open a file beside the notebook in JupyterLab only. In Colab, VS Code, Voilà and in a notebook that papermill
saved elsewhere, a path leads nowhere. So the player contains a small clip, and a large one is a poster with its path.
"""

import base64
import html
import os
from pathlib import Path
from urllib.parse import quote

from ..errors import InputError
from ..machine import environment
from ..values import local, shown
from . import mp4

EMBED = 6_000_000  # bytes of the largest clip that is embedded, because base64 adds a third to the notebook


class Player:
    """A clip that shows as a player in a notebook.

    Args:
        path: of the mp4.
        width: of the player in pixels of the page. None: the clip's own width.
    """

    def __init__(self, path: Path, width: int | None = None):
        self.path, self.width = path, width

    def __repr__(self) -> str:
        return f"{self.path} (a clip, which plays in a notebook)"

    def _repr_html_(self) -> str:
        size = self.path.stat().st_size
        limit = f"width:{self.width}px;" if self.width else ""
        style = f'style="{limit}max-width:100%;display:block"'
        name = html.escape(str(self.path))
        if size <= EMBED:
            data = base64.b64encode(self.path.read_bytes()).decode()
            return (
                f'<video src="data:video/mp4;base64,{data}" {style} aria-label="Video: {name}" '
                "controls autoplay loop muted playsinline></video>"
            )
        picture = base64.b64encode(mp4.poster(self.path)).decode()
        address = html.escape(quote(Path(os.path.relpath(self.path)).as_posix()))
        return (
            f'<figure style="margin:0"><img src="data:image/jpeg;base64,{picture}" {style} alt="First frame of {name}">'
            f'<figcaption>{size / 1e6:.1f} MB: <a href="{address}" target="_blank">{name}</a></figcaption></figure>'
        )


def play(path: str | os.PathLike, width: int | None = None) -> Player:
    """Return a player for an mp4, which a notebook shows.

    A clip of up to 6 MB is embedded, so it plays in JupyterLab, Colab, VS Code, Voilà and in a saved notebook. A larger
    clip shows its first frame and its path.

    Args:
        path: of the mp4.
        width: of the player in pixels of the page. None: the clip's own width.

    Raises:
        InputError: the file does not exist, or is not a video.
    """
    place = Path(local(path))
    if not environment.is_file(place):
        raise InputError(f"path is {shown(place)}, which is not a file. Expected an mp4. Check the path.")
    mp4.poster(place, 16)  # because a file that is not a video would be a black player without a word
    return Player(place, width)
