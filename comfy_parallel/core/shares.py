"""A share of a job that another slot runs, and what that job's client is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LIFE = frozenset(
    (
        "execution_start",
        "execution_cached",
        "execution_success",
        "execution_error",
        "execution_interrupted",
        "executing",
        "executed",
    )
)
_IMAGES = (1, 2)  # The host's numbers for previews that do not tell which job they belong to.
_IMAGE_AND_FACTS = 4


@dataclass(frozen=True, slots=True)
class Share:
    """Whose share it is, and of which job."""

    prompt_id: str
    participant: int
    participants: int

    def told(self, event: Any, data: Any, gpu_id: int) -> Any:
        """What the client of the job hears of an event of its share; None for nothing.

        Progress and previews go to it as those of the job, with the participant. The beginning and the end of a share
        are not the job's. A preview that names no job could not be told from the other participants'.
        """
        if event in _LIFE or event in _IMAGES:
            return None
        if event == _IMAGE_AND_FACTS and isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], dict):
            return data[0], self._marked(data[1], gpu_id)
        if isinstance(data, dict) and "prompt_id" in data:
            marked = self._marked(data, gpu_id)
            if isinstance(marked.get("nodes"), dict):
                marked["nodes"] = {node_id: self._of_job(node) for node_id, node in marked["nodes"].items()}
            return marked
        return data

    def _marked(self, data: dict[str, Any], gpu_id: int) -> dict[str, Any]:
        mark = {"gpu_id": gpu_id, "participant": self.participant, "participants": self.participants}
        return {**data, "prompt_id": self.prompt_id, **mark}

    def _of_job(self, node: Any) -> Any:
        return {**node, "prompt_id": self.prompt_id} if isinstance(node, dict) else node
