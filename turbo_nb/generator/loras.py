"""The list of LoRAs in the form: each row has a file of the folder of LoRAs and a strength.

For a model with two experts a row also chooses the expert.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import ipywidgets as w

from .. import settings
from ..errors import InputError, listed
from ..files import lora
from ..files.fingerprint import fingerprint
from ..records import LoRARecord
from ..settings import LoadOptions
from ..values import LoRAFile
from .controls import OWN, styled
from .guard import ShowError, on_change, on_click
from .page import button, close, error_of, family, paragraph, visible

LEAST, MOST, STEP = -2.0, 2.0, 0.05  # strengths that the page offers
DIGITS = 6  # of a strength, because a slider sends 0.30000000000000004
EXPERTS = [("both", OWN), ("high noise", "high"), ("low noise", "low")]
HELP = settings.options(LoadOptions)["loras"].help


class Row:
    """The controls of one LoRA.

    Args:
        changed: called when one of them has changed.
        show_error: called with an unexpected error of a control.
    """

    def __init__(self, changed: Callable[[], None], show_error: ShowError):
        def made(kind: type, flex: str, **more) -> w.Widget:
            widget = styled(kind, "", tooltip=HELP, **more)
            widget.layout.flex = flex
            return widget

        strength = {"value": 1.0, "min": LEAST, "max": MOST, "step": STEP}
        self.file = made(w.Dropdown, "3 1 280px")
        self.expert = made(w.Dropdown, "1 1 200px", options=EXPERTS)
        self.slider = made(w.FloatSlider, "1 1 160px", readout=False, continuous_update=False, **strength)
        self.strength = made(w.BoundedFloatText, "0 0 88px", **strength)
        self.strength.style.description_width = "0px"  # because the slider's label is beside it
        self.strength.add_class("tnb-no-label")
        self.remove = button("Remove")
        # screen readers name the number field only, because ipywidgets gives a slider's handle no name
        on_change(self.slider, self._from_slider, show_error)
        on_change(self.strength, self._from_strength, show_error)
        together = w.HBox([self.slider, self.strength, self.remove], layout=w.Layout(flex="2 1 340px", min_width="0"))
        self.box = w.Box([self.file, self.expert, together], layout=w.Layout(flex_flow="row wrap"))
        for one in (self.file, self.expert, self.strength):
            on_change(one, changed, show_error)

    def _from_slider(self) -> None:
        self.strength.value = round(self.slider.value, DIGITS)

    def _from_strength(self) -> None:
        self.slider.value = self.strength.value

    @property
    def value(self) -> LoRAFile:
        """The LoRA that the row asks for."""
        expert = None if self.expert.disabled or self.expert.value == OWN else self.expert.value
        return LoRAFile(file=self.file.value, strength=round(self.strength.value, DIGITS), expert=expert)

    def number(self, number: int) -> None:
        """Name the controls by the row's place."""
        self.file.description, self.expert.description = f"LoRA {number}", f"Experts {number}"
        self.slider.description, self.strength.description = f"Strength {number}", f"Strength {number} as a number"
        self.remove.tooltip = f"Remove: LoRA {number}"

    def offer(self, files: dict[str, Path]) -> None:
        """Offer these files, and the chosen one even if it is gone, so that the error names it."""
        chosen = self.file.value
        entries = [(name, str(path)) for name, path in files.items()]
        if chosen is not None and chosen not in (path for _, path in entries):
            entries.append((f"{Path(chosen).name} (missing)", chosen))
        self.file.options = entries
        if chosen is not None:
            self.file.value = chosen

    def offer_experts(self, two: bool) -> None:
        """Offer the experts of a model that has two."""
        self.expert.disabled = not two
        visible(self.expert, two)


