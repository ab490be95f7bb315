"""The pictures that a clip begins and ends with: uploaded, or by their paths."""

import html
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import ipywidgets as w

from .. import settings
from ..catalog import ModelSpec
from ..settings import ClipSettings
from ..video import images
from .controls import styled
from .guard import on_change, on_click
from .page import WRAPPED, button, error_of, fold, paragraph, thumbnail, visible

if TYPE_CHECKING:
    from PIL.Image import Image


class PictureInput:
    """One picture of a clip of an image-to-video model. For other models there is nothing here.

    Args:
        option: the picture's option in `ClipSettings`.
        name: what the page calls the picture.
        label: of the path's field.
        hint: shown where no picture is chosen.
        changed: called when the picture has changed.
    """

    def __init__(self, option: str, name: str, label: str, hint: str, changed: Callable[[], None]):
        self.picture: Image | None = None
        self._source: str | Image | None = None  # the path of the picture, or the picture itself
        self._option, self._hint, self._changed, self._used = option, paragraph(hint), changed, False
        self.upload = w.FileUpload(
            description=f"Choose {name}", accept=images.ACCEPT,
            layout=w.Layout(width="auto"), tooltip=settings.options(ClipSettings)[option].help,
        )  # fmt: skip
        self.path = styled(w.Text, label, placeholder="a file on this machine", continuous_update=False)
        self.remove = button(f"Remove {name}", tooltip=f"Make the clip without this {name}")
        self.note = w.HTML()
        self.box = w.VBox([self.note, w.HBox([self.upload, self.remove], layout=w.Layout(**WRAPPED)), self.path])
        on_change(self.upload, self._on_upload, self._show_error)
        on_change(self.path, self._on_path, self._show_error)
        on_click(self.remove, self.clear, self._show_error)
        self._show(self._hint)

    @property
    def settings(self) -> dict:
        """The options of a clip that stand here."""
        return {self._option: self._source} if self._used else {}

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the picture; None: the clip does not have it."""
        return self.picture.size if self.picture and self._used else None

    def show_model(self, spec: ModelSpec) -> None:
        """Show whether a model takes the picture."""
        self._used = spec.task == "i2v"
        visible(self.box, self._used)

    def take(self, source: "str | io.BytesIO | Image", name: str, more: str = "") -> bool:
        """Give the clip a picture.

        Args:
            source: a path, the bytes of a file, or a picture.
            name: of the picture, for the page.
            more: words to show after the name.

        Returns:
            Whether the picture can be read. The page shows why not.
        """
        try:
            self.picture = images.load_image(source, self._option)
        except Exception as error:
            self.picture = self._source = None
            self._show_error(error)
        else:
            self._source = source if isinstance(source, str) else self.picture
            does = "begins" if self._option == "image" else "ends"
            picture = thumbnail(self.picture, f"The clip {does} with {name}")
            self._show(f"{picture}<p>{html.escape(name + more)}</p>")
        self._changed()
        return self.picture is not None

    def clear(self) -> None:
        """Make the clip without the picture."""
        self.picture = self._source = None
        self.path.value, self.upload.value = "", ()  # so that the same file can be chosen again
        self._show(self._hint)
        self._changed()

    def _show(self, text: str) -> None:
        self.note.value = text
        visible(self.remove, text != self._hint)

    def _show_error(self, error: Exception) -> None:
        self._show(error_of(error))

    def _on_upload(self) -> None:
        if self.upload.value:
            file = self.upload.value[-1]
            self.take(io.BytesIO(bytes(file["content"])), file["name"])

    def _on_path(self) -> None:
        if path := self.path.value.strip():
            self.take(path, path)


class ImageInput(PictureInput):
    """The picture that a clip begins with, and whether the clip has its aspect."""

    def __init__(self, changed: Callable[[], None]):
        hint = "The clip begins with an image; the prompt says what happens. A file over 10 MB: give its path."
        super().__init__("image", "image", "or its path", hint, changed)
        self.adaptive = styled(w.Checkbox, "Keep the image's aspect", value=True, indent=False)
        self.box.children = [*self.box.children, self.adaptive]
        on_change(self.adaptive, changed, self._show_error)

    @property
    def settings(self) -> dict:
        """The options of a clip that stand here."""
        return super().settings | ({"adaptive_resolution": self.adaptive.value} if self._used else {})


class LastImageInput(PictureInput):
    """The picture that a clip ends with, which it need not have."""

    def __init__(self, changed: Callable[[], None]):
        hint = "The clip ends with this picture, which is cropped to the clip's size."
        super().__init__("last_image", "last frame", "Last frame at", hint, changed)
        tip = settings.options(ClipSettings)["last_image"].help
        self.box = fold("Last frame (optional)", self.box, tip, self._show_error)

    def take(self, source: "str | io.BytesIO | Image", name: str, more: str = "") -> bool:
        """Give the clip a picture, see `PictureInput.take`."""
        self.box.toggle.value = True
        return super().take(source, name, more)
