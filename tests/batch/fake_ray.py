"""A stand-in for the module `ray`: actors are objects of this process, and a test says when they die.

A call runs when the driver waits for it. Nothing is pickled, so tests with a real cluster stand beside these.
"""

from itertools import count
from types import SimpleNamespace

COUNT = count()


class RayError(Exception):
    """The base of Ray's errors."""


class RayTaskError(RayError):
    """A method raised."""


class ActorDiedError(RayError):
    """The process or the node of an actor is gone."""


class Reference:
    """A call that waits, or a value that was put."""

    def __init__(self, run):
        self.run = run


class FakeRay:
    """The part of Ray that the driver uses.

    Args:
        gpus: of each node. cpus: of each node.
        dies: called as dies(name of the method, its arguments) before each call; "process" or "node" kills.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, ActorDiedError=ActorDiedError)

    def __init__(self, gpus=(), cpus=(8,), dies=lambda method, arguments: None):
        self.machines = [
            {"NodeID": str(n), "Alive": True, "Resources": {"CPU": c, "GPU": g} if g else {"CPU": c}}
            for n, (g, c) in enumerate(zip(gpus or [0] * len(cpus), [*cpus, *cpus * len(gpus)], strict=False))
        ]
        self.dies, self.alive, self.options, self.most, self.stored = dies, [], {}, 0, []
        self.initialized, self.address = False, None

    def init(self, address, **options):
        self.initialized, self.address, self.started = True, address, options
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    def shutdown(self):
        self.initialized = False
        for actor in [*self.alive]:
            self.kill(actor)

    def is_initialized(self):
        return self.initialized

    def nodes(self):
        return self.machines

    def cluster_resources(self):
        alive = [one["Resources"] for one in self.machines if one["Alive"]]
        return {name: sum(one.get(name, 0) for one in alive) for name in ("CPU", "GPU")}

    def put(self, value):
        self.stored.append(value)
        return Reference(lambda: value)

    def get(self, reference):
        return reference.run()

    def kill(self, actor):
        if actor in self.alive:
            actor.value.lock.close()
            self.alive.remove(actor)

    def wait(self, references, timeout):
        assert references, "Ray waits for nothing for ever"
        room = self.cluster_resources()["GPU"] or len(references)
        placed = [one for one in references if one.actor in self.alive[:room]]
        return placed[:1], references[1:]

    def get_runtime_context(self):
        node = next((one["NodeID"] for one in self.machines if one["Alive"]), None)
        return SimpleNamespace(
            get_actor_id=lambda: f"actor-{next(COUNT)}", get_node_id=lambda: node, get_accelerator_ids=dict
        )

    def remote(self, *function, **options):
        if not function:
            return lambda one: self.remote(one)
        if not isinstance(function[0], type):
            return SimpleNamespace(remote=lambda *arguments: Reference(lambda: function[0](*arguments)))
        return SimpleNamespace(options=lambda **options: self._hired(function[0], options))

    def _hired(self, cls, options):
        self.options = options

        def remote(*arguments):
            actor = SimpleNamespace(value=cls(*arguments))
            for name in ("load", "make"):
                setattr(actor, name, SimpleNamespace(remote=self._call(actor, name)))
            self.alive.append(actor)
            self.most = max(self.most, len(self.alive))
            return actor

        return SimpleNamespace(remote=remote)

    def _call(self, actor, name):
        def run(arguments):
            if how := self.dies(name, arguments):
                self.kill(actor)
                if how == "node":
                    self.machines[0]["Alive"] = False
                    self.machines.append(self.machines[0] | {"NodeID": str(len(self.machines)), "Alive": True})
                    self.machines.pop(0)
                place = "The actor died because its node has died." if how == "node" else "The actor died."
                raise ActorDiedError(f"{place}\n\tValueError: its cause")
            return getattr(actor.value, name)(*arguments)

        def remote(*arguments):
            reference = Reference(lambda: run(arguments))
            reference.actor = actor
            return reference

        return remote