class LoRAList:
    """The LoRAs of the clip that the form asks for.

    Args:
        changed: called when the LoRAs have changed.
        holding: joins the changes inside it to one call of `changed`.
    """

    def __init__(self, changed: Callable[[], None], holding: Callable[[], AbstractContextManager]):
        self.rows: list[Row] = []
        self._changed, self._holding, self._two_experts = changed, holding, False
        self.note = w.HTML(layout=w.Layout(flex="0 1 auto", min_width="0"))
        self.add_row, self.refresh_list = button("Add LoRA", tooltip=HELP), button("Refresh LoRAs")
        self._lines = w.VBox()
        end = w.Box([self.add_row, self.refresh_list, self.note], layout=w.Layout(flex_flow="row wrap"))
        self.box = w.VBox([self._lines, end])
        on_click(self.add_row, self.add, self._show_error)
        on_click(self.refresh_list, self.refresh, self._show_error)
        self._list()

    @property
    def value(self) -> tuple[LoRAFile, ...]:
        """The LoRAs that the rows ask for, by absolute paths, because another name could mean a repository."""
        return tuple(row.value for row in self.rows)

    def add(self, path: Path | None = None, strength: float = 1.0, expert: str | None = None) -> None:
        """Add a row.

        Args:
            path: one of the folder's files. None: the first one that has no row.
            strength, expert: as of `LoRAFile`.
        """
        used, files = {row.file.value for row in self.rows}, list(map(str, self.listing.files.values()))
        if not files:
            return
        with self._holding():
            row = Row(self._changed, self._show_error)
            row.offer(self.listing.files)
            row.file.value = str(path) if path else next((file for file in files if file not in used), files[0])
            row.strength.value, row.expert.value = strength, expert or OWN
            row.offer_experts(self._two_experts)
            on_click(row.remove, lambda: self.remove(row), self._show_error)
            self.rows.append(row)
            self._draw()

    def remove(self, row: Row) -> None:
        """Remove a row."""
        with self._holding():
            self.rows.remove(row)
            self._draw()
        close(family(row.box))

    def refresh(self) -> None:
        """List the folder again. A row whose file is gone stays."""
        with self._holding():
            self._list()

    def show(self, two_experts: bool) -> None:
        """Show whether a row chooses between the experts of the model."""
        self._two_experts = two_experts
        for row in self.rows:
            row.offer_experts(two_experts)

    def put(self, loras: Any) -> dict[str, str]:
        """Show LoRAs as `LoadOptions.loras` has them; return the reasons why some could not be shown."""
        try:
            wanted = settings.options(LoadOptions)["loras"].check("loras", loras)
        except InputError as error:
            return {"loras": str(error)}
        reasons = []
        with self._holding():
            self._clear()
            here = {str(path): path for path in self.listing.files.values()}
            for one in wanted:
                if one.file not in here:
                    reasons.append(f"{one.file} is not in {str(self.listing.folder)!r}")
                elif reason := _not_on_the_page(one.file, one.strength, one.expert):
                    reasons.append(reason)
                else:
                    self.add(here[one.file], one.strength, one.expert)
                    if one.expert and not self._two_experts:
                        reasons.append(f"{one.file} changes the whole model, which has only one expert")
        return {"loras": ", ".join(reasons)} if reasons else {}

    def restore(self, records: Iterable[LoRARecord]) -> dict[str, str]:
        """Put the LoRAs of a clip into the list.

        Returns:
            The reasons why some could not be restored, under "loras".
        """
        reasons = []
        with self._holding():
            self._clear()
            for record in records:
                path, reason = self._find(record)
                if path:
                    self.add(path, record.strength, record.expert)
                else:
                    reasons.append(reason)
        return {"loras": ", ".join(reasons)} if reasons else {}

    def _clear(self) -> None:
        """Remove all rows, and list the folder again"""
        for row in tuple(self.rows):
            self.remove(row)
        self.refresh()

    def _find(self, record: LoRARecord) -> tuple[Path | None, str]:
        """Return the file that a clip was made with, or why it gets no row"""
        if reason := _not_on_the_page(record.name, record.strength, record.expert):
            return None, reason
        named = [path for path in self.listing.files.values() if path.name == record.name]
        for path in named:
            with suppress(OSError):  # it is as good as missing
                if fingerprint(path) == record.hash:
                    return path, ""
        folder = str(self.listing.folder)
        if named:
            return None, f"{record.name} in {folder!r} has another content than the clip's"
        return None, f"{record.name} is not in {folder!r}"

    def _list(self) -> None:
        self.listing = lora.available()
        for row in self.rows:
            row.offer(self.listing.files)
        self._draw()

    def _draw(self) -> None:
        self._lines.children = [row.box for row in self.rows]
        for number, row in enumerate(self.rows, 1):
            row.number(number)
        visible(self.add_row, bool(self.listing.files))
        self.note.value = paragraph(self._words(), "tnb-dim")

    def _show_error(self, error: Exception) -> None:
        self.note.value = error_of(error)

    def _words(self) -> str:
        """Return where LoRAs belong, if none is there, and what else lies there"""
        found = self.listing
        left_out = listed(f"{name} {reason}" for name, reason in found.left_out.items())
        others = f"Left out: {left_out}." if left_out else ""
        if found.error:
            return f"LoRAs: {str(found.folder)!r} cannot be read ({found.error})."
        if found.files:
            return others
        place = f"{str(found.folder)!r}, or set {lora.FOLDER}"
        return f"No LoRAs yet. Put their files into {place}. {others}".rstrip()


def _not_on_the_page(name: str, strength: float, expert: str | None) -> str:
    """Return why no row can show a LoRA; empty where one can"""
    if not LEAST <= strength <= MOST:
        return f"the strength {strength:g} of {name} is not on the page"
    if expert not in (None, "high", "low"):
        return f"the expert {expert} of {name} is not on the page"
    return ""
