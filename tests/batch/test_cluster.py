"""The driver of Ray's actors: no job is lost or made twice, whatever ends. Real clusters are in test_ray.py."""

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_ray import FakeRay

from turbo_nb import pipeline, settings
from turbo_nb.batch import actor, cluster, engines, manifest, runner
from turbo_nb.errors import InputError, OutputError, TurboNbError, TurboNbWarning, warn
from turbo_nb.machine import atomic, environment, probe
from turbo_nb.video import mp4

REQUIRE_ANSWER = cluster._require_answer  # tests with a stand-in of Ray replace it

LOAD = {"model": "nano", "device": "cpu"}
TINY = {"num_frames": 1, "resolution": "16x16"}
JOBS = [f"a red circle {n}" for n in range(6)]


@pytest.fixture
def ray(monkeypatch, nano, made):
    """Ray's stand-in, and nano as what every actor loads"""

    def use(**options):
        fake = FakeRay(**options)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_require_answer", lambda address: None)
    monkeypatch.setattr(environment, "version", lambda name: "2.60.0")
    monkeypatch.setattr(pipeline, "load", lambda model, **options: nano)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    return use


def run(folder, jobs=JOBS, load=LOAD, **options):
    return runner.run(jobs, load, folder, **TINY | options)


def files(folder):
    return sorted(path.name for path in folder.glob("[!.]*.mp4"))


def test_actors_make_what_this_process_makes(ray, made, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "3600")
    fake, seen = ray(), []
    several = run(tmp_path / "ray", workers=2, on_status=lambda status: seen.append((status.running, status.done)))
    alone = run(tmp_path / "alone")
    assert several.ids == alone.ids and files(tmp_path / "ray") == files(tmp_path / "alone")
    assert (several.made, several.failed, len(made), fake.most) == (6, [], 12, 2)
    assert all(record.cost == sum(record.timings.values()) / 2 for record in several.records)
    assert (1, 0) in seen and (2, 1) in seen and seen[-1] == (0, 6)
    assert fake.alive == [] and not fake.initialized and fake.address == "local"
    assert fake.started["num_cpus"] >= 2 and fake.options["num_gpus"] == 0 and fake.options["num_cpus"] == 1
    assert {path.name for path in (tmp_path / "ray").glob(".*")} == {manifest.LOCK}
    again = run(tmp_path / "ray", workers=2)
    assert (again.made, len(made)) == (0, 12)


def test_a_job_that_kills_its_actors_fails_and_the_rest_continues(ray, tmp_path):
    tries = []

    def dies(method, arguments):
        if method == "make" and arguments[0].clip.prompt == JOBS[1]:
            tries.append(1)
            return "process"
        return None

    fake = ray(dies=dies)
    summary = run(tmp_path, workers=2)
    assert (summary.made, len(tries), fake.alive) == (5, cluster.MAX_TRIES, [])
    assert summary.failed[0].prompt == JOBS[1]
    assert summary.failed[0].error == "the actor ended over it, 2 times (ValueError: its cause)"


def test_the_jobs_of_lost_nodes_are_made_again(ray, made, tmp_path):
    lost = []

    def dies(method, arguments):
        if method == "make" and arguments[0].clip.prompt == JOBS[0] and len(lost) < 4:
            lost.append(1)
            return "node"
        return None

    ray(dies=dies, cpus=(8, 8, 8))
    summary = run(tmp_path, workers=2)
    assert (summary.made, summary.failed, len(lost), sorted(made)) == (6, [], 4, JOBS)


def test_a_clip_whose_actor_died_before_its_record_is_not_made_again(ray, made, tmp_path):
    done = []

    def dies(method, arguments):
        if method == "make" and not done:
            done.append(engines.make)
            fake.alive[0].value.make(*arguments)
            return "process"
        return None

    fake = ray(dies=dies)
    assert run(tmp_path, workers=2).made == 6 and sorted(made) == JOBS


def test_actors_that_die_while_they_load_end_the_run(ray, tmp_path):
    ray(dies=lambda method, arguments: "process" if method == "load" else None)
    with pytest.raises(TurboNbError, match=r"while it loaded the model \(ValueError: its cause\)\. Take fewer workers"):
        run(tmp_path, workers=2)


