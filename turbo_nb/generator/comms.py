"""Which thread of the kernel answers a widget.

JupyterLab makes a subshell (a thread of the kernel) for the widgets' messages of each page, and removes it with the
page. ipykernel 7.4 sends a message to the subshell on which its widget last published. After a reload that can be a
subshell that is gone, and the message is lost. Other versions use the subshell that the page names in the message.
"""

import comm
import ipywidgets as w
from comm.base_comm import BaseComm

from .guard import ShowError, guarded


class Direct:
    """Stands for a widget's comm where the kernel looks up who gets a message.

    It has nothing to choose a subshell by, so the kernel takes the one that the page asks for.
    """

    def __init__(self, widget_comm: BaseComm):
        self.comm_id, self.target_name, self._comm = widget_comm.comm_id, widget_comm.target_name, widget_comm

    def handle_msg(self, msg: dict) -> None:
        """Hand on a message of the page."""
        self._comm.handle_msg(msg)

    def handle_close(self, msg: dict) -> None:
        """Hand on that the page has closed the widget."""
        self._comm.handle_close(msg)


def answer_on_any_page(root: w.Widget, show_error: ShowError) -> None:
    """Let a widget, those inside it and those that are put into it later answer each page on its own subshell.

    Args:
        root: the widget.
        show_error: called with an error of a widget that is put into it later.
    """

    def answer_new_children(change) -> None:
        for child in set(change["new"]) - set(change["old"]):
            answer_on_any_page(child, show_error)

    comm.get_comm_manager().register_comm(Direct(root.comm))
    if isinstance(root, w.Box):
        for child in root.children:
            answer_on_any_page(child, show_error)
        root.observe(guarded(answer_new_children, show_error), "children")
