"""The image that a clip begins with: uploaded, or by its path."""

import html
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import ipywidgets as w

from .. import settings
from ..catalog import ModelSpec
from ..errors import InputError
from ..settings import ClipSettings
from ..video import images
from .controls import styled
from .page import error_box, paragraph, thumbnail, visible

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageInput:
    """The image of an image-to-video model. For other models there is nothing here, so no image is silently left out.

    Args:
        changed: called when the image has changed.
    """

    def __init__(self, changed: Callable[[], None]):
        self.picture: Image | None = None
        self._source: str | Image | None = None  # the path of the picture, or the picture itself
        self._changed, self._used = changed, False
        self.upload = w.FileUpload(
            description="Choose image", accept=images.ACCEPT,
            layout=w.Layout(width="auto"), tooltip=settings.options(ClipSettings)["image"].help,
        )  # fmt: skip
        self.path = styled(
            w.Text, "or its path", placeholder="a png, jpg or webp file on this machine", continuous_update=False
        )
        self.adaptive = styled(w.Checkbox, "Keep the image's aspect", value=True, indent=False)
        self.note = w.HTML()
        self.box = w.VBox([self.note, self.upload, self.path, self.adaptive])
        self.upload.observe(lambda _: self._on_upload(), "value")
        self.path.observe(lambda _: self._on_path(), "value")
        self.adaptive.observe(lambda _: changed(), "value")

    @property
    def settings(self) -> dict:
        """The options of a clip that stand here."""
        return {"image": self._source, "adaptive_resolution": self.adaptive.value} if self._used else {}

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the image; None: the clip does not begin with one."""
        return self.picture.size if self.picture and self._used else None

    def show_model(self, spec: ModelSpec) -> None:
        """Show whether a model takes an image."""
        self._used = spec.task == "i2v"
        visible(self.box, self._used)
        if self.picture is None:
            self.note.value = paragraph(
                "The clip begins with an image; the prompt says what happens. A file over 10 MB: give its path."
            )

    def take(self, source: "str | io.BytesIO | Image", name: str, more: str = "") -> bool:
        """Begin the clip with an image.

        Args:
            source: a path, the bytes of a file, or a picture.
            name: of the image, for the page.
            more: words to show after the name.

        Returns:
            Whether the image can be read. The page shows why not.
        """
        try:
            self.picture = images.load_image(source)
        except InputError as error:
            self.picture = self._source = None
            self.note.value = error_box(str(error))
        else:
            self._source = source if isinstance(source, str) else self.picture
            self.note.value = f"{thumbnail(self.picture, name)}<p>{html.escape(name + more)}</p>"
        self._changed()
        return self.picture is not None

    def _on_upload(self) -> None:
        if self.upload.value:
            file = self.upload.value[-1]
            self.take(io.BytesIO(bytes(file["content"])), file["name"])

    def _on_path(self) -> None:
        if path := self.path.value.strip():
            self.take(path, path)