def test_nodes_that_are_lost_while_actors_load_do_not_end_the_run(ray, tmp_path):
    lost = []

    def dies(method, arguments):
        if method == "load" and len(lost) < 5:
            lost.append(1)
            return "node"
        return None

    ray(dies=dies, cpus=(8, 8, 8))
    assert run(tmp_path, JOBS[:1], workers=3).made == 1 and len(lost) == 5


def test_an_error_of_loading_names_the_node(ray, tmp_path, monkeypatch):
    def load(model, **options):
        raise TurboNbError("no such checkpoint")

    monkeypatch.setattr(pipeline, "load", load)
    monkeypatch.setattr(actor.socket, "gethostname", lambda: "node-7")
    ray()
    with pytest.raises(TurboNbError, match=r"no such checkpoint \(on node node-7, where a path must be, too\)"):
        run(tmp_path, workers=2)


def test_another_model_in_an_actor_is_an_error(ray, tmp_path, monkeypatch):
    ray()
    found = actor.resolve(settings.LoadOptions(model="nano", device="cpu", sla_topk=0.5))
    monkeypatch.setattr(actor, "resolve", lambda options: found)
    with pytest.raises(TurboNbError, match=r"in an actor\. Expected .*'sla_topk': 0\.15"):
        run(tmp_path, workers=2)


def test_a_full_disk_ends_the_run_and_a_lost_gpu_its_actor(ray, tmp_path, monkeypatch):
    fake = ray()
    with monkeypatch.context() as patch:
        patch.setattr(mp4.Encoder, "save", lambda *_: (_ for _ in ()).throw(OutputError("No space left")))
        with pytest.raises(OutputError, match="No space left"):
            run(tmp_path, workers=2)
    assert fake.alive == [] and files(tmp_path) == []
    lost, generate = [], actor.make

    def make(loaded, task, pictures):
        if not lost:
            lost.append(task.id)
            return task.record("failed", error="CUDA error: an illegal memory access")
        return generate(loaded, task, pictures)

    monkeypatch.setattr(actor, "make", make)
    fake.most = 0
    summary = run(tmp_path, workers=2)
    assert (summary.made, [record.id for record in summary.failed]) == (5, lost)


