"""The public CI runs .ci/run, and a bug report asks for the self-test."""

from pathlib import Path

import yaml

GITHUB = Path(__file__).parents[1] / ".github"


def read(name: str) -> dict:
    return yaml.load((GITHUB / name).read_text(encoding="utf-8"), yaml.BaseLoader)  # which leaves the key "on" a word


def test_the_workflow_runs_every_check_on_push_and_pull_request():
    workflow = read("workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert set(workflow["on"]) == {"push", "pull_request"}
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_a_bug_report_needs_the_output_of_verify():
    for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")):
        form = read(f"ISSUE_TEMPLATE/{path.name}")
        if path.name == "config.yml":
            continue
        assert form["name"] and form["description"] and form["body"]
        assert len({field["id"] for field in form["body"]}) == len(form["body"])
    (verify,) = [field for field in read("ISSUE_TEMPLATE/bug.yml")["body"] if field["id"] == "verify"]
    assert "`turbo-nb verify`" in verify["attributes"]["label"] and verify["validations"]["required"] == "true"
