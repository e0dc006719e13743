"""What of a folder is shared: an explicit list of files, so that no rollout, prompt or reply ever is.

Not on the list although a run folder holds them: ``report.html`` shows sample replies; ``run.json`` names places on the
user's disk and may hold a chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_axis.errors import StorageError, UsageError
from persona_axis.files.atomic import read_json

if TYPE_CHECKING:
    from persona_axis.geometry.axis import Axis
    from persona_axis.steering.policy import Policy

AXIS = "fit/axis.safetensors"
FIT = "fit/fit.json"
SUMMARY = "summary.json"
CALIBRATION = "calibration/calibration.json"
POLICY = "calibration/policy"
POLICY_FILES = (f"{POLICY}/policy.json", f"{POLICY}/policy.safetensors")
SHARED = (AXIS, "fit/vectors.safetensors", FIT, SUMMARY, CALIBRATION, *POLICY_FILES)
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file of the list."""

    name: str  # in the repository, as in a run folder
    path: Path
    size: int  # bytes


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a folder has to share; at least one of axis and policy."""

    folder: Path
    files: tuple[SharedFile, ...]
    axis: Axis | None
    policy: Policy | None

    def json(self, name: str) -> dict[str, Any]:
        """The content of a shared JSON file, {} when it is not there."""
        found = next((file.path for file in self.files if file.name == name), None)
        return {} if found is None else dict(read_json(found))


def read_artifact(path: str | Path) -> Artifact:
    """What a run folder, a pulled folder or a policy folder has to share, read and found whole.

    Raises:
        UsageError: no such folder, or neither an axis nor a policy in it.
        StorageError: a damaged file.
    """
    from persona_axis.geometry.axis import Axis
    from persona_axis.steering.artifact import holds_policy, load_policy, policy_folder

    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder. Name a run folder, or the folder of a policy.")
    places = {name: folder / name for name in SHARED}
    has_axis, has_policy = places[AXIS].is_file(), holds_policy(folder)
    if not has_axis and not has_policy:
        raise UsageError(
            f"{folder} holds neither an axis ({AXIS}) nor a policy (policy.json, or {POLICY_FILES[0]}). Make one with: "
            f"persona-axis run --out {folder}"
        )
    if has_policy:
        places |= {name: policy_folder(folder) / Path(name).name for name in POLICY_FILES}
    files = [SharedFile(name, place, place.stat().st_size) for name, place in places.items() if place.is_file()]
    for file in files:
        if file.name.endswith(".json") and not isinstance(read_json(file.path), dict):
            raise StorageError(f"{file.path} does not hold a JSON object. Restore it, or make it again.")
    return Artifact(
        folder,
        tuple(files),
        Axis.load(places[AXIS]) if has_axis else None,
        load_policy(folder) if has_policy else None,
    )