def test_a_folder_that_only_the_driver_sees_gets_the_bytes(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(actor.Order, "sees_folder", lambda order: False)
    monkeypatch.setattr(actor.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    ray()
    summary = run(tmp_path / "out", workers=2)
    assert (summary.made, summary.failed) == (6, []) and files(tmp_path / "out") == sorted(
        record.file for record in summary.records
    )
    assert all(mp4.read_record(tmp_path / "out" / one.file).job == one.id for one in summary.records)
    assert list((tmp_path / "node").rglob("*.mp4")) == []


def test_the_check_of_the_folder_reads_what_the_driver_wrote(tmp_path):
    def order(mark):
        return actor.Order(options=settings.LoadOptions(), identity={}, clip=(1, 1, 1), prompts=(), mark=mark)

    with atomic.temporary(tmp_path / "mark") as mark:
        mark.write_text(mark.name)
        assert order(mark).sees_folder()
        mark.write_text("another machine's")
        assert not order(mark).sees_folder() and not order(tmp_path / "no" / "mark").sees_folder()


def test_images_are_sent_to_nodes_with_another_file(ray, tmp_path, monkeypatch):
    import stand_in
    from PIL import Image

    sizes = []

    def generate(loaded, prompt, *, image, last_image=None, **options):
        sizes.append(image.size)
        return stand_in.generate(loaded, prompt, **options)

    monkeypatch.setattr(pipeline, "load", stand_in.load)
    monkeypatch.setattr("turbo_nb.generation.generate", generate)
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        Image.new("RGB", (64, 48 + 16 * n), "red").save(path)
    opened = []

    def opens(self, image, name, *, evict=True):  # as a node would that lacks 1.png, and has another 2.png
        opened.append(image)
        path = str(image)
        other = {str(paths[1]): tmp_path / "none.png", str(paths[2]): paths[0]}
        self.files = {str(other.get(one, one)): sent for one, sent in self.files.items()}
        return there(self, str(other.get(path, path)), name, evict=evict)

    there = actor.SentPictures.open
    monkeypatch.setattr(actor.SentPictures, "open", opens)
    fake = ray()
    rows = [{"prompt": "it moves", "image": str(path)} for path in paths]
    load = {"model": "Wan2.2-A14B", "device": "cpu"}
    monkeypatch.setattr("turbo_nb.files.resolve.ResolvedModel.downloads", ())
    summary = run(tmp_path / "out", rows, load, workers=2, ray_address="10.0.0.5:6379")
    assert (summary.made, summary.failed) == (3, []) and sorted(sizes) == [(64, 48), (64, 64), (64, 80)]
    assert fake.address == "10.0.0.5:6379" and len(fake.stored) == 3
    assert [record.image for record in summary.records] == [str(path) for path in paths]


def test_a_lora_is_sent_to_nodes_without_it(ray, tmp_path, monkeypatch):
    ray()
    monkeypatch.setattr(actor.tempfile, "gettempdir", lambda: str(tmp_path))
    file, other = tmp_path / "style.safetensors", tmp_path / "other" / "style.safetensors"
    file.write_bytes(b"one")
    other.parent.mkdir()
    sent = actor.fingerprint(file), FakeRay().put(b"one")
    lora = settings.LoRAFile(file=str(file), strength=0.5, expert="high")
    assert actor._lora_here(lora, sent) == lora == actor._lora_here(lora, None)
    for content in (None, b"two"):
        if content:
            other.write_bytes(content)
        here = actor._lora_here(replace(lora, file=str(other)), sent)
        assert here.file != str(other) and Path(here.file).read_bytes() == b"one"
        assert (here.strength, here.expert) == (0.5, "high")


# Which engine


@pytest.fixture
def gpus(monkeypatch):
    """A driver with two GPUs"""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(probe, "device_of", lambda device: "cuda" if device == "auto" else device)
    monkeypatch.setattr(probe, "free_memory", lambda device: 80e9)


def engine(load="nano", **options):
    return engines.engine_for(runner.model_of(load), (16, 16, 1), None, **options)


def test_without_ray_several_gpus_are_one_line_that_names_the_extra(gpus, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda name: None)
    with pytest.warns(TurboNbWarning) as caught:
        assert isinstance(engine(), engines.InProcess)
    (line,) = (str(one.message) for one in caught)
    assert "2 GPUs" in line and "pip install 'turbo-nb[ray]'" in line and "\n" not in line
    for options, got in (({"workers": 2}, "workers is 2. Expected 1"), ({"ray_address": "auto"}, "ray is 'auto'")):
        with pytest.raises(InputError) as error:
            engine(**options)
        assert str(error.value).startswith(got) and "pip install 'turbo-nb[ray]'" in str(error.value)


def test_the_engine_follows_the_devices(ray, gpus, nano):
    ray()
    assert engine().workers == 2 and engine(workers=2).workers == 2
    assert isinstance(engine(workers=1), engines.InProcess)
    assert isinstance(engine({"model": "nano", "device": "cuda:1"}), engines.InProcess)
    assert isinstance(engine(LOAD), engines.InProcess) and engine(LOAD, workers=3).workers == 3
    assert engine(ray_address="auto").workers is None
    with pytest.raises(InputError, match=r"workers is 3\. Expected at most 2, the number of GPUs"):
        engine(workers=3)
    with pytest.raises(InputError, match=r"ray is auto\. Expected None, because a loaded pipeline"):
        engine(nano, ray_address="auto")


def test_ray_address_is_found_in_the_environment(ray, tmp_path, monkeypatch):
    fake = ray()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert run(tmp_path / "a").made == 6 and fake.address == "10.0.0.5:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    fake.address = None
    assert run(tmp_path / "b").made == 6 and fake.address is None


def test_a_cluster_that_grows_gets_more_actors(ray, gpus, tmp_path):
    fake = ray(gpus=(1,))

    def grow(record, number, total):
        if number == 2:
            fake.machines.append({"NodeID": "new", "Alive": True, "Resources": {"CPU": 8, "GPU": 2}})

    summary = run(tmp_path, load="nano", ray_address="auto", on_record=grow)
    assert (summary.made, fake.most) == (6, 4)  # three at work, and one that waits for a fourth GPU
    assert fake.options["num_gpus"] == 1


def test_a_driver_without_a_gpu_asks_a_node_that_has_one(ray, tmp_path, monkeypatch):
    ray(gpus=(1, 1))
    asked = []

    def resolve(options):
        asked.append(options.device)
        return found

    found = replace(actor.resolve(settings.LoadOptions(model="nano", device="cpu")), device="cuda")
    monkeypatch.setattr(actor, "resolve", resolve)
    assert run(tmp_path, load="nano", ray_address="auto").made == 6
    assert asked == ["cuda"] * 4  # for the ids, and by three actors, one of which waits
    ray(gpus=())
    assert cluster.find_model(settings.LoadOptions(), "auto") is None


def test_actors_load_the_decoder_that_a_row_asks_for(tmp_path):
    found = engines.FoundModel(spec=None, identity={}, pinned=settings.LoadOptions())
    fake, nodes = FakeRay(gpus=(1,)), []
    for model in (found, found.decoding("tiny")):
        actors = cluster.Actors(model, tmp_path, None, "auto")
        nodes.append(actors._order(fake, engines.Work(count=1, size=(1, 1, 1), tasks=iter(())), tmp_path).decoder)
    assert nodes == ["full", "tiny"]


def test_no_cluster_at_the_address(ray, tmp_path, monkeypatch):
    fake = ray()
    monkeypatch.setattr(fake, "init", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("nobody")))
    with pytest.raises(InputError, match=r"ray is '1\.2\.3\.4:1', where no cluster answers \(nobody\)\. Expected"):
        run(tmp_path, ray_address="1.2.3.4:1")
    with pytest.raises(TurboNbError, match=r"Ray cannot start here \(nobody\)\. Take one worker"):
        run(tmp_path, workers=2)


def test_warnings_of_actors_are_shown_once(ray, tmp_path, monkeypatch):
    make = actor.make

    def warns(*arguments):
        warn("the aspect is cut")
        return make(*arguments)

    monkeypatch.setattr(actor, "make", warns)
    ray()
    with pytest.warns(TurboNbWarning) as caught:
        run(tmp_path, workers=2)
    assert [str(one.message) for one in caught] == ["the aspect is cut"]


def test_ctrl_c_kills_the_actors_and_keeps_what_is_finished(ray, made, tmp_path):
    fake = ray()

    def stop(record, number, total):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, workers=2, on_record=stop)
    assert fake.alive == [] and not fake.initialized
    assert len(files(tmp_path)) == 2 == len(manifest.read_manifest(tmp_path))
    assert run(tmp_path).made == 4 and sorted(made) == JOBS


