"""The public CI runs .ci/run, a tag becomes a release, and a bug report asks for the self-test."""

import os
import subprocess
import sys
import tomllib
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


def test_a_tag_becomes_a_checked_package_an_image_and_the_site():
    workflow = read("workflows/release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}} and workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert set(jobs) == {"package", "pypi", "image", "site"}
    assert all(jobs[name]["needs"] == "package" for name in ("pypi", "image", "site"))
    lines = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    assert "python -m build" in lines["package"] and "twine check --strict dist/*" in lines["package"]
    assert "turbo-nb t2v" in lines["package"] and "turbo-nb notebooks" in lines["package"]
    # the image has the name that .ci/address.py writes into the pages
    assert 'image="ghcr.io/${GITHUB_REPOSITORY_OWNER,,}/turbo_nb:${GITHUB_REF_NAME#v}"' in lines["image"]
    for name, text in lines.items():
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0, name


def test_the_release_refuses_a_tag_that_is_not_the_version(tmp_path):
    steps = read("workflows/release.yml")["jobs"]["package"]["steps"]
    (check,) = [step["run"] for step in steps if "GITHUB_REF_NAME" in step.get("run", "")]
    version = tomllib.loads((GITHUB.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for tag, code in ((f"v{version}", 0), (version, 1), ("v0.0.0", 1)):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = os.environ | {"GITHUB_REF_NAME": tag, "PATH": path}
        result = subprocess.run(["bash", "-c", check], cwd=GITHUB.parent, env=variables, capture_output=True)
        assert result.returncode == code, tag


def test_the_citation_has_what_the_format_needs():
    citation = yaml.load((GITHUB.parent / "CITATION.cff").read_text(encoding="utf-8"), yaml.BaseLoader)
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"
    assert all({"type", "title", "authors"} <= set(reference) for reference in citation["references"])
