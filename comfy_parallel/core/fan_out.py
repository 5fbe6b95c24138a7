"""How one workflow is made into shares for several slots: pure planning on prompts in ComfyUI's API format."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Prompt = Mapping[str, Mapping[str, Any]]

PARTICIPANT = "participant"  # The hidden input that says whose share a node belongs to; 0, or none, is the parent's.
PARTICIPANTS = "participants"  # And how many there are.
COLLECTOR = "collector_id"  # The hidden input that says which node of the job a collector is or stands for.
OPENING = "opening"  # The hidden input that tells one opening of a node that hands out items from another.
PULLER = "puller_id"  # The hidden input that says which node of the job one that hands out items stands for.
END = "ParallelShareEnd"  # The class of the node that makes a host compute a collector which no output node needs.
BY_MODE = "mode"  # The input that says of some nodes whether they hand out items one at a time.
MOST_PARTICIPANTS = 64
MOST_BRANCHES = 10


@dataclass(frozen=True, slots=True)
class Classes:
    """The node classes that matter. `collectors` gather what each share gives; `sources` give each participant its own;
    `branching` are the collectors that take another branch from each. `pulling` hand out items, a share for each, and
    have values of the job's in the place of the named inputs; those of `by_mode` only where their mode is dynamic.
    """

    collectors: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    branching: frozenset[str] = frozenset()
    pulling: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_mode: frozenset[str] = frozenset()

    def pulls(self, node: Mapping[str, Any]) -> bool:
        """Whether a node hands out items, a share for each."""
        name = node.get("class_type")
        if name in self.by_mode and node.get("inputs", {}).get(BY_MODE) != "dynamic":
            return False
        return name in self.pulling


@dataclass(frozen=True, slots=True)
class Plan:
    """Shares of one job. `collectors`: the nodes that gather what each share gives. `sources`: those that give each
    participant its own. `varied`: both, and all between them that is made from them, so it may differ from share to
    share. `branches`: how many there are, for each collector that takes another one from each participant.

    `puller`: the node that hands out items, a share for each. How many, it says when it runs (`opened`); until then
    `participants` is the greatest number of slots at once. `given`: its inputs whose values the job gives to shares.
    """

    prompt: Prompt
    collectors: tuple[str, ...]
    participants: int
    sources: frozenset[str]
    varied: frozenset[str]
    branches: Mapping[str, int] = field(default_factory=dict)
    puller: str | None = None
    given: tuple[str, ...] = ()
    opening: str = ""

    def opened(self, items: int, opening: str) -> Plan:
        """The same with a share for each item. `opening` is another text each time."""
        return replace(self, participants=max(items, 1), opening=opening)

    @property
    def is_worth_sharing(self) -> bool:
        """Whether anything is computed that differs from share to share."""
        return self.puller is not None or bool(self.branches) or bool(self.varied - set(self.collectors))

    def shares_of(self, collector: str) -> int:
        """How many participants give something to a collector."""
        return self.branches.get(collector, self.participants)

    def collectors_of(self, participant: int) -> list[str]:
        """The collectors that a participant gives something to."""
        return [collector for collector in self.collectors if participant < self.shares_of(collector)]

    def collectors_below(self, node_id: str) -> list[str]:
        """The collectors of what this node gives."""
        below = downstream(self.prompt, [node_id], upstream(self.prompt, self.collectors))
        return [collector for collector in self.collectors if collector in below]

    def child_prompt(self, participant: int) -> dict[str, Any]:
        """What a slot runs for one share: its collectors, and all that they are made from."""
        told = {node_id: self._told(node_id, participant) for node_id in self.prompt}
        wanted = upstream(told, self.collectors_of(participant))
        return {node_id: node for node_id, node in told.items() if node_id in wanted}

    def outputs_of(self, participant: int) -> dict[str, Any]:
        """Nodes that a host needs besides to compute a share: it computes what output nodes are made from."""
        return {
            f"{collector}.end": {"class_type": END, "inputs": {"value": [collector, 0]}}
            for collector in self.collectors_of(participant)
        }

    def share_graph(self, collector: str, participant: int, prefix: str) -> dict[str, Any]:
        """The same for one collector, as nodes to add to the job that runs: only what differs is there again.

        Every id starts with `prefix`; links to what does not differ go to the job's own nodes.
        """
        told = {node_id: self._told(node_id, participant) for node_id in self.prompt}
        wanted = upstream(told, [collector]) & self.varied
        graph = {}
        for node_id, node in told.items():
            if node_id in wanted:
                inputs = {name: _relinked(value, wanted, prefix) for name, value in node["inputs"].items()}
                graph[f"{prefix}{node_id}"] = {**node, "inputs": inputs, "override_display_id": node_id}
        return graph

    def _told(self, node_id: str, participant: int) -> dict[str, Any]:
        """A node that knows whose share it belongs to, if that matters to it."""
        node = {**self.prompt[node_id], "inputs": dict(self.prompt[node_id].get("inputs", {}))}
        node.pop("is_changed", None)  # What the host has noted is the job's.
        if node_id in self.sources or node_id in self.collectors:
            node["inputs"] |= {PARTICIPANT: participant, PARTICIPANTS: self.participants}
        if node_id in self.collectors:
            node["inputs"][COLLECTOR] = node_id
        if node_id == self.puller:
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name not in self.given}
            node["inputs"] |= {OPENING: self.opening, PULLER: node_id}
        if node_id in self.branches:
            others = {branch(one) for one in range(MOST_BRANCHES)} - {branch(participant)}
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name not in others}
        return node


def plans(prompt: Prompt, outputs: Iterable[str], classes: Classes, default_participants: int) -> tuple[Plan, ...]:
    """The shares of a job: of the collectors that `outputs` need and that have more than one participant.

    The first collectors behind a node that hands out items have a plan with that node, all others have one together.
    A link that leads to no node is left to the host, which refuses such a job.
    """
    if not any(node.get("class_type") in classes.collectors for node in prompt.values()):
        return ()
    needed = upstream(prompt, outputs)
    found = [one for one in prompt if one in needed and prompt[one].get("class_type") in classes.collectors]
    pulled = [_pulled(prompt, one, found, classes, default_participants) for one in _pullers(prompt, found, classes)]
    made = [plan for plan in pulled if plan is not None]
    of_pullers = {collector for plan in pulled if plan is not None for collector in plan.collectors}
    others = tuple(one for one in found if one not in of_pullers)
    static = _divided(prompt, others, classes, default_participants) if others else None
    return (*([static] if static is not None else []), *(plan for plan in made if plan.participants > 1))


def _pullers(prompt: Prompt, found: Collection[str], classes: Classes) -> list[str]:
    if not any(classes.pulls(node) for node in prompt.values()):
        return []
    above = upstream(prompt, found)
    return [one for one in prompt if one in above and classes.pulls(prompt[one])]


def _pulled(
    prompt: Prompt, puller: str, found: Collection[str], classes: Classes, default_participants: int
) -> Plan | None:
    mine = _first_behind(prompt, puller, found)
    if not mine:
        return None
    above = upstream(prompt, mine)
    is_itself = puller in mine  # Then a participant differs from the next one by its item only.
    own = () if is_itself else (one for one in above if prompt[one].get("class_type") in classes.sources)
    sources = frozenset([puller, *own])
    most = participants([prompt[one].get("inputs", {}) for one in {puller, *mine}], default_participants)
    varied = downstream(prompt, sources.union(mine), above)
    given = classes.pulling[prompt[puller]["class_type"]]
    return Plan(prompt, mine, most, sources, varied, puller=puller, given=given)


def _first_behind(prompt: Prompt, puller: str, found: Collection[str]) -> tuple[str, ...]:
    """The collectors that what this node gives reaches without passing another one."""
    if puller in found:
        return (puller,)
    between = {one: node for one, node in prompt.items() if one not in found}
    reached = downstream(between, [puller], between)
    return tuple(one for one in found if reached.intersection(links(prompt[one])))


def _divided(prompt: Prompt, found: tuple[str, ...], classes: Classes, default_participants: int) -> Plan | None:
    branches = {
        one: _count_branches(prompt[one]) for one in found if prompt[one].get("class_type") in classes.branching
    }
    others = [prompt[one].get("inputs", {}) for one in found if one not in branches]
    count = max([*branches.values(), participants(others, default_participants) if others else 1])
    if count < 2:
        return None
    above = upstream(prompt, found)
    sources = frozenset(one for one in above if prompt[one].get("class_type") in classes.sources)
    return Plan(prompt, found, count, sources, downstream(prompt, sources.union(found), above), branches)


def participants(collectors: Iterable[Mapping[str, Any]], default: int) -> int:
    """How many shares a job is made of, by the inputs of its collectors.

    A number there wins, then the list of workers that a client of the original has written, then `load_balance`, which
    asks for the whole job on one slot.
    """
    inputs = list(collectors)
    asked = [value for one in inputs if type(value := one.get(PARTICIPANTS)) is int and value > 0]
    listed = [len(workers) + 1 for one in inputs if (workers := _workers(one.get("enabled_worker_ids")))]
    if asked or listed:
        return min(max(asked or listed), MOST_PARTICIPANTS)
    return 1 if any(one.get("load_balance") is True for one in inputs) else default


def branch(index: int) -> str:
    """The name of the input that brings a branch, counted from 0."""
    return f"branch_{index + 1}"


def _count_branches(node: Mapping[str, Any]) -> int:
    """As many as the node says, else as far as something is connected."""
    inputs = node.get("inputs", {})
    said = inputs.get("num_branches")
    if type(said) is int:
        return min(max(said, 1), MOST_BRANCHES)
    return max([index + 1 for index in range(MOST_BRANCHES) if branch(index) in inputs], default=1)


def _workers(value: Any) -> list[Any]:
    try:
        listed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return []
    return listed if isinstance(listed, list) else []


def upstream(prompt: Prompt, node_ids: Iterable[str]) -> set[str]:
    """These nodes and all that they are made from."""
    found: set[str] = set()
    waiting = [node_id for node_id in node_ids if node_id in prompt]
    while waiting:
        node_id = waiting.pop()
        if node_id not in found:
            found.add(node_id)
            waiting += [source for source in links(prompt[node_id]) if source in prompt]
    return found


def downstream(prompt: Prompt, node_ids: Iterable[str], within: Collection[str]) -> frozenset[str]:
    """These nodes and all that is made from them, of those in `within`."""
    followers: dict[str, list[str]] = {}
    for node_id in within:
        for source in links(prompt[node_id]):
            followers.setdefault(source, []).append(node_id)
    found: set[str] = set()
    waiting = list(node_ids)
    while waiting:
        node_id = waiting.pop()
        if node_id not in found:
            found.add(node_id)
            waiting += followers.get(node_id, [])
    return frozenset(found)


def links(node: Mapping[str, Any]) -> list[str]:
    """The ids of the nodes that a node takes values from."""
    return [value[0] for value in node.get("inputs", {}).values() if is_link(value)]


def is_link(value: Any) -> bool:
    """Whether an input is another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) in (int, float)


def _relinked(value: Any, among: Collection[str], prefix: str) -> Any:
    return [f"{prefix}{value[0]}", value[1]] if is_link(value) and value[0] in among else value


def bounds(total: int, parts: int, index: int) -> tuple[int, int]:
    """Where a part of `total` things begins and ends; the first parts get one more where they do not come out even."""
    size, rest = divmod(total, parts)
    start = index * size + min(index, rest)
    return start, start + size + (index < rest)
