"""The prompt: its text, examples, and how much of it the text encoder reads."""

import html
import threading
from collections.abc import Callable

import ipywidgets as w

from .. import catalog, settings
from ..catalog import ModelSpec
from ..errors import TurboNbError
from ..settings import ClipSettings, LoadOptions
from ..text.embedding_cache import TEXT_LENGTH
from ..text.prompt_encoder import Length, length
from .controls import styled
from .guard import guarded, on_change
from .jobs import JobRunner
from .page import error_of, paragraph, visible
from .rewriting import RewriteBar

EXAMPLES = {
    "nano": (
        catalog.NANO.example,
        "a small yellow triangle growing on a navy background",
        "a big blue square falling from top to bottom on a white background",
    ),
    "wan": (
        "A ginger cat in a tiny raincoat walks along a wet cobblestone street at dusk, neon signs mirrored in the "
        "puddles. The camera follows low behind it, shallow depth of field, soft rain, cinematic light.",
        "Aerial shot of a steam train that crosses a stone viaduct in an autumn valley, mist drifting between red and "
        "golden trees, early sunlight from the left, the smoke trailing slowly behind it.",
        "Close-up of a potter's hands shaping a clay bowl on a spinning wheel, wet clay glistening, warm window light, "
        "dust in the air, a calm and steady camera.",
    ),
}
NO_NEGATIVE = (
    "<details><summary>Why is there no negative prompt?</summary><p>These models were trained to need no guidance, and "
    "a negative prompt works through guidance alone. Say what you want to see in its place.</p></details>"
)


class PromptInput:
    """The text of the prompt, and what the page says about it.

    Args:
        runner: has the tokenizers.
        changed: called when the prompt has changed.
    """

    def __init__(self, runner: JobRunner, changed: Callable[[], None]):
        self._runner, self._changed = runner, changed
        self._spec: ModelSpec | None = None
        self._options = LoadOptions()
        self._tokenizer = None
        self._showing = threading.RLock()  # because the thread that reads a tokenizer shows, too
        self.text = styled(
            w.Textarea,
            "Prompt",
            rows=4,
            placeholder="What to show",
            tooltip=settings.options(ClipSettings)["prompt"].help,
        )
        self.lines = styled(w.Checkbox, "Each line is a prompt of its own", indent=False)
        self.examples = styled(w.Dropdown, "Examples", options=[("choose one…", "")])
        self.hint = w.HTML()
        self.rewriting = RewriteBar(self.text, lambda: self.prompts)
        self.box = w.VBox([self.text, self.rewriting.box, self.lines, self.hint, self.examples])
        on_change(self.text, self.show, self._show_error)
        on_change(self.lines, changed, self._show_error)
        on_change(self.examples, self._on_example, self._show_error)

    @property
    def prompts(self) -> list[str]:
        """The prompts that the text stands for: one, or one a line."""
        lines = self._filled_lines
        return lines if self.lines.value and len(lines) > 1 else [self.text.value]

    @property
    def _filled_lines(self) -> list[str]:
        return [line.strip() for line in self.text.value.splitlines() if line.strip()]

    def show_model(self, spec: ModelSpec, options: LoadOptions) -> None:
        """Show what suits a model, and read its tokenizer in the background."""
        with self._showing:
            self._spec, self._options, self._tokenizer = spec, options, None
        self.rewriting.show_model(spec)
        examples = EXAMPLES["wan" if spec.vocabulary is None else "nano"]
        shown = [(text if len(text) < 80 else text[:78] + "…", text) for text in examples]
        self.examples.options = [("choose one…", ""), *shown]
        if not self.text.value:
            self.text.value = examples[0]
        self.read_tokenizer()
        self.show()

    def read_tokenizer(self) -> None:
        """Read the model's tokenizer in the background, if it is on the disk."""
        if self._spec is not None:
            read = guarded(self._read_tokenizer, self._show_error)
            threading.Thread(target=read, args=(self._spec, self._options), daemon=True).start()

    def show(self) -> None:
        """Show what there is to say about a text that has changed."""
        self._show_hint()
        self._changed()

    def _show_hint(self) -> None:
        with self._showing:
            visible(self.lines, len(self._filled_lines) > 1)
            self.hint.value = f"{paragraph(self._advice(), 'tnb-dim')}{self._lost()}{NO_NEGATIVE}"

    def _advice(self) -> str:
        """Return what suits the model, and the tokens of the longest prompt"""
        if self._spec is None:
            return ""
        if self._spec.vocabulary is None:
            words = "Long English prompts work best: say what is seen, how it moves, the light and the camera."
        elif self._spec.understands(self.text.value):
            words = f"{self._spec.name} knows moving shapes: size, colour, shape, motion and background."
        else:
            words = f"{self._spec.name} only knows moving shapes. Name a shape and its colour, as the examples do."
        return words if self._tokenizer is None else f"{words} {self._longest().tokens} of {TEXT_LENGTH} tokens."

    def _lost(self) -> str:
        """Return the words that the model does not read"""
        if self._tokenizer is None or not (lost := self._longest().lost):
            return ""
        words = f"The model reads {TEXT_LENGTH} tokens. It does not read:"
        return f'<p role="status">{words} <span class="tnb-cut">{html.escape(lost)}</span></p>'

    def _longest(self) -> Length:
        return max((length(prompt, self._tokenizer) for prompt in self.prompts), key=lambda one: one.tokens)

    def _read_tokenizer(self, spec: ModelSpec, options: LoadOptions) -> None:
        try:
            tokenizer = self._runner.choices.tokenizer(options)
        except TurboNbError:  # the run itself will report it
            return
        with self._showing:
            if tokenizer is None or spec is not self._spec:
                return
            self._tokenizer = tokenizer
        self._show_hint()

    def _on_example(self) -> None:
        if self.examples.value:
            self.text.value = self.examples.value
            self.examples.value = ""  # so that the same one can be chosen again

    def _show_error(self, error: Exception) -> None:
        self.hint.value = error_of(error)
