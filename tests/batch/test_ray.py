"""Real clusters: three nodes whose actors, nodes and drivers are killed. And what docs/batch.md promises."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


def test_kills_on_three_nodes_lose_no_clip_and_make_none_twice():
    pytest.importorskip("ray", reason="Ray is not installed")
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs Linux's /proc")
    script = Path(__file__).with_name("kill_cluster.py")
    result = subprocess.run([sys.executable, script, "--kills", "3"], capture_output=True, text=True)
    words = "'actor': 1, 'node': 1, 'driver': 1, 'batches': 1, 'videos': 12"
    assert result.returncode == 0 and words in result.stderr, result.stderr


def test_the_job_of_kuberay_has_what_the_operator_needs():
    job = yaml.safe_load((DOCS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["entrypoint"].startswith("turbo-nb batch ")
    cluster = spec["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], *groups):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] and container["resources"]["limits"] == container["resources"]["requests"]
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
        assert isinstance(group["rayStartParams"], dict)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = groups
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"] and workers["groupName"]
    assert f"--workers {gpus * workers['maxReplicas']}" in spec["entrypoint"] and "--device cuda" in spec["entrypoint"]


def test_the_cluster_of_pods_has_what_ray_up_needs():
    cluster = yaml.safe_load((DOCS / "ray_on_pods.yaml").read_text())
    provider = cluster["provider"]
    assert provider["type"] == "local" and provider["head_ip"] not in provider["worker_ips"]
    assert cluster["cluster_name"] and cluster["auth"]["ssh_user"]
    assert cluster["min_workers"] == cluster["max_workers"] == len(provider["worker_ips"])
    assert "--head" in cluster["head_start_ray_commands"][-1]
    assert "--address=$RAY_HEAD_IP:6379" in cluster["worker_start_ray_commands"][-1]


def test_the_table_of_costs_is_what_the_measured_seconds_give():
    text = (DOCS / "batch.md").read_text()
    with (REPOSITORY / "benchmarks" / "results" / "h100.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["commit"].startswith("2c64cef")]
    (row,) = (r for r in rows if r["mode"] == "1 actor" and "1.3B" in r["weights"])
    seconds, price, start = float(row["ms"]) / 1000, 2.99, 60
    assert f"{seconds} s" in text and f"${price}" in text and f"{start} s for each card's start" in text
    table = [line.split("|")[1:5] for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(table) == 6
    for cards, hours, rate, dollars in table:
        total = 10_000 * seconds / int(cards) + start
        assert float(hours) == round(total / 3600, 2) and int(rate.replace(",", "")) == round(600_000 / total)
        assert float(dollars) == round(int(cards) * total / 3600 * price, 2)
