"""How one workflow is made into shares for several slots: pure planning on prompts in ComfyUI's API format."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Prompt = Mapping[str, Mapping[str, Any]]

PARTICIPANT = "participant"  # The hidden input that says whose share a node belongs to; 0, or none, is the parent's.
PARTICIPANTS = "participants"  # And how many there are.
COLLECTOR = "collector_id"  # The hidden input that says which node of the job a collector is or stands for.
MOST_PARTICIPANTS = 64
MOST_BRANCHES = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """One job's shares. `collectors`: the nodes that gather what each share gives. `sources`: those that give each
    participant its own. `varied`: both, and all between them that is made from them, so it may differ from share to
    share. `branches`: how many there are, for each collector that takes another one from each participant.
    """

    prompt: Prompt
    collectors: tuple[str, ...]
    participants: int
    sources: frozenset[str]
    varied: frozenset[str]
    branches: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_worth_sharing(self) -> bool:
        """Whether anything is computed that differs from share to share."""
        return bool(self.branches) or bool(self.varied - set(self.collectors))

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
        if node_id in self.branches:
            others = {branch(one) for one in range(MOST_BRANCHES)} - {branch(participant)}
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name not in others}
        return node


def plan(
    prompt: Prompt,
    outputs: Iterable[str],
    collector_classes: Collection[str],
    source_classes: Collection[str],
    default_participants: int,
    branch_classes: Collection[str] = (),
) -> Plan | None:
    """The shares of a job; None when it has no collector that `outputs` need, or one participant only.

    `branch_classes` are the collectors that take something else from each participant: its own branch.

    A link that leads to no node is left to the host, which refuses such a job.
    """
    if not any(node.get("class_type") in collector_classes for node in prompt.values()):
        return None
    needed = upstream(prompt, outputs)
    found = tuple(one for one in prompt if one in needed and prompt[one].get("class_type") in collector_classes)
    if not found:
        return None
    branches = {one: _count_branches(prompt[one]) for one in found if prompt[one].get("class_type") in branch_classes}
    others = [prompt[one].get("inputs", {}) for one in found if one not in branches]
    count = max([*branches.values(), participants(others, default_participants) if others else 1])
    if count < 2:
        return None
    above = upstream(prompt, found)
    sources = frozenset(one for one in above if prompt[one].get("class_type") in source_classes)
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