def test_an_order_pins_every_decision(gpus, monkeypatch):
    model = actor.resolve(settings.LoadOptions(model="nano"))
    options = replace(model.pinned, device="cuda")
    order = actor.Order(options=options, identity=model.identity, clip=(16, 16, 1), prompts=(), mark=None)
    for memory in (1e9, 180e9):
        monkeypatch.setattr(probe, "free_memory", lambda device, memory=memory: memory)
        assert order.resolve().identity == model.identity
    assert json.dumps(model.identity)


@pytest.mark.parametrize(
    ("device", "given", "seen", "own"),
    [
        ("cuda", ["1"], 1, "cuda"),  # Ray hides the other GPUs
        ("cuda", ["1"], 2, "cuda:1"),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES
        ("cuda", [], 2, "cuda"),
        ("cpu", ["1"], 2, "cpu"),
    ],
)
def test_an_actor_takes_the_gpu_that_ray_gave_it(ray, monkeypatch, device, given, seen, own):
    context = type("Context", (), {"get_accelerator_ids": lambda _: {"GPU": given}})()
    monkeypatch.setattr(ray(), "get_runtime_context", lambda: context, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    assert actor.own_device(device) == own


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1",
        "ray://127.0.0.1:1",
        "[::1]:1",
        "127.0.0.1:99999",
        "☃..a:1",
        "http://127.0.0.1:1",
        "/tmp",
        "x",
        ":1",
    ],
)
def test_an_address_without_a_cluster_is_named_within_seconds(address):
    with pytest.raises(InputError, match=r"^ray is .*, where no cluster answers \(.*\)\. Expected"):
        REQUIRE_ANSWER(address)


def test_an_address_that_answers_is_tried():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        REQUIRE_ANSWER(f"127.0.0.1:{server.getsockname()[1]}")
    REQUIRE_ANSWER("auto")
