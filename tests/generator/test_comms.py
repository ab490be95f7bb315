"""Widgets answer a page after the subshell of an earlier page is gone, in a real kernel."""

import json
import time

import pytest

CODE = """
import ipywidgets as w
from turbo_nb.generator.comms import answer_on_any_page
button, text, late = w.Button(), w.Text(), w.Text()
box = w.VBox([button, text])
answer_on_any_page(box, print)
box.children = [button, text, late]
clicks = 0
def click(_):
    global clicks
    clicks += 1
    text.value = late.value = f"{clicks} clicks"  # publishes on this subshell
    button.tooltip = text.value
button.on_click(click)
"""


@pytest.fixture(scope="module")
def kernel():
    jupyter = pytest.importorskip("jupyter_client")
    manager, client = jupyter.manager.start_new_kernel()
    if "kernel subshells" not in client.kernel_info(reply=True, timeout=60)["content"].get("supported_features", ()):
        pytest.skip("this ipykernel has no subshells")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def evaluate(client, expression: str, code: str = ""):
    reply = client.execute_interactive(code, user_expressions={"x": expression}, timeout=60, output_hook=lambda _: None)
    assert reply["content"]["status"] == "ok", reply["content"]
    return json.loads(reply["content"]["user_expressions"]["x"]["data"]["text/plain"].strip("'"))


def control(client, kind: str, **content) -> dict:
    message = client.session.msg(kind, content)
    client.control_channel.send(message)
    while (reply := client.get_control_msg(timeout=30))["parent_header"].get("msg_id") != message["header"]["msg_id"]:
        pass
    assert reply["content"]["status"] == "ok"
    return reply["content"]


def send(client, subshell: str, comm_id: str, data: dict) -> None:
    message = client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
    message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)


def test_a_page_is_answered_after_the_subshell_of_an_earlier_one_is_gone(kernel):
    ids = evaluate(kernel, "__import__('json').dumps([one.comm.comm_id for one in (button, late)])", CODE)
    clicks = []
    for number in (1, 2):  # two pages, one after the other
        subshell = control(kernel, "create_subshell_request")["subshell_id"]
        send(kernel, subshell, ids[0], {"method": "custom", "content": {"event": "click"}})
        deadline = time.monotonic() + 20
        while evaluate(kernel, "clicks") < number and time.monotonic() < deadline:
            time.sleep(0.05)
        send(kernel, subshell, ids[1], {"method": "update", "state": {"value": f"page {number}"}})
        while (
            evaluate(kernel, "'%d' % (late.value == 'page " + str(number) + "')") == 0 and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        clicks.append((evaluate(kernel, "clicks"), evaluate(kernel, "__import__('json').dumps(late.value)")))
        control(kernel, "delete_subshell_request", subshell_id=subshell)
    assert clicks == [(1, "page 1"), (2, "page 2")]
